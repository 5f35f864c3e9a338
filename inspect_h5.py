#!/usr/bin/env python3
"""Look into the part files that run_gemma3_extraction.py writes, and probe what they hold.

    python inspect_h5.py output                      what was run, figures, first samples
    python inspect_h5.py output --question-id 42     the same of one sample, its texts whole
    python inspect_h5.py output --verify --vqa-dataset vqa.csv
    python inspect_h5.py output --export layer_24.npz --layer 24
    python inspect_h5.py output --plot pca.png --color-by labels.csv:hallucinated
    python inspect_h5.py output --probe answer_is_wrong --plot auroc.png

Samples stand part after part, those of a part in the order in which they were planned. Exit status:
0 all is well, 1 something is wrong and one line says what (--verify: one line a finding), 2 wrong
usage, 130 stopped by Ctrl-C.
"""

import signal
import sys

if __name__ == "__main__":  # before the imports, which take a second
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool

import argparse
import dataclasses
import difflib
import itertools
import json
import re
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
    return list(found.values())


def scan_parts(paths: Paths) -> tuple[dict[Path, dict], Samples, list[Finding]]:
    """The attributes of each readable part, all samples in order, why they are not one run."""
    parts, owners, findings = {}, {}, []
    for path in find_parts(paths):
        try:
            with h5py.File(path) as file:
                part = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
                rows = {name: int(file.require_group(name).attrs.get("row", -1)) for name in file}
            list_vectors(part)  # which raises where an attribute that it needs is missing
        except UNREADABLE as error:
            findings.append((f"{path}: cannot be read as a part: {error}", []))
            continue
        parts[path] = part
        expected = next(iter(parts.values())) | {"num_samples": len(rows)}
        compared = (part.keys() | expected.keys()) - VARYING
        is_pinned = re.fullmatch("[0-9a-f]{40,64}", str(part.get("model_revision")))
        if is_pinned and part["model_revision"] == expected.get("model_revision"):
            compared.discard("model_name")  # the same weights, by another path
        for key in sorted(compared):
            if part.get(key) != expected.get(key):
                what = f"{key} is {part.get(key)!r}, not {expected.get(key)!r}"
                findings.append((f"{path}: {what}", []))
        twice = [unquote(name) for name in rows if name in owners]
        if twice:
            findings.append((f"{path}: question_id is there twice", twice))
        for name in sorted(rows, key=rows.get):
            owners.setdefault(name, path)
    return parts, [(path, name) for name, path in owners.items()], findings


def open_run(paths: Paths) -> tuple[dict[Path, dict], Samples]:
    """Each part's attributes, all samples in order. Raises ValueError if they are not one run."""
    parts, samples, findings = scan_parts(paths)
    if findings or not parts:
        raise ValueError(findings[0][0] if findings else "no part files")
    return parts, samples


def list_vectors(part: dict, kind: str | None = None, layer: int | None = None) -> Vectors:
    """A sample's vectors, of one representation or layer if it is given, and their lengths."""
    layered = [f"{name}/layer_{i}" for name in KINDS for i in part["layers"]]
    widths = {VISION: part["vision_hidden_size"], **dict.fromkeys(layered, part["hidden_size"])}
    chosen = {}
    for name, width in widths.items():
        if kind in (None, name.partition("/")[0]) and layer in (None, layer_of(name)):
            chosen[name] = width
    if not chosen:
        layers = one_line(part["layers"], 40)
        there = f"there are {VISION}, {', '.join(KINDS)}, layers {layers}"
        raise ValueError(f"no layer {layer} of {kind or 'any representation'}; {there}")
    return chosen


def layer_of(name: str) -> int | None:
    """The layer that a data set's name ends in."""
    layer = name.partition("/layer_")[2]
    return int(layer) if layer else None


def pick_layers(vectors: Vectors) -> tuple[Vectors, str]:
    """Vectors of no more than five layers, where there are many, and a note that says so."""
    layers = sorted({layer_of(name) for name in vectors} - {None})
    if len(layers) <= MAX_LAYERS:
        return vectors, ""
    count = len(layers)
    picked = [layers[k] for k in (0, count // 4, count // 2, 3 * count // 4, count - 1)]
    kept = {name: width for name, width in vectors.items() if layer_of(name) in (None, *picked)}
    named = ", ".join(map(str, picked))
    return kept, f"; layers {named} of {len(layers)}; --layer I for another"


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
    try:
        table = pd.read_csv(path, index_col="question_id", dtype=str, na_filter=False)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error.args[-1]}") from error
    if not table.index.is_unique:
        raise ValueError(f"{path}: a question_id is there twice")
    chosen = []
    for names in columns:
        there = [name for name in names if name in table]
        if not there:
            missing = " or ".join(names)
            raise ValueError(f"{path} has no column {missing}; it has {', '.join(table)}")
        chosen.append(there[0])
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
    for name in [LOGPROBS, *vectors] if LOGPROBS in group else vectors:
        dataset = group[name]
        is_short = dataset.id.get_type().get_size() < dataset.dtype.itemsize
        dtype = "bfloat16" if is_short else dataset.dtype  # which h5py reads as float32
        tree[name] = f"{dtype} {list(dataset.shape)} {dataset.compression or ''}".rstrip()
    return tree


def count_failed(paths: Iterable[Path]) -> tuple[int, list[str]]:
    """How many rows `failed_samples.csv` beside the parts list, and which cannot be read."""
    count, unreadable = 0, []
    as_left = {"usecols": ["question_id"], "index_col": False, "encoding_errors": "replace"}
    for path in sorted({path.with_name("failed_samples.csv") for path in paths}):
        try:
            count += len(pd.read_csv(path, **as_left)) if path.exists() else 0
        except (OSError, ValueError):
            unreadable.append(str(path))
    return count, unreadable


def describe(parts: dict, samples: Samples, drawn: Samples, vectors: Vectors) -> dict:
    """What was run (a setting that varies is a list), a sample, figures of those drawn."""
    settings = {}
    for name in next(iter(parts.values())):
        values = [part.get(name) for part in parts.values()]
        settings[name] = values[0] if values.count(values[0]) == len(values) else values
    figured = vectors.items() if drawn else ()
    num_failed, unreadable = count_failed(parts)
    return {
        "files": list(map(str, parts)),
        "num_samples": len(samples),
        "num_failed": num_failed,
        "unreadable": unreadable,
        "settings": settings,
        "sample": next(each(drawn[:1], describe_sample, vectors), {}),
        "num_samples_read": len(drawn),
        "figures": {name: summarise(read_matrix(drawn, name, width)) for name, width in figured},
    }


def one_line(value: object, width: int = sys.maxsize) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like as in a repr."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))
    used = np.cumsum([1 + (unicodedata.east_asian_width(char) in "WF") for char in text])
    end = int(np.searchsorted(used, width))  # the first character that does not fit
    return f"{text[:end]}…" if (used > width).any() else text


def show(facts: dict, note: str, width: int) -> Iterator[str]:
    """The facts in lines of 80 columns; `width` cuts what need not be whole."""
    files, total, num_read = facts["files"], facts["num_samples"], facts["num_samples_read"]
    yield files[0] if len(files) == 1 else f"{files[0]} ...\n{files[-1]}"
    yield f"parts: {len(files)}, samples: {total:,}, failed: {facts['num_failed']:,}"
    for path in facts["unreadable"]:
        yield f"{path} cannot be read, so its rows are not counted"
    yield ""
    for name, value in facts["settings"].items():
        yield f"{name:<22}{one_line(str(value).strip('[]'), width)}"
    yield ""
    for name, kind in facts["sample"].items():
        yield f"{name:<38}{kind}"
    drawn = ", drawn at random" if num_read < total else ""
    yield f"\nfigures of {num_read:,} samples{drawn}{note}"
    yield f"{'':36}  dim  mean L2   sd L2 max |x|   bad  cosine"
    for name, figures in facts["figures"].items():
        dim, *sizes, bad, cosine = (np.nan if x is None else x for x in figures.values())
        cells = "".join(f"{size:8.0f}" if size >= 1000 else f" {size:7.4g}" for size in sizes)
        yield f"{name:<36}{dim:>5} {cells}{bad:6.1%}{cosine:8.4f}"
    for sample in facts["samples"]:
        yield ""
        yield one_line(f"{sample['question_id']}  {sample['image_id']}", 80)
        for name in ("question", "ground_truth_answer", "answer") if width < 80 else sample:
            yield f"  {name:<20}{one_line(sample[name], width)}"


# ─────────────────────────────────────────── verify ────────────────────────────────────────────
def verify(paths: list[Path], csv_path: Path | None) -> tuple[int, list[str]]:
    """The exit status, and a line for everything that is wrong with parts, or unlike the CSV."""
    parts, samples, findings = scan_parts(paths)
    vectors = {}
    for part in parts.values():
        vectors |= list_vectors(part)
    columns = ["path", "question_id", "problems", "image_sha256", *TEXTS, *vectors]
    checked = pd.DataFrame(each(samples, check_sample, parts), columns=columns)
    findings += find_gaps(paths)
    findings += find_in_samples(checked, list(vectors))
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
    num_end_tokens = 0 if attributes["answer_truncated"] else 1
    num_tokens = attributes["num_answer_tokens"] + num_end_tokens
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
        numbers = {path.stem.rpartition("_")[2] for path in find_parts(directory)}
        present = set(map(int, filter(str.isdecimal, numbers)))
        for number in sorted(set(range(1, max(present, default=0))) - present):
            yield f"{directory}: part {number} is missing", []


def find_in_samples(checked: pd.DataFrame, vectors: list[str]) -> Iterator[Finding]:
    """The samples' own problems by part, and what shows only in many of them."""
    by_problem = checked.explode("problems").groupby(["path", "problems"], sort=False)
    for (path, problem), ids in by_problem["question_id"]:
        yield f"{path}: {problem}", list(ids)
    for path, num_values in checked.groupby("path")[[*TEXTS, *vectors]].nunique().iterrows():
        for vector in vectors:
            inputs = ["image_id"] if "vision" in vector else ["image_id", "question"]
            if num_values[vector] == 1 < num_values[inputs].max():
                yield f"{path}: {vector} is the same in all samples", []
    for image_id, group in checked.groupby("image_id", sort=False):
        if group["image_sha256"].nunique() > 1:
            ids = list(group["question_id"])
            yield f"image_id {image_id!r}: its file changed between samples", ids


def find_unlike_csv(checked: pd.DataFrame, csv_path: Path) -> Iterator[Finding]:
    """Rows that are not stored, samples that are no rows, and what differs between the two."""
    columns = [("image_id", "image_name"), ("question",), ("answer", "gt_answer")]
    rows = read_table(csv_path, *columns)
    rows.columns = ["image_id", "question", "ground_truth_answer"]
    stored = checked.dropna(subset=TEXTS).set_index("question_id")
    stored = stored[rows.columns].map(str)
    rows, stored = rows.align(stored, axis=0)
    absent, alone = stored["question"].isna(), rows["question"].isna()
    findings = {}
    for column in rows:
        differs = rows[column].ne(stored[column])
        findings[f"{column} is another here"] = differs & ~absent & ~alone
    findings |= {"not in the parts": absent, "in the parts but not here": alone}
    for what, is_so in findings.items():
        if is_so.any():
            yield f"{csv_path}: {what}", list(rows.index[is_so])


# ─────────────────────────────────────── export and plot ───────────────────────────────────────
def export(path: Path, samples: Samples, vectors: Vectors) -> Iterator[str]:
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


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":  # noqa: F821
    """An empty figure of so many inches."""
    import matplotlib.figure

    warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
    settings = {"font.size": 8, "axes.titlesize": 8, "text.parse_math": False}
    matplotlib.rcParams.update(settings)
    return matplotlib.figure.Figure((width, height), layout="constrained")


def plot(path: Path, samples: Samples, total: int, vectors: Vectors, field: str) -> list:
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
    return [f"{path}: {len(names)} panels of {shown}{note}"]


# ──────────────────────────────────────────── probe ────────────────────────────────────────────
NUM_FOLDS, MIN_FOLDS, SEED = 5, 3, 0
STRENGTHS = (0.03, 0.3, 3, 30)  # C times the mean squared length of a sample's features
NUM_SHUFFLES = 5
PROBES = {
    "linear": "logistic regression, standardised vectors; C chosen on the other folds",
    "mlp": "MLP 512-256-128, standardised vectors; stopped by a tenth of the other folds",
}
DASHES = ["-", "--", ":", "-.", "--", ":", "-."]  # of what has no layers
NUMBERS = "none one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"zero": "0"}
ANSWER_IS_WRONG = "answer_is_wrong"
RULE = """\
         wrong is an answer in which the ground truth does not stand as whole
         words, both normalised as VQA accuracy does: case, punctuation,
         articles, number words. Where the ground truth is yes or no (also spelt
         "n, o"), the first yes or no in the answer counts; with neither an
         answer is wrong."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be told from the states, and the folds in which it is tried."""

    labels: np.ndarray  # bool [num_samples]
    images: np.ndarray  # str [num_samples]
    folds: list[np.ndarray]  # the places of the samples in each, all about images of its own

    def has_both_classes(self) -> bool:
        """Whether each fold has an AUROC."""
        return all(0 < self.labels[fold].mean() < 1 for fold in self.folds)


def normalise(text: str) -> str:
    """Words as VQA accuracy compares them (Antol et al. 2015, vqaEval.py), a space between."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"['’]|(?<=\d),(?=\d{3}\b)", "", text)  # don't is dont, and 1,000 is 1000
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


def read_labels(table: pd.DataFrame, label: str, above: float | None) -> tuple[pd.Series, list]:
    """1, 0 or NaN (none) for each sample, and what 0 and 1 are called. Raises ValueError."""
    if label == ANSWER_IS_WRONG:
        if not table["answer"].any():
            raise ValueError(f"{label}: no answers are stored (--max-new-tokens 0)")
        wrong = map(is_wrong, table["answer"], table["ground_truth_answer"])
        return pd.Series(wrong, dtype=float), ["right", "wrong"]
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
        what = f"a label has two values, not {len(values):,} ({named})"
        raise ValueError(f"{label}: {what}; of numbers, --above X makes two")
    return texts.map({value: float(value == values[-1]) for value in values}), values


def split_by_image(labels: np.ndarray, images: np.ndarray) -> list[np.ndarray]:
    """Five folds, or fewer; each with both classes, and none with an image of another's."""
    from sklearn.model_selection import StratifiedGroupKFold

    num_images = [len(set(images[labels == value])) for value in (False, True)]
    for count in range(min(NUM_FOLDS, *num_images), MIN_FOLDS - 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=SEED)
        folds = [test for _, test in splitter.split(images, labels, images)]
        if Task(labels, images, folds).has_both_classes():
            return folds
    raise ValueError(
        f"too few samples for a probe: {(~labels).sum():,} of one class, about {num_images[0]:,} "
        f"images, and {labels.sum():,} of the other, about {num_images[1]:,}; each of "
        f"{MIN_FOLDS} folds or more needs both, and images of its own"
    )


def describe_scores(aurocs: list[float]) -> dict:
    """A cell of the table: AUROC in each fold, their mean and their standard deviation."""
    return {"auroc": aurocs, "mean": float(np.mean(aurocs)), "sd": float(np.std(aurocs, ddof=1))}


def make_probe(inputs: np.ndarray, model: str, strengths: list[float], folds: list[np.ndarray]):
    """A probe of vectors [num_samples, D] or of texts, to be fitted on these folds in their order.

    Logistic regression is first fitted without one or the other of two, to choose the strength.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if inputs.ndim == 2:
        features, squared_length = StandardScaler(), inputs.shape[1]
    else:
        features, squared_length = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]"), 1
    if model == "mlp":
        probe = MLPClassifier((512, 256, 128), early_stopping=True, random_state=SEED)
    else:
        grid = {"C": [strength / squared_length for strength in strengths]}
        held_out = [0, 1] + [-1] * (len(folds) - 2)  # -1: never
        inner = PredefinedSplit(np.repeat(held_out, [len(fold) for fold in folds]))
        regression = LogisticRegression(max_iter=1000)
        probe = GridSearchCV(regression, grid, scoring="roc_auc", cv=inner)
    return make_pipeline(features, probe)


def try_probe(task: Task, inputs: np.ndarray, model="linear", strengths=STRENGTHS) -> dict:
    """A cell of the table: AUROC in each fold of a probe fitted on the others, and its C."""
    from sklearn.metrics import get_scorer

    aurocs, chosen = [], []
    for fold in task.folds:
        others = [other for other in task.folds if other is not fold]
        train = np.concatenate(others)
        probe = make_probe(inputs, model, strengths, others)
        probe.fit(inputs[train], task.labels[train])
        aurocs.append(float(get_scorer("roc_auc")(probe, inputs[fold], task.labels[fold])))
        chosen.append(getattr(probe[-1], "best_params_", {}).get("C"))
    return describe_scores(aurocs) | {"C": chosen}


def try_numbers(task: Task, values: np.ndarray) -> list[float]:
    """AUROC in each fold of one number a sample, up or down as the other folds say."""
    from sklearn.metrics import roc_auc_score

    aurocs = []
    for fold in task.folds:
        train = np.setdiff1d(np.arange(len(values)), fold)
        sign = 1 if roc_auc_score(task.labels[train], values[train]) >= 0.5 else -1
        aurocs.append(float(roc_auc_score(task.labels[fold], sign * values[fold])))
    return aurocs


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
    cells = {"question text alone": try_probe(task, table["question"].to_numpy(str))}
    for name, values in numbers.items():
        values = np.asarray(values, float)
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: not finite or not in all samples; see --verify")
        cells[name] = describe_scores(try_numbers(task, values)) if len(values) else None
    return cells


def shuffle_labels(task: Task, rng: np.random.Generator) -> np.ndarray:
    """The labels dealt out anew, those of an image together, so that what leaks by image shows."""
    groups = [rng.permutation(group) for _, group in pd.Series(task.labels).groupby(task.images)]
    rng.shuffle(groups)
    shuffled = np.empty_like(task.labels)
    shuffled[np.argsort(task.images, kind="stable")] = np.concatenate(groups)
    return shuffled


def try_shuffled(task: Task, inputs: np.ndarray, model: str, strengths: list) -> dict | None:
    """A cell with labels that tell nothing, five times; None where no fold keeps both classes."""
    rng = np.random.default_rng(SEED)
    dealt = (shuffle_labels(task, rng) for _ in range(100 * NUM_SHUFFLES))
    tasks = (dataclasses.replace(task, labels=labels) for labels in dealt)
    aurocs = []
    for shuffled in itertools.islice(filter(Task.has_both_classes, tasks), NUM_SHUFFLES):
        aurocs += try_probe(shuffled, inputs, model, strengths)["auroc"]
    return describe_scores(aurocs) if aurocs else None


def try_vectors(task: Task, samples: Samples, vectors: Vectors, model: str) -> tuple:
    """A cell for each data set, every matrix read once; and the best one's with shuffled labels."""
    from tqdm import tqdm

    cells, best = {}, None
    for name, width in tqdm(vectors.items(), unit="cell", disable=None):
        matrix = read_matrix(samples, name, width)
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: not finite; see --verify")
        cells[name] = try_probe(task, matrix, model)
        if best is None or cells[name]["mean"] > cells[best]["mean"]:
            best, best_matrix = name, matrix
    usual = np.median(cells[best]["C"]) * best_matrix.shape[1] if model == "linear" else None
    shuffled = try_shuffled(task, best_matrix, model, [usual])
    return cells, shuffled and {"of": best} | shuffled


def probe(samples: Samples, vectors: Vectors, label: str, above: float | None, model: str) -> dict:
    """How well each vector tells the label, in folds by image: what the table is made of."""
    from threadpoolctl import threadpool_limits  # which scikit-learn brings

    table = read_texts(samples)
    labels, classes = read_labels(table, label, above)
    has_label = labels.notna().to_numpy()
    labels, table = labels[has_label], table[has_label].reset_index(drop=True)
    images = table["image_id"]
    if "image_sha256" in table:  # a file may be stored under several names
        images = table.groupby("image_sha256")["image_id"].transform("first")
    is_true, images = labels.to_numpy(bool), images.to_numpy(str)
    task = Task(is_true, images, split_by_image(is_true, images))
    # Logistic regression waits for memory, and more threads of BLAS would wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1 if model == "linear" else None):
        warnings.simplefilter("ignore")  # of fits that have not converged
        baselines = try_baselines(task, table)
        labelled = list(itertools.compress(samples, has_label))
        cells, shuffled = try_vectors(task, labelled, vectors, model)
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


def show_cell(cell: dict | None) -> str:
    """Mean and spread of a cell, or a dash where there is nothing to measure."""
    return f"{cell['mean']:.2f}±{cell['sd']:.2f}" if cell else "-"


def show_layers(cells: dict[str, dict]) -> str:
    """A row for each representation and a column for each layer; of many, it lies on its side."""
    table = pd.DataFrame(dtype=object)
    for name, cell in cells.items():
        kind, _, layer = name.partition("_representation/layer_")
        if layer:
            table.loc[kind, int(layer)] = show_cell(cell)
    if len(table.columns) > 5:
        table = table.T
    return table.rename_axis(columns="layer").to_string() if len(table) else ""


def show_probe(facts: dict) -> Iterator[str]:
    """What was tried, and the tables."""
    yield f"label    {facts['label']}"
    if facts["rule"]:
        yield facts["rule"]
    classes = (f"{count:,} × {one_line(name, 24)}" for name, count in facts["classes"].items())
    yield f"samples  {', '.join(classes)}; {facts['num_without_label']:,} without a label"
    if facts["rule"] and facts["num_truncated"]:
        yield f"         of the answers {facts['num_truncated']:,} were cut at --max-new-tokens"
    count = len(facts["folds"])
    few = f", as there are too few images for {NUM_FOLDS}" if count < NUM_FOLDS else ""
    yield f"folds    {count}{few}; each of the {facts['num_images']:,} images in one only"
    yield f"probe    {facts['probe']}"
    yield "\nAUROC, mean±standard deviation of the folds"
    yield show_layers(facts["cells"])
    yield ""
    for name, cell in list_levels(facts).items():
        yield f"{name:<30}{show_cell(cell)}"
    if facts["leaks"]:
        yield "\nEven shuffled labels are told: something leaks into the folds; trust no cell."


def plot_probe(path: Path, facts: dict) -> None:
    """Draw AUROC by layer: a line with its spread for a representation, a level for all else."""
    figure = new_figure(8, 4.5)
    title = one_line(Path(facts["label"]).name, 80)
    axes = figure.add_subplot(xlabel="layer", ylabel="AUROC", title=title)
    for kind, color, marker in zip(KINDS, COLORS, "os^"):
        cells = {n: cell for n, cell in facts["cells"].items() if n.startswith(kind)}
        if cells:
            layers = [layer_of(name) for name in cells]
            means = [cell["mean"] for cell in cells.values()]
            spreads = [cell["sd"] for cell in cells.values()]
            style = {"c": color, "marker": marker, "ms": 4, "capsize": 2}
            axes.errorbar(layers, means, spreads, label=kind, **style)
    for (name, cell), color, dashes in zip(list_levels(facts).items(), COLORS[3:], DASHES):
        if cell:
            label = f"{name}  {show_cell(cell)}"
            axes.axhline(cell["mean"], c=color, lw=1.2, ls=dashes, label=label)
    axes.axhline(0.5, c="#BBBBBB", lw=0.8, zorder=0)
    figure.legend(loc="outside right center", frameon=False, handlelength=4)
    figure.savefig(path, dpi=150)


# ───────────────────────────────────────── command line ────────────────────────────────────────
MODE_FLAGS = {  # which flags go with what is to be done
    "view": {"question_id", "max_samples", "all", "json", "representation", "layer"},
    "verify": {"vqa_dataset"},
    "export": {"representation", "layer"},
    "plot": {"representation", "layer", "color_by"},
    "probe": {"representation", "layer", "above", "probe_model", "json", "plot"},
}


def parse_arguments(argv: list[str] | None) -> tuple[str, argparse.Namespace]:
    """What is to be done, and its flags; status 2 where they do not fit."""
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

    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    mode = next((name for name in ("verify", "export", "probe", "plot") if name in given), "view")
    for name in sorted(given - MODE_FLAGS[mode] - {mode, "paths"}):
        parser.error(f"--{name.replace('_', '-')} does not go with {mode}")
    for path, suffixes in ((args.export, ".npz .csv"), (args.plot, ".png .pdf .svg")):
        if path and path.suffix not in suffixes.split():
            parser.error(f"{path}: the name must end in one of {suffixes}")
    if args.probe and args.probe != ANSWER_IS_WRONG and ":" not in args.probe:
        parser.error(f"--probe: LABEL is CSV:COLUMN or {ANSWER_IS_WRONG}, not {args.probe}")
    if args.above is not None and args.probe == ANSWER_IS_WRONG:
        parser.error("--above is for the numbers of a CSV")
    return mode, args


def find_samples(samples: Samples, question_ids: list[str]) -> Samples:
    """The samples of these ids, each once. Raises ValueError that names what is near."""
    by_id = {unquote(name): (path, name) for path, name in samples}
    for question_id in question_ids:
        if question_id not in by_id:
            near = difflib.get_close_matches(question_id, by_id, cutoff=0)
            near = ", ".join(map(repr, near))
            raise ValueError(f"no question_id {question_id!r}; near it: {near}")
    return [by_id[question_id] for question_id in dict.fromkeys(question_ids)]


def run(mode: str, args: argparse.Namespace) -> tuple[int, Iterable[str]]:
    """The exit status, and the lines to print. Raises ImportError, OSError or ValueError."""
    if mode == "verify":
        return verify(args.paths, args.vqa_dataset)
    parts, samples = open_run(args.paths)
    vectors = list_vectors(next(iter(parts.values())), args.representation, args.layer)
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
    if args.question_id:
        drawn = shown = find_samples(samples, args.question_id)
    picked, note = (vectors, "") if args.json else pick_layers(vectors)
    facts = describe(parts, samples, drawn, picked)
    facts["samples"] = json.loads(read_texts(shown).to_json(orient="records"))  # NaN is null
    if args.json:
        return 0, [json.dumps(facts, allow_nan=False, indent=1, default=str)]
    return 0, show(facts, note, sys.maxsize if args.question_id else 58)


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
