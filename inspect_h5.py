#!/usr/bin/env python3
"""Look into the part files that run_gemma3_extraction.py writes, and probe the states in them.

    python inspect_h5.py output                      what was run, statistics, first samples
    python inspect_h5.py output --question-id 42     one sample in full
    python inspect_h5.py output --verify --vqa-dataset vqa.csv
    python inspect_h5.py output --export layer_24.npz --layer 24
    python inspect_h5.py output --plot pca.png --color-by labels.csv:hallucinated
    python inspect_h5.py output --probe answer_is_wrong --plot auroc.png --save labels.csv
    python inspect_h5.py output --probe labels.csv:label --group vqa.csv:scene --beside blind=blind
    python inspect_h5.py output --page review.html --images-dir images --label answer_is_wrong

Samples are shown in the plan's order. Exit status: 0 all is well, 1 something is wrong and one line
says what (--verify: one line a finding), 2 wrong usage, 130 stopped by Ctrl-C.
"""

import argparse
import ast
import base64
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm import tqdm

VISION = "vision_representation"
LINK = "vision_only_representation"  # the name that HALP's probe scripts read
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
TEXTS = ["image_id", "question", "answer", "ground_truth_answer"]
COUNTS = ["row", "num_prompt_tokens", "vision_token_pos", "query_token_pos", "num_answer_tokens"]
LOGPROBS = "answer_logprobs"
ENTROPY = "first_token_entropy"
VARYING = (
    "created_at dataset dataset_sha256 num_samples python_version torch_version "
    "transformers_version device device_name cuda_version cudnn_version"
).split()  # attributes in which the parts of one run may differ
VARYING_ELSEWHERE = {"checkpoint_interval", "storage_dtype"}  # between directories
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
NUM_DRAWN = 1000  # samples in the table and the plot
PROGRESS_SECONDS = 60  # between lines where there is no terminal
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00 #F0E442 #882255 #999933".split()

Paths = str | Path | Iterable[str | Path]  # files; a directory means the parts in it
Samples = list[tuple[Path, str]]  # the file, and the group's name in it
Vectors = dict[str, int]  # the data sets of vectors, and their lengths
Finding = tuple[str, list[str]]  # what is wrong, and the question_ids that it is wrong with


# ─────────────────────────────────────────── reading ───────────────────────────────────────────
def find_parts(paths: Paths) -> list[Path]:
    """Part files, each once, in the order given; those of a directory by their number."""
    if isinstance(paths, str | Path):
        paths = [paths]
    found = {}
    for path in map(Path, paths):
        inside = [path]
        if not path.is_file():
            inside = sorted(path.glob("gemma3_12b_embeddings_part_*.h5"))
            inside.sort(key=lambda part: len(part.name))  # part 1000 after part 999
        if not inside:
            raise ValueError(f"{path} is no file, and no directory with part files in it")
        for part in inside:
            found.setdefault(part.resolve(), part)
    if not found:
        raise ValueError("no part files")
    return list(found.values())


def scan_parts(paths: Paths) -> tuple[dict[Path, dict], Samples, list[Finding]]:
    """The attributes of each readable part, all samples in order, why they are not one run."""
    parts = {}
    owners = {}  # the part in which a sample was found first
    findings = []
    for path in find_parts(paths):
        try:
            if not path.is_file():  # h5py would wait for ever for somebody to write to a FIFO
                raise OSError("it is not a regular file")
            with h5py.File(path) as file:
                part = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
                names = list(file)
                if part.get("schema_version", 1) < 3:  # since then it is the order of groups
                    names.sort(key=lambda name: int(file[name].attrs.get("row", -1)))
            list_vectors(part)  # which raises where an attribute that it needs is missing
        except UNREADABLE as error:
            findings.append((f"{path}: cannot be read as a part: {error}", []))
            continue
        parts[path] = part
        findings += find_differences(path, parts)
        if part.get("num_samples") != len(names):
            what = f"num_samples is {part.get('num_samples')}, not {len(names)}"
            findings.append((f"{path}: {what}", []))
        twice = [name for name in names if name in owners]
        if twice:
            what = f"{path}: question_id is in {owners[twice[0]]} too"
            findings.append((what, list(map(unquote, twice))))
        owners |= {name: path for name in names if name not in owners}
    return parts, [(path, name) for name, path in owners.items()], findings


def find_differences(path: Path, parts: dict[Path, dict]) -> Iterator[Finding]:
    """Why a part is not of one run with those before it; of other directories less is asked."""
    part = parts[path]
    first = next(iter(parts.values()))
    sibling = next(other for there, other in parts.items() if there.parent == path.parent)
    is_pinned = re.fullmatch("[0-9a-f]{40,64}", str(part.get("model_revision")))
    keys = part.keys() | first.keys() | sibling.keys()
    for key in sorted(keys.difference(VARYING)):
        expected = sibling if key in VARYING_ELSEWHERE else first
        is_same_model = is_pinned and part["model_revision"] == first.get("model_revision")
        if part.get(key) != expected.get(key) and not (key == "model_name" and is_same_model):
            yield f"{path}: {key} is {part.get(key)!r}, not {expected.get(key)!r}", []


def open_run(paths: Paths) -> tuple[dict[Path, dict], Samples]:
    """Each part's attributes, all samples in order. Raises ValueError if they are not one run."""
    parts, samples, findings = scan_parts(paths)
    if findings:
        what, ids = findings[0]
        raise ValueError(what + "".join(f" (first {name!r})" for name in ids[:1]))
    return parts, samples


def list_vectors(part: dict, kind: str | None = None, layer: int | None = None) -> Vectors:
    """A sample's vectors, of one representation or layer if it is given, and their lengths."""
    chosen = {}
    if kind in (None, VISION) and layer is None:
        chosen[VISION] = part["vision_hidden_size"]
    for name in KINDS:
        for i in part["layers"]:
            if kind in (None, name) and layer in (None, i):
                chosen[f"{name}/layer_{i}"] = part["hidden_size"]
    if not chosen:
        there = f"{VISION}, {', '.join(KINDS)}, layers {one_line(part['layers'], 40)}"
        raise ValueError(f"no layer {layer} of {kind or 'any representation'}; there are {there}")
    return chosen


def layer_of(name: str) -> int | None:
    """The layer that a data set's name ends in."""
    layer = name.partition("/layer_")[2]
    return int(layer) if layer else None


def read(group: h5py.Group, name: str, width: int | None = None) -> np.ndarray | str:
    """A vector float32 [width], or a text, in a third of the time that `group[name][()]` takes."""
    values = np.empty((), h5py.string_dtype())
    if width is not None:
        values = np.empty(width, np.float32)
    dataset = h5py.h5d.open(group.id, name.encode())
    if (dataset.shape, dataset.dtype) != (values.shape, values.dtype):
        raise ValueError(f"{dataset.dtype} {dataset.shape}, not {values.dtype} {values.shape}")
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    if width is None:
        return values.item().decode()
    return values


def each(samples: Samples, function: Callable, *args, strict: bool = True) -> Iterator:
    """`function(group, *args)` of every sample; where not `strict`, a problem of what is broken."""
    for path, inside in itertools.groupby(samples, key=lambda sample: sample[0]):
        with h5py.File(path) as file:
            for _, name in inside:
                try:
                    yield function(file[name], *args)
                except UNREADABLE as error:
                    what = f"cannot be opened: {error.args[-1]}"
                    question_id = unquote(name)
                    if strict:
                        raise ValueError(f"{path}, {question_id!r} {what}") from error
                    yield {"path": path, "question_id": question_id, "problems": [what]}


def read_texts(samples: Samples) -> pd.DataFrame:
    """question_id, texts and attributes, in the order of `samples`, without what no sample has."""
    columns = [*TEXTS, *COUNTS, "answer_truncated", "image_sha256", ENTROPY, LOGPROBS]

    def read_record(group: h5py.Group) -> dict:
        record = {name: read(group, name) for name in TEXTS}
        record.update(group.attrs)
        if LOGPROBS in group:
            record[LOGPROBS] = group[LOGPROBS][()].tolist()
        return record

    table = pd.DataFrame(each(samples, read_record), columns=columns)
    table.insert(0, "question_id", [unquote(name) for _, name in samples])
    return table.dropna(axis=1, how="all") if samples else table


def read_matrix(samples: Samples, vector: str, width: int) -> np.ndarray:
    """One vector of each sample, in their order: float32 [num_samples, width]."""
    vectors = each(samples, read, vector, width)
    return np.fromiter(vectors, (np.float32, width), len(samples))


def load_embeddings(
    paths: Paths, representation: str, layer: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """A DataFrame of texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are files or directories; `vision_representation` has no layer. Raises ValueError.
    """
    parts, samples = open_run(paths)
    vectors = list_vectors(next(iter(parts.values())), representation, layer)
    if len(vectors) > 1:
        raise ValueError(f"{representation}: say which layer, as in {', '.join([*vectors][:5])}")
    return read_texts(samples), read_matrix(samples, *vectors.popitem())


def read_table(path: Path, *columns: tuple[str, ...]) -> pd.DataFrame:
    """Columns of a CSV by question_id, text unchanged; each by the first name that is there."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines = list(reader)
            header = list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise ValueError(f"{path} looks separated by semicolons or tabs: save it with commas")
    chosen = []
    for names in [("question_id",), *columns]:
        chosen.append(next((name for name in names if name in header), ""))
        if header.count(chosen[-1]) != 1:
            what = "several columns" if chosen[-1] else "no column"
            raise ValueError(f"{path} has {what} {' or '.join(names)}; it has {header}")
    uneven = [line for line in lines if None in line or None in line.values()]
    if uneven:
        what = f"{len(uneven):,} rows have more or fewer fields than the header"
        raise ValueError(f"{path}: {what}; check their commas, also at the end")
    question_ids = [line["question_id"] for line in lines]
    table = pd.DataFrame(lines, index=question_ids, columns=chosen[1:], dtype=str)
    twice = table.index[table.index.duplicated()]
    if len(twice):
        raise ValueError(f"{path}: question_id {twice[0]!r} is there twice")
    return table


def read_column(spec: str, question_ids: pd.Series) -> tuple[pd.Series, list[str]]:
    """CSV:COLUMN of these samples, NaN for none; a note if some are not there. Or ValueError."""
    csv_path, _, column = spec.rpartition(":")
    if not csv_path:
        raise ValueError(f"{spec!r}: CSV:COLUMN names no file")
    values = read_table(Path(csv_path), (column,))[column]
    absent = question_ids[~question_ids.isin(values.index)].tolist()
    note = f"{len(absent):,} of {len(question_ids):,} samples are not in {csv_path}"
    there = values.index[:1].tolist()
    note += f", first {absent[:1]} (it has {there}); did leading zeros get lost?"
    if len(absent) == len(question_ids):
        raise ValueError(note)
    values = values.reindex(question_ids).str.strip()
    values = values.replace("", np.nan).reset_index(drop=True)
    if values.isna().all():
        raise ValueError(f"{spec}: no sample has a value there")
    return values, [note] if absent else []


# ─────────────────────────────────────────── the view ──────────────────────────────────────────
def summarise(matrix: np.ndarray) -> dict[str, float | None]:
    """The figures of vectors [num_samples, D]; norms are of those that are finite."""
    finite = np.isfinite(matrix)
    whole = matrix[finite.all(axis=1)]
    norms = np.sqrt(np.einsum("nd,nd->n", whole, whole, dtype=np.float64))
    figures = {"dim": matrix.shape[1], "norm_mean": None, "norm_std": None}
    if len(norms):
        figures["norm_mean"] = float(norms.mean())
        figures["norm_std"] = float(norms.std())
    figures["max_abs"] = float(np.abs(matrix).max(initial=0, where=finite))
    figures["nonfinite_share"] = float(1 - finite.mean())
    return figures


def describe_sample(group: h5py.Group, vectors: Iterable[str]) -> dict[str, str]:
    """What a sample contains: types, shapes and compression as they are in the file."""
    tree = dict.fromkeys(TEXTS, "text") | {LINK: f"-> {VISION}"}
    for name in [LOGPROBS, *vectors]:
        if name == LOGPROBS and name not in group:
            continue
        dataset = group[name]
        tree[name] = f"{dataset.dtype} {list(dataset.shape)} {dataset.compression or ''}".rstrip()
    return tree


def describe(parts: dict, samples: Samples, drawn: Samples, vectors: Vectors) -> dict:
    """What was run (a setting that varies is a list), a sample, figures of those drawn."""
    settings = {}
    for name in next(iter(parts.values())):
        values = [part.get(name) for part in parts.values()]
        settings[name] = values[0] if values.count(values[0]) == len(values) else values
    figures = {}
    for name, width in vectors.items():
        if drawn:
            figures[name] = summarise(read_matrix(drawn, name, width))
    failed = {path.with_name("failed_samples.csv") for path in parts}
    num_failed = None
    with contextlib.suppress(ValueError):  # a list that somebody edited may not be readable
        num_failed = sum(len(read_table(path)) for path in failed if path.exists())
    return {
        "files": list(map(str, parts)),
        "num_samples": len(samples),
        "num_failed": num_failed,
        "settings": settings,
        "sample": next(each(drawn[:1], describe_sample, vectors), {}),
        "num_samples_read": len(drawn),
        "figures": figures,
    }


def one_line(value: object, width: int = sys.maxsize) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like as in a repr."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))
    used = np.cumsum([1 + (unicodedata.east_asian_width(char) in "WF") for char in text])
    end = int(np.searchsorted(used, width))  # the first character that does not fit
    if (used > width).any():
        return f"{text[:end]}…"
    return text


def show(facts: dict, width: int) -> Iterator[str]:
    """The facts in lines of 80 columns; `width` cuts what need not be whole."""
    files = facts["files"]
    yield files[0] if len(files) == 1 else f"{files[0]} ...\n{files[-1]}"
    num_samples = facts["num_samples"]
    failed = "failed_samples.csv cannot be read"
    if facts["num_failed"] is not None:
        failed = f"failed: {facts['num_failed']:,}"
    yield f"parts: {len(files)}, samples: {num_samples:,}, {failed}"
    yield ""
    for name, value in facts["settings"].items():
        yield f"{name:<22}{one_line(str(value).strip('[]'), width)}"
    yield ""
    for name, kind in facts["sample"].items():
        yield f"{name:<38}{kind}"
    num_read = facts["num_samples_read"]
    drawn = ", drawn at random" if num_read < num_samples else ""
    yield f"\nfigures of {num_read:,} samples{drawn}"
    if facts["figures"]:
        table = pd.DataFrame(facts["figures"], dtype=object).T.fillna(np.nan)
        table.columns = ["dim", "mean L2", "sd L2", "max |x|", "bad"]
        yield table.to_string(float_format="{:.4g}".format)
    for sample in facts["samples"]:
        yield ""
        yield one_line(f"{sample['question_id']}  {sample['image_id']}", 80)
        shown = sample if width > 80 else ("question", "ground_truth_answer", "answer")
        for name in shown:
            yield f"  {name:<20}{one_line(sample[name], width)}"


# ─────────────────────────────────────────── verify ────────────────────────────────────────────
def verify(paths: list[Path], csv_path: Path | None) -> tuple[int, list[str]]:
    """The exit status, and a line for everything that is wrong with parts, or unlike the CSV."""
    parts, samples, findings = scan_parts(paths)
    vectors = list(dict.fromkeys(name for part in parts.values() for name in list_vectors(part)))
    columns = ["path", "question_id", "problems", "image_sha256", *TEXTS, *vectors]
    checked = pd.DataFrame(each(samples, check_sample, parts, strict=False), columns=columns)
    findings += find_gaps(paths)
    findings += find_in_samples(checked, vectors)
    if csv_path:
        findings += find_unlike_csv(checked, csv_path)
    lines = []
    for what, ids in findings:
        named = f" ({len(ids):,}: {', '.join(map(repr, ids[:3]))})" if ids else ""
        lines.append(one_line(what) + named)
    return int(bool(lines)), lines or [f"nothing wrong with {len(samples):,} samples"]


def list_expected(group: h5py.Group, part: dict) -> tuple[set[str], dict[str, int | None]]:
    """The attributes and the data sets that a sample must have; a text's width is None."""
    version = part.get("schema_version", 1)
    attributes = {"question_id", "answer_truncated", *COUNTS}
    widths = dict.fromkeys(TEXTS) | list_vectors(part) | {LINK: part["vision_hidden_size"]}
    if version >= 3:  # there the row is the order of groups
        attributes.remove("row")
    if version >= 2:
        attributes |= {"image_sha256", "crc32"}
    if version >= 2 and part.get("max_new_tokens", 0) > 0:
        attributes.add(ENTROPY)
        widths[LOGPROBS] = len(group[LOGPROBS]) if LOGPROBS in group else 0
    return attributes, widths


def check_sample(group: h5py.Group, parts: dict[Path, dict]) -> dict:
    """A sample's texts, a hash of each vector, and the problems with it."""
    path = Path(group.file.filename)
    question_id = unquote(group.name[1:])
    attributes = dict(group.attrs)
    expected, widths = list_expected(group, parts[path])
    problems = [f"{name} is missing" for name in sorted(expected - attributes.keys())]
    members = set()
    group.visit(members.add)
    if unknown := members.difference(widths, KINDS):
        problems.append(f"does not belong there: {', '.join(sorted(unknown))}")
    checked = {"path": path, "question_id": question_id, "problems": problems}
    checked["image_sha256"] = attributes.get("image_sha256")
    vectors = {}
    for name, width in widths.items():
        try:
            member = read(group, name, width)
        except UNREADABLE as error:
            problems.append(f"{name}: {error.args[-1]}")
            continue
        checked[name] = member
        if width is not None:
            vectors[name] = member
            checked[name] = hash(member.tobytes())
    if not problems:
        problems += find_problems(question_id, attributes, vectors)
    return checked


def find_problems(name: str, attributes: dict, vectors: dict[str, np.ndarray]) -> Iterator[str]:
    """What cannot be so in a sample that is complete."""
    crc = 0
    for member in sorted(vectors.keys() - {LINK}):
        crc = zlib.crc32(vectors[member].astype("<f4").tobytes(), crc)
    if attributes.get("crc32", crc) != crc:
        yield "crc32 is not that of the vectors"
    if str(attributes["question_id"]) != name:
        yield "question_id differs"
    num_tokens = attributes["num_prompt_tokens"]
    query_pos = attributes["query_token_pos"]
    if not isinstance(num_tokens, np.integer) or num_tokens < 1:
        yield "num_prompt_tokens is not a positive whole number"
    elif query_pos != num_tokens - 1:
        yield "query_token_pos is not num_prompt_tokens - 1"
    if not 0 <= attributes["vision_token_pos"] < query_pos:
        yield "vision_token_pos is not between 0 and query_token_pos"
    entropy = attributes.get(ENTROPY, 0)
    if not 0 <= entropy < np.inf:
        yield f"{ENTROPY} is {entropy}"
    for member, vector in vectors.items():
        if not np.isfinite(vector).all():
            yield f"{member}: not finite"
        if member != LOGPROBS and (vector == vector[0]).all():
            yield f"{member}: only one value"
    if LOGPROBS in vectors:
        logprobs = vectors[LOGPROBS]
        num_tokens = attributes["num_answer_tokens"]
        num_tokens += 0 if attributes["answer_truncated"] else 1  # the end token
        if len(logprobs) != num_tokens:
            yield f"{LOGPROBS}: {len(logprobs)} of them, not {num_tokens}"
        if (logprobs > 0).any():
            yield f"{LOGPROBS}: above 0"


def find_gaps(directories: list[Path]) -> Iterator[Finding]:
    """Numbers of parts, from 1 on, that a directory has not."""
    for directory in filter(Path.is_dir, directories):
        numbers = [path.stem.rpartition("_")[2] for path in find_parts(directory)]
        present = {int(number) for number in numbers if number.isdecimal()}
        for number in range(1, max(present, default=0)):
            if number not in present:
                yield f"{directory}: part {number} is missing", []


def find_in_samples(checked: pd.DataFrame, vectors: list[str]) -> Iterator[Finding]:
    """The samples' own problems by part, and what shows only in many of them."""
    by_problem = checked.explode("problems").groupby(["path", "problems"], sort=False)
    for (path, problem), ids in by_problem["question_id"]:
        yield f"{path}: {problem}", list(ids)
    for path, inside in checked.groupby("path"):
        num_values = inside[["image_id", "image_sha256", "question", *vectors]].nunique()
        num_images = num_values["image_sha256"] or num_values["image_id"]  # schema 1 has no hash
        for vector in vectors:
            num_questions = 1 if "vision" in vector else num_values["question"]
            if num_values[vector] == 1 < max(num_images, num_questions):
                yield f"{path}: {vector} is the same in all samples", []
    directory = checked["path"].map(lambda path: path.parent)  # each may have its own 0.png
    for (_, image_id), group in checked.groupby([directory, "image_id"], sort=False):
        if group["image_sha256"].nunique() > 1:
            what = f"image_id {image_id!r}: its file changed between samples"
            yield what, list(group["question_id"])


def find_unlike_csv(checked: pd.DataFrame, csv_path: Path) -> Iterator[Finding]:
    """Rows that are not stored, samples that are no rows, and what differs between the two."""
    columns = [("image_id", "image_name"), ("question",), ("answer", "gt_answer")]
    rows = read_table(csv_path, *columns)
    rows.columns = ["image_id", "question", "ground_truth_answer"]
    stored = checked.dropna(subset=TEXTS).set_index("question_id")[rows.columns].map(str)
    rows, stored = rows.align(stored, axis=0)
    absent = stored["question"].isna()
    alone = rows["question"].isna()
    findings = {}
    for column in rows:
        findings[f"{column} is another here"] = (rows[column] != stored[column]) & ~absent & ~alone
    findings |= {"not in the parts": absent, "in the parts but not here": alone}
    for what, is_so in findings.items():
        if is_so.any():
            yield f"{csv_path}: {what}", list(rows.index[is_so])


# ─────────────────────────────────────── export and plot ───────────────────────────────────────
@contextlib.contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """A name to write to: it becomes `path` at the end, and nothing is left of it if that fails."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def export(path: Path, samples: Samples, vectors: Vectors) -> list[str]:
    """Write texts and matrices, all in one order; what is in the file."""
    texts = read_texts(samples)[["question_id", *TEXTS]]
    # All texts as UTF-8 bytes: in an array of text each would be as wide as the longest.
    packed = json.dumps(texts.to_dict("list"), ensure_ascii=False).encode()
    arrays = {"texts": np.frombuffer(packed, np.uint8)}
    for name in ("question_id", "image_id"):
        arrays[name] = texts[name].to_numpy(str)
    lines = [f"{path}: {len(samples):,} samples"]
    with put_in_place(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name in (*arrays, *vectors):
            array = arrays.get(name)
            if array is None:
                array = read_matrix(samples, name, vectors[name])
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            kind = "text" if array.dtype.kind == "U" else array.dtype
            lines.append(f"{name:<38}{kind} {list(array.shape)}")
    return lines


def can_draw(text: str) -> bool:
    """Whether the font of the pictures has every character."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    characters = get_font(findfont(FontProperties())).get_charmap()
    return all(ord(char) in characters for char in text)


def choose_marks(table: pd.DataFrame, field: str) -> tuple[list[tuple], list[str]]:
    """Samples and how they are drawn: numbers on a scale, or the ten most frequent texts.

    And lines that explain the numbers of texts that the font cannot draw.
    """
    values = table.get(field, pd.Series(dtype=str)).replace("", np.nan)
    if ":" in field:
        values, _ = read_column(field, table["question_id"])
    numbers = pd.to_numeric(values, errors="coerce")
    counts = values.value_counts()
    if counts.empty:
        raise ValueError(f"--color-by {field}: the samples have no values for that")
    if numbers.count() == values.count() and len(counts) > 2:
        return [(slice(None), {"c": numbers, "plotnonfinite": True})], []  # hollow: no value
    marks = []
    lines = []
    for (value, count), color, marker in zip(counts.items(), COLORS, "os^Dv*P<X>"):
        shown = one_line(value, 24)
        if not can_draw(shown):
            shown = f"no. {len(marks) + 1}"
            lines.append(f"{shown}: {one_line(value)}")
        label = f"{count:,} × {shown}"
        marks.append((values == value, {"c": color, "marker": marker, "label": label}))
    rest = ~values.isin(counts.index[: len(COLORS)])
    if rest.any():
        marks.append((rest, {"c": "#BBBBBB", "zorder": 0, "label": f"{rest.sum():,} × others"}))
    return marks, lines


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":  # noqa: F821
    """An empty figure of so many inches."""
    import matplotlib.figure

    warnings.filterwarnings("ignore", "Glyph")  # a title may be in a script that the font lacks
    matplotlib.rcParams |= {"font.size": 8, "axes.titlesize": 8, "text.parse_math": False}
    return matplotlib.figure.Figure((width, height), layout="constrained")


def find_components(name: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two principal components [num_samples, 2], and their shares of the variance."""
    if len(matrix) < 3 or not np.isfinite(matrix).all():
        raise ValueError(f"{name}: a plot needs 3 samples, and finite values; see --verify")
    centred = matrix - matrix.mean(axis=0, dtype=np.float64)
    variances, units = np.linalg.eigh(centred @ centred.T)  # ascending
    points = units * np.sqrt(variances.clip(0))
    shares = variances / max(variances.sum(), np.finfo(float).tiny)
    return points[:, [-1, -2]], shares[[-1, -2]]


def plot(path: Path, samples: Samples, total: int, vectors: Vectors, field: str) -> list[str]:
    """Plot these of `total` samples on two principal components, a panel for each data set."""
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers: last
    num_columns = len({layer_of(name) for name in names} - {None}) or 1
    num_rows = -(-len(names) // num_columns)
    figure = new_figure(2.5 * num_columns + 2, 2.6 * num_rows + 0.5)
    marks, lines = choose_marks(read_texts(samples), field)
    shown = f"{len(samples):,} of {total:,} samples"
    figure.suptitle(f"Principal components 1 and 2\n{shown}")
    for position, name in enumerate(names, start=1):
        points, shares = find_components(name, read_matrix(samples, name, vectors[name]))
        title = f"{name}/{shares[0]:.1%} + {shares[1]:.1%} of variance".replace("/", "\n")
        axes = figure.add_subplot(num_rows, num_columns, position, title=title)
        axes.set(xticks=[], yticks=[])
        for mask, mark in marks:
            x, y = points[mask].T
            axes.scatter(x, y, s=16, lw=0.3, edgecolors="#333", alpha=0.85, **mark)
    title = one_line(Path(field).name, 30)
    if "label" in marks[0][1]:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, title=title, loc="outside right center")
    else:
        figure.colorbar(axes.collections[0], ax=figure.axes, label=title, shrink=0.6)
    figure.savefig(path, dpi=150)
    return [f"{path}: {len(names)} panels of {shown}", *lines]


# ─────────────────────────────────────────── labels ────────────────────────────────────────────
ANSWER_IS_WRONG = "answer_is_wrong"
RULE = """\
          An answer is right if it contains the ground truth as whole words
          (case, punctuation, articles and number words as in VQA accuracy;
          numbers as numbers). For yes, no and the letter of an option: what it
          declares last ("Answer: ..."), else what it says. No label where this
          cannot be seen. Synonyms are wrong; "not red, it is blue" says red."""
MIN_VOTES = 3  # annotators who must have given an answer: the full vote of VQA accuracy
NUM_EXAMPLES = 3
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
UNITS = [*UNITS.split(), *"fifteen sixteen seventeen eighteen nineteen".split()]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip(UNITS + TENS, map(str, [*range(20), *range(20, 100, 10)]))) | {"none": "0"}
TWENTY_ONE = re.compile(rf"\b({'|'.join(TENS)})[ -]({'|'.join(UNITS[1:10])})\b")
WORD = re.compile(  # a number, whose sign follows a space, or a word; "-" and "." end both
    r"((?:(?<!\S)-)?(?:\d+(?:\.\d+)?|(?<![^\s-])\.\d+)(?![^\s.-]))|([^\s.-]+)"
)
ARTICLES = {"a", "an", "the"}
BINARY = {"1": "yes", "0": "no", "y": "yes", "n": "no"}
TRUE_FALSE = {"true": "yes", "false": "no"}
LISTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\s,\[\]()]+)")  # an item
SEPARATOR = re.compile(  # of the answers that a truth accepts
    r"[;|]|\s+or\s+|(?<=[^\W\d_]{2})\s*/\s*(?=[^\W\d_]{2})|\s\((?=[^()]{2})|(?<=\w)\)\s*$"
)
UNCLEAR_SCRIPT = re.compile(
    # Words of Hebrew, Arabic, Bengali and Tamil to Malayalam carry articles or particles, as
    # Hangul's do; Thai to Burmese, Khmer, kana and Han have no spaces between words.
    "[\u0590-\u065f\u066e-\u06ef\u06fa-\u08ff\u0980-\u09e5\u0b80-\u0d7f\u0e00-\u109f\u1100-\u11ff"
    "\u1780-\u17ff\u3040-\u318f\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)
DECLARED = re.compile(  # what follows is looked at without being passed, so the last one is found
    r"(?i:\banswer)(?:\s+is\b|\W*[:：])(?=(.+))"
    r"|(?i:<answer>)(?=(.*?)</)"
    r"|\\boxed\{(?=(.+))"
    r"|(?:^|\n)\s*\*\*(?=([^\n]+)\*\*\W*$)"
)
NAME_ENDS = r"(?![-'’.]?\w)(?=\s*(?:[^\w\s]|\n|$)|\s+(?:because|since|as|is|or|and)\b)"
OPTION_NAMES = re.compile(  # no letter is an option that could be an article or "I"
    rf"\A\W*([A-Za-z]){NAME_ENDS}"  # a) a dog
    r"|(?i:\boption|\bchoice)\s+\W?([A-Za-z])\b"
    r"|\(([A-Za-z])\)"
    rf"|(?<![-\w'’.])([A-Z]){NAME_ENDS}"  # I would choose B because
)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels of samples, in their order."""

    values: pd.Series  # float [num_samples]: 1 for the positive class, 0, or NaN for no label
    classes: list[str]  # what 0 and 1 are called
    notes: list[str]  # what a reader of the figures should know


def split_words(text: str, apostrophe: str = "") -> list[str]:
    """Words as VQA accuracy compares them (Antol et al. 2015, vqaEval.py), numbers as numbers.

    `apostrophe` takes the place of apostrophes: nothing (don't is dont), or a space (l'eau is eau).
    """
    text = re.sub("[⁰¹²³⁴-⁹]+", r" \g<0>", text)  # 10³ is not 103
    text = re.sub(r"(?<=\d)[,\xa0\u2009\u202f](?=\d{3}(?!\d))", "", text)  # 1,000 is 1000
    text = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")
    text = re.sub("['’`]", apostrophe, text)
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if category == "Pd" or char == "\N{MINUS SIGN}":
            kept.append("-")
        elif category[0] in "LMN" or char in ".:/":
            kept.append(char)
        elif category != "Cf":
            kept.append(" ")
    text = "".join(kept)
    text = re.sub(r"(?<!\d)[:/]|[:/](?!\d)", " ", text)  # 3:45 and 1/2 remain whole
    text = re.sub(r"(?<=\d)(?=[^\W\d_])|(?<=[^\W\d_])(?=\d)", " ", text)  # 5cm is 5 cm
    text = re.sub(r"\b(?:minus|negative)\s+(?=\.?\d)", "-", text)
    text = TWENTY_ONE.sub(lambda match: NUMBERS[match[1]][0] + NUMBERS[match[2]], text)
    words = []
    for number, word in WORD.findall(text):
        if number:
            words.append(format(Decimal(number).normalize() + 0, "f"))
        else:
            words.append(NUMBERS.get(word, word))
    return words


def find_declared(answer: str) -> str:
    """What the answer declares last, as in "The answer is B"; empty if it declares nothing."""
    found = ""
    for match in DECLARED.finditer(answer):
        found = match[match.lastindex]
    return found


def judge_option(answer: str, letter: str) -> bool | str:
    """Whether the answer names this option, a letter; or why it cannot be seen."""
    for text in (find_declared(answer), answer):
        named = [match[match.lastindex].upper() for match in OPTION_NAMES.finditer(text)]
        begins = named and re.match(rf"\W*{named[0]}\s*(?:[).:*\n]|-\s)", text, re.IGNORECASE)
        if begins or len(set(named)) == 1:
            return named[0] == letter.upper()
    return "name no option, or several, where the truth is a letter"


def judge_binary(answer: str, truth: str) -> bool | str:
    """Whether the answer says yes or no as the truth does; or why it cannot be seen."""
    for text in (find_declared(answer), answer):
        words = [TRUE_FALSE.get(word, word) for word in split_words(text)]
        said = [word for word in words if word in ("yes", "no")]
        if said:
            return said[0] == truth
    return "declare neither yes nor no"


def has_words(answer: str, truth: str, apostrophe: str) -> bool:
    """Whether the truth's words are in the answer, side by side."""
    said = split_words(answer, apostrophe)
    meant = split_words(truth, apostrophe)
    if not ARTICLES.issuperset(meant):  # one that is the whole truth is no article
        said = [word for word in said if word not in ARTICLES]
        meant = [word for word in meant if word not in ARTICLES]
    has_number = any(word.isdecimal() for word in said)
    if meant == ["0"] and not has_number:
        return "no" in said  # no dogs
    return f" {' '.join(meant)} " in f" {' '.join(said)} "


def judge(answer: str, truth: str) -> bool | str:
    """Whether the answer is right by the rule of `answer_is_wrong`, or why it cannot be seen."""
    if UNCLEAR_SCRIPT.search(truth) or UNCLEAR_SCRIPT.search(answer):
        return "or their truths are in a script whose words cannot be told apart"
    if letter := re.fullmatch(r"\W*([A-Za-z])\W*", truth):
        return judge_option(answer, letter[1])
    meant = split_words(truth)
    if not meant:
        return "have a truth without words"
    spelt = "".join(meant)  # AMBER's "n, o" was a word until something joined its letters
    spelt = TRUE_FALSE.get(spelt, spelt)
    if spelt in ("yes", "no"):
        return judge_binary(answer, spelt)
    return has_words(answer, truth, "") or has_words(answer, truth, " ")


def read_items(text: str) -> list[str]:
    """The items of a list as data sets print it. Raises ValueError for dicts without `answer`."""
    if not re.match(r"\[\s*\{", text):
        if re.search("['\"]", text):
            return ["".join(item) for item in LISTED.findall(text)]
        return text[1:-1].split(",")
    try:
        items = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        items = None
    try:
        items = items or json.loads(text)
        return [str(item["answer"]) for item in items]
    except (KeyError, TypeError, ValueError) as error:
        shown = one_line(text, 60)
        what = f"{ANSWER_IS_WRONG}: the ground truth {shown} is no list of texts or of dicts with"
        raise ValueError(f"{what} 'answer'; bring labels of your own as CSV:COLUMN") from error


def split_truths(text: str) -> tuple[list[str], str]:
    """The answers that a ground truth accepts, and what it is: "one", "several" or "votes"."""
    text = text.strip()
    if re.fullmatch(r"\[.*\]|\([^()]*,[^()]*\)", text, re.DOTALL):
        accepted = [item.strip() for item in read_items(text) if item.strip()]
        words = [[word for word in split_words(item) if word not in ARTICLES] for item in accepted]
        votes = pd.Series(map(" ".join, words), dtype=str)
        if votes.duplicated().any():
            counts = votes.value_counts()
            return list(counts.index[counts >= MIN_VOTES]), "votes"
    else:
        accepted = [part.strip() for part in SEPARATOR.split(text) if part.strip()]
    return accepted, "several" if len(accepted) > 1 else "one"


def judge_all(answer: str, accepted: list[str]) -> bool | str:
    """Whether the answer is right by one of the accepted truths, or why it cannot be seen."""
    verdicts = [judge(answer, truth) for truth in accepted]
    clear = [verdict for verdict in verdicts if isinstance(verdict, bool)]
    if clear:
        return any(clear)
    return verdicts[0] if verdicts else "have a truth that no three annotators gave"


def label_answers(table: pd.DataFrame) -> tuple[pd.Series, list[str]]:
    """1 (wrong), 0 (right) or NaN (no label) for each sample, and notes on what was seen."""
    answers = table["answer"]
    if not answers.any():
        raise ValueError(f"{ANSWER_IS_WRONG}: no answers are stored (--max-new-tokens 0)")
    split = table["ground_truth_answer"].map(split_truths)
    truths = split.str[0]
    kinds = split.str[1].value_counts()
    notes = []
    if "several" in kinds:
        notes.append(f"{kinds['several']:,} ground truths are several answers: any of them counts")
    if "votes" in kinds:
        what = f"right is what at least {MIN_VOTES} of them gave"
        notes.append(f"{kinds['votes']:,} ground truths are annotators' answers: {what}")
    words = truths.map(lambda accepted: [" ".join(split_words(truth)) for truth in accepted])
    values = set(itertools.chain.from_iterable(words))
    begins = answers.map(lambda answer: split_words(answer)[:1] in (["yes"], ["no"]))
    if values and (values <= {"0", "1"} or values <= {"y", "n"}) and begins.mean() > 0.5:
        truths = words.map(lambda accepted: [BINARY[word] for word in accepted])
        notes.append(f"ground truths are {' and '.join(sorted(values))}: read as yes and no")
    verdicts = pd.Series(map(judge_all, answers, truths), answers.index, dtype=object)
    num_cut = int(table.get("answer_truncated", pd.Series(dtype=bool)).sum())
    if num_cut:
        notes.append(f"{num_cut:,} answers were cut at --max-new-tokens")
    for reason, count in verdicts[~verdicts.isin([True, False])].value_counts().items():
        notes.append(f"no label: {count:,} answers {reason}")
    return verdicts.map({True: 0.0, False: 1.0}).astype(float), notes


def show_values(values: Iterable[str]) -> str:
    """The first values of a column for a message."""
    values = list(values)
    more = ", ..." if len(values) > 5 else ""
    return ", ".join(one_line(repr(value), 24) for value in values[:5]) + more


def label_by_threshold(label: str, texts: pd.Series, above: float) -> tuple[pd.Series, list[str]]:
    """1 for numbers above the threshold, 0 for others, NaN for none; and the classes' names."""
    numbers = pd.to_numeric(texts, errors="coerce")
    wrong = texts[numbers.isna()].dropna()
    if len(wrong):
        what = f"{len(wrong):,} values are no numbers, as {wrong.iloc[0]!r}"
        raise ValueError(f"{label}: {what}; write 0.9, not 90% or 0,9, or nothing")
    is_above = (numbers > above).astype(float).where(numbers.notna())
    return is_above, [f"at most {above:g}", f"more than {above:g}"]


def check_two_values(label: str, values: list[str]) -> None:
    """Raises ValueError, with what to do, unless these are two values that differ."""
    spellings = {value.casefold() for value in values}
    what = f"{label}: {len(values):,} values instead of two, {show_values(values)}"
    if len(spellings) < len(values):
        raise ValueError(f"{what}; some differ in upper and lower case only: write them alike")
    if len(values) > 2 or "nan" in spellings:
        advice = "leave cells without a label empty; of numbers, --above X makes two classes"
        raise ValueError(f"{what}; {advice}")


def read_labels(
    table: pd.DataFrame, label: str, above: float | None = None, positive: str | None = None
) -> Labels:
    """The labels that LABEL gives to samples: `answer_is_wrong`, or a CSV and its column.

    `table` is what `read_texts` or `load_embeddings` returns. `above` makes two classes of numbers.
    `positive` is the class that becomes 1: by default `wrong`, else the last one in order.
    Raises ValueError.
    """
    if label == ANSWER_IS_WRONG:
        values, notes = label_answers(table)
        classes = ["right", "wrong"]
    else:
        texts, notes = read_column(label, table["question_id"])
        if above is not None:
            values, classes = label_by_threshold(label, texts, above)
        else:
            is_numeric = pd.to_numeric(texts, errors="coerce").notna().equals(texts.notna())
            classes = sorted(texts.dropna().unique(), key=float if is_numeric else str.casefold)
            check_two_values(label, classes)
            values = texts.map({name: float(name == classes[-1]) for name in classes})
    default = next((name for name in classes if name.casefold() == "wrong"), classes[-1])
    positive = default if positive is None else positive
    if positive not in classes:
        raise ValueError(f"--positive {positive}: the classes are {show_values(classes)}")
    if positive != classes[-1]:
        return Labels(1 - values, classes[::-1], notes)
    return Labels(values, classes, notes)


# ──────────────────────────────────────────── probe ────────────────────────────────────────────
NUM_FOLDS = 5
MIN_FOLDS = 3
NUM_BOOTSTRAPS = 1000
NUM_EPOCHS = 15
MIN_IN_CATEGORY = 10  # samples of each class for an AUROC of a category
STRENGTHS = (0.03, 0.3, 3, 30)  # C times the mean squared length of a sample's features
PROBES = {
    "linear": "logistic regression of standardised vectors",
    "mlp": f"MLP 512-256-128 of standardised vectors, {NUM_EPOCHS} epochs",
}
SHUFFLED = "labels shuffled"
CHANCE = "chance"
HEADINGS = {"auroc_train": "train", "auprc": "AUPRC", "precision": "prec", "recall": "rec"}
HEADINGS |= {"f1": "F1", "threshold": "at", "brier": "Brier", "ece": "ECE"}

Matrix = tuple[str, Samples, str, int]  # its title, samples, the data set's name, its width


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be read from the states, and the folds in which it is tried."""

    labels: np.ndarray  # bool [num_samples]
    groups: np.ndarray  # str [num_samples]: samples of one group are never in two folds
    fold_of: np.ndarray  # int [num_samples]
    model: str  # one of PROBES
    seed: int

    def folds(self) -> list[np.ndarray]:
        """The places of each fold's samples."""
        return [np.flatnonzero(self.fold_of == fold) for fold in range(self.fold_of.max() + 1)]

    def has_both_classes(self) -> bool:
        """Whether each fold has an AUROC."""
        return all(len(set(self.labels[fold])) == 2 for fold in self.folds())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a probe made of one outer fold; a list of them, one for each fold, is a cell."""

    name: str  # the matrix
    strength: float  # C
    inner_auroc: float  # mean of the inner folds; penalty and layer are chosen by it
    auroc: float
    auroc_train: float
    # float [num_samples]: of this fold by the probe of all other folds, of every other fold by a
    # probe that saw neither that fold nor this one.
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report, and what belongs to it."""

    figures: dict
    probabilities: np.ndarray  # float [num_samples], out of fold
    bootstrap: np.ndarray  # float [NUM_BOOTSTRAPS]: the AUROC of each draw


def split_by_group(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each sample: five folds, or fewer; each has both classes and its own groups."""
    from sklearn.model_selection import StratifiedGroupKFold

    num_groups = [len(set(groups[labels == value])) for value in (False, True)]  # of each class
    for num_folds in range(min(NUM_FOLDS, *num_groups), MIN_FOLDS - 1, -1):
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        fold_of = np.empty(len(labels), int)
        for fold, (_, test) in enumerate(splitter.split(labels, labels, groups)):
            fold_of[test] = fold
        if Task(labels, groups, fold_of, "linear", seed).has_both_classes():
            return fold_of
    counts = f"{(~labels).sum():,} and {labels.sum():,} samples of the classes"
    counts += f", about {num_groups[0]:,} and {num_groups[1]:,} images or groups"
    raise ValueError(f"too few for a probe: {counts}; each of {MIN_FOLDS} folds needs both")


def make_probe(task: Task, inputs: np.ndarray, strength: float):
    """What turns inputs into features, and what is fitted on those.

    Inputs are states float32 [num_samples, D], numbers float64 or categories object
    [num_samples, 1], or texts [num_samples].
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    features = StandardScaler()
    if inputs.ndim == 1:  # pieces of words: scripts without spaces have no words to count
        features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    elif inputs.dtype == object:
        features = OneHotEncoder(handle_unknown="ignore")
    probe = LogisticRegression(C=strength, max_iter=1000)
    if task.model == "mlp" and inputs.dtype == np.float32:
        # Early stopping would watch accuracy, and end at once where a class is rare.
        probe = MLPClassifier((512, 256, 128), random_state=task.seed)
        probe.set_params(max_iter=NUM_EPOCHS, n_iter_no_change=NUM_EPOCHS)
    return features, probe


def score_with(probe, features) -> np.ndarray:
    """How much a fitted probe takes each sample for positive: float [num_samples]."""
    if hasattr(probe, "decision_function"):
        return probe.decision_function(features)
    return probe.predict_proba(features)[:, 1]


def fit_and_score(
    task: Task, inputs: np.ndarray, left_out: tuple[int, ...], strengths: list[float]
) -> tuple[np.ndarray, list[float]]:
    """For each strength a probe of all but the folds that are left out.

    Returns its scores of those, float [num_strengths, num_samples] and NaN elsewhere, and its AUROC
    on the samples that it was fitted on.
    """
    from sklearn.metrics import roc_auc_score

    is_left_out = np.isin(task.fold_of, left_out)
    labels = task.labels[~is_left_out]
    features, _ = make_probe(task, inputs, 1)
    train = features.fit_transform(inputs[~is_left_out])
    test = features.transform(inputs[is_left_out])
    scores = np.full((len(strengths), len(inputs)), np.nan)
    auroc_train = []
    for row, strength in enumerate(strengths):
        probe = make_probe(task, inputs, strength)[1].fit(train, labels)
        scores[row, is_left_out] = score_with(probe, test)
        auroc_train.append(roc_auc_score(labels, score_with(probe, train)))
    return scores, auroc_train


def try_cell(task: Task, name: str, inputs: np.ndarray) -> list[Outcome]:
    """Probes of one matrix; in each outer fold the inner folds choose the penalty.

    A probe that was fitted without folds j and k serves both: as inner fold j of the outer fold k,
    and the other way round.
    """
    from joblib import Parallel, delayed
    from sklearn.metrics import roc_auc_score

    folds = task.folds()
    is_state = inputs.dtype == np.float32
    size = inputs.shape[1] if is_state else 1  # the mean squared length of a sample's features
    strengths = [strength / size for strength in STRENGTHS]
    if inputs.dtype == np.float64 or (is_state and task.model == "mlp"):
        strengths = [1.0]  # the order of single numbers needs no penalty, the MLP has its own
    pairs = list(itertools.combinations(range(len(folds)), 2))
    fit = delayed(fit_and_score)
    fitted = Parallel()(fit(task, inputs, pair, strengths) for pair in pairs)
    held_out = np.full((len(folds), len(strengths), len(inputs)), np.nan)
    inner_aurocs = np.full((len(folds), len(strengths), len(folds)), np.nan)
    for pair, (scores, _) in zip(pairs, fitted):
        for outer, inner in (pair, pair[::-1]):
            places = folds[inner]
            held_out[outer][:, places] = scores[:, places]
            aurocs = [roc_auc_score(task.labels[places], row[places]) for row in scores]
            inner_aurocs[outer, :, inner] = aurocs
    means = np.nanmean(inner_aurocs, axis=2)  # [num_folds, num_strengths]
    best = means.argmax(axis=1)
    fitted = Parallel()(
        fit(task, inputs, (fold,), [strengths[place]]) for fold, place in enumerate(best)
    )
    cell = []
    for fold, ((outer_scores,), (auroc_train,)) in enumerate(fitted):
        places = folds[fold]
        scores = held_out[fold, best[fold]]
        scores[places] = outer_scores[places]
        auroc = roc_auc_score(task.labels[places], scores[places])
        chosen = means[fold].max()
        cell.append(Outcome(name, strengths[best[fold]], chosen, auroc, auroc_train, scores))
    return cell


def choose_cell(cells: Iterable[list[Outcome]]) -> list[Outcome]:
    """In each outer fold the cell that is best on the inner folds; the outer fold has no say."""
    return [max(of_fold, key=lambda outcome: outcome.inner_auroc) for of_fold in zip(*cells)]


def shuffle_labels(task: Task) -> Task | None:
    """Labels given to other samples, those of a group together, so that a leak by group shows.

    None where no order in a hundred leaves both classes in every fold.
    """
    rng = np.random.default_rng(task.seed)
    places = np.argsort(task.groups, kind="stable")  # samples group by group
    by_group = [group.to_numpy() for _, group in pd.Series(task.labels).groupby(task.groups)]
    for _ in range(100):
        labels = np.empty_like(task.labels)
        order = rng.permutation(len(by_group))
        labels[places] = np.concatenate([rng.permutation(by_group[group]) for group in order])
        shuffled = dataclasses.replace(task, labels=labels)
        if shuffled.has_both_classes():
            return shuffled
    return None


# ────────────────────────────────────────── the report ───────────────────────────────────────────
def draw_weights(task: Task) -> list[np.ndarray]:
    """How often the bootstrap draws each sample: int [NUM_BOOTSTRAPS, size of fold] by fold.

    Groups are drawn with replacement within each fold, as many as it has.
    """
    rng = np.random.default_rng(task.seed)
    weights = []
    for fold in task.folds():
        names, group_of = np.unique(task.groups[fold], return_inverse=True)
        shares = np.full(len(names), 1 / len(names))
        weights.append(rng.multinomial(len(names), shares, NUM_BOOTSTRAPS)[:, group_of])
    return weights


def weighted_aurocs(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The AUROC under each row of weights [num_rows, num_samples]; NaN without both classes."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan))  # of samples of equal score
    weights = weights[:, order]
    positive = np.add.reduceat(weights * labels[order], starts, axis=1)
    negative = np.add.reduceat(weights * ~labels[order], starts, axis=1)
    below = negative.cumsum(axis=1) - negative / 2  # ties count half
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def calibrate(labels: np.ndarray, scores: np.ndarray, fold: np.ndarray) -> tuple:
    """Probabilities of a fold's samples, and the threshold with the best F1.

    Both are fitted on the other folds, on scores of probes that did not know the sample's own
    fold: those of known samples are too good for that.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_curve

    known = np.delete(scores, fold)
    known_labels = np.delete(labels, fold)
    # The size of scores follows from the penalty, and the fit needs numbers near 1.
    scaled = (scores - known.mean()) / max(known.std(), 1e-12)
    platt = LogisticRegression(C=np.inf).fit(np.delete(scaled, fold)[:, None], known_labels)
    slope = platt.coef_.item()
    shift = platt.intercept_.item()
    if slope <= 0:  # nothing was learnt: the share of the class, in the order of the scores
        slope = 1e-6
        shift = np.log(known_labels.mean() / (1 - known_labels.mean()))
    probabilities = 1 / (1 + np.exp(-slope * scaled - shift))
    known = np.delete(probabilities, fold)
    precision, recall, thresholds = precision_recall_curve(known_labels, known)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return probabilities[fold], float(thresholds[np.argmax(f1[:-1])])


def measure(task: Task, cell: list[Outcome], weights: list[np.ndarray]) -> Row:
    """What a paper prints of a representation or a baseline.

    Brier score, calibration error, precision, recall and F1 are of all samples together.
    """
    from sklearn import metrics

    probabilities = np.empty(len(task.labels))
    is_found = np.empty(len(task.labels), bool)
    auprcs = []
    thresholds = []
    bootstraps = []
    for outcome, fold, of_fold in zip(cell, task.folds(), weights, strict=True):
        labels = task.labels[fold]
        scores = outcome.scores[fold]
        auprcs.append(metrics.average_precision_score(labels, scores))
        bootstraps.append(weighted_aurocs(labels, scores, of_fold))
        probabilities[fold], threshold = calibrate(task.labels, outcome.scores, fold)
        is_found[fold] = probabilities[fold] >= threshold
        thresholds.append(threshold)
    # Expected calibration error in ten bins of equal width (Guo et al. 2017).
    bins = np.minimum((10 * probabilities).astype(int), 9)
    gaps = np.bincount(bins, task.labels - probabilities)
    bootstrap = np.nanmean(bootstraps, axis=0)  # without a fold that has one class in a draw
    figures = {}
    figures["auroc"] = np.mean([outcome.auroc for outcome in cell])
    figures["auroc_low"], figures["auroc_high"] = np.nanpercentile(bootstrap, [2.5, 97.5])
    figures["auroc_train"] = np.mean([outcome.auroc_train for outcome in cell])
    figures["auprc"] = np.mean(auprcs)
    figures["precision"] = metrics.precision_score(task.labels, is_found, zero_division=0)
    figures["recall"] = metrics.recall_score(task.labels, is_found)
    figures["f1"] = metrics.f1_score(task.labels, is_found)
    figures["threshold"] = np.mean(thresholds)
    figures["brier"] = metrics.brier_score_loss(task.labels, probabilities)
    figures["ece"] = np.abs(gaps).sum() / len(bins)
    figures = {name: float(value) for name, value in figures.items()}
    figures["layers"] = [layer_of(outcome.name) for outcome in cell]
    return Row(figures, probabilities, bootstrap)


def expected_average_precision(num_samples: int, num_positive: int) -> float:
    """The mean average precision of all orders of the samples (Bestgen 2015)."""
    harmonic = (1 / np.arange(1, num_samples + 1)).sum()
    odds = (num_positive - 1) / max(num_samples - 1, 1)
    return (odds * (num_samples - harmonic) + harmonic) / num_samples


def measure_chance(task: Task) -> dict[str, float]:
    """What the figures are where nothing is known but the share of the classes."""
    share = float(task.labels.mean())
    of_folds = [task.labels[fold] for fold in task.folds()]
    auprcs = [expected_average_precision(len(labels), labels.sum()) for labels in of_folds]
    figures = {"auroc": 0.5, "auroc_train": 0.5, "auprc": float(np.mean(auprcs))}
    figures |= {"precision": share, "recall": 1.0, "f1": 2 * share / (1 + share)}  # always yes
    return figures | {"brier": share * (1 - share), "ece": 0.0}


def measure_categories(task: Task, rows: dict[str, list[Outcome]], categories: np.ndarray) -> dict:
    """Of each category its size, its positive samples, and AUROC by row.

    AUROC is the mean of the folds that have both classes of it; None if either class is rare.
    """
    from sklearn.metrics import roc_auc_score

    facts = {}
    for category in sorted(set(categories) - {""}):
        is_inside = categories == category
        num_negative, num_positive = np.bincount(task.labels[is_inside], minlength=2).tolist()
        aurocs = dict.fromkeys(rows)
        for name, cell in rows.items():
            of_folds = []
            for outcome, fold in zip(cell, task.folds()):
                places = fold[is_inside[fold]]
                labels = task.labels[places]
                if labels.any() and not labels.all():
                    of_folds.append(roc_auc_score(labels, outcome.scores[places]))
            if of_folds and min(num_negative, num_positive) >= MIN_IN_CATEGORY:
                aurocs[name] = float(np.mean(of_folds))
        counts = {"num_samples": num_negative + num_positive, "num_positive": num_positive}
        facts[category] = counts | {"auroc": aurocs}
    return facts


# ───────────────────────────────────────── probing files ─────────────────────────────────────────
def make_task(table: pd.DataFrame, labels: pd.Series, options: argparse.Namespace) -> tuple:
    """The task of samples that all have a label, and notes on their groups."""
    # A file may be stored under several names, and two directories may have one name.
    groups = table.get("image_sha256", table["image_id"]).astype(object)
    notes = []
    if options.group:
        named, notes = read_column(options.group, table["question_id"])
        if named.isna().any():
            num_absent = int(named.isna().sum())
            notes.append(f"{num_absent:,} samples have no group: their image is their group")
        groups = ("group " + named).fillna(groups)
    groups = groups.to_numpy(str)
    is_positive = labels.to_numpy(bool)
    fold_of = split_by_group(is_positive, groups, options.seed)
    if len(set(groups)) < 10 * NUM_FOLDS:
        notes.append(f"{len(set(groups)):,} images or groups are few: intervals are rough")
    return Task(is_positive, groups, fold_of, options.probe_model, options.seed), notes


def open_beside(spec: str, table: pd.DataFrame, options: argparse.Namespace) -> list[Matrix]:
    """The matrices of another run of the same questions, NAME=DIR. Raises ValueError."""
    name, _, directory = spec.partition("=")
    parts, samples = open_run(directory)
    by_id = {unquote(sample[1]): sample for sample in samples}
    absent = table["question_id"][~table["question_id"].isin(by_id)]
    if len(absent):
        what = f"{len(absent):,} of {len(table):,} samples are not in {directory}"
        raise ValueError(f"--beside {name}: {what}, first {absent.iloc[0]!r}; run it on all rows")
    samples = [by_id[question_id] for question_id in table["question_id"]]
    vectors = list_vectors(next(iter(parts.values())), options.representation, options.layer)
    return [(f"{name}: {vector}", samples, vector, width) for vector, width in vectors.items()]


def show_progress(items: list, unit: str) -> Iterator:
    """The items one by one: with a bar in a terminal, elsewhere with a line a minute."""
    if sys.stderr.isatty():
        yield from tqdm(items, unit=unit)
        return
    shown = time.monotonic()
    for num_done, item in enumerate(items):
        if time.monotonic() > shown + PROGRESS_SECONDS:
            print(f"{num_done} of {len(items)} {unit}", file=sys.stderr, flush=True)
            shown = time.monotonic()
        yield item


def try_states(task: Task, shuffled: Task | None, matrices: list[Matrix]) -> tuple[dict, dict]:
    """A cell for each matrix, and those of this run with labels shuffled.

    One matrix is in memory at a time.
    """
    cells = {}
    control = {}
    for title, samples, name, width in show_progress(matrices, "matrices"):
        matrix = read_matrix(samples, name, width)
        if not np.isfinite(matrix).all():
            raise ValueError(f"{title}: not finite; see --verify")
        cells[title] = try_cell(task, name, matrix)
        if shuffled and title == name:
            control[name] = try_cell(shuffled, name, matrix)
    return cells, control


def try_baselines(task: Task, table: pd.DataFrame, categories: np.ndarray | None) -> dict:
    """Cells of the question's text, of the answers' numbers where stored, and of the category."""
    logprobs = table.get(LOGPROBS, pd.Series(dtype=object))
    lengths = table["num_answer_tokens"]
    numbers = {
        "first-token entropy": table.get(ENTROPY, []),
        "mean log-probability": logprobs.map(np.mean),
        "least log-probability": logprobs.map(np.min),
        "answer length": lengths if lengths.any() else [],
    }
    inputs = {"question text alone": table["question"].to_numpy(str)}
    for name, values in numbers.items():
        values = np.asarray(values, np.float64)[:, None]
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: not finite or not in all samples; see --verify")
        if len(values):
            inputs[name] = values
    if categories is not None:
        inputs["category alone"] = categories[:, None]
    return {name: try_cell(task, name, values) for name, values in inputs.items()}


def choose_rows(cells: dict[str, list[Outcome]]) -> dict[str, list[Outcome]]:
    """A cell for each representation of each run, its layer chosen within the training folds."""
    kinds = {}
    for title, cell in cells.items():
        kind = re.sub("_representation(/layer_[0-9]+)?$", "", title)
        kinds.setdefault(kind, []).append(cell)
    return {kind: choose_cell(of_kind) for kind, of_kind in kinds.items()}


def compare_with_best(rows: dict[str, Row], own: list[str]) -> tuple[str, dict]:
    """The best representation of this run, and how far its AUROC is above that of other rows."""
    best = max(own, key=lambda name: rows[name].figures["auroc"])
    differences = {}
    for name in [name for name in rows if name not in own]:
        auroc = rows[best].figures["auroc"] - rows[name].figures["auroc"]
        draws = rows[best].bootstrap - rows[name].bootstrap
        low, high = np.nanpercentile(draws, [2.5, 97.5]).tolist()
        differences[name] = {"auroc": auroc, "low": low, "high": high}
    return best, differences


def make_report(
    task: Task, matrices: list[Matrix], baselines: dict, categories: np.ndarray | None
) -> tuple[dict, dict[str, Row]]:
    """Try all states: the facts of both tables, and the rows of the report.

    The control chooses among all representations of this run, layers and penalties.
    """
    shuffled = shuffle_labels(task)
    cells, control = try_states(task, shuffled, matrices)
    weights = draw_weights(task)
    chosen = choose_rows(cells)
    rows = {name: measure(task, cell, weights) for name, cell in (chosen | baselines).items()}
    own = {name: cell for name, cell in chosen.items() if ": " not in name}
    best, differences = compare_with_best(rows, list(own))
    has_leak = False
    if shuffled:
        rows[SHUFFLED] = measure(shuffled, choose_cell(control.values()), weights)
        spread = np.nanstd(rows[SHUFFLED].bootstrap)
        has_leak = rows[SHUFFLED].figures["auroc"] > 0.5 + 3 * spread
    by_itself = {}
    for title, cell in cells.items():
        by_itself[title] = {
            "auroc": [outcome.auroc for outcome in cell],
            "auroc_train": [outcome.auroc_train for outcome in cell],
            "C": [outcome.strength for outcome in cell],
        }
    report = {name: row.figures for name, row in rows.items()}
    report[CHANCE] = measure_chance(task)
    facts = {"cells": by_itself, "report": report, "best": best, "differences": differences}
    facts["leaks"] = bool(has_leak)
    facts["by"] = {} if categories is None else measure_categories(task, own, categories)
    return facts, rows


def probe(samples: Samples, vectors: Vectors, options: argparse.Namespace) -> tuple:
    """How well the label can be read from the states: all facts, and the table of --save."""
    import sklearn
    from joblib import parallel_config  # which scikit-learn brings, as threadpoolctl
    from threadpoolctl import threadpool_limits

    everything = read_texts(samples)
    labels = read_labels(everything, options.probe, options.above, options.positive)
    has_label = labels.values.notna().to_numpy()
    table = everything[has_label].reset_index(drop=True)
    task, group_notes = make_task(table, labels.values[has_label], options)
    notes = labels.notes + group_notes
    categories = None
    if options.by:
        column, more_notes = read_column(options.by, table["question_id"])
        categories = column.fillna("").to_numpy(object)
        notes += more_notes
    labelled = list(itertools.compress(samples, has_label))
    matrices = [(name, labelled, name, width) for name, width in vectors.items()]
    for spec in options.beside:
        matrices += open_beside(spec, table, options)
    # A thread a fit: several of BLAS within one would wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1), parallel_config("threading", n_jobs=-1):
        warnings.simplefilter("ignore")  # of fits that have not converged
        baselines = try_baselines(task, table, categories)
        found, rows = make_report(task, matrices, baselines, categories)
    facts = {
        "label": options.probe,
        "above": options.above,
        "classes": {name: int((labels.values == k).sum()) for k, name in enumerate(labels.classes)},
        "positive": labels.classes[1],
        "num_without_label": int((~has_label).sum()),
        "examples": draw_examples(everything, labels, options.seed),
        "notes": notes,
        "folds": [{"question_id": list(table["question_id"][fold])} for fold in task.folds()],
        "group": options.group or "image",
        "num_groups": len(set(task.groups)),
        "seed": options.seed,
        "probe": PROBES[options.probe_model],
        "scikit_learn": sklearn.__version__,
    }
    return facts | found, make_saved(everything, labels, task, rows)


def draw_examples(table: pd.DataFrame, labels: Labels, seed: int) -> dict[str, list]:
    """Some samples of each class, drawn at random: their ground truths and answers."""
    rng = np.random.default_rng(seed)
    examples = {}
    for value, name in enumerate(labels.classes):
        places = rng.permutation(np.flatnonzero(labels.values == value))[:NUM_EXAMPLES]
        texts = table[["ground_truth_answer", "answer"]].iloc[places]
        examples[name] = texts.to_numpy().tolist()
    return examples


def make_saved(
    table: pd.DataFrame, labels: Labels, task: Task, rows: dict[str, Row]
) -> pd.DataFrame:
    """The table of --save: texts, label, fold from 1 on, a probability for each row of the report.

    Samples without a label are there too, their label empty, so that it can be filled in.
    """
    texts = ["question_id", "image_id", "question", "ground_truth_answer", "answer"]
    saved = table[texts].copy()
    saved["label"] = labels.values.map({0.0: labels.classes[0], 1.0: labels.classes[1]})
    places = saved.index[labels.values.notna()]
    saved["fold"] = pd.Series(task.fold_of + 1, places, dtype="Int64")
    for name, row in rows.items():
        saved[name] = pd.Series(row.probabilities, places)
    return saved


# ────────────────────────────────────── showing the report ───────────────────────────────────────
def show_cells(cells: dict[str, dict]) -> Iterator[str]:
    """For each run a row for each layer and a column for each representation, then its vision."""
    tables = {}
    levels = {}
    for title, cell in cells.items():
        run, _, name = title.rpartition(": ")
        kind, _, layer = name.partition("_representation/layer_")
        shown = f"{np.mean(cell['auroc']):.2f}±{np.std(cell['auroc'], ddof=1):.2f}"
        if layer:
            table = tables.setdefault(run, pd.DataFrame(dtype=object))
            table.loc[int(layer), kind] = shown
        else:
            levels[run] = f"vision {shown}"
    for run in tables | levels:
        if run:
            yield f"\n{run}"
        if run in tables:
            table = tables[run].fillna("-").rename_axis("layer").reset_index()
            yield table.to_string(index=False)
        if run in levels:
            yield levels[run]


def show_report(report: dict[str, dict]) -> Iterator[str]:
    """A line for each representation and baseline, then the layers that were chosen."""
    width = max(21, *map(len, report))
    widths = {key: max(5, len(title) + 1) for key, title in HEADINGS.items()}
    titles = (f"{title:>{widths[key]}}" for key, title in HEADINGS.items())
    yield f"{'':<{width}} AUROC  interval{''.join(titles)}"
    for name, figures in report.items():
        line = f"{name:<{width}}{figures['auroc']:6.2f}"
        bounds = ""
        if "auroc_low" in figures:
            bounds = f"{figures['auroc_low']:.2f}-{figures['auroc_high']:.2f}"
        line += f"{bounds:>10}"
        for key in HEADINGS:
            shown = f"{figures[key]:.2f}" if key in figures else "-"
            line += f"{shown:>{widths[key]}}"
        yield line
    yield ""
    for name, figures in report.items():
        layers = [str(layer) for layer in figures.get("layers", []) if layer is not None]
        if layers:
            yield f"{name:<{width}} layers chosen, by fold: {' '.join(layers)}"


def show_categories(facts: dict) -> Iterator[str]:
    """AUROC by category of --by."""
    table = pd.DataFrame(dtype=object)
    for category, found in facts["by"].items():
        table.loc[category, "samples"] = str(found["num_samples"])
        table.loc[category, repr(facts["positive"])] = str(found["num_positive"])
        for row, auroc in found["auroc"].items():
            table.loc[category, row] = "-" if auroc is None else f"{auroc:.2f}"
    yield f"\nAUROC by category (-: fewer than {MIN_IN_CATEGORY} samples of a class)"
    yield table.rename(lambda category: one_line(category, 20)).to_string()


def show_probe(facts: dict) -> Iterator[str]:
    """What was tried, and the tables."""
    above = "" if facts["above"] is None else f" above {facts['above']:g}"
    yield f"label     {facts['label']}{above}; positive is {facts['positive']!r}"
    if facts["label"] == ANSWER_IS_WRONG:
        yield RULE
    classes = (f"{count:,} × {one_line(name, 24)}" for name, count in facts["classes"].items())
    yield f"samples   {', '.join(classes)}; {facts['num_without_label']:,} without a label"
    if facts["label"] == ANSWER_IS_WRONG:
        for name, examples in facts["examples"].items():
            for truth, answer in examples:
                yield f"{name:<10}{one_line(truth, 24)} → {one_line(answer, 42)}"
    for note in facts["notes"]:
        yield f"note      {note}"
    group = "images" if facts["group"] == "image" else f"groups of {facts['group']}"
    num_folds = len(facts["folds"])
    yield f"folds     {num_folds}; each of the {facts['num_groups']:,} {group} in one only"
    yield f"probe     {facts['probe']}; seed {facts['seed']}"
    yield "\nAUROC by layer, mean±standard deviation of the folds: each cell by itself"
    yield from show_cells(facts["cells"])
    yield "\nreport: layer and penalty chosen inside the training folds; 95 % intervals"
    yield from show_report(facts["report"])
    yield f"\nAUROC of {facts['best']} minus that of"
    for name, found in facts["differences"].items():
        yield f"{name:<26}{found['auroc']:6.2f}  from {found['low']:.2f} to {found['high']:.2f}"
    if facts["by"]:
        yield from show_categories(facts)
    if facts["leaks"]:
        yield "\nEven shuffled labels can be read: something leaks between folds; trust no figure."


def draw_layers(axes: "matplotlib.axes.Axes", cells: dict[str, dict]) -> float:  # noqa: F821
    """A line by layer for each representation, dashed for other runs; where the lowest bar ends."""
    lines = {}
    lowest = 0.5
    for title, cell in cells.items():
        name, _, layer = title.partition("_representation/layer_")
        mean = np.mean(cell["auroc"])
        spread = np.std(cell["auroc"], ddof=1)
        if layer:
            lowest = min(lowest, mean - spread)
            lines.setdefault(name, []).append((int(layer), mean, spread))
    kinds = [kind.removesuffix("_representation") for kind in KINDS]
    for name, points in lines.items():
        run, _, kind = name.rpartition(": ")
        color = COLORS[kinds.index(kind)]
        layers, means, spreads = np.array(sorted(points)).T
        bars = [spreads, np.minimum(spreads, 1 - means)]  # no AUROC is above 1
        if run:
            axes.errorbar(layers, means, fmt="o--", color=color, mfc="white", ms=4, label=name)
        else:
            axes.errorbar(layers, means, bars, fmt="o-", color=color, ms=4, label=name)
    return lowest


def plot_probe(path: Path, facts: dict) -> None:
    """Draw AUROC by layer; the best row's interval as a band, the best baselines as levels."""
    figure = new_figure(8, 4.5)
    title = one_line(Path(facts["label"]).name, 80)
    axes = figure.add_subplot(xlabel="layer", ylabel="AUROC", title=title)
    lowest = draw_layers(axes, facts["cells"])
    best = facts["report"][facts["best"]]
    axes.axhspan(best["auroc_low"], best["auroc_high"], color="#BBBBBB", alpha=0.4, lw=0)
    label = f"{facts['best']}, layer chosen  {best['auroc']:.2f}"
    axes.axhline(best["auroc"], color="#777777", lw=1.2, label=label)
    names = [name for name in facts["differences"] if ": " not in name]
    levels = {name: facts["report"][name]["auroc"] for name in names}
    ranked = sorted(levels, key=levels.get, reverse=True)[:4]
    for name, color, dashes in zip(ranked, COLORS[3:], ["--", ":", "-.", (0, (5, 1))]):
        label = f"{name}  {levels[name]:.2f}"
        axes.axhline(levels[name], color=color, lw=1.2, linestyle=dashes, label=label)
        lowest = min(lowest, levels[name])
    axes.axhline(0.5, color="#BBBBBB", lw=0.8, zorder=0)
    axes.set_ylim(min(0.4, np.floor(10 * max(lowest, 0)) / 10), 1.01)  # a line at 1 is seen
    figure.legend(loc="outside right center", frameon=False, handlelength=4)
    figure.savefig(path, dpi=150)


# ──────────────────────────────────────────── page ─────────────────────────────────────────────
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Answers and pictures</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<style>{style}</style><header></header><nav><label>Search <input type="search" id="search"></label>
<label>Show <select id="show"><option>all<option>wrong<option>right<option>unclear<option value="">
unlabelled<option>changed</select></label> <label>Sort <select id="sort"><option value="">as planned
</select></label> <label><input type="checkbox" id="down" checked> high first</label></nav>
<main></main><footer><a id="download" download="labels.csv" href="#">Download labels</a>
<output></output> <small>Keys: 1 2 3 label, j ↓ next, k ↑ back</small></footer><template id="group">
<section><img decoding="async"><div></div></section></template><template id="card">
<article tabindex="-1"><dl><dt>question<dd dir="auto"></dd><dt>truth<dd dir="auto"></dd><dt>answer
<dd dir="auto"></dl><small dir="auto"></small><p><button value="right">1 right</button> <button
value="wrong">2 wrong</button> <button value="unclear">3 unclear</button></p></article></template>
<script type="application/json">{run}</script><script>{script}</script>"""
PAGE_STYLE = """header, nav, main, footer { padding: .5rem max(.7rem, 50vw - 38rem); }
:not(small) { font: inherit; margin: 0; max-width: 100%; scroll-margin: 42vh 0 6rem; }
:root { color-scheme: light dark; font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }
header, dd { white-space: pre-wrap; max-height: 14rem; overflow: auto; } div { flex: 3 1 20rem; }
nav, footer, section { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: start; }
section { padding: .5rem 0; content-visibility: auto; contain-intrinsic-size: auto 22rem; }
img { flex: 1 1 18rem; min-width: 0; max-width: 24rem; max-height: 40vh; object-fit: contain; }
img { position: sticky; top: 0; background: Canvas; } button, input, select { padding: .3em .6em; }
img:not([src]) { background: #8886; padding: 3rem 1rem; box-sizing: border-box; }
article { padding: .5rem .7rem; margin: 0 0 .6rem; border-left: .5rem solid var(--label, #8886); }
article:focus-within, :focus-visible { outline: 3px solid; outline-offset: -3px; }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .2rem .6rem; }
[data-label=right] { --label: #17b; } [data-label=wrong] { --label: #b85400; } dt { color: #777; }
[aria-pressed=true] { background: var(--label, #666); color: #fff; font-weight: bold; }
footer { position: sticky; bottom: 0; background: Canvas; border-top: 1px solid; }"""
PAGE_SCRIPT = r"""const find = (selector) => document.querySelector(selector);
const { about, images, key, samples } = JSON.parse(find("script").textContent);
const steps = { j: 1, ArrowDown: 1, ArrowRight: 1, k: -1, ArrowUp: -1, ArrowLeft: -1 };
let shown = samples;  // in the order of the page
let current;  // the sample that had the focus last
function keep(change) {  // in the browser, where another tab may have kept labels, too
  const kept = { ...JSON.parse(localStorage.getItem(key)), ...change };
  localStorage.setItem(key, JSON.stringify(kept));
  for (const sample of samples) {
    sample.label = sample.card.dataset.label = kept[sample.key] ?? sample.start;
    for (const button of sample.buttons) button.ariaPressed = button.value === sample.label;
  }
  const labelled = samples.filter((sample) => sample.label).length;
  find("output").textContent = `${shown.length} of ${samples.length} shown, ${labelled} labelled`;
}
function draw() {
  const [show, column, words] = ["show", "sort", "search"].map((id) => find(`#${id}`).value);
  const kinds = (sample) => ["all", sample.label, sample.label === sample.start || "changed"];
  shown = samples.filter((sample) => sample.words.includes(words.toLowerCase()));
  shown = shown.filter((sample) => kinds(sample).includes(show));
  const sign = find("#down").checked ? -1 : 1;
  const rank = (sample) => sign * (sample.numbers[column] ?? sign * Infinity);  // none: last
  shown.sort((one, other) => rank(one) - rank(other));
  find("main").replaceChildren();
  shown.forEach((sample, place) => {
    if (sample.image_id !== shown[place - 1]?.image_id) {
      find("main").append(find("#group").content.cloneNode(true));
      Object.assign(find("main").lastChild.firstChild, images[sample.image_id]);
    }
    find("main").lastChild.lastChild.append(sample.card);
  });
  keep({});
}
for (const sample of samples) {
  sample.card = find("#card").content.firstElementChild.cloneNode(true);
  sample.buttons = sample.card.querySelectorAll("button");
  for (const button of sample.buttons) button.onclick = () => keep({ [sample.key]: button.value });
  sample.card.addEventListener("focusin", () => { current = sample; });
  const numbers = Object.entries(sample.numbers).map((pair) => pair.join(" "));
  const facts = [sample.question_id, sample.image_id, sample.cut, ...numbers].join(" · ");
  const texts = [sample.question, sample.ground_truth_answer, sample.answer, facts];
  sample.card.querySelectorAll("[dir]").forEach((box, place) => box.append(texts[place]));
  sample.words = texts.join("\n").toLowerCase();
}
window.onkeydown = (event) => {
  const isTaken = event.target.matches(event.key.length > 1 ? "input, select, dd" : "#search");
  if (isTaken || event.ctrlKey || event.altKey || event.metaKey) return;
  event.target.closest("article")?.querySelectorAll("button")[event.key - 1]?.click();
  shown[shown.indexOf(current) + steps[event.key]]?.card.focus();
  if (steps[event.key]) event.preventDefault();
};
find("#download").onclick = () => {
  const quote = (text) => `"${text.replaceAll('"', '""')}"`;
  const line = (one) => `${quote(one.question_id)},${one.label.replace("unclear", "")}\n`;
  const file = new Blob(["question_id,label\n", ...samples.map(line)], { type: "text/csv" });
  find("#download").href = URL.createObjectURL(file);
};
window.onerror = (message) => { find("header").textContent = `Labels are not kept: ${message}`; };
for (const name of Object.keys(samples[0]?.numbers ?? {})) find("#sort").append(new Option(name));
find("header").textContent = about;
find("nav").oninput = find("#show").onchange = find("#sort").onchange = draw;
draw();
shown[0]?.card.focus({ preventScroll: true });"""


def choose_images(samples: Samples, max_samples: int) -> Samples:
    """Image by image, whole images spread over the plan, so many samples in all (or one image)."""
    image_ids = pd.Series(list(each(samples, read, "image_id")))
    chosen = []
    num_passed = 0
    for _, group in image_ids.groupby(image_ids, sort=False):
        num_passed += len(group)  # of all; those chosen may not be ahead of their share
        if not chosen or (len(chosen) + len(group)) * len(samples) <= max_samples * num_passed:
            chosen += list(group.index)
    return [samples[place] for place in chosen]


def make_thumbnail(images_dir: Path, image_id: str) -> dict[str, str]:
    """What an <img> gets: a JPEG as a data URI, or only words that say why there is none."""
    root = os.path.join(os.path.abspath(images_dir), "")
    path = os.path.normpath(os.path.join(root, image_id))
    if not path.startswith(root) or not os.path.isfile(path):
        return {"alt": f"{image_id} is no file inside {images_dir}"}
    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.draft("RGB", (384, 384))  # a large JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders let anything through
        return {"alt": f"{image_id} cannot be read as an image: {error}"}
    upright.thumbnail((384, 384))
    upright.save(file, "JPEG", quality=55)  # 500 pictures of 4:3 are below 20 MB, even if of noise
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"alt": image_id, "src": f"data:image/jpeg;base64,{encoded}"}


def write_page(path: Path, part: dict, samples: Samples, images_dir: Path, label: str) -> str:
    """Write the page of these samples of a run; what it shows. `label`: LABEL, or nothing."""
    table = read_texts(samples).set_index("question_id", drop=False)
    cards = table[["question_id", *TEXTS]].assign(start="")
    cards["key"] = pd.util.hash_pandas_object(cards, index=False).map(str)
    cards["cut"] = np.where(table["answer_truncated"], "ANSWER CUT", "answer whole")
    numbers = pd.DataFrame({"first-token entropy": table.get(ENTROPY)}, table.index)
    numbers["mean log-probability"] = table.get(LOGPROBS, pd.Series(dtype=object)).map(np.mean)
    about = [", ".join(str(part.get(name)) for name in ("dataset", "model_name", "model_revision"))]
    if label:
        found = read_labels(table, label)
        values = found.values - (found.classes in (["right"], ["0"]))  # there nothing is wrong yet
        cards["start"] = values.map({0: "right", 1: "wrong"}).fillna("").to_numpy()
        about += [f"labels from {label}; right, wrong: {', '.join(found.classes)}", *found.notes]
    if ":" in label:
        others = pd.read_csv(label.rpartition(":")[0], dtype=str, keep_default_na=False)
        others = others.set_index("question_id").apply(pd.to_numeric, errors="coerce")
        others = others.dropna(axis=1, how="all").drop(columns=TEXTS, errors="ignore")
        numbers = numbers.join(others.add_suffix(" (CSV)"))
    cards["numbers"] = json.loads(numbers.to_json(orient="records", double_precision=3))
    image_ids = tqdm(table["image_id"].unique(), unit="image", disable=None)
    images = {image_id: make_thumbnail(images_dir, image_id) for image_id in image_ids}
    num_missing = sum("src" not in image for image in images.values())
    about.append(f"{len(table):,} samples; {len(images):,} images, {num_missing:,} of them missing")
    key = [label, *(part[name] for name in sorted(part.keys() - VARYING - {"num_samples"}))]
    run = {"about": "\n".join(about), "key": str(key), "images": images}
    run["samples"] = cards.to_dict("records")
    packed = re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(run))  # no markup
    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    page = PAGE.format(hash=digest, style=PAGE_STYLE, run=packed, script=PAGE_SCRIPT)
    with put_in_place(path) as partial:
        partial.write_text(page, encoding="utf-8", newline="")
    return f"{path}: {about[-1]}"


# ───────────────────────────────────────── command line ────────────────────────────────────────
MODE_FLAGS = {  # which flags go with what is to be done
    "view": {"question_id", "max_samples", "all", "json", "representation", "layer"},
    "verify": {"vqa_dataset"},
    "export": {"representation", "layer"},
    "plot": {"representation", "layer", "color_by"},
    "probe": {"representation", "layer", "above", "positive", "by", "group", "beside", "seed"}
    | {"probe_model", "json", "plot", "save"},
    "page": {"images_dir", "label", "max_samples", "question_id"},
}


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a part file, or a directory of them")
    add("--question-id", action="append", metavar="ID", help="show this sample in full; repeatable")
    add("--verify", action="store_true", help="check everything that can be wrong")
    add("--export", type=Path, metavar="FILE", help=".npz of matrices and texts")
    add("--plot", type=Path, metavar="FILE", help=".png, .pdf or .svg: a picture")
    add("--probe", metavar="LABEL", help=f"predict CSV:COLUMN, or {ANSWER_IS_WRONG}")
    add("--page", type=Path, metavar="FILE", help=".html: label answers beside their pictures")
    add("--images-dir", type=Path, metavar="DIR", help="page: the directory of the pictures")
    add("--label", default="", metavar="LABEL", help="page: labels to begin with, as in --probe")
    add("--max-samples", type=int, metavar="N", help="samples to show (view: 3, page: 1000)")
    add("--all", action="store_true", help="view: use all samples for the figures, not 1000")
    add("--json", action="store_true", help="view, probe: print JSON")
    add("--vqa-dataset", type=Path, metavar="CSV", help="verify: compare with this CSV")
    add("--representation", choices=(VISION, *KINDS), help="view, export, plot, probe: only this")
    add("--layer", type=int, metavar="I", help="view, export, plot, probe: only this")
    add("--color-by", metavar="WHAT", help="plot: ground_truth_answer, ... or CSV:COLUMN")
    add("--above", type=float, metavar="X", help="probe: of numbers, those above X are 1")
    add("--positive", metavar="VALUE", help="probe: the value to predict (wrong, or the last)")
    add("--group", metavar="CSV:COLUMN", help="probe: keep equal values in one fold (image_id)")
    add("--by", metavar="CSV:COLUMN", help="probe: AUROC by category as well")
    add("--beside", action="append", default=[], metavar="NAME=DIR", help="probe: one more run")
    add("--probe-model", choices=PROBES, default="linear", help="probe: linear, or HALP's mlp")
    add("--seed", type=int, default=0, metavar="N", help="probe: the random seed (0)")
    add("--save", type=Path, metavar="FILE", help="probe: .csv of labels and probabilities")
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[str, argparse.Namespace]:
    """What is to be done, and its flags; status 2 where they do not fit."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    modes = ("verify", "export", "probe", "page", "plot")
    mode = next((name for name in modes if name in given), "view")
    for name in sorted(given - MODE_FLAGS[mode] - {mode, "paths"}):
        parser.error(f"--{name.replace('_', '-')} does not go with {mode}")
    if mode == "page" and not args.images_dir:
        parser.error("--page: it needs --images-dir")
    if args.max_samples is None:
        args.max_samples = 1000 if mode == "page" else 3
    outputs = [(args.export, ".npz"), (args.plot, ".png .pdf .svg"), (args.save, ".csv")]
    outputs.append((args.page, ".html .htm"))
    for path, suffixes in outputs:
        if path and path.suffix not in suffixes.split():
            parser.error(f"{path}: the name must end in one of {suffixes}")
    for name, label in (("--probe", args.probe), ("--label", args.label)):
        if label and label != ANSWER_IS_WRONG and ":" not in label:
            parser.error(f"{name}: LABEL is CSV:COLUMN or {ANSWER_IS_WRONG}, not {label}")
    for name, value in (("--by", args.by), ("--group", args.group)):
        if value is not None and ":" not in value:
            parser.error(f"{name}: it needs CSV:COLUMN, not {value}")
    if args.above is not None and args.probe == ANSWER_IS_WRONG:
        parser.error("--above is for the numbers of a CSV")
    if args.above is not None and not np.isfinite(args.above):
        parser.error(f"--above: a finite number, not {args.above}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed: a number from 0 to {2**32 - 1}, not {args.seed}")
    names = [re.match("(?:([^=:]+)=.)?", spec)[1] for spec in args.beside]
    if None in names or len(set(names)) < len(names):
        parser.error("--beside: it needs NAME=DIR, and each run a name of its own")
    return mode, args


def find_samples(samples: Samples, question_ids: list[str]) -> Samples:
    """The samples of these ids, each once. Raises ValueError that names what is near."""
    by_id = {unquote(name): (path, name) for path, name in samples}
    for question_id in question_ids:
        if question_id not in by_id:
            near = difflib.get_close_matches(question_id, by_id, cutoff=0)
            raise ValueError(f"no question_id {question_id!r}; near it: {near}")
    return [by_id[question_id] for question_id in dict.fromkeys(question_ids)]


def check_can_write(path: Path) -> None:
    """Raises ValueError, before hours of work, where a file cannot be written."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no directory {path.parent}; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; choose another name or directory")


def run_probe(samples: Samples, vectors: Vectors, args: argparse.Namespace) -> Iterator[str]:
    """The lines of --probe; the picture and the table of --save are written after them."""
    for spec in filter(None, (args.probe, args.group, args.by)):
        source = Path(spec.rpartition(":")[0])
        if args.save and args.save.exists() and source.exists() and source.samefile(args.save):
            raise ValueError(f"--save would overwrite the file of {spec}; choose another name")
    if args.plot:
        new_figure(1, 1)  # which needs matplotlib
    facts, saved = probe(samples, vectors, args)
    if args.json:
        yield json.dumps(facts, allow_nan=False, indent=1)
    else:
        yield from show_probe(facts)
    if args.save:
        with put_in_place(args.save) as partial:
            saved.to_csv(partial, index=False, encoding="utf-8-sig")
    if args.plot:
        plot_probe(args.plot, facts)


def run_page(args: argparse.Namespace, parts: dict[Path, dict], samples: Samples) -> str:
    """Write the page of --page, about the samples that are asked for; what it shows."""
    max_samples = args.max_samples
    if args.question_id:
        samples = find_samples(samples, args.question_id)
        max_samples = len(samples)
    chosen = choose_images(samples, max_samples)
    part = next(iter(parts.values()))
    return write_page(args.page, part, chosen, args.images_dir, args.label)


def run(mode: str, args: argparse.Namespace) -> tuple[int, Iterable[str]]:
    """The exit status, and the lines to print. Raises ImportError, OSError or ValueError."""
    if mode == "verify":
        return verify(args.paths, args.vqa_dataset)
    for path in filter(None, (args.export, args.plot, args.save, args.page)):
        check_can_write(path)
    parts, samples = open_run(args.paths)
    vectors = list_vectors(next(iter(parts.values())), args.representation, args.layer)
    if mode == "export":
        return 0, export(args.export, samples, vectors)
    if mode == "probe":
        return 0, run_probe(samples, vectors, args)
    if mode == "page":
        return 0, [run_page(args, parts, samples)]
    order = np.random.default_rng(0).permutation(len(samples))
    num_drawn = len(samples) if args.all else NUM_DRAWN
    drawn = [samples[place] for place in sorted(order[:num_drawn])]
    if mode == "plot":
        return 0, plot(args.plot, drawn, len(samples), vectors, args.color_by or TEXTS[-1])
    shown = samples[: max(args.max_samples, 0)]
    if args.question_id:
        shown = find_samples(samples, args.question_id)
        drawn = shown
    facts = describe(parts, samples, drawn, vectors)
    facts["samples"] = json.loads(read_texts(shown).to_json(orient="records"))  # NaN is null
    if args.json:
        return 0, [json.dumps(facts, allow_nan=False, indent=1, default=str)]
    return 0, show(facts, sys.maxsize if args.question_id else 58)


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, print what there is to say; the exit status."""
    mode, args = parse_arguments(argv)
    try:
        status, lines = run(mode, args)
        for line in lines:
            print(line, flush=True)
        return status
    except ImportError as error:
        package = str(error.name).partition(".")[0].replace("sklearn", "scikit-learn")
        message = f"{error}: pip install {package}"
    except (MemoryError, OSError, ValueError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    print(one_line(message), file=sys.stderr)
    return 1


if __name__ == "__main__":
    if sys.stderr is None:  # 2>&-
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise SystemExit("stdout is closed: results could not be printed")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not every script
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    status = main()
    sys.stderr.flush()
    os._exit(status)  # Python would try once more to write what could not be written
