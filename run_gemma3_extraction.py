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
LAYER_KINDS = ("vision_token_representation", "query_token_representation")
MEAN_KIND = "multimodal_representation"
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
    path = os.path.normpath(images_dir / image_id)
    if not image_id.strip() or Path(images_dir) not in Path(path).parents:
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
    kinds = [f"{kind}/layer_{i}" for kind in (*LAYER_KINDS, MEAN_KIND) for i in layers]
    return {"vision_representation": config.vision_config.hidden_size} | dict.fromkeys(
        kinds, hidden_size
    )


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
