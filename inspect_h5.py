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
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
COLORS = "#0072B2 #E69F00 #009E73 #CC79A7 #000000 #56B4E9 #D55E00 #F0E442 #882255 #999933".split()
Paths = str | Path | Iterable[str | Path]  # files; directories stand for the parts in them
Samples = list[tuple[Path, str]]  # the file, and the group's name in it
Embeddings = tuple[pd.DataFrame, np.ndarray]


# ────────────────────────────────────── parts and samples ──────────────────────────────────────
def scan_parts(paths: Paths, is_strict: bool = True) -> tuple[dict, Samples, dict]:
    """Each part's attributes; all samples in order; why they are not one run, raised if strict."""
    found, parts, samples, findings = [], {}, {}, {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        inside = [path] if path.is_file() else path.glob("gemma3_12b_embeddings_part_*.h5")
        found += (inside := sorted(inside, key=lambda part: (len(part.name), part)))  # by number
        if not inside:
            raise ValueError(f"{path} is no file, and no directory with part files in it")
    for path in {path.resolve(): path for path in found}.values():
        try:
            with h5py.File(path) as file:
                part = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
                rows = {name: int(file.require_group(name).attrs.get("row", -1)) for name in file}
            choose_vectors(part)
        except UNREADABLE as error:
            parts[path], findings[f"{path}: cannot be read as a part: {error}"] = {}, []
            continue
        expected = next(filter(None, parts.values()), part) | {"num_samples": len(rows)}
        for key in sorted((part.keys() | expected.keys()) - VARYING):
            if part.get(key) != expected.get(key):
                findings[f"{path}: {key} is {part.get(key)!r}, not {expected.get(key)!r}"] = []
        if twice := sorted(rows.keys() & samples.keys()):
            findings[f"{path}: question_id is there twice"] = list(map(unquote, twice))
        samples |= {name: path for name in sorted(rows, key=rows.get) if name not in samples}
        parts[path] = part
    if is_strict and (findings or not parts):
        raise ValueError(next(iter(findings), "no part files"))
    return parts, [(path, name) for name, path in samples.items()], findings


def choose_vectors(part: dict, kind: str | None = None, layer: int | None = None) -> dict[str, int]:
    """The data sets of a representation, of a layer, of both, or all; and their lengths."""
    there = {VISION: part["vision_hidden_size"]}
    there |= {f"{k}/layer_{i}": part["hidden_size"] for k in KINDS for i in part["layers"]}
    suffix = "" if layer is None else f"/layer_{layer}"
    chosen = {n: d for n, d in there.items() if n.startswith(kind or "") and n.endswith(suffix)}
    if not chosen:
        raise ValueError(f"no layer {layer} of {kind or 'any kind'}; there is {', '.join(there)}")
    return chosen


def read(group: h5py.Group, member: str, width: int | None = None) -> np.ndarray | str:
    """A vector of this width, or a text. h5py's `group[member][()]` is up to three times slower."""
    shape, dtype = ((), h5py.string_dtype()) if width is None else ((width,), np.float32)
    dataset, values = h5py.h5d.open(group.id, member.encode()), np.empty(shape, dtype)
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
    """question_id, texts and attributes, in the order of `samples`."""
    rows = each(samples, lambda group: {n: read(group, n) for n in TEXTS} | dict(group.attrs))
    table = pd.DataFrame(rows, columns=["question_id", *TEXTS, *COUNTS, "answer_truncated"])
    return table.assign(question_id=[unquote(name) for _, name in samples])


def read_matrix(samples: Samples, vector: str, width: int) -> np.ndarray:
    """One vector of each sample, in their order: float32 [num_samples, width]."""
    return np.fromiter(each(samples, read, vector, width), (np.float32, width), len(samples))


def load_embeddings(paths: Paths, representation: str, layer: int | None = None) -> Embeddings:
    """All samples' texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are files or directories; `vision_representation` has no layer. Raises ValueError.
    """
    parts, samples, _ = scan_parts(paths)
    vectors = choose_vectors(next(iter(parts.values())), representation, layer)
    if len(vectors) > 1:
        raise ValueError(f"{representation}: say which layer of {', '.join(vectors)}")
    return read_texts(samples), read_matrix(samples, *vectors.popitem())


def read_table(path: Path, *columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV by question_id, text as it stands; all of it, or columns by the first name it has."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = pd.read_csv(file, index_col="question_id", dtype=str, na_filter=False)
        chosen = [next((name for name in names if name in table), names[0]) for names in columns]
        table = table[chosen or table.columns]
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error.args[-1]}") from error
    if not table.index.is_unique:
        raise ValueError(f"{path}: a question_id is there twice")
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


def describe_sample(group: h5py.Group, vectors: Iterable[str]) -> dict[str, str]:
    """What a sample holds: types, shapes and compression as they are in the file."""
    tree = dict.fromkeys(TEXTS, "text") | {LINK: f"-> {VISION}"}
    for vector, dataset in ((vector, group[vector]) for vector in vectors):
        is_short = dataset.id.get_type().get_size() < dataset.dtype.itemsize
        dtype = "bfloat16" if is_short else dataset.dtype  # which h5py reads as float32
        tree[vector] = f"{dtype} {list(dataset.shape)} {dataset.compression or ''}".rstrip()
    return tree


def one_line(value: object, width: int = sys.maxsize) -> str:
    """Text in `width` columns of a terminal at most, line breaks and the like as in a repr."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    used = np.cumsum([1 + (unicodedata.east_asian_width(char) in "WF") for char in text])
    end = int(np.searchsorted(used, width))  # the first character that does not fit
    return f"{text[:end]}…" if (used > width).any() else text


def show(facts: dict, width: int) -> Iterator[str]:
    """The lines that say the facts in 80 columns; `width` cuts what need not be whole."""
    files, total, num_read = facts["files"], facts["num_samples"], facts["num_samples_read"]
    yield " ...\n".join(dict.fromkeys([files[0], files[-1]]))
    yield f"parts: {len(files)}, samples: {total:,}, failed: {facts['num_failed']:,}\n"
    for name, value in facts["settings"].items():
        yield f"{name:<22}{one_line(str(value).strip('[]'), width)}"
    yield from ["", *(f"{path:<38}{what}" for path, what in facts["sample"].items()), ""]
    yield f"figures of {num_read:,} samples" + ", drawn at random" * (num_read < total)
    yield f"{'':36}  dim  mean L2   sd L2 max |x|   bad  cosine"
    for name, figures in facts["figures"].items():
        dim, *sizes, bad, cosine = (np.nan if x is None else x for x in figures.values())
        cells = (f"{x:8.0f}" if x >= 1000 else f" {x:7.4g}" for x in sizes)
        yield f"{name:<36}{dim:>5} {''.join(cells)}{bad:6.1%}{cosine:8.4f}"
    for sample in facts["samples"]:
        yield "\n" + one_line(f"{sample['question_id']}  {sample['image_id']}", 80)
        names = ("question", "ground_truth_answer", "answer") if width < 80 else sample
        yield from (f"  {name:<20}{one_line(sample[name], width)}" for name in names)


# ───────────────────────────────────── verify, export, plot ────────────────────────────────────
def verify_sample(group: h5py.Group, parts: dict[Path, dict]) -> dict:
    """A sample's texts, a hash of each vector, and the problems with it."""
    path, name, problems = Path(group.file.filename), unquote(group.name[1:]), []
    sample = {"path": path, "question_id": name, "problems": problems}
    missing = {"question_id", "answer_truncated", *COUNTS} - group.attrs.keys()
    problems += [f"{member} is missing" for member in sorted(missing)]
    problems += ["question_id differs"] * (str(group.attrs.get("question_id", name)) != name)
    widths = choose_vectors(parts[path])
    for member, width in {**dict.fromkeys(TEXTS), **widths, LINK: widths[VISION]}.items():
        try:
            value = read(group, member, width)
            sample[member] = value if width is None else hash(value.tobytes())
            if width and not np.isfinite(value).all():
                raise ValueError("not finite")
            if width and (value == value[0]).all():
                raise ValueError("only one value")
        except UNREADABLE as error:
            problems.append(f"{member}: {error.args[-1]}")
    return sample


def verify(paths: list[Path], csv_path: Path | None) -> tuple[int, list[str]]:
    """The exit status, and a line for everything that is wrong with parts, or unlike the CSV."""
    parts, samples, findings = scan_parts(paths, is_strict=False)
    ends = pd.Series({path.resolve(): path.stem.rpartition("_")[2] for path in parts}, dtype=str)
    for directory, numbers in ends[ends.str.isdecimal()].astype(int).groupby(lambda p: p.parent):
        start = 1 if directory in map(Path.resolve, paths) else min(numbers)
        gaps = sorted({*range(start, max(numbers))} - {*numbers})
        findings |= {f"{directory}: part {number} is missing": [] for number in gaps}
    vectors = {v: None for part in parts.values() if part for v in choose_vectors(part)}
    columns = ["path", "question_id", "problems", *TEXTS, *vectors]
    stored = pd.DataFrame(each(samples, verify_sample, parts), columns=columns)
    by_problem = stored.explode("problems").groupby(["path", "problems"], sort=False)
    findings |= {f"{path}: {what}": list(ids) for (path, what), ids in by_problem["question_id"]}
    for path, num_values in stored.groupby("path")[columns[3:]].nunique().iterrows():
        for vector in vectors:
            inputs = TEXTS[:1] if "vision" in vector else TEXTS[:2]  # what it depends on
            if num_values[vector] == 1 < num_values[inputs].max():
                findings[f"{path}: {vector} is the same in all samples"] = []
    if csv_path:
        accepted = ("image_id", "image_name"), ("question",), ("answer", "gt_answer")
        here, there = read_table(csv_path, *accepted), stored.dropna(subset=TEXTS)
        here.columns = ["image_id", "question", "ground_truth_answer"]
        here, there = here.align(there.set_index("question_id")[here.columns], axis=0)
        wrong = (here.ne(there) & here.notna() & there.notna()).add_suffix(" is another here")
        wrong["not in the parts"] = there["image_id"].isna()
        wrong["in the parts but not here"] = here["image_id"].isna()
        findings |= {f"{csv_path}: {w}": [*ids] for w in wrong if len(ids := wrong.index[wrong[w]])}
    lines = [f"nothing wrong with {len(samples):,} samples"] * (not findings)
    for what, ids in findings.items():
        lines += [one_line(what) + f" ({len(ids):,}: {', '.join(map(repr, ids[:3]))})" * bool(ids)]
    return int(bool(findings)), lines


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
    yield from (f"{name:<38}{array.dtype} {list(array.shape)}" for name, array in arrays.items())


def choose_marks(table: pd.DataFrame, field: str) -> list[tuple]:
    """Samples, and how they are drawn: numbers on a scale, or the ten most frequent texts."""
    csv_path, _, column = field.rpartition(":")
    table = read_table(Path(csv_path)).reindex(table["question_id"]) if csv_path else table
    values = table.get(column, pd.Series(dtype=str)).replace("", np.nan)
    numbers, counts = pd.to_numeric(values, errors="coerce"), values.value_counts()
    if counts.empty:
        raise ValueError(f"--color-by {field}: no values in {csv_path or 'the samples'} for that")
    if numbers.count() == values.count() and len(counts) > 2:
        return [(slice(None), {"c": numbers, "plotnonfinite": True})]  # hollow: no value
    marks = [
        (values == value, {"c": color, "marker": marker, "label": f"{n:,} × {one_line(value, 24)}"})
        for (value, n), color, marker in zip(counts.items(), COLORS, "os^Dv*P<X>")
    ]
    rest = ~values.isin(counts.index[: len(COLORS)])
    grey = {"c": "#BBBBBB", "zorder": 0, "label": f"{rest.sum():,} × others"}
    return marks + [(rest, grey)] * bool(rest.any())


def plot(path: Path, samples: Samples, total: int, vectors: dict[str, int], field: str) -> list:
    """Plot these of `total` samples on two principal components, a panel for each data set."""
    import matplotlib.figure

    marks, label = choose_marks(read_texts(samples), field), one_line(Path(field).name, 30)
    names = sorted(vectors, key=lambda name: name == VISION)  # it has no layers: last
    columns = len({name.partition("/")[2] for name in names} - {""}) or 1
    rows = -(-len(names) // columns)
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8, "text.parse_math": False})
    figure = matplotlib.figure.Figure((2.5 * columns + 2, 2.6 * rows + 0.5), layout="constrained")
    shown = f"{len(samples):,} of {total:,} samples"
    figure.suptitle(f"Principal components 1 and 2\n{shown}")
    for position, name in enumerate(names, start=1):
        matrix = read_matrix(samples, name, vectors[name])
        if len(matrix) < 3 or not np.isfinite(matrix).all():
            raise ValueError(f"{name}: a plot needs 3 samples, and finite values; see --verify")
        centred = matrix - matrix.mean(axis=0, dtype=np.float64)
        variances, units = np.linalg.eigh(centred @ centred.T)  # ascending
        points = (units * np.sqrt(variances.clip(0)))[:, :-3:-1]
        shares = variances[:-3:-1] / max(variances.sum(), np.finfo(float).tiny)
        title = f"{name}/{shares[0]:.1%} + {shares[1]:.1%} of variance".replace("/", "\n")
        axes = figure.add_subplot(rows, columns, position, xticks=[], yticks=[], title=title)
        for mask, mark in marks:
            axes.scatter(*points[mask].T, s=16, lw=0.3, edgecolors="#333", alpha=0.85, **mark)
    if "label" in mark:
        figure.legend(*axes.get_legend_handles_labels(), title=label, loc="outside right center")
    else:
        figure.colorbar(axes.collections[0], ax=figure.axes, label=label, shrink=0.6)
    warnings.filterwarnings("ignore", "Glyph")  # the font has not every script
    figure.savefig(path, dpi=150)
    return [f"{path}: {len(names)} panels of {shown}"]


# ───────────────────────────────────────── command line ────────────────────────────────────────
def run(args: argparse.Namespace) -> tuple[int, Iterable[str]]:
    """The exit status, and the lines to print. Raises ImportError, OSError or ValueError."""
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
    shown = samples[: max(args.max_samples, 0)]
    if args.question_id:
        by_id = {unquote(name): (path, name) for path, name in samples}
        for unknown in set(args.question_id) - by_id.keys():
            near = difflib.get_close_matches(unknown, by_id, cutoff=0)
            raise ValueError(f"no question_id {unknown!r}; near it: {', '.join(map(repr, near))}")
        drawn = shown = [by_id[question_id] for question_id in dict.fromkeys(args.question_id)]
    settings = {k: [part.get(k) for part in parts.values()] for k in next(iter(parts.values()))}
    failed = {path.with_name("failed_samples.csv") for path in parts}
    facts = {
        "files": list(map(str, parts)),
        "num_samples": len(samples),
        "num_failed": sum(len(read_table(path)) for path in failed if path.exists()),
        "settings": {k: v if v != v[:1] * len(v) else v[0] for k, v in settings.items()},
        "sample": next(each(drawn[:1], describe_sample, vectors), {}),
        "num_samples_read": len(drawn),
        "figures": {n: summarise(read_matrix(drawn, n, vectors[n])) for n in vectors if drawn},
        "samples": json.loads(read_texts(shown).to_json(orient="records")),  # NaN is null
    }
    if args.json:
        return 0, [json.dumps(facts, allow_nan=False, indent=1, default=str)]
    return 0, show(facts, sys.maxsize if args.question_id else 58)


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, print what there is to say; the exit status."""
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
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not every script
    try:
        status, lines = run(args)
        print(*lines, sep="\n")
    except (ImportError, MemoryError, OSError, ValueError) as error:
        advice = f": pip install {error.name}" if isinstance(error, ImportError) else ""
        print(one_line(f"{error}{advice}"), file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    raise SystemExit(main())
