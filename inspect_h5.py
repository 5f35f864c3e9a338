#!/usr/bin/env python3
"""Look into the part files that run_gemma3_extraction.py writes, and probe what they hold.

    python inspect_h5.py output                      what was run, figures, first samples
    python inspect_h5.py output --question-id 42     the same of one sample, its texts whole
    python inspect_h5.py output --verify --vqa-dataset vqa.csv
    python inspect_h5.py output --export layer_24.npz --layer 24
    python inspect_h5.py output --plot pca.png --color-by labels.csv:hallucinated
    python inspect_h5.py output --probe answer_is_wrong --by vqa.csv:benchmark --plot auroc.png
    python inspect_h5.py output --page review.html --images-dir images --label answer_is_wrong

Samples stand in the plan's order. Exit status: 0 all is well, 1 something is wrong and one line
says what (--verify: one line a finding), 2 wrong usage, 130 stopped by Ctrl-C.
"""

import argparse
import base64
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

VISION, LINK = "vision_representation", "vision_only_representation"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
TEXTS = ["image_id", "question", "answer", "ground_truth_answer"]
COUNTS = ["row", "num_prompt_tokens", "vision_token_pos", "query_token_pos", "num_answer_tokens"]
LOGPROBS, ENTROPY = "answer_logprobs", "first_token_entropy"
VARYING = {"created_at", "dataset", "dataset_sha256", "python_version", "torch_version"}
VARYING |= {"transformers_version", "device", "device_name", "cuda_version", "cudnn_version"}
VARYING_ELSEWHERE = {"checkpoint_interval", "storage_dtype"}  # between directories
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
NUM_DRAWN = 1000  # samples in the table and the plot
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00 #F0E442 #882255 #999933".split()

Paths = str | Path | Iterable[str | Path]  # files; directories stand for the parts in them
Samples = list[tuple[Path, str]]  # the file, and the group's name in it
Vectors = dict[str, int]  # the data sets of vectors, and their lengths
Finding = tuple[str, list[str]]  # what is wrong, and the question_ids that it is wrong with


# ─────────────────────────────────────────── reading ───────────────────────────────────────────
def find_parts(paths: Paths) -> list[Path]:
    """Part files, each once, in the order given; those of a directory by their number."""
    found = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        inside = [path] if path.is_file() else path.glob("gemma3_12b_embeddings_part_*.h5")
        inside = sorted(inside, key=lambda part: (len(part.name), part))
        if not inside:
            raise ValueError(f"{path} is no file, and no directory with part files in it")
        for part in inside:
            found.setdefault(part.resolve(), part)
    if not found:
        raise ValueError("no part files")
    return list(found.values())


def scan_parts(paths: Paths) -> tuple[dict[Path, dict], Samples, list[Finding]]:
    """The attributes of each readable part, all samples in order, why they are not one run."""
    parts, owners, findings = {}, {}, []
    for path in find_parts(paths):
        try:
            with h5py.File(path) as file:
                part = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
                names = list(file)
                if part.get("schema_version", 1) < 3:  # since then the order of groups tells it
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
        if twice := [name for name in names if name in owners]:
            what = f"{path}: question_id stands in {owners[twice[0]]} too"
            findings.append((what, list(map(unquote, twice))))
        owners |= {name: path for name in names if name not in owners}
    return parts, [(path, name) for name, path in owners.items()], findings


def find_differences(path: Path, parts: dict[Path, dict]) -> Iterator[Finding]:
    """Why a part is not of one run with those before it; of other directories less is asked."""
    part, first = parts[path], next(iter(parts.values()))
    sibling = next(other for there, other in parts.items() if there.parent == path.parent)
    is_pinned = re.fullmatch("[0-9a-f]{40,64}", str(part.get("model_revision")))
    for key in sorted((part.keys() | first.keys() | sibling.keys()) - VARYING - {"num_samples"}):
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
    layered = [f"{name}/layer_{i}" for name in KINDS for i in part["layers"]]
    widths = {VISION: part["vision_hidden_size"], **dict.fromkeys(layered, part["hidden_size"])}
    chosen = {
        name: width
        for name, width in widths.items()
        if kind in (None, name.partition("/")[0]) and layer in (None, layer_of(name))
    }
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
    shape, dtype = ((), h5py.string_dtype()) if width is None else ((width,), np.float32)
    dataset, values = h5py.h5d.open(group.id, name.encode()), np.empty(shape, dtype)
    if (dataset.shape, dataset.dtype) != (shape, values.dtype):
        raise ValueError(f"{dataset.dtype} {dataset.shape}, not {values.dtype} {shape}")
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values.item().decode() if width is None else values


def each(samples: Samples, function: Callable, *args, strict: bool = True) -> Iterator:
    """`function(group, *args)` of every sample; where not `strict`, a problem of what is broken."""
    for path, inside in itertools.groupby(samples, key=lambda sample: sample[0]):
        with h5py.File(path) as file:
            for _, name in inside:
                try:
                    yield function(file[name], *args)
                except UNREADABLE as error:
                    what, name = f"cannot be opened: {error.args[-1]}", unquote(name)
                    if strict:
                        raise ValueError(f"{path}, {name!r} {what}") from error
                    yield {"path": path, "question_id": name, "problems": [what]}


def read_texts(samples: Samples) -> pd.DataFrame:
    """question_id, texts and attributes, in the order of `samples`, without what no sample has."""
    columns = [*TEXTS, *COUNTS, "answer_truncated", "image_sha256", ENTROPY, LOGPROBS]

    def read_record(group: h5py.Group) -> dict:
        stored = {LOGPROBS: group[LOGPROBS][()].tolist()} if LOGPROBS in group else {}
        return {name: read(group, name) for name in TEXTS} | dict(group.attrs) | stored

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
    """Columns of a CSV by question_id, text as it stands; each by the first name that is there."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines, header = list(reader), list(reader.fieldnames or [])
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
    if uneven := [line for line in lines if None in line or None in line.values()]:
        what = f"{len(uneven):,} rows have more or fewer fields than the header"
        raise ValueError(f"{path}: {what}; check their commas, also at the end")
    table = pd.DataFrame(lines, columns=chosen, dtype=str).set_index("question_id")
    if len(twice := table.index[table.index.duplicated()]):
        raise ValueError(f"{path}: question_id {twice[0]!r} is there twice")
    return table


def read_column(spec: str, question_ids: pd.Series) -> tuple[pd.Series, list[str]]:
    """CSV:COLUMN of these samples, NaN for none; a note if some are not there. Or ValueError."""
    csv_path, _, column = spec.rpartition(":")
    values = read_table(Path(csv_path), (column,))[column]
    absent = question_ids[~question_ids.isin(values.index)].tolist()
    note = f"{len(absent):,} of {len(question_ids):,} samples are not in {csv_path}"
    note += f", first {absent[:1]} (it has {[*values.index[:1]]}); did leading zeros get lost?"
    if len(absent) == len(question_ids):
        raise ValueError(note)
    values = values.reindex(question_ids).str.strip().replace("", np.nan).reset_index(drop=True)
    if values.isna().all():
        raise ValueError(f"{spec}: no sample has a value there")
    return values, [note] if absent else []


# ─────────────────────────────────────────── the view ──────────────────────────────────────────
def summarise(matrix: np.ndarray) -> dict[str, float | None]:
    """The figures of vectors [num_samples, D]; norms are of those that are finite."""
    finite = np.isfinite(matrix)
    whole = matrix[finite.all(axis=1)]
    norms = np.sqrt(np.einsum("nd,nd->n", whole, whole, dtype=np.float64))
    return {
        "dim": matrix.shape[1],
        "norm_mean": float(norms.mean()) if len(norms) else None,
        "norm_std": float(norms.std()) if len(norms) else None,
        "max_abs": float(np.abs(matrix).max(initial=0, where=finite)),
        "nonfinite_share": float(1 - finite.mean()),
    }


def describe_sample(group: h5py.Group, vectors: Iterable[str]) -> dict[str, str]:
    """What a sample holds: types, shapes and compression as they are in the file."""
    tree = dict.fromkeys(TEXTS, "text") | {LINK: f"-> {VISION}"}
    for name in [LOGPROBS, *vectors] if LOGPROBS in group else vectors:
        dataset = group[name]
        tree[name] = f"{dataset.dtype} {list(dataset.shape)} {dataset.compression or ''}".rstrip()
    return tree


def describe(parts: dict, samples: Samples, drawn: Samples, vectors: Vectors) -> dict:
    """What was run (a setting that varies is a list), a sample, figures of those drawn."""
    settings = {}
    for name in next(iter(parts.values())):
        values = [part.get(name) for part in parts.values()]
        settings[name] = values[0] if values.count(values[0]) == len(values) else values
    lists = filter(Path.exists, {path.with_name("failed_samples.csv") for path in parts})
    return {
        "files": list(map(str, parts)),
        "num_samples": len(samples),
        "num_failed": sum(len(read_table(path)) for path in lists),
        "settings": settings,
        "sample": next(each(drawn[:1], describe_sample, vectors), {}),
        "num_samples_read": len(drawn),
        "figures": {n: summarise(read_matrix(drawn, n, vectors[n])) for n in vectors if drawn},
    }


def one_line(value: object, width: int = sys.maxsize) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like as in a repr."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))
    used = np.cumsum([1 + (unicodedata.east_asian_width(char) in "WF") for char in text])
    end = int(np.searchsorted(used, width))  # the first character that does not fit
    return f"{text[:end]}…" if (used > width).any() else text


def show(facts: dict, width: int) -> Iterator[str]:
    """The facts in lines of 80 columns; `width` cuts what need not be whole."""
    files, total, num_read = facts["files"], facts["num_samples"], facts["num_samples_read"]
    yield files[0] if len(files) == 1 else f"{files[0]} ...\n{files[-1]}"
    yield f"parts: {len(files)}, samples: {total:,}, failed: {facts['num_failed']:,}"
    yield ""
    for name, value in facts["settings"].items():
        yield f"{name:<22}{one_line(str(value).strip('[]'), width)}"
    yield ""
    for name, kind in facts["sample"].items():
        yield f"{name:<38}{kind}"
    drawn = ", drawn at random" if num_read < total else ""
    yield f"\nfigures of {num_read:,} samples{drawn}"
    if facts["figures"]:
        table = pd.DataFrame(facts["figures"], dtype=object).T.fillna(np.nan)
        table.columns = ["dim", "mean L2", "sd L2", "max |x|", "bad"]
        yield table.to_string(float_format="{:.4g}".format)
    for sample in facts["samples"]:
        yield ""
        yield one_line(f"{sample['question_id']}  {sample['image_id']}", 80)
        for name in ("question", "ground_truth_answer", "answer") if width < 80 else sample:
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


def check_sample(group: h5py.Group, parts: dict[Path, dict]) -> dict:
    """A sample's texts, a hash of each vector, and the problems with it."""
    path, name, attributes = Path(group.file.filename), unquote(group.name[1:]), dict(group.attrs)
    part = parts[path]
    widths = dict.fromkeys(TEXTS) | list_vectors(part) | {LINK: part["vision_hidden_size"]}
    expected = {"question_id", "answer_truncated", *COUNTS}
    if part.get("schema_version", 1) >= 3:  # there the order of groups tells it
        expected.remove("row")
    if part.get("schema_version", 1) >= 2:
        expected |= {"image_sha256", "crc32"}
        if part.get("max_new_tokens", 0) > 0:
            expected |= {ENTROPY}
            widths[LOGPROBS] = len(group[LOGPROBS]) if LOGPROBS in group else 0
    problems = [f"{attribute} is missing" for attribute in sorted(expected - attributes.keys())]
    members = {}
    for member, width in widths.items():
        try:
            members[member] = read(group, member, width)
        except UNREADABLE as error:
            problems.append(f"{member}: {error.args[-1]}")
    vectors = {member: members[member] for member in members.keys() - set(TEXTS)}
    if not problems:
        problems = list(find_problems(name, attributes, vectors))
    members |= {member: hash(vector.tobytes()) for member, vector in vectors.items()}
    where = {"path": path, "question_id": name, "problems": problems}
    return where | {"image_sha256": attributes.get("image_sha256")} | members


def find_problems(name: str, attributes: dict, vectors: dict[str, np.ndarray]) -> Iterator[str]:
    """What cannot be so in a sample that is complete."""
    logprobs, entropy = vectors.get(LOGPROBS), attributes.get(ENTROPY, 0)
    num_tokens = attributes["num_answer_tokens"] + (0 if attributes["answer_truncated"] else 1)
    crc = 0
    for member in sorted(vectors.keys() - {LINK}):
        crc = zlib.crc32(vectors[member].astype("<f4").tobytes(), crc)
    checks = [
        ("crc32 is not that of the vectors", attributes.get("crc32", crc) != crc),
        ("question_id differs", str(attributes["question_id"]) != name),
        (f"{ENTROPY} is {entropy}", not 0 <= entropy < np.inf),
    ]
    for member, vector in vectors.items():
        checks.append((f"{member}: not finite", not np.isfinite(vector).all()))
        if member != LOGPROBS:
            checks.append((f"{member}: only one value", (vector == vector[0]).all()))
    if logprobs is not None:
        number = f"{LOGPROBS}: {len(logprobs)} of them, not {num_tokens}"
        checks.append((number, len(logprobs) != num_tokens))
        checks.append((f"{LOGPROBS}: above 0", (logprobs > 0).any()))
    return (problem for problem, is_so in checks if is_so)


def find_gaps(directories: list[Path]) -> Iterator[Finding]:
    """Numbers of parts, from 1 on, that a directory has not."""
    for directory in filter(Path.is_dir, directories):
        numbers = (path.stem.rpartition("_")[2] for path in find_parts(directory))
        present = {int(number) for number in numbers if number.isdecimal()}
        for number in sorted(set(range(1, max(present, default=0))) - present):
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
    absent, alone = stored["question"].isna(), rows["question"].isna()
    findings = {}
    for column in rows:
        findings[f"{column} is another here"] = (rows[column] != stored[column]) & ~absent & ~alone
    findings |= {"not in the parts": absent, "in the parts but not here": alone}
    for what, is_so in findings.items():
        if is_so.any():
            yield f"{csv_path}: {what}", list(rows.index[is_so])


# ─────────────────────────────────────── export and plot ───────────────────────────────────────
def export(path: Path, samples: Samples, vectors: Vectors) -> Iterator[str]:
    """Write texts and matrices, all in one order; what the file holds."""
    texts = read_texts(samples)[["question_id", *TEXTS]]
    yield f"{path}: {len(samples):,} samples"
    # All texts as UTF-8 bytes: in an array of text each would be as wide as the longest.
    packed = json.dumps(texts.to_dict("list"), ensure_ascii=False).encode()
    partial = path.with_name(f"{path.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, width in {"texts": None, **vectors}.items():
            array = read_matrix(samples, name, width) if width else np.frombuffer(packed, np.uint8)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            yield f"{name:<38}{array.dtype} {list(array.shape)}"
    os.replace(partial, path)


def choose_marks(table: pd.DataFrame, field: str) -> list[tuple]:
    """Samples, and how they are drawn: numbers on a scale, or the ten most frequent texts."""
    values = table.get(field, pd.Series(dtype=str)).replace("", np.nan)
    if ":" in field:
        values, _ = read_column(field, table["question_id"])
    numbers, counts = pd.to_numeric(values, errors="coerce"), values.value_counts()
    if counts.empty:
        raise ValueError(f"--color-by {field}: the samples have no values for that")
    if numbers.count() == values.count() and len(counts) > 2:
        return [(slice(None), {"c": numbers, "plotnonfinite": True})]  # hollow: no value
    marks = []
    for (value, count), color, marker in zip(counts.items(), COLORS, "os^Dv*P<X>"):
        label = f"{count:,} × {one_line(value, 24)}"
        marks.append((values == value, {"c": color, "marker": marker, "label": label}))
    rest = ~values.isin(counts.index[: len(COLORS)])
    if rest.any():
        marks.append((rest, {"c": "#BBBBBB", "zorder": 0, "label": f"{rest.sum():,} × others"}))
    return marks


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":  # noqa: F821
    """An empty figure of so many inches."""
    import matplotlib.figure

    warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
    matplotlib.rcParams |= {"font.size": 8, "axes.titlesize": 8, "text.parse_math": False}
    return matplotlib.figure.Figure((width, height), layout="constrained")


def plot(path: Path, samples: Samples, total: int, vectors: Vectors, field: str) -> list:
    """Plot these of `total` samples on two principal components, a panel for each data set."""
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers: last
    columns = len({layer_of(name) for name in names} - {None}) or 1
    rows = -(-len(names) // columns)
    figure = new_figure(2.5 * columns + 2, 2.6 * rows + 0.5)
    marks, label = choose_marks(read_texts(samples), field), one_line(Path(field).name, 30)
    shown = f"{len(samples):,} of {total:,} samples"
    figure.suptitle(f"Principal components 1 and 2\n{shown}")
    for position, name in enumerate(names, start=1):
        matrix = read_matrix(samples, name, vectors[name])
        if len(matrix) < 3 or not np.isfinite(matrix).all():
            raise ValueError(f"{name}: a plot needs 3 samples, and finite values; see --verify")
        centred = matrix - matrix.mean(axis=0, dtype=np.float64)
        variances, units = np.linalg.eigh(centred @ centred.T)  # ascending
        points = (units * np.sqrt(variances.clip(0)))[:, :-3:-1]  # [num_samples, 2]
        shares = variances[:-3:-1] / max(variances.sum(), np.finfo(float).tiny)
        title = f"{name}/{shares[0]:.1%} + {shares[1]:.1%} of variance".replace("/", "\n")
        axes = figure.add_subplot(rows, columns, position, xticks=[], yticks=[], title=title)
        for mask, mark in marks:
            axes.scatter(*points[mask].T, s=16, lw=0.3, edgecolors="#333", alpha=0.85, **mark)
    if "label" in marks[0][1]:
        figure.legend(*axes.get_legend_handles_labels(), title=label, loc="outside right center")
    else:
        figure.colorbar(axes.collections[0], ax=figure.axes, label=label, shrink=0.6)
    figure.savefig(path, dpi=150)
    return [f"{path}: {len(names)} panels of {shown}"]


# ─────────────────────────────────────────── labels ────────────────────────────────────────────
ANSWER_IS_WRONG = "answer_is_wrong"
RULE = """\
         wrong is an answer in which the ground truth does not stand as whole
         words, both normalised as VQA accuracy does: case, punctuation,
         articles, number words; numbers are compared as numbers. Where the
         ground truth is yes or no (also spelt "n, o"), the first yes or no in
         the answer counts; where it is one letter, the option that is named."""
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
LISTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\s,\[\]]+)")  # an item
SPACELESS = re.compile(  # Thai to Burmese, Khmer, kana, Han: no space between words
    "[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
)
OPTIONS = (  # where an answer names its option, the surest sign first
    r"^\W*([A-Za-z])\W*$",  # it is all
    r"^\W*([A-Za-z])[).:\]*]",  # a) a dog
    r"(?i:answer|option|choice)(?:\s+(?i:is|option|choice))*[\s:*(\"']+([A-Z])\b(?!['’])",
    r"\(([A-Za-z])\)",
    r"(?<![\w'’.])([A-Z])\W*$",  # at the end
    r"(?<![\w'’.])([B-HJ-Zb-hj-z])(?!['’.]?\w)",  # no article, and not I
)


def split_words(text: str) -> list[str]:
    """Words as VQA accuracy compares them (Antol et al. 2015, vqaEval.py), numbers as numbers."""
    text = re.sub("[⁰¹²³⁴-⁹]+", r" \g<0>", text)  # 10³ is not 103
    text = re.sub(r"(?<=\d)[,\xa0\u2009\u202f](?=\d{3}(?!\d))", "", text)  # 1,000 is 1000
    text = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if category == "Pd" or char == "\N{MINUS SIGN}":
            kept.append("-")
        elif category[0] in "LMN" or char == ".":
            kept.append(char)
        elif category != "Cf" and char not in "'’":  # don't is dont
            kept.append(" ")
    text = re.sub(r"\b(?:minus|negative)\s+(?=\.?\d)", "-", "".join(kept))
    text = TWENTY_ONE.sub(
        lambda match: str(sum(int(NUMBERS[word]) for word in match.groups())), text
    )
    return [
        format(Decimal(number).normalize() + 0, "f") if number else NUMBERS.get(word, word)
        for number, word in WORD.findall(text)
    ]


def is_wrong(answer: str, truth: str) -> bool | None:
    """The rule of `answer_is_wrong`; None where it cannot tell."""
    if letter := re.fullmatch(r"\W*([A-Za-z])\W*", truth):
        named = filter(None, (re.search(pattern, answer) for pattern in OPTIONS))
        return next((match[1].upper() for match in named), None) != letter[1].upper()
    said, meant = split_words(answer), split_words(truth)
    if not ARTICLES.issuperset(meant):  # one that is the whole truth is no article
        said, meant = ([word for word in one if word not in ARTICLES] for one in (said, meant))
    if not meant or SPACELESS.search(truth):
        return None
    spelt = "".join(meant)  # AMBER's "n, o" was a word until something joined its letters
    if spelt in ("yes", "no"):
        return [word for word in said if word in ("yes", "no")][:1] != [spelt]
    return f" {' '.join(meant)} " not in f" {' '.join(said)} "


def split_truths(text: str) -> list[str]:
    """The answers that a ground truth accepts: of `a; b` or `['a', 'b']` each, or itself."""
    if re.fullmatch(r"\s*\[.*['\"].*\]\s*", text, re.DOTALL):
        return ["".join(item) for item in LISTED.findall(text)]
    return [part.strip() for part in text.split(";") if part.strip()]


def label_answers(table: pd.DataFrame) -> tuple[pd.Series, list[str]]:
    """1 (wrong), 0 or NaN (none) for each sample, and notes on the ground truths."""
    answers, truths = table["answer"], table["ground_truth_answer"].map(split_truths)
    if not answers.any():
        raise ValueError(f"{ANSWER_IS_WRONG}: no answers are stored (--max-new-tokens 0)")
    notes = []
    if num := int((truths.map(len) > 1).sum()):
        notes.append(f"{num:,} ground truths list several answers: any of them counts")
    words = truths.map(lambda accepted: [" ".join(split_words(truth)) for truth in accepted])
    kinds = set(itertools.chain.from_iterable(words))
    begins = answers.map(lambda answer: split_words(answer)[:1] in (["yes"], ["no"]))
    if kinds and (kinds <= {"0", "1"} or kinds <= {"y", "n"}) and begins.mean() > 0.5:
        truths = words.map(lambda accepted: [BINARY[word] for word in accepted])
        notes.append(f"ground truths are {' and '.join(sorted(kinds))}: read as yes and no")
    if num := sum(any(map(SPACELESS.search, accepted)) for accepted in truths):
        notes.append(f"{num:,} ground truths have no spaces between words: bring your own labels")
    verdicts = (
        {is_wrong(answer, truth) for truth in accepted} - {None}
        for answer, accepted in zip(answers, truths, strict=True)
    )
    return pd.Series([min(of_one, default=np.nan) for of_one in verdicts], dtype=float), notes


def read_labels(table: pd.DataFrame, label: str, above: float | None) -> tuple:
    """1, 0 or NaN (none) for each sample, what 0 and 1 are called, notes. Raises ValueError."""
    if label == ANSWER_IS_WRONG:
        labels, notes = label_answers(table)
        return labels, ["right", "wrong"], notes
    texts, notes = read_column(label, table["question_id"])
    numbers = pd.to_numeric(texts, errors="coerce")
    if above is not None:
        if len(wrong := texts[numbers.isna()].dropna()):
            what = f"{len(wrong):,} values are no numbers, as {wrong.iloc[0]!r}"
            raise ValueError(f"{label}: {what}; write 0.9, not 90% or 0,9, or nothing")
        is_above = (numbers > above).astype(float).where(numbers.notna())
        return is_above, [f"≤ {above:g}", f"> {above:g}"], notes
    is_numeric = numbers.notna().equals(texts.notna())
    values = sorted(texts.dropna().unique(), key=float if is_numeric else str.casefold)
    if len(values) > 2:
        what = f"{len(values):,} values instead of two, first {one_line(values[:5], 80)}"
        raise ValueError(f"{label}: {what}; of numbers, --above X makes two")
    return texts.map({value: float(value == values[-1]) for value in values}), values, notes


# ──────────────────────────────────────────── probe ────────────────────────────────────────────
NUM_FOLDS, MIN_FOLDS, NUM_SHUFFLES, SEED = 5, 3, 5, 0
STRENGTHS = (0.03, 0.3, 3, 30)  # C times the mean squared length of a sample's features
PROBES = {
    "linear": "logistic regression, standardised vectors; C chosen on the other folds",
    "mlp": "MLP 512-256-128, standardised vectors; stopped by a tenth of the other folds",
}
DASHES = ["-", "--", ":", "-.", "--", ":", "-."]  # of what has no layers
HEADINGS = {"auroc": "AUROC", "auroc_train": "train", "auprc": "AUPRC", "precision": "prec."}
HEADINGS |= {"recall": "rec.", "f1": "F1", "brier": "Brier", "ece": "ECE"}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be told from the states, and the folds in which it is tried."""

    labels: np.ndarray  # bool [num_samples]
    images: np.ndarray  # str [num_samples]
    folds: list[np.ndarray]  # the places of the samples in each, all about images of its own
    categories: np.ndarray  # object [num_samples]: the category of --by, NaN for none

    def has_both_classes(self) -> bool:
        """Whether each fold has an AUROC."""
        return all(0 < self.labels[fold].mean() < 1 for fold in self.folds)

    def others(self, fold: np.ndarray) -> list[np.ndarray]:
        """The folds on which what is tried on this one may be fitted."""
        return [other for other in self.folds if other is not fold]


def split_by_image(labels: np.ndarray, images: np.ndarray) -> list[np.ndarray]:
    """Five folds, or fewer; each with both classes, and none with an image of another's."""
    from sklearn.model_selection import StratifiedGroupKFold

    num_images = [len(set(images[labels == value])) for value in (False, True)]  # of each class
    for count in range(min(NUM_FOLDS, *num_images), MIN_FOLDS - 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=SEED)
        folds = [test for _, test in splitter.split(images, labels, images)]
        if Task(labels, images, folds, images).has_both_classes():
            return folds
    counts = f"{(~labels).sum():,} and {labels.sum():,} samples of the classes"
    counts += f", about {num_images[0]:,} and {num_images[1]:,} images"
    raise ValueError(f"too few for a probe: {counts}; each of {MIN_FOLDS} folds needs both")


def make_probe(inputs: np.ndarray, model: str, strengths: list[float], folds: list[np.ndarray]):
    """A probe of vectors [num_samples, D] or of texts, to be fitted on these folds in order."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_text = inputs.ndim == 1
    features = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]") if is_text else StandardScaler()
    if model == "mlp":
        probe = MLPClassifier((512, 256, 128), early_stopping=True, random_state=SEED)
    elif len(strengths) == 1:
        probe = LogisticRegression(C=strengths[0], max_iter=1000)
    else:  # the one that does best where it is fitted without one or the other of two folds
        held_out = [0, 1] + [-1] * (len(folds) - 2)  # -1: never
        inner = PredefinedSplit(np.repeat(held_out, [len(fold) for fold in folds]))
        regression = LogisticRegression(max_iter=1000)
        probe = GridSearchCV(regression, {"C": strengths}, scoring="roc_auc", cv=inner)
    return make_pipeline(features, probe)


def fit_and_score(task: Task, inputs: np.ndarray, model: str, strengths: list, folds: list):
    """Fit a probe on these folds: each sample's score, and the C that it chose."""
    train = np.concatenate(folds)
    probe = make_probe(inputs, model, strengths, folds).fit(inputs[train], task.labels[train])
    chosen = getattr(probe[-1], "best_params_", {"C": strengths[0]})["C"]
    if model == "mlp":
        return probe.predict_proba(inputs)[:, 1], None
    return probe.decision_function(inputs), chosen


def try_probe(task: Task, inputs: np.ndarray, model="linear", strengths=STRENGTHS) -> dict:
    """A cell of the table, by fold: AUROC there and where its probe was fitted, C, all scores."""
    from sklearn.metrics import roc_auc_score

    cell = {"auroc": [], "auroc_train": [], "C": [], "scores": []}
    strengths = [strength / inputs[:1].size for strength in strengths]  # by features; a text is one
    for fold in task.folds:
        others = task.others(fold)
        scores, chosen = fit_and_score(task, inputs, model, strengths, others)
        for name, places in (("auroc", fold), ("auroc_train", np.concatenate(others))):
            cell[name].append(float(roc_auc_score(task.labels[places], scores[places])))
        cell["C"].append(chosen)
        cell["scores"].append(scores)
    return cell | {"mean": np.mean(cell["auroc"]), "sd": np.std(cell["auroc"], ddof=1)}


def measure(task: Task, inputs: np.ndarray, model: str, cell: dict) -> dict:
    """What a paper prints of a cell, in each fold; by category AUROC, mean of the folds.

    The threshold with the best F1, and Platt's scaling, are fitted on the other folds, on scores of
    probes that did not know the sample's own fold: those of known samples are too good for that.
    """
    from sklearn import metrics
    from sklearn.linear_model import LogisticRegression

    rows, by_category = [], {}
    for fold, scores, strength in zip(task.folds, cell["scores"], cell["C"], strict=True):
        train, known = np.concatenate(task.others(fold)), np.empty(len(scores))
        for other in task.others(fold):
            folds = [third for third in task.others(fold) if third is not other]
            known[other] = fit_and_score(task, inputs, model, [strength], folds)[0][other]
        labels, held_out = task.labels[fold], (task.labels[train], known[train])
        precision, recall, thresholds = metrics.precision_recall_curve(*held_out)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        is_told = scores[fold] >= thresholds[np.argmax(f1[:-1])]
        *told, _ = metrics.precision_recall_fscore_support(labels, is_told, average="binary")
        platt = LogisticRegression(C=np.inf).fit(known[train, None], task.labels[train])
        probabilities = platt.predict_proba(scores[fold, None])[:, 1]
        # Expected calibration error in ten bins of equal width (Guo et al. 2017).
        bins = np.minimum((10 * probabilities).astype(int), 9)
        error = np.abs(np.bincount(bins, labels - probabilities)).sum() / len(labels)
        brier = metrics.brier_score_loss(labels, probabilities)
        auprc = metrics.average_precision_score(labels, scores[fold])
        rows.append([auprc, *told, brier, error])
        for category, places in pd.Series(fold).groupby(task.categories[fold]):
            aurocs = by_category.setdefault(category, [])
            if len(set(task.labels[places])) == 2:
                aurocs.append(metrics.roc_auc_score(task.labels[places], scores[places]))
    by_category = {name: np.mean(found) if found else None for name, found in by_category.items()}
    columns = np.array(rows, float).T.tolist()
    return dict(zip([*HEADINGS][2:], columns, strict=True)) | {"by": by_category}


def try_baselines(task: Task, table: pd.DataFrame) -> dict[str, dict | None]:
    """The cells of the question's text and of the answers' numbers; None where not stored."""
    logprobs = table.get(LOGPROBS, pd.Series(dtype=object))
    lengths = table["num_answer_tokens"]
    numbers = {
        "first-token entropy": table.get(ENTROPY, []),
        "mean answer log-probability": logprobs.map(np.mean),
        "least answer log-probability": logprobs.map(np.min),
        "answer length in tokens": lengths if lengths.any() else [],
    }
    inputs = {"question text alone": table["question"].to_numpy(str)}
    inputs |= {name: np.asarray(values, float)[:, None] for name, values in numbers.items()}
    cells = dict.fromkeys(inputs)
    for name, values in inputs.items():
        if values.ndim == 2 and not np.isfinite(values).all():
            raise ValueError(f"{name}: not finite or not in all samples; see --verify")
        if len(values):  # of one number any strength gives the same order
            cell = try_probe(task, values, strengths=STRENGTHS if values.ndim == 1 else [1])
            cells[name] = cell | measure(task, values, "linear", cell)
    return cells


def shuffle_labels(task: Task, rng: np.random.Generator) -> np.ndarray:
    """The labels dealt out anew, those of an image together, so that what leaks by image shows."""
    groups = [rng.permutation(group) for _, group in pd.Series(task.labels).groupby(task.images)]
    rng.shuffle(groups)
    shuffled = np.empty_like(task.labels)
    shuffled[np.argsort(task.images, kind="stable")] = np.concatenate(groups)
    return shuffled


def try_shuffled(task: Task, inputs: np.ndarray, model: str, strength: float) -> dict | None:
    """A cell with labels that tell nothing, five times; None where no fold keeps both classes."""
    rng = np.random.default_rng(SEED)
    dealt = (shuffle_labels(task, rng) for _ in range(100 * NUM_SHUFFLES))
    tasks = (dataclasses.replace(task, labels=labels) for labels in dealt)
    aurocs = []
    for shuffled in itertools.islice(filter(Task.has_both_classes, tasks), NUM_SHUFFLES):
        aurocs += try_probe(shuffled, inputs, model, [strength])["auroc"]
    if not aurocs:
        return None
    return {"auroc": aurocs, "mean": np.mean(aurocs), "sd": np.std(aurocs, ddof=1)}


def try_vectors(task: Task, samples: Samples, vectors: Vectors, model: str) -> tuple:
    """A cell for each data set, best ones measured; and the best one's with shuffled labels."""
    cells, best, shuffled = {}, {}, None
    for name, width in tqdm(vectors.items(), unit="cell", disable=None):
        matrix = read_matrix(samples, name, width)
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: not finite; see --verify")
        cells[name], kind = try_probe(task, matrix, model), name.partition("/")[0]
        best[kind] = max(best.get(kind, name), name, key=lambda name: cells[name]["mean"])
    first = max(best.values(), key=lambda name: cells[name]["mean"])
    for name in tqdm(best.values(), unit="best cell", disable=None):
        matrix, cell = read_matrix(samples, name, vectors[name]), cells[name]
        cell |= measure(task, matrix, model, cell)
        if name == first:
            usual = np.median(cell["C"]) * matrix.shape[1] if model == "linear" else 0
            shuffled = try_shuffled(task, matrix, model, usual)
    return cells, shuffled and {"of": first} | shuffled


def probe(samples: Samples, vectors: Vectors, label: tuple, by: str | None, model: str) -> dict:
    """How well each vector tells the label (LABEL, --above), in folds by image: all facts."""
    from joblib import parallel_config  # which scikit-learn brings, as threadpoolctl
    from threadpoolctl import threadpool_limits

    table, (name, above) = read_texts(samples), label
    labels, classes, notes = read_labels(table, name, above)
    has_label = labels.notna().to_numpy()
    labels, table = labels[has_label], table[has_label].reset_index(drop=True)
    if name == ANSWER_IS_WRONG and (num := int(table["answer_truncated"].sum())):
        notes.append(f"{num:,} of these answers were cut at --max-new-tokens")
    nothing = (pd.Series(np.nan, table.index), [])
    categories, more = read_column(by, table["question_id"]) if by else nothing
    # A file may be stored under several names, and two directories may have one name.
    images = table.get("image_sha256", table["image_id"]).to_numpy(str)
    is_true, categories = labels.to_numpy(bool), categories.to_numpy(object)
    task = Task(is_true, images, split_by_image(is_true, images), categories)
    # Logistic regression: a thread a fit, as several of BLAS within one would wait for each other.
    limits = threadpool_limits(1 if model == "linear" else None)
    with warnings.catch_warnings(), limits, parallel_config("threading", n_jobs=-1):
        warnings.simplefilter("ignore")  # of fits that have not converged
        baselines = try_baselines(task, table)
        labelled = list(itertools.compress(samples, has_label))
        cells, shuffled = try_vectors(task, labelled, vectors, model)
    for cell in filter(None, [*cells.values(), *baselines.values()]):
        del cell["scores"]
    counts = pd.Series(is_true).groupby(categories).agg(["size", "sum"])
    return {
        "label": name if above is None else f"{name} above {above:g}",
        "rule": RULE if name == ANSWER_IS_WRONG else None,
        "notes": notes + more,
        "classes": {name: int((labels == value).sum()) for value, name in enumerate(classes)},
        "num_without_label": int((~has_label).sum()),
        "num_images": len(set(task.images)),
        "probe": PROBES[model],
        "folds": [{"question_id": list(table["question_id"][fold])} for fold in task.folds],
        "cells": cells,
        "baselines": baselines,
        "shuffled": shuffled,
        "leaks": bool(shuffled and abs(shuffled["mean"] - 0.5) > 2 * shuffled["sd"]),
        "by": {category: counts.loc[category].tolist() for category in counts.index},
    }


def list_levels(facts: dict) -> dict[str, dict | None]:
    """The cells that have no layer: vision, the baselines, and the control."""
    levels = {VISION: facts["cells"][VISION]} if VISION in facts["cells"] else {}
    return levels | facts["baselines"] | {"best probe, labels shuffled": facts["shuffled"]}


def show_cell(cell: dict | None) -> str:
    """Mean and spread of a cell, or a dash where there is nothing to measure."""
    return f"{cell['mean']:.2f}±{cell['sd']:.2f}" if cell else "-"


def show_layers(cells: dict[str, dict]) -> str:
    """A row for each layer and a column for each representation."""
    table = pd.DataFrame(dtype=object)
    for name, cell in cells.items():
        kind, _, layer = name.partition("_representation/layer_")
        if layer:
            table.loc[int(layer), kind] = show_cell(cell)
    return table.rename_axis("layer").reset_index().to_string(index=False) if len(table) else ""


def show_measures(facts: dict) -> Iterator[str]:
    """What papers print of each representation's best cell and of each baseline; by category."""
    (_, num_negative), (positive, num_positive) = facts["classes"].items()
    share = f"{num_positive / (num_negative + num_positive):.2f}"
    cells = {name: cell for name, cell in facts["cells"].items() if "f1" in cell}
    cells = {re.sub("_representation(/layer_)?", " ", name): cells[name] for name in cells}
    every = cells | {name: cell for name, cell in facts["baselines"].items() if cell}
    table = {name: [np.mean(cell[key]) for key in HEADINGS] for name, cell in every.items()}
    yield f"\nbest cells, means of the folds; AUPRC by chance {share}, the share of {positive!r}"
    table = pd.DataFrame(table, index=HEADINGS.values())
    yield table.T.to_string(float_format="{:.2f}".format)
    if facts["by"]:
        table = pd.DataFrame(facts["by"], index=["samples", repr(positive)]).T
        for name, cell in cells.items():
            aurocs = (cell["by"][category] for category in table.index)
            table[name] = ["-" if auroc is None else f"{auroc:.2f}" for auroc in aurocs]
        yield f"\nAUROC by category\n{table.rename(lambda name: one_line(name, 20)).to_string()}"


def show_probe(facts: dict) -> Iterator[str]:
    """What was tried, and the tables."""
    yield f"label    {facts['label']}"
    if facts["rule"]:
        yield facts["rule"]
    classes = (f"{count:,} × {one_line(name, 24)}" for name, count in facts["classes"].items())
    yield f"samples  {', '.join(classes)}; {facts['num_without_label']:,} without a label"
    for note in facts["notes"]:
        yield f"note     {note}"
    yield f"folds    {len(facts['folds'])}; each of the {facts['num_images']:,} images in one only"
    yield f"probe    {facts['probe']}"
    yield "\nAUROC, mean±standard deviation of the folds"
    yield show_layers(facts["cells"])
    yield ""
    for name, cell in list_levels(facts).items():
        yield f"{name:<30}{show_cell(cell)}"
    yield from show_measures(facts)
    if facts["leaks"]:
        yield "\nEven shuffled labels are told: something leaks into the folds; trust no cell."


def plot_probe(path: Path, facts: dict) -> None:
    """Draw AUROC by layer: a line with its spread for a representation, a level for all else."""
    figure = new_figure(8, 4.5)
    title = one_line(Path(facts["label"]).name, 80)
    axes = figure.add_subplot(xlabel="layer", ylabel="AUROC", title=title)
    for kind, color, marker in zip(KINDS, COLORS, "os^"):
        of_kind = {name: cell for name, cell in facts["cells"].items() if name.startswith(kind)}
        points = [(layer_of(name), cell["mean"], cell["sd"]) for name, cell in of_kind.items()]
        if points:
            axes.errorbar(*zip(*points), None, f"{marker}-", c=color, ms=4, label=kind)
    for (name, cell), color, dashes in zip(list_levels(facts).items(), COLORS[3:], DASHES):
        if cell:
            label = f"{name}  {show_cell(cell)}"
            axes.axhline(cell["mean"], c=color, lw=1.2, ls=dashes, label=label)
    axes.axhline(0.5, c="#BBBBBB", lw=0.8, zorder=0)
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
        values, classes, notes = read_labels(table, label, None)
        values -= classes in (["right"], ["0"])  # where that is all, nothing is wrong yet
        cards["start"] = values.map({0: "right", 1: "wrong"}).fillna("").to_numpy()
        about += [f"labels from {label}; right, wrong: {', '.join(classes)}", *notes]
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
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8", newline="")
    os.replace(partial, path)
    return f"{path}: {about[-1]}"


# ───────────────────────────────────────── command line ────────────────────────────────────────
MODE_FLAGS = {  # which flags go with what is to be done
    "view": {"question_id", "max_samples", "all", "json", "representation", "layer"},
    "verify": {"vqa_dataset"},
    "export": {"representation", "layer"},
    "plot": {"representation", "layer", "color_by"},
    "probe": {"representation", "layer", "above", "by", "probe_model", "json", "plot"},
    "page": {"images_dir", "label", "max_samples", "question_id"},
}


def parse_arguments(argv: list[str] | None) -> tuple[str, argparse.Namespace]:
    """What is to be done, and its flags; status 2 where they do not fit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="part file, or directory of them")
    add("--question-id", action="append", metavar="ID", help="view this sample whole; repeatable")
    add("--verify", action="store_true", help="look for all that can be wrong")
    add("--export", type=Path, metavar="FILE", help=".npz")
    add("--plot", type=Path, metavar="FILE", help=".png, .pdf or .svg")
    add("--probe", metavar="LABEL", help=f"AUROC of CSV:COLUMN, or of {ANSWER_IS_WRONG}")
    add("--page", type=Path, metavar="FILE", help=".html: answers beside their pictures, to label")
    add("--images-dir", type=Path, metavar="DIR", help="page: where the pictures are")
    add("--label", default="", metavar="LABEL", help="page: labels to begin with, as of --probe")
    add("--max-samples", type=int, metavar="N", help="samples to show (view: 3, page: 1,000)")
    add("--all", action="store_true", help="view: figures of all samples, not of 1,000")
    add("--json", action="store_true", help="view, probe: the same for programs")
    add("--vqa-dataset", type=Path, metavar="CSV", help="verify: compare with this table")
    add("--representation", choices=(VISION, *KINDS), help="view, export, plot, probe: only this")
    add("--layer", type=int, metavar="I", help="view, export, plot, probe: only this")
    add("--color-by", metavar="WHAT", help="plot: ground_truth_answer, ... or CSV:COLUMN")
    add("--above", type=float, metavar="X", help="probe: the column's numbers above X are a class")
    add("--by", metavar="CSV:COLUMN", help="probe: the best cells' AUROC by category, too")
    add("--probe-model", choices=PROBES, default="linear", help="probe: linear, or HALP's mlp")
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
    page = (args.page, ".html .htm")
    for path, suffixes in ((args.export, ".npz"), (args.plot, ".png .pdf .svg"), page):
        if path and path.suffix not in suffixes.split():
            parser.error(f"{path}: the name must end in one of {suffixes}")
    for flag, label in (("--probe", args.probe), ("--label", args.label)):
        if label and label != ANSWER_IS_WRONG and ":" not in label:
            parser.error(f"{flag}: LABEL is CSV:COLUMN or {ANSWER_IS_WRONG}, not {label}")
    if args.above is not None and args.probe == ANSWER_IS_WRONG:
        parser.error("--above is for the numbers of a CSV")
    return mode, args


def find_samples(samples: Samples, question_ids: list[str]) -> Samples:
    """The samples of these ids, each once. Raises ValueError that names what is near."""
    by_id = {unquote(name): (path, name) for path, name in samples}
    for question_id in question_ids:
        if question_id not in by_id:
            near = difflib.get_close_matches(question_id, by_id, cutoff=0)
            raise ValueError(f"no question_id {question_id!r}; near it: {near}")
    return [by_id[question_id] for question_id in dict.fromkeys(question_ids)]


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
    parts, samples = open_run(args.paths)
    vectors = list_vectors(next(iter(parts.values())), args.representation, args.layer)
    if mode == "export":
        return 0, export(args.export, samples, vectors)
    if mode == "probe":
        facts = probe(samples, vectors, (args.probe, args.above), args.by, args.probe_model)
        if args.plot:
            plot_probe(args.plot, facts)
        return 0, [json.dumps(facts, indent=1)] if args.json else show_probe(facts)
    if mode == "page":
        return 0, [run_page(args, parts, samples)]
    order = np.random.default_rng(0).permutation(len(samples))
    drawn = [samples[place] for place in sorted(order[: None if args.all else NUM_DRAWN])]
    if mode == "plot":
        return 0, plot(args.plot, drawn, len(samples), vectors, args.color_by or TEXTS[-1])
    shown = samples[: max(args.max_samples, 0)]
    if args.question_id:
        drawn = shown = find_samples(samples, args.question_id)
    facts = describe(parts, samples, drawn, vectors)
    facts["samples"] = json.loads(read_texts(shown).to_json(orient="records"))  # NaN is null
    if args.json:
        return 0, [json.dumps(facts, allow_nan=False, indent=1, default=str)]
    return 0, show(facts, sys.maxsize if args.question_id else 58)


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, print what there is to say; the exit status."""
    mode, args = parse_arguments(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not every script
    try:
        status, lines = run(mode, args)
        print(*lines, sep="\n", flush=True)
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    status = main()
    sys.stderr.flush()
    os._exit(status)  # Python would try once more to write what could not be written
