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
import hashlib
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
from datetime import datetime, timezone
from pathlib import Path

if __name__ == "__main__":  # the imports below take seconds, in which a stop must count already
    for _signal in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(_signal, lambda signum, _: os._exit(130 if signum == signal.SIGINT else 143))

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
PART_PATTERN = re.compile(r"gemma3_12b_embeddings_part_(\d{3,})\.h5")
FAILED_NAME = "failed_samples.csv"
LOCK_NAME = ".lock"
COLUMNS = {  # ours: what the CSV may call it
    "question_id": ("question_id",),
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "answer": ("answer", "gt_answer"),
}
VISION, MEAN = "vision_representation", "multimodal_representation"  # means: always float32
LAYER_KINDS = ("vision_token_representation", "query_token_representation", MEAN)
TEXTS = ("question", "image_id", "answer", "ground_truth_answer")
# What every stored vector depends on: a run with other values may not go on in the same directory.
IDENTITY = (
    *("model_name", "model_revision", "dtype", "layers", "max_new_tokens", "prompt"),
    *("checkpoint_interval", "storage_dtype"),
)
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
MAX_FAILED_IMAGES = 25  # different images in a row: then something is wrong with all of them
MAX_PADDING = 0.125  # of a forward pass; images of too different lengths go in passes of their own
CACHE_ROOM = 32  # slots that a key/value buffer grows by
SAMPLE_OVERHEAD = 12_288  # bytes that HDF5 takes for a sample's names, groups and texts
NUM_TEST_ROWS = 3
TEST_ERRORS = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2, against a plain forward pass

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


@dataclass(frozen=True, eq=False)
class SharedImage:
    """One image and the prompts about it, which all begin with the same tokens."""

    pixel_values: Tensor  # [3, height, width]
    prompts: tuple[Prompt, ...]
    num_shared: int  # leading tokens that every prompt has in common, soft tokens included


@dataclass(frozen=True, eq=False)
class Chunk:
    """The prompts `start … stop - 1` of an image: what one batch takes of it."""

    image: SharedImage
    start: int
    stop: int

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.image.prompts[self.start : self.stop]


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
    states: Tensor  # [len(prompts), sum of state_shapes()], float32, in host memory
    answers: list[list[int]]
    truncated: list[bool]
    wait: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """All that is stored of one row."""

    row: Row
    states: dict[str, np.ndarray]  # name in the file: [D] or [D_v], float32
    answer: str
    attributes: dict[str, int | bool]


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
            f"{csv_path} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise ExtractionError(f"cannot read {csv_path}: {error}") from error
    if len(table) < 2:
        raise ExtractionError(f"{csv_path} has no rows; expected a header and one line a question")
    (_, header), *lines = table
    places = [_find_column(csv_path, header, names) for names in COLUMNS.values()]
    rows: dict[str, Row] = {}
    for index, (line_num, line) in enumerate(lines):
        where = f"{csv_path}, line {line_num}"
        if len(line) != len(header):
            raise ExtractionError(f"{where}: {len(line)} fields; expected {len(header)}")
        row = Row(index, *(line[place] for place in places))
        if any("\0" in text for text in dataclasses.astuple(row)[1:]):
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
    texts = [[row.question_id, row.image_id, row.question, row.ground_truth] for row in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def plan_parts(rows: list[Row], interval: int) -> dict[int, list[Row]]:
    """The rows of every part: image by image, as they first appear, `interval` rows a part."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image_id, []).append(row)
    ordered = list(itertools.chain.from_iterable(by_image.values()))
    starts = range(0, len(ordered), interval)
    return {k: ordered[start : start + interval] for k, start in enumerate(starts, start=1)}


def image_path(images_dir: Path, image_id: str) -> Path:
    """Where an image is.

    Raises:
        RowError: the image_id is empty or leads out of `images_dir`.
    """
    root = os.path.abspath(images_dir)
    path = os.path.normpath(os.path.join(root, image_id))
    if not image_id.strip() or not path.startswith(os.path.join(root, "")):
        raise RowError(f"image_id {image_id!r} does not name a file inside {images_dir}")
    return Path(path)


def open_image(images_dir: Path, image_id: str) -> Image.Image:
    """The image, upright and RGB.

    Raises:
        RowError: missing, unreadable, larger than Pillow's limit, outside `images_dir`.
    """
    path = image_path(images_dir, image_id)
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise RowError(f"{path}: {image.width}x{image.height} pixels are too many")
            return ImageOps.exif_transpose(image).convert("RGB")
    except RowError:
        raise
    except FileNotFoundError as error:
        raise RowError(f"{path} does not exist") from error
    except IMAGE_ERRORS as error:
        raise RowError(f"{path} cannot be read as an image: {error}") from error


# ──────────────────────────────────── prompts and positions ────────────────────────────────────


def find_soft_tokens(input_ids: list[int], image_token_id: int, count: int) -> tuple[int, int]:
    """First position of the image's soft tokens and the one after the last.

    Raises:
        RowError: they are not exactly one run of `count`.
    """
    found = [pos for pos, token in enumerate(input_ids) if token == image_token_id]
    if len(found) != count or found[-1] - found[0] != count - 1:
        raise RowError(f"found {len(found)} image soft tokens; expected one run of {count}")
    return found[0], found[-1] + 1


class Prompts:
    """Turns a question and its image into what the model reads, with the model's own processor."""

    def __init__(self, processor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._special = set(self.tokenizer.all_special_ids) | {
            token_id
            for token_id, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._lock = threading.Lock()  # a fast tokenizer must not be used by two threads at once
        plain = self._encode("?")
        self._plain_special = [token for token in plain if token in self._special]
        self.soft_tokens = find_soft_tokens(
            plain, self.tokenizer.image_token_id, processor.image_seq_length
        )
        if plain.count(self.tokenizer.bos_token_id) != 1:
            raise ExtractionError("the chat template does not give exactly one <bos>")

    def render(self, question: str) -> str:
        """The chat template with one user turn, image then question, and the generation prompt."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _encode(self, question: str) -> list[int]:
        boi, image = self.processor.boi_token, self.processor.full_image_sequence
        text = self.render(question).replace(boi, image, 1)  # the image comes first
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, row: Row) -> Prompt:
        """The row's prompt.

        Raises:
            RowError: the question is empty, or holds a special token as text.
        """
        if not row.question.strip():
            raise RowError("the question is empty")
        input_ids = self._encode(row.question)
        special = [token for token in input_ids if token in self._special]
        if special != self._plain_special:
            extra = set(special) - set(self._plain_special) or set(special)
            names = self.tokenizer.convert_ids_to_tokens(sorted(extra))
            raise RowError(f"the question holds special tokens as text ({' '.join(names[:5])})")
        return Prompt(row, input_ids)

    def pixels(self, image: Image.Image) -> Tensor:
        """`pixel_values` of one image, [3, height, width], float32."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def decode(self, token_ids: list[int]) -> str:
        """The text of an answer: no special tokens, whitespace kept, NUL (HDF5 ends on it) not."""
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def share_image(pixel_values: Tensor, prompts: list[Prompt]) -> SharedImage:
    """Find what the prompts have in common; at least one token stays each prompt's own."""
    common = len(os.path.commonprefix([prompt.input_ids for prompt in prompts]))
    shortest = min(len(prompt.input_ids) for prompt in prompts)
    return SharedImage(pixel_values, tuple(prompts), min(common, shortest - 1))


@dataclass(frozen=True, eq=False)
class Slots:
    """Tokens, or keys, as attention sees them, each [rows, length]."""

    pos: Tensor  # position in its own prompt
    segment: Tensor  # 0 what all questions of the row share, 1 … its questions, -1 padding
    is_soft: Tensor  # one of the image's soft tokens


@dataclass(frozen=True, eq=False)
class Layout:
    """Which token stands where in one forward pass: a row an image, its questions one by one."""

    input_ids: Tensor  # [rows, length]
    query: Slots  # the tokens of this pass
    key: Slots  # those before it (a prefix run earlier), then the tokens of this pass
    num_new_shared: list[int]  # a row: shared tokens in this pass; 0 where they were run earlier
    spans: list[tuple[int, int, int]]  # a question: its row, and its own tokens start … stop - 1
    slots: Tensor  # [questions, longest prompt]: where each prompt's keys are, 0 for padding
    num_prompt_tokens: list[int]  # a question: T


def pad_rows(rows: list[list[int]], value: int) -> Tensor:
    """[rows, longest], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def lay_out(chunks: list[Chunk], image_token_id: int, is_prefix_cached: bool) -> Layout:
    """Put the questions of an image behind the tokens they share, each at its own positions.

    A prefix that an earlier pass left in the cache (`is_prefix_cached`, one chunk) stands before
    the pass instead of in it.
    """
    input_ids, pos, segment, spans, slots = [], [], [], [], []
    for chunk in chunks:
        shared = chunk.image.num_shared
        num_past = shared if is_prefix_cached else 0
        ids = chunk.prompts[0].input_ids[num_past:shared]
        row_pos, row_segment = list(range(num_past, shared)), [0] * len(ids)
        for number, prompt in enumerate(chunk.prompts, start=1):
            start, num_own = len(ids), len(prompt.input_ids) - shared
            ids = ids + prompt.input_ids[shared:]
            row_pos += range(shared, shared + num_own)
            row_segment += [number] * num_own
            spans.append((len(input_ids), start, len(ids)))
            slots.append([*range(shared), *range(num_past + start, num_past + len(ids))])
        input_ids.append(ids)
        pos.append(row_pos)
        segment.append(row_segment)
    ids = pad_rows(input_ids, 0)
    query = Slots(pad_rows(pos, 0), pad_rows(segment, -1), ids == image_token_id)
    key = query
    if is_prefix_cached:
        past = torch.arange(shared)[None]
        key = Slots(
            torch.cat([past, query.pos], dim=1),
            torch.cat([torch.zeros_like(past), query.segment], dim=1),
            torch.cat([torch.zeros_like(past, dtype=torch.bool), query.is_soft], dim=1),
        )
    lengths = [len(prompt.input_ids) for chunk in chunks for prompt in chunk.prompts]
    num_new_shared = [0 if is_prefix_cached else chunk.image.num_shared for chunk in chunks]
    return Layout(ids, query, key, num_new_shared, spans, pad_rows(slots, 0), lengths)


def attention_masks(query: Slots, key: Slots, window: int) -> dict[str, Tensor]:
    """Who sees whom, [rows, 1, queries, keys], for the two kinds of layers.

    A token sees what its own prompt holds up to itself; the soft tokens of an image see each other
    in both directions. Sliding layers see `window` positions back. As in `modeling_gemma3`.
    """
    q_pos, k_pos = query.pos[:, :, None], key.pos[:, None, :]
    own = (key.segment[:, None, :] == query.segment[:, :, None]) | (key.segment[:, None, :] == 0)
    both_soft = query.is_soft[:, :, None] & key.is_soft[:, None, :]
    visible = own & ((k_pos <= q_pos) | both_soft)
    near = q_pos - k_pos < window
    return {
        "full_attention": visible[:, None],
        "sliding_attention": (visible & near)[:, None],
    }


def to_device(slots: Slots, device: torch.device) -> Slots:
    """The same slots in the device's memory."""
    return Slots(*(t.to(device, non_blocking=True) for t in vars(slots).values()))


# ──────────────────────────────────────────── hooks ────────────────────────────────────────────


@contextlib.contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Show each module's output to its observer; every hook is gone afterwards, come what may.

    Raises:
        ExtractionError: a module did not run exactly once.
    """
    handles, calls = [], []

    def register(module: nn.Module, observe: Callable[[Tensor], None]) -> None:
        place = len(calls)
        calls.append(0)

        def hook(_module, _args, output) -> None:
            calls[place] += 1
            output = getattr(output, "last_hidden_state", output)
            observe(output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook))

    try:
        for module, observe in hooks:
            register(module, observe)
        yield
    finally:
        for handle in handles:
            handle.remove()
    if any(count != 1 for count in calls):
        raise ExtractionError(f"hooked modules ran {calls} times; expected once each")


@dataclass(eq=False)
class Captured:
    """What the hooks keep of one pass: a few vectors a row or a question, never a sequence."""

    layout: Layout
    soft_pos: int  # last image soft token
    patches: list[Tensor] = field(default_factory=list)  # one [rows, D_v]
    soft: list[Tensor] = field(default_factory=list)  # a layer: [rows, D]
    shared_sum: list[Tensor] = field(default_factory=list)  # a layer: [rows, D]
    query: list[Tensor] = field(default_factory=list)  # a layer: [questions, D]
    own_sum: list[Tensor] = field(default_factory=list)  # a layer: [questions, D]

    def on_patches(self, patches: Tensor) -> None:  # [rows, num_patches, D_v]
        """Observe the vision tower."""
        self.patches.append(patches.mean(dim=1, dtype=torch.float32))

    def on_layer(self, hidden: Tensor) -> None:  # [rows, length, D]
        """Observe a decoder layer."""
        if self.layout.num_new_shared[0]:
            self.soft.append(hidden[:, self.soft_pos].float())
            shared = [hidden[row, :stop] for row, stop in enumerate(self.layout.num_new_shared)]
            self.shared_sum.append(torch.stack([t.sum(0, dtype=torch.float32) for t in shared]))
        own = [hidden[row, start:stop] for row, start, stop in self.layout.spans]
        self.own_sum.append(torch.stack([t.sum(0, dtype=torch.float32) for t in own]))
        self.query.append(torch.stack([t[-1].float() for t in own]))


# ───────────────────────────────────────── extraction ──────────────────────────────────────────


class KeyValueCache:
    """Keys and values of every decoder layer, [rows, num_key_value_heads, length, head_dim].

    Buffers have room, so that a new token is written in place; a decoder layer calls `update`.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self._buffers = dict(enumerate(layers or []))
        self._length = {i: keys.shape[2] for i, (keys, _) in self._buffers.items()}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens held."""
        return self._length.get(layer_idx, 0)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__):
        """Append, and return all there is."""
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = (keys, values)
            self._length[layer_idx] = keys.shape[2]
            return keys, values
        start = self._length[layer_idx]
        stop = self._length[layer_idx] = start + keys.shape[2]
        pair = self._buffers[layer_idx]
        if stop > pair[0].shape[2]:
            pair = self._buffers[layer_idx] = tuple(
                torch.cat([old[:, :, :start], new.new_empty(*self._room(new))], dim=2)
                for old, new in zip(pair, (keys, values), strict=True)
            )
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer[:, :, start:stop] = new
        return tuple(buffer[:, :, :stop] for buffer in pair)

    @staticmethod
    def _room(new: Tensor) -> tuple[int, ...]:
        return (*new.shape[:2], new.shape[2] + CACHE_ROOM, new.shape[3])

    def take(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Hand a layer's keys and values over, and forget them."""
        length = self._length.pop(layer_idx)
        return tuple(buffer[:, :, :length] for buffer in self._buffers.pop(layer_idx))

    def prefix(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the first tokens of one row, every layer."""
        pairs = [self._buffers[i] for i in range(len(self._buffers))]
        return [tuple(t[row : row + 1, :, :length].clone() for t in pair) for pair in pairs]

    def keep(self, rows: list[int]) -> None:
        """Make row i what row `rows[i]` was, and drop the rest; only rows that move are copied."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        for i, pair in self._buffers.items():
            for buffer in pair:
                if moved:
                    target, source = (list(places) for places in zip(*moved, strict=True))
                    buffer[target] = buffer[source]
            self._buffers[i] = tuple(buffer[: len(rows)] for buffer in pair)


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """What later questions about an image need of the tokens they share."""

    image: SharedImage
    layers: list[tuple[Tensor, Tensor]]  # keys, values: [1, num_key_value_heads, shared, head_dim]
    patches: Tensor  # [1, D_v]
    soft: list[Tensor]  # a captured layer: [1, D]
    shared_sum: list[Tensor]  # a captured layer: [1, D]


@dataclass(frozen=True, eq=False)
class Prefill:
    """One forward pass over whole prompts."""

    layout: Layout
    cache: KeyValueCache
    states: Tensor  # [questions, sum of state_shapes()], float32
    next_tokens: Tensor  # [questions]; empty without answers


def state_shapes(config, layers: tuple[int, ...]) -> dict[str, int]:
    """Name and width of every vector of a sample, in the order in which they are kept."""
    hidden_size = config.text_config.hidden_size
    kinds = [f"{kind}/layer_{i}" for kind in LAYER_KINDS for i in layers]
    return {VISION: config.vision_config.hidden_size} | dict.fromkeys(kinds, hidden_size)


class Extractor:
    """The loaded model: turns a batch of prompts into states and answers.

    Each image goes through the vision tower once, and the tokens that its prompts share through
    the decoder once; states and answers come from that same pass.
    """

    def __init__(self, model, prompts: Prompts, layers: tuple[int, ...], max_new_tokens: int):
        decoder_path = "model.language_model"
        paths = ["model.vision_tower", decoder_path, *(f"{decoder_path}.layers.{i}" for i in layers)]
        try:
            modules = [model.get_submodule(path) for path in paths]
        except AttributeError as error:
            raise ExtractionError(
                f"{type(model).__name__} is not built as expected: {error}; "
                "install the versions in requirements.txt"
            ) from error
        self.model = model
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self._vision_tower, self._decoder, *self._layers = modules
        self._window = model.config.text_config.sliding_window
        self._image_token_id = model.config.image_token_id
        self._device = self._decoder.embed_tokens.weight.device
        end = model.generation_config.eos_token_id
        self._end_ids = set(end if isinstance(end, list) else [end])
        # An accelerator wants the images of a batch in one pass; a CPU is faster one by one.
        self.joins_images = self._device.type != "cpu"
        self._prefix: SharedPrefix | None = None

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> BatchResult:
        """States and answers of every prompt, in order. One image's chunks must come in order."""
        passes = [self._prefill(group) for group in self._forward_passes(chunks)]
        states = torch.cat([prefill.states for prefill in passes])
        host = torch.empty(states.shape, pin_memory=states.is_cuda)
        host.copy_(states, non_blocking=True)
        wait = _record_event(states.device)
        prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
        answers, truncated = [[] for _ in prompts], [False for _ in prompts]
        if self.max_new_tokens:
            answers, truncated = self._decode(passes)
        return BatchResult(prompts, host, answers, truncated, wait)

    def _forward_passes(self, chunks: list[Chunk]) -> Iterator[list[Chunk]]:
        """Images together that waste little on padding; one whose prefix is cached on its own."""
        group: list[Chunk] = []
        for chunk in chunks:
            lengths = [self._length(other) for other in (*group, chunk)]
            padding = 1 - sum(lengths) / (len(lengths) * max(lengths))
            is_joined = self.joins_images and padding <= MAX_PADDING
            if group and (self._is_cached(group[0]) or not is_joined):
                yield group
                group = []
            group = [*group, chunk]
        yield group

    def _is_cached(self, chunk: Chunk) -> bool:
        return self._prefix is not None and self._prefix.image is chunk.image

    @staticmethod
    def _length(chunk: Chunk) -> int:
        shared = chunk.image.num_shared
        return shared + sum(len(prompt.input_ids) - shared for prompt in chunk.prompts)

    def _prefill(self, chunks: list[Chunk]) -> Prefill:
        prefix = self._prefix if self._is_cached(chunks[0]) else None
        layout = lay_out(chunks, self._image_token_id, is_prefix_cached=prefix is not None)
        cache = KeyValueCache(prefix.layers if prefix else None)
        query, key = (to_device(slots, self._device) for slots in (layout.query, layout.key))
        captured = Captured(layout, self.prompts.soft_tokens[1] - 1)
        hooks = [(layer, captured.on_layer) for layer in self._layers]
        if prefix is None:
            hooks.append((self._vision_tower, captured.on_patches))
        with forward_hooks(hooks):
            last_hidden_state = self._decoder(
                inputs_embeds=self._embed(layout, [] if prefix else chunks),
                attention_mask=attention_masks(query, key, self._window),
                position_ids=query.pos,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # [rows, length, D], normed
        if prefix is not None:
            captured.patches = [prefix.patches]
            captured.soft, captured.shared_sum = prefix.soft, prefix.shared_sum
        self._keep_prefix(chunks[-1], cache, captured)
        next_tokens = torch.empty(0)
        if self.max_new_tokens:
            last = [last_hidden_state[row, stop - 1] for row, _, stop in layout.spans]
            next_tokens = self.model.lm_head(torch.stack(last)).argmax(-1)
        return Prefill(layout, cache, self._states(captured), next_tokens)

    def _embed(self, layout: Layout, new_images: list[Chunk]) -> Tensor:
        """Embeddings of a pass, [rows, length, D], the images' in place of their soft tokens."""
        embeds = self._decoder.embed_tokens(layout.input_ids.to(self._device, non_blocking=True))
        if new_images:
            tower = next(self._vision_tower.parameters())
            pixel_values = torch.stack(
                [c.image.pixel_values.to(tower, non_blocking=True) for c in new_images]
            )  # [rows, 3, height, width]
            features = self.model.model.get_image_features(pixel_values).pooler_output
            start, stop = self.prompts.soft_tokens
            embeds[:, start:stop] = features.to(embeds)  # [rows, num_soft_tokens, D]
        return embeds

    def _keep_prefix(self, chunk: Chunk, cache: KeyValueCache, captured: Captured) -> None:
        """Keep what the image's next questions need, if there are any, and nothing else."""
        if chunk.stop == len(chunk.image.prompts):
            self._prefix = None
        elif not self._is_cached(chunk):
            self._prefix = SharedPrefix(
                chunk.image,
                cache.prefix(len(captured.patches[0]) - 1, chunk.image.num_shared),
                captured.patches[0][-1:],
                [soft[-1:] for soft in captured.soft],
                [shared_sum[-1:] for shared_sum in captured.shared_sum],
            )

    def _states(self, captured: Captured) -> Tensor:
        """Every vector of every question, side by side in the order of `state_shapes`."""
        layout, device = captured.layout, self._device
        rows = torch.tensor([row for row, _, _ in layout.spans], device=device)
        lengths = torch.tensor(layout.num_prompt_tokens, device=device)[:, None]  # [questions, 1]

        def by_layer(vectors: list[Tensor]) -> Tensor:
            return torch.stack([vector.to(device) for vector in vectors], dim=1)

        soft = by_layer(captured.soft)[rows]  # [questions, layers, D]
        query = by_layer(captured.query)
        total = by_layer(captured.shared_sum)[rows] + by_layer(captured.own_sum)
        parts = [soft.flatten(1), query.flatten(1), total.flatten(1) / lengths]
        return torch.cat([captured.patches[0].to(device)[rows], *parts], dim=1)

    def _decode(self, passes: list[Prefill]) -> tuple[list[list[int]], list[bool]]:
        """Greedy answers without their end tokens, and whether the limit cut them short.

        All questions form one batch, whatever images they are about; one whose answer has ended
        leaves it.
        """
        tokens = torch.cat([prefill.next_tokens for prefill in passes])  # [live questions]
        answers: list[list[int]] = [[] for _ in tokens]
        truncated = [True] * len(tokens)
        live = list(range(len(tokens)))  # which question each row of the batch is
        cache, key, lengths = self._gather(passes)
        num_slots = cache.get_seq_length()
        for step in range(self.max_new_tokens):
            rows = []
            for row, token in enumerate(tokens.tolist()):
                truncated[live[row]] = token not in self._end_ids
                if truncated[live[row]]:
                    answers[live[row]].append(token)
                    rows.append(row)
            if not rows or step + 1 == self.max_new_tokens:
                break
            if len(rows) < len(tokens):
                rows = fill_gaps(rows)
                cache.keep(rows)
                live = [live[row] for row in rows]
                tokens, lengths = tokens[rows], lengths[rows]
                key = Slots(*(t[rows] for t in vars(key).values()))
            pos = lengths + step  # [live, 1]
            query = Slots(pos, torch.ones_like(pos), torch.zeros_like(pos, dtype=torch.bool))
            seen = Slots(*(t[:, : num_slots + step + 1] for t in vars(key).values()))
            hidden = self._decoder(
                input_ids=tokens[:, None],
                attention_mask=attention_masks(query, seen, self._window),
                position_ids=pos,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # [live, 1, D]
            tokens = self.model.lm_head(hidden[:, -1]).argmax(-1)
        return answers, truncated

    def _gather(self, passes: list[Prefill]) -> tuple[KeyValueCache, Slots, Tensor]:
        """A row for every question, its prompt in the first slots; keys; T, [questions, 1]."""
        lengths = [n for prefill in passes for n in prefill.layout.num_prompt_tokens]
        num_slots = max(lengths)
        layers = []
        for layer_idx in range(len(self._decoder.layers)):
            gathered = []
            for prefill in passes:
                pair = prefill.cache.take(layer_idx)
                device = pair[0].device
                slots = nn.functional.pad(
                    prefill.layout.slots, (0, num_slots - prefill.layout.slots.shape[1])
                ).to(device)
                rows = torch.tensor([row for row, _, _ in prefill.layout.spans], device=device)
                gathered.append(
                    [t.transpose(1, 2)[rows[:, None], slots].transpose(1, 2) for t in pair]
                )
            layers.append(tuple(torch.cat(ts) for ts in zip(*gathered, strict=True)))
        total = torch.tensor(lengths, device=self._device)[:, None]
        place = torch.arange(num_slots + self.max_new_tokens, device=self._device)[None]
        is_prompt = place < num_slots
        key = Slots(
            torch.where(is_prompt, place, total + place - num_slots),
            torch.where(is_prompt & (place >= total), -1, 1),
            torch.zeros_like(place - total, dtype=torch.bool),
        )
        return KeyValueCache(layers), key, total


def fill_gaps(rows: list[int]) -> list[int]:
    """An order of `rows` in which as many as can be stay where they are.

    >>> fill_gaps([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    staying = {row for row in rows if row < len(rows)}
    moving = [row for row in rows if row >= len(rows)]
    return [place if place in staying else moving.pop() for place in range(len(rows))]


def _record_event(device: torch.device) -> Callable[[], None]:
    """A function that returns when all that the device was asked for so far is done."""
    if device.type == "cpu":
        return lambda: None
    event = torch.Event(device=device)
    event.record()
    return event.synchronize


# ────────────────────────────────────── loading the model ──────────────────────────────────────


@dataclass(frozen=True)
class Options:
    """Everything the command line sets; the parser takes its defaults from here."""

    vqa_dataset: Path
    images_dir: Path
    output_dir: Path = Path("output")
    model: str = "google/gemma-3-12b-it"
    revision: str = "main"
    cache_dir: Path = Path("model_cache")
    checkpoint_interval: int = 1000
    test: bool = False
    device: str = "cuda"
    device_map: str | None = None
    dtype: str = "bfloat16"
    layers: tuple[int, ...] | None = None
    batch_size: int = 1
    max_new_tokens: int = 200
    num_workers: int = 2
    storage_dtype: str = "float32"
    compression: str = "none"
    overwrite: bool = False
    strict: bool = False


@contextlib.contextmanager
def explain_load_errors(model: str) -> Iterator[None]:
    """Turn what transformers raises for a missing, gated or broken model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExtractionError(
            f"cannot load {model}: {reason} | a gated model: accept its licence at "
            f"https://huggingface.co/{model} and run `hf auth login`; "
            "a downloaded one: --model DIR with config.json and *.safetensors"
        ) from error


def load_prompts(options: Options):
    """The model's config and its processor: small files, enough to plan and check a run."""
    from transformers import AutoConfig, AutoProcessor

    places = {"revision": options.revision, "cache_dir": options.cache_dir}
    with explain_load_errors(options.model):
        config = AutoConfig.from_pretrained(options.model, **places)
        if config.model_type != "gemma3":
            raise ValueError(f"its type is {config.model_type}; expected gemma3 (4B, 12B or 27B)")
        # With torchvision's back end pixels differ by 1/255 in places; Pillow is always there.
        processor = AutoProcessor.from_pretrained(options.model, **places, backend="pil")
    return config, Prompts(processor)


def check_device(options: Options) -> torch.device:
    """The device to run on; under a launcher, `cuda` is the card of this process.

    Raises:
        ExtractionError: it is not there.
    """
    name = options.device
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExtractionError(
            f"--device {name} cannot be used: {reason} | without a GPU: --device cpu"
        ) from error
    return device


def load_model(options: Options, device: torch.device):
    """The whole model, in evaluation mode, its weights from safetensors and complete."""
    from transformers import AutoModelForImageTextToText

    with explain_load_errors(options.model):
        model, report = AutoModelForImageTextToText.from_pretrained(
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


def find_revision(model: str, config) -> str:
    """The hub's commit, or for a local directory a hash of its config and its weights' sizes."""
    if commit := getattr(config, "_commit_hash", None):
        return commit
    weights = sorted(Path(model).glob("*.safetensors"))
    sizes = [(path.name, path.stat().st_size) for path in weights]
    return hashlib.sha256(f"{sizes}{config.to_json_string()}".encode()).hexdigest()[:40]


def name_model_type(config) -> str:
    """`gemma-3-12b-multimodal`, or what size it is; parameters are counted without memory."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        count = AutoModelForImageTextToText.from_config(config).num_parameters()
    size = f"{count / 1e9:.0f}b" if count >= 5e8 else f"{count / 1e6:.1f}m"
    return f"gemma-3-{size}-multimodal"


def choose_layers(asked: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """The layers asked for, negatives from the end, or HALP's five: first, quarters and last."""
    n = num_layers
    chosen = (0, n // 4, n // 2, 3 * n // 4, n - 1) if asked is None else asked
    if wrong := [i for i in chosen if not -n <= i < n]:
        raise ExtractionError(f"--layers {wrong[0]}: the model has layers 0 to {n - 1}")
    return tuple(sorted({i % n for i in chosen}))


# ────────────────────────────────── writing and resuming parts ─────────────────────────────────


def part_path(output_dir: Path, number: int) -> Path:
    """Where part `number` belongs."""
    return output_dir / PART_NAME.format(number)


def find_parts(output_dir: Path) -> dict[int, Path]:
    """The finished parts, in order."""
    found = ((PART_PATTERN.fullmatch(path.name), path) for path in output_dir.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def group_name(question_id: str) -> str:
    """A name that HDF5 takes; `urllib.parse.unquote` gives the question_id back."""
    name = question_id.replace("%", "%25").replace("/", "%2F")
    return name.replace(".", "%2E") if not name.strip(".") else name


def bfloat16_type() -> h5py.h5t.TypeID:
    """An HDF5 float of 1 + 8 + 7 bits, which h5py reads as float32, exactly."""
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_size(2)
    bfloat16.set_ebias(127)
    return bfloat16


class VectorStorage:
    """How vectors lie in a file. HDF5's low-level calls: half the time of `create_dataset`."""

    def __init__(self, storage_dtype: str, compression: str) -> None:
        self._bfloat16 = bfloat16_type() if storage_dtype == "bfloat16" else None
        self._compression = compression
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)

    def write(self, group: h5py.Group, name: str, vector: np.ndarray) -> None:
        """Write one float32 vector; means keep all their bits, whatever the storage type."""
        file_type = memory_type = h5py.h5t.IEEE_F32LE
        if self._bfloat16 is not None and name.partition("/")[0] not in (VISION, MEAN):
            file_type = memory_type = self._bfloat16
            vector = torch.from_numpy(vector).bfloat16().view(torch.int16).numpy()
        space = h5py.h5s.create_simple(vector.shape)
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if self._compression != "none":
            layout.set_chunk(vector.shape)
            layout.set_shuffle()
            if self._compression == "gzip":
                layout.set_deflate(1)
            else:
                layout.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
        dataset = h5py.h5d.create(group.id, name.encode(), file_type, space, layout, self._links)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, vector, memory_type)


class PartWriter:
    """Writes one part under another name, and renames it into place once it is safe on the disk.

    What a finished file of the same number holds is taken over.
    """

    def __init__(self, path: Path, attributes: dict, storage: VectorStorage) -> None:
        self.path = path
        self._partial = path.with_suffix(".partial")
        self._storage = storage
        self._file = h5py.File(self._partial, "w")
        self._file.attrs.update(attributes)
        if path.exists():
            with h5py.File(path) as finished:
                for name in finished:
                    finished.copy(name, self._file)
        self._num_before = len(self._file)

    def add(self, sample: Sample) -> None:
        """Write one sample."""
        row = sample.row
        group = self._file.create_group(group_name(row.question_id))
        texts = (row.question, row.image_id, sample.answer, row.ground_truth)
        for name, text in zip(TEXTS, texts, strict=True):
            group.create_dataset(name, data=text, dtype=h5py.string_dtype())
        for name, vector in sample.states.items():
            self._storage.write(group, name, vector)
        group["vision_only_representation"] = h5py.SoftLink(VISION)
        group.attrs.update({"question_id": row.question_id, "row": row.index, **sample.attributes})

    def finish(self, is_attempted_whole: bool) -> None:
        """Close, sync, check and rename; nothing to keep of a part that was hardly begun."""
        count = len(self._file)
        if count == self._num_before and (self.path.exists() or not is_attempted_whole):
            return self.discard()
        self._file.attrs["num_samples"] = count
        self._file.attrs["created_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._file.close()
        sync(self._partial)
        with h5py.File(self._partial) as written:
            if len(written) != count:
                raise OSError(f"{self._partial} holds {len(written)} samples; expected {count}")
        os.replace(self._partial, self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Forget what was written since the part was opened."""
        with contextlib.suppress(OSError, RuntimeError):  # a full disk fails again here
            self._file.close()
        self._partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_part(path: Path, shapes: dict[str, int]) -> tuple[dict, dict[str, tuple[str, str, str]]]:
    """A finished part's attributes, and question, image_id, ground truth by question_id.

    Raises:
        DamagedPart: it does not open, or a sample is incomplete, misshapen or not finite.
    """
    try:
        with h5py.File(path) as file:
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
            if attributes.get("num_samples") != len(file):
                raise DamagedPart(f"{len(file)} samples; expected {attributes.get('num_samples')}")
            texts = {
                _plain(group.attrs["question_id"]): _check_sample(group, shapes)
                for group in file.values()
            }
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise DamagedPart(str(error)) from error
    return attributes, texts


def _check_sample(group: h5py.Group, shapes: dict[str, int]) -> tuple[str, str, str]:
    if group_name(group.attrs["question_id"]) != group.name[1:]:
        raise DamagedPart(f"{group.name} holds question_id {group.attrs['question_id']!r}")
    for name, width in shapes.items():
        vector = group[name][()]
        if vector.shape != (width,) or not np.isfinite(vector).all():
            raise DamagedPart(f"{group.name}/{name} is misshapen or not finite")
    question, image_id, _, ground_truth = (group[name].asstr()[()] for name in TEXTS)
    return question, image_id, ground_truth


def _plain(value):
    """An attribute as Python's own type."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def check_same_run(path: Path, stored: dict, current: dict) -> None:
    """Refuse to go on in a directory that another kind of run filled.

    Raises:
        ExtractionError: names each setting that differs, with both values.
    """
    differing = [
        f"{name} was {stored.get(name)!r} and is {_plain(np.asarray(current[name]))!r}"
        for name in IDENTITY
        if stored.get(name) != _plain(np.asarray(current[name]))
    ]
    if differing:
        raise ExtractionError(
            f"{path} was written with other settings: {'; '.join(differing)} "
            "| use these settings, another --output-dir, or --overwrite"
        )


def check_same_rows(path: Path, stored: dict[str, tuple[str, str, str]], rows: list[Row]) -> None:
    """Refuse rows that changed under their id.

    Raises:
        ExtractionError: names the first row that differs, and how.
    """
    for row in rows:
        before = stored.get(row.question_id)
        now = (row.question, row.image_id, row.ground_truth)
        if before is not None and before != now:
            names = ("question", "image_id", "answer")
            what = "; ".join(
                f"{name} was {old!r} and is {new!r}"
                for name, old, new in zip(names, before, now, strict=True)
                if old != new
            )
            raise ExtractionError(
                f"the CSV changed under question_id {row.question_id!r}, stored in {path}: {what} "
                "| restore it, or give a new id, another --output-dir, or --overwrite"
            )


def scan_parts(output_dir: Path, settings: dict, shapes: dict[str, int], rows: list[Row]) -> set:
    """The question_ids that are stored; every part is read and checked, damaged ones set aside."""
    stored: set[str] = set()
    for path in find_parts(output_dir).values():
        try:
            with h5py.File(path) as file:
                attributes = {name: _plain(value) for name, value in file.attrs.items()}
            check_same_run(path, attributes, settings)
            _, texts = read_part(path, shapes)
        except (DamagedPart, OSError) as error:
            aside = path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
            os.replace(path, aside)
            log.warning("%s is damaged (%s): set aside as %s", path, error, aside.name)
            continue
        check_same_rows(path, texts, rows)
        stored |= texts.keys()
    return stored


def stored_ids(path: Path) -> set[str]:
    """The question_ids in a finished part; none if there is no such part."""
    if not path.exists():
        return set()
    with h5py.File(path) as file:
        return {urllib.parse.unquote(name) for name in file}


def read_failures(output_dir: Path) -> dict[str, tuple[str, str]]:
    """image_id and error by question_id, from `failed_samples.csv`."""
    path = output_dir / FAILED_NAME
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))[1:]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def write_failures(output_dir: Path, failures: dict[str, tuple[str, str]]) -> None:
    """Replace `failed_samples.csv`; no failures, no file."""
    path = output_dir / FAILED_NAME
    if not failures:
        path.unlink(missing_ok=True)
        return
    partial = output_dir / f".{FAILED_NAME}.partial"
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("question_id", "image_id", "error"))
        writer.writerows((question_id, *rest) for question_id, rest in failures.items())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def remove_leftovers(output_dir: Path, everything: bool) -> None:
    """Delete what a killed run left half written, or everything this program ever wrote."""
    stem = PART_NAME.partition("{")[0]
    for path in output_dir.iterdir():
        is_ours = path.name.startswith(stem) or FAILED_NAME in path.name
        if is_ours and (path.suffix == ".partial" or everything):
            path.unlink()


# ─────────────────────────────────── processes on one output ───────────────────────────────────


class Launch:
    """The processes of one launch (torchrun, accelerate) and what they count together.

    A process alone counts for itself. Tasks of a Slurm array are alone too, but of one run.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._counts: dict[str, int] = {}
        self._store = None
        self.run_id = uuid.uuid4().hex
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            self.run_id = f"slurm-{array}"
        if self.world_size > 1:
            self._store, _, _ = next(torch.distributed.rendezvous("env://"))
            if self.rank == 0:
                self._store.set("run_id", self.run_id)
            self.run_id = self._store.get("run_id").decode()

    def add(self, name: str, amount: int) -> int:
        """Add to a count that all processes share; its value after that."""
        if self._store is not None:
            return self._store.add(name, amount)
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]


class OutputLock:
    """POSIX record locks on `{output_dir}/.lock`, which the kernel drops with their process.

    Byte 0 is the run: held alone while the directory is prepared, shared by the run's processes
    from then on. Byte k is part k: whoever holds it writes that part.
    """

    def __init__(self, output_dir: Path, run_id: str) -> None:
        self._run_id = run_id
        self._path = output_dir / LOCK_NAME
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ExtractionError(f"cannot write to {output_dir}: {error.strerror}") from error

    def acquire(self) -> bool:
        """Join the run; True for the process that is to prepare the directory, then `share()`.

        Raises:
            ExtractionError: another run is at work here.
        """
        for attempt in range(20):
            if self._try(0):
                holder = {"run_id": self._run_id, "host": socket.gethostname(), "pid": os.getpid()}
                text = json.dumps(holder).encode()
                os.pwrite(self._descriptor, text, 0)
                os.ftruncate(self._descriptor, len(text))
                return True
            with contextlib.suppress(ValueError):  # read while the holder was writing
                holder = json.loads(os.pread(self._descriptor, 4096, 0))
                if holder["run_id"] == self._run_id:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)
                    return False
            time.sleep(0.01 * attempt)
        raise ExtractionError(
            f"{self._path.parent} is in use by process {holder['pid']} on {holder['host']} "
            "| wait for it, or choose another --output-dir"
        )

    def share(self) -> None:
        """Let the other processes of this run in."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)

    def claim(self, number: int) -> bool:
        """Whether this process is the one to write part `number`, until it ends."""
        return self._try(number)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """The right to change `failed_samples.csv`, one process at a time."""
        place = 1 << 40
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, place)
        yield
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, place)

    def release(self) -> None:
        """Leave the run."""
        os.close(self._descriptor)

    def _try(self, place: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise ExtractionError(
                f"{self._path}: this file system has no locks ({error.strerror}) "
                "| choose an --output-dir on another one"
            ) from error
        return True


# ─────────────────────────────────────────── the run ───────────────────────────────────────────


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (Slurm's early warning) into a wish to stop.

    The batch in hand is finished and saved; Ctrl-C once more ends the process at once.
    """

    def __init__(self) -> None:
        self.status: int | None = None  # the exit status asked for
        self._since = 0.0

    def __enter__(self) -> StopSignal:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {signum: signal.signal(signum, self._receive) for signum in signals}
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


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """The rows about one image, and what became of them before the model."""

    rows: list[Row]
    image: SharedImage | None  # None where every row failed
    failures: dict[str, str]  # question_id: error


def prepare_image(
    rows: list[Row], images_dir: Path, prompts: Prompts, device: torch.device, dtype: torch.dtype
) -> PreparedImage:
    """Tokenise the questions about one image, and decode it; what fails is said row by row."""
    failures: dict[str, str] = {}
    tokenised = []
    for row in rows:
        try:
            tokenised.append(prompts.tokenize(row))
        except RowError as error:
            failures[row.question_id] = str(error)
    image = None
    try:
        if tokenised:
            pixel_values = prompts.pixels(open_image(images_dir, rows[0].image_id)).to(dtype)
            if device.type == "cuda":
                pixel_values = pixel_values.pin_memory()
            image = share_image(pixel_values, tokenised)
    except RowError as error:
        failures |= dict.fromkeys((prompt.row.question_id for prompt in tokenised), str(error))
    return PreparedImage(rows, image, failures)


def prepare_ahead(
    rows: Iterator[Row], prepare: Callable[[list[Row]], PreparedImage], num_workers: int, ahead: int
) -> Iterator[PreparedImage]:
    """Image after image in order, prepared by threads while the model works on earlier ones.

    At least `ahead` rows and two images a thread are under way.
    """
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque = deque()
        num_rows = 0
        try:
            for _, group in itertools.groupby(rows, key=lambda row: row.image_id):
                about_image = list(group)
                pending.append((pool.submit(prepare, about_image), len(about_image)))
                num_rows += len(about_image)
                while num_rows - pending[0][1] >= ahead and len(pending) > 2 * num_workers:
                    future, count = pending.popleft()
                    num_rows -= count
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_batches(images: Iterable[PreparedImage], batch_size: int) -> Iterator[Batch]:
    """Batches of `batch_size` prompts, of one image or of several, failed rows in their places."""
    rows, chunks, failures, room = [], [], {}, batch_size
    for prepared in images:
        start = stop = 0
        for row in prepared.rows:
            rows.append(row)
            if row.question_id in prepared.failures:
                failures[row.question_id] = prepared.failures[row.question_id]
                continue
            stop += 1
            room -= 1
            if room == 0:
                yield Batch(rows, [*chunks, Chunk(prepared.image, start, stop)], failures)
                rows, chunks, failures, room = [], [], {}, batch_size
                start = stop
        if stop > start:
            chunks.append(Chunk(prepared.image, start, stop))
    if rows:
        yield Batch(rows, chunks, failures)


def run_batch(
    extractor: Extractor, chunks: list[Chunk], failures: dict[str, str]
) -> list[BatchResult]:
    """Run a batch; one that does not fit into the device's memory in halves, down to one prompt.

    A prompt that does not fit alone is added to `failures`.
    """
    prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
    if not prompts:
        return []
    try:
        return [extractor.run(chunks)]
    except torch.OutOfMemoryError:
        pass  # go on outside, where the traceback no longer holds the tensors
    except RuntimeError as error:
        ids = [prompt.row.question_id for prompt in prompts]
        raise ExtractionError(f"the model failed on question_ids {ids}: {error}") from error
    torch.accelerator.empty_cache()
    if len(prompts) == 1:
        failures[prompts[0].row.question_id] = "out of memory on the device, even alone"
        return []
    log.warning(
        "%d questions do not fit into the memory together: going on in halves; "
        "a smaller --batch-size saves the attempt",
        len(prompts),
    )
    return [
        result
        for half in halve(chunks, len(prompts) // 2)
        for result in run_batch(extractor, half, failures)
    ]


def halve(chunks: list[Chunk], count: int) -> tuple[list[Chunk], list[Chunk]]:
    """The first `count` prompts, and the rest."""
    first, second = [], []
    for chunk in chunks:
        middle = min(chunk.stop, chunk.start + count)
        count -= middle - chunk.start
        if middle > chunk.start:
            first.append(Chunk(chunk.image, chunk.start, middle))
        if middle < chunk.stop:
            second.append(Chunk(chunk.image, middle, chunk.stop))
    return first, second


class Work:
    """Which rows this process is to do, part by part, as it claims them."""

    def __init__(
        self, parts: dict[int, list[Row]], stored: set[str], output_dir: Path, lock: OutputLock
    ) -> None:
        self.parts = parts
        self.part_of = {row.question_id: k for k, rows in parts.items() for row in rows}
        self.num_rows = len(self.part_of)
        self.num_stored = len(self.part_of.keys() & stored)
        self.num_open: dict[int, int] = {}  # a claimed part: rows without an outcome yet
        self.lock = lock
        self.output_dir = output_dir
        self._stored = stored

    def rows(self, launch: Launch) -> Iterator[Row]:
        """The missing rows of one part after the other that no other process has taken."""
        for number, rows in self.parts.items():
            if all(row.question_id in self._stored for row in rows):
                continue
            if launch.add(f"part {number}", 1) > 1 or not self.lock.claim(number):
                continue
            self._stored |= stored_ids(part_path(self.output_dir, number))  # by another process
            missing = [row for row in rows if row.question_id not in self._stored]
            self.num_open[number] = len(missing)
            yield from missing


@dataclass(frozen=True, eq=False)
class Run:
    """What lasts as long as a run."""

    options: Options
    settings: dict  # root attributes of every part
    shapes: dict[str, int]  # of `state_shapes`
    prompts: Prompts
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
        self._storage = VectorStorage(run.options.storage_dtype, run.options.compression)
        self._number = 0  # of the part in hand
        self._writer: PartWriter | None = None
        self._attempted: set[str] = set()  # since the part was opened
        self._failures: dict[str, tuple[str, str]] = {}  # since the part was opened
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
        self._queue.put((batch, results))
        return self._error is None

    def _record_all(self) -> None:
        for batch, results in iter(self._queue.get, None):
            if self._error is None:
                self._guard(self._record, batch, results)
        self._guard(self._finish_part)

    def _guard(self, step: Callable, *args) -> None:
        try:
            step(*args)
        except ExtractionError as error:  # what was recorded before it is worth keeping
            self._error = error
        except (OSError, RuntimeError) as error:
            what = "the device failed" if isinstance(error, torch.AcceleratorError) else "writing"
            self._error = ExtractionError(
                f"{what}, {self._run.options.output_dir}: {error} | finished parts are whole; "
                "make room if the disk is full, and give the same command again"
            )
            self._error.__cause__ = error
            if self._writer is not None:
                self._writer.discard()
                self._writer = None

    def _record(self, batch: Batch, results: list[BatchResult]) -> None:
        outcomes: dict[str, Sample | str] = dict(batch.failures)
        for result in results:
            result.wait()
            for place, prompt in enumerate(result.prompts):
                outcomes[prompt.row.question_id] = self._make_sample(result, place)
        for row in batch.rows:
            self._record_row(row, outcomes[row.question_id])

    def _make_sample(self, result: BatchResult, place: int) -> Sample | str:
        shapes, prompts = self._run.shapes, self._run.prompts
        vectors = np.split(result.states[place].numpy(), np.cumsum([*shapes.values()])[:-1])
        states = dict(zip(shapes, vectors, strict=True))
        if broken := [name for name, vector in states.items() if not np.isfinite(vector).all()]:
            return f"{broken[0]} is not finite"
        prompt, answer = result.prompts[place], result.answers[place]
        attributes = {
            "num_prompt_tokens": len(prompt.input_ids),
            "vision_token_pos": prompts.soft_tokens[1] - 1,
            "query_token_pos": len(prompt.input_ids) - 1,
            "num_answer_tokens": len(answer),
            "answer_truncated": result.truncated[place],
        }
        return Sample(prompt.row, states, prompts.decode(answer), attributes)

    def _record_row(self, row: Row, outcome: Sample | str) -> None:
        work = self._run.work
        number = work.part_of[row.question_id]
        if number != self._number:
            self._finish_part()
            self._number = number
        if self._writer is None:
            path = part_path(self._run.options.output_dir, number)
            self._writer = PartWriter(path, self._run.settings, self._storage)
        self._attempted.add(row.question_id)
        work.num_open[number] -= 1
        is_failed = isinstance(outcome, str)
        self._run.progress.update(int(not is_failed), int(is_failed))
        if is_failed:
            self._failures[row.question_id] = (row.image_id, outcome)
            self._failed_images.add(row.image_id)
            self._stop_if_hopeless(row, outcome)
        else:
            self._writer.add(outcome)
            self._failed_images.clear()
        if not work.num_open[number]:
            self._finish_part()

    def _stop_if_hopeless(self, row: Row, error: str) -> None:
        last = f"question_id {row.question_id!r}: {error}"
        if self._run.options.strict:
            raise ExtractionError(f"--strict stops at the first row that fails, {last}")
        if len(self._failed_images) == MAX_FAILED_IMAGES:
            raise ExtractionError(
                f"the rows of {MAX_FAILED_IMAGES} different images failed in a row: something is "
                f"wrong with all of them; the last was {last}"
            )

    def _finish_part(self) -> None:
        if self._writer is None:
            return
        self._writer.finish(is_attempted_whole=not self._run.work.num_open[self._number])
        self._writer = None
        output_dir = self._run.options.output_dir
        with self._run.work.lock.failures():
            known = read_failures(output_dir)
            kept = {q: rest for q, rest in known.items() if q not in self._attempted}
            write_failures(output_dir, kept | self._failures)
        self._attempted, self._failures = set(), {}


class Progress:
    """One bar for all processes of a launch; a line now and then where stderr is no terminal."""

    def __init__(self, launch: Launch, num_rows: int, num_stored: int) -> None:
        self._launch = launch
        self._is_terminal = sys.stderr.isatty()
        self._last_line = self.start = time.monotonic()
        self.bar = tqdm(
            total=num_rows,
            initial=num_stored,
            unit=" samples",
            dynamic_ncols=True,
            file=sys.stderr if self._is_terminal else open(os.devnull, "w"),  # noqa: SIM115
            disable=launch.rank != 0,
        )

    def update(self, extracted: int, failed: int) -> tuple[int, int]:
        """Count, show and return what all processes have counted."""
        extracted = self._launch.add("extracted", extracted)
        failed = self._launch.add("failed", failed)
        self.bar.set_postfix(failed=failed, refresh=False)
        self.bar.update(self.bar.initial + extracted + failed - self.bar.n)
        now = time.monotonic()
        if not self._is_terminal and self._launch.rank == 0 and now - self._last_line > 30:
            self._last_line = now
            log.info("%s", self.bar)
        return extracted, failed


def check_images(rows: list[Row], images_dir: Path) -> None:
    """Say how many images are missing.

    Raises:
        ExtractionError: all of them.
    """
    if not images_dir.is_dir():
        raise ExtractionError(f"--images-dir {images_dir} is not a directory")
    image_ids = dict.fromkeys(row.image_id for row in rows)
    missing = []
    for image_id in image_ids:
        with contextlib.suppress(RowError, OSError):
            if image_path(images_dir, image_id).is_file():
                continue
        missing.append(image_id)
    if len(missing) == len(image_ids):
        raise ExtractionError(
            f"none of the {len(missing)} images is in {images_dir}, not even {missing[0]!r} "
            "| image_id must be the file name, extension included"
        )
    if missing:
        log.warning("%d of %d images are missing: %r ...", len(missing), len(image_ids), missing[0])


def describe_run(
    options: Options, config, prompts: Prompts, rows: list[Row], device: torch.device
) -> dict:
    """The root attributes of every part; `IDENTITY` names those that may not change."""
    import transformers

    decoder = config.text_config
    return {
        "model_name": options.model,
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


def open_output(
    options: Options, settings: dict, shapes: dict[str, int], rows: list[Row], launch: Launch
) -> Work:
    """Lock the directory, look at what is there already, and plan the rest.

    Raises:
        ExtractionError: in use, of another run, not writable, or too small for what is to come.
    """
    output_dir = options.output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExtractionError(f"--output-dir {output_dir}: {error.strerror}") from error
    lock = OutputLock(output_dir, launch.run_id)
    if lock.acquire():
        remove_leftovers(output_dir, everything=options.overwrite)
        stored = scan_parts(output_dir, settings, shapes, rows)
        known = {row.question_id for row in rows} - stored
        failures = read_failures(output_dir)
        write_failures(output_dir, {q: rest for q, rest in failures.items() if q in known})
        lock.share()
    else:
        stored = set().union(*map(stored_ids, find_parts(output_dir).values()))
    parts = plan_parts(rows, options.checkpoint_interval)
    if options.test:
        first = set(rows[:NUM_TEST_ROWS])
        parts = {k: [row for row in part if row in first] for k, part in parts.items()}
    work = Work(parts, stored, output_dir, lock)
    needed = (work.num_rows - work.num_stored) * bytes_per_sample(shapes, options.storage_dtype)
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise ExtractionError(
            f"{output_dir} has {free / 1e9:.1f} GB free; the run needs {needed / 1e9:.1f} GB "
            "| make room, or choose another --output-dir or --storage-dtype bfloat16"
        )
    return work


def bytes_per_sample(shapes: dict[str, int], storage_dtype: str) -> int:
    """What one sample takes on the disk, uncompressed."""
    size = {"float32": 4, "bfloat16": 2}[storage_dtype]
    vectors = sum(
        width * (4 if name.partition("/")[0] in (VISION, MEAN) else size)
        for name, width in shapes.items()
    )
    return vectors + SAMPLE_OVERHEAD


def work_through(run: Run, extractor: Extractor, device: torch.device) -> None:
    """Extract every row that this process can claim, or until it is to stop.

    Raises:
        ExtractionError: it could not go on; what was done is saved.
    """
    options = run.options

    def prepare(rows: list[Row]) -> PreparedImage:
        dtype = getattr(torch, options.dtype)
        return prepare_image(rows, options.images_dir, run.prompts, device, dtype)

    rows = run.work.rows(run.launch)
    images = prepare_ahead(rows, prepare, options.num_workers, options.batch_size)
    with Recorder(run) as recorder, contextlib.closing(images):
        for batch in make_batches(images, options.batch_size):
            results = run_batch(extractor, batch.chunks, batch.failures)
            if not recorder.put(batch, results) or run.stop.status:
                break


def summarise(run: Run, num_seconds: float) -> int:
    """The last line, once all processes of the launch have ended; the exit status."""
    launch, work = run.launch, run.work
    launch.add("finished", 1)
    while launch.rank == 0 and launch.add("finished", 0) < launch.world_size:
        run.progress.update(0, 0)
        time.sleep(0.2)
        if run.stop.status:
            break
    extracted, failed = run.progress.update(0, 0)
    run.progress.bar.close()
    if run.stop.status:
        log.warning("stopped; what was done is saved, and the same command goes on from there")
        return run.stop.status
    if launch.rank != 0:
        return 0
    # Processes of one launch start one after the other, and may find each other's samples.
    is_alone = launch.world_size == 1
    already = work.num_stored if is_alone else work.num_rows - extracted - failed
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
    device = check_device(options)
    config, prompts = load_prompts(options)
    settings = describe_run(options, config, prompts, rows, device)
    shapes = state_shapes(config, settings["layers"])
    launch = Launch()
    work = open_output(options, settings, shapes, rows, launch)
    todo = work.num_rows - work.num_stored
    log.info("%d rows in %d parts, %d to do", work.num_rows, len(work.parts), todo)
    if todo or options.test:
        model = load_model(options, device)
        extractor = Extractor(model, prompts, settings["layers"], options.max_new_tokens)
    with StopSignal() as stop, logging_redirect_tqdm():
        progress = Progress(launch, work.num_rows, work.num_stored)
        run = Run(options, settings, shapes, prompts, launch, work, progress, stop)
        start = time.monotonic()
        if todo:
            work_through(run, extractor, device)
        num_seconds = time.monotonic() - start
        is_sound = True
        if options.test and not stop.status and launch.rank == 0:
            is_sound = report_test(run, extractor, rows, device)
        status = summarise(run, num_seconds)
    work.lock.release()
    return status if is_sound else 1


# ─────────────────────────────────────────── --test ────────────────────────────────────────────


@torch.inference_mode()
def plain_forward(extractor: Extractor, image: Image.Image, question: str, has_mask: bool = True):
    """The same prompt by transformers alone: no hooks, no cache, nothing shared.

    Returns input_ids [T], the patches' mean [D_v], and the output of every decoder layer
    [num_layers, T, D], the last one before the final norm.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    model, decoder = extractor.model, extractor.model.model.language_model
    inputs = extractor.prompts.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(decoder.embed_tokens.weight.device, decoder.embed_tokens.weight.dtype)
    if not has_mask:
        del inputs["token_type_ids"]
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
    extractor: Extractor, result: BatchResult, image: Image.Image, run: Run
) -> tuple[bool, float, float]:
    """Whether the tokens are the same, the largest relative error, and what the mask changes."""
    prompt, states = result.prompts[0], result.states[0]
    input_ids, patches, hidden_states = plain_forward(extractor, image, prompt.row.question)
    _, _, unmasked = plain_forward(extractor, image, prompt.row.question, has_mask=False)
    start, stop = run.prompts.soft_tokens
    kept = hidden_states[list(run.settings["layers"])]  # [layers, T, D]
    expected = [patches, *kept[:, stop - 1], *kept[:, -1], *kept.mean(dim=1)]
    found = states.split(list(run.shapes.values()))
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    mask_effect = relative_error(unmasked[-1, start:stop], hidden_states[-1, start:stop])
    return input_ids == prompt.input_ids, max(errors), mask_effect


def time_prompts(extractor: Extractor, image: SharedImage, count: int, batch_size: int) -> float:
    """Seconds for `count` questions about one image."""
    prompts = image.prompts[:1] * count
    shared = SharedImage(image.pixel_values, prompts, extractor.prompts.soft_tokens[1])
    begin = time.monotonic()
    for start in range(0, count, batch_size):
        extractor.run([Chunk(shared, start, min(count, start + batch_size))]).wait()
    return time.monotonic() - begin


def report_test(run: Run, extractor: Extractor, rows: list[Row], device: torch.device) -> bool:
    """Print what the first rows show and what the whole CSV would take; whether all is well."""
    options, prompts = run.options, run.prompts
    images, results, compared = [], [], []
    for row in rows[:NUM_TEST_ROWS]:
        prepared = prepare_image(
            [row], options.images_dir, prompts, device, getattr(torch, options.dtype)
        )
        if prepared.image is None:
            continue
        images.append(prepared.image)
        results.append(extractor.run([Chunk(prepared.image, 0, 1)]))
        results[-1].wait()
        image = open_image(options.images_dir, row.image_id)
        compared.append(compare_with_plain(extractor, results[-1], image, run))
    if not compared:
        print("FAIL  none of the first rows could be extracted: see failed_samples.csv")
        return False
    bound, (start, stop) = TEST_ERRORS[options.dtype], prompts.soft_tokens
    error, mask_effect = max(c[1] for c in compared), min(c[2] for c in compared)
    num_tokens = [len(result.prompts[0].input_ids) for result in results]
    checks = {
        "one <bos>, and the processor's own tokens": all(c[0] for c in compared),
        f"soft tokens at {start} to {stop - 1}, vision token {stop - 1}, query tokens "
        f"{[n - 1 for n in num_tokens]}": all(stop < n for n in num_tokens),
        f"image mask: without it states at soft tokens change by {mask_effect:.2g}": mask_effect
        > 10 * torch.finfo(getattr(torch, options.dtype)).eps,
        f"equal to a plain forward pass within {error:.1e} (bound {bound:g})": error <= bound,
        "all states finite": all(bool(result.states.isfinite().all()) for result in results),
    }
    for text, is_well in checks.items():
        print(f"{'ok  ' if is_well else 'FAIL'}  {text}")
    for name in ("python", "torch", "transformers"):
        print(f"      {name} {run.settings[f'{name}_version']}")
    print(f"      {run.settings['device']}, {options.dtype}, peak memory {peak_memory(device)}")
    one = time_prompts(extractor, images[0], 1, options.batch_size)
    three = time_prompts(extractor, images[0], 3, options.batch_size)
    each = max((three - one) / 2, 0.0)
    num_images = len({row.image_id for row in rows})
    seconds = (num_images * max(one - each, 0.0) + len(rows) * each) / run.launch.world_size
    size = len(rows) * bytes_per_sample(run.shapes, options.storage_dtype)
    free = shutil.disk_usage(options.output_dir).free
    print(
        f"      the whole CSV, {len(rows)} rows about {num_images} images: about "
        f"{seconds / 3600:.2f} h at {len(rows) / seconds:.2f} samples/s, "
        f"{size / 1e9:.2f} GB of {free / 1e9:.0f} GB free"
    )
    return all(checks.values())


def peak_memory(device: torch.device) -> str:
    """Of the process, and of the card where there is one."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    if device.type == "cuda":
        text = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the card, {text}"
    return text


# ───────────────────────────────────────── command line ────────────────────────────────────────


def positive(text: str) -> int:
    """A whole number from 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def not_negative(text: str) -> int:
    """A whole number from 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def layer_list(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    return tuple(int(part) for part in text.split(","))


def float_type(text: str) -> str:
    """A dtype that holds Gemma 3's states."""
    if text == "float16":
        raise argparse.ArgumentTypeError(
            "float16 ends at 65504, and Gemma 3's residual stream passes that; use bfloat16"
        )
    if text not in TEST_ERRORS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(TEST_ERRORS)}")
    return text


def make_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of `Options`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(group, flag: str, text: str, **kwargs) -> None:
        default = getattr(Options, flag.strip("-").replace("-", "_"), None)
        if default not in (None, False):
            text += f" (default: {default})"
        group.add_argument(flag, help=text, default=default, **kwargs)

    group = parser.add_argument_group("data")
    add(
        group,
        "--vqa-dataset",
        "CSV with question_id, image_id (or image_name), question, answer (or gt_answer)",
        type=Path,
        required=True,
        metavar="CSV",
    )
    add(
        group,
        "--images-dir",
        "directory in which image_id names a file",
        type=Path,
        required=True,
        metavar="DIR",
    )
    add(group, "--output-dir", "where the part files go", type=Path, metavar="DIR")
    group = parser.add_argument_group("model")
    add(group, "--model", "name on the Hugging Face hub, or a local directory", metavar="NAME")
    add(group, "--revision", "branch, tag or commit on the hub")
    add(group, "--cache-dir", "where downloads are kept", type=Path, metavar="DIR")
    add(group, "--device", "cuda, cpu or any torch device")
    add(
        group,
        "--device-map",
        "auto spreads one model over several GPUs and the CPU",
        metavar="MAP",
    )
    add(group, "--dtype", "bfloat16 or float32", type=float_type, metavar="DTYPE")
    group = parser.add_argument_group("what is extracted")
    add(
        group,
        "--layers",
        "decoder layers, comma-separated, negatives from the end (default: first, quarters, last)",
        type=layer_list,
        metavar="I,J",
    )
    add(
        group,
        "--max-new-tokens",
        "limit of an answer; 0 generates none",
        type=not_negative,
        metavar="N",
    )
    group = parser.add_argument_group("speed")
    add(group, "--batch-size", "questions per forward pass", type=positive, metavar="N")
    add(
        group,
        "--num-workers",
        "threads that decode images beside the model",
        type=positive,
        metavar="N",
    )
    group = parser.add_argument_group("files")
    add(group, "--checkpoint-interval", "samples per part file", type=positive, metavar="N")
    add(group, "--storage-dtype", "type of the stored vectors", choices=["float32", "bfloat16"])
    add(group, "--compression", "of the stored vectors", choices=["none", "gzip", "lzf"])
    group = parser.add_argument_group("run")
    add(
        group,
        "--test",
        "first 3 rows only, then a report with checks and an estimate",
        action="store_true",
    )
    add(
        group,
        "--overwrite",
        "start afresh: delete what this program wrote in the output directory",
        action="store_true",
    )
    add(group, "--strict", "stop at the first row that fails", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    args = make_parser().parse_args(argv)
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING,
        format="%(message)s" if rank == "0" else f"[process {rank}] %(message)s",
    )
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return extract(Options(**vars(args)))
    except ExtractionError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
