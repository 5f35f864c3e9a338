#!/usr/bin/env python3
"""Look into the part files that run_gemma3_extraction.py writes.

    python inspect_h5.py output                      what was run, figures, first samples
    python inspect_h5.py output --question-id 42     the same of one sample, its texts whole
    python inspect_h5.py output --verify --vqa-dataset vqa.csv
    python inspect_h5.py output --export layer_24.npz --layer 24
    python inspect_h5.py output --plot pca.png --color-by labels.csv:hallucinated

Samples stand part after part, those of a part by their row in the CSV. Exit status: 0 all is well,
1 something is wrong and one line says what (--verify: one line a finding), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
import unicodedata
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd

PART_PATTERN = re.compile(r"gemma3_12b_embeddings_part_(\d{3,})\.h5")
VISION, VISION_LINK = "vision_representation", "vision_only_representation"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
TEXTS = ("image_id", "question", "answer", "ground_truth_answer")
COUNTS = {"row", "num_prompt_tokens", "vision_token_pos", "query_token_pos", "num_answer_tokens"}
CSV_NAMES = {"image_id": ("image_id", "image_name"), "question": ("question",)}
CSV_NAMES |= {"ground_truth_answer": ("answer", "gt_answer")}
REQUIRED = {"model_name", "layers", "hidden_size", "vision_hidden_size", "num_samples"}
VARYING = {  # attributes that may differ between the parts of one run
    *("num_samples", "created_at", "device", "dataset", "dataset_sha256"),
    *("python_version", "torch_version", "transformers_version"),
}
NUM_SUMMARISED, NUM_PLOTTED, NUM_VERIFIED = 1000, 2000, 1000  # drawn, drawn, at a time
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
STRING = h5py.string_dtype()
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000")
COLORS += ("#56B4E9", "#D55E00", "#F0E442", "#882255", "#999933")
MARKERS, GREY = "os^Dv*P<X>", "#BBBBBB"


class InspectError(ValueError):
    """What was asked for cannot be done; the message says why."""


# ─────────────────────────────────────── parts and samples ─────────────────────────────────────


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file; what HDF5 has against it becomes an InspectError."""
    try:
        with h5py.File(path) as file:
            yield file
    except InspectError:
        raise
    except HDF5_ERRORS as error:
        raise InspectError(f"{path} cannot be read: {error.args[-1]}") from error


def find_parts(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and the part files in the directories among them, none twice."""
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path] if path.exists() else []
        if path.is_dir():
            inside = [p for p in path.iterdir() if PART_PATTERN.fullmatch(p.name)]
        if not inside:
            raise InspectError(f"{path} is no file, and no directory with part files in it")
        for part_path in sorted(inside, key=lambda p: (len(p.name), p.name)):
            found.setdefault(part_path.resolve(), part_path)
    return list(found.values())


def open_part(path: Path) -> tuple[dict, list[str]]:
    """A part's attributes and the names of its samples. Raises InspectError if it is no part."""
    with opened(path) as file:
        attributes = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in file.attrs.items()}
        names = list(file)
    if missing := REQUIRED - attributes.keys():
        raise InspectError(f"{path} is no part of an extraction: no attribute {min(missing)}")
    return attributes, names


def open_run(paths: str | Path | Iterable[str | Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The attributes by part, and in order the samples: path, name (of the group), row.

    Raises:
        InspectError: parts that cannot be read, of different settings, or with an id twice.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    parts = {path: open_part(path) for path in find_parts(map(Path, paths))}
    runs = pd.DataFrame([attributes for attributes, _ in parts.values()], list(parts), dtype=object)
    for name in runs.columns.difference(list(VARYING)):
        for path in runs.index[runs[name].astype(str) != str(runs[name].iloc[0])]:
            values = f"{runs[name].iloc[0]!r} in {runs.index[0]} and {runs[name][path]!r} in {path}"
            raise InspectError(f"parts of different runs: {name} is {values}")
    samples = []
    for path, (_, names) in parts.items():
        with opened(path) as file:
            rows = {name: read_row(file, name) for name in names}
        samples += [(path, name, rows[name]) for name in sorted(rows, key=rows.__getitem__)]
    samples = pd.DataFrame(samples, columns=["path", "name", "row"])
    for name in samples["name"][samples["name"].duplicated()]:
        raise InspectError(f"question_id {unquote(name)!r} is in two parts; see --verify")
    return runs, samples


def choose_vectors(
    attributes: dict | pd.Series, kind: str | None = None, layer: int | None = None
) -> dict[str, int]:
    """The vectors of a representation, of a layer, of both, or all: data set and length."""
    layers, width = attributes["layers"], attributes["hidden_size"]
    vectors = {f"{k}/layer_{i}": width for k in KINDS for i in layers}
    vectors = {VISION: attributes["vision_hidden_size"], **vectors}
    chosen = {name: dim for name, dim in vectors.items() if kind in (None, name.split("/")[0])}
    if layer is not None:
        chosen = {name: dim for name, dim in chosen.items() if name.endswith(f"/layer_{layer}")}
    if not chosen:
        raise InspectError(f"no layer {layer} of {kind or 'any kind'}; there is {list(vectors)}")
    return chosen


# HDF5's own calls: `file[name][()]` takes four times as long on vectors this short.


def read_row(file: h5py.File, name: str) -> int:
    """A sample's row in the CSV."""
    value = np.empty((), np.int64)
    h5py.h5a.open(file.id, b"row", obj_name=name.encode()).read(value)
    return int(value)


def read_texts(file: h5py.File, name: str) -> dict[str, str]:
    """A sample's question_id and texts. Raises one of HDF5_ERRORS."""
    texts, value = {"question_id": unquote(name)}, np.empty((), STRING)
    for text in TEXTS:
        dataset = h5py.h5d.open(file.id, f"{name}/{text}".encode())
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, value)
        texts[text] = value.item().decode()
    return texts


def read_vectors(
    file: h5py.File, names: Iterable[str], vector: str, width: int, errors: dict | None = None
) -> np.ndarray:
    """One vector of each sample: float32 [num_samples, width].

    One that cannot be read raises InspectError, or goes into `errors` by the sample's name.
    """
    matrix = np.empty((len(names), width), np.float32)
    for name, row in zip(names, matrix, strict=True):
        try:
            dataset = h5py.h5d.open(file.id, f"{name}/{vector}".encode())
            if dataset.shape != row.shape:
                raise ValueError(f"has shape {dataset.shape}; expected {row.shape}")
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, row, h5py.h5t.NATIVE_FLOAT)
        except HDF5_ERRORS as error:
            if errors is None:
                place = f"{file.filename}, question_id {unquote(name)!r}"
                raise InspectError(f"{place}: {vector} {error.args[0]}; see --verify") from error
            errors[name] = f"{vector}: {error.args[0]}"
    return matrix


def read_samples(samples: pd.DataFrame) -> pd.DataFrame:
    """question_id, texts and attributes, in the order of `samples`."""
    read = []
    for path, names in samples.groupby("path", sort=False)["name"]:
        with opened(path) as file:
            read += [{**read_texts(file, name), **file[name].attrs} for name in names]
    return pd.DataFrame(read, columns=None if read else ["question_id", *TEXTS, *COUNTS])


def read_matrix(samples: pd.DataFrame, vector: str, width: int) -> np.ndarray:
    """One vector of each sample: float32 [num_samples, width]."""
    matrix, start = np.empty((len(samples), width), np.float32), 0
    for path, names in samples.groupby("path", sort=False)["name"]:
        with opened(path) as file:
            matrix[start : start + len(names)] = read_vectors(file, names, vector, width)
        start += len(names)
    return matrix


def load_embeddings(
    paths: str | Path | Iterable[str | Path], representation: str, layer: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """The samples' texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are files or directories; `vision_representation` has no layer. Raises InspectError.
    """
    runs, samples = open_run(paths)
    vectors = choose_vectors(runs.iloc[0], representation, layer)
    if len(vectors) > 1:
        raise InspectError(f"layer is {layer}; expected one of {runs['layers'].iloc[0]}")
    return read_samples(samples), read_matrix(samples, *vectors.popitem())


# ─────────────────────────────────────────── the view ──────────────────────────────────────────


def summarise(matrix: np.ndarray) -> dict[str, float | None]:
    """The figures of vectors [num_samples, D]; norms and cosine are of those that are finite."""
    finite = np.isfinite(matrix)
    whole = matrix if finite.all() else matrix[finite.all(axis=1)]
    norms = np.sqrt(np.einsum("nd,nd->n", whole, whole, dtype=np.float64))
    n, units = np.count_nonzero(norms), whole[norms > 0] / norms[norms > 0, None]
    # |sum of u|² holds n squares of unit vectors, and the cosine of every pair twice.
    pairs = np.sum(units.sum(axis=0) ** 2) - n
    figures = {
        "norm_mean": norms.mean() if len(norms) else None,
        "norm_std": norms.std() if len(norms) else None,
        "max_abs": np.abs(matrix).max(initial=0, where=finite),
        "nonfinite_share": 1 - finite.mean() if matrix.size else None,
        "mean_cosine": pairs / (n * (n - 1)) if n > 1 else None,
    }
    return {name: value if value is None else float(value) for name, value in figures.items()}


def describe_group(group: h5py.Group, prefix: str = "") -> dict[str, str]:
    """What a sample holds, by path: type, shape and compression as they are in the file."""
    tree: dict[str, str] = {}
    for name in sorted(group, key=lambda name: (len(name) if "layer_" in name else 0, name)):
        link, member, path = group.get(name, getlink=True), group.get(name), prefix + name
        if isinstance(link, h5py.SoftLink):
            tree[path] = f"-> {link.path}"
        elif isinstance(member, h5py.Group):
            tree |= describe_group(member, path + "/")
        elif h5py.check_string_dtype(member.dtype):
            tree[path] = "text"
        else:  # h5py shows bfloat16 as the float32 that it reads
            is_bfloat16 = member.id.get_type().get_size() == 2 and member.dtype == np.float32
            dtype, compression = "bfloat16" if is_bfloat16 else member.dtype, member.compression
            tree[path] = f"{dtype} {list(member.shape)} {compression or ''}".rstrip()
    return tree


def describe(runs: pd.DataFrame, samples: pd.DataFrame, drawn: pd.DataFrame, shown) -> dict:
    """All that the view says: the run, a sample's tree, figures of `drawn`, texts of `shown`."""
    values = {name: list(dict.fromkeys(map(str, runs[name]))) for name in runs}
    tree = {}
    if len(drawn):
        with opened(drawn["path"].iloc[0]) as file:
            tree = describe_group(file[drawn["name"].iloc[0]])
    beside = {path.with_name("failed_samples.csv") for path in runs.index}
    vectors = choose_vectors(runs.iloc[0]).items() if len(drawn) else ()
    return {
        "files": list(map(str, runs.index)),
        "num_samples": len(samples),
        "num_failed": sum(len(read_table(path)) for path in beside if path.exists()),
        "attributes": {n: v if len(v) > 1 else runs[n].iloc[0] for n, v in values.items()},
        "sample": tree,
        "num_samples_read": len(drawn),
        "figures": {n: {"dim": d, **summarise(read_matrix(drawn, n, d))} for n, d in vectors},
        "samples": read_samples(shown).to_dict("records"),
    }


def one_line(value: object, width: int) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like escaped."""
    shown, used = "", 0
    for char in str(value):
        char = char if char.isprintable() else char.encode("unicode_escape").decode()
        used += sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in char)
        if used >= width:
            return shown + "…"
        shown += char
    return shown


def show(facts: dict, width: int) -> str:
    """The facts as text for a terminal; the samples' texts are cut at `width`."""
    files, total, num_read = facts["files"], facts["num_samples"], facts["num_samples_read"]
    lines = [files[0] if len(files) == 1 else f"{files[0]} ... {Path(files[-1]).name}"]
    lines += [f"{len(files)} parts, {total:,} samples, {facts['num_failed']:,} rows failed", ""]
    for name, value in facts["attributes"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"{name:<22}{one_line(shown, width)}")
    lines += ["", *(f"{path:<42}{what}" for path, what in facts["sample"].items())]
    lines += ["", f"{num_read:,} of {total:,} samples" + (" (drawn)" if num_read < total else "")]
    lines += [f"{'':36}   dim  mean L2  sd L2   max|x|   bad  cosine"]
    for name, (dim, *norms, bad, cosine) in ((n, f.values()) for n, f in facts["figures"].items()):
        cells = "".join(f"{x:8.4g}" if x and abs(x) < 1000 else f"{x or 0:8.0f}" for x in norms)
        cosine = "-" if cosine is None else f"{cosine:.4f}"
        lines.append(f"{name:<36}{dim:>6} {cells}{bad:6.1%}{cosine:>8}")
    for sample in facts["samples"]:
        lines += ["", f"{one_line(sample['question_id'], 40)}  {one_line(sample['image_id'], 38)}"]
        for name in ("question", "ground_truth_answer", "answer"):
            lines.append(f"  {name:<20}{one_line(sample[name], width)}")
    return "\n".join(lines)


# ──────────────────────────────────────────── verify ───────────────────────────────────────────

Findings = dict[tuple[Path, str], list[str]]  # by file and problem: the question_ids that have it


def verify_samples(
    file: h5py.File, names: list[str], vectors: dict[str, int], stored: dict, findings: Findings
) -> None:
    """Note what is wrong with samples of one file; what they say goes to `stored` by id."""
    path = Path(file.filename)
    texts = {}
    for name in names:
        try:
            texts[name] = read_texts(file, name)
            attributes = file[name].attrs
            for attribute in COUNTS - attributes.keys():
                findings[path, f"attribute {attribute} is missing"].append(unquote(name))
            if VISION_LINK not in file[name]:
                findings[path, f"{VISION_LINK} is missing"].append(unquote(name))
            if attributes["question_id"] != unquote(name):
                findings[path, "attribute question_id is another than the name"].append(
                    unquote(name)
                )
            if attributes["question_id"] in stored:
                findings[path, "question_id is there already"].append(attributes["question_id"])
            stored[attributes["question_id"]] = texts[name]
        except HDF5_ERRORS as error:
            findings[path, f"a text or attribute: {error.args[0]}"].append(unquote(name))
    for vector, width in vectors.items():
        errors = {}
        matrix = read_vectors(file, texts, vector, width, errors)
        for name, problem in errors.items():
            findings[path, problem].append(unquote(name))
        good = [name for name in texts if name not in errors]
        matrix = matrix[[name not in errors for name in texts]] if errors else matrix
        low, high = matrix.min(axis=1), matrix.max(axis=1)  # NaN if there is one
        for k in np.flatnonzero(~np.isfinite(high - low)):
            findings[path, f"{vector} is not finite"].append(unquote(good[k]))
        for k in np.flatnonzero(low == high):
            findings[path, f"{vector} holds one value only"].append(unquote(good[k]))
        depends_on = ("image_id",) if "vision" in vector else ("image_id", "question")
        inputs = {tuple(texts[name][key] for key in depends_on) for name in good}
        if len(inputs) > 1 and (matrix == matrix[0]).all():
            findings[path, f"{vector} is the same in {len(good)} samples"] = []


def verify(paths: list[Path], csv_path: Path | None = None) -> tuple[Findings, int]:
    """All that is wrong with a set of parts, and with the CSV beside them; the number of samples."""
    findings, stored, first, files = defaultdict(list), {}, {}, find_parts(paths)
    for directory in dict.fromkeys(path.parent for path in files):
        matches = (PART_PATTERN.fullmatch(p.name) for p in files if p.parent == directory)
        numbers = {int(match[1]) for match in matches if match}
        start = 1 if directory in paths else min(numbers, default=1)
        for number in sorted(set(range(start, max(numbers, default=0))) - numbers):
            findings[directory, f"part {number} is missing"] = []
    for path in files:
        try:
            attributes, names = open_part(path)
            first = first or attributes
            for name in sorted((first.keys() | attributes.keys()) - VARYING):
                if first.get(name) != attributes.get(name):
                    values = f"{attributes.get(name)!r}, not {first.get(name)!r} as in {files[0]}"
                    findings[path, f"{name} is {values}"] = []
            if attributes["num_samples"] != len(names):
                count = f"num_samples is {attributes['num_samples']}, but there are {len(names)}"
                findings[path, count] = []
            with opened(path) as file:
                for k in range(0, len(names), NUM_VERIFIED):
                    some, vectors = names[k : k + NUM_VERIFIED], choose_vectors(attributes)
                    verify_samples(file, some, vectors, stored, findings)
        except InspectError as error:
            findings[path, str(error)] = []
    if csv_path:
        compare_with_csv(csv_path, stored, findings)
    return findings, len(stored)


def compare_with_csv(csv_path: Path, stored: dict[str, dict], findings: Findings) -> None:
    """Note the rows that are missing, those that are no longer there, and texts that differ."""
    table = read_table(csv_path)
    for ours, names in CSV_NAMES.items():
        column = next((name for name in names if name in table), None)
        if column is None:
            raise InspectError(f"{csv_path} has no column {' or '.join(names)}")
        for question_id, text in table[column].items():
            if question_id in stored and stored[question_id][ours] != text:
                findings[csv_path, f"{ours} differs from what is stored"].append(question_id)
    for problem, ids in {
        "not in the parts": [i for i in table.index if i not in stored],
        "in the parts but not here": sorted(stored.keys() - set(table.index)),
    }.items():
        if ids:
            findings[csv_path, problem] = ids


# ───────────────────────────────────────── export, plot ────────────────────────────────────────


def export(path: Path, samples: pd.DataFrame, vectors: dict[str, int]) -> str:
    """Write the texts (.csv), or texts and matrices (.npz) one after the other; what is there."""
    read = read_samples(samples)[["question_id", *TEXTS]]
    partial, lines = path.with_name(path.name + ".partial"), [f"{path}: {len(samples):,} samples"]
    try:
        if path.suffix == ".csv":
            read.to_csv(partial, index=False)
        else:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name in (*read, *vectors):
                    is_text = name in read
                    array = (
                        read[name].to_numpy(str)
                        if is_text
                        else read_matrix(samples, name, vectors[name])
                    )
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
                    lines.append(f"  {name:<40}{array.dtype} {list(array.shape)}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return "\n".join(lines)


def principal_components(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two principal components of vectors [num_samples, D]: coordinates [num_samples, 2], shares.

    By the smaller of the two matrices of inner products; a share is of the whole variance.
    """
    centred = matrix - matrix.mean(axis=0, dtype=np.float64)
    is_wide = centred.shape[0] < centred.shape[1]
    products = centred @ centred.T if is_wide else centred.T @ centred
    values, axes = np.linalg.eigh(products)
    values, axes = values[:-3:-1].clip(0), axes[:, :-3:-1]
    points = axes * np.sqrt(values) if is_wide else centred @ axes
    points *= np.sign(points[np.abs(points).argmax(axis=0), [0, 1]])
    return points, values / max(np.trace(products), np.finfo(float).tiny)


def color_values(samples: pd.DataFrame, field: str) -> pd.Series:
    """What the points are coloured by: numbers or categories, NaN where there is no value."""
    table = read_samples(samples).set_index("question_id")
    csv_path, _, column = ("", "", field) if field in table else field.rpartition(":")
    if csv_path:
        table = read_table(Path(csv_path)).reindex(table.index)
    if column not in table:
        raise InspectError(f"--color-by {field}: no such column; there is {list(table)}")
    values = table[column].replace("", np.nan).reset_index(drop=True)
    if values.isna().all():
        raise InspectError(f"--color-by {field}: there is no value for any of the samples")
    numbers = pd.to_numeric(values, errors="coerce").replace([np.inf, -np.inf], np.nan)
    is_number = numbers.notna().sum() == values.notna().sum() and numbers.nunique() > 2
    return numbers.astype(float) if is_number else values.astype(str).where(values.notna())


def plot(path: Path, samples: pd.DataFrame, vectors: dict[str, int], field: str) -> str:
    """Draw the principal components, a panel for each data set; says what was drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InspectError("--plot needs matplotlib: pip install matplotlib") from error
    if len(samples) < 3:
        raise InspectError(f"a plot needs 3 samples; there are {len(samples)}")
    values = color_values(samples, field)
    is_number = pd.api.types.is_numeric_dtype(values)
    counts = values.value_counts()[: 0 if is_number else len(COLORS)]
    rest = values.isna() if is_number else ~values.isin(counts.index)
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers, so it comes last
    num_layers = len({name.partition("/")[2] for name in names if name != VISION})
    columns = num_layers if 2 < num_layers < 8 else int(np.ceil(np.sqrt(len(names))))
    rows = -(-len(names) // columns)
    figure = Figure((2.5 * columns + 2, 2.6 * rows + 0.4), layout="constrained", dpi=150)
    style = {"s": 16, "linewidths": 0.3, "edgecolors": "#333333", "alpha": 0.85}
    for k, name in enumerate(names, start=1):
        points, shares = principal_components(read_matrix(samples, name, vectors[name]))
        axes = figure.add_subplot(rows, columns, k, xticks=[], yticks=[])
        axes.set_title(
            f"{name.replace('/', chr(10))}: {shares[0]:.1%}, {shares[1]:.1%}", fontsize=8
        )
        handles, labels = [], []
        for value, color, marker in zip(counts.index, COLORS, MARKERS):
            at = points[values == value]
            handles.append(axes.scatter(*at.T, color=color, marker=marker, **style))
            labels.append(f"{one_line(value, 24)} ({len(at):,})")
        if is_number:
            scale = axes.scatter(*points[~rest].T, c=values[~rest], cmap="viridis", **style)
        if rest.any():
            handles.append(axes.scatter(*points[rest].T, color=GREY, s=8, zorder=0))
            labels.append(f"{'no value' if is_number else 'the rest'} ({rest.sum():,})")
    title = f"{len(samples):,} samples: PC 1 and PC 2, with their shares of the variance"
    figure.suptitle(title, fontsize=10)
    if is_number:
        figure.colorbar(scale, ax=figure.axes, label=one_line(field, 40), shrink=0.6)
    if handles:
        legend = figure.legend(handles, labels, loc="outside right upper", fontsize=8, title=field)
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
        figure.savefig(path)
    return f"{path}: {len(names)} panels of {len(samples):,} samples"


# ───────────────────────────────────────── command line ────────────────────────────────────────


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ends the process with status 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="part file, or directory of them")
    add("--max-samples", type=int, default=3, metavar="N", help="samples shown (default: 3)")
    add("--all", action="store_true", help="figures of all samples, not of 1,000 drawn ones")
    add("--json", action="store_true", help="the view as JSON")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--question-id", action="append", metavar="ID", help="view this; repeatable")
    modes.add_argument("--verify", action="store_true", help="look for all that can be wrong")
    modes.add_argument("--export", type=Path, metavar="FILE", help=".npz, or .csv for texts alone")
    modes.add_argument("--plot", type=Path, metavar="FILE", help="two principal components: .png")
    add("--vqa-dataset", type=Path, metavar="CSV", help="--verify: compare with what was asked")
    add("--representation", choices=(VISION, *KINDS), help="--export, --plot: this alone")
    add("--layer", type=int, metavar="I", help="--export, --plot: this layer alone")
    add(
        "--color-by",
        metavar="FIELD|CSV:COLUMN",
        help="--plot: a text, an attribute, a CSV's column",
    )
    args = parser.parse_args(argv)
    has_matrices = args.plot or (args.export and args.export.suffix == ".npz")
    is_view = not (args.verify or args.export or args.plot)
    for flags, is_given, fits in (
        ("--vqa-dataset", args.vqa_dataset, args.verify),
        ("--representation", args.representation, has_matrices),
        ("--layer", args.layer is not None, has_matrices),
        ("--color-by", args.color_by, args.plot),
        ("--all", args.all, is_view),
        ("--json", args.json, is_view),
        ("--max-samples below 0", args.max_samples < 0, False),
        (
            "--export other than .npz and .csv",
            args.export,
            str(args.export).endswith((".npz", ".csv")),
        ),
        (
            "--plot other than .png, .pdf and .svg",
            args.plot,
            str(args.plot).endswith((".png", ".pdf", ".svg")),
        ),
    ):
        if is_given and not fits:
            parser.error(f"{flags} does not go with the rest")
    return args


def run(args: argparse.Namespace) -> str:
    """What the command line asks for, but --verify, as text. Raises InspectError or OSError."""
    runs, samples = open_run(args.paths)
    vectors = choose_vectors(runs.iloc[0], args.representation, args.layer)
    if args.export:
        return export(args.export, samples, vectors)
    drawn = samples.sample(
        min(len(samples), NUM_PLOTTED if args.plot else NUM_SUMMARISED), random_state=0
    ).sort_index()
    if args.plot:
        return plot(args.plot, drawn, vectors, args.color_by or "ground_truth_answer")
    drawn, shown = samples if args.all else drawn, samples.head(args.max_samples)
    if args.question_id:
        ids = samples["name"].map(unquote)
        for question_id in set(args.question_id) - set(ids):
            near = difflib.get_close_matches(question_id, ids, cutoff=0.3) or list(ids[:3])
            raise InspectError(
                f"no question_id {question_id!r}; there is {', '.join(map(repr, near))}"
            )
        drawn = shown = samples[ids.isin(args.question_id)]
    facts = describe(runs, samples, drawn, shown)
    if args.json:
        return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    return show(facts, sys.maxsize if args.question_id else 57)


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not every script
    try:
        if not args.verify:
            print(run(args))
            return 0
        findings, count = verify(args.paths, args.vqa_dataset)
    except (InspectError, OSError) as error:
        print(one_line(error, 1000), file=sys.stderr)
        return 1
    for (path, problem), ids in findings.items():
        who = (
            f" ({len(ids):,}: {', '.join(map(repr, ids[:3]))}{', ...' * (len(ids) > 3)})"
            if ids
            else ""
        )
        print(one_line(f"{path}: {problem}{who}", 1000))
    if not findings:
        print(f"{count:,} samples, nothing wrong")
    return 1 if findings else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    raise SystemExit(main())
