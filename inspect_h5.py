#!/usr/bin/env python3
"""Look into the part files that run_gemma3_extraction.py writes.

    python inspect_h5.py output                              what was run, figures, first samples
    python inspect_h5.py output --question-id 42             one sample whole
    python inspect_h5.py output --verify --vqa-dataset vqa.csv
    python inspect_h5.py output --export layer_24.npz --layer 24
    python inspect_h5.py output --plot pca.png --color-by labels.csv:hallucinated

From Python, a matrix [num_samples, D] and a table of the samples in the same order:

    from inspect_h5 import load_embeddings
    table, states = load_embeddings("output", "query_token_representation", 24)

Samples stand part after part, those of a part by their row in the CSV. Exit status: 0 all is well,
1 something is wrong and one line says what (--verify: one line a finding), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import json
import os
import re
import signal
import sys
import textwrap
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import h5py
import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# ────────────────────────────────────────── constants ──────────────────────────────────────────

PART_PATTERN = re.compile(r"gemma3_12b_embeddings_part_(\d{3,})\.h5")
FAILED_NAME = "failed_samples.csv"
VISION, VISION_LINK = "vision_representation", "vision_only_representation"
LAYER_KINDS = (
    *("vision_token_representation", "query_token_representation"),
    "multimodal_representation",
)
TEXTS = ("image_id", "question", "answer", "ground_truth_answer")
COUNTS = ("row", "num_prompt_tokens", "vision_token_pos", "query_token_pos")
COUNTS += ("num_answer_tokens", "answer_truncated")
SETTINGS = (  # parts of one run agree in these; the machine and the CSV may change between parts
    *("model_name", "model_type", "model_revision", "dtype", "layers", "num_layers"),
    *("hidden_size", "vision_hidden_size", "max_new_tokens", "prompt", "image_processor"),
    *("attn_implementation", "storage_dtype", "checkpoint_interval", "schema_version"),
)
CSV_NAMES = {  # ours: what the CSV may call it
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "ground_truth_answer": ("answer", "gt_answer"),
}
MAX_SUMMARISED, MAX_PLOTTED = 1000, 2000  # samples drawn for the table, and for the plot
BLOCK = 64  # samples in memory at a time
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
STRING = h5py.h5t.py_create(h5py.string_dtype())
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000")
COLORS += ("#56B4E9", "#D55E00", "#F0E442", "#882255", "#999933")
MARKERS, GREY = "os^Dv*P<X>", "#BBBBBB"


class InspectError(ValueError):
    """What was asked for cannot be done; the message says why."""


# ────────────────────────────────────────── the parts ──────────────────────────────────────────


@dataclass(frozen=True)
class Part:
    """One part file: what its root says, and the names of its sample groups."""

    path: Path
    attributes: dict
    names: list[str]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file; what HDF5 has against it becomes an InspectError."""
    try:
        with h5py.File(path) as file:
            yield file
    except HDF5_ERRORS as error:
        if isinstance(error, InspectError):
            raise
        reason = str(error).partition("\n")[0]
        raise InspectError(f"{path} cannot be read: {reason}") from error


def find_parts(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and the part files in the directories among them, none twice."""
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            numbered = {p: PART_PATTERN.fullmatch(p.name) for p in path.iterdir()}
            inside = sorted((p for p in numbered if numbered[p]), key=lambda p: int(numbered[p][1]))
        if not inside:
            raise InspectError(f"{path} holds no gemma3_12b_embeddings_part_*.h5")
        if not path.exists():
            raise InspectError(f"{path} does not exist")
        for part_path in inside:
            found.setdefault(part_path.resolve(), part_path)
    return list(found.values())


def open_part(path: Path) -> Part:
    """Read a part's attributes and names. Raises InspectError if it is none."""
    with opened(path) as file:
        attributes = {name: _plain(value) for name, value in file.attrs.items()}
        part = Part(path, attributes, list(file))
    if not isinstance(attributes.get("layers"), list) or "model_name" not in attributes:
        raise InspectError(f"{path} is no part of an extraction: no model_name or layers in it")
    return part


def _plain(value):
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def open_parts(paths: str | Path | Iterable[str | Path]) -> list[Part]:
    """The parts in their order. Raises InspectError if they do not come from the same settings."""
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    parts = [open_part(path) for path in find_parts(map(Path, paths))]
    for part in parts:
        for name in SETTINGS:
            values = [p.attributes.get(name) for p in (parts[0], part)]
            if values[0] != values[1]:
                raise InspectError(
                    f"{part.path} was written with {name} {values[1]!r}, {parts[0].path} with "
                    f"{values[0]!r}: look at them one at a time"
                )
    return parts


def vector_names(part: Part) -> list[str]:
    """The data sets that every sample has: the vision vector, then each kind's layers."""
    return [VISION] + [f"{kind}/layer_{i}" for kind in LAYER_KINDS for i in part.attributes["layers"]]


def vector_widths(parts: list[Part]) -> dict[str, int]:
    """The length of each vector, by the name of its data set, as the first sample has it."""
    for part in parts:
        if part.names:
            with opened(part.path) as file:
                group = file[part.names[0]]
                return {name: group[name].shape[0] for name in vector_names(part)}
    raise InspectError(f"no samples in {', '.join(str(part.path) for part in parts)}")


def choose_vectors(widths: dict[str, int], kind: str | None, layer: int | None) -> dict[str, int]:
    """Those of one representation, of one layer, or of both. Raises InspectError if there are none."""
    chosen = {
        name: width
        for name, width in widths.items()
        if kind in (None, name.partition("/")[0])
        and (layer is None or name.endswith(f"/layer_{layer}"))
    }
    if not chosen:
        raise InspectError(
            f"no layer {layer} of {kind or 'any representation'}; there are: {' '.join(widths)}"
        )
    return chosen


def read_failures(paths: Iterable[Path]) -> dict[str, str]:
    """The error by question_id, from the `failed_samples.csv` beside the parts."""
    found: dict[str, str] = {}
    for directory in dict.fromkeys(path.parent for path in paths):
        if (directory / FAILED_NAME).exists():
            table = read_csv(directory / FAILED_NAME, {"error": ("error",)})
            found.update({question_id: row["error"] for question_id, row in table.items()})
    return found


def read_csv(path: Path, columns: dict[str, tuple[str, ...]]) -> dict[str, dict[str, str]]:
    """Text as it stands, by question_id; of each column's names the one that is there.

    Raises:
        InspectError: no such file or column, not a UTF-8 table, or an id that is there twice.
    """
    csv.field_size_limit(sys.maxsize)
    table: dict[str, dict[str, str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *lines = [line for line in csv.reader(file, strict=True) if line] or [[]]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InspectError(f"cannot read {path}: {error}") from error
    for names in (("question_id",), *columns.values()):
        if not set(names) & set(header):
            raise InspectError(f"{path} has no column {' or '.join(names)}; it has {header}")
    for line in lines:
        row = dict(zip(header, line))
        if len(line) != len(header) or row["question_id"] in table:
            raise InspectError(f"{path}: question_id {row['question_id']!r} twice, or a torn line")
        table[row["question_id"]] = {
            ours: next(row[name] for name in names if name in row)
            for ours, names in columns.items()
        }
    return table


# ─────────────────────────────────────── reading samples ───────────────────────────────────────
# HDF5's own calls: they take a quarter of the time of `file[name][()]` on vectors this short.


def open_sample(file: h5py.File, name: str) -> h5py.h5g.GroupID:
    """The group of one sample."""
    return h5py.h5g.open(file.id, name.encode())


def read_vector(group: h5py.h5g.GroupID, name: str, out: np.ndarray) -> None:
    """Read a vector [D] of any float type into float32. Raises one of HDF5_ERRORS."""
    try:
        dataset = h5py.h5d.open(group, name.encode())
    except HDF5_ERRORS as error:
        raise KeyError("is missing") from error
    if dataset.shape != out.shape:
        raise ValueError(f"has shape {list(dataset.shape)}; expected {list(out.shape)}")
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, out, h5py.h5t.NATIVE_FLOAT)


def read_text(group: h5py.h5g.GroupID, name: str) -> str:
    """Read a UTF-8 string. Raises one of HDF5_ERRORS."""
    value = np.empty((), dtype=h5py.string_dtype())
    h5py.h5d.open(group, name.encode()).read(h5py.h5s.ALL, h5py.h5s.ALL, value, STRING)
    return value[()].decode()


def read_attribute(group: h5py.h5g.GroupID, name: str):
    """Read a number."""
    attribute = h5py.h5a.open(group, name.encode())
    value = np.empty(attribute.shape, attribute.dtype)
    attribute.read(value)
    return value.item()


def order_samples(parts: list[Part]) -> list[list[str]]:
    """For every part its samples' names by their row in the CSV. Raises InspectError on id twice."""
    chosen, seen = [], {}
    for part in parts:
        with opened(part.path) as file:
            rows = {name: read_attribute(open_sample(file, name), "row") for name in part.names}
        for name in rows:
            if seen.setdefault(name, part) is not part:
                raise InspectError(
                    f"question_id {unquote(name)!r} is in {seen[name].path} and in {part.path}"
                )
        chosen.append(sorted(rows, key=rows.__getitem__))
    return chosen


def draw_samples(parts: list[Part], limit: int | None) -> list[list[str]]:
    """For every part the names of those of its samples that are among `limit` drawn from all."""
    where = [(k, name) for k, part in enumerate(parts) for name in part.names]
    drawn = np.arange(len(where))
    if limit is not None and limit < len(where):
        drawn = np.sort(np.random.default_rng(0).choice(len(where), limit, replace=False))
    chosen: list[list[str]] = [[] for _ in parts]
    for k, name in (where[i] for i in drawn):
        chosen[k].append(name)
    return chosen


def read_samples(
    parts: list[Part], chosen: list[list[str]], counts: tuple[str, ...] = COUNTS
) -> list[dict]:
    """The question_id, texts and attributes of the chosen samples."""
    samples = []
    for part, names in zip(parts, chosen, strict=True):
        with opened(part.path) as file:
            for name in names:
                group = open_sample(file, name)
                texts = {text: read_text(group, text) for text in TEXTS}
                numbers = {count: read_attribute(group, count) for count in counts}
                samples.append({"question_id": unquote(name), **texts, **numbers})
    return samples


def read_blocks(
    part: Part,
    names: list[str],
    widths: dict[str, int],
    report: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Block by block a data set's name, the samples' names and their vectors [samples, width].

    `report(sample, problem)` hears of a vector that cannot be read; without it that is an error.
    """
    with opened(part.path) as file:
        for start in range(0, len(names), BLOCK):
            groups = {name: open_sample(file, name) for name in names[start : start + BLOCK]}
            for vector, width in widths.items():
                matrix, good = np.empty((len(groups), width), np.float32), []
                for name, group in groups.items():
                    try:
                        read_vector(group, vector, matrix[len(good)])
                        good.append(name)
                    except HDF5_ERRORS as error:
                        problem = f"{vector} {error.args[0]}"
                        if report is None:
                            raise InspectError(
                                f"{part.path}, question_id {unquote(name)!r}: {problem} "
                                "(--verify says what else is wrong)"
                            ) from error
                        report(name, problem)
                yield vector, good, matrix[: len(good)]


def read_matrix(parts: list[Part], chosen: list[list[str]], vector: str, width: int) -> np.ndarray:
    """One vector of the chosen samples: float32 [num_samples, width]."""
    matrix, stop = np.empty((sum(map(len, chosen)), width), np.float32), 0
    for part, names in zip(parts, chosen, strict=True):
        for _, _, block in read_blocks(part, names, {vector: width}):
            start, stop = stop, stop + len(block)
            matrix[start:stop] = block
    return matrix


def load_embeddings(
    paths: str | Path | Iterable[str | Path], representation: str, layer: int | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """The samples' texts and attributes, and one vector of each: float32 [num_samples, D].

    `paths` are part files or directories; `layer` is None for `vision_representation`.

    Raises:
        InspectError: no such parts or vectors, or parts of different settings.
    """
    import pandas as pd

    parts = open_parts(paths)
    widths = choose_vectors(vector_widths(parts), representation, layer)
    if len(widths) > 1:
        raise InspectError(f"say which layer: {' '.join(widths)}")
    chosen = order_samples(parts)
    return pd.DataFrame(read_samples(parts, chosen)), read_matrix(parts, chosen, *widths.popitem())
