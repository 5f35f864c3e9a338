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
import io
import itertools
import json
import logging
import os
import platform
import queue
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
SAMPLE_ATTRIBUTES = {
    *("question_id", "row", "num_prompt_tokens", "vision_token_pos", "query_token_pos"),
    *("num_answer_tokens", "answer_truncated"),
}
PART_NAME = "gemma3_12b_embeddings_part_{:03d}.h5"
FAILED_NAME = "failed_samples.csv"
OUR_FILES = re.compile(
    r"gemma3_12b_embeddings_part_\d+\.(h5|partial|damaged-\w{8})|failed_samples\.(csv|partial)"
)
COLUMNS = {  # ours: what the CSV may call it
    "question_id": ("question_id",),
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "answer": ("answer", "gt_answer"),
}
TEXTS = ("question", "image_id", "answer", "ground_truth_answer")
VISION, MEAN = "vision_representation", "multimodal_representation"  # means: always float32
LAYER_KINDS = ("vision_token_representation", "query_token_representation", MEAN)
# What every stored vector depends on: no run goes on in a directory where these were others.
IDENTITY = (
    *("model_name", "model_revision", "dtype", "layers", "max_new_tokens", "prompt"),
    *("checkpoint_interval", "storage_dtype"),
)
MAX_FAILED_IMAGES = 25  # different images in a row: then something is wrong with all of them
MAX_PADDING = 0.125  # of a forward pass; images of too different lengths go in passes of their own
CACHE_ROOM = 32  # slots that a key/value buffer grows by
SAMPLE_OVERHEAD = 12_288  # bytes that HDF5 takes for a sample's groups, names and texts
LINE_SECONDS = 30  # between two lines of progress where there is no bar
NUM_TEST_ROWS = 3
TEST_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2 error to a plain forward pass

log = logging.getLogger("gemma3_extraction")


class ExtractionError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


class RowError(ValueError):
    """One row cannot be extracted; the message says why."""


class DamagedPart(ValueError):
    """A part file that does not hold what it should; the message says what."""


# ────────────────────────────────────────── what flows ─────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """One line of the CSV, to the letter; `index` counts data lines from 0."""

    index: int
    question_id: str
    image_id: str
    question: str
    ground_truth: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row, tokenised."""

    row: Row
    input_ids: list[int]  # [T]


@dataclass(eq=False)
class SharedImage:
    """An image and the rows about it. What their prompts have in common is run once."""

    rows: list[Row]
    failures: dict[str, str]  # question_id: why there is no prompt for it
    prompts: list[Prompt]
    num_shared: int = 0  # leading tokens that all prompts have in common, soft tokens included
    pixel_values: Tensor | None = None  # [3, height, width]
    # Left by the first pass, while there are prompts to come:
    key_values: list[tuple[Tensor, Tensor]] | None = None  # a layer: [1, heads, shared, head_dim]
    patches: Tensor | None = None  # [D_v], mean
    soft: Tensor | None = None  # [layers, D], last image soft token
    shared_sum: Tensor | None = None  # [layers, D], over the shared tokens


@dataclass(frozen=True, eq=False)
class Chunk:
    """The prompts `start … stop - 1` of an image: what one batch takes of it."""

    image: SharedImage
    start: int
    stop: int

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts themselves."""
        return self.image.prompts[self.start : self.stop]

    @property
    def num_tokens(self) -> int:
        """Tokens to run, what is shared counted once."""
        shared = self.image.num_shared
        return shared + sum(len(prompt.input_ids) - shared for prompt in self.prompts)


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive rows of the plan: those to run, and those that failed on the way here."""

    rows: list[Row]
    chunks: list[Chunk]
    failures: dict[str, str]  # question_id: error


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What the model gives for `prompts`; `states` may be read once `wait()` has returned."""

    prompts: list[Prompt]
    states: Tensor  # [prompts, sum of state_shapes()], float32, in host memory
    answers: list[list[int]]  # token ids without the end token
    truncated: list[bool]
    wait: Callable[[], None]


# ─────────────────────────────────── reading rows and images ───────────────────────────────────


def read_rows(csv_path: Path) -> list[Row]:
    """Every row of the CSV, text as it stands: `007`, `NA`, `None` and empty answers survive.

    Raises:
        ExtractionError: not UTF-8, not a table with the columns, an empty or repeated question_id.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            table = [(reader.line_num, line) for line in reader if line]
    except UnicodeDecodeError as error:
        raise ExtractionError(
            f"{csv_path} is not UTF-8: {error.reason}; save it as UTF-8"
        ) from error
    except csv.Error as error:
        where = f"{csv_path}, line {reader.line_num}"
        raise ExtractionError(f"{where}: {error}; check the quotes there") from error
    except OSError as error:
        raise ExtractionError(f"cannot read {csv_path}: {error}") from error
    if len(table) < 2:
        raise ExtractionError(f"{csv_path} has no rows; expected a header and a line a question")
    (_, header), *lines = table
    places = [_find_column(csv_path, header, names) for names in COLUMNS.values()]
    rows: dict[str, Row] = {}
    for index, (line_num, line) in enumerate(lines):
        where = f"{csv_path}, line {line_num}"
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
    problem = "twice" if any(name in header for name in names) else "not"
    raise ExtractionError(
        f"{csv_path}: column {' or '.join(names)} is {problem} there; its columns: {header}"
    )


def hash_rows(rows: list[Row]) -> str:
    """sha256 over the four columns used."""
    return hashlib.sha256(
        json.dumps([dataclasses.astuple(row)[1:] for row in rows]).encode()
    ).hexdigest()


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
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise RowError(f"{path} does not exist") from error
    except Exception as error:  # Pillow's decoders let anything through: struct.error, TypeError …
        raise RowError(f"{path} cannot be read as an image: {error}") from error


def check_images(rows: list[Row], images_dir: Path) -> None:
    """Say how many images are missing. Raises ExtractionError if all of them are."""
    image_ids = dict.fromkeys(row.image_id for row in rows)
    missing = []
    for image_id in image_ids:
        with contextlib.suppress(RowError, OSError):
            if image_path(images_dir, image_id).is_file():
                continue
        missing.append(image_id)
    if len(missing) == len(image_ids):
        raise ExtractionError(
            f"--images-dir {images_dir}: none of the {len(missing)} images is there, not even "
            f"{missing[0]!r} | image_id must be the file's name, extension included"
        )
    if missing:
        log.warning("%d of %d images are missing: %r ...", len(missing), len(image_ids), missing[0])


# ──────────────────────────────────── prompts and positions ────────────────────────────────────


def find_soft_tokens(input_ids: list[int], image_token_id: int, count: int) -> tuple[int, int]:
    """First position of the image's soft tokens, and the one after the last.

    Raises:
        RowError: they are not exactly one run of `count`.
    """
    found = [pos for pos, token in enumerate(input_ids) if token == image_token_id]
    if len(found) != count or found[-1] - found[0] != count - 1:
        raise RowError(f"found {len(found)} image soft tokens; expected one run of {count}")
    return found[0], found[-1] + 1


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

    def tokenize(self, row: Row) -> Prompt:
        """The row's prompt. Raises RowError if the question is empty or holds special tokens."""
        if not row.question.strip():
            raise RowError("the question is empty")
        input_ids = self._encode(row.question)
        special = [token for token in input_ids if token in self._special]
        if special != self._plain_special:
            names = set(self.tokenizer.convert_ids_to_tokens(special))
            held = [name for name in sorted(names) if name in row.question]
            raise RowError(f"the question holds special tokens as text: {' '.join(held)}")
        return Prompt(row, input_ids)

    def share(self, rows: list[Row], load: Callable[[str], Tensor]) -> SharedImage:
        """Tokenise the questions about one image, and `load` its pixels; failures row by row."""
        failures: dict[str, str] = {}
        prompts: list[Prompt] = []
        for row in rows:
            try:
                prompts.append(self.tokenize(row))
            except RowError as error:
                failures[row.question_id] = str(error)
        try:
            pixel_values = load(rows[0].image_id) if prompts else None
        except RowError as error:
            return SharedImage(rows, {row.question_id: str(error) for row in rows} | failures, [])
        sequences = [prompt.input_ids for prompt in prompts]
        # At least one token, the last, stays each prompt's own.
        is_common = (len(set(tokens)) == 1 for tokens in zip(*sequences))
        num_common = sum(itertools.takewhile(bool, is_common))
        num_shared = min([num_common, *(len(ids) - 1 for ids in sequences)])
        return SharedImage(rows, failures, prompts, num_shared, pixel_values)

    def pixels(self, image: Image.Image) -> Tensor:
        """`pixel_values` of one image, [3, height, width], float32."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def decode(self, token_ids: list[int]) -> str:
        """An answer's text: no special tokens, whitespace kept; NUL would end it in HDF5."""
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


SHARED, PADDING = 0, -1  # segments of a row that are not one of its questions 1, 2, …


@dataclass(frozen=True, eq=False)
class Layout:
    """Which token stands where in one forward pass: a row an image, its questions one by one.

    A token's place is (position in its own prompt, segment, whether it is an image soft token).
    """

    input_ids: Tensor  # [rows, length]
    query: Tensor  # [rows, length, 3]: places of the tokens of this pass
    key: Tensor  # [rows, past + length, 3]: of those run earlier, too
    num_shared: list[int]  # a row: shared tokens in this pass
    spans: list[tuple[int, int, int]]  # a question: its row, and its own tokens start … stop - 1
    slots: Tensor  # [questions, longest prompt]: where each prompt's keys are, 0 for padding
    lengths: list[int]  # a question: T


def lay_out(chunks: list[Chunk], image_token_id: int, is_prefix_run: bool) -> Layout:
    """Put the questions of an image behind the tokens they share, each at its own positions.

    Where an earlier pass has run the shared tokens (`is_prefix_run`, one chunk), they stand before
    this pass instead of in it.
    """
    input_ids, places, spans, slots, lengths = [], [], [], [], []
    for row, chunk in enumerate(chunks):
        shared = chunk.image.num_shared
        num_past = shared if is_prefix_run else 0
        ids = chunk.prompts[0].input_ids[num_past:shared]
        place = [(pos, SHARED) for pos in range(num_past, shared)]
        for segment, prompt in enumerate(chunk.prompts, start=1):
            start, length = len(ids), len(prompt.input_ids)
            ids = ids + prompt.input_ids[shared:]
            place += [(pos, segment) for pos in range(shared, length)]
            spans.append((row, start, len(ids)))
            slots.append([*range(shared), *range(num_past + start, num_past + len(ids))])
            lengths.append(length)
        input_ids.append(ids)
        places.append(
            [(*at, token == image_token_id) for at, token in zip(place, ids, strict=True)]
        )
    query = _pad(places, (0, PADDING, 0))
    past = (
        [[(pos, SHARED, 0) for pos in range(chunks[0].image.num_shared)]] if is_prefix_run else []
    )
    key = torch.cat([torch.tensor(past), query], dim=1) if past else query
    num_shared = [0 if is_prefix_run else chunk.image.num_shared for chunk in chunks]
    return Layout(_pad(input_ids, 0), query, key, num_shared, spans, _pad(slots, 0), lengths)


def _pad(rows: list[list], value) -> Tensor:
    """[rows, longest, …], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def attention_masks(query: Tensor, key: Tensor, window: int) -> dict[str, Tensor]:
    """Who sees whom, [rows, 1, queries, keys], for the two kinds of decoder layers.

    A token sees its own prompt up to itself, and the soft tokens of an image see each other in
    both directions; sliding layers see `window` positions back. As in `modeling_gemma3`.
    """
    q_pos, q_segment, q_soft = query[:, :, None].unbind(-1)
    k_pos, k_segment, k_soft = key[:, None].unbind(-1)
    is_own = (k_segment == q_segment) | (k_segment == SHARED)
    visible = is_own & ((k_pos <= q_pos) | (q_soft & k_soft).bool())
    near = visible & (q_pos - k_pos < window)
    return {"full_attention": visible[:, None], "sliding_attention": near[:, None]}


# ──────────────────────────────────────────── hooks ────────────────────────────────────────────


@contextlib.contextmanager
def forward_hooks(hooks: list[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Show each module's output to its observer; every hook is gone afterwards, come what may.

    Raises:
        ExtractionError: a module did not run exactly once.
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

    layout: Layout
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
        own = [hidden[row, start:stop] for row, start, stop in self.layout.spans]
        self.query.append(torch.stack([tokens[-1] for tokens in own]).float())
        self.own_sum.append(_sums(own))
        if self.patches is not None:  # the images are in this pass
            self.soft.append(hidden[:, self.soft_pos].float())
            self.shared_sum.append(_sums([h[:n] for h, n in zip(hidden, self.layout.num_shared)]))


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

    Buffers have room, so that a new token is written in place. A decoder layer calls `update`.
    """

    def __init__(self, key_values: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._buffers = dict(enumerate(key_values))
        self._lengths = {i: keys.shape[2] for i, (keys, _) in self._buffers.items()}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens held."""
        return self._lengths.get(layer_idx, 0)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all there is."""
        start = self.get_seq_length(layer_idx)
        stop = self._lengths[layer_idx] = start + keys.shape[2]
        buffers = self._buffers.setdefault(layer_idx, (keys, values))
        if buffers[0].shape[2] < stop:
            room = (0, 0, 0, keys.shape[2] + CACHE_ROOM)
            buffers = tuple(nn.functional.pad(old[:, :, :start], room) for old in buffers)
            self._buffers[layer_idx] = buffers
        if start:
            for buffer, new in zip(buffers, (keys, values), strict=True):
                buffer[:, :, start:stop] = new
        return self.layer(layer_idx)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """All there is of one layer."""
        keys, values = self._buffers[layer_idx]
        length = self._lengths[layer_idx]
        return keys[:, :, :length], values[:, :, :length]

    def drop(self, layer_idx: int) -> None:
        """Forget a layer."""
        del self._buffers[layer_idx], self._lengths[layer_idx]

    def keep(self, rows: list[int]) -> None:
        """Make row i what row `rows[i]` was, and drop the rest; only rows that move are copied."""
        target = [new for new, old in enumerate(rows) if new != old]
        source = [rows[new] for new in target]
        for i, buffers in self._buffers.items():
            for buffer in buffers if target else ():
                buffer[target] = buffer[source]
            self._buffers[i] = tuple(buffer[: len(rows)] for buffer in buffers)


@dataclass(frozen=True, eq=False)
class Prefill:
    """One forward pass over prompts, for the answers to go on from."""

    layout: Layout
    cache: KeyValueCache
    next_tokens: Tensor  # [questions]


class Extractor:
    """The loaded model: turns a batch of prompts into states and answers.

    Each image goes through the vision tower once, and the tokens that its prompts share through
    the decoder once; states and answers come from that same pass.
    """

    def __init__(self, model, prompts: Prompts, layers: list[int], max_new_tokens: int, device):
        decoder = "model.language_model"
        paths = ["model.vision_tower", decoder, *(f"{decoder}.layers.{i}" for i in layers)]
        try:
            modules = [model.get_submodule(path) for path in paths]
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
        self._vision_tower, self._decoder, *self._layers = modules
        self._window = model.config.text_config.sliding_window
        end = model.generation_config.eos_token_id
        self._end_ids = set(end if isinstance(end, list) else [end])

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> BatchResult:
        """States and answers of every prompt, in order."""
        passes = [self._prefill(group) for group in self._forward_passes(chunks)]
        states = torch.cat([states for states, _ in passes])
        host = torch.empty(states.shape, pin_memory=states.is_cuda)
        host.copy_(states, non_blocking=True)
        wait = _mark(states.device)
        prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
        answers, truncated = [[] for _ in prompts], [False] * len(prompts)
        if self.max_new_tokens:
            answers, truncated = self._decode([prefill for _, prefill in passes])
        return BatchResult(prompts, host, answers, truncated, wait)

    def _forward_passes(self, chunks: list[Chunk]) -> Iterator[list[Chunk]]:
        """Images together that waste little on padding; one whose prefix has been run, alone."""
        group: list[Chunk] = []
        for chunk in chunks:
            lengths = [other.num_tokens for other in (*group, chunk)]
            padding = 1 - sum(lengths) / (len(lengths) * max(lengths))
            is_first_run = all(other.image.key_values is None for other in (*group, chunk))
            if group and not (self.joins_images and is_first_run and padding <= MAX_PADDING):
                yield group
                group = []
            group = [*group, chunk]
        yield group

    def _prefill(self, chunks: list[Chunk]) -> tuple[Tensor, Prefill]:
        """Run prompts once: states [questions, sum of state_shapes()], and what answers need."""
        past = chunks[0].image.key_values
        image_token_id = self.prompts.tokenizer.image_token_id
        layout = lay_out(chunks, image_token_id, is_prefix_run=past is not None)
        query, key = (t.to(self.device, non_blocking=True) for t in (layout.query, layout.key))
        cache = KeyValueCache(past or ())
        captured = Captured(layout, self.prompts.soft_stop - 1)
        hooks = [(layer, captured.on_layer) for layer in self._layers]
        if past is None:
            hooks.append((self._vision_tower, captured.on_patches))
        with forward_hooks(hooks):
            hidden = self._decoder(
                inputs_embeds=self._embed(layout, chunks if past is None else []),
                attention_mask=attention_masks(query, key, self._window),
                position_ids=query[:, :, 0],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # [rows, length, D], normed
        if past is None:
            self._keep_images(chunks, captured)
        states = self._states(chunks, captured)
        self._keep_prefix(chunks[-1], cache)
        next_tokens = torch.empty(0)
        if self.max_new_tokens:
            next_tokens = self._choose([hidden[row, stop - 1] for row, _, stop in layout.spans])
        return states, Prefill(layout, cache, next_tokens)

    def _embed(self, layout: Layout, new_images: list[Chunk]) -> Tensor:
        """Embeddings of a pass, [rows, length, D], the images' in place of their soft tokens."""
        embeds = self._decoder.embed_tokens(layout.input_ids.to(self.device, non_blocking=True))
        if new_images:
            pixel_values = torch.stack(
                [
                    chunk.image.pixel_values.to(self.device, non_blocking=True)
                    for chunk in new_images
                ]
            )  # [rows, 3, height, width]
            features = self.model.model.get_image_features(pixel_values).pooler_output
            embeds[:, self.prompts.soft_start : self.prompts.soft_stop] = features.to(embeds)
        return embeds

    def _choose(self, hidden: Iterable[Tensor]) -> Tensor:
        """The likeliest next token after each of the final, normed states."""
        return self.model.lm_head(torch.stack(list(hidden))).argmax(-1).to(self.device)

    def _keep_images(self, chunks: list[Chunk], captured: Captured) -> None:
        soft, shared_sum = self._by_layer(captured.soft), self._by_layer(captured.shared_sum)
        for row, chunk in enumerate(chunks):
            chunk.image.patches = captured.patches[row].to(self.device)
            chunk.image.soft, chunk.image.shared_sum = soft[row], shared_sum[row]

    def _keep_prefix(self, chunk: Chunk, cache: KeyValueCache) -> None:
        """Keep the shared tokens of the batch's last image while it has questions to come."""
        image = chunk.image
        if chunk.stop == len(image.prompts):
            image.key_values = None
        elif image.key_values is None:
            layers = (cache.layer(i) for i in range(len(self._decoder.layers)))
            image.key_values = [
                tuple(t[-1:, :, : image.num_shared].clone() for t in pair) for pair in layers
            ]

    def _by_layer(self, vectors: list[Tensor]) -> Tensor:
        """[rows or questions, layers, D], on one device."""
        return torch.stack([vector.to(self.device) for vector in vectors], dim=1)

    def _states(self, chunks: list[Chunk], captured: Captured) -> Tensor:
        """Every vector of every question, side by side in the order of `state_shapes`."""
        images = [chunk.image for chunk in chunks for _ in chunk.prompts]
        lengths = _put(captured.layout.lengths, self.device)[:, None, None]
        shared_sum = torch.stack([image.shared_sum for image in images])  # [questions, layers, D]
        by_layer = (
            torch.stack([image.soft for image in images]),
            self._by_layer(captured.query),
            (shared_sum + self._by_layer(captured.own_sum)) / lengths,
        )
        patches = torch.stack([image.patches for image in images])  # [questions, D_v]
        return torch.cat([patches, *(vectors.flatten(1) for vectors in by_layer)], dim=1)

    def _decode(self, passes: list[Prefill]) -> tuple[list[list[int]], list[bool]]:
        """Greedy answers without their end tokens, and whether the limit cut them short.

        All questions form one batch, whatever images they are about, and leave it as they end.
        """
        tokens = torch.cat([prefill.next_tokens for prefill in passes])  # [live questions]
        answers: list[list[int]] = [[] for _ in tokens]
        truncated = [True] * len(answers)
        live = list(range(len(answers)))  # the question in each row
        cache, key, pos = self._gather(passes)
        for step in range(self.max_new_tokens):
            rows = []
            for row, token in enumerate(tokens.tolist()):
                truncated[live[row]] = token not in self._end_ids
                if truncated[live[row]]:
                    answers[live[row]].append(token)
                    rows.append(row)
            if not rows or step + 1 == self.max_new_tokens:
                break
            if len(rows) < len(live):
                rows = close_gaps(rows)
                cache.keep(rows)
                live = [live[row] for row in rows]
                tokens, key, pos = tokens[rows], key[rows], pos[rows]
            query = torch.stack([pos, torch.ones_like(pos), torch.zeros_like(pos)], dim=-1)
            hidden = self._decoder(
                input_ids=tokens[:, None],
                attention_mask=attention_masks(
                    query, key[:, : cache.get_seq_length() + 1], self._window
                ),
                position_ids=pos,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # [live, 1, D]
            tokens, pos = self._choose(hidden[:, -1]), pos + 1
        return answers, truncated

    def _gather(self, passes: list[Prefill]) -> tuple[KeyValueCache, Tensor, Tensor]:
        """A row for every question, its prompt in the first slots, its answer behind the longest.

        Returns the cache, the keys' places [questions, slots, 3] and the next position
        [questions, 1].
        """
        lengths = [length for prefill in passes for length in prefill.layout.lengths]
        num_slots = max(lengths)

        def gather(prefill: Prefill, layer_idx: int) -> list[Tensor]:
            pair = prefill.cache.layer(layer_idx)
            device = pair[0].device
            rows = _put([[row] for row, _, _ in prefill.layout.spans], device)
            padding = (0, num_slots - prefill.layout.slots.shape[1])
            slots = nn.functional.pad(prefill.layout.slots, padding).to(device, non_blocking=True)
            prefill.cache.drop(layer_idx)  # so that never two copies of the whole cache are held
            return [t.transpose(1, 2)[rows, slots].transpose(1, 2) for t in pair]

        key_values = []
        for layer_idx in range(len(self._decoder.layers)):
            gathered = [gather(prefill, layer_idx) for prefill in passes]
            key_values.append(tuple(map(torch.cat, zip(*gathered, strict=True))))
        length = _put(lengths, self.device)[:, None]
        slot = torch.arange(num_slots + self.max_new_tokens, device=self.device)[None]
        pos = torch.where(slot < num_slots, slot, length + slot - num_slots)
        segment = torch.where((slot < num_slots) & (slot >= length), PADDING, 1)
        return KeyValueCache(key_values), torch.stack([pos, segment, 0 * pos], dim=-1), length


def close_gaps(rows: list[int]) -> list[int]:
    """An order of `rows` in which as many as can be stay where they are.

    >>> close_gaps([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    moving = [row for row in rows if row >= len(rows)]
    staying = set(rows)
    return [row if row in staying else moving.pop() for row in range(len(rows))]


def _put(numbers: list, device: torch.device) -> Tensor:
    """A tensor on the device, without the wait that `torch.tensor(..., device=...)` brings."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _mark(device: torch.device) -> Callable[[], None]:
    """A function that returns when all that the device was asked for so far is done."""
    if device.type == "cpu":
        return lambda: None
    event = torch.Event(device=device)
    event.record()
    return event.synchronize


# ────────────────────────────────────── loading the model ──────────────────────────────────────


@dataclass(frozen=True)
class Options:
    """Everything the command line sets, and its defaults."""

    vqa_dataset: Path
    images_dir: Path
    output_dir: Path = Path("output")
    model: str = "google/gemma-3-12b-it"
    revision: str = "main"
    cache_dir: Path = Path("model_cache")
    device: str = "cuda"
    device_map: str | None = None
    dtype: str = "bfloat16"
    layers: tuple[int, ...] | None = None
    max_new_tokens: int = 200
    batch_size: int = 1
    num_workers: int = 2
    checkpoint_interval: int = 1000
    storage_dtype: str = "float32"
    compression: str = "none"
    test: bool = False
    overwrite: bool = False
    strict: bool = False


@contextlib.contextmanager
def explain_load_errors(model: str) -> Iterator[None]:
    """Turn what transformers raises for a missing, gated or broken model into one line."""
    from safetensors import SafetensorError

    try:
        yield
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
    """The hub's commit; of a local directory, a hash of its config and its weights' sizes."""
    weights = [
        (path.name, path.stat().st_size) for path in sorted(Path(model).glob("*.safetensors"))
    ]
    contents = hashlib.sha256(f"{weights}{config.to_json_string()}".encode()).hexdigest()
    return getattr(config, "_commit_hash", None) or contents


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


def write_vector(
    group: h5py.Group, name: str, vector: np.ndarray, storage_dtype: str, compression: str
) -> None:
    """Write one float32 vector. HDF5's own calls take half the time of h5py's `create_dataset`."""
    file_type = storage_type(name, storage_dtype)
    if file_type.get_size() == 2:
        vector = torch.from_numpy(vector).bfloat16().view(torch.int16).numpy()
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if compression != "none":
        layout.set_chunk(vector.shape)
        layout.set_shuffle()
    if compression == "gzip":
        layout.set_deflate(1)
    elif compression == "lzf":
        layout.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(vector.shape)
    dataset = h5py.h5d.create(group.id, name.encode(), file_type, space, layout, links)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, vector, file_type)


def bytes_per_sample(shapes: dict[str, int], storage_dtype: str) -> int:
    """What one sample takes on the disk, uncompressed."""
    sizes = {name: storage_type(name, storage_dtype).get_size() for name in shapes}
    return sum(shapes[name] * sizes[name] for name in shapes) + SAMPLE_OVERHEAD


class Sink(io.FileIO):
    """A file for HDF5, which crashes when a write fails: keeps the error, and goes on as if."""

    error: OSError | None = None

    def write(self, content) -> int:
        """All of it, or nothing ever again."""
        rest = memoryview(content)
        with self._keep_error():
            while self.error is None and rest:
                rest = rest[super().write(rest) :]
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        """As far as there is room."""
        with self._keep_error():
            if self.error is None:
                super().truncate(size)
        return size or 0

    @contextlib.contextmanager
    def _keep_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error


class PartWriter:
    """Writes one part under another name, and renames it into place once it is safe on the disk.

    What a finished file of the same number holds is taken over.
    """

    def __init__(self, path: Path, attributes: dict, compression: str) -> None:
        self.path = path
        self._partial = path.with_suffix(".partial")
        self._storage = (attributes["storage_dtype"], compression)
        self._sink = Sink(self._partial, "w+")
        # HDF5 1.10's format: smaller, and with checksums over all but the vectors themselves.
        self._file = h5py.File(self._sink, "w", libver=("v110", "v110"))
        self._file.attrs.update(attributes)
        if path.exists():
            with h5py.File(path) as finished:
                for name in finished:
                    finished.copy(name, self._file)
        self._num_before = len(self._file)

    def add(self, row: Row, states: dict[str, np.ndarray], answer: str, attributes: dict) -> None:
        """Write one sample."""
        group = self._file.create_group(group_name(row.question_id))
        texts = (row.question, row.image_id, answer, row.ground_truth)
        for name, text in zip(TEXTS, texts, strict=True):
            group.create_dataset(name, data=text, dtype=h5py.string_dtype())
        for name, vector in states.items():
            write_vector(group, name, vector, *self._storage)
        group["vision_only_representation"] = h5py.SoftLink(VISION)
        group.attrs.update({"question_id": row.question_id, "row": row.index, **attributes})
        self._sink.check()

    def finish(self, is_attempted_whole: bool) -> None:
        """Close, sync, check and rename; nothing is left of a part that was only opened."""
        count = len(self._file)
        if count == self._num_before and (self.path.exists() or not is_attempted_whole):
            return self.discard()
        self._file.attrs["num_samples"] = count
        self._file.attrs["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.close()
        self._sink.check()
        self._sink.close()
        sync(self._partial)
        with h5py.File(self._partial) as written:
            if len(written) != count:
                raise OSError(f"{self._partial} holds {len(written)} samples; expected {count}")
        os.replace(self._partial, self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Forget what was written since the part was opened."""
        with contextlib.suppress(OSError, RuntimeError):  # a full disk fails here once more
            self._file.close()
        self._sink.close()
        self._partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def tell_damage(path: Path) -> Iterator[None]:
    """Turn what h5py raises into DamagedPart, unless it is the system that denies the file."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) is not None:
            raise ExtractionError(
                f"{path} cannot be read: {error} | close the program that has it open"
            ) from error
        raise DamagedPart(str(error)) from error


def read_attributes(path: Path) -> dict:
    """A part's root attributes. Raises DamagedPart."""
    with tell_damage(path), h5py.File(path) as file:
        return {name: _plain(value) for name, value in file.attrs.items()}


def read_part(path: Path, shapes: dict[str, int]) -> tuple[dict, dict[str, tuple[str, str, str]]]:
    """A finished part's attributes, and question, image_id and ground truth by question_id.

    Raises:
        DamagedPart: it does not open, or a sample is incomplete, misshapen or not finite.
    """
    attributes = read_attributes(path)
    with tell_damage(path), h5py.File(path) as file:
        if attributes.get("num_samples") != len(file):
            raise DamagedPart(f"{len(file)} samples; expected {attributes.get('num_samples')}")
        groups = [file[name] for name in file]  # file.values() holds h5py's lock while it waits
        return attributes, {g.attrs["question_id"]: _check_sample(g, shapes) for g in groups}


def _plain(value):
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _check_sample(group: h5py.Group, shapes: dict[str, int]) -> tuple[str, str, str]:
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
    return question, image_id, ground_truth


def stored_ids(path: Path) -> set[str]:
    """The question_ids in a finished part; none if there is no such part."""
    if not path.exists():
        return set()
    with h5py.File(path) as file:
        return {urllib.parse.unquote(name) for name in file}


def scan_parts(
    output_dir: Path, settings: dict, shapes: dict[str, int], rows: list[Row]
) -> set[str]:
    """The question_ids that are stored. Every part is read and checked, damaged ones set aside.

    Raises:
        ExtractionError: a part is of another kind of run, or a row changed under its id.
    """
    stored: set[str] = set()
    by_id = {row.question_id: row for row in rows}
    for path in find_parts(output_dir):
        try:
            attributes = read_attributes(path)
            if absent := settings.keys() - attributes.keys():
                raise DamagedPart(f"its attributes {sorted(absent)} are gone")
            check_same("settings", path, attributes, {k: settings[k] for k in IDENTITY})
            _, texts = read_part(path, shapes)
        except DamagedPart as error:
            aside = path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
            os.replace(path, aside)
            log.warning("%s is damaged (%s): set aside as %s", path, error, aside.name)
            continue
        for question_id in texts.keys() & by_id.keys():
            row, names = by_id[question_id], ("question", "image_id", "answer")
            now = dict(zip(names, (row.question, row.image_id, row.ground_truth)))
            before = dict(zip(names, texts[question_id]))
            check_same(f"texts of question_id {question_id!r}", path, before, now)
        stored |= texts.keys()
    return stored


def check_same(what: str, path: Path, stored: dict, current: dict) -> None:
    """Raise ExtractionError that names everything that differs, with both values."""
    pairs = [(name, _plain(stored.get(name)), now) for name, now in current.items()]
    differing = [f"{name} was {old!r} and is {now!r}" for name, old, now in pairs if old != now]
    if differing:
        raise ExtractionError(
            f"{path} was written with other {what}: {'; '.join(differing)} "
            "| go on with the old ones, choose another --output-dir, or --overwrite"
        )


def read_failures(output_dir: Path) -> dict[str, tuple[str, str]]:
    """image_id and error by question_id, from `failed_samples.csv`."""
    path = output_dir / FAILED_NAME
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        lines = list(csv.reader(file.read().splitlines(keepends=True)))[1:]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def write_failures(output_dir: Path, failures: dict[str, tuple[str, str]]) -> None:
    """Replace `failed_samples.csv`; no failures, no file."""
    path = output_dir / FAILED_NAME
    if not failures:
        return path.unlink(missing_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        lines = ((question_id, *rest) for question_id, rest in failures.items())
        csv.writer(file).writerows([("question_id", "image_id", "error"), *lines])
    sync(partial)
    os.replace(partial, path)
    sync(output_dir)


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
            self._store, _, _ = next(torch.distributed.rendezvous("env://"))
            if self.rank == 0:
                self._store.set("run_id", self.run_id)
            self.run_id = self._store.get("run_id").decode()

    def add(self, name: str, amount: int) -> int:
        """Add to a count that all processes share; its value after that."""
        return self._store.add(name, amount)


class OutputLock:
    """POSIX record locks on `{output_dir}/.lock`, which the kernel drops with their process.

    Byte 0 is the run: one process's while it prepares the directory, then shared by all of the
    run. Byte k is part k: whoever holds it writes that part.
    """

    def __init__(self, output_dir: Path, run_id: str) -> None:
        self._path = output_dir / ".lock"
        self._run_id = run_id
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self) -> bool:
        """Join the run; True for the process that is to prepare the directory, then `share()`.

        Raises:
            ExtractionError: another run is at work here.
        """
        holder = {"run_id": self._run_id, "host": socket.gethostname(), "pid": os.getpid()}
        if self.claim(0):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
            return True
        time.sleep(0.1)  # the holder may be writing its name
        holder = json.loads(os.pread(self._descriptor, 4096, 0) or b"{}")
        if holder.get("run_id") != self._run_id:
            raise ExtractionError(
                f"{self._path.parent} is in use by process {holder.get('pid')} on "
                f"{holder.get('host')} | wait for it, or choose another --output-dir"
            )
        self.share()
        return False

    def share(self) -> None:
        """Let the other processes of this run in, or wait to be let in."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)

    def claim(self, number: int) -> bool:
        """Whether part `number` is this process's to write from now on."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time: `failed_samples.csv` belongs to all."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, 1 << 40)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, 1 << 40)

    def release(self) -> None:
        """Leave the run."""
        os.close(self._descriptor)


class Work:
    """Which rows are to do, and which of them this process does, part by part."""

    def __init__(self, parts: dict[int, list[Row]], stored: set[str], launch: Launch, lock) -> None:
        self.parts = parts
        self.part_of = {row.question_id: k for k, rows in parts.items() for row in rows}
        self.num_rows = len(self.part_of)
        self.num_stored = len(self.part_of.keys() & stored)
        self.num_open: dict[int, int] = {}  # a claimed part: rows without an outcome yet
        self.lock: OutputLock = lock
        self._stored = stored
        self._launch = launch

    def claim_rows(self, output_dir: Path) -> Iterator[Row]:
        """The missing rows of one part after the other that no other process has taken."""
        for number, rows in self.parts.items():
            if all(row.question_id in self._stored for row in rows):
                continue
            if self._launch.add(f"part {number}", 1) > 1 or not self.lock.claim(number):
                continue
            # A task of the same array may have finished it since this one looked.
            stored = self._stored | stored_ids(part_path(output_dir, number))
            missing = [row for row in rows if row.question_id not in stored]
            self.num_open[number] = len(missing)
            yield from missing


def open_output(options: Options, settings: dict, shapes: dict, rows: list[Row], launch) -> Work:
    """Lock the directory, look at what is there already, and plan the rest.

    Raises:
        ExtractionError: in use, of another run, not writable, or too small for what is to come.
    """
    output_dir = options.output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = OutputLock(output_dir, launch.run_id)
        if lock.acquire():
            remove_files(output_dir, everything=options.overwrite)
            stored = scan_parts(output_dir, settings, shapes, rows)
            missing = {row.question_id for row in rows} - stored
            failures = read_failures(output_dir)
            write_failures(output_dir, {q: f for q, f in failures.items() if q in missing})
            lock.share()
        else:
            stored = set().union(*map(stored_ids, find_parts(output_dir)))
    except OSError as error:
        raise ExtractionError(
            f"--output-dir {output_dir}: {error.strerror or error} "
            "| choose a directory that can be written to"
        ) from error
    parts = plan_parts(rows, options.checkpoint_interval)
    if options.test:
        first = set(rows[:NUM_TEST_ROWS])
        parts = {k: [row for row in part if row in first] for k, part in parts.items()}
    work = Work(parts, stored, launch, lock)
    needed = (work.num_rows - work.num_stored) * bytes_per_sample(shapes, options.storage_dtype)
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise ExtractionError(
            f"{output_dir} has {free / 1e9:.1f} GB free; the run needs {needed / 1e9:.1f} GB "
            "| make room, or choose another --output-dir or --storage-dtype bfloat16"
        )
    return work


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


def prepare_image(rows: list[Row], options: Options, prompts: Prompts, device) -> SharedImage:
    """The rows about one image as the model's input, ready for an asynchronous copy."""

    def load(image_id: str) -> Tensor:
        pixel_values = prompts.pixels(open_image(options.images_dir, image_id))
        pixel_values = pixel_values.to(getattr(torch, options.dtype))
        return pixel_values.pin_memory() if device.type == "cuda" else pixel_values

    return prompts.share(rows, load)


def prepare_ahead(
    rows: Iterator[Row], prepare: Callable[[list[Row]], SharedImage], num_workers: int, ahead: int
) -> Iterator[SharedImage]:
    """Image after image in order, prepared by threads while the model is at earlier ones.

    At least `ahead` rows and two images a thread are under way.
    """
    pending: deque = deque()
    num_rows = 0
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for _, about_image in itertools.groupby(rows, key=lambda row: row.image_id):
                group = list(about_image)
                pending.append((pool.submit(prepare, group), len(group)))
                num_rows += len(group)
                while len(pending) > 2 * num_workers and num_rows - pending[0][1] >= ahead:
                    future, count = pending.popleft()
                    num_rows -= count
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_batches(images: Iterable[SharedImage], batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` prompts, of one image or of several, failed rows in their places."""
    batch, room = Batch([], [], {}), batch_size
    for image in images:
        start = stop = 0
        for row in image.rows:
            batch.rows.append(row)
            if row.question_id in image.failures:
                batch.failures[row.question_id] = image.failures[row.question_id]
                continue
            stop, room = stop + 1, room - 1
            if room == 0:
                batch.chunks.append(Chunk(image, start, stop))
                yield batch
                batch, room, start = Batch([], [], {}), batch_size, stop
        if stop > start:
            batch.chunks.append(Chunk(image, start, stop))
        elif batch.rows and not batch.chunks:  # failures alone: to be told and counted now
            yield batch
            batch, room = Batch([], [], {}), batch_size
    if batch.rows:
        yield batch


def run_batch(
    extractor: Extractor, chunks: list[Chunk], failures: dict[str, str]
) -> list[BatchResult]:
    """Run a batch; one that does not fit into the device's memory in halves, down to one prompt.

    A prompt that does not fit alone is added to `failures`.

    Raises:
        ExtractionError: the device failed in another way.
    """
    prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
    if not prompts:
        return []
    try:
        return [extractor.run(chunks)]
    except torch.OutOfMemoryError:
        pass  # go on outside, where the traceback no longer holds tensors
    except RuntimeError as error:
        ids = [prompt.row.question_id for prompt in prompts]
        raise ExtractionError(f"the model failed on question_ids {ids}: {error}") from error
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if len(prompts) == 1:
        failures[prompts[0].row.question_id] = "the device's memory is too small for it"
        return []
    log.warning("%d questions at once are too many for the device's memory: halved", len(prompts))
    halves = halve(chunks, len(prompts) // 2)
    return [result for half in halves for result in run_batch(extractor, half, failures)]


def halve(chunks: list[Chunk], count: int) -> tuple[list[Chunk], list[Chunk]]:
    """The first `count` prompts, and the rest."""
    first, second = [], []
    for chunk in chunks:
        middle = min(chunk.stop, chunk.start + count)
        count -= middle - chunk.start
        first += [Chunk(chunk.image, chunk.start, middle)] if middle > chunk.start else []
        second += [Chunk(chunk.image, middle, chunk.stop)] if middle < chunk.stop else []
    return first, second


class Progress:
    """One bar for all processes of a launch; a line now and then where stderr is no terminal."""

    def __init__(self, launch: Launch, num_rows: int, num_stored: int) -> None:
        self._launch = launch
        self._is_terminal = sys.stderr.isatty()
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
    prepare: Callable[[list[Row]], SharedImage]  # the rows about one image
    launch: Launch
    work: Work
    progress: Progress
    stop: StopSignal


class Recorder:
    """A thread of its own: checks, decodes and writes what the model gives, in the plan's order.

    Leaving the context waits for it, and raises what went wrong in it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._number = 0  # of the part in hand
        self._writer: PartWriter | None = None
        self._attempted: set[str] = set()  # in the part in hand
        self._failures: dict[str, tuple[str, str]] = {}  # in the part in hand
        self._failed_images: set[str] = set()  # since the last row that went well
        self._error: ExtractionError | None = None
        self._queue: queue.Queue = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._record_all, name="recorder")

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def put(self, batch: Batch, results: list[BatchResult]) -> bool:
        """Hand over a batch, waiting while two are; False once there is no point in going on."""
        self._queue.put((batch.rows, batch.failures, results))
        return self._error is None

    def _record_all(self) -> None:
        for item in iter(self._queue.get, None):
            if self._error is None:
                self._guard(self._record, *item)
        self._guard(self._finish_part)

    def _guard(self, step: Callable, *args) -> None:
        try:
            step(*args)
        except ExtractionError as error:  # what was recorded before it is worth keeping
            self._error = error
        except Exception as error:  # else this thread ends, and the one that feeds it waits forever
            is_device = isinstance(error, torch.AcceleratorError)
            what = (
                "the device failed" if is_device else f"writing to {self._run.options.output_dir}"
            )
            self._error = ExtractionError(
                f"{what}: {error} | finished parts are whole; the same command goes on, "
                "once there is room if the disk is full"
            )
            if self._writer is not None:
                self._writer.discard()
                self._writer = None

    def _record(
        self, rows: list[Row], failures: dict[str, str], results: list[BatchResult]
    ) -> None:
        place_of = {}
        for result in results:
            result.wait()
            place_of |= {p.row.question_id: (result, i) for i, p in enumerate(result.prompts)}
        for row in rows:
            self._open_part(row)
            error = failures.get(row.question_id) or self._add(*place_of[row.question_id])
            self._run.progress.update(int(error is None), int(error is not None))
            self._attempted.add(row.question_id)
            self._run.work.num_open[self._number] -= 1
            if error is None:
                self._failed_images.clear()
            else:
                self._fail(row, error)
            if not self._run.work.num_open[self._number]:
                self._finish_part()

    def _open_part(self, row: Row) -> None:
        number = self._run.work.part_of[row.question_id]
        if self._writer is None or number != self._number:
            self._finish_part()
            path = part_path(self._run.options.output_dir, number)
            self._writer = PartWriter(path, self._run.settings, self._run.options.compression)
            self._number = number

    def _add(self, result: BatchResult, place: int) -> str | None:
        """Write one sample; why not, where it cannot be."""
        shapes, prompts = self._run.shapes, self._run.prompts
        vectors = result.states[place].numpy()
        if not np.isfinite(vectors).all():
            return "its states are not finite"
        states = dict(
            zip(shapes, np.split(vectors, np.cumsum([*shapes.values()])[:-1]), strict=True)
        )
        prompt, answer = result.prompts[place], result.answers[place]
        attributes = {
            "num_prompt_tokens": len(prompt.input_ids),
            "vision_token_pos": prompts.soft_stop - 1,
            "query_token_pos": len(prompt.input_ids) - 1,
            "num_answer_tokens": len(answer),
            "answer_truncated": result.truncated[place],
        }
        self._writer.add(prompt.row, states, prompts.decode(answer), attributes)
        return None

    def _fail(self, row: Row, error: str) -> None:
        self._failures[row.question_id] = (row.image_id, error)
        self._failed_images.add(row.image_id)
        if self._run.options.strict:
            raise ExtractionError(f"--strict: question_id {row.question_id!r} failed: {error}")
        if len(self._failed_images) == MAX_FAILED_IMAGES:
            raise ExtractionError(
                f"the rows of {MAX_FAILED_IMAGES} different images failed in a row: something is "
                f"wrong with all of them | the last, question_id {row.question_id!r}: {error}"
            )

    def _finish_part(self) -> None:
        if self._writer is None:
            return
        self._writer.finish(is_attempted_whole=not self._run.work.num_open[self._number])
        self._writer = None
        output_dir = self._run.options.output_dir
        with self._run.work.lock.alone():
            known = read_failures(output_dir)
            kept = {q: rest for q, rest in known.items() if q not in self._attempted}
            write_failures(output_dir, kept | self._failures)
        self._attempted, self._failures = set(), {}


def work_through(run: Run, extractor: Extractor) -> None:
    """Extract every row that this process can claim, or until it is to stop.

    Raises:
        ExtractionError: it could not go on; what was done is saved.
    """
    options = run.options
    rows = run.work.claim_rows(options.output_dir)
    images = prepare_ahead(rows, run.prepare, options.num_workers, options.batch_size)
    with Recorder(run) as recorder, contextlib.closing(images):
        for batch in make_batches(images, options.batch_size):
            results = run_batch(extractor, batch.chunks, batch.failures)
            if not recorder.put(batch, results) or run.stop.status:
                break


def summarise(run: Run, num_seconds: float) -> int:
    """The last line, once all processes of the launch have ended; the exit status."""
    launch, work, stop = run.launch, run.work, run.stop
    launch.add("finished", 1)
    while launch.rank == 0 and launch.add("finished", 0) < launch.world_size and not stop.status:
        run.progress.update(0, 0)
        time.sleep(0.2)
    extracted, failed = run.progress.update(0, 0)
    run.progress.bar.close()
    if stop.status:
        log.warning("stopped; what was done is saved, and the same command goes on from there")
        return stop.status
    if launch.rank != 0:
        return 0
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

    Raises:
        ExtractionError: it could not start or go on.
    """
    rows = read_rows(options.vqa_dataset)
    check_images(rows, options.images_dir)
    device = check_device(options.device)
    config, processor = load_processor(options)
    with explain_load_errors(options.model):
        prompts = Prompts(processor)
    prepare = functools.partial(prepare_image, options=options, prompts=prompts, device=device)
    settings = describe_run(options, config, prompts, rows, device)
    shapes = state_shapes(config, settings["layers"])
    launch = Launch()
    work = open_output(options, settings, shapes, rows, launch)
    todo = work.num_rows - work.num_stored
    log.info("%d rows in %d parts, %d to do", work.num_rows, len(work.parts), todo)
    if todo or options.test:
        model = load_model(options, device)
        extractor = Extractor(model, prompts, settings["layers"], options.max_new_tokens, device)
    is_sound, start = True, time.monotonic()
    with StopSignal() as stop, logging_redirect_tqdm([log]):
        progress = Progress(launch, work.num_rows, work.num_stored)
        run = Run(options, settings, shapes, prompts, prepare, launch, work, progress, stop)
        if todo:
            work_through(run, extractor)
        num_seconds = time.monotonic() - start
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


@dataclass(frozen=True)
class Comparison:
    """What a prompt's states are worth, against a plain forward pass of the same prompt."""

    has_same_tokens: bool
    error: float  # relative L2, the largest of all vectors
    mask_effect: float  # relative L2 at the soft tokens, with the image mask and without
    is_finite: bool


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative L2 error."""
    return float((value - reference).norm() / reference.norm())


def compare_with_plain(run: Run, extractor: Extractor, shared: SharedImage) -> Comparison:
    """Run all prompts about an image, and look at the first."""
    prompts, prompt = run.prompts, shared.prompts[0]
    result = extractor.run([Chunk(shared, 0, len(shared.prompts))])
    result.wait()
    image = open_image(run.options.images_dir, prompt.row.image_id)
    plain = functools.partial(
        plain_forward, extractor.model, prompts.processor, image, prompt.row.question
    )
    input_ids, patches, hidden = plain()
    _, _, unmasked = plain(has_mask=False)
    kept = hidden[run.settings["layers"]]  # [layers, T, D]
    expected = [patches, *kept[:, prompts.soft_stop - 1], *kept[:, -1], *kept.mean(dim=1)]
    found = result.states[0].split(list(run.shapes.values()))
    soft = slice(prompts.soft_start, prompts.soft_stop)
    return Comparison(
        input_ids == prompt.input_ids,
        max(map(relative_error, found, expected)),
        relative_error(unmasked[-1, soft], hidden[-1, soft]),
        bool(result.states.isfinite().all()),
    )


def time_prompts(extractor: Extractor, image: SharedImage, count: int, batch_size: int) -> float:
    """Seconds for `count` questions about one image."""
    shared = dataclasses.replace(image, prompts=image.prompts[:1] * count, key_values=None)
    shared.num_shared = extractor.prompts.soft_stop
    begin = time.monotonic()
    for start in range(0, count, batch_size):
        extractor.run([Chunk(shared, start, min(count, start + batch_size))]).wait()
    return time.monotonic() - begin


def report_test(run: Run, extractor: Extractor, rows: list[Row]) -> bool:
    """Print what the first rows show and what the whole CSV would take; whether all is well."""
    options, prompts, first = run.options, run.prompts, rows[:NUM_TEST_ROWS]
    # Each image is asked all the questions, so that what is compared has gone the shared way.
    others = (
        [dataclasses.replace(other, image_id=row.image_id) for other in first if other is not row]
        for row in first
    )
    images = [run.prepare([row, *about]) for row, about in zip(first, others, strict=True)]
    images = [image for image in images if image.prompts and image.prompts[0].row in first]
    if not images:
        print("FAIL  none of the first rows can be extracted")
        return False
    compared = [compare_with_plain(run, extractor, image) for image in images]
    error, effect = max(c.error for c in compared), min(c.mask_effect for c in compared)
    bound, eps = TEST_BOUNDS[options.dtype], torch.finfo(getattr(torch, options.dtype)).eps
    ends = [len(image.prompts[0].input_ids) - 1 for image in images]
    checks = {
        "the processor's own tokens, one <bos>": all(c.has_same_tokens for c in compared),
        f"soft tokens {prompts.soft_start} to {prompts.soft_stop - 1}, vision token "
        f"{prompts.soft_stop - 1}, query tokens {ends}": all(n > prompts.soft_stop for n in ends),
        f"without the image mask soft tokens change by {effect:.1e}": effect > 10 * eps,
        f"plain forward passes give the same: error {error:.1e}, bound {bound:g}": error <= bound,
        "all states are finite": all(c.is_finite for c in compared),
    }
    for what, is_well in checks.items():
        print(f"{'ok  ' if is_well else 'FAIL'}  {what}")
    versions = [
        f"{name} {run.settings[f'{name}_version']}" for name in ("python", "torch", "transformers")
    ]
    print(f"      {', '.join(versions)}; {options.dtype} on {run.settings['device']}")
    print(f"      peak memory {peak_memory(extractor.device)}")
    one = time_prompts(extractor, images[0], 1, options.batch_size)
    each = max(time_prompts(extractor, images[0], 3, options.batch_size) - one, 0) / 2
    num_images = len({row.image_id for row in rows})
    hours = (num_images * max(one - each, 0) + len(rows) * each) / 3600 / run.launch.world_size
    size = len(rows) * bytes_per_sample(run.shapes, options.storage_dtype) / 1e9
    print(
        f"      the whole CSV, {len(rows)} rows about {num_images} images: {hours:.2f} h at "
        f"{len(rows) / hours / 3600:.2f} samples/s, {size:.2f} GB of "
        f"{shutil.disk_usage(options.output_dir).free / 1e9:.0f} GB free"
    )
    return all(checks.values())


def peak_memory(device: torch.device) -> str:
    """Of the process, and of the card where there is one."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the card"
    return text


# ───────────────────────────────────────── command line ────────────────────────────────────────


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
    if text not in TEST_BOUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither bfloat16 nor float32")
    return text


SWITCH = {"action": "store_true"}
FILE, COUNT = {"type": Path, "metavar": "DIR"}, {"type": at_least(1), "metavar": "N"}
FLAGS = {
    "data": {
        "--vqa-dataset": (
            "table with question_id, image_id (or image_name), question, answer (or gt_answer)",
            {"type": Path, "metavar": "CSV", "required": True},
        ),
        "--images-dir": ("where image_id names a file", FILE | {"required": True}),
        "--output-dir": ("where the part files go", FILE),
    },
    "model": {
        "--model": ("name on the Hugging Face hub, or a local directory", {}),
        "--revision": ("branch, tag or commit on the hub", {}),
        "--cache-dir": ("where downloads are kept", FILE),
        "--device": ("cuda, cpu or any torch device", {}),
        "--device-map": ("auto spreads one model over several GPUs and the CPU", {}),
        "--dtype": ("bfloat16 or float32", {"type": dtype_name}),
    },
    "what is extracted": {
        "--layers": (
            "comma-separated, negatives from the end (default: first, quarters and last)",
            {"type": layer_list, "metavar": "I,J"},
        ),
        "--max-new-tokens": (
            "limit of an answer; 0 generates none",
            {"type": at_least(0), "metavar": "N"},
        ),
    },
    "speed": {
        "--batch-size": ("questions per forward pass", COUNT),
        "--num-workers": ("threads that prepare images beside the model", COUNT),
    },
    "files": {
        "--checkpoint-interval": ("samples per part file", COUNT),
        "--storage-dtype": ("of the stored vectors", {"choices": ["float32", "bfloat16"]}),
        "--compression": ("of the stored vectors", {"choices": ["none", "gzip", "lzf"]}),
    },
    "run": {
        "--test": ("first 3 rows, then a report: checks, speed, time and disk for all", SWITCH),
        "--overwrite": ("start afresh: delete what this program wrote there", SWITCH),
        "--strict": ("stop at the first row that fails", SWITCH),
    },
}


def make_parser() -> argparse.ArgumentParser:
    """The command line; what is not given is as in `Options`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, (text, kwargs) in flags.items():
            default = getattr(Options, flag[2:].replace("-", "_"), None)
            shown = "" if default in (None, False) else f" (default: {default})"
            group.add_argument(flag, help=text + shown, **kwargs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    # "-1,2" looks like a flag to argparse, but not behind an equals sign.
    words = re.sub(r"(^|\0)--layers\0-", r"\1--layers=-", "\0".join(words)).split("\0")
    options = Options(**vars(make_parser().parse_args([word for word in words if word])))
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(message)s" if rank == "0" else f"process {rank}: %(message)s")
    )
    log.handlers = [handler]
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    try:
        return extract(options)
    except ExtractionError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
