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
import itertools
import json
import signal
import sys
import unicodedata
import warnings
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
VARYING = {"created_at", "device", "dataset", "dataset_sha256"}  # from part to part
VARYING |= {"python_version", "torch_version", "transformers_version"}
NUM_DRAWN = 1000  # samples in the table and the plot
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00 #F0E442 #882255 #999933".split()
MARKERS = "os^Dv*P<X>"
Paths = str | Path | Iterable[str | Path]
Samples = list[tuple[Path, str]]  # the file, and the group's name in it
Findings = dict[str, list[str]]  # what is wrong, and the question_ids that it is wrong with


class InspectError(Exception):
    """What was asked for cannot be done; the message says why."""


# ────────────────────────────────────── parts and samples ──────────────────────────────────────


@contextlib.contextmanager
def explained(what: object) -> Iterator[None]:
    """Turn what HDF5 or pandas has against a file or a sample into an InspectError."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise InspectError(f"{what} cannot be read: {error.args[-1]}") from error


def find_parts(paths: Paths) -> list[Path]:
    """The files among `paths` and the part files in the directories among them, none twice."""
    found: dict[Path, Path] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        inside = [path] if path.is_file() else path.glob("gemma3_12b_embeddings_part_*.h5")
        inside = sorted(inside, key=lambda part: (len(part.name), part.name))  # 1000 after 999
        if not inside:
            raise InspectError(f"{path} is no file, and no directory with part files in it")
        found |= {part.resolve(): part for part in inside if part.resolve() not in found}
    return list(found.values())


def scan_parts(paths: Paths, is_strict: bool = True) -> tuple[dict[Path, dict], Samples, Findings]:
    """The parts' attributes, all samples in order, why they are not one run; raised if strict."""
    parts, samples, findings = {}, {}, {}
    for path in find_parts(paths):
        try:
            with h5py.File(path) as file:
                part = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
                rows = {name: file[name].attrs.get("row", -1) for name in file}
            choose_vectors(part)
        except HDF5_ERRORS as error:
            findings[f"{path}: cannot be read as a part: {error}"] = []
            continue
        expected = next(iter(parts.values()), part) | {"num_samples": len(rows)}
        for key in sorted((part.keys() | expected.keys()) - VARYING):
            if part.get(key) != expected.get(key):
                findings[f"{path}: {key} is {part.get(key)!r}, not {expected.get(key)!r}"] = []
        if twice := sorted(rows.keys() & samples.keys()):
            findings[f"{path}: question_id is there twice"] = list(map(unquote, twice))
        samples |= {name: path for name in sorted(rows, key=rows.get) if name not in samples}
        parts[path] = part
    if findings and is_strict:
        raise InspectError(next(iter(findings)))
    return parts, [(path, name) for name, path in samples.items()], findings


def choose_vectors(part: dict, kind: str | None = None, layer: int | None = None) -> dict[str, int]:
    """The data sets of a representation, of a layer, of both, or all; and their lengths."""
    there = {VISION: part["vision_hidden_size"]}
    there |= {f"{k}/layer_{i}": part["hidden_size"] for k in KINDS for i in part["layers"]}
    suffix = "" if layer is None else f"/layer_{layer}"
    chosen = {n: d for n, d in there.items() if n.startswith(kind or "") and n.endswith(suffix)}
    if not chosen:
        raise InspectError(f"no layer {layer} of {kind or 'any kind'}; there is {', '.join(there)}")
    return chosen


def read(file: h5py.File, name: str, member: str, width: int | None = None) -> np.ndarray:
    """A vector of this width, or a text. h5py's `file[path][()]` takes four times as long."""
    shape, dtype = ((), h5py.string_dtype()) if width is None else ((width,), np.float32)
    values, space = np.empty(shape, dtype), h5py.h5s.create_simple(shape)
    h5py.h5d.open(file.id, f"{name}/{member}".encode()).read(space, h5py.h5s.ALL, values)
    return values


def read_sample(file: h5py.File, name: str) -> dict:
    """A sample's question_id, texts and attributes."""
    texts = {text: read(file, name, text).item().decode() for text in TEXTS}
    return {"question_id": unquote(name), **texts, **file[name].attrs}


def each(samples: Samples, function: Callable, *args) -> Iterator:
    """`function(file, name, *args)` of every sample."""
    for path, inside in itertools.groupby(samples, key=lambda sample: sample[0]):
        with h5py.File(path) as file:
            for _, name in inside:
                with explained(f"{path}, {unquote(name)!r}"):
                    yield function(file, name, *args)


def read_samples(samples: Samples) -> pd.DataFrame:
    """question_id, texts and attributes, in the order of `samples`."""
    rows = list(each(samples, read_sample))
    return pd.DataFrame(rows, columns=None if rows else ["question_id", *TEXTS, *COUNTS])


def read_matrix(samples: Samples, vector: str, width: int) -> np.ndarray:
    """One vector of each sample, in their order: float32 [num_samples, width]."""
    rows = each(samples, read, vector, width)
    return np.fromiter(rows, np.dtype((np.float32, width)), len(samples))


def load_embeddings(
    paths: Paths, representation: str, layer: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """All samples' texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are files or directories; `vision_representation` has no layer. Raises InspectError.
    """
    parts, samples, _ = scan_parts(paths)
    vectors = choose_vectors(next(iter(parts.values())), representation, layer)
    if len(vectors) > 1:
        raise InspectError(f"{representation}: say which layer of {', '.join(vectors)}")
    return read_samples(samples), read_matrix(samples, *vectors.popitem())


def read_table(path: Path) -> pd.DataFrame:
    """A CSV by question_id, text as it stands. Raises InspectError if it cannot be that."""
    with explained(path):
        table = pd.read_csv(path, dtype=str, na_filter=False, index_col=False, encoding="utf-8-sig")
        table = table.set_index("question_id")
        if not table.index.is_unique:
            raise ValueError("a question_id is there twice")
    return table


# ─────────────────────────────────────────── the view ──────────────────────────────────────────


def summarise(matrix: np.ndarray) -> dict[str, float | None]:
    """The figures of vectors [num_samples, D]; norms and cosine are of those that are finite."""
    finite = np.isfinite(matrix)
    whole = matrix[finite.all(axis=1)]
    norms = np.sqrt(np.einsum("nd,nd->n", whole, whole, dtype=np.float64))
    n, units = np.count_nonzero(norms), whole[norms > 0] / norms[norms > 0, None]
    # |sum of u|² holds n squares of unit vectors, and the cosine of every pair twice.
    pairs = np.sum(units.sum(axis=0) ** 2) - n
    return {
        "dim": matrix.shape[1],
        "norm_mean": float(norms.mean()) if len(norms) else None,
        "norm_std": float(norms.std()) if len(norms) else None,
        "max_abs": float(np.abs(matrix).max(initial=0, where=finite)),
        "nonfinite_share": float(1 - finite.mean()),
        "mean_cosine": float(pairs / (n * (n - 1))) if n > 1 else None,
    }


def describe_sample(file: h5py.File, name: str, vectors: Iterable[str]) -> dict[str, str]:
    """What a sample holds: types, shapes and compression as they are in the file."""
    tree = dict.fromkeys(TEXTS, "text") | {LINK: f"-> {VISION}"}
    for vector in vectors:
        dataset = file[f"{name}/{vector}"]  # h5py shows bfloat16 as what it reads: float32
        is_bfloat16 = dataset.dtype == np.float32 and dataset.id.get_type().get_size() == 2
        dtype = "bfloat16" if is_bfloat16 else dataset.dtype
        tree[vector] = f"{dtype} {list(dataset.shape)} {dataset.compression or ''}".rstrip()
    return tree


def describe(parts: dict, samples: Samples, drawn: Samples, shown: Samples, vectors: dict) -> dict:
    """All that the view says: the run, a sample's tree, figures of `drawn`, texts of `shown`."""
    first = next(iter(parts.values()))
    settings = {key: [part.get(key) for part in parts.values()] for key in first}
    failed = {path.with_name("failed_samples.csv") for path in parts}
    return {
        "files": list(map(str, parts)),
        "num_samples": len(samples),
        "num_failed": sum(len(read_table(path)) for path in failed if path.exists()),
        "settings": {k: v if v != v[:1] * len(v) else v[0] for k, v in settings.items()},
        "sample": next(each(drawn[:1], describe_sample, choose_vectors(first)), {}),
        "num_samples_read": len(drawn),
        "figures": {n: summarise(read_matrix(drawn, n, vectors[n])) for n in vectors if drawn},
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
    lines = [" ...\n".join(dict.fromkeys([files[0], files[-1]]))]
    lines += [f"parts: {len(files)}, samples: {total:,}, failed: {facts['num_failed']:,}", ""]
    settings = {name: str(value).strip("[]") for name, value in facts["settings"].items()}
    lines += [f"{name:<22}{one_line(value, width)}" for name, value in settings.items()]
    lines += ["", *(f"{path:<38}{what}" for path, what in facts["sample"].items()), ""]
    drawn = " (drawn at random; --all reads all)" * (num_read < total)
    lines += [
        f"figures of {num_read:,} samples{drawn}",
        f"{'':36}  dim  mean L2   sd L2 max |x|   bad  cosine",
    ]
    for name, figures in facts["figures"].items():
        dim, *sizes, bad, cosine = (np.nan if x is None else x for x in figures.values())
        cells = (f"{x:8.0f}" if x >= 1000 else f" {x:7.4g}" for x in sizes)
        lines.append(f"{name:<36}{dim:>5} {''.join(cells)}{bad:6.1%}{cosine:8.4f}")
    for sample in facts["samples"]:
        lines += ["", one_line(f"{sample['question_id']}  {sample['image_id']}", 80)]
        names = ("question", "ground_truth_answer", "answer") if width < 80 else sample
        lines += [f"  {name:<20}{one_line(sample[name], width)}" for name in names]
    return "\n".join(lines)


# ──────────────────────────────────────────── verify ───────────────────────────────────────────


def verify_sample(file: h5py.File, name: str, parts: dict[Path, dict]) -> dict:
    """A sample's texts, a hash of each vector, and the problems with it."""
    path, problems = Path(file.filename), []
    sample = {"path": path, "question_id": unquote(name), "problems": problems}
    try:
        sample, group = sample | read_sample(file, name), file[name]
    except HDF5_ERRORS as error:
        problems.append(f"texts or attributes: {error.args[0]}")
        return sample
    missing = {"question_id", *COUNTS, LINK} - {*group, *group.attrs}
    problems += [f"{member} is missing" for member in sorted(missing)]
    if sample["question_id"] != unquote(name):
        problems.append("question_id is not what the group is called")
    for vector, width in choose_vectors(parts[path]).items():
        try:
            values = read(file, name, vector, width)
            sample[vector] = hash(values.tobytes())
            if not np.isfinite(values).all():
                raise ValueError("not finite")
            if (values == values[0]).all():
                raise ValueError("only one value")
        except HDF5_ERRORS as error:
            problems.append(f"{vector}: {error.args[0]}")
    return sample


def compare_with_csv(path: Path, stored: pd.DataFrame) -> Findings:
    """Where the CSV that the parts were made from differs from what they hold."""
    table, proper = read_table(path), {"image_name": "image_id", "gt_answer": "answer"}
    table = table.rename(columns={a: b for a, b in proper.items() if b not in table})
    with explained(path):
        table = table[["image_id", "question", "answer"]]
    table.columns = ["image_id", "question", "ground_truth_answer"]
    both = stored.merge(table, left_index=True, right_index=True, suffixes=("", " here"))
    ids = {
        f"{text} is another here": both.index[both[text] != both[f"{text} here"]] for text in table
    }
    ids["not in the parts"] = table.index.difference(stored.index, sort=False)
    ids["in the parts but not here"] = stored.index.difference(table.index, sort=False)
    return {f"{path}: {problem}": list(ids[problem]) for problem in ids if len(ids[problem])}


def verify(paths: list[Path], csv_path: Path | None) -> tuple[int, str]:
    """The exit status, and a line for everything that is wrong."""
    parts, samples, findings = scan_parts(paths, is_strict=False)
    for directory, files in itertools.groupby(find_parts(paths), key=lambda path: path.parent):
        ends = (path.stem.rpartition("_")[2] for path in files)
        numbers = {int(end) for end in ends if end.isdecimal()} or {0}
        gaps = set(range(1 if directory in paths else min(numbers), max(numbers))) - numbers
        findings |= {f"{directory}: part {number} is missing": [] for number in sorted(gaps)}
    vectors = {vector: None for part in parts.values() for vector in choose_vectors(part)}
    columns = ["path", "question_id", "problems", *TEXTS, *vectors]
    stored = pd.DataFrame(each(samples, verify_sample, parts), columns=columns)
    by_problem = stored.explode("problems").groupby(["path", "problems"], sort=False)
    findings |= {f"{path}: {what}": list(ids) for (path, what), ids in by_problem["question_id"]}
    for path, table in stored.groupby("path"):
        num_values = table[[*TEXTS, *choose_vectors(parts[path])]].nunique(dropna=False)
        for vector in choose_vectors(parts[path]):
            inputs = TEXTS[:1] if "vision" in vector else TEXTS[:2]  # what it depends on
            if num_values[vector] == 1 < num_values[inputs].max():
                findings[f"{path}: {vector} is the same in all samples"] = []
    if csv_path:
        whole = stored.dropna(subset=TEXTS).set_index("question_id")
        findings |= compare_with_csv(csv_path, whole)
    lines = [] if findings else [f"nothing wrong with {len(samples):,} samples"]
    for problem, ids in findings.items():
        some = ", ".join(map(repr, ids[:3])) + ", ..." * (len(ids) > 3)
        lines.append(one_line(problem + f" ({len(ids):,}: {some})" * bool(ids)))
    return int(bool(findings)), "\n".join(lines)


# ───────────────────────────────────────── export, plot ────────────────────────────────────────


def export(path: Path, samples: Samples, vectors: dict[str, int]) -> str:
    """Write the texts (.csv), or texts and matrices (.npz), all in one order; what it holds."""
    texts = read_samples(samples)[["question_id", *TEXTS]]
    arrays = {name: texts[name].to_numpy(str) for name in texts}
    if path.suffix == ".csv":
        texts.to_csv(path, index=False)
    else:
        arrays |= {name: read_matrix(samples, name, width) for name, width in vectors.items()}
        np.savez(path, **arrays)
    lines = [f"{name:<38}{array.dtype} {list(array.shape)}" for name, array in arrays.items()]
    return "\n".join([f"{path}: {len(samples):,} samples", *lines])


def principal_components(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [num_samples, D] on their first two axes [num_samples, 2]; shares of the variance."""
    centred = matrix - matrix.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred @ centred.T)  # ascending; NUM_DRAWN samples at most
    first_two, total = values[:-3:-1].clip(0), max(values.sum(), np.finfo(float).tiny)
    points = axes[:, :-3:-1] * np.sqrt(first_two)
    sign = np.sign(points[np.abs(points).argmax(axis=0), [0, 1]])  # eigh may give either
    return points * sign, first_two / total


def color_values(samples: Samples, field: str) -> pd.Series:
    """What the points are coloured by: numbers or texts, NaN where there is no value."""
    table, (csv_path, _, column) = read_samples(samples), field.rpartition(":")
    table = table.set_index("question_id")
    with explained(field):
        table = read_table(Path(csv_path)).reindex(table.index) if csv_path else table
    if column not in table or table[column].isna().all():
        raise InspectError(f"--color-by {field}: no values in {csv_path or 'the samples'} for that")
    values = table[column].replace("", np.nan)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    is_number = np.isfinite(numbers).sum() == values.count() and numbers.nunique() > 2
    return numbers if is_number else values.astype(object)


def draw(axes, points: np.ndarray, values: pd.Series) -> None:
    """Draw a panel's points: numbers on a scale, or the ten most frequent texts; the rest grey."""
    style = {"s": 16, "linewidths": 0.3, "edgecolors": "#333333", "alpha": 0.85}
    is_number = pd.api.types.is_float_dtype(values)
    counts = values.value_counts()[: 0 if is_number else len(COLORS)]
    rest = values.isna() if is_number else ~values.isin(counts.index)
    if is_number:
        axes.scatter(*points[~rest].T, c=values[~rest], cmap="viridis", **style)
    for (value, count), color, marker in zip(counts.items(), COLORS, MARKERS):
        style |= {"color": color, "label": f"{one_line(value, 24)} ({count:,})"}
        axes.scatter(*points[values == value].T, marker=marker, **style)
    if rest.any():
        label = f"{'no value' if is_number else 'all others'} ({rest.sum():,})"
        axes.scatter(*points[rest].T, color="#BBBBBB", s=8, zorder=0, label=label)


def plot(path: Path, samples: Samples, total: int, vectors: dict[str, int], field: str) -> str:
    """Plot these of `total` samples on two principal components, a panel for each data set."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InspectError("--plot needs matplotlib: pip install matplotlib") from error
    values, label = color_values(samples, field), one_line(Path(field).name, 30)
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers: last
    num_layers = len({name.partition("/")[2] for name in names} - {""})
    columns = min(8, num_layers if num_layers > 1 else len(names))
    rows = -(-len(names) // columns)
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8, "text.parse_math": False})
    size = (2.5 * columns + 2, 2.6 * rows + 0.5)
    figure = matplotlib.figure.Figure(size, layout="constrained", dpi=150)
    shown = f"{len(samples):,} of {total:,} samples"
    figure.suptitle(f"Principal components 1 and 2\n{shown}")
    for position, name in enumerate(names, start=1):
        matrix = read_matrix(samples, name, vectors[name])
        if len(matrix) < 3 or not np.isfinite(matrix).all():
            raise InspectError(f"{name}: a plot needs 3 samples, and finite values; see --verify")
        points, shares = principal_components(matrix)
        title = f"{name}/{shares[0]:.1%} + {shares[1]:.1%} of variance".replace("/", "\n")
        axes = figure.add_subplot(rows, columns, position, xticks=[], yticks=[], title=title)
        draw(axes, points, values)
    marks = list(axes.collections)
    if pd.api.types.is_float_dtype(values):
        figure.colorbar(marks.pop(0), ax=figure.axes, label=label, shrink=0.6)
    if marks:
        figure.legend(handles=marks, title=label, loc="outside right upper")
    warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
    figure.savefig(path)
    return f"{path}: {len(names)} panels of {shown}"


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
    options = [  # each one's help begins with the modes that it is for
        add("--max-samples", type=int, default=3, metavar="N", help="view: samples to show (3)"),
        add("--all", action="store_true", help="view: figures of all samples, not of 1,000"),
        add("--json", action="store_true", help="view: the same for programs"),
        add("--vqa-dataset", type=Path, metavar="CSV", help="verify: compare with this table"),
        add("--representation", choices=(VISION, *KINDS), help="view, export, plot: only this"),
        add("--layer", type=int, metavar="I", help="view, export, plot: only this"),
        add("--color-by", metavar="WHAT", help="plot: ground_truth_answer, ... or CSV:COLUMN"),
    ]
    args = parser.parse_args(argv)
    mode = next((name for name in ("verify", "export", "plot") if getattr(args, name)), "view")
    for option in options:
        if getattr(args, option.dest) != option.default and mode not in option.help.split(":")[0]:
            parser.error(f"{option.option_strings[0]} is for {option.help}")
    endings = {"export": [".npz", ".csv"], "plot": [".png", ".pdf", ".svg"]}.get(mode)
    if endings and getattr(args, mode).suffix not in endings:
        parser.error(f"--{mode} writes {', '.join(endings)}")
    if args.max_samples < 0:
        parser.error("--max-samples is below 0")
    return args


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The exit status, and what is to be printed. Raises InspectError or OSError."""
    if args.verify:
        return verify(args.paths, args.vqa_dataset)
    parts, samples, _ = scan_parts(args.paths)
    vectors = choose_vectors(next(iter(parts.values())), args.representation, args.layer)
    if args.export:
        return 0, export(args.export, samples, vectors)
    order = np.random.default_rng(0).permutation(len(samples))
    drawn = [samples[index] for index in sorted(order[: None if args.all else NUM_DRAWN])]
    if args.plot:
        return 0, plot(args.plot, drawn, len(samples), vectors, args.color_by or TEXTS[-1])
    shown, width = samples[: args.max_samples], 58
    if args.question_id:
        by_id = {unquote(name): (path, name) for path, name in samples}
        for unknown in set(args.question_id) - by_id.keys():
            near = difflib.get_close_matches(unknown, by_id, cutoff=0)
            raise InspectError(f"no question_id {unknown!r}; near it: {', '.join(map(repr, near))}")
        drawn = shown = [by_id[question_id] for question_id in dict.fromkeys(args.question_id)]
        width = sys.maxsize
    facts = describe(parts, samples, drawn, shown, vectors)
    if args.json:
        return 0, json.dumps(facts, ensure_ascii=False, allow_nan=False, indent=1, default=str)
    return 0, show(facts, width)


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not every script
    try:
        status, text = run(args)
    except (InspectError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    print(text)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    raise SystemExit(main())
