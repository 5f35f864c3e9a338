#!/usr/bin/env python3
"""Look into the part files that run_gemma3_extraction.py writes, and probe what they hold.

    python inspect_h5.py output                      what was run, figures, first samples
    python inspect_h5.py output --question-id 42     the same of one sample, its texts whole
    python inspect_h5.py output --verify --vqa-dataset vqa.csv
    python inspect_h5.py output --export layer_24.npz --layer 24
    python inspect_h5.py output --plot pca.png --color-by labels.csv:hallucinated
    python inspect_h5.py output --probe answer_is_wrong --plot auroc.png

Samples stand part after part, those of a part by their row in the CSV. Exit status: 0 all is well,
1 something is wrong and one line says what (--verify: one line a finding), 2 wrong usage,
130 stopped by Ctrl-C.
"""

import signal
import sys


def leave_quietly(*_: object) -> None:
    """What Ctrl-C does, from the first import on."""
    raise SystemExit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, leave_quietly)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool

import argparse
import csv
import dataclasses
import difflib
import itertools
import json
import re
import textwrap
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd

VISION, LINK = "vision_representation", "vision_only_representation"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
TEXTS = ["image_id", "question", "answer", "ground_truth_answer"]
COUNTS = ["row", "num_prompt_tokens", "vision_token_pos", "query_token_pos", "num_answer_tokens"]
LOGPROBS, ENTROPY = "answer_logprobs", "first_token_entropy"
VARYING = {"created_at", "dataset", "dataset_sha256", "python_version", "torch_version"}
VARYING |= {"transformers_version", "device", "device_name", "cuda_version", "cudnn_version"}
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
NUM_DRAWN = 1000  # samples in the table and the plot
MAX_LAYERS = 8  # so many are shown one by one
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00 #F0E442 #882255 #999933".split()

Paths = str | Path | Iterable[str | Path]  # files; directories stand for the parts in them
Samples = list[tuple[Path, str]]  # the file, and the group's name in it
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
    return list(found.values())


def read_part(path: Path) -> tuple[dict, list[str]]:
    """A part's attributes, and the names of its samples by their row in the CSV."""
    with h5py.File(path) as file:
        part = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
        rows = {name: int(file.require_group(name).attrs.get("row", -1)) for name in file}
    list_vectors(part)  # which raises where an attribute that it needs is missing
    return part, sorted(rows, key=rows.get)


def scan_parts(paths: Paths) -> tuple[dict[Path, dict], Samples, list[Finding]]:
    """Each part's attributes ({} if unreadable), all samples in order, why they are not one run."""
    parts, owners, findings = {}, {}, []
    for path in find_parts(paths):
        try:
            part, names = read_part(path)
        except UNREADABLE as error:
            parts[path] = {}
            findings.append((f"{path}: cannot be read as a part: {error}", []))
            continue
        first = next(filter(None, parts.values()), part)
        expected = first | {"num_samples": len(names)}
        findings += [(f"{path}: {what}", []) for what in compare_settings(part, expected)]
        twice = [unquote(name) for name in names if name in owners]
        if twice:
            findings.append((f"{path}: question_id is there twice", twice))
        for name in names:
            owners.setdefault(name, path)
        parts[path] = part
    return parts, [(path, name) for name, path in owners.items()], findings


def compare_settings(part: dict, expected: dict) -> Iterator[str]:
    """Attributes that differ though all parts of a run have the same."""
    compared = (part.keys() | expected.keys()) - VARYING
    revision = str(part.get("model_revision"))
    if re.fullmatch("[0-9a-f]{40,64}", revision) and revision == expected.get("model_revision"):
        compared.discard("model_name")  # the same weights, by another path
    for key in sorted(compared):
        if part.get(key) != expected.get(key):
            yield f"{key} is {part.get(key)!r}, not {expected.get(key)!r}"


def open_run(paths: Paths) -> tuple[dict[Path, dict], Samples]:
    """Each part's attributes, all samples in order. Raises ValueError if they are not one run."""
    parts, samples, findings = scan_parts(paths)
    if not parts:
        raise ValueError("no part files")
    for what, _ in findings:
        raise ValueError(what)
    return parts, samples


def list_vectors(part: dict) -> dict[str, int]:
    """The data sets of vectors that each sample of a part has, and their lengths."""
    layered = [f"{kind}/layer_{layer}" for kind in KINDS for layer in part["layers"]]
    return {VISION: part["vision_hidden_size"], **dict.fromkeys(layered, part["hidden_size"])}


def choose_vectors(part: dict, kind: str | None = None, layer: int | None = None) -> dict[str, int]:
    """The vectors of a representation, of a layer, of both, or all; and their lengths."""
    there = list_vectors(part)
    chosen = {}
    for name, width in there.items():
        is_kind = kind is None or name.partition("/")[0] == kind
        if is_kind and (layer is None or name.endswith(f"/layer_{layer}")):
            chosen[name] = width
    if not chosen:
        names = ", ".join(fold_layers(there))
        raise ValueError(f"no layer {layer} of {kind or 'any kind'}; there is {names}")
    return chosen


def pick_layers(vectors: dict[str, int]) -> tuple[dict[str, int], str]:
    """Vectors of no more than five layers, where there are many, and a note that says so."""
    layers = sorted({layer_of(name) for name in vectors} - {None})
    count = len(layers)
    if count <= MAX_LAYERS:
        return vectors, ""
    picked = [layers[k] for k in (0, count // 4, count // 2, 3 * count // 4, count - 1)]
    named = ", ".join(map(str, picked))
    kept = {n: width for n, width in vectors.items() if layer_of(n) in (None, *picked)}
    return kept, f"layers {named} of {count}; --layer I for another"


def layer_of(name: str) -> int | None:
    """The layer that a data set's name ends in."""
    layer = name.partition("/layer_")[2]
    return int(layer) if layer else None


def fold_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Data sets by how they are listed: many layers of one kind are a range."""
    folded = {}
    for kind, group in itertools.groupby(names, key=lambda name: name.partition("/")[0]):
        members = list(group)
        layers = [layer_of(name) for name in members]
        if len(members) <= MAX_LAYERS:
            folded |= {name: [name] for name in members}
        elif layers == list(range(layers[0], layers[0] + len(layers))):
            folded[f"{kind}/layer_{{{layers[0]}..{layers[-1]}}}"] = members
        else:
            folded[f"{kind}/layer_{{{layers[0]},{layers[1]},..,{layers[-1]}}}"] = members
    return folded


def read(group: h5py.Group, name: str, width: int | None = None) -> np.ndarray | str:
    """A vector float32 [width], or a text; ValueError for another shape or type.

    h5py's `group[name][()]` is up to three times slower.
    """
    shape, dtype = ((), h5py.string_dtype()) if width is None else ((width,), np.float32)
    dataset, values = h5py.h5d.open(group.id, name.encode()), np.empty(shape, dtype)
    if (dataset.shape, dataset.dtype) != (shape, values.dtype):
        raise ValueError(f"{dataset.dtype} {dataset.shape}, not {values.dtype} {shape}")
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values.item().decode() if width is None else values


def each(samples: Samples, function: Callable, *args) -> Iterator:
    """`function(group, *args)` of every sample."""
    for path, inside in itertools.groupby(samples, key=lambda sample: sample[0]):
        with h5py.File(path) as file:
            for _, name in inside:
                try:
                    yield function(file[name], *args)
                except UNREADABLE as error:
                    raise ValueError(f"{path}, {unquote(name)!r}: {error.args[-1]}") from error


def read_record(group: h5py.Group) -> dict:
    """A sample's texts, its attributes, and the log-probabilities of its answer's tokens."""
    record = {name: read(group, name) for name in TEXTS} | dict(group.attrs)
    if LOGPROBS in group:
        record[LOGPROBS] = group[LOGPROBS][()].tolist()
    return record


def read_texts(samples: Samples) -> pd.DataFrame:
    """question_id, texts and attributes, in the order of `samples`, without what no sample has."""
    records = list(each(samples, read_record))
    columns = ["question_id", *TEXTS, *COUNTS, "answer_truncated"]
    added = ["image_sha256", ENTROPY, LOGPROBS]  # by schema version 2
    columns += [name for name in added if any(name in record for record in records)]
    table = pd.DataFrame(records, columns=columns)
    return table.assign(question_id=[unquote(name) for _, name in samples])


def read_matrix(samples: Samples, vector: str, width: int) -> np.ndarray:
    """One vector of each sample, in their order: float32 [num_samples, width]."""
    vectors = each(samples, read, vector, width)
    return np.fromiter(vectors, (np.float32, width), len(samples))


def load_embeddings(
    paths: Paths, representation: str, layer: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """All samples' texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are files or directories; `vision_representation` has no layer. Raises ValueError.
    """
    parts, samples = open_run(paths)
    vectors = choose_vectors(next(iter(parts.values())), representation, layer)
    if len(vectors) > 1:
        raise ValueError(f"{representation}: say which layer of {', '.join(fold_layers(vectors))}")
    return read_texts(samples), read_matrix(samples, *vectors.popitem())


def read_table(path: Path, *columns: tuple[str, ...]) -> pd.DataFrame:
    """Columns of a CSV by question_id, text as it stands; each by the first name that is there."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = pd.read_csv(file, index_col="question_id", dtype=str, na_filter=False)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error.args[-1]}") from error
    if not table.index.is_unique:
        raise ValueError(f"{path}: a question_id is there twice")
    chosen = [next((name for name in names if name in table), None) for names in columns]
    if None in chosen:
        missing = " or ".join(columns[chosen.index(None)])
        raise ValueError(f"{path} has no column {missing}; it has {', '.join(table.columns)}")
    return table[chosen]


# ─────────────────────────────────────────── the view ──────────────────────────────────────────
def summarise(matrix: np.ndarray) -> dict[str, float | None]:
    """The figures of vectors [num_samples, D]; norms and cosine are of those that are finite."""
    finite = np.isfinite(matrix)
    whole = matrix[finite.all(axis=1)]
    norms = np.sqrt(np.einsum("nd,nd->n", whole, whole, dtype=np.float64))
    units = whole[norms > 0] / norms[norms > 0, None]
    count = len(units)
    # |sum of u|² holds `count` squares of unit vectors, and the cosine of every pair twice.
    pairs = np.sum(units.sum(axis=0) ** 2) - count
    return {
        "dim": matrix.shape[1],
        "norm_mean": float(norms.mean()) if len(norms) else None,
        "norm_std": float(norms.std()) if len(norms) else None,
        "max_abs": float(np.abs(matrix).max(initial=0, where=finite)),
        "nonfinite_share": float(1 - finite.mean()),
        "mean_cosine": float(pairs / (count * (count - 1))) if count > 1 else None,
    }


def describe_sample(group: h5py.Group, vectors: Iterable[str]) -> dict[str, str]:
    """What a sample holds: types, shapes and compression as they are in the file."""
    tree = dict.fromkeys(TEXTS, "text") | {LINK: f"-> {VISION}"}
    if LOGPROBS in group:
        vectors = [LOGPROBS, *vectors]
    for name in vectors:
        dataset = group[name]
        is_short = dataset.id.get_type().get_size() < dataset.dtype.itemsize
        dtype = "bfloat16" if is_short else dataset.dtype  # which h5py reads as float32
        tree[name] = f"{dtype} {list(dataset.shape)} {dataset.compression or ''}".rstrip()
    return tree


def count_failed(paths: Iterable[Path]) -> tuple[int, list[str]]:
    """How many rows `failed_samples.csv` beside the parts list, and which cannot be read."""
    count, unreadable = 0, []
    for path in sorted({path.with_name("failed_samples.csv") for path in paths}):
        if not path.exists():
            continue
        try:
            with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
                rows = [row for row in csv.reader(file, strict=True) if row]
            if "question_id" not in rows[0]:
                raise ValueError("no column question_id")
            count += len(rows) - 1
        except (OSError, IndexError, ValueError, csv.Error):
            unreadable.append(str(path))
    return count, unreadable


def describe_run(parts: dict[Path, dict], samples: Samples) -> dict:
    """What was run: files, counts and settings; of settings that vary, all parts' values."""
    num_failed, unreadable = count_failed(parts)
    settings = {}
    for name in next(iter(parts.values())):
        values = [part.get(name) for part in parts.values()]
        settings[name] = values[0] if values == values[:1] * len(values) else values
    return {
        "files": list(map(str, parts)),
        "num_samples": len(samples),
        "num_failed": num_failed,
        "unreadable": unreadable,
        "settings": settings,
    }


def describe_vectors(drawn: Samples, vectors: dict[str, int], with_all_layers: bool) -> dict:
    """What a sample holds, and the figures of the vectors of those that were drawn."""
    summarised, note = (vectors, "") if with_all_layers else pick_layers(vectors)
    figures = {}
    for name, width in summarised.items():
        if drawn:
            figures[name] = summarise(read_matrix(drawn, name, width))
    return {
        "sample": next(each(drawn[:1], describe_sample, vectors), {}),
        "num_samples_read": len(drawn),
        "layers_read": note,
        "figures": figures,
    }


def one_line(value: object, width: int = sys.maxsize) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like as in a repr."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))
    used = np.cumsum([1 + (unicodedata.east_asian_width(char) in "WF") for char in text])
    end = int(np.searchsorted(used, width))  # the first character that does not fit
    return f"{text[:end]}…" if (used > width).any() else text


def show(facts: dict, width: int) -> Iterator[str]:
    """The lines that say the facts in 80 columns; `width` cuts what need not be whole."""
    files = facts["files"]
    yield files[0] if len(files) == 1 else f"{files[0]} ...\n{files[-1]}"
    counts = f"parts: {len(files)}, samples: {facts['num_samples']:,}"
    yield f"{counts}, failed: {facts['num_failed']:,}"
    for path in facts["unreadable"]:
        yield f"{path} cannot be read, so its rows are not counted"
    yield ""
    for name, value in facts["settings"].items():
        yield f"{name:<22}{one_line(str(value).strip('[]'), width)}"
    yield ""
    tree = facts["sample"]
    folded = fold_layers(tree)
    column = max(38, *(len(name) + 2 for name in folded), 0)
    for name, members in folded.items():
        yield f"{name:<{column}}{' or '.join(dict.fromkeys(tree[member] for member in members))}"
    yield ""
    yield from show_figures(facts)
    for sample in facts["samples"]:
        yield ""
        yield one_line(f"{sample['question_id']}  {sample['image_id']}", 80)
        for name in ("question", "ground_truth_answer", "answer") if width < 80 else sample:
            yield f"  {name:<20}{one_line(sample[name], width)}"


def show_figures(facts: dict) -> Iterator[str]:
    """The table of figures, a line for each data set."""
    total, num_read = facts["num_samples"], facts["num_samples_read"]
    drawn = ", drawn at random" if num_read < total else ""
    layers = f"; {facts['layers_read']}" if facts["layers_read"] else ""
    yield f"figures of {num_read:,} samples{drawn}{layers}"
    yield f"{'':36}  dim  mean L2   sd L2 max |x|   bad  cosine"
    for name, figures in facts["figures"].items():
        dim, *sizes, bad, cosine = (np.nan if x is None else x for x in figures.values())
        cells = "".join(f"{size:8.0f}" if size >= 1000 else f" {size:7.4g}" for size in sizes)
        yield f"{name:<36}{dim:>5} {cells}{bad:6.1%}{cosine:8.4f}"


# ─────────────────────────────────────────── verify ────────────────────────────────────────────
def verify(paths: list[Path], csv_path: Path | None) -> tuple[int, list[str]]:
    """The exit status, and a line for everything that is wrong with parts, or unlike the CSV."""
    parts, samples, findings = scan_parts(paths)
    vectors = {}
    for part in filter(None, parts.values()):
        vectors |= list_vectors(part)
    columns = ["path", "question_id", "problems", "row", "image_sha256", *TEXTS, *vectors]
    checked = pd.DataFrame(each(samples, check_sample, parts), columns=columns)
    findings += find_gaps(paths, parts)
    findings += find_problems(checked)
    findings += find_constants(checked, list(vectors))
    findings += find_changed_images(checked)
    if csv_path:
        findings += find_unlike_csv(checked, csv_path)
    lines = []
    for what, ids in findings:
        named = f" ({len(ids):,}: {', '.join(map(repr, ids[:3]))})" if ids else ""
        lines.append(one_line(what) + named)
    if not lines:
        return 0, [f"nothing wrong with {len(samples):,} samples"]
    return 1, lines


def check_sample(group: h5py.Group, parts: dict[Path, dict]) -> dict:
    """A sample's texts, a hash of each vector, and the problems with it."""
    path = Path(group.file.filename)
    attributes = dict(group.attrs)
    name = unquote(group.name[1:])
    members, problems = read_members(group, parts[path])
    if "crc32" in attributes and not problems:
        problems += find_bad_crc(members, attributes["crc32"])
    problems += find_attribute_problems(attributes, name, parts[path])
    problems += find_bad_values(members)
    if LOGPROBS in members:
        problems += find_bad_logprobs(members[LOGPROBS], attributes)
    for member, value in members.items():
        if isinstance(value, np.ndarray):
            members[member] = hash(value.tobytes())
    where = {"path": path, "question_id": name, "problems": problems}
    return where | {key: attributes.get(key) for key in ("row", "image_sha256")} | members


def read_members(group: h5py.Group, part: dict) -> tuple[dict, list[str]]:
    """A sample's texts and vectors by name, and a problem for each that cannot be read."""
    members, problems = {}, []
    widths = dict.fromkeys(TEXTS) | list_vectors(part) | {LINK: part["vision_hidden_size"]}
    if has_logprobs(part):
        widths[LOGPROBS] = len(group[LOGPROBS]) if LOGPROBS in group else 0
    for name, width in widths.items():
        try:
            members[name] = read(group, name, width)
        except UNREADABLE as error:
            problems.append(f"{name}: {error.args[-1]}")
    return members, problems


def has_logprobs(part: dict) -> bool:
    """Whether a part's samples hold what schema version 2 keeps of the answers."""
    return part.get("schema_version", 1) >= 2 and part.get("max_new_tokens", 0) > 0


def find_attribute_problems(attributes: dict, name: str, part: dict) -> Iterator[str]:
    """Attributes that are missing, or that say another thing than they must."""
    expected = {"question_id", "answer_truncated", *COUNTS}
    if part.get("schema_version", 1) >= 2:
        expected |= {"image_sha256", "crc32"}
    if has_logprobs(part):
        expected.add(ENTROPY)
    for member in sorted(expected - attributes.keys()):
        yield f"{member} is missing"
    if str(attributes.get("question_id", name)) != name:
        yield "question_id differs"
    if not 0 <= attributes.get(ENTROPY, 0) < np.inf:
        yield f"{ENTROPY} is {attributes[ENTROPY]}"


def find_bad_values(members: dict) -> Iterator[str]:
    """Vectors that no model gives."""
    for name, value in members.items():
        if not isinstance(value, np.ndarray):
            continue
        if not np.isfinite(value).all():
            yield f"{name}: not finite"
        elif name != LOGPROBS and (value == value[0]).all():
            yield f"{name}: only one value"


def find_bad_logprobs(logprobs: np.ndarray, attributes: dict) -> Iterator[str]:
    """Log-probabilities of another number of tokens than were generated, or above 0."""
    if {"num_answer_tokens", "answer_truncated"} <= attributes.keys():
        num_end_tokens = 0 if attributes["answer_truncated"] else 1
        expected = attributes["num_answer_tokens"] + num_end_tokens
        if len(logprobs) != expected:
            yield f"{LOGPROBS}: {len(logprobs)} of them, not {expected}"
    if (logprobs > 0).any():
        yield f"{LOGPROBS}: above 0"


def find_bad_crc(members: dict, expected: int) -> Iterator[str]:
    """A checksum that is not that of the vectors: bits have turned since they were written."""
    crc = 0
    for name in sorted(members.keys() - {LINK}):
        if isinstance(members[name], np.ndarray):
            crc = zlib.crc32(members[name].astype("<f4").tobytes(), crc)
    if crc != expected:
        yield "crc32 is not that of the vectors"


def find_gaps(paths: list[Path], parts: dict[Path, dict]) -> Iterator[Finding]:
    """Numbers that no part has: from 1 on in a directory that was named, else between parts."""
    numbers = {}
    for path in map(Path.resolve, parts):
        number = path.stem.rpartition("_")[2]
        if number.isdecimal():
            numbers.setdefault(path.parent, set()).add(int(number))
    whole = set(map(Path.resolve, paths))
    for directory, present in numbers.items():
        start = 1 if directory in whole else min(present)
        for number in sorted(set(range(start, max(present))) - present):
            yield f"{directory}: part {number} is missing", []


def find_problems(checked: pd.DataFrame) -> Iterator[Finding]:
    """The samples' own problems, each once for a part."""
    by_problem = checked.explode("problems").groupby(["path", "problems"], sort=False)
    for (path, problem), ids in by_problem["question_id"]:
        yield f"{path}: {problem}", list(ids)


def find_constants(checked: pd.DataFrame, vectors: list[str]) -> Iterator[Finding]:
    """Vectors that are the same throughout a part, though what they depend on is not."""
    for path, num_values in checked.groupby("path")[[*TEXTS, *vectors]].nunique().iterrows():
        for vector in vectors:
            inputs = ["image_id"] if "vision" in vector else ["image_id", "question"]
            if num_values[vector] == 1 < num_values[inputs].max():
                yield f"{path}: {vector} is the same in all samples", []


def find_changed_images(checked: pd.DataFrame) -> Iterator[Finding]:
    """Images of which samples with different files' hashes are stored."""
    for image_id, group in checked.groupby("image_id", sort=False):
        if group["image_sha256"].nunique() > 1:
            ids = list(group["question_id"])
            yield f"image_id {image_id!r}: its file changed between samples", ids


def find_unlike_csv(checked: pd.DataFrame, csv_path: Path) -> Iterator[Finding]:
    """Rows that are not stored, samples that are no rows, and what differs between the two."""
    columns = [("image_id", "image_name"), ("question",), ("answer", "gt_answer")]
    rows = read_table(csv_path, *columns)
    rows.columns = ["image_id", "question", "ground_truth_answer"]
    rows["row"] = [str(number) for number in range(len(rows))]
    stored = checked.dropna(subset=TEXTS).set_index("question_id")
    stored = stored[rows.columns].map(str)
    rows, stored = rows.align(stored, axis=0)
    both = rows["row"].notna() & stored["row"].notna()
    for column in rows:
        ids = list(rows.index[both & rows[column].ne(stored[column])])
        if ids:
            yield f"{csv_path}: {column} is another here", ids
    for what, absent in (("not in the parts", stored), ("in the parts but not here", rows)):
        ids = list(rows.index[absent["row"].isna()])
        if ids:
            yield f"{csv_path}: {what}", ids


# ─────────────────────────────────────────── export ────────────────────────────────────────────
def export(path: Path, samples: Samples, vectors: dict[str, int]) -> Iterator[str]:
    """Write the texts (.csv), or texts and matrices (.npz), all in one order; what it holds."""
    texts = read_texts(samples)[["question_id", *TEXTS]]
    arrays = {name: texts[name].to_numpy(str) for name in texts}
    if path.suffix == ".csv":
        texts.to_csv(path, index=False)
    else:
        arrays |= {name: read_matrix(samples, name, width) for name, width in vectors.items()}
        np.savez(path, **arrays)
    yield f"{path}: {len(samples):,} samples"
    for name, array in arrays.items():
        yield f"{name:<38}{array.dtype} {list(array.shape)}"


# ──────────────────────────────────────────── plot ─────────────────────────────────────────────
def choose_marks(table: pd.DataFrame, field: str) -> list[tuple]:
    """Samples, and how they are drawn: numbers on a scale, or the ten most frequent texts."""
    csv_path, _, column = field.rpartition(":")
    if csv_path:
        table = read_table(Path(csv_path), (column,)).reindex(table["question_id"])
    values = table.get(column, pd.Series(dtype=str)).replace("", np.nan)
    numbers, counts = pd.to_numeric(values, errors="coerce"), values.value_counts()
    if counts.empty:
        raise ValueError(f"--color-by {field}: no values in {csv_path or 'the samples'} for that")
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


def find_axes(name: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [num_samples, D] on their first two principal components, and these's shares."""
    if len(matrix) < 3 or not np.isfinite(matrix).all():
        raise ValueError(f"{name}: a plot needs 3 samples, and finite values; see --verify")
    centred = matrix - matrix.mean(axis=0, dtype=np.float64)
    variances, units = np.linalg.eigh(centred @ centred.T)  # ascending
    points = (units * np.sqrt(variances.clip(0)))[:, :-3:-1]  # [num_samples, 2]
    shares = variances[:-3:-1] / max(variances.sum(), np.finfo(float).tiny)
    return points, shares


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":  # noqa: F821
    """An empty figure of so many inches."""
    import matplotlib.figure

    warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
    settings = {"font.size": 8, "axes.titlesize": 8, "text.parse_math": False}
    matplotlib.rcParams.update(settings)
    return matplotlib.figure.Figure((width, height), layout="constrained")


def plot(path: Path, samples: Samples, total: int, vectors: dict[str, int], field: str) -> list:
    """Plot these of `total` samples on two principal components, a panel for each data set."""
    vectors, note = pick_layers(vectors)
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers: last
    columns = len({layer_of(name) for name in names} - {None}) or 1
    rows = -(-len(names) // columns)
    figure = new_figure(2.5 * columns + 2, 2.6 * rows + 0.5)
    marks, label = choose_marks(read_texts(samples), field), one_line(Path(field).name, 30)
    shown = f"{len(samples):,} of {total:,} samples"
    figure.suptitle(f"Principal components 1 and 2\n{shown}")
    for position, name in enumerate(names, start=1):
        points, shares = find_axes(name, read_matrix(samples, name, vectors[name]))
        title = f"{name}/{shares[0]:.1%} + {shares[1]:.1%} of variance".replace("/", "\n")
        axes = figure.add_subplot(rows, columns, position, xticks=[], yticks=[], title=title)
        for mask, mark in marks:
            axes.scatter(*points[mask].T, s=16, lw=0.3, edgecolors="#333", alpha=0.85, **mark)
    if "label" in marks[0][1]:
        figure.legend(*axes.get_legend_handles_labels(), title=label, loc="outside right center")
    else:
        figure.colorbar(axes.collections[0], ax=figure.axes, label=label, shrink=0.6)
    figure.savefig(path, dpi=150)
    return [f"{path}: {len(names)} panels of {shown}{'; ' if note else ''}{note}"]


# ──────────────────────────────────────────── probe ────────────────────────────────────────────
NUM_FOLDS, MIN_FOLDS, SEED = 5, 3, 0
STRENGTHS = (0.03, 0.3, 3, 30)  # C times the mean squared length of a sample's features
NUM_SHUFFLES = 5
MAX_EPOCHS, PATIENCE = 100, 5  # of the multi-layer perceptron
PROBES = {
    "linear": "logistic regression, standardised vectors; C chosen on the other folds",
    "mlp": "MLP 512-256-128, standardised vectors; stopped by one of the other folds",
}
LIKELIHOODS = {"mean answer log-probability": np.mean, "least answer log-probability": np.min}
DASHES = [(9, 0), (1, 1), (4, 1.5), (4, 1.5, 1, 1.5), (9, 3), (2, 4), (1, 5)]  # of level lines
NUMBERS = "none one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"zero": "0"}
ANSWER_IS_WRONG = "answer_is_wrong"
RULE = """\
wrong is an answer in which the ground truth does not stand as whole words, both normalised as VQA
accuracy does: case, punctuation, articles, number words. Where the ground truth is yes or no (also
spelt "n, o"), the first yes or no in the answer counts, and an answer with neither is wrong."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be told from the states, and the folds in which it is tried."""

    labels: np.ndarray  # bool [num_samples]
    images: np.ndarray  # str [num_samples]
    folds: list[np.ndarray]  # the places of the samples in each, all about images of its own

    def outside(self, *left_out: int) -> np.ndarray:
        """The places of the samples in all other folds."""
        kept = [fold for number, fold in enumerate(self.folds) if number not in left_out]
        return np.concatenate(kept)


Features = Callable[..., list]  # (places to fit on, *places) -> their features, in that order


def normalise(text: str) -> str:
    """Words as VQA accuracy compares them (Antol et al. 2015, vqaEval.py), a space between."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub("['’]", "", text)  # don't and dont are one word
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    words = re.findall(r"\d+\.\d+|[^\W_]+", text)
    return " ".join(DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


def is_wrong(answer: str, ground_truth: str) -> bool | None:
    """The rule of `answer_is_wrong`; None where nothing is left of the ground truth."""
    answer, truth = normalise(answer), normalise(ground_truth)
    if not truth:
        return None
    spelt = truth.replace(" ", "")  # AMBER's "n, o" was a word until something joined its letters
    if spelt in ("yes", "no"):
        said = [word for word in answer.split() if word in ("yes", "no")]
        return said[:1] != [spelt]
    return f" {truth} " not in f" {answer} "


def read_labels(
    table: pd.DataFrame, label: str, above: float | None
) -> tuple[pd.Series, list[str]]:
    """1, 0 or NaN (none) for each sample, and what 0 and 1 are called. Raises ValueError."""
    if label == ANSWER_IS_WRONG:
        if not table["answer"].any():
            raise ValueError(f"{label}: no answers are stored (--max-new-tokens 0)")
        pairs = zip(table["answer"], table["ground_truth_answer"])
        return pd.Series([is_wrong(*pair) for pair in pairs], dtype=float), ["right", "wrong"]
    csv_path, _, column = label.rpartition(":")
    texts = read_table(Path(csv_path), (column,))[column].reindex(table["question_id"])
    texts = texts.str.strip().replace("", np.nan).reset_index(drop=True)
    if texts.isna().all():
        raise ValueError(f"{label}: no sample has a value there; is question_id the same?")
    numbers = pd.to_numeric(texts, errors="coerce")
    if above is not None:
        is_above = (numbers > above).astype(float).where(numbers.notna())
        return is_above, [f"≤ {above:g}", f"> {above:g}"]
    is_numeric = numbers.notna().equals(texts.notna())
    values = sorted(texts.dropna().unique(), key=float if is_numeric else str)
    if len(values) > 2:
        named = ", ".join(repr(one_line(value, 20)) for value in values[:5])
        advice = "; of numbers, --above X makes two" if is_numeric else ""
        raise ValueError(f"{label}: a label has two values, not {len(values):,} ({named}){advice}")
    return texts.map({value: float(value == values[-1]) for value in values}), values


def name_images(table: pd.DataFrame) -> np.ndarray:
    """Each sample's image, by one name where a file is stored under several."""
    if "image_sha256" not in table:
        return table["image_id"].to_numpy(str)
    return table.groupby("image_sha256")["image_id"].transform("first").to_numpy(str)


def split_by_image(labels: np.ndarray, images: np.ndarray) -> list[np.ndarray]:
    """Five folds, or fewer; each with both classes, and none with an image of another's."""
    from sklearn.model_selection import StratifiedGroupKFold

    num_images = [len(set(images[labels == value])) for value in (False, True)]
    for count in range(min(NUM_FOLDS, *num_images), MIN_FOLDS - 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=SEED)
        folds = [test for _, test in splitter.split(images, labels, images)]
        if all(0 < labels[fold].mean() < 1 for fold in folds):
            return folds
    raise ValueError(
        f"too few samples for a probe: {len(labels):,} about {len(set(images)):,} images, "
        f"{num_images[0]:,} and {num_images[1]:,} of them with a sample of each class; "
        f"each of {MIN_FOLDS} folds or more needs both classes, and images of its own"
    )


def standardise(matrix: np.ndarray) -> Features:
    """Vectors [num_samples, D] with mean 0 and variance 1, as those to fit on have them."""
    from sklearn.preprocessing import StandardScaler

    def features(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
        first = matrix[train]
        scaler = StandardScaler().fit(first)
        rest = (matrix[places] for places in others)
        return [scaler.transform(vectors, copy=False) for vectors in (first, *rest)]

    return features


def count_words(questions: np.ndarray) -> Features:
    """Questions as TF-IDF of their words and punctuation marks."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    def features(train: np.ndarray, *others: np.ndarray) -> list:
        vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", dtype=np.float32)
        first = vectorizer.fit_transform(questions[train])
        return [first, *(vectorizer.transform(questions[places]) for places in others)]

    return features


def score(labels: np.ndarray, values: np.ndarray) -> float:
    """AUROC of values that are higher where the label is said to be true."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, values))


def choose_strengths(task: Task, features: Features, scale: float) -> list[float]:
    """For each fold the C of logistic regression that is best on the others, held out in turn.

    Two folds are left out at a time. What is fitted on the rest is tried on the one, to choose for
    the other, and the other way round: no fold has a part in its own choice.
    """
    from sklearn.linear_model import LogisticRegression

    count = len(task.folds)
    scores = np.full((count, count, len(STRENGTHS)), np.nan)  # [chosen for, tried on, strength]
    for one, other in itertools.combinations(range(count), 2):
        train = task.outside(one, other)
        vectors, *tried = features(train, task.folds[one], task.folds[other])
        probe = LogisticRegression(warm_start=True, tol=1e-3, max_iter=1000)
        for k, strength in enumerate(STRENGTHS):
            probe.set_params(C=strength / scale).fit(vectors, task.labels[train])
            said = [probe.decision_function(held_out) for held_out in tried]
            scores[other, one, k] = score(task.labels[task.folds[one]], said[0])
            scores[one, other, k] = score(task.labels[task.folds[other]], said[1])
    best = np.nanmean(scores, axis=1).argmax(axis=1)  # of equals the strongest penalty
    return [STRENGTHS[k] / scale for k in best]


def try_linear(task: Task, features: Features, strengths: list[float]) -> list[float]:
    """AUROC in each fold of logistic regression fitted on the others, with C as chosen for it."""
    from sklearn.linear_model import LogisticRegression

    aurocs = []
    for number, fold in enumerate(task.folds):
        train = task.outside(number)
        vectors, tried = features(train, fold)
        probe = LogisticRegression(C=strengths[number], max_iter=1000)
        probe.fit(vectors, task.labels[train])
        aurocs.append(score(task.labels[fold], probe.decision_function(tried)))
    return aurocs


def try_mlp(task: Task, features: Features) -> list[float]:
    """AUROC in each fold of HALP's perceptron; the next fold tells after which epoch to stop."""
    from sklearn.neural_network import MLPClassifier

    aurocs = []
    for number, fold in enumerate(task.folds):
        after = (number + 1) % len(task.folds)
        train, watched = task.outside(number, after), task.folds[after]
        vectors, watched_vectors, tried = features(train, watched, fold)
        probe = MLPClassifier((512, 256, 128), random_state=SEED)
        best_epoch, best_auroc, said = 0, -1.0, None
        for epoch in range(MAX_EPOCHS):
            probe.partial_fit(vectors, task.labels[train], classes=[False, True])
            auroc = score(task.labels[watched], probe.predict_proba(watched_vectors)[:, 1])
            if auroc > best_auroc:
                best_epoch, best_auroc, said = epoch, auroc, probe.predict_proba(tried)[:, 1]
            elif epoch - best_epoch >= PATIENCE:
                break
        aurocs.append(score(task.labels[fold], said))
    return aurocs


def try_numbers(task: Task, values: np.ndarray) -> list[float]:
    """AUROC in each fold of one number a sample, up or down as the other folds say."""
    aurocs = []
    for number, fold in enumerate(task.folds):
        train = task.outside(number)
        sign = 1 if score(task.labels[train], values[train]) >= 0.5 else -1
        aurocs.append(score(task.labels[fold], sign * values[fold]))
    return aurocs


def describe_scores(aurocs: list[float]) -> dict:
    """AUROC in each fold, their mean and their standard deviation."""
    return {"auroc": aurocs, "mean": float(np.mean(aurocs)), "sd": float(np.std(aurocs, ddof=1))}


def try_vectors(task: Task, features: Features, scale: float, model: str) -> dict:
    """A cell of the table: AUROC in each fold, and the C that was chosen for it."""
    if model == "mlp":
        return describe_scores(try_mlp(task, features))
    strengths = choose_strengths(task, features, scale)
    return describe_scores(try_linear(task, features, strengths)) | {"C": strengths}


def shuffle_labels(task: Task, rng: np.random.Generator) -> np.ndarray:
    """The labels dealt out anew, those of an image together, so that what leaks by image shows."""
    image = np.unique(task.images, return_inverse=True)[1]
    taken = np.lexsort((rng.random(len(image)), rng.permutation(image.max() + 1)[image]))
    shuffled = np.empty_like(task.labels)
    shuffled[np.argsort(image, kind="stable")] = task.labels[taken]
    return shuffled


def try_shuffled(task: Task, features: Features, strengths: list[float] | None) -> dict | None:
    """A cell with labels that tell nothing, five times; None where no fold keeps both classes."""
    rng = np.random.default_rng(SEED)
    aurocs = []
    for _ in range(100 * NUM_SHUFFLES):
        shuffled = dataclasses.replace(task, labels=shuffle_labels(task, rng))
        if not all(0 < shuffled.labels[fold].mean() < 1 for fold in task.folds):
            continue
        if strengths:
            aurocs += try_linear(shuffled, features, strengths)
        else:
            aurocs += try_mlp(shuffled, features)
        if len(aurocs) == NUM_SHUFFLES * len(task.folds):
            return describe_scores(aurocs)
    return None


def try_baselines(task: Task, table: pd.DataFrame) -> dict[str, dict | None]:
    """The cells of the question's text and of the answers' numbers; None where not stored."""
    numbers = dict.fromkeys(("first-token entropy", *LIKELIHOODS, "answer length in tokens"))
    if ENTROPY in table:
        numbers["first-token entropy"] = table[ENTROPY]
    if LOGPROBS in table:
        for name, summary in LIKELIHOODS.items():
            numbers[name] = table[LOGPROBS].map(summary)
    if table["num_answer_tokens"].any():
        numbers["answer length in tokens"] = table["num_answer_tokens"]
    words = count_words(table["question"].to_numpy(str))
    cells = {"question text alone": try_vectors(task, words, 1, "linear")}
    for name, values in numbers.items():
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{name}: not finite or not in all samples; see --verify")
        cells[name] = None
        if values is not None:
            cells[name] = describe_scores(try_numbers(task, values.to_numpy(float)))
    return cells


def make_task(labels: pd.Series, images: np.ndarray, classes: list[str]) -> Task:
    """The task of telling 1 from 0. Raises ValueError where there is nothing to tell or to try."""
    if labels.empty:
        raise ValueError("no sample has a label")
    if labels.nunique() == 1:
        only = classes[int(labels.iloc[0])]
        raise ValueError(f"one class only: {len(labels):,} samples, all {only!r}")
    if len(set(images)) == 1:
        raise ValueError(f"one image only: all {len(images):,} samples are about {images[0]!r}")
    is_true = labels.to_numpy(bool)
    return Task(is_true, images, split_by_image(is_true, images))


def try_all(task: Task, samples: Samples, vectors: dict[str, int], model: str) -> tuple[dict, dict]:
    """A cell for each data set, every matrix read once; and the best one's with shuffled labels."""
    from tqdm import tqdm

    cells, best = {}, None
    for name, width in tqdm(vectors.items(), unit="cell", disable=None):
        matrix = read_matrix(samples, name, width)
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: not finite; see --verify")
        cells[name] = try_vectors(task, standardise(matrix), width, model)
        if best is None or cells[name]["mean"] > cells[best]["mean"]:
            best, best_matrix = name, matrix
    shuffled = try_shuffled(task, standardise(best_matrix), cells[best].get("C"))
    return cells, shuffled and {"of": best} | shuffled


def probe(
    samples: Samples, vectors: dict[str, int], label: str, above: float | None, model: str
) -> dict:
    """How well each vector tells the label, in folds by image: what the table is made of."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # which scikit-learn brings

    table = read_texts(samples)
    labels, classes = read_labels(table, label, above)
    has_label = labels.notna().to_numpy()
    labels, table = labels[has_label], table[has_label].reset_index(drop=True)
    samples = list(itertools.compress(samples, has_label))
    task = make_task(labels, name_images(table), classes)
    # Logistic regression waits for memory, and more threads of BLAS would wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1 if model == "linear" else None):
        warnings.simplefilter("ignore", ConvergenceWarning)
        baselines = try_baselines(task, table)
        cells, shuffled = try_all(task, samples, vectors, model)
    return {
        "label": label if above is None else f"{label} above {above:g}",
        "rule": RULE if label == ANSWER_IS_WRONG else None,
        "classes": {name: int((labels == value).sum()) for value, name in enumerate(classes)},
        "num_without_label": int((~has_label).sum()),
        "num_truncated": int(table["answer_truncated"].sum()),
        "num_images": len(set(task.images)),
        "probe": PROBES[model],
        "folds": [{"question_id": list(table["question_id"][fold])} for fold in task.folds],
        "cells": cells,
        "baselines": baselines,
        "shuffled": shuffled,
        "leaks": bool(shuffled and abs(shuffled["mean"] - 0.5) > 2 * shuffled["sd"]),
    }


def list_levels(facts: dict) -> dict[str, dict | None]:
    """The cells that have no layer: vision, the baselines, and the control."""
    levels = {VISION: facts["cells"][VISION]} if VISION in facts["cells"] else {}
    return levels | facts["baselines"] | {"best probe, labels shuffled": facts["shuffled"]}


def show_probe(facts: dict) -> Iterator[str]:
    """What was tried, and the table: a row for each representation and a column for each layer."""
    yield f"label    {facts['label']}"
    if facts["rule"]:
        yield textwrap.fill(facts["rule"], 80, initial_indent=" " * 9, subsequent_indent=" " * 9)
    classes = (f"{count:,} × {one_line(name, 24)}" for name, count in facts["classes"].items())
    yield f"samples  {', '.join(classes)}; {facts['num_without_label']:,} without a label"
    if facts["rule"] and facts["num_truncated"]:
        yield f"         of the answers {facts['num_truncated']:,} were cut at --max-new-tokens"
    count = len(facts["folds"])
    few = f", as there are too few images for {NUM_FOLDS}" if count < NUM_FOLDS else ""
    yield f"folds    {count}{few}; each of the {facts['num_images']:,} images in one only"
    yield f"probe    {facts['probe']}"
    yield "\nAUROC, mean±standard deviation of the folds"
    yield from show_layers(facts["cells"])
    yield ""
    for name, cell in list_levels(facts).items():
        yield f"{name:<30}{show_cell(cell)}"
    if facts["leaks"]:
        yield "\nEven shuffled labels are told: something leaks into the folds; trust no cell."


def show_layers(cells: dict[str, dict]) -> Iterator[str]:
    """The table of what has layers; with more than five of them it lies on its side."""
    kinds = [kind for kind in KINDS if any(name.startswith(kind) for name in cells)]
    layers = sorted({layer_of(name) for name in cells} - {None})
    table = pd.DataFrame(index=kinds, columns=layers, dtype=object)
    for kind, layer in itertools.product(kinds, layers):
        table.loc[kind, layer] = show_cell(cells[f"{kind}/layer_{layer}"])
    column = 10
    if len(layers) > 5:
        table, column = table.rename(lambda kind: kind.removesuffix("_representation")).T, 13
    first = 27 if column == 10 else 6
    yield f"{'layer':<{first}}" + "".join(f"{name:>{column}}" for name in table)
    for name, row in table.iterrows():
        yield f"{name:<{first}}" + "".join(f"{cell:>{column}}" for cell in row)


def show_cell(cell: dict | None) -> str:
    """Mean and spread of a cell, or a dash where there is nothing to measure."""
    return f"{cell['mean']:.2f}±{cell['sd']:.2f}" if cell else "-"


def plot_probe(path: Path, facts: dict) -> None:
    """Draw AUROC by layer: a line and a band for a representation, a level for all else."""
    figure = new_figure(8, 4.5)
    title = one_line(Path(facts["label"]).name, 80)
    axes = figure.add_subplot(xlabel="layer", ylabel="AUROC", title=title)
    handles = []
    for kind, color, marker in zip(KINDS, COLORS, "os^"):
        cells = {n: cell for n, cell in facts["cells"].items() if n.startswith(kind)}
        if cells:
            layers = [layer_of(name) for name in cells]
            mean = np.array([cell["mean"] for cell in cells.values()])
            sd = np.array([cell["sd"] for cell in cells.values()])
            handles += axes.plot(layers, mean, c=color, marker=marker, ms=4, label=kind)
            axes.fill_between(layers, mean - sd, mean + sd, color=color, alpha=0.15, lw=0)
            if len(layers) == 1:  # of which there is no band
                axes.errorbar(layers, mean, sd, c=color, capsize=3)
            if len(layers) <= MAX_LAYERS:
                axes.set_xticks(layers)
    for (name, cell), dashes in zip(list_levels(facts).items(), itertools.cycle(DASHES)):
        if cell:
            color = COLORS[3] if name == VISION else "#444444"
            label = f"{name}  {show_cell(cell)}"
            style = {"c": color, "lw": 1.2, "ls": (0, dashes), "label": label}
            handles.append(axes.axhline(cell["mean"], **style))
    axes.axhline(0.5, c="#BBBBBB", lw=0.8, zorder=0)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
    figure.legend(handles=handles, loc="outside right center", frameon=False, handlelength=4)
    figure.savefig(path, dpi=150)


# ───────────────────────────────────────── command line ────────────────────────────────────────
FLAG_MODES = {  # what each flag is for
    "max_samples": ["view", "question_id"],
    "all": ["view", "question_id"],
    "json": ["view", "question_id", "probe"],
    "vqa_dataset": ["verify"],
    "representation": ["view", "question_id", "export", "plot", "probe"],
    "layer": ["view", "question_id", "export", "plot", "probe"],
    "color_by": ["plot"],
    "above": ["probe"],
    "probe_model": ["probe"],
}


def parse_arguments(argv: list[str] | None) -> tuple[str, argparse.Namespace]:
    """The mode, and the flags, each of which is for it; status 2 where they do not fit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="part file, or directory of them")
    add("--question-id", action="append", metavar="ID", help="view this sample whole; repeatable")
    add("--verify", action="store_true", help="look for all that can be wrong")
    add("--export", type=Path, metavar="FILE", help=".npz, or .csv for the texts alone")
    add("--plot", type=Path, metavar="FILE", help=".png, .pdf or .svg")
    add("--probe", metavar="LABEL", help=f"AUROC of CSV:COLUMN, or of {ANSWER_IS_WRONG}")
    add("--max-samples", type=int, default=3, metavar="N", help="view: samples to show (3)")
    add("--all", action="store_true", help="view: figures of all samples, not of 1,000")
    add("--json", action="store_true", help="view, probe: the same for programs")
    add("--vqa-dataset", type=Path, metavar="CSV", help="verify: compare with this table")
    add("--representation", choices=(VISION, *KINDS), help="view, export, plot, probe: only this")
    add("--layer", type=int, metavar="I", help="view, export, plot, probe: only this")
    add("--color-by", metavar="WHAT", help="plot: ground_truth_answer, ... or CSV:COLUMN")
    add("--above", type=float, metavar="X", help="probe: the column's numbers above X are a class")
    add("--probe-model", choices=PROBES, default="linear", help="probe: linear, or HALP's mlp")
    args = parser.parse_args(argv)

    exclusive = ("question_id", "verify", "export", "plot", "probe")
    modes = [name for name in exclusive if getattr(args, name)]
    if len(modes) > 1 and modes != ["plot", "probe"]:
        parser.error(f"{' and '.join('--' + name.replace('_', '-') for name in modes)}: choose one")
    mode = modes[-1] if modes else "view"
    for name, allowed in FLAG_MODES.items():
        if getattr(args, name) != parser.get_default(name) and mode not in allowed:
            parser.error(f"--{name.replace('_', '-')} is for {' and '.join(allowed)}")
    if args.export and args.export.suffix not in (".npz", ".csv"):
        parser.error("--export writes .npz and .csv")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error("--plot writes .png, .pdf and .svg")
    if args.probe and args.probe != ANSWER_IS_WRONG and ":" not in args.probe:
        parser.error(f"--probe: LABEL is CSV:COLUMN or {ANSWER_IS_WRONG}, not {args.probe}")
    if args.above is not None and args.probe == ANSWER_IS_WRONG:
        parser.error("--above is for the numbers of a CSV")
    return mode, args


def run(mode: str, args: argparse.Namespace) -> tuple[int, Iterable[str]]:
    """The exit status, and the lines to print. Raises ImportError, OSError or ValueError."""
    if mode == "verify":
        return verify(args.paths, args.vqa_dataset)
    parts, samples = open_run(args.paths)
    vectors = choose_vectors(next(iter(parts.values())), args.representation, args.layer)
    if mode == "export":
        return 0, export(args.export, samples, vectors)
    if mode == "probe":
        facts = probe(samples, vectors, args.probe, args.above, args.probe_model)
        if args.plot:
            plot_probe(args.plot, facts)
        return 0, [json.dumps(facts, indent=1)] if args.json else show_probe(facts)
    order = np.random.default_rng(0).permutation(len(samples))
    drawn = [samples[place] for place in sorted(order[: None if args.all else NUM_DRAWN])]
    if mode == "plot":
        return 0, plot(args.plot, drawn, len(samples), vectors, args.color_by or TEXTS[-1])
    shown = samples[: max(args.max_samples, 0)]
    if mode == "question_id":
        drawn = shown = find_samples(samples, args.question_id)
    facts = describe_run(parts, samples) | describe_vectors(drawn, vectors, args.json)
    facts["samples"] = json.loads(read_texts(shown).to_json(orient="records"))  # NaN is null
    if args.json:
        return 0, [json.dumps(facts, allow_nan=False, indent=1, default=str)]
    return 0, show(facts, sys.maxsize if mode == "question_id" else 58)


def find_samples(samples: Samples, question_ids: list[str]) -> Samples:
    """The samples of these ids, each once. Raises ValueError that names what is near."""
    by_id = {unquote(name): (path, name) for path, name in samples}
    for question_id in question_ids:
        if question_id not in by_id:
            near = difflib.get_close_matches(question_id, by_id, cutoff=0)
            near = ", ".join(map(repr, near))
            raise ValueError(f"no question_id {question_id!r}; near it: {near}")
    return [by_id[question_id] for question_id in dict.fromkeys(question_ids)]


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
    print(one_line(message), file=sys.stderr)
    return 1


if __name__ == "__main__":
    status = main()
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None  # Python would try once more, and say so in its own way
    raise SystemExit(status)
