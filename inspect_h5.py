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

import argparse
import contextlib
import difflib
import json
import signal
import sys
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd

VISION, LINK = "vision_representation", "vision_only_representation"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
TEXTS = ("image_id", "question", "answer", "ground_truth_answer")
COUNTS = ("row", "num_prompt_tokens", "vision_token_pos", "query_token_pos", "num_answer_tokens")
REQUIRED = {"model_name", "layers", "hidden_size", "vision_hidden_size", "num_samples"}
VARYING = {"num_samples", "created_at", "device", "dataset", "dataset_sha256"}  # from part to part
VARYING |= {"python_version", "torch_version", "transformers_version"}
NUM_DRAWN, BLOCK = 1000, 64  # samples in the table and the plot; in memory in --verify
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
STRING = h5py.string_dtype()
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00 #F0E442 #882255 #999933".split()
MARKERS, GREY = "os^Dv*P<X>", "#BBBBBB"
Paths = str | Path | Iterable[str | Path]


class InspectError(Exception):
    """What was asked for cannot be done; the message says why."""


# ────────────────────────────────────── parts and samples ──────────────────────────────────────


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file; what HDF5 has against it becomes an InspectError."""
    try:
        with h5py.File(path) as file:
            yield file
    except HDF5_ERRORS as error:
        raise InspectError(f"{path} cannot be read: {error.args[-1]}") from error


def find_parts(paths: Paths) -> list[Path]:
    """The files among `paths` and the part files in the directories among them, none twice."""
    found: dict[Path, Path] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        inside = [path] if path.is_file() else path.glob("gemma3_12b_embeddings_part_*.h5")
        inside = sorted(inside, key=lambda p: (len(p.name), p.name))  # part_1000 after part_999
        if not inside:
            raise InspectError(f"{path} is no file, and no directory with part files in it")
        found |= {p.resolve(): p for p in inside if p.resolve() not in found}
    return list(found.values())


def open_part(path: Path) -> tuple[dict, list[str]]:
    """A part's attributes and the names of its samples. Raises InspectError if it is no part."""
    with opened(path) as file:
        attributes = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in file.attrs.items()}
        names = list(file)
    if missing := REQUIRED - attributes.keys():
        raise InspectError(f"{path} is no part of an extraction: no attribute {min(missing)}")
    return attributes, names


def differing_settings(first: dict, other: dict) -> list[str]:
    """What makes them parts of different runs, with both values."""
    names = sorted((first.keys() | other.keys()) - VARYING)
    pairs = {name: (first.get(name), other.get(name)) for name in names}
    return [f"{name} is {b!r}, elsewhere {a!r}" for name, (a, b) in pairs.items() if a != b]


def open_run(paths: Paths) -> tuple[dict[Path, dict], pd.DataFrame]:
    """The parts' attributes, and all samples in order: path, name (of the group), row.

    Raises InspectError: no parts, parts of different runs, or an id twice.
    """
    parts, samples = {}, []
    for path in find_parts(paths):
        parts[path], names = open_part(path)
        if differing := differing_settings(next(iter(parts.values())), parts[path]):
            raise InspectError(f"{path} is of another run: {differing[0]}")
        with opened(path) as file:
            samples += sorted(
                ((path, name, read_attribute(file, name, "row", int)) for name in names),
                key=lambda s: s[2],
            )
    table = pd.DataFrame(samples, columns=["path", "name", "row"])
    for name in table["name"][table["name"].duplicated()]:
        raise InspectError(f"question_id {unquote(name)!r} is in two parts; see --verify")
    return parts, table


def choose_vectors(attributes: dict, kind: str | None = None, layer: int | None = None) -> dict:
    """The data sets of a representation, of a layer, of both, or all; and their lengths."""
    layers, width = attributes["layers"], attributes["hidden_size"]
    there = {VISION: attributes["vision_hidden_size"]}
    there |= {f"{k}/layer_{i}": width for k in KINDS for i in layers}
    suffix = "" if layer is None else f"/layer_{layer}"
    chosen = {n: d for n, d in there.items() if n.startswith(kind or "") and n.endswith(suffix)}
    if not chosen:
        raise InspectError(f"no layer {layer} of {kind or 'any kind'}; there is {', '.join(there)}")
    return chosen


# Below are HDF5's own calls: `file[name][()]` takes four times as long on vectors this short.


def read_attribute(file: h5py.File, name: str, attribute: str, dtype: np.dtype | type):
    """One of a sample's attributes. Raises one of HDF5_ERRORS."""
    value = np.empty((), dtype)
    h5py.h5a.open(file.id, attribute.encode(), obj_name=name.encode()).read(value)
    return value.item()


def read_texts(file: h5py.File, name: str) -> dict[str, str]:
    """A sample's question_id and texts. Raises one of HDF5_ERRORS."""
    texts, value = {"question_id": unquote(name)}, np.empty((), STRING)
    for text in TEXTS:
        dataset = h5py.h5d.open(file.id, f"{name}/{text}".encode())
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, value)
        texts[text] = value.item().decode()
    return texts


def read_vectors(file: h5py.File, names: list[str], vector: str, out: np.ndarray) -> dict[str, str]:
    """Read one vector of each sample into `out` [num_samples, D]; what went wrong, by name."""
    problems, space = {}, h5py.h5s.create_simple(out.shape[1:])  # another length is an error
    for name, row in zip(names, out, strict=True):
        try:
            dataset = h5py.h5d.open(file.id, f"{name}/{vector}".encode())
            dataset.read(space, h5py.h5s.ALL, row, h5py.h5t.NATIVE_FLOAT)
        except HDF5_ERRORS as error:
            problems[name] = f"{vector}: {error.args[0]}"
    return problems


def read_samples(samples: pd.DataFrame) -> pd.DataFrame:
    """question_id, texts and attributes, in the order of `samples`."""
    read = []
    for path, names in samples.groupby("path", sort=False)["name"]:
        with opened(path) as file:
            read += [{**read_texts(file, name), **file[name].attrs} for name in names]
    return pd.DataFrame(read, columns=None if read else ["question_id", *TEXTS, *COUNTS])


def read_matrix(samples: pd.DataFrame, vector: str, width: int) -> np.ndarray:
    """One vector of each sample, in their order: float32 [num_samples, width]."""
    matrix, stop = np.empty((len(samples), width), np.float32), 0
    for path, names in samples.groupby("path", sort=False)["name"]:
        start, stop = stop, stop + len(names)
        with opened(path) as file:
            for name, problem in read_vectors(file, names, vector, matrix[start:stop]).items():
                raise InspectError(f"{path}, {unquote(name)!r}: {problem}; see --verify")
    return matrix


def load_embeddings(
    paths: Paths, representation: str, layer: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """The samples' texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are files or directories; `vision_representation` has no layer. Raises InspectError.
    """
    parts, samples = open_run(paths)
    vectors = choose_vectors(next(iter(parts.values())), representation, layer)
    if len(vectors) > 1:
        raise InspectError(f"{representation}: say which layer of {', '.join(vectors)}")
    return read_samples(samples), read_matrix(samples, *vectors.popitem())


def read_table(path: Path) -> pd.DataFrame:
    """A CSV by question_id, text as it stands. Raises InspectError if it cannot be that."""
    try:
        table = pd.read_csv(path, dtype=str, na_filter=False, index_col=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InspectError(f"{path} cannot be read: {error}") from error
    if "question_id" not in table or table["question_id"].duplicated().any():
        raise InspectError(f"{path} has no column question_id, or an id in it twice")
    return table.set_index("question_id")


# ─────────────────────────────────────────── the view ──────────────────────────────────────────


def summarise(matrix: np.ndarray) -> dict[str, float | None]:
    """The figures of vectors [num_samples, D]; norms and cosine are of those that are finite."""
    finite = np.isfinite(matrix)
    whole = matrix if finite.all() else matrix[finite.all(axis=1)]
    norms = np.sqrt(np.einsum("nd,nd->n", whole, whole, dtype=np.float64))
    n, units = np.count_nonzero(norms), whole[norms > 0] / norms[norms > 0, None]
    # |sum of u|² holds n squares of unit vectors, and the cosine of every pair twice.
    pairs = np.sum(units.sum(axis=0) ** 2) - n
    return {
        "norm_mean": float(norms.mean()) if len(norms) else None,
        "norm_std": float(norms.std()) if len(norms) else None,
        "max_abs": float(np.abs(matrix).max(initial=0, where=finite)),
        "nonfinite_share": float(1 - finite.mean()),
        "mean_cosine": float(pairs / (n * (n - 1))) if n > 1 else None,
    }


def describe_sample(group: h5py.Group) -> dict[str, str]:
    """What a sample holds, by path: type, shape and compression as they are in the file."""
    tree = {}

    def visit(path: str, member: h5py.Group | h5py.Dataset) -> None:
        if isinstance(member, h5py.Dataset) and h5py.check_string_dtype(member.dtype):
            tree[path] = "text"
        elif isinstance(member, h5py.Dataset):  # h5py shows bfloat16 as the float32 it reads
            is_bfloat16 = member.dtype == np.float32 and member.id.get_type().get_size() == 2
            dtype = "bfloat16" if is_bfloat16 else member.dtype
            tree[path] = f"{dtype} {list(member.shape)} {member.compression or ''}".rstrip()

    group.visititems(visit)
    return tree | ({LINK: f"-> {VISION}"} if LINK in group else {})


def describe(parts: dict[Path, dict], samples, drawn, shown, vectors: dict[str, int]) -> dict:
    """All that the view says: the run, a sample's tree, figures of `drawn`, texts of `shown`."""
    first, tree, figures = next(iter(parts.values())), {}, {}
    for path, name in drawn[["path", "name"]].values[:1]:
        with opened(path) as file:
            tree = describe_sample(file[name])
    for name, width in vectors.items() if len(drawn) else ():
        figures[name] = {"dim": width, **summarise(read_matrix(drawn, name, width))}
    order = [*TEXTS, VISION, LINK, *choose_vectors(first)]
    beside = {path.with_name("failed_samples.csv") for path in parts}
    return {
        "files": [str(path) for path in parts],
        "num_samples": len(samples),
        "num_failed": sum(len(read_table(path)) for path in beside if path.exists()),
        "settings": {name: value for name, value in first.items() if name not in VARYING},
        "by_part": {n: [part.get(n) for part in parts.values()] for n in sorted(VARYING)},
        "sample": {path: tree[path] for path in sorted(tree, key=(order + list(tree)).index)},
        "num_samples_read": len(drawn),
        "figures": figures,
        "samples": json.loads(read_samples(shown).to_json(orient="records")),  # NaN is null
    }


def one_line(value: object, width: int = sys.maxsize) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like escaped."""
    chars = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    text = "".join(chars)
    used = np.cumsum([1 + (unicodedata.east_asian_width(char) in "WF") for char in text])
    end = int(np.searchsorted(used, width))  # the first character that does not fit
    return text if end == len(text) else f"{text[:end]}…"


def show(facts: dict, width: int) -> str:
    """The facts for a terminal of 80 columns; `width` cuts what need not be whole."""
    files, total, num_read = facts["files"], facts["num_samples"], facts["num_samples_read"]
    lines = [files[0], *(["... " + files[-1]] if len(files) > 1 else [])]
    lines += [f"parts: {len(files)}, samples: {total:,}, failed: {facts['num_failed']:,}", ""]
    by_part = {name: sorted(set(map(str, values))) for name, values in facts["by_part"].items()}
    for name, value in (facts["settings"] | by_part).items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"{name:<22}{one_line(text, width)}")
    lines += ["", *(f"{path:<38}{what}" for path, what in facts["sample"].items()), ""]
    drawn = " (drawn at random; --all reads all)" if num_read < total else ""
    lines.append(f"figures of {num_read:,} samples{drawn}")
    lines.append(f"{'':36}  dim  mean L2   sd L2 max |x|   bad  cosine")
    for name, (dim, *sizes, bad, cosine) in ((n, f.values()) for n, f in facts["figures"].items()):
        sizes = [f"{x or 0:.0f}" if x is None or x >= 1000 else f"{x:.4g}" for x in sizes]
        cells = [f"{name:<36}{dim:>5} ", *(f"{x:>8}" for x in sizes), f"{bad:6.1%}"]
        lines.append("".join(cells) + (f"{cosine:8.4f}" if cosine is not None else f"{'-':>8}"))
    for sample in facts["samples"]:
        lines += ["", one_line(f"{sample['question_id']}  {sample['image_id']}", 80)]
        names = ("question", "ground_truth_answer", "answer") if width < 80 else sample
        lines += [f"  {name:<20}{one_line(sample[name], width)}" for name in names]
    return "\n".join(lines)


# ──────────────────────────────────────────── verify ───────────────────────────────────────────


def verify_samples(file, names, vectors, stored) -> Iterator[tuple[str, str]]:
    """What is wrong with samples of one file, and with which; `stored` takes texts by id."""
    texts = {}
    for name in names:
        try:
            group, texts[name] = h5py.h5g.open(file.id, name.encode()), read_texts(file, name)
            question_id = read_attribute(file, name, "question_id", STRING).decode()
            missing = [n for n in COUNTS if not h5py.h5a.exists(group, n.encode())]
            for member in missing + ([] if LINK.encode() in group else [LINK]):
                yield f"{member} is missing", question_id
            if question_id != unquote(name) or question_id in stored:
                yield "question_id is there twice, or not what the group is called", question_id
            stored[question_id] = texts[name]
        except HDF5_ERRORS as error:
            yield f"texts or attributes: {error.args[0]}", unquote(name)
    for vector, width in vectors.items():
        matrix = np.empty((len(texts), width), np.float32)
        problems = read_vectors(file, list(texts), vector, matrix)
        good = np.array([name for name in texts if name not in problems], dtype=object)
        matrix = matrix[[name not in problems for name in texts]] if problems else matrix
        low, high = matrix.min(axis=1), matrix.max(axis=1)  # NaN if there is one
        inputs = TEXTS[:1] if "vision" in vector else TEXTS[:2]  # what the vector depends on
        is_varied = len({tuple(texts[name][n] for n in inputs) for name in good}) > 1
        problems |= dict.fromkeys(good[low == high], f"{vector} has only one value")
        if is_varied and (matrix == matrix[0]).all():
            problems |= dict.fromkeys(good, f"{vector} is the same in all samples")
        is_finite = np.isfinite([low, high]).all(axis=0)
        problems |= dict.fromkeys(good[~is_finite], f"{vector} is not finite")
        yield from ((problem, unquote(name)) for name, problem in problems.items())


def verify(paths: list[Path], csv_path: Path | None, stored: dict) -> Iterator[tuple]:
    """Everything that is wrong: the file, the problem, and which sample has it, or None."""
    files, first = find_parts(paths), {}
    for directory in dict.fromkeys(path.parent for path in files):
        ends = (p.stem.rpartition("_part_")[2] for p in files if p.parent == directory)
        numbers = {int(end) for end in ends if end.isdigit()} or {1}
        start = 1 if directory in paths else min(numbers)
        for number in sorted(set(range(start, max(numbers))) - numbers):
            yield directory, f"part {number} is missing", None
    for path in files:
        try:
            attributes, names = open_part(path)
            first = first or attributes
            yield from ((path, problem, None) for problem in differing_settings(first, attributes))
            if attributes["num_samples"] != len(names):
                count = f"num_samples is {attributes['num_samples']}, there are {len(names)}"
                yield path, count, None
            vectors = choose_vectors(attributes)
            with opened(path) as file:
                for k in range(0, len(names), BLOCK):
                    for finding in verify_samples(file, names[k : k + BLOCK], vectors, stored):
                        yield path, *finding
        except InspectError as error:
            yield path, str(error).removeprefix(f"{path} "), None
    table = read_table(csv_path) if csv_path else pd.DataFrame(index=list(stored))
    yield from ((csv_path, "not in the parts", i) for i in table.index if i not in stored)
    yield from ((csv_path, "in the parts but not here", i) for i in stored if i not in table.index)
    other_names = {"image_name": "image_id", "gt_answer": "answer"}
    table = table.rename(columns={a: b for a, b in other_names.items() if b not in table})
    for ours in ("image_id", "question", "ground_truth_answer") if csv_path else ():
        theirs = ours.removeprefix("ground_truth_")
        if theirs not in table:
            raise InspectError(f"{csv_path} has no column {theirs}")
        for question_id, text in table[theirs].items():
            if question_id in stored and stored[question_id][ours] != text:
                yield csv_path, f"{ours} is another than in the parts", question_id


# ───────────────────────────────────────── export, plot ────────────────────────────────────────


def export(path: Path, samples: pd.DataFrame, vectors: dict[str, int]) -> str:
    """Write the texts (.csv), or texts and matrices one after the other (.npz); what it holds."""
    texts = read_samples(samples)[["question_id", *TEXTS]]
    lines, partial = [f"{path}: {len(samples):,} samples"], path.with_name(f"{path.name}.partial")
    try:
        if path.suffix == ".csv":
            texts.to_csv(partial, index=False)
        else:
            with zipfile.ZipFile(partial, "w") as archive:
                for name in (*texts, *vectors):
                    width = vectors.get(name)
                    array = (
                        read_matrix(samples, name, width) if width else texts[name].to_numpy(str)
                    )
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
                    lines.append(f"{name:<38}{array.dtype} {list(array.shape)}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return "\n".join(lines)


def principal_components(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [num_samples, D] on their first two axes [num_samples, 2]; shares of the variance."""
    centred = matrix - matrix.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred @ centred.T)  # ascending; NUM_DRAWN samples at most
    values, axes = values[::-1].clip(0), axes[:, ::-1]
    shares = values / max(values.sum(), np.finfo(float).tiny)
    points = axes[:, :2] * np.sqrt(values[:2])
    sign = np.sign(points[np.abs(points).argmax(axis=0), [0, 1]])  # eigh may give either
    return points * sign, shares[:2]


def color_values(samples: pd.DataFrame, field: str) -> pd.Series:
    """What the points are coloured by: numbers or texts, NaN where there is no value."""
    table = read_samples(samples).set_index("question_id")
    csv_path, _, column = ("", "", field) if field in table else field.rpartition(":")
    if csv_path:
        table = read_table(Path(csv_path)).reindex(table.index)
    if column not in table or table[column].isna().all():
        raise InspectError(f"--color-by {field}: no values in {csv_path or 'the samples'} for that")
    values = table[column].replace("", np.nan).reset_index(drop=True)
    numbers = pd.to_numeric(values, errors="coerce").replace([np.inf, -np.inf], np.nan)
    is_number = numbers.notna().sum() == values.notna().sum() and numbers.nunique() > 2
    return numbers.astype(float) if is_number else values.astype(object)


def plot(path: Path, samples: pd.DataFrame, total: int, vectors: dict, field: str) -> str:
    """Plot these of `total` samples on their principal components, a panel for each data set."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InspectError("--plot needs matplotlib: pip install matplotlib") from error
    if len(samples) < 3:
        raise InspectError(f"a plot needs 3 samples; there are {len(samples)}")
    values = color_values(samples, field)
    is_number = pd.api.types.is_float_dtype(values)
    counts = values.value_counts()[: 0 if is_number else len(COLORS)]
    rest = values.isna() if is_number else ~values.isin(counts.index)
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers: last
    num_layers = len({name.partition("/")[2] for name in names if name != VISION})
    columns = min(8, num_layers if num_layers > 1 else len(names))
    rows = -(-len(names) // columns)
    figure = Figure((2.5 * columns + 2, 2.6 * rows + 0.5), layout="constrained", dpi=150)
    figure.suptitle(
        f"Principal components 1 and 2\n{len(samples):,} of {total:,} samples", fontsize=9
    )
    style = {"s": 16, "linewidths": 0.3, "edgecolors": "#333333", "alpha": 0.85}
    for k, name in enumerate(names, start=1):
        matrix, keys = read_matrix(samples, name, vectors[name]), []
        if not np.isfinite(matrix).all():
            raise InspectError(f"{name} is not finite everywhere; see --verify")
        points, shares = principal_components(matrix)
        axes = figure.add_subplot(rows, columns, k, xticks=[], yticks=[])
        title = f"{name}/{shares[0]:.1%} + {shares[1]:.1%} of variance"
        axes.set_title(title.replace("/", "\n"), fontsize=8)
        if is_number:
            scale = axes.scatter(*points[~rest].T, c=values[~rest], cmap="viridis", **style)
        for value, color, marker in zip(counts.index, COLORS, MARKERS):
            mark = style | {"color": color, "marker": marker}
            label = f"{one_line(value, 24)} ({counts[value]:,})"
            keys.append((axes.scatter(*points[values == value].T, **mark), label))
        if rest.any():
            label = f"{'no value' if is_number else 'all others'} ({rest.sum():,})"
            keys.append((axes.scatter(*points[rest].T, color=GREY, s=8, zorder=0), label))
    if keys:
        at = {"loc": "outside right upper", "fontsize": 8, "title_fontsize": 8}
        legend = figure.legend(*zip(*keys), title=one_line(Path(field).name, 30), **at)
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_parse_math(False)
    if is_number:
        figure.colorbar(scale, ax=figure.axes, label=one_line(Path(field).name, 40), shrink=0.6)
    warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
    figure.savefig(path)
    return f"{path}: {len(names)} panels of {len(samples):,} of {total:,} samples"


# ───────────────────────────────────────── command line ────────────────────────────────────────


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ends the process with status 2 if it makes no sense."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add, modes = parser.add_argument, parser.add_mutually_exclusive_group()
    add("paths", nargs="+", type=Path, metavar="PATH", help="part file, or directory of them")
    modes.add_argument("--question-id", action="append", metavar="ID", help="view this; repeatable")
    modes.add_argument("--verify", action="store_true", help="look for all that can be wrong")
    modes.add_argument("--export", type=Path, metavar="FILE", help=".npz, or .csv for texts alone")
    modes.add_argument("--plot", type=Path, metavar="FILE", help=".png, .pdf or .svg")
    add("--max-samples", type=int, default=3, metavar="N", help="samples to view (default: 3)")
    add("--all", action="store_true", help="view: figures of all samples, not of 1,000")
    add("--json", action="store_true", help="view: for programs")
    add("--vqa-dataset", type=Path, metavar="CSV", help="verify: compare with this table")
    add("--representation", choices=(VISION, *KINDS), help="view, export, plot: only this one")
    add("--layer", type=int, metavar="I", help="view, export, plot: only this one")
    add("--color-by", metavar="WHAT", help="plot: ground_truth_answer, answer, ... or CSV:COLUMN")
    args = parser.parse_args(argv)
    is_view = not (args.verify or args.export or args.plot)
    for flags, is_wrong in {
        "--max-samples below 0": args.max_samples < 0,
        "--all or --json without a view": (args.all or args.json) and not is_view,
        "--representation with --verify": args.verify and args.representation,
        "--layer with --verify": args.verify and args.layer is not None,
        "--vqa-dataset without --verify": args.vqa_dataset and not args.verify,
        "--color-by without --plot": args.color_by and not args.plot,
        "--export of that type": args.export and args.export.suffix not in (".npz", ".csv"),
        "--plot of that type": args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"),
    }.items():
        if is_wrong:
            parser.error(f"{flags} makes no sense")
    return args


def run(args: argparse.Namespace) -> str:
    """What is to be printed, of everything but --verify. Raises InspectError or OSError."""
    parts, samples = open_run(args.paths)
    vectors = choose_vectors(next(iter(parts.values())), args.representation, args.layer)
    if args.export:
        return export(args.export, samples, vectors)
    drawn = samples.sample(min(len(samples), NUM_DRAWN), random_state=0).sort_index()
    if args.plot:
        return plot(args.plot, drawn, len(samples), vectors, args.color_by or TEXTS[-1])
    drawn, shown = samples if args.all else drawn, samples[: args.max_samples]
    if args.question_id:
        ids = samples["name"].map(unquote)
        for unknown in set(args.question_id) - set(ids):
            near = difflib.get_close_matches(unknown, ids, cutoff=0.3) or ids[:3]
            raise InspectError(f"no question_id {unknown!r}; near it: {', '.join(map(repr, near))}")
        drawn = shown = samples[ids.isin(args.question_id)]
    facts = describe(parts, samples, drawn, shown, vectors)
    if args.json:
        return json.dumps(facts, ensure_ascii=False, allow_nan=False, indent=1, default=str)
    return show(facts, width=sys.maxsize if args.question_id else 58)


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    args, findings, stored = parse(argv), {}, {}
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not every script
    try:
        if not args.verify:
            print(run(args))
            return 0
        for path, problem, who in verify(args.paths, args.vqa_dataset, stored):
            findings.setdefault((path, problem), []).append(who)
    except (InspectError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    for (path, problem), ids in findings.items():
        some = ", ".join(map(repr, ids[:3])) + ", ..." * (len(ids) > 3)
        print(one_line(f"{path}: {problem}" + f" ({len(ids):,}: {some})" * (ids[0] is not None)))
    if not findings:
        print(f"nothing wrong with {len(stored):,} samples")
    return bool(findings)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    raise SystemExit(main())
