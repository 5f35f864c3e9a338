#!/usr/bin/env python3
"""Store what Gemma 3 holds inside, for every question of a VQA data set, before it answers.

    python run_gemma3_extraction.py --vqa-dataset vqa.csv --images-dir images --test
    accelerate launch --num_processes 8 run_gemma3_extraction.py --vqa-dataset vqa.csv ...

One HDF5 file for every `--checkpoint-interval` samples, one group for every sample:

    output/gemma3_12b_embeddings_part_001.h5
      {question_id}/
        question, image_id, answer, ground_truth_answer     UTF-8
        vision_representation                    [D_v]      mean over the vision tower's patches
        vision_only_representation               [D_v]      soft link to it
        vision_token_representation/layer_{i}    [D]        decoder layer i, last image soft token
        query_token_representation/layer_{i}     [D]        decoder layer i, last prompt token
        multimodal_representation/layer_{i}      [D]        decoder layer i, mean over the prompt

The same command again goes on where the last one stopped. Exit status: 0 every row is stored,
1 the run could not start or go on, 2 wrong usage, 3 some rows failed, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if __name__ == "__main__":  # the imports below take seconds, in which a stop must count already
    for _signum in SIGNALS:
        signal.signal(_signum, lambda signum, _: os._exit(130 if signum == signal.SIGINT else 143))

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

# ────────────────────────────────────────── constants ──────────────────────────────────────────
SCHEMA_VERSION = 1
PART_NAME = "gemma3_12b_embeddings_part_{:03d}.h5"
FAILED_NAME = "failed_samples.csv"
OUR_FILES = re.compile(
    r"gemma3_12b_embeddings_part_\d+\.(h5|partial|damaged-\w{8})|failed_samples\.(csv|partial)"
)
COLUMNS = (  # what the CSV may call each of ours
    ("question_id",),
    ("image_id", "image_name"),
    ("question",),
    ("answer", "gt_answer"),
)
TEXTS = ("question", "image_id", "answer", "ground_truth_answer")
VISION, MEAN = "vision_representation", "multimodal_representation"  # means: always float32
LAYER_KINDS = ("vision_token_representation", "query_token_representation", MEAN)
SAMPLE_ATTRIBUTES = {
    *("question_id", "row", "num_prompt_tokens", "vision_token_pos", "query_token_pos"),
    *("num_answer_tokens", "answer_truncated"),
}
# What every stored vector depends on: no run goes on in a directory where these were others.
IDENTITY = (
    *("model_name", "model_revision", "dtype", "layers", "max_new_tokens", "prompt"),
    *("checkpoint_interval", "storage_dtype"),
)
# What h5py raises for a broken file.
DAMAGE = (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError)
MAX_FAILED_IMAGES = 25  # different images in a row: then something is wrong with all of them
MAX_PADDING = 0.125  # of a forward pass; images of too different lengths go in passes of their own
HOLDER_BYTES = 1024  # of `.lock`, which says who is at work
SAMPLED_BYTES = 2**16  # at a time, of a model's weights
SAMPLE_OVERHEAD, VECTOR_OVERHEAD = 4096, 450  # bytes of a file beside the vectors themselves
DISK_AHEAD = 2**20  # bytes that are reserved on the disk beyond the next sample
LINE_SECONDS = 30  # between two lines of progress where there is no bar
NUM_TEST_ROWS = 3
TEST_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2 error to a plain forward pass

log = logging.getLogger("gemma3_extraction")


class ExtractionError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


class RowError(ValueError):
    """One row cannot be extracted; the message says why."""


# ─────────────────────────────────────────── options ───────────────────────────────────────────
def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def layer_list(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    return tuple(int(part) for part in text.split(","))


def dtype_name(text: str) -> str:
    """A type that holds Gemma 3's states."""
    if text == "float16":
        raise argparse.ArgumentTypeError("Gemma 3's states pass float16's 65504; use bfloat16")
    return text


def flag(text: str, default=dataclasses.MISSING, **kwargs):
    """A field of `Options`: its help, its default, and what else argparse is to know."""
    return field(default=default, metadata={"help": text, **kwargs})


CSV, DIR = {"type": Path, "metavar": "CSV"}, {"type": Path, "metavar": "DIR"}
LAYERS = {"type": layer_list, "metavar": "I,J"}
COUNT, SWITCH = {"type": at_least(1), "metavar": "N"}, {"action": "store_true"}


@dataclass(frozen=True)
class Options:
    """Everything that the command line sets: a field is a flag."""

    vqa_dataset: Path = flag("question_id, image_id|image_name, question, answer|gt_answer", **CSV)
    images_dir: Path = flag("where image_id names a file", **DIR)
    output_dir: Path = flag("where the part files go", Path("output"), **DIR)
    model: str = flag("name on the Hugging Face hub, or local directory", "google/gemma-3-12b-it")
    revision: str = flag("branch, tag or commit on the hub", "main")
    cache_dir: Path = flag("where downloads are kept", Path("model_cache"), **DIR)
    checkpoint_interval: int = flag("samples per part file", 1000, **COUNT)
    test: bool = flag("first 3 rows, then checks, and time and disk for all", False, **SWITCH)
    device: str = flag("cuda, cpu or any torch device", "cuda")
    device_map: str | None = flag("spread one model over GPUs and CPU", None, choices=["auto"])
    dtype: str = flag("of the model", "bfloat16", type=dtype_name, choices=list(TEST_BOUNDS))
    layers: tuple[int, ...] | None = flag(
        "negative: from the end (default: first, quarters, last)", None, **LAYERS
    )
    batch_size: int = flag("questions per forward pass", 1, **COUNT)
    max_new_tokens: int = flag("limit of an answer; 0: none", 200, type=at_least(0), metavar="N")
    num_workers: int = flag("threads that prepare images beside the model", 2, **COUNT)
    storage_dtype: str = flag("of the vectors", "float32", choices=list(TEST_BOUNDS))
    compression: str = flag("of the vectors", "none", choices=["none", "gzip", "lzf"])
    overwrite: bool = flag("start afresh: delete what this program wrote there", False, **SWITCH)
    strict: bool = flag("stop at the first row that fails", False, **SWITCH)


# ────────────────────────────────────────── what flows ─────────────────────────────────────────
@dataclass(frozen=True)
class Row:
    """One line of the CSV, to the letter; `index` counts data lines from 0."""

    index: int
    question_id: str
    image_id: str
    question: str
    ground_truth: str


@dataclass(frozen=True)
class Failure:
    """A row that cannot be extracted, and why."""

    row: Row
    error: str


@dataclass(eq=False)
class SharedImage:
    """An image. What the prompts about it have in common is run once, with the first of them."""

    pixel_values: Tensor  # [3, height, width]
    num_shared: int  # leading tokens that all its prompts have in common, soft tokens included
    # Left by that pass: patches [D_v], mean; and of the layers asked for, [layers, D], the last
    # image soft token and the sum over the shared tokens.
    states: tuple[Tensor, Tensor, Tensor] | None = None
    # While there are prompts to come, of every layer: [1, num_key_value_heads, shared, head_dim].
    key_values: list[tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row as the model reads it."""

    row: Row
    input_ids: list[int]  # [T]
    image: SharedImage
    is_last: bool  # of those about its image


@dataclass(frozen=True, eq=False)
class Sample:
    """What the model gives for a prompt; `states` may be read once `wait()` has returned."""

    prompt: Prompt
    states: Tensor  # [sum of state_shapes()], float32, in host memory
    answer: list[int]  # token ids without the end token
    is_truncated: bool
    wait: Callable[[], None]


# ─────────────────────────────────── reading rows and images ───────────────────────────────────
def read_rows(csv_path: Path) -> list[Row]:
    """Every row of the CSV, text as it stands: `007`, `NA`, `None` and empty answers survive.

    Raises ExtractionError: not UTF-8, no table with the columns, an empty or repeated question_id.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            table = [(f"{csv_path}, line {reader.line_num}", line) for line in reader if line]
    except UnicodeDecodeError as error:
        raise ExtractionError(f"{csv_path} is not UTF-8: {error.reason}; convert it") from error
    except csv.Error as error:
        where = f"{csv_path}, line {reader.line_num}"
        raise ExtractionError(f"{where}: {error}; check the quotes there") from error
    except OSError as error:
        raise ExtractionError(f"cannot read {csv_path}: {error}") from error
    if len(table) < 2:
        raise ExtractionError(f"{csv_path} has no rows; expected a header and a line a question")
    (_, header), *lines = table
    places = [_find_column(csv_path, header, names) for names in COLUMNS]
    rows: dict[str, Row] = {}
    for index, (where, line) in enumerate(lines):
        if len(line) != len(header):
            raise ExtractionError(f"{where}: {len(line)} fields; expected {len(header)}")
        row = Row(index, *(line[place] for place in places))
        if any("\0" in line[place] for place in places):
            raise ExtractionError(f"{where}: holds a NUL byte; remove it")
        if not row.question_id.strip():
            raise ExtractionError(f"{where}: the question_id is empty")
        if row.question_id in rows:
            raise ExtractionError(f"{where}: question_id {row.question_id!r} appears twice")
        rows[row.question_id] = row
    return list(rows.values())


def _find_column(csv_path: Path, header: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if header.count(name) == 1:
            return header.index(name)
    problem = "there twice" if set(names) & set(header) else "not there"
    raise ExtractionError(
        f"{csv_path}: column {' or '.join(names)} is {problem}; its columns: {header}"
    )


def hash_rows(rows: list[Row]) -> str:
    """sha256 over the four columns used."""
    texts = json.dumps([dataclasses.astuple(row)[1:] for row in rows])
    return hashlib.sha256(texts.encode()).hexdigest()


def plan_parts(rows: list[Row], interval: int) -> dict[int, list[Row]]:
    """The rows of every part: image by image, as they first appear, `interval` rows a part."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image_id, []).append(row)
    ordered = list(itertools.chain.from_iterable(by_image.values()))
    starts = range(0, len(ordered), interval)
    return {k: ordered[start : start + interval] for k, start in enumerate(starts, start=1)}


def image_path(images_dir: Path, image_id: str) -> Path:
    """Where an image is. Raises RowError if the image_id is empty or leads out of `images_dir`."""
    root = os.path.abspath(images_dir)
    path = os.path.normpath(os.path.join(root, image_id))
    if not image_id.strip() or not path.startswith(os.path.join(root, "")):
        raise RowError(f"image_id {image_id!r} does not name a file inside {images_dir}")
    return Path(path)


def open_image(images_dir: Path, image_id: str) -> Image.Image:
    """The image, upright and RGB. Raises RowError if it is missing, unreadable or too large."""
    path = image_path(images_dir, image_id)
    try:
        if not path.is_file():
            raise FileNotFoundError
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode[0] in "IF":  # Pillow would cut every value off at 255
                raise ValueError(f"its mode is {image.mode}; convert it to 8 bits a channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise RowError(f"{path} does not exist, or is no file") from error
    except Exception as error:  # Pillow's decoders let anything through: struct.error, TypeError …
        raise RowError(f"{path} cannot be read as an image: {error}") from error


def check_images(rows: list[Row], images_dir: Path) -> None:
    """Say how many images are missing. Raises ExtractionError if all of them are."""
    missing = {row.image_id: None for row in rows}
    num_images = len(missing)
    for image_id in list(missing):
        with contextlib.suppress(RowError, OSError):
            if image_path(images_dir, image_id).is_file():
                del missing[image_id]
    if len(missing) == num_images:
        raise ExtractionError(
            f"--images-dir {images_dir}: none of the {num_images} images is there, not even "
            f"{next(iter(missing))!r} | image_id must be the file's name, extension included"
        )
    if missing:
        first = next(iter(missing))
        log.warning("%d of %d images are missing: %r ...", len(missing), num_images, first)


# ──────────────────────────────────── prompts and positions ────────────────────────────────────
def find_soft_tokens(input_ids: list[int], image_token_id: int, count: int) -> tuple[int, int]:
    """First position of the image's soft tokens, and the one after the last.

    Raises RowError: they are not exactly one run of `count`.
    """
    found = [pos for pos, token in enumerate(input_ids) if token == image_token_id]
    if len(found) != count or found[-1] - found[0] != count - 1:
        raise RowError(f"found {len(found)} image soft tokens; expected one run of {count}")
    return found[0], found[-1] + 1


def count_shared(sequences: list[list[int]]) -> int:
    """Leading tokens that all have in common; one at least, the last, stays each one's own."""
    is_common = (len(set(tokens)) == 1 for tokens in zip(*sequences))
    num_common = sum(itertools.takewhile(bool, is_common))
    return min([num_common, *(len(input_ids) - 1 for input_ids in sequences)])


class Prompts:
    """Turns questions and images into what the model reads, with the model's own processor."""

    def __init__(self, processor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}
        self._lock = threading.Lock()  # a fast tokenizer must not serve two threads at once
        plain = self._encode("?")
        if self.tokenizer.unk_token_id in plain:
            raise ValueError("its tokenizer knows no words: tokenizer.json is missing")
        self._plain_special = [token for token in plain if token in self._special]
        if plain.count(self.tokenizer.bos_token_id) != 1:
            raise ExtractionError("the chat template does not give exactly one <bos>")
        self.soft_start, self.soft_stop = find_soft_tokens(
            plain, self.tokenizer.image_token_id, processor.image_seq_length
        )

    def render(self, question: str) -> str:
        """The chat template with one user turn, image then question, and the generation prompt."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _encode(self, question: str) -> list[int]:
        boi, image = self.processor.boi_token, self.processor.full_image_sequence
        text = self.render(question).replace(boi, image, 1)  # the image stands first
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, question: str) -> list[int]:
        """`input_ids` [T]. Raises RowError if the question is empty or holds special tokens."""
        if not question.strip():
            raise RowError("the question is empty")
        input_ids = self._encode(question)
        special = [token for token in input_ids if token in self._special]
        if special != self._plain_special:
            names = set(self.tokenizer.convert_ids_to_tokens(special))
            held = [name for name in sorted(names) if name in question]
            raise RowError(f"the question holds special tokens as text: {' '.join(held)}")
        return input_ids

    def prepare(self, rows: list[Row], load: Callable[[str], Tensor]) -> list[Prompt | Failure]:
        """Tokenise the rows about one image, and `load` its pixels [3, height, width]."""
        sequences: dict[Row, list[int]] = {}
        failures: dict[Row, Failure] = {}
        for row in rows:
            try:
                sequences[row] = self.tokenize(row.question)
            except RowError as error:
                failures[row] = Failure(row, str(error))
        try:
            pixel_values = load(rows[0].image_id) if sequences else None
        except RowError as error:
            return [failures.get(row, Failure(row, str(error))) for row in rows]
        image = SharedImage(pixel_values, count_shared(list(sequences.values())))
        last = list(sequences)[-1] if sequences else None
        return [
            failures.get(row) or Prompt(row, sequences[row], image, is_last=row is last)
            for row in rows
        ]

    def pixels(self, image: Image.Image) -> Tensor:
        """`pixel_values` of one image, [3, height, width], float32."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def decode(self, token_ids: list[int]) -> str:
        """An answer's text: no special tokens, whitespace kept; NUL would end it in HDF5."""
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True, eq=False)
class Layout:
    """Which token stands where in one forward pass: a row an image, its questions one by one.

    A token's place is (position in its own prompt; first and last question of the batch that it is
    part of; whether it is an image soft token).
    """

    input_ids: Tensor  # [rows, length]
    query: Tensor  # [rows, length, 4]: places of the tokens of this pass
    key: Tensor  # [rows, past + length, 4]: of those run earlier, too
    spans: list[tuple[int, int, int]]  # a question: its row, and its own tokens start … stop - 1


PADDING = (0, -1, -1, 0)  # a place that is part of no question


def lay_out(by_image: list[list[Prompt]], num_before: int, image_token_id: int) -> Layout:
    """Put the questions about an image behind the tokens they share, each at its own positions.

    Questions are counted from `num_before`. Where an earlier pass has run the shared tokens, they
    stand before this pass instead of in it; that image must be the only one.
    """
    past, input_ids, places, spans = [], [], [], []
    for row, prompts in enumerate(by_image):
        image, first = prompts[0].image, num_before + len(spans)
        last = first + len(prompts) - 1
        ids = prompts[0].input_ids[: image.num_shared]
        place = [(pos, first, last, token == image_token_id) for pos, token in enumerate(ids)]
        if image.key_values is not None:
            past, place, ids = [place], [], []
        for question, prompt in enumerate(prompts, start=first):
            own = prompt.input_ids[image.num_shared :]
            spans.append((row, len(ids), len(ids) + len(own)))
            ids = ids + own
            positions = range(image.num_shared, len(prompt.input_ids))
            place += [(pos, question, question, False) for pos in positions]
        input_ids.append(ids)
        places.append(place)
    query = _pad(places, PADDING)
    key = torch.cat([torch.tensor(past), query], dim=1) if past else query
    return Layout(_pad(input_ids, 0), query, key, spans)


def _pad(rows: list[list], value) -> Tensor:
    """[rows, longest, …], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def attention_masks(query: Tensor, key: Tensor, window: int) -> dict[str, Tensor]:
    """Who sees whom, [rows, 1, queries, keys], for the two kinds of decoder layers.

    A token sees its own prompt up to itself, and the soft tokens of an image see each other in
    both directions; sliding layers see `window` positions back. As in `modeling_gemma3`.
    """
    q_pos, question, _, q_soft = query[:, :, None].unbind(-1)
    k_pos, first, last, k_soft = key[:, None].unbind(-1)
    is_own = (first <= question) & (question <= last)
    visible = is_own & ((k_pos <= q_pos) | (q_soft & k_soft).bool())
    near = visible & (q_pos - k_pos < window)
    return {"full_attention": visible[:, None], "sliding_attention": near[:, None]}


# ──────────────────────────────────────────── hooks ────────────────────────────────────────────
@contextlib.contextmanager
def forward_hooks(hooks: list[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Show each module's output to its observer; every hook is gone afterwards, come what may.

    Raises ExtractionError: a module did not run exactly once.
    """
    calls = [0] * len(hooks)

    def hook(place: int, observe: Callable, _module, _args, output) -> None:
        calls[place] += 1
        output = getattr(output, "last_hidden_state", output)
        observe(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        for place, (module, observe) in enumerate(hooks):
            handle = module.register_forward_hook(functools.partial(hook, place, observe))
            stack.callback(handle.remove)
        yield
    if calls != [1] * len(hooks):
        raise ExtractionError(f"hooked modules ran {calls} times; expected once each")


@dataclass(eq=False)
class Captured:
    """What the hooks keep of one pass: a few vectors a row or a question, never a sequence."""

    spans: list[tuple[int, int, int]]  # of `Layout`
    num_shared: list[int]  # shared tokens of every row, where they are in this pass
    soft_pos: int  # last image soft token
    patches: Tensor | None = None  # [rows, D_v]
    soft: list[Tensor] = field(default_factory=list)  # a layer: [rows, D]
    shared_sum: list[Tensor] = field(default_factory=list)  # a layer: [rows, D]
    query: list[Tensor] = field(default_factory=list)  # a layer: [questions, D]
    own_sum: list[Tensor] = field(default_factory=list)  # a layer: [questions, D]

    def on_patches(self, patches: Tensor) -> None:  # [rows, num_patches, D_v]
        """Observe the vision tower."""
        self.patches = patches.mean(dim=1, dtype=torch.float32)

    def on_layer(self, hidden: Tensor) -> None:  # [rows, length, D]
        """Observe a decoder layer."""
        own = [hidden[row, start:stop] for row, start, stop in self.spans]
        self.query.append(torch.stack([tokens[-1] for tokens in own]).float())
        self.own_sum.append(_sums(own))
        if self.num_shared:
            self.soft.append(hidden[:, self.soft_pos].to(torch.float32, copy=True))
            self.shared_sum.append(_sums([h[:n] for h, n in zip(hidden, self.num_shared)]))


def _sums(sequences: list[Tensor]) -> Tensor:
    return torch.stack([tokens.sum(dim=0, dtype=torch.float32) for tokens in sequences])


# ───────────────────────────────────────── extraction ──────────────────────────────────────────
def state_shapes(config, layers: list[int]) -> dict[str, int]:
    """Name and width of every vector of a sample, in the order in which they are kept."""
    names = [f"{kind}/layer_{i}" for kind in LAYER_KINDS for i in layers]
    widths = dict.fromkeys(names, config.text_config.hidden_size)
    return {VISION: config.vision_config.hidden_size} | widths


class KeyValueCache:
    """Keys and values of every decoder layer, [rows, num_key_value_heads, length, head_dim].

    Buffers have room, so that new tokens are written in place. A decoder layer calls `update`.
    What is not finite becomes 0: attention multiplies what it ignores by 0, which NaN survives.
    """

    def __init__(
        self, key_values: Iterable[tuple[Tensor, Tensor]] = (), is_kept: bool = True
    ) -> None:
        self._buffers = dict(enumerate(key_values))
        self._lengths = {i: keys.shape[2] for i, (keys, _) in self._buffers.items()}
        self._is_kept = is_kept  # else nothing follows this pass, and memory is dear

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens held."""
        return self._lengths.get(layer_idx, 0)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple:
        """Append, and return all there is."""
        start = self.get_seq_length(layer_idx)
        stop = start + keys.shape[2]
        if not start:
            new = keys.nan_to_num_(0, 0, 0), values.nan_to_num_(0, 0, 0)
            if self._is_kept:
                self._buffers[layer_idx], self._lengths[layer_idx] = new, stop
            return new
        buffers = self._buffers[layer_idx]
        if buffers[0].shape[2] < stop:
            shape = (*keys.shape[:2], stop + stop // 4, keys.shape[3])
            larger = tuple(keys.new_empty(shape) for _ in buffers)
            for new, old in zip(larger, buffers, strict=True):
                new[:, :, :start] = old[:, :, :start]
            buffers = self._buffers[layer_idx] = larger
        for buffer, new in zip(buffers, (keys, values), strict=True):
            torch.nan_to_num(new, 0, 0, 0, out=buffer[:, :, start:stop])
        self._lengths[layer_idx] = stop
        return self.layer(layer_idx)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """All there is of one layer."""
        length = self._lengths[layer_idx]
        return tuple(buffer[:, :, :length] for buffer in self._buffers[layer_idx])

    def drop(self, layer_idx: int) -> None:
        """Forget a layer."""
        del self._buffers[layer_idx], self._lengths[layer_idx]


@dataclass(frozen=True, eq=False)
class Prefill:
    """One forward pass over prompts: their states, and what their answers go on from."""

    states: Tensor  # [questions, sum of state_shapes()], float32
    last: Tensor  # [questions, D]: of the last prompt tokens, after the final norm
    cache: KeyValueCache  # [rows, num_key_value_heads, past + length, head_dim]
    key: Tensor  # [rows, past + length, 4], of `Layout`


class Extractor:
    """The loaded model: turns a batch of prompts into states and answers.

    Each image goes through the vision tower once, and the tokens that its prompts share through
    the decoder once; states and answers come from that same pass.
    """

    def __init__(self, model, prompts: Prompts, layers: list[int], max_new_tokens: int, device):
        decoder = "model.language_model"
        paths = ["model.vision_tower", decoder, *(f"{decoder}.layers.{i}" for i in layers)]
        try:
            self._vision_tower, self._decoder, *self._layers = map(model.get_submodule, paths)
        except AttributeError as error:
            raise ExtractionError(
                f"{type(model).__name__}: {error}; install the versions in requirements.txt"
            ) from error
        self.model = model
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.device = device
        # An accelerator wants the images of a batch in one pass; a CPU is faster one by one.
        self.joins_images = device.type != "cpu"
        self._window = model.config.text_config.sliding_window
        end = model.generation_config.eos_token_id
        self._end_ids = set(end if isinstance(end, list) else [end])

    @torch.inference_mode()
    def run(self, prompts: list[Prompt]) -> list[Sample]:
        """States and answers, in order; prompts about one image must stand side by side."""
        passes: list[Prefill] = []
        for by_image in self._forward_passes(prompts):
            passes.append(self._prefill(by_image, sum(len(done.states) for done in passes)))
        states = torch.cat([done.states for done in passes])
        host = torch.empty(states.shape, pin_memory=states.is_cuda)
        host.copy_(states, non_blocking=True)
        wait = _mark(states.device)
        answers, truncated = [[] for _ in prompts], [False] * len(prompts)
        if self.max_new_tokens:
            answers, truncated = self._decode(prompts, passes)
        fields = zip(prompts, host, answers, truncated, strict=True)
        return [Sample(*values, wait) for values in fields]

    def _forward_passes(self, prompts: list[Prompt]) -> Iterator[list[list[Prompt]]]:
        """Images together that waste little on padding; one whose prefix has been run, alone."""
        group: list[list[Prompt]] = []
        for _, about_image in itertools.groupby(prompts, key=lambda prompt: prompt.image):
            added = list(about_image)
            if group and not self._fits(group, added):
                yield group
                group = []
            group = [*group, added]
        yield group

    def _fits(self, group: list[list[Prompt]], added: list[Prompt]) -> bool:
        lengths = [count_tokens(prompts) for prompts in (*group, added)]
        padding = 1 - sum(lengths) / (len(lengths) * max(lengths))
        is_first_run = added[0].image.key_values is group[0][0].image.key_values is None
        return self.joins_images and is_first_run and padding <= MAX_PADDING

    def _prefill(self, by_image: list[list[Prompt]], num_before: int) -> Prefill:
        """Run prompts once; `num_before` prompts of the batch have been."""
        images, last_prompt = [prompts[0].image for prompts in by_image], by_image[-1][-1]
        past = images[0].key_values
        new_images = images if past is None else []
        layout = lay_out(by_image, num_before, self.prompts.tokenizer.image_token_id)
        query, key = (put(places, self.device) for places in (layout.query, layout.key))
        is_kept = bool(past or self.max_new_tokens or not last_prompt.is_last)
        cache = KeyValueCache(past or (), is_kept)
        num_shared = [image.num_shared for image in new_images]
        captured = Captured(layout.spans, num_shared, self.prompts.soft_stop - 1)
        hooks = [(layer, captured.on_layer) for layer in self._layers]
        if new_images:
            hooks.append((self._vision_tower, captured.on_patches))
        with forward_hooks(hooks):
            hidden = self._decoder(
                inputs_embeds=self._embed(layout.input_ids, new_images),
                attention_mask=attention_masks(query, key, self._window),
                position_ids=query[:, :, 0],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # [rows, length, D], normed
        self._keep(new_images, captured)
        if last_prompt.is_last:
            last_prompt.image.key_values = None
        elif past is None:
            last_prompt.image.key_values = self._prefix(last_prompt.image, cache)
        states = self._states(list(itertools.chain.from_iterable(by_image)), captured)
        last = torch.stack([hidden[row, stop - 1] for row, _, stop in layout.spans])
        return Prefill(states, last, cache, key)

    def _keep(self, new_images: list[SharedImage], captured: Captured) -> None:
        if new_images:
            by_layer = self._by_layer(captured.soft), self._by_layer(captured.shared_sum)
            for image, *states in zip(new_images, captured.patches.to(self.device), *by_layer):
                image.states = tuple(states)

    def _prefix(self, image: SharedImage, cache: KeyValueCache) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the shared tokens of a pass's last image."""
        layers = (cache.layer(i) for i in range(len(self._decoder.layers)))
        return [tuple(t[-1:, :, : image.num_shared].clone() for t in pair) for pair in layers]

    def _embed(self, input_ids: Tensor, new_images: list[SharedImage]) -> Tensor:
        """Embeddings of a pass, [rows, length, D], the images' in place of their soft tokens."""
        embeds = self._decoder.embed_tokens(put(input_ids, self.device))
        if new_images:
            pixel_values = torch.stack(
                [image.pixel_values.to(self.device, non_blocking=True) for image in new_images]
            )  # [rows, 3, height, width]
            features = self.model.model.get_image_features(pixel_values).pooler_output
            embeds[:, self.prompts.soft_start : self.prompts.soft_stop] = features.to(embeds)
        return embeds

    def _by_layer(self, vectors: list[Tensor]) -> Tensor:
        """[rows or questions, layers, D], on one device."""
        return torch.stack([vector.to(self.device) for vector in vectors], dim=1)

    def _states(self, prompts: list[Prompt], captured: Captured) -> Tensor:
        """Every vector of every question, side by side in the order of `state_shapes`."""
        shared = zip(*(prompt.image.states for prompt in prompts), strict=True)
        patches, soft, shared_sum = map(torch.stack, shared)  # [questions, D_v], [.., layers, D]
        lengths = put([len(prompt.input_ids) for prompt in prompts], self.device)[:, None, None]
        mean = (shared_sum + self._by_layer(captured.own_sum)) / lengths
        by_layer = (soft, self._by_layer(captured.query), mean)
        return torch.cat([patches, *(vectors.flatten(1) for vectors in by_layer)], dim=1)

    def _decode(self, prompts: list[Prompt], passes: list[Prefill]) -> tuple[list, list]:
        """Greedy answers without their end tokens, and whether the limit cut them short.

        All questions stand side by side in one row behind the keys and values of the batch, each
        sees its own prompt and answer, and leaves the row as it ends.
        """
        cache, key = self._pack(passes)
        pos = put([len(prompt.input_ids) for prompt in prompts], self.device)
        live = list(range(len(prompts)))
        question = put(live, self.device)
        query = torch.stack([pos, question, question, 0 * pos], dim=-1)[None]  # [1, live, 4]
        hidden = torch.cat([done.last for done in passes])  # [live, D]
        next_pos = put([1, 0, 0, 0], self.device)
        answers: list[list[int]] = [[] for _ in prompts]
        while True:
            tokens = self.model.lm_head(hidden).argmax(-1).to(self.device)  # [live]
            for place, token in zip(live, tokens.tolist(), strict=True):
                answers[place].append(token)
            going = [i for i, place in enumerate(live) if answers[place][-1] not in self._end_ids]
            if not going or len(answers[live[0]]) == self.max_new_tokens:
                break
            if len(going) < len(live):
                live = [live[i] for i in going]
                tokens, query = tokens[going], query[:, going]
            key = torch.cat([key, query], dim=1)
            hidden = self._decoder(
                input_ids=tokens[None],
                attention_mask=attention_masks(query, key, self._window),
                position_ids=query[:, :, 0],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[0]  # [live, D]
            query = query + next_pos
        truncated = [answer[-1] not in self._end_ids for answer in answers]
        return [a if is_cut else a[:-1] for a, is_cut in zip(answers, truncated)], truncated

    def _pack(self, passes: list[Prefill]) -> tuple[KeyValueCache, Tensor]:
        """Keys and values of a batch in one row, and their places [1, slots, 4]."""

        def pop(prefill: Prefill, layer_idx: int) -> list[Tensor]:  # [heads, slots, head_dim]
            packed = [t.transpose(0, 1).flatten(1, 2) for t in prefill.cache.layer(layer_idx)]
            prefill.cache.drop(layer_idx)  # so that never two copies of the whole cache are held
            return packed

        key_values = []
        for layer_idx in range(len(self._decoder.layers)):
            pairs = [pop(prefill, layer_idx) for prefill in passes]
            packed = (torch.cat(tensors, dim=1)[None] for tensors in zip(*pairs, strict=True))
            key_values.append(tuple(packed))
        key = torch.cat([prefill.key.flatten(0, 1) for prefill in passes])[None]
        return KeyValueCache(key_values), key


def count_tokens(prompts: list[Prompt]) -> int:
    """Tokens to run for prompts about one image, what they share counted once."""
    num_shared = prompts[0].image.num_shared
    return num_shared + sum(len(prompt.input_ids) - num_shared for prompt in prompts)


def put(values: Tensor | list[int], device: torch.device) -> Tensor:
    """A tensor on the device; pinned, as a copy from pageable memory makes the CPU wait."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _mark(device: torch.device) -> Callable[[], None]:
    """A function that returns when all that the device was asked for so far is done."""
    if device.type == "cpu":
        return lambda: None
    event = torch.Event(device=device)
    event.record(torch.accelerator.current_stream(device))  # the default is another device's
    return event.synchronize


# ────────────────────────────────────── loading the model ──────────────────────────────────────
@contextlib.contextmanager
def explain_load_errors(model: str) -> Iterator[None]:
    """Turn what transformers raises for a missing, gated or broken model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "the directory must hold the whole model, its weights as *.safetensors"
        if not Path(model).is_dir():
            advice = (
                f"if it is gated, accept its licence at https://huggingface.co/{model} and run "
                "`hf auth login`; a model that is here already: --model DIR"
            )
        raise ExtractionError(f"cannot load {model}: {reason} | {advice}") from error


def load_processor(options: Options):
    """The model's config and processor: small files, enough to plan and check a run."""
    from transformers import AutoConfig, AutoProcessor

    where = {"revision": options.revision, "cache_dir": options.cache_dir}
    with explain_load_errors(options.model):
        config = AutoConfig.from_pretrained(options.model, **where)
        if config.model_type != "gemma3":
            raise ValueError(f"its type is {config.model_type}; expected gemma3 (4B, 12B or 27B)")
        if Path(options.model).is_dir() and not list(Path(options.model).glob("*.safetensors")):
            raise ValueError("it has no *.safetensors")
        # With torchvision's back end pixels differ by 1/255 in places; Pillow is always there.
        return config, AutoProcessor.from_pretrained(options.model, **where, backend="pil")


def load_model(options: Options, device: torch.device):
    """The whole model, in evaluation mode, its weights from safetensors and complete."""
    import transformers

    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with explain_load_errors(options.model):
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            options.model,
            revision=options.revision,
            cache_dir=options.cache_dir,
            dtype=getattr(torch, options.dtype),
            attn_implementation="sdpa",  # flash attention cannot carry the image mask
            device_map=options.device_map or {"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
        if absent := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
            raise ValueError(f"{len(absent)} weights are missing or misshapen, first {absent[0]}")
    return model.eval()


def check_device(name: str) -> torch.device:
    """The device; under a launcher, `cuda` is this process's card. Raises ExtractionError."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ExtractionError(f"--device {name}: {reason} | without a GPU: --device cpu") from error


def choose_layers(asked: tuple[int, ...] | None, num_layers: int) -> list[int]:
    """The layers asked for, negatives from the end, or HALP's: first, quarters and last."""
    n = num_layers
    chosen = (0, n // 4, n // 2, 3 * n // 4, n - 1) if asked is None else asked
    if wrong := [i for i in chosen if not -n <= i < n]:
        raise ExtractionError(f"--layers {wrong[0]}: the model has layers 0 to {n - 1}")
    return sorted({i % n for i in chosen})


def find_revision(model: str, config) -> str:
    """The hub's commit; of a local directory, a hash of its files, of large ones by samples."""
    if commit := getattr(config, "_commit_hash", None):
        return commit
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*")):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                for start in range(0, size, max(SAMPLED_BYTES, size // 256)):
                    file.seek(start)
                    digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def name_model_type(config) -> str:
    """`gemma-3-12b-multimodal`, or what size it is; parameters are counted without memory."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        count = AutoModelForImageTextToText.from_config(config).num_parameters()
    size = f"{count / 1e9:.0f}b" if count >= 5e8 else f"{count / 1e6:.1f}m"
    return f"gemma-3-{size}-multimodal"


def describe_run(options: Options, config, prompts: Prompts, rows: list[Row], device) -> dict:
    """The root attributes of every part; those in `IDENTITY` may not change."""
    import transformers

    decoder = config.text_config
    return {
        "model_name": str(Path(options.model)) if Path(options.model).exists() else options.model,
        "model_type": name_model_type(config),
        "model_revision": find_revision(options.model, config),
        "device": options.device_map or str(device),
        "dtype": options.dtype,
        "layers": choose_layers(options.layers, decoder.num_hidden_layers),
        "num_layers": decoder.num_hidden_layers,
        "hidden_size": decoder.hidden_size,
        "vision_hidden_size": config.vision_config.hidden_size,
        "max_new_tokens": options.max_new_tokens,
        "prompt": prompts.render("{question}"),
        "image_processor": type(prompts.processor.image_processor).__name__,
        "attn_implementation": "sdpa",
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
        "python_version": platform.python_version(),
        "schema_version": SCHEMA_VERSION,
        "checkpoint_interval": options.checkpoint_interval,
        "storage_dtype": options.storage_dtype,
        "dataset": options.vqa_dataset.name,
        "dataset_sha256": hash_rows(rows),
    }


# ────────────────────────────────── writing and resuming parts ─────────────────────────────────
def part_path(output_dir: Path, number: int) -> Path:
    """Where part `number` belongs."""
    return output_dir / PART_NAME.format(number)


def find_parts(output_dir: Path) -> list[Path]:
    """The finished parts."""
    return sorted(p for p in output_dir.glob("*.h5") if OUR_FILES.fullmatch(p.name))


def group_name(question_id: str) -> str:
    """A name that HDF5 takes; `urllib.parse.unquote` gives the question_id back."""
    name = question_id.replace("%", "%25").replace("/", "%2F")
    return name.replace(".", "%2E") if not name.strip(".") else name


def storage_type(name: str, storage_dtype: str) -> h5py.h5t.TypeID:
    """The HDF5 type of a vector; bfloat16 is 1 + 8 + 7 bits that h5py reads as float32."""
    file_type = h5py.h5t.IEEE_F32LE.copy()
    if storage_dtype == "bfloat16" and name.partition("/")[0] not in (VISION, MEAN):
        file_type.set_fields(15, 7, 8, 0, 7)
        file_type.set_size(2)
        file_type.set_ebias(127)
    return file_type


@functools.cache
def vector_layout(name: str, width: int, storage_dtype: str, compression: str) -> tuple:
    """HDF5's type, space, creation and link properties of a vector.

    Its own calls with these take a third of the time of h5py's `create_dataset`.
    """
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if compression != "none":
        layout.set_chunk((width,))
        layout.set_shuffle()
    if compression == "gzip":
        layout.set_deflate(1)
    elif compression == "lzf":
        layout.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple((width,))
    return storage_type(name, storage_dtype), space, layout, links


def bytes_per_sample(shapes: dict[str, int], storage_dtype: str) -> int:
    """What one sample takes on the disk, uncompressed."""
    sizes = {name: storage_type(name, storage_dtype).get_size() for name in shapes}
    return SAMPLE_OVERHEAD + sum(n * sizes[name] + VECTOR_OVERHEAD for name, n in shapes.items())


def sync(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, partial: Path) -> None:
    """Put a file in the place of another; a crash leaves the one or the other, whole."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


class PartWriter:
    """Writes one part under another name, and renames it into place once it is safe on the disk.

    What a finished file of the same number holds is taken over with the first sample; if none
    comes, it stays as it is. Room on the disk is reserved before HDF5 is given anything to write:
    a full disk costs no sample, where HDF5 would end the process.
    """

    def __init__(self, path: Path, attributes: dict, compression: str) -> None:
        self.path = path
        self._partial = path.with_suffix(".partial")
        self._attributes = attributes
        self._storage = (attributes["storage_dtype"], compression)
        self._file: h5py.File | None = None
        self._reserved = 0

    def _open(self) -> None:
        # HDF5 1.10's format: smaller, and with checksums over all but the vectors themselves.
        self._file = h5py.File(self._partial, "w", libver=("v110", "v110"))
        try:
            self._reserve(self.path.stat().st_size if self.path.exists() else 0)
            self._file.attrs.update(self._attributes)
            if self.path.exists():
                with h5py.File(self.path) as finished:
                    for name in finished:
                        finished.copy(name, self._file)
        except BaseException:  # half a part must not take the place of the finished one
            self.discard()
            raise

    def _reserve(self, size: int) -> None:
        needed = self._file.id.get_filesize() + size + DISK_AHEAD
        if needed > self._reserved:
            try:
                with open(self._partial, "rb+") as file:
                    os.posix_fallocate(file.fileno(), self._reserved, needed - self._reserved)
            except OSError as error:  # nothing is half written, and there is room to finish
                raise ExtractionError(
                    f"writing to {self.path.parent}: {error} | what was done is saved; the same "
                    "command goes on, once there is room"
                ) from error
            self._reserved = needed

    def add(self, row: Row, states: dict[str, np.ndarray], answer: str, attributes: dict) -> None:
        """Write one sample. Raises ExtractionError, with nothing written: the disk is full."""
        if self._file is None:
            self._open()
        texts = (row.question, row.image_id, answer, row.ground_truth)
        self._reserve(sum(v.nbytes for v in states.values()) + 4 * sum(map(len, texts)))
        group = self._file.create_group(group_name(row.question_id))
        for name, text in zip(TEXTS, texts, strict=True):
            group.create_dataset(name, data=text, dtype=h5py.string_dtype())
        for name, vector in states.items():
            layout = vector_layout(name, len(vector), *self._storage)
            if layout[0].get_size() == 2:
                vector = torch.from_numpy(vector).bfloat16().view(torch.int16).numpy()
            dataset = h5py.h5d.create(group.id, name.encode(), *layout)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, vector, layout[0])
        group["vision_only_representation"] = h5py.SoftLink(VISION)
        group.attrs.update({"question_id": row.question_id, "row": row.index, **attributes})

    def finish(self) -> None:
        """Write, sync, check and rename; a part that gained nothing stays as it was."""
        if self._file is None:
            if self.path.exists():
                return
            self._open()
        count = len(self._file)
        self._file.attrs["num_samples"] = count
        self._file.attrs["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        os.truncate(self._partial, size)
        with h5py.File(self._partial) as written:
            if len(written) != count:
                raise OSError(f"{self._partial} holds {len(written)} samples; expected {count}")
        replace_file(self.path, self._partial)

    def discard(self) -> None:
        """Forget what was written since the part was opened."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._partial.unlink(missing_ok=True)


def read_part(path: Path, settings: dict, shapes: dict[str, int]) -> dict[str, dict[str, str]]:
    """What the CSV said of each sample of a finished part, by question_id; all of it is checked.

    Raises one of DAMAGE: it does not open, or something in it is missing, misshapen or not finite;
    ExtractionError: it was written with other settings.
    """
    with h5py.File(path) as file:
        attributes = {
            name: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
            for name, value in file.attrs.items()
        }
        if absent := settings.keys() - attributes.keys():
            raise ValueError(f"its attributes {sorted(absent)} are gone")
        check_same("settings", path, attributes, {k: settings[k] for k in IDENTITY})
        if attributes["num_samples"] != len(file):
            raise ValueError(f"{len(file)} samples; expected {attributes['num_samples']}")
        groups = [file[name] for name in file]  # file.values() holds h5py's lock while it waits
        return {group.attrs["question_id"]: _check_sample(group, shapes) for group in groups}


def _check_sample(group: h5py.Group, shapes: dict[str, int]) -> dict[str, str]:
    if group_name(group.attrs["question_id"]) != group.name[1:]:
        raise ValueError(f"{group.name} holds question_id {group.attrs['question_id']!r}")
    for name, width in shapes.items():
        vector = group[name][()]
        if vector.shape != (width,) or not np.isfinite(vector).all():
            raise ValueError(f"{group.name}/{name} is misshapen or not finite")
    if not np.array_equal(group["vision_only_representation"][()], group[VISION][()]):
        raise ValueError(f"{group.name}/vision_only_representation is not {VISION}")
    if absent := SAMPLE_ATTRIBUTES - group.attrs.keys():
        raise ValueError(f"{group.name} lacks the attributes {sorted(absent)}")
    question, image_id, _, ground_truth = (group[name].asstr()[()] for name in TEXTS)
    return {"question": question, "image_id": image_id, "answer": ground_truth}


def stored_ids(path: Path) -> set[str]:
    """The question_ids in a finished part; none if there is no such part."""
    if not path.exists():
        return set()
    try:
        with h5py.File(path) as file:
            return {urllib.parse.unquote(name) for name in file}
    except OSError as error:
        raise ExtractionError(f"{path} cannot be read: {error} | run again") from error


def scan_parts(output_dir: Path, settings: dict, shapes: dict, rows: list[Row]) -> set[str]:
    """The question_ids that are stored. Every part is read and checked, damaged ones set aside.

    Raises ExtractionError: a part is of another kind of run, or a row changed under its id.
    """
    stored: set[str] = set()
    by_id = {row.question_id: row for row in rows}
    for path in find_parts(output_dir):
        try:
            texts = read_part(path, settings, shapes)
        except DAMAGE as error:
            if getattr(error, "errno", None) is not None:  # the system denies the file
                raise ExtractionError(
                    f"{path} cannot be read: {error} | close the program that has it open"
                ) from error
            aside = path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
            os.replace(path, aside)
            log.warning("%s is damaged (%s): set aside as %s", path, error, aside.name)
            continue
        for question_id in texts.keys() & by_id.keys():
            row = by_id[question_id]
            now = {"question": row.question, "image_id": row.image_id, "answer": row.ground_truth}
            check_same(f"texts of question_id {question_id!r}", path, texts[question_id], now)
        stored |= texts.keys()
    return stored


def check_same(what: str, path: Path, stored: dict, current: dict) -> None:
    """Raise ExtractionError that names everything that differs, with both values."""
    pairs = [(name, stored.get(name), now) for name, now in current.items()]
    differing = [f"{name} was {old!r} and is {now!r}" for name, old, now in pairs if old != now]
    if differing:
        raise ExtractionError(
            f"{path} was written with other {what}: {'; '.join(differing)} "
            "| go on with the old ones, choose another --output-dir, or --overwrite"
        )


def update_failures(
    output_dir: Path, is_open: Callable[[str], bool], new: Iterable[Failure] = ()
) -> None:
    """Keep of `failed_samples.csv` the question_ids that are still open, and add new ones.

    No failures, no file.
    """
    path, lines = output_dir / FAILED_NAME, []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            lines = list(csv.reader(file))[1:]
    lines = [line for line in lines if len(line) == 3 and is_open(line[0])]
    lines += [[f.row.question_id, f.row.image_id, f.error] for f in new]
    if not lines:
        return path.unlink(missing_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question_id", "image_id", "error"), *lines])
    replace_file(path, partial)


def remove_files(output_dir: Path, everything: bool) -> None:
    """Delete what a killed run left half written, or everything this program ever wrote here."""
    for path in output_dir.iterdir():
        if OUR_FILES.fullmatch(path.name) and (everything or path.suffix == ".partial"):
            path.unlink()


# ─────────────────────────────────── processes on one output ───────────────────────────────────
class Launch:
    """The processes of one launch (torchrun, accelerate) and what they count together.

    A process alone counts for itself. The tasks of a Slurm array are alone, but of one run.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        self.run_id = f"slurm-{array}" if array else uuid.uuid4().hex
        self._store = torch.distributed.HashStore()
        if self.world_size > 1:
            try:
                self._store, _, _ = next(torch.distributed.rendezvous("env://"))
            except (ValueError, torch.distributed.DistError) as error:
                raise ExtractionError(
                    f"WORLD_SIZE is {self.world_size}, but the processes find no store: {error} "
                    "| start them with accelerate launch or torchrun"
                ) from error
            if self.rank == 0:
                self._store.set("run_id", self.run_id)
            self.run_id = self._store.get("run_id").decode()

    def add(self, name: str, amount: int) -> int:
        """Add to a count that all processes share; its value after that."""
        try:
            return self._store.add(name, amount)
        except torch.distributed.DistError:  # who kept the counts is gone: go on alone
            self._store, self.world_size = torch.distributed.HashStore(), 1
            self._store.add("finished", 1)
            return self._store.add(name, amount)


class OutputLock:
    """POSIX record locks on `{output_dir}/.lock`, which the kernel drops with their process.

    Byte 0 is the run: one process's while it prepares the directory, then shared by all of the
    run. Byte k is part k: whoever holds it writes that part.
    """

    FAILURES = 1 << 40  # the byte of `failed_samples.csv`, which belongs to all

    def __init__(self, output_dir: Path, run_id: str) -> None:
        self._path = output_dir / ".lock"
        self._run_id = run_id
        self._holder: dict = {}
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self) -> bool:
        """Join the run; True for the process that is to prepare the directory, then `share()`.

        Raises ExtractionError: another run is at work here.
        """
        deadline = time.monotonic() + 2  # another process may be about to write its name
        while not self.claim(0):
            time.sleep(0.1)
            with contextlib.suppress(ValueError):
                self._holder = json.loads(os.pread(self._descriptor, HOLDER_BYTES, 0))
            if self._holder.get("run_id") != self._run_id:
                if time.monotonic() < deadline:
                    continue
                raise ExtractionError(
                    f"{self._path.parent} is in use by process {self._holder.get('pid')} on "
                    f"{self._holder.get('host')} | wait for it, or choose another --output-dir"
                )
            if self._holder.get("is_prepared"):
                fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)
                return False
        self._tell(is_prepared=False)
        return True

    def share(self) -> None:
        """Let the other processes of this run in."""
        self._tell(is_prepared=True)
        fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)

    def _tell(self, is_prepared: bool) -> None:
        holder = {"run_id": self._run_id, "host": socket.gethostname(), "pid": os.getpid()}
        text = json.dumps(holder | {"is_prepared": is_prepared}).ljust(HOLDER_BYTES)
        os.pwrite(self._descriptor, text.encode(), 0)

    def claim(self, number: int) -> bool:
        """Whether part `number` is this process's to write from now on."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, self.FAILURES)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self.FAILURES)

    def release(self) -> None:
        """Leave the run."""
        os.close(self._descriptor)


class Work:
    """Which rows are to do, and which of them this process does, part by part."""

    def __init__(self, parts: dict[int, list[Row]], stored: set[str], launch: Launch, lock) -> None:
        self.lock: OutputLock = lock
        self.part_of = {row: number for number, rows in parts.items() for row in rows}
        is_stored = [row.question_id in stored for row in self.part_of]
        self.num_rows, self.num_stored = len(is_stored), sum(is_stored)
        self.num_before = dict(zip(self.part_of, itertools.accumulate(is_stored)))  # stored ones
        self.ends: set[Row] = set()  # last missing rows of the claimed parts
        self._parts = parts
        self._stored = stored
        self._launch = launch

    def claim_rows(self, output_dir: Path) -> Iterator[Row]:
        """The missing rows of one part after the other that no other process has taken."""
        for number, rows in self._parts.items():
            if all(row.question_id in self._stored for row in rows):
                continue
            if self._launch.add(f"part {number}", 1) > 1 or not self.lock.claim(number):
                continue
            # A task of the same array may have finished it since this one looked.
            stored = self._stored | stored_ids(part_path(output_dir, number))
            missing = [row for row in rows if row.question_id not in stored]
            self.ends.update(missing[-1:])
            yield from missing


def open_output(options: Options, settings: dict, shapes: dict, rows: list[Row], launch) -> Work:
    """Lock the directory, look at what is there already, and plan the rest.

    Raises ExtractionError: in use, of another run, not writable, or too small for what is to come.
    """
    output_dir = options.output_dir
    identity = json.dumps([settings[name] for name in (*IDENTITY, "dataset_sha256")])
    run_id = f"{launch.run_id}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    size = bytes_per_sample(shapes, options.storage_dtype)
    parts = plan_parts(rows, options.checkpoint_interval)
    if options.test:
        first = set(rows[:NUM_TEST_ROWS])
        parts = {k: [row for row in part if row in first] for k, part in parts.items()}
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = OutputLock(output_dir, run_id)
        if not lock.acquire():
            stored = set().union(*map(stored_ids, find_parts(output_dir)))
            return Work(parts, stored, launch, lock)
        # Once a launch, by whoever prepares first: one that comes late finds what the others wrote.
        overwrites = options.overwrite and launch.add("overwritten", 1) == 1
        stored = set() if overwrites else scan_parts(output_dir, settings, shapes, rows)
        work = Work(parts, stored, launch, lock)
        remove_files(output_dir, everything=False)
        check_disk(output_dir, (work.num_rows - work.num_stored) * size, overwrites)
        if overwrites:
            remove_files(output_dir, everything=True)
        missing = {row.question_id for row in rows} - stored
        update_failures(output_dir, lambda question_id: question_id in missing)
        lock.share()
    except OSError as error:
        raise ExtractionError(
            f"--output-dir {output_dir}: {error.strerror or error} "
            "| choose a directory that can be written to"
        ) from error
    return work


def check_disk(output_dir: Path, needed: int, frees_parts: bool) -> None:
    """Raise ExtractionError if what is to come does not fit; what is to go counts as free."""
    free = shutil.disk_usage(output_dir).free
    if frees_parts:
        free += sum(path.stat().st_size for path in find_parts(output_dir))
    if needed > free:
        raise ExtractionError(
            f"{output_dir} has {free / 1e6:.1f} MB free; the run needs {needed / 1e6:.1f} MB "
            "| make room, or choose another --output-dir or --storage-dtype bfloat16"
        )


# ─────────────────────────────────────────── the run ───────────────────────────────────────────
class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (Slurm's early warning) into a wish to stop.

    The batch in hand is finished and saved; Ctrl-C once more ends the process at once.
    """

    def __init__(self) -> None:
        self.status: int | None = None  # the exit status asked for
        self._since = 0.0

    def __enter__(self) -> StopSignal:
        self._previous = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame) -> None:
        # A launcher passes on the Ctrl-C that the terminal has sent already: not a second one.
        if signum == signal.SIGINT and self.status and time.monotonic() - self._since > 1:
            os._exit(130)
        if self.status is None:
            self.status = 130 if signum == signal.SIGINT else 143
            self._since = time.monotonic()


def prepare_image(
    rows: list[Row], options: Options, prompts: Prompts, device: torch.device
) -> list[Prompt | Failure]:
    """The rows about one image as the model reads them, ready for an asynchronous copy."""

    def load(image_id: str) -> Tensor:
        pixel_values = prompts.pixels(open_image(options.images_dir, image_id))
        pixel_values = pixel_values.to(getattr(torch, options.dtype))
        return pixel_values.pin_memory() if device.type == "cuda" else pixel_values

    return prompts.prepare(rows, load)


def prepare_ahead(
    rows: Iterable[Row], prepare: Callable[[list[Row]], list], num_workers: int, num_images: int
) -> Iterator[Prompt | Failure]:
    """Row after row in order; threads prepare `num_images` while the model works on others."""
    pending: deque = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for _, about_image in itertools.groupby(rows, key=lambda row: row.image_id):
                pending.append(pool.submit(prepare, list(about_image)))
                if len(pending) > num_images:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_batches(
    rows: Iterable[Prompt | Failure], batch_size: int
) -> Iterator[list[Prompt | Failure]]:
    """Consecutive rows with `batch_size` prompts among them; failures alone are not held back."""
    batch: list[Prompt | Failure] = []
    num_prompts = 0
    for row in rows:
        batch.append(row)
        num_prompts += isinstance(row, Prompt)
        if num_prompts == batch_size or len(batch) - num_prompts == MAX_FAILED_IMAGES:
            yield batch
            batch, num_prompts = [], 0
    if batch:
        yield batch


def run_batch(extractor: Extractor, batch: list[Prompt | Failure]) -> list[Sample | Failure]:
    """Run a batch; one that does not fit into the device's memory in halves, down to one prompt.

    Raises ExtractionError: the device failed in another way.
    """
    prompts = [row for row in batch if isinstance(row, Prompt)]
    try:
        samples = iter(extractor.run(prompts) if prompts else [])
        return [next(samples) if isinstance(row, Prompt) else row for row in batch]
    except torch.OutOfMemoryError:
        pass  # go on outside, where the traceback no longer holds tensors
    except (RuntimeError, IndexError) as error:
        ids = [prompt.row.question_id for prompt in prompts]
        raise ExtractionError(f"the model failed on question_ids {ids}: {error}") from error
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if len(batch) == 1:
        return [Failure(prompts[0].row, "the device's memory is too small for it")]
    log.warning("%d questions at once are too many for the device's memory: halved", len(prompts))
    middle = len(batch) // 2
    return run_batch(extractor, batch[:middle]) + run_batch(extractor, batch[middle:])


class Progress:
    """One bar for all processes of a launch; a line now and then where stderr is no terminal."""

    def __init__(self, launch: Launch, num_rows: int, num_stored: int) -> None:
        self._launch = launch
        self._is_terminal = sys.stderr.isatty() and launch.rank == 0
        self._last_line = time.monotonic()
        file = sys.stderr if self._is_terminal else open(os.devnull, "w")
        self.bar = tqdm(total=num_rows, initial=num_stored, unit=" samples", file=file, ncols=100)

    def update(self, num_extracted: int, num_failed: int) -> tuple[int, int]:
        """Count, show, and return what all processes have counted."""
        extracted = self._launch.add("extracted", num_extracted)
        failed = self._launch.add("failed", num_failed)
        self.bar.set_postfix(failed=failed, refresh=False)
        self.bar.update(self.bar.initial + extracted + failed - self.bar.n)
        if not self._is_terminal and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            log.info("%s", self.bar)
        return extracted, failed


@dataclass(frozen=True, eq=False)
class Run:
    """What lasts as long as a run."""

    options: Options
    settings: dict  # root attributes of every part
    shapes: dict[str, int]  # of `state_shapes`
    prompts: Prompts
    device: torch.device
    launch: Launch
    work: Work
    progress: Progress
    stop: StopSignal

    def prepare(self, rows: list[Row]) -> list[Prompt | Failure]:
        """The rows about one image as the model reads them."""
        return prepare_image(rows, self.options, self.prompts, self.device)


class Recorder:
    """Checks, decodes and writes what the model gives, in the plan's order.

    Its errors are ExtractionErrors. After one it takes nothing more; the part in hand is saved,
    unless it was the writing that failed.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._number = 0  # of the part in hand
        self._writer: PartWriter | None = None
        self._outcomes: dict[str, Failure | None] = {}  # of the part in hand, by question_id
        self._failed_images: set[str] = set()  # since the last row that went well, now or before
        self._num_before = 0  # rows stored before, up to the one in hand
        self._has_failed = False

    def record(self, batch: list[Sample | Failure]) -> None:
        """Take the outcomes of a batch."""
        with self._explain_errors():
            for outcome in () if self._has_failed else batch:
                self._take(outcome)

    def finish(self) -> None:
        """Save what there is of the part in hand."""
        with self._explain_errors():
            self._finish_part()

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except ExtractionError:  # what was recorded before it is worth keeping
            self._has_failed = True
            raise
        except Exception as error:  # whatever it is, a sample may be half written
            self._has_failed = True
            if self._writer is not None:
                self._writer.discard()
                self._writer = None
            is_device = isinstance(error, torch.AcceleratorError)
            where = (
                "the device failed" if is_device else f"writing to {self._run.options.output_dir}"
            )
            raise ExtractionError(
                f"{where}: {error} | finished parts are whole; the same command goes on, "
                "once there is room if the disk is full"
            ) from error

    def _take(self, outcome: Sample | Failure) -> None:
        if isinstance(outcome, Sample):
            outcome.wait()
            if not outcome.states.isfinite().all():
                outcome = Failure(outcome.prompt.row, "its states are not finite")
        row = outcome.row if isinstance(outcome, Failure) else outcome.prompt.row
        self._open_part(self._run.work.part_of[row])
        num_before, self._num_before = self._num_before, self._run.work.num_before[row]
        if self._num_before > num_before:
            self._failed_images.clear()
        if isinstance(outcome, Failure):
            self._fail(outcome)
        else:
            self._store(outcome)
        if row in self._run.work.ends:
            self._finish_part()

    def _open_part(self, number: int) -> None:
        if self._writer is None or number != self._number:
            self._finish_part()
            path = part_path(self._run.options.output_dir, number)
            self._writer = PartWriter(path, self._run.settings, self._run.options.compression)
            self._number = number

    def _store(self, sample: Sample) -> None:
        prompts, prompt = self._run.prompts, sample.prompt
        vectors = sample.states.split(list(self._run.shapes.values()))
        states = {name: v.numpy() for name, v in zip(self._run.shapes, vectors, strict=True)}
        attributes = {
            "num_prompt_tokens": len(prompt.input_ids),
            "vision_token_pos": prompts.soft_stop - 1,
            "query_token_pos": len(prompt.input_ids) - 1,
            "num_answer_tokens": len(sample.answer),
            "answer_truncated": sample.is_truncated,
        }
        self._writer.add(prompt.row, states, prompts.decode(sample.answer), attributes)
        self._outcomes[prompt.row.question_id] = None
        self._failed_images.clear()
        self._run.progress.update(1, 0)

    def _fail(self, failure: Failure) -> None:
        """Count it. Raises ExtractionError if it is one too many."""
        self._outcomes[failure.row.question_id] = failure
        self._failed_images.add(failure.row.image_id)
        self._run.progress.update(0, 1)
        last = f"question_id {failure.row.question_id!r}"
        if self._run.options.strict:
            raise ExtractionError(f"--strict: {last} failed: {failure.error}")
        if len(self._failed_images) == MAX_FAILED_IMAGES:
            raise ExtractionError(
                f"the rows of {MAX_FAILED_IMAGES} different images failed in a row: something is "
                f"wrong with all of them | the last, {last}: {failure.error}"
            )

    def _finish_part(self) -> None:
        if self._writer is None:
            return
        self._writer.finish()
        self._writer = None
        with self._run.work.lock.alone():
            update_failures(
                self._run.options.output_dir,
                lambda question_id: question_id not in self._outcomes,
                filter(None, self._outcomes.values()),
            )
        self._outcomes = {}


def work_through(run: Run, extractor: Extractor) -> None:
    """Extract every row that this process can claim, or until it is to stop.

    Images are prepared by threads, parts written by one more, both beside the model.
    Raises ExtractionError: it could not go on; what was done is saved.
    """
    options, recorder, recorded = run.options, Recorder(run), deque()
    claimed = run.work.claim_rows(options.output_dir)
    num_images = 2 * options.num_workers + options.batch_size
    rows = prepare_ahead(claimed, run.prepare, options.num_workers, num_images)
    with ThreadPoolExecutor(1) as thread, contextlib.closing(rows):
        try:
            for batch in make_batches(rows, options.batch_size):
                recorded.append(thread.submit(recorder.record, run_batch(extractor, batch)))
                if len(recorded) > 2:
                    recorded.popleft().result()  # raises what went wrong
                if run.stop.status:
                    break
        finally:
            recorded.append(thread.submit(recorder.finish))
            for future in recorded:
                future.result()


def wait_for_all(run: Run) -> None:
    """Return when all processes of the launch have ended; only the first one waits."""
    launch = run.launch
    launch.add("finished", 1)
    while launch.rank == 0 and launch.add("finished", 0) < launch.world_size:
        if run.stop.status:
            break
        run.progress.update(0, 0)
        time.sleep(0.2)


def summarise(run: Run, num_seconds: float) -> int:
    """The last line; the exit status."""
    launch, work, stop = run.launch, run.work, run.stop
    if stop.status:
        log.warning("stopped; what was done is saved, and the same command goes on from there")
        return stop.status
    if launch.rank != 0:  # the first one, which keeps the counts, may be gone
        return 0
    extracted, failed = run.progress.update(0, 0)
    if failed:
        log.warning("what failed, and why: %s", run.options.output_dir / FAILED_NAME)
    # Processes of one launch do not start as one, and may find each other's samples there.
    already = work.num_stored if launch.world_size == 1 else work.num_rows - extracted - failed
    print(
        f"Extracted {extracted} of {work.num_rows} samples ({failed} failed, {already} already "
        f"done) in {num_seconds:.1f} s: {extracted / max(num_seconds, 1e-9):.2f} samples/s",
        file=sys.stderr,
    )
    return 3 if failed else 0


def extract(options: Options) -> int:
    """Run an extraction, from the CSV to the last part; the exit status.

    Raises ExtractionError: it could not start or go on.
    """
    if options.overwrite and "SLURM_ARRAY_JOB_ID" in os.environ:
        raise ExtractionError(
            "--overwrite: a late task of a Slurm array would delete what others wrote "
            "| empty the --output-dir before the array starts"
        )
    rows = read_rows(options.vqa_dataset)
    check_images(rows, options.images_dir)
    device = check_device(options.device)
    config, processor = load_processor(options)
    with explain_load_errors(options.model):
        prompts = Prompts(processor)
    settings = describe_run(options, config, prompts, rows, device)
    shapes = state_shapes(config, settings["layers"])
    launch = Launch()
    # With --overwrite nothing is deleted before the model has shown that it loads.
    model = load_model(options, device) if options.overwrite else None
    work = open_output(options, settings, shapes, rows, launch)
    todo = work.num_rows - work.num_stored
    log.info("%d rows in the plan, %d to do", work.num_rows, todo)
    if todo or options.test:
        model = model or load_model(options, device)
        extractor = Extractor(model, prompts, settings["layers"], options.max_new_tokens, device)
    is_sound, start = True, time.monotonic()
    with StopSignal() as stop, logging_redirect_tqdm([log]):
        progress = Progress(launch, work.num_rows, work.num_stored)
        run = Run(options, settings, shapes, prompts, device, launch, work, progress, stop)
        if todo:
            work_through(run, extractor)
        wait_for_all(run)
        num_seconds = time.monotonic() - start
        progress.bar.close()
        if options.test and launch.rank == 0 and not stop.status:
            is_sound = report_test(run, extractor, rows)
        status = summarise(run, num_seconds)
    work.lock.release()
    return status if is_sound else 1


# ─────────────────────────────────────────── --test ────────────────────────────────────────────
@torch.inference_mode()
def plain_forward(model, processor, image: Image.Image, question: str, has_mask: bool = True):
    """The same prompt by transformers alone: no hooks, no cache, nothing shared.

    Returns input_ids [T], the mean of the patches [D_v], and the output of every decoder layer
    [num_layers, T, D], the last one's before the final norm.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device, model.dtype)
    if not has_mask:
        del inputs["token_type_ids"]
    decoder = model.model.language_model
    norm, decoder.norm = decoder.norm, nn.Identity()
    try:
        outputs = model.model(**inputs, output_hidden_states=True, use_cache=False)
    finally:
        decoder.norm = norm
    patches = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    hidden_states = torch.stack([h[0].float().cpu() for h in outputs.hidden_states[1:]])
    return inputs["input_ids"][0].tolist(), patches[0].float().mean(0).cpu(), hidden_states


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative L2 error."""
    return float((value - reference).norm() / reference.norm())


def compare_with_plain(
    run: Run, extractor: Extractor, prompts: list[Prompt]
) -> tuple[bool, float, float]:
    """Run prompts about an image, and compare the first with a plain forward pass.

    Returns whether they have the same tokens, the largest relative L2 error of its vectors, and
    the relative L2 effect of the image mask at the soft tokens.
    """
    prompt, soft_stop = prompts[0], run.prompts.soft_stop
    sample = extractor.run(prompts)[0]
    sample.wait()
    image = open_image(run.options.images_dir, prompt.row.image_id)
    plain = functools.partial(
        plain_forward, extractor.model, run.prompts.processor, image, prompt.row.question
    )
    input_ids, patches, hidden = plain()
    _, _, unmasked = plain(has_mask=False)
    kept = hidden[run.settings["layers"]]  # [layers, T, D]
    expected = [patches, *kept[:, soft_stop - 1], *kept[:, -1], *kept.mean(dim=1)]
    found = sample.states.split(list(run.shapes.values()))
    soft = slice(run.prompts.soft_start, soft_stop)
    effect = relative_error(unmasked[-1, soft], hidden[-1, soft])
    errors = torch.tensor(list(map(relative_error, found, expected)))  # max() keeps a NaN
    return input_ids == prompt.input_ids, float(errors.max()), effect


def time_rows(
    run: Run, extractor: Extractor, tried: list[Row], rows: list[Row]
) -> tuple[float, float]:
    """Seconds and answer tokens a row: a batch of those `tried`, as many an image as in `rows`."""
    options, again, numbers = run.options, itertools.cycle(tried), itertools.count()
    each = min(round(len(rows) / len({row.image_id for row in rows})), max(options.batch_size, 16))
    num_images = max(len(tried), options.batch_size // each)  # answers differ between images
    groups = [
        [
            dataclasses.replace(next(again), index=next(numbers), image_id=row.image_id)
            for _ in range(each)
        ]
        for row in itertools.islice(itertools.cycle(tried), num_images)
    ]
    begin, num_tokens, num_rows = time.monotonic(), 0, each * len(groups)
    with ThreadPoolExecutor(options.num_workers) as pool:
        prepared = itertools.chain.from_iterable(pool.map(run.prepare, groups))
        for batch in make_batches(prepared, options.batch_size):
            for sample in run_batch(extractor, batch):
                if isinstance(sample, Sample):
                    sample.wait()
                    num_tokens += len(sample.answer)
    return (time.monotonic() - begin) / num_rows, num_tokens / num_rows


def report_test(run: Run, extractor: Extractor, rows: list[Row]) -> bool:
    """Print what the first rows show and what the whole CSV would take; whether all is well."""
    options, prompts, first = run.options, run.prompts, rows[:NUM_TEST_ROWS]
    tried = []
    for row in first:  # its image is asked all the questions, so that it goes the shared way
        others = [dataclasses.replace(r, image_id=row.image_id) for r in first if r is not row]
        found = run.prepare([row, *others])
        if isinstance(found[0], Prompt):
            tried.append([prompt for prompt in found if isinstance(prompt, Prompt)])
    if not tried:
        print("none of the first rows can be extracted, so nothing was checked")
        return True
    compared = [compare_with_plain(run, extractor, about_image) for about_image in tried]
    same_tokens, errors, effects = zip(*compared)
    bound, eps = TEST_BOUNDS[options.dtype], torch.finfo(getattr(torch, options.dtype)).eps
    positions = [len(about_image[0].input_ids) - 1 for about_image in tried]
    soft_stop = prompts.soft_stop
    checks = {
        "the processor's own tokens, one <bos>": all(same_tokens),
        f"soft tokens {prompts.soft_start} to {soft_stop - 1}, vision token {soft_stop - 1}, "
        f"query tokens {positions}": min(positions) > soft_stop,
        f"the image mask changes soft tokens by {min(effects):.1e}": min(effects) > 10 * eps,
        f"plain forward passes give the same: error {max(errors):.1e}, bound {bound:g}": all(
            error <= bound for error in errors
        ),
    }
    versions = [f"{name} {run.settings[f'{name}_version']}" for name in ("torch", "transformers")]
    first_rows = [about_image[0].row for about_image in tried]
    seconds, num_tokens = time_rows(run, extractor, first_rows, rows)
    size = len(rows) * bytes_per_sample(run.shapes, options.storage_dtype) / 1e9
    free = shutil.disk_usage(options.output_dir).free / 1e9
    rate, num_images = run.launch.world_size / seconds, len({row.image_id for row in rows})
    print(
        *(f"{'ok  ' if is_well else 'FAIL'}  {what}" for what, is_well in checks.items()),
        f"      {', '.join(versions)}; {options.dtype} on {run.settings['device']}",
        f"      peak memory {peak_memory(run.device)}",
        f"      the whole CSV takes {size:.2f} GB; {free:.0f} GB are free",
        f"      {len(rows)} rows about {num_images} images take {len(rows) / rate / 3600:.2f} h at "
        f"{rate:.2f} samples/s, if answers have {num_tokens:.0f} tokens as here",
        sep="\n",
    )
    return all(checks.values())


def peak_memory(device: torch.device) -> str:
    """Of the process, and of the card where there is one."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the card"
    return text


# ───────────────────────────────────────── command line ────────────────────────────────────────
def make_parser() -> argparse.ArgumentParser:
    """The command line: a flag for every field of `Options`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in dataclasses.fields(Options):
        kwargs = dict(option.metadata)
        if option.default is dataclasses.MISSING:
            kwargs["required"] = True
        else:
            kwargs["default"] = option.default
            if option.default not in (None, False):
                kwargs["help"] += f" (default: {option.default})"
        parser.add_argument(f"--{option.name.replace('_', '-')}", **kwargs)
    return parser


def one_line(error: Exception) -> str:
    """Its message without line breaks."""
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--layers" in words[:-1]:  # "-1,2" looks like a flag to argparse, but not behind a "="
        place = words.index("--layers")
        words[place : place + 2] = [f"--layers={words[place + 1]}"]
    options = Options(**vars(make_parser().parse_args(words)))
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    prefix = "" if rank == "0" else f"process {rank}: "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    try:
        return extract(options)
    except torch.OutOfMemoryError as error:
        advice = "a smaller --batch-size, --device-map auto, or a larger card"
        log.error("the device's memory is too small: %s | %s", one_line(error), advice)
    except ExtractionError as error:
        log.error("%s", one_line(error))
    return 1


if __name__ == "__main__":
    exit_status = main()
    for _signum in SIGNALS:
        signal.signal(_signum, signal.SIG_IGN)  # nothing is left to stop
    raise SystemExit(exit_status)
