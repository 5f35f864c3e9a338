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
        answer_logprobs                          [tokens]   natural log, end token included

How a row travels, from the top of this file to its end:

    read_rows → plan_parts → claim_rows → asked_images → Extractor.run → Recorder → PartWriter

An image and the questions about it flow together. The image takes a row of the pool of keys and
values; its questions enter, are answered side by side, and leave as their answers end.

The same command again goes on where the last one stopped. Exit status: 0 every row is stored,
1 the run could not start or go on, 2 wrong usage, 3 some rows failed, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator


class StopSignal:
    """Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (Slurm's early warning), unless they are ignored.

    They end the process at once, but while a run is at work they are a wish to stop: what is
    being answered is answered and saved. Ctrl-C once more ends the process all the same.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.status: int | None = None  # the exit status that was asked for
        self._is_deferred = False
        self._since = 0.0

    def install(self) -> dict:
        """Catch the signals; returns the handlers there were before."""
        caught = [signum for signum in self.SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
        return {signum: signal.signal(signum, self._receive) for signum in caught}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this, the first signal only sets `status`."""
        before = self.install()
        self.status, self._is_deferred = None, True
        try:
            yield
        finally:
            self._is_deferred = False
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, _frame) -> None:
        # A launcher passes on the Ctrl-C that the terminal has sent already: not a second one.
        is_second = self.status is not None and time.monotonic() - self._since > 1
        status = 130 if signum == signal.SIGINT else 143
        if not self._is_deferred or (is_second and signum == signal.SIGINT):
            os._exit(status)
        if self.status is None:
            self.status, self._since = status, time.monotonic()


STOP = StopSignal()
if __name__ == "__main__":  # the imports below take seconds, in which a stop must count already
    STOP.install()

import argparse
import bisect
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import platform
import re
import resource
import shutil
import socket
import sys
import threading
import urllib.parse
import uuid
import warnings
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import conv2d, rms_norm, scaled_dot_product_attention
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

# ────────────────────────────────────────── constants ──────────────────────────────────────────
SCHEMA_VERSION = 2
PART_NAME = "gemma3_12b_embeddings_part_{:03d}.h5"
FAILED_NAME = "failed_samples.csv"
OUR_FILES = re.compile(
    r"gemma3_12b_embeddings_part_\d+\.(h5|partial|damaged-\w{8})|failed_samples\.(csv|partial)"
)
COLUMNS = {  # a field of `Row`, and what the CSV may call it
    "question_id": ("question_id",),
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "ground_truth": ("answer", "gt_answer"),
}
VISION, MEAN = "vision_representation", "multimodal_representation"  # means: always float32
TOKEN_KINDS = ("vision_token_representation", "query_token_representation")
LAYER_KINDS = (*TOKEN_KINDS, MEAN)
# What every stored vector depends on: no run goes on in a directory where these were others.
IDENTITY = (
    *("schema_version", "model_revision", "dtype", "layers", "max_new_tokens", "prompt"),
    *("checkpoint_interval", "storage_dtype"),
)
# What h5py raises for a file that holds something else than it should.
H5PY_ERRORS = (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
IS_LAUNCHED = "RANK" in os.environ  # by torchrun, accelerate launch …
RANK, NUM_RANKS = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
MAX_FAILED_IMAGES = 25  # different images in a row: then something is wrong with all of them
SAMPLED_BYTES = 2**16  # at a time, of a model's weights
SAMPLE_OVERHEAD, VECTOR_OVERHEAD = 6000, 350  # bytes of a file beside the vectors themselves
LINE_SECONDS = 30  # between two lines of progress where there is no bar
NUM_TEST_ROWS = 3
TEST_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2 error to a plain forward pass

CPU_BATCH_SIZE = 64  # what `tests/benchmark.py` shows best
MAX_BATCH_SIZE = 256
MAX_PASS_TOKENS = 20480  # of a prefill pass on an accelerator: a quarter of its largest batch
TOWER_IMAGES = 8  # in one pass of the vision tower
TYPICAL_QUESTION, TYPICAL_ANSWER = 64, 32  # tokens; no result depends on them
EMBEDDING = "model.language_model.embed_tokens"  # shares its matrix with the head

Options = argparse.Namespace  # what `read_options` makes of the command line
log = logging.getLogger("gemma3_extraction")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we refuse such images ourselves


class ExtractionError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


class RowError(ValueError):
    """One row cannot be extracted; the message says why."""


class Damage(Exception):
    """A part does not hold what it should; the message says what."""


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


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row as the model reads it."""

    row: Row
    input_ids: list[int]  # [T]


@dataclass(frozen=True, eq=False)
class Asked:
    """An image, and the questions about it."""

    pixel_values: Tensor  # [3, height, width]
    image_sha256: str  # of the file
    num_shared: int  # leading tokens that all its prompts have in common, soft tokens included
    prompts: list[Prompt]


@dataclass(frozen=True, eq=False)
class Sample:
    """What the model gives for a prompt."""

    prompt: Prompt
    image_sha256: str
    states: dict[str, Tensor]  # as `state_shapes` names them, float32, in host memory
    answer: list[int]  # token ids without the end token
    is_truncated: bool
    logprobs: list[float]  # natural log of every generated token's probability, the end included
    first_token_entropy: float  # nats


# ─────────────────────────────────── reading rows and images ───────────────────────────────────
def read_rows(csv_path: Path) -> list[Row]:
    """Every row of the CSV, text as it stands: `007`, `NA`, `None` and empty answers survive.

    Raises ExtractionError: not UTF-8, no table with the columns, an empty or repeated question_id.
    """
    csv.field_size_limit(sys.maxsize)
    rows: dict[str, Row] = {}
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = find_columns(list(reader.fieldnames or ()))
            for line in reader:
                row = read_row(len(rows), line, columns)
                if row.question_id in rows:
                    raise ValueError(f"question_id {row.question_id!r} appears twice")
                rows[row.question_id] = row
            if not rows:
                raise ValueError("no rows; expected a header and a line a question")
    except OSError as error:
        raise ExtractionError(f"cannot read {csv_path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ExtractionError(f"{csv_path} is not UTF-8: {error.reason}; convert it") from error
    except (csv.Error, ValueError) as error:
        advice = "; check the quotes there" if isinstance(error, csv.Error) else ""
        where = f"{csv_path}, line {reader.reader.line_num}"
        raise ExtractionError(f"{where}: {error}{advice}") from error
    return list(rows.values())


def find_columns(header: list[str]) -> dict[str, str]:
    """What the CSV calls each field of `Row`. Raises ValueError: one is missing, or twice."""
    columns = {}
    for name, accepted in COLUMNS.items():
        present = [column for column in accepted if column in header]
        if header and (not present or header.count(present[0]) > 1):
            problem = "there twice" if present else "not there"
            near = [column for column in header if column.strip().lower() in accepted]
            advice = f" | rename {near[0]!r} to {near[0].strip().lower()!r}" if near else ""
            if len(header) == 1 and re.search("[;\t]", header[0]):
                advice = " | it looks separated by semicolons or tabs: save it with commas"
            named = " or ".join(accepted)
            raise ValueError(f"column {named} is {problem}; its columns: {header}{advice}")
        columns[name] = next(iter(present), "")
    return columns


def read_row(index: int, line: dict, columns: dict[str, str]) -> Row:
    """One line of the CSV. Raises ValueError: too few or many fields, a NUL byte, no id."""
    if None in line or None in line.values():  # how csv tells long lines from short ones
        than = "more" if None in line else "fewer"
        raise ValueError(f"{than} fields than the header; check its commas")
    texts = {name: line[column] for name, column in columns.items()}
    if any("\0" in text for text in texts.values()):
        raise ValueError("holds a NUL byte; remove it")
    if not texts["question_id"].strip():
        raise ValueError("the question_id is empty")
    return Row(index, **texts)


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


def find_image(images_dir: Path, image_id: str) -> Path:
    """Its path. Raises RowError: it is no file, or not inside `images_dir`."""
    root = os.path.abspath(images_dir)
    path = os.path.normpath(os.path.join(root, image_id))
    if not image_id.strip() or not path.startswith(os.path.join(root, "")):
        raise RowError(f"image_id {image_id!r} does not name a file inside {images_dir}")
    if not os.path.isfile(path):  # but a pipe, say
        raise RowError(f"{path} does not exist, or is no file")
    return Path(path)


def open_image(images_dir: Path, image_id: str) -> tuple[Image.Image, str]:
    """The image, upright and RGB, and the sha256 of its file.

    Raises RowError: it is missing, unreadable or too large.
    """
    path, limit = find_image(images_dir, image_id), Image.MAX_IMAGE_PIXELS
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {limit:,}")
            if image.mode[0] in "IF":  # Pillow would cut every value off at 255
                raise ValueError(f"its mode is {image.mode}; convert it to 8 bits a channel")
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return upright, hashlib.sha256(content).hexdigest()
    except Exception as error:  # Pillow's decoders let anything through: struct.error, TypeError …
        raise RowError(f"{path} cannot be read as an image: {error}") from error


def check_images(rows: list[Row], images_dir: Path) -> None:
    """Say how many images are missing. Raises ExtractionError if all of them are."""
    image_ids, missing = dict.fromkeys(row.image_id for row in rows), []
    for image_id in image_ids:
        try:
            find_image(images_dir, image_id)
        except RowError:
            missing.append(image_id)
    if len(missing) == len(image_ids):
        raise ExtractionError(
            f"--images-dir {images_dir}: none of the {len(missing)} images is there, not even "
            f"{missing[0]!r} | image_id must be the file's name, extension included"
        )
    if missing:
        log.warning("%d of %d images are missing: %r ...", len(missing), len(image_ids), missing[0])


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
        if Path(model).is_dir():
            advice = "the directory must hold the whole model, its weights as *.safetensors"
        elif model.startswith(("/", ".")):
            reason, advice = "there is no such directory", "check --model DIR"
        else:
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


def load_model(options: Options, config, device: torch.device):
    """The whole model, in evaluation mode, its weights from safetensors and complete."""
    import transformers
    from accelerate.hooks import remove_hook_from_module

    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length, 23 to 37 ms each
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device_map = place_weights(options, config, device)
    with explain_load_errors(options.model):
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            options.model,
            revision=options.revision,
            cache_dir=options.cache_dir,
            dtype=getattr(torch, options.dtype),
            attn_implementation="sdpa",  # flash attention cannot carry the image mask
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
        )
        if absent := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
            raise ValueError(f"{len(absent)} weights are missing or misshapen, first {absent[0]}")
    if EMBEDDING in device_map:  # accelerate would carry the matrix to the card at every look-up
        remove_hook_from_module(model.get_submodule(EMBEDDING))
    return model.eval()


def place_weights(options: Options, config, device: torch.device) -> dict | str:
    """transformers' `device_map`. Raises ExtractionError: the card is too small for the weights.

    Without answers the head never runs, and of the embedding, whose matrix it shares, only single
    rows are looked up: on one card that is too small for all, `auto` leaves it in host memory.
    """
    from transformers import AutoModelForImageTextToText

    everything = options.device_map or {"": device}
    if device.type != "cuda":
        return everything
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    gib = getattr(torch, options.dtype).itemsize / 2**30
    weights = model.num_parameters() * gib
    embedding = model.get_submodule(EMBEDDING).weight.numel() * gib
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    told = f"the card has {free:.1f} GiB free, the weights take {weights:.1f}"
    if free >= weights:
        return everything
    if not options.device_map:
        raise ExtractionError(
            f"--device {device}: {told}, and every question some beside them: at least "
            f"{weights - free:.1f} GiB are missing | take a larger card (40 GB for the 12B), or "
            "--device-map auto, for a card of 24 GB with --max-new-tokens 0"
        )
    is_alone = torch.cuda.device_count() == 1 or "LOCAL_RANK" in os.environ
    if options.max_new_tokens or not is_alone or free < weights - embedding:
        return everything
    log.info("%s: the embedding, %.1f, stays in host memory", told, embedding)
    return {"": device, EMBEDDING: "cpu", "lm_head": "cpu"}


def check_device(name: str) -> torch.device:
    """The device; under a launcher, `cuda` is this process's card. Raises ExtractionError."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.accelerator.set_device_index(device.index)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ExtractionError(f"--device {name}: {reason} | without a GPU: --device cpu") from error


def choose_layers(asked: tuple[int, ...] | str | None, num_layers: int) -> list[int]:
    """The layers asked for, negatives from the end, or HALP's: first, quarters and last."""
    n = num_layers
    if asked == "all":
        return list(range(n))
    chosen = asked or (0, n // 4, n // 2, 3 * n // 4, n - 1)
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


def choose_batch_size(options: Options, config, num_prompt_tokens: int, device) -> int:
    """`--batch-size`, or what suits the device; the log says why."""
    if options.batch_size:
        return options.batch_size
    if device.type != "cuda" or options.device_map:
        where = "several devices" if options.device_map else f"a {device.type}"
        log.info("batch size %d: a fixed number for %s", CPU_BATCH_SIZE, where)
        return CPU_BATCH_SIZE
    free = torch.cuda.mem_get_info(device)[0]
    itemsize = getattr(torch, options.dtype).itemsize
    num_slots = num_prompt_tokens + TYPICAL_QUESTION + options.max_new_tokens
    size = fit_batch_size(free, config, itemsize, num_slots)
    log.info("batch size %d: %.1f GiB are free beside the model", size, free / 2**30)
    return size


def fit_batch_size(free: int, config, itemsize: int, num_slots: int) -> int:
    """How many questions of `num_slots` tokens, each with an image of its own and its answer, fit
    into `free` bytes beside what one pass needs.
    """
    text = config.text_config
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    fitting = (0.95 * free - pass_memory(config, itemsize)) / (slot * num_slots)
    return max(1, min(MAX_BATCH_SIZE, int(fitting)))


def pass_memory(config, itemsize: int) -> int:
    """Bytes that one pass needs at most: MLP and residuals, logits, and a chunk of the tower."""
    text, vision = config.text_config, config.vision_config
    num_patches = TOWER_IMAGES * (vision.image_size // vision.patch_size) ** 2
    decoder = MAX_PASS_TOKENS * (3 * text.intermediate_size + 8 * text.hidden_size) * itemsize
    logits = MAX_BATCH_SIZE * text.vocab_size * (itemsize + 12)
    tower = num_patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * itemsize
    return decoder + logits + tower


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


class Prompter:
    """Turns questions and images into what the model reads, with the model's own processor."""

    def __init__(self, processor, config) -> None:
        self.processor = processor
        self._tokenizer = processor.tokenizer
        self._soft_tokens = (config.image_token_id, config.mm_tokens_per_image)
        added = self._tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}
        self._lock = threading.Lock()  # a fast tokenizer must not serve two threads at once
        plain = self._encode("?")
        if self._tokenizer.unk_token_id in plain:
            raise ValueError("its tokenizer knows no words: tokenizer.json is missing")
        self._plain_special = [token for token in plain if token in self._special]
        if plain.count(self._tokenizer.bos_token_id) != 1:
            raise ExtractionError("the chat template does not give exactly one <bos>")
        self.soft_start, self.soft_stop = find_soft_tokens(plain, *self._soft_tokens)

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
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, question: str) -> list[int]:
        """`input_ids` [T]. Raises RowError if the question is empty or holds special tokens."""
        if not question.strip():
            raise RowError("the question is empty")
        input_ids = self._encode(question)
        special = [token for token in input_ids if token in self._special]
        if special != self._plain_special:
            names = set(self._tokenizer.convert_ids_to_tokens(special))
            held = [name for name in sorted(names) if name in question]
            raise RowError(f"the question holds special tokens as text: {' '.join(held)}")
        if find_soft_tokens(input_ids, *self._soft_tokens)[0] != self.soft_start:
            raise RowError(f"the image's soft tokens do not start at {self.soft_start}")
        return input_ids

    def pixels(self, image: Image.Image) -> Tensor:
        """`pixel_values` of one image, [3, height, width], float32."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def decode(self, token_ids: list[int]) -> str:
        """An answer's text: no special tokens, whitespace kept; NUL would end it in HDF5."""
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


# ───────────────────────────── images, and the questions about them ────────────────────────────
@dataclass(frozen=True, eq=False)
class Plan:
    """What there is to do, and what there was."""

    num_rows: int
    missing: dict[int, list[Row]]  # of every part that this process has not claimed
    stored_about: dict[str, tuple[Path, str]]  # where a sample about each image_id stands
    known_failures: set[str]  # question_ids that failed before


def claim_rows(
    plan: Plan, lock: OutputLock, expect: Callable[[int, list[Row]], None]
) -> Iterator[Row]:
    """The missing rows of one part after the other that no other process has taken.

    `expect` is told of each part and its missing rows before they come.
    """
    for number in list(plan.missing):
        if not lock.claim(number):
            continue
        rows, path = plan.missing.pop(number), part_path(lock.output_dir, number)
        with contextlib.suppress(FileNotFoundError), open_part(path) as part:
            names = set(part)  # more than before, if others were here meanwhile
            rows = [row for row in rows if group_name(row.question_id) not in names]
        with lock.record() as record:
            is_done = number in record["done"]
        if is_done or not rows:
            lock.release(number)
        else:
            path.with_suffix(".partial").unlink(missing_ok=True)  # what a dead process has left
            expect(number, rows)
            yield from rows


class FailureStreak:
    """Counts images whose rows failed, one after the other in the order of the CSV."""

    def __init__(self, known: set[str] = frozenset()) -> None:
        self._known = known  # question_ids that had failed before this run: they tell nothing new
        self._images: set[str] = set()

    def end(self) -> None:
        """A row went well."""
        self._images.clear()

    def extend(self, failure: Failure) -> None:
        """A row failed. Raises ExtractionError: of too many images in a row."""
        row = failure.row
        if row.question_id not in self._known:
            self._images.add(row.image_id)
        if len(self._images) == MAX_FAILED_IMAGES:
            raise ExtractionError(
                f"the rows of {MAX_FAILED_IMAGES} different images failed in a row: something is "
                f"wrong with all of them | the last, question_id {row.question_id!r}: "
                f"{failure.error}"
            )


def ask(
    options: Options, prompter: Prompter, rows: list[Row]
) -> tuple[Asked | None, list[Failure]]:
    """The rows about one image as the model reads them, and those that it cannot."""
    prompts, failures = [], []
    for row in rows:
        try:
            prompts.append(Prompt(row, prompter.tokenize(row.question)))
        except RowError as error:
            failures.append(Failure(row, str(error)))
    if not prompts:
        return None, failures
    try:
        image, sha256 = open_image(options.images_dir, rows[0].image_id)
    except RowError as error:
        return None, failures + [Failure(prompt.row, str(error)) for prompt in prompts]
    pixel_values = prompter.pixels(image).to(getattr(torch, options.dtype))
    if options.device.startswith("cuda"):
        pixel_values = pixel_values.pin_memory()  # for an asynchronous copy
    num_shared = count_shared([prompt.input_ids for prompt in prompts])
    return Asked(pixel_values, sha256, num_shared, prompts), failures


def ask_ahead(options: Options, prompter: Prompter, rows: Iterable[Row]) -> Iterator[tuple]:
    """`ask` about the images of consecutive rows, in order, by threads beside the model.

    Few images are in memory at a time, whatever the batch.
    """
    by_image = itertools.groupby(rows, key=lambda row: row.image_id)
    with ThreadPoolExecutor(options.num_workers) as pool:
        coming = (pool.submit(ask, options, prompter, list(about)) for _, about in by_image)
        pending = deque(itertools.islice(coming, 2 * options.num_workers + 1))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(itertools.islice(coming, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def asked_images(
    options: Options,
    prompter: Prompter,
    plan: Plan,
    rows: Iterable[Row],
    fail: Callable[[Failure], None],
) -> Iterator[Asked]:
    """Images with their questions; a row that cannot be asked goes to `fail`.

    Raises ExtractionError: too many failures in a row, or an image that has changed.
    """
    streak = FailureStreak(plan.known_failures)
    for asked, failures in ask_ahead(options, prompter, rows):
        for failure in failures:
            fail(failure)
            if not asked:
                streak.extend(failure)
        if asked:
            streak.end()
            check_unchanged(plan, asked)
            yield asked


def check_unchanged(plan: Plan, asked: Asked) -> None:
    """Raise ExtractionError if samples are stored about another picture of that name."""
    image_id = asked.prompts[0].row.image_id
    if image_id not in plan.stored_about:
        return
    path, question_id = plan.stored_about[image_id]
    try:
        with open_part(path) as part:
            stored_sha256 = part[group_name(question_id)].attrs["image_sha256"]
    except Damage as damage:
        set_aside(path, damage)
        raise
    if stored_sha256 != asked.image_sha256:
        raise ExtractionError(
            f"image {image_id!r} has changed: question_id {question_id!r} is stored about another "
            "picture of that name | put that one back, give the new one another name, or "
            "--overwrite"
        )


# ────────────────────────────────── the pool of keys and values ────────────────────────────────
class Numbers:
    """Whole numbers from 0 to take and to give back; the lowest that is free comes first."""

    def __init__(self) -> None:
        self.count = 0  # one more than the highest that is taken
        self._free: list[int] = []  # of those below, in order

    def take(self) -> int:
        """The lowest free number."""
        if self._free:
            return self._free.pop(0)
        self.count += 1
        return self.count - 1

    def give(self, number: int) -> None:
        """It is free again."""
        bisect.insort(self._free, number)
        while self._free and self._free[-1] == self.count - 1:
            self.count = self._free.pop()


class Bank:
    """Rows of keys and values, one row an image; tokens take slots of it and give them back.

    Keys and values of a layer are [rows, slots, num_key_value_heads, head_dim], on its device.
    `places` [rows, slots, 3] says of each slot: position in the prompt, owner, is soft token. An
    owner is a number that is never given twice, of an image for the tokens that its prompts share
    or of one question: what somebody left who is gone is seen by nobody.
    """

    def __init__(self, width: int, config, devices: list[torch.device], dtype) -> None:
        self.width = width  # slots that its rows are expected to need; no row is confined to it
        shape = (0, 0, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]
        self.places = torch.zeros(0, 0, 3, dtype=torch.int32, device=devices[0])
        self.rows = Numbers()
        self.slots: dict[int, Numbers] = {}  # of each row that is taken

    def take_row(self) -> int:
        """A row for an image, with no slot taken."""
        row = self.rows.take()
        self.slots[row] = Numbers()
        return row

    def give_row(self, row: int) -> None:
        """Its image leaves."""
        del self.slots[row]
        self.rows.give(row)

    def grow(self) -> None:
        """Make room for all slots that were taken, a layer at a time: never twice the whole."""
        rows, slots = self.places.shape[:2]
        num_rows, num_slots = self.rows.count, max(row.count for row in self.slots.values())
        if num_rows <= rows and num_slots <= slots:
            return
        rows = rows if num_rows <= rows else num_rows + num_rows // 4
        slots = slots if num_slots <= slots else -(-(num_slots + num_slots // 8) // 64) * 64
        for tensors in (self.keys, self.values):
            for layer_idx in range(len(tensors)):
                tensors[layer_idx] = enlarge(tensors[layer_idx], rows, slots)
        self.places = enlarge(self.places, rows, slots)


def enlarge(old: Tensor, rows: int, slots: int) -> Tensor:
    """The same in the corner of zeros, [rows, slots, …]."""
    new = old.new_zeros(rows, slots, *old.shape[2:])
    new[: old.shape[0], : old.shape[1]] = old
    return new


@dataclass(eq=False)
class Seat:
    """An image in the pool: its row, and the questions about it that are still to come."""

    asked: Asked
    owner: int
    bank: Bank
    row: int
    waiting: deque[Prompt]
    num_live: int = 0
    # Left by the pass that ran its tokens: patches [D_v], mean; and of the layers asked for,
    # [layers, D], the last soft token and the sum over the shared tokens.
    states: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(eq=False)
class Live:
    """A question in the pool, from its prefill to the end of its answer."""

    prompt: Prompt
    seat: Seat
    owner: int
    slots: list[int] = field(default_factory=list)
    states: Tensor | None = None  # [sum of state_shapes()], float32, in host memory
    hidden: Tensor | None = None  # [D]: of the last prompt token, normed, for the first token
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: float = math.nan  # nats, of the first token's distribution


# ────────────────────────────────────── one forward pass ───────────────────────────────────────
class Token(NamedTuple):
    """One token of a step."""

    input_id: int
    row: int  # where its key and value go
    slot: int
    pos: int  # in its own prompt
    owner: int
    is_soft: bool
    image: int  # the owner of its image's tokens, which it sees too


class Step:
    """What one pass through the decoder runs: tokens of all rows one after the other, [n].

    Prefill and decoding are the same: keys and values go to their slots, and each token sees what
    its image and its own question have left in its row. No token is padding.
    """

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.banks: list[tuple[Bank, int]] = []  # and where its tokens start
        self.is_cleaned = False  # keys and values that are not finite become 0

    def add(self, seat: Seat, owner: int, input_ids: list[int], first_pos: int, soft: range):
        """Add tokens that stand side by side in a prompt; returns their slots.

        Seats must come in order of their banks and rows. `soft`: the soft tokens' positions.
        """
        if not self.banks or self.banks[-1][0] is not seat.bank:
            self.banks.append((seat.bank, len(self.tokens)))
        slots = [seat.bank.slots[seat.row].take() for _ in input_ids]
        for pos, (input_id, slot) in enumerate(zip(input_ids, slots), start=first_pos):
            token = Token(input_id, seat.row, slot, pos, owner, pos in soft, seat.owner)
            self.tokens.append(token)
        return slots


@dataclass(frozen=True, eq=False)
class Block:
    """The share of one bank in a step: m of its tokens, in R rows of the bank."""

    bank: Bank
    tokens: slice  # of the step
    rows: slice | Tensor  # of the bank
    num_slots: int  # S: those of the rows that may be in use
    row: Tensor  # [m]: where keys and values go
    slot: Tensor  # [m]
    index: Tensor  # [R, 1, Q]: the tokens of each row, any one where there are fewer than Q
    lane: Tensor  # [m]: row of each token in `index`
    column: Tensor  # [m]
    heads: Tensor  # [kv_heads, 1]: their numbers
    full_attention: Tensor  # masks of the kinds of layers, [R, 1, Q * group, S], to be added
    sliding_attention: Tensor

    def to(self, device: torch.device) -> Block:
        """The same on another device."""
        fields = vars(self).items()
        return Block(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields})

    def attend(self, attention: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values [m, kv_heads, head_dim], and let the queries [m, heads, head_dim]
        look: [m, heads * head_dim].

        The queries that share a key head are rows of one matrix: no key is copied for them.
        """
        keys = self.bank.keys[attention.layer_idx]
        values = self.bank.values[attention.layer_idx]
        keys[self.row, self.slot] = key
        values[self.row, self.slot] = value
        query = query.unflatten(1, (key.shape[1], -1))  # [m, kv_heads, group, head_dim]
        query = query[self.index, self.heads]  # [R, kv_heads, Q, group, head_dim]
        seen = scaled_dot_product_attention(
            query.flatten(2, 3),
            keys[self.rows, : self.num_slots].transpose(1, 2),  # [R, kv_heads, S, head_dim]
            values[self.rows, : self.num_slots].transpose(1, 2),
            attn_mask=getattr(self, attention.layer_type),
            scale=attention.scaling,
        )
        seen = seen.unflatten(2, query.shape[2:4]).transpose(1, 2)  # [R, Q, kv_heads, group, ..]
        return seen[self.lane, self.column].flatten(1)


def attention_masks(query: Tensor, key: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Who sees whom in layers of full and of sliding attention, [rows, queries, slots] each.

    `query`: [rows, queries, 4], position, owner, is soft token and the image's owner; `key`:
    [rows, slots, 3]. A token sees its image's and its own tokens up to itself, the soft tokens of
    an image see each other in both directions; sliding layers see `window` positions back. As in
    transformers' `create_masks_for_vision_model`.
    """
    q_pos, q_owner, q_soft, q_image = query[:, :, None].unbind(-1)
    k_pos, k_owner, k_soft = key[:, None].unbind(-1)
    is_own = (k_owner == q_owner) | (k_owner == q_image)
    visible = is_own & ((k_pos <= q_pos) | (q_soft & k_soft).bool())
    return visible, visible & (q_pos - k_pos < window)


def as_bias(visible: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """A mask [rows, queries, slots] as attention adds it, [rows, 1, queries * group, slots]."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    bias.masked_fill_(~visible, -math.inf)
    return bias[:, None, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)


def lay_out(step: Step, config, dtype: torch.dtype, device: torch.device) -> list[Block]:
    """A block for each bank of a step, in order; the tokens' places are stored in the banks."""
    columns = torch.tensor(step.tokens)  # [n, 7], fields of `Token`
    stops = [start for _, start in step.banks[1:]] + [len(step.tokens)]
    group = config.num_attention_heads // config.num_key_value_heads
    heads = put(torch.arange(config.num_key_value_heads)[:, None], device)
    blocks = []
    for (bank, start), stop in zip(step.banks, stops, strict=True):
        row, slot, pos = columns[start:stop, 1:4].unbind(1)
        used, lane, counts = row.unique_consecutive(return_inverse=True, return_counts=True)
        rows, last = slice(int(used[0]), int(used[-1]) + 1), stop - start - 1
        if 2 * len(used) < rows.stop - rows.start:  # to copy few rows costs less than a look at all
            rows = put(used, device)
        else:
            lane, counts = row - rows.start, torch.bincount(row - rows.start)
        starts = counts.cumsum(0) - counts
        column = torch.arange(stop - start) - starts[lane]
        index = (starts[:, None] + torch.arange(int(counts.max()))).clamp(max=last)
        row, slot, lane, column, index = (put(t, device) for t in (row, slot, lane, column, index))
        bank.grow()
        places = put(columns[start:stop, 3:].int(), device)  # position, owner, is soft, image
        bank.places[row, slot] = places[:, :3]
        num_slots = max(bank.slots[one].count for one in used.tolist())
        num_slots = min(-(-num_slots // 8) * 8, bank.places.shape[1])  # as kernels like it
        window = config.sliding_window
        full, sliding = attention_masks(places[index], bank.places[rows, :num_slots], window)
        full = as_bias(full, group, dtype)
        sliding = full if pos.max() < window else as_bias(sliding, group, dtype)
        where = (bank, slice(start, stop), rows, num_slots, row, slot)
        blocks.append(Block(*where, index[:, None], lane, column, heads, full, sliding))
    return blocks


class Decoder:
    """Gemma 3's decoder over the pool: the model's own weights and submodules, written out.

    transformers' layers take a padded batch, copy keys for every query head, and launch more than
    twice as many kernels (`tests/benchmark.py --paper` counts them). The tests compare the two,
    and so does `--test`, on the user's model and machine.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config.text_config
        if self.config.attn_logit_softcapping or self.config.final_logit_softcapping:
            raise ExtractionError("the config asks for capped logits, which Gemma 3 has not")
        try:
            self._decoder = model.model.language_model
            norms = [m for m in self._decoder.modules() if type(m).__name__ == "Gemma3RMSNorm"]
            self._scales = {norm: norm_scale(norm) for norm in norms}
            layers = self._decoder.layers
            self.devices = [self._scales[layer.input_layernorm].device for layer in layers]
        except (AttributeError, KeyError) as error:
            raise ExtractionError(
                f"{type(model).__name__}: no {error}; install the versions in requirements.txt"
            ) from error
        self.dtype = model.dtype

    def embed(self, step: Step) -> Tensor:
        """Embeddings of a step's tokens, [n, D]; those of soft tokens are still to be filled in.

        Their id may lie outside the vocabulary; like transformers, look up another.
        """
        ids = torch.tensor([0 if token.is_soft else token.input_id for token in step.tokens])
        if self._decoder.embed_tokens.weight.device.type != "cpu":
            ids = put(ids, self.devices[0])
        return self._decoder.embed_tokens(ids).to(self.devices[0])

    def run(self, step: Step, hidden: Tensor, observe: Callable[[int, Tensor], None]) -> Tensor:
        """From embeddings [n, D] to the output of the last layer, [n, D], before the final norm.

        `observe` is shown every layer's index and output [n, D].
        """
        blocks = lay_out(step, self.config, self.dtype, self.devices[0])
        pos = put(torch.tensor([[token.pos for token in step.tokens]]), self.devices[0])
        rotary = {
            kind: signed_rotary(*self._decoder.rotary_emb(hidden[None], pos, kind))
            for kind in dict.fromkeys(self.config.layer_types)
        }
        for layer_idx, (layer, device) in enumerate(zip(self._decoder.layers, self.devices)):
            if hidden.device != device:
                hidden, blocks = hidden.to(device), [block.to(device) for block in blocks]
                rotary = {kind: tables.to(device) for kind, tables in rotary.items()}
            normed = self._norm(hidden, layer.input_layernorm).to(self.dtype)
            if step.is_cleaned:  # attention multiplies what it ignores by 0, which NaN survives
                normed = normed.nan_to_num(0, 0, 0)
            attended = self._attend(layer.self_attn, normed, blocks, rotary)
            hidden = hidden + self._norm(attended, layer.post_attention_layernorm).to(self.dtype)
            normed = self._norm(hidden, layer.pre_feedforward_layernorm).to(self.dtype)
            gate = layer.mlp.act_fn(multiply(layer.mlp.gate_proj, normed))
            fed = multiply(layer.mlp.down_proj, gate * multiply(layer.mlp.up_proj, normed))
            hidden = hidden + self._norm(fed, layer.post_feedforward_layernorm).to(self.dtype)
            observe(layer_idx, hidden)
        return hidden

    def _attend(self, attention: nn.Module, hidden: Tensor, blocks: list[Block], rotary: dict):
        """Attention of one layer, [n, D]."""
        heads, tables = (-1, attention.head_dim), rotary[attention.layer_type]
        query = multiply(attention.q_proj, hidden).unflatten(1, heads)  # [n, heads, head_dim]
        key = multiply(attention.k_proj, hidden).unflatten(1, heads)  # [n, kv_heads, head_dim]
        value = multiply(attention.v_proj, hidden).unflatten(1, heads)
        query = rotate(self._norm(query, attention.q_norm), tables).to(self.dtype)
        key = rotate(self._norm(key, attention.k_norm), tables).to(self.dtype)
        seen = [
            block.attend(attention, query[block.tokens], key[block.tokens], value[block.tokens])
            for block in blocks
        ]
        return multiply(attention.o_proj, seen[0] if len(seen) == 1 else torch.cat(seen))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the language-model head reads, on the first device."""
        norm = self._decoder.norm
        normed = self._norm(hidden.to(self._scales[norm].device), norm)
        return normed.to(self.devices[0], self.dtype)

    def _norm(self, hidden: Tensor, norm: nn.Module) -> Tensor:
        """Gemma's RMSNorm in float32, with a scale of 1 + weight; to be rounded once, after it."""
        scale = self._scales[norm]
        return rms_norm(hidden.float(), scale.shape, scale, norm.eps)


def multiply(linear: nn.Linear, hidden: Tensor) -> Tensor:
    """A linear layer of [n, in], [n, out].

    A CPU takes half the time for it as a convolution with 1 x 1 filters: few tokens are the
    filters, and the rows of the weight the pixels; of many tokens it is the other way round.
    """
    weight = linear.weight
    is_plain = linear.bias is None and not hasattr(linear, "_hf_hook")
    is_worth_it = weight.dtype == torch.float32 and weight.numel() > 2**18
    if weight.device.type != "cpu" or not is_plain or not is_worth_it:
        return linear(hidden)
    are_few = len(hidden) <= 128
    pixels, filters = (weight, hidden) if are_few else (hidden, weight)
    image = pixels[None, None].permute(0, 3, 1, 2)  # [1, in, 1, pixels], as it lies in memory
    product = conv2d(image, filters[:, :, None, None])[0, :, 0]  # [filters, pixels]
    return product.contiguous() if are_few else product.T


def norm_scale(norm: nn.Module) -> Tensor:
    """1 + weight of Gemma's RMSNorm, float32, on the device where the module runs."""
    from accelerate.utils import align_module_device

    with align_module_device(norm):
        return 1.0 + norm.weight.detach().float()


def signed_rotary(cos: Tensor, sin: Tensor) -> Tensor:
    """Tables [1, n, head_dim] for `rotate`, [2, n, 1, head_dim], float32."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([cos, torch.cat([-first, second], dim=-1)])[:, :, None].float()


def rotate(states: Tensor, tables: Tensor) -> Tensor:
    """transformers' `apply_rotary_pos_emb` of [n, heads, head_dim], in three kernels."""
    rolled = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * tables[0], rolled, tables[1])


def put(values: Tensor, device: torch.device) -> Tensor:
    """The same on the device; pinned, as a copy from pageable memory makes the CPU wait."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """The same in host memory, once it is there."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values)


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among them: a sum with one is not finite."""
    return math.isfinite(values.sum(dtype=torch.float32))


# ───────────────────────────────────────── extraction ──────────────────────────────────────────
def state_shapes(config, layers: list[int]) -> dict[str, int]:
    """Name and width of every vector of a sample, in the order in which they are kept."""
    names = [f"{kind}/layer_{i}" for kind in LAYER_KINDS for i in layers]
    widths = dict.fromkeys(names, config.text_config.hidden_size)
    return {VISION: config.vision_config.hidden_size} | widths


class Spans:
    """What is kept of a pass: of every span of tokens the sum, and one of them."""

    def __init__(self, layers: list[int], device: torch.device) -> None:
        self._layers = set(layers)
        self._device = device
        self._spans: list[tuple[int, int, int]] = []
        self._found: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    def add(self, start: int, stop: int, kept: int) -> None:
        """Watch the step's tokens start … stop - 1, and keep the one at `kept`."""
        self._spans.append((start, stop, kept))

    def observe(self, layer_idx: int, hidden: Tensor) -> None:
        """A decoder layer's output, [n, D]."""
        if layer_idx in self._layers:
            sums = [hidden[a:b].sum(dim=0, dtype=torch.float32) for a, b, _ in self._spans]
            kept = put(torch.tensor([kept for _, _, kept in self._spans]), hidden.device)
            found = (hidden[kept].float(), torch.stack(sums))
            self._found[layer_idx] = tuple(vectors.to(self._device) for vectors in found)

    def take(self) -> tuple[Tensor, Tensor]:
        """The kept tokens and the sums of the pass, [spans, layers, D] each."""
        kept, sums = zip(*self._found.values(), strict=True)
        return torch.stack(kept, dim=1), torch.stack(sums, dim=1)


class Extractor:
    """The loaded model: turns images with their questions into states and answers.

    Each image goes through the vision tower once, and the tokens that its prompts share through
    the decoder once; states and answers come from that same pass.
    """

    def __init__(
        self, model, prompter: Prompter, layers: list[int], max_new_tokens: int, batch_size: int
    ) -> None:
        self.model = model
        self.prompter = prompter
        self.layers = layers
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size  # questions side by side; less, once memory was short
        self.decoder = Decoder(model)
        self.device = self.decoder.devices[0]
        # An accelerator wants several images in a pass; a CPU is faster one by one.
        self.max_pass_tokens = 0 if self.device.type == "cpu" else MAX_PASS_TOKENS
        end = model.generation_config.eos_token_id
        self._end_ids = set(end if isinstance(end, list) else [end])
        self._shapes = state_shapes(model.config, layers)
        self._owners = itertools.count(1)
        self._streak = FailureStreak()
        self._full_size = batch_size
        self._again: deque[Asked] = deque()  # what did not fit
        self._outcomes: list[Sample | Failure] = []
        self._is_filling = False
        self._clear()

    def _clear(self) -> None:
        self._banks: dict[int, Bank] = {}  # by their width
        self._seats: list[Seat] = []
        self._live: list[Live] = []

    def run(
        self, source: Iterator[Asked], is_stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Sample | Failure]:
        """Samples as their answers end, and failures. What stands side by side depends on the
        order of `source` and on memory alone. Once `is_stopping`, nothing new is begun.

        Raises ExtractionError: the device failed, or too many images one after the other; and what
        `source` raises, but what is in hand then is answered before.
        """
        self._source_error: Exception | None = None
        source = self._until_error(source)
        while True:
            error = None
            try:
                self._advance(source, is_stopping)
            except (RuntimeError, ExtractionError) as caught:
                error = caught.with_traceback(None)  # which holds tensors
            has_fit = not is_out_of_memory(error)
            if not has_fit:
                self._shrink()
            outcomes, self._outcomes = self._outcomes, []
            yield from outcomes
            if has_fit and isinstance(error, RuntimeError):
                ids = [live.prompt.row.question_id for live in self._live]
                raise ExtractionError(f"the model failed on question_ids {ids}: {error}") from error
            if has_fit and (error or not (outcomes or self._live)):
                break
        if error := error or self._source_error:
            raise error

    def _until_error(self, source: Iterator[Asked]) -> Iterator[Asked]:
        try:
            yield from source
        except Exception as error:  # whatever it is, `run` raises it later
            self._source_error = error

    @torch.inference_mode()
    def _advance(self, source: Iterator[Asked], is_stopping: Callable[[], bool]) -> None:
        """Fill the pool, then one decoding step; less if there is something to give before."""
        num_free = self.batch_size - len(self._live)
        if not self._live or 4 * num_free >= self.batch_size:
            self._is_filling = True  # not one by one: small passes are dear
        while self._is_filling:
            entering = [] if is_stopping() else self._admit(source)
            if entering:
                self._prefill(entering)
            else:
                self._is_filling = False
            if self._outcomes:
                return
        if self._live:
            self._decode()

    def _admit(self, source: Iterator[Asked]) -> list[tuple[Seat, list[Live]]]:
        """The questions of the next pass: about images that are seated, then about new ones."""
        entering, num_tokens = [], 0
        for seat in itertools.chain(list(self._seats), self._new_seats(source)):
            num_free = self.batch_size - len(self._live)
            prompts = [seat.waiting.popleft() for _ in range(min(num_free, len(seat.waiting)))]
            if prompts:
                lives = [Live(prompt, seat, next(self._owners)) for prompt in prompts]
                self._live += lives
                seat.num_live += len(lives)
                entering.append((seat, lives))
                num_tokens += sum(len(prompt.input_ids) for prompt in prompts)
                num_tokens -= seat.asked.num_shared * (len(prompts) - (seat.states is None))
            if len(self._live) == self.batch_size or num_tokens > self.max_pass_tokens:
                break
        return entering

    def _new_seats(self, source: Iterator[Asked]) -> Iterator[Seat]:
        """Rows of about the same width share a bank, so that no long prompt widens the others."""
        decoder = self.decoder
        while asked := self._again.popleft() if self._again else next(source, None):
            longest = max(len(prompt.input_ids) for prompt in asked.prompts) - asked.num_shared
            own = longest + min(self.max_new_tokens, TYPICAL_ANSWER)
            expected = asked.num_shared + own * min(len(asked.prompts), self.batch_size)
            width = 1 << max(9, (expected - 1).bit_length())
            if width not in self._banks:
                self._banks[width] = Bank(width, decoder.config, decoder.devices, decoder.dtype)
            bank = self._banks[width]
            seat = Seat(asked, next(self._owners), bank, bank.take_row(), deque(asked.prompts))
            self._seats.append(seat)
            yield seat

    def _prefill(self, entering: list[tuple[Seat, list[Live]]]) -> None:
        """Run new images and questions: their states, and what their answers go on from."""
        in_order = [live for _, lives in entering for live in lives]
        entering.sort(key=lambda pair: (pair[0].bank.width, pair[0].row))
        lives = [live for _, lives in entering for live in lives]
        new_seats = [seat for seat, _ in entering if seat.states is None]
        step, spans, last = self._make_prefill(entering)
        embeds = self.decoder.embed(step)
        patches = self._fill_in_images(embeds, step, new_seats)
        hidden = self.decoder.run(step, embeds, spans.observe)
        if not all_finite(hidden):  # again, so that what went wrong spoils nobody else
            step.is_cleaned = True
            hidden = self.decoder.run(step, embeds, spans.observe)
        hidden = self.decoder.final_norm(hidden[put(torch.tensor(last), hidden.device)])  # [.., D]
        kept, sums = spans.take()
        for i, seat in enumerate(new_seats):
            seat.states = (patches[i], kept[i], sums[i])
        states = self._join_states(lives, kept[len(new_seats) :], sums[len(new_seats) :])
        is_sound = to_host(hidden.isfinite().all(dim=1)) & states.isfinite().all(dim=1)
        is_sound = dict(zip(lives, is_sound.tolist(), strict=True))
        for live, own_hidden, own_states in zip(lives, hidden, states, strict=True):
            live.hidden, live.states = own_hidden, own_states
        for live in in_order:
            if not is_sound[live]:
                self._streak.extend(self._fail(live, "its states are not finite"))
                continue
            self._streak.end()
            if not self.max_new_tokens:
                self._finish(live, is_truncated=False)

    def _make_prefill(self, entering) -> tuple[Step, Spans, list[int]]:
        """The step; its spans, new images first and then questions; where each prompt ends."""
        step, spans, questions = Step(), Spans(self.layers, self.device), []
        soft = range(self.prompter.soft_start, self.prompter.soft_stop)
        for seat, lives in entering:
            num_shared = seat.asked.num_shared
            if seat.states is None:
                start = len(step.tokens)
                step.add(seat, seat.owner, lives[0].prompt.input_ids[:num_shared], 0, soft)
                spans.add(start, len(step.tokens), start + soft[-1])
            for live in lives:
                start, own = len(step.tokens), live.prompt.input_ids[num_shared:]
                live.slots = step.add(seat, live.owner, own, num_shared, soft)
                questions.append((start, len(step.tokens)))
        for start, stop in questions:
            spans.add(start, stop, stop - 1)
        return step, spans, [stop - 1 for _, stop in questions]

    def _fill_in_images(self, embeds: Tensor, step: Step, new_seats: list[Seat]) -> Tensor | None:
        """Put the images' features in place of their soft tokens; the patches' means, [.., D_v]."""
        means, features = [], []
        for start in range(0, len(new_seats), TOWER_IMAGES):
            chunk = [seat.asked.pixel_values for seat in new_seats[start : start + TOWER_IMAGES]]
            pixel_values = torch.stack([t.to(self.device, non_blocking=True) for t in chunk])
            patches = self.model.model.vision_tower(pixel_values=pixel_values).last_hidden_state
            means.append(patches.mean(dim=1, dtype=torch.float32).to(self.device))
            features.append(self.model.model.multi_modal_projector(patches).to(embeds))
        if not features:
            return None
        soft = torch.tensor([i for i, token in enumerate(step.tokens) if token.is_soft])
        embeds[put(soft, self.device)] = torch.cat(features).flatten(0, 1)
        return torch.cat(means)

    def _join_states(self, lives: list[Live], query: Tensor, own_sum: Tensor) -> Tensor:
        """Every vector of every question, in the order of `state_shapes`, in host memory."""
        of_image = zip(*(live.seat.states for live in lives), strict=True)
        patches, soft, shared_sum = map(torch.stack, of_image)  # [.., D_v], [.., layers, D]
        lengths = torch.tensor([len(live.prompt.input_ids) for live in lives])
        mean = (shared_sum + own_sum) / put(lengths, self.device)[:, None, None]
        by_layer = [vectors.flatten(1) for vectors in (soft, query, mean)]
        return to_host(torch.cat([patches, *by_layer], dim=1))

    def _decode(self) -> None:
        """The next token of every live question, and the first of those that have just entered."""
        fresh = [live for live in self._live if not live.answer]
        going = [live for live in self._live if live.answer]
        going.sort(key=lambda live: (live.seat.bank.width, live.seat.row, live.owner))
        step = Step()
        for live in going:
            pos = len(live.prompt.input_ids) + len(live.answer) - 1
            live.slots += step.add(live.seat, live.owner, live.answer[-1:], pos, range(0))
        tokens = self._choose_tokens(fresh, step)
        if not all(math.isfinite(logprob) for _, logprob, _ in tokens):
            step.is_cleaned = True  # the same slots again, so that nobody else is spoilt
            tokens = self._choose_tokens(fresh, step)
        for live, (token, logprob, entropy) in zip(fresh + going, tokens, strict=True):
            if not math.isfinite(logprob):
                self._fail(live, "the logits of its answer are not finite")
                continue
            if not live.answer:
                live.entropy, live.hidden = entropy, None
            live.answer.append(int(token))
            live.logprobs.append(logprob)
            has_ended = self.has_ended(live)
            if has_ended or len(live.answer) == self.max_new_tokens:
                self._finish(live, is_truncated=not has_ended)

    def has_ended(self, live: Live) -> bool:
        """Whether the last token of an answer is its end."""
        return live.answer[-1] in self._end_ids

    def _choose_tokens(self, fresh: list[Live], step: Step) -> list[list[float]]:
        """Token id, its log-probability and, for the fresh ones, the entropy of each question."""
        hidden = [live.hidden for live in fresh]
        if step.tokens:
            going = self.decoder.run(step, self.decoder.embed(step), lambda *_: None)
            hidden += self.decoder.final_norm(going)
        hidden, found = torch.stack(hidden), []
        group = 16 if self.device.type == "cpu" else len(hidden)  # as many as a CPU transposes fast
        for start in range(0, len(hidden), group):
            logits = multiply(self.model.lm_head, hidden[start : start + group])
            logits = logits.float()  # [questions, vocabulary]
            best, tokens = logits.max(dim=-1)
            total = logits.logsumexp(dim=-1)
            entropy = torch.zeros_like(total)
            first = slice(max(0, len(fresh) - start))
            probabilities = (logits[first] - total[first, None]).exp()
            entropy[first] = torch.special.entr(probabilities).sum(dim=-1)
            columns = (tokens.double(), (best - total).double(), entropy.double())
            found.append(torch.stack(columns, dim=1))
        return to_host(torch.cat(found)).tolist()

    def _finish(self, live: Live, is_truncated: bool) -> None:
        """Its answer is whole."""
        answer = live.answer if is_truncated else live.answer[:-1]
        vectors = live.states.split(list(self._shapes.values()))
        states = dict(zip(self._shapes, vectors, strict=True))
        sha256, probabilities = live.seat.asked.image_sha256, (live.logprobs, live.entropy)
        sample = Sample(live.prompt, sha256, states, answer, is_truncated, *probabilities)
        self._outcomes.append(sample)
        self._leave(live)

    def _fail(self, live: Live, error: str) -> Failure:
        failure = Failure(live.prompt.row, error)
        self._outcomes.append(failure)
        self._leave(live)
        return failure

    def _leave(self, live: Live) -> None:
        """Give its slots back; with the last question of an image its row."""
        seat, bank = live.seat, live.seat.bank
        self._live.remove(live)
        for slot in live.slots:
            bank.slots[seat.row].give(slot)
        seat.num_live -= 1
        if not seat.num_live and not seat.waiting:
            self._seats.remove(seat)
            bank.give_row(seat.row)
            if not bank.slots:
                del self._banks[bank.width]

    def _shrink(self) -> None:
        """Memory ran short: what was live is computed again, in half the batch, for good.

        A question that was alone fails, and is alone to blame: batches begin anew in full size.
        """
        live = self._live
        if len(live) == 1:
            self.batch_size = self._full_size
            self._fail(live[0], "the device's memory is too small for it")
        else:
            self.batch_size = max(1, min(self.batch_size, len(live)) // 2)
            log.warning("%d questions at once are too many for the device's memory", len(live))
            log.warning("batch size %d from here on", self.batch_size)
        for seat in reversed(self._seats):
            prompts = [one.prompt for one in live if one.seat is seat]
            prompts += seat.waiting
            if prompts:
                self._again.appendleft(dataclasses.replace(seat.asked, prompts=prompts))
        self._clear()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def is_out_of_memory(error: Exception | None) -> bool:
    """Whether it was for want of the device's memory, which libraries tell in many ways."""
    signs = ("ALLOC_FAILED", "out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
    )


# ─────────────────────────────── what comes of them is recorded ────────────────────────────────
class ProgressLines(io.StringIO):
    """Prints a line for each state of the bar, where stderr is no terminal."""

    def write(self, text: str) -> int:
        """Not by the log, which waits for the bar's lock with its own in hand."""
        if line := text.strip():
            print(line, file=sys.stderr)
        return len(text)


@dataclass(eq=False)
class OpenPart:
    """A part that this process writes."""

    number: int
    writer: PartWriter
    num_missing: int  # rows without an outcome yet
    settled: set[str] = field(default_factory=set)  # question_ids of the others
    failures: list[Failure] = field(default_factory=list)
    is_given_up: bool = False


class Recorder:
    """Writes outcomes into their parts, on a thread of its own beside the model.

    Answers end in another order than the plan's, so several parts are open at once; each is
    finished with the last of its rows. A part that could not be written is given up. What went
    wrong on the thread comes out of a later call.
    """

    def __init__(
        self, options: Options, settings: dict, prompter: Prompter, lock: OutputLock, total: int
    ) -> None:
        self.num_extracted = self.num_failed = 0
        self._options = options
        self._settings = settings  # the root attributes of a part
        self._prompter = prompter
        self._lock = lock
        self._open: dict[Row, OpenPart] = {}  # by each row without an outcome
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()
        lines = {"file": ProgressLines(), "mininterval": LINE_SECONDS, "delay": LINE_SECONDS}
        self.bar = tqdm(
            total=total,
            unit=" samples",
            ncols=100,
            miniters=1,
            smoothing=0,  # the rate since the start, for answers come in bursts
            disable=RANK > 0,
            **({} if sys.stderr.isatty() else lines),
        )

    def expect(self, number: int, rows: list[Row]) -> None:
        """Part `number` is this process's; these rows are missing in it."""
        path = part_path(self._options.output_dir, number)
        writer = PartWriter(path, self._settings, self._options.compression)
        self._open.update(dict.fromkeys(rows, OpenPart(number, writer, len(rows))))

    def record(self, outcome: Sample | Failure) -> None:
        """Take an outcome. Raises ExtractionError: a failure with `--strict`."""
        self._pending.append(self._thread.submit(self._record, outcome))
        while self._pending and (self._pending[0].done() or len(self._pending) > MAX_BATCH_SIZE):
            self._pending.popleft().result()
        if self._options.strict and isinstance(outcome, Failure):
            where = f"question_id {outcome.row.question_id!r}"
            raise ExtractionError(f"--strict: {where} failed: {outcome.error}")

    def drain(self) -> None:
        """Return when all is written that was recorded."""
        wait(self._pending)
        while self._pending:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Save what there is of the parts in hand; of some there is nothing yet."""
        wait(self._pending)
        for part in dict.fromkeys(self._open.values()):
            if part.settled and not part.is_given_up:
                self._pending.append(self._thread.submit(self._finish_part, part))
        self.drain()

    def _record(self, outcome: Sample | Failure) -> None:
        has_failed = isinstance(outcome, Failure)
        row = outcome.row if has_failed else outcome.prompt.row
        part = self._open.pop(row)
        if part.is_given_up:
            return
        try:
            if has_failed:
                part.failures.append(outcome)
            else:
                self._write(part.writer, outcome)
            part.settled.add(row.question_id)
            part.num_missing -= 1
            if not part.num_missing:
                self._finish_part(part)
        except Exception:
            part.is_given_up = True
            part.writer.close()
            raise
        self.num_failed += has_failed
        self.num_extracted += not has_failed
        self.bar.set_postfix(failed=self.num_failed, refresh=False)
        self.bar.update()

    def _write(self, writer: PartWriter, sample: Sample) -> None:
        prompt = sample.prompt
        vectors = {name: vector.numpy() for name, vector in sample.states.items()}
        attributes = {
            "num_prompt_tokens": len(prompt.input_ids),
            "vision_token_pos": self._prompter.soft_stop - 1,
            "query_token_pos": len(prompt.input_ids) - 1,
            "num_answer_tokens": len(sample.answer),
            "answer_truncated": sample.is_truncated,
            "image_sha256": sample.image_sha256,
        }
        if sample.logprobs:
            vectors["answer_logprobs"] = np.array(sample.logprobs, dtype=np.float32)
            attributes["first_token_entropy"] = sample.first_token_entropy
        writer.add(prompt.row, self._prompter.decode(sample.answer), vectors, attributes)

    def _finish_part(self, part: OpenPart) -> None:
        """Put a part in place, with the failures of its rows, and let go of it."""
        part.writer.finish()
        with self._lock.record():
            update_failures(
                self._options.output_dir, lambda q: q not in part.settled, part.failures
            )
        is_done = not part.num_missing and not self._options.test
        self._lock.release(part.number, is_done)


# ───────────────────────────── parts: right, or not there ──────────────────────────────────────
class CarefulFile(io.FileIO):
    """What h5py reads and writes instead of the disk: keeps the system's first error, hides it.

    HDF5 itself drops what it could not write, and takes the process down at its end. So it is told
    that all went well, and whoever has the file learns of it at the end of `truthful`.
    """

    error: OSError | None = None

    @contextlib.contextmanager
    def truthful(self) -> Iterator[None]:
        """Raise Damage for what h5py raises within; before anything else the system's error."""
        try:
            yield
        except H5PY_ERRORS as error:
            if getattr(error, "errno", None):
                raise
            raise Damage(f"{Path(self.name).name}: {error}") from error
        finally:
            if error := self.error:
                raise OSError(error.errno, error.strerror, str(self.name)) from error

    def readinto(self, buffer) -> int:
        """Fill the buffer, with zeros behind the end of the file, as HDF5 wants it."""
        rest = self._in_full(lambda fd, rest, pos: os.preadv(fd, [rest], pos), buffer)
        rest[:] = bytes(len(rest))
        return len(buffer)

    def write(self, buffer) -> int:
        """Write all of it."""
        self._in_full(os.pwrite, buffer)
        return len(buffer)

    def truncate(self, size: int | None = None) -> None:
        """Cut or extend the file."""
        with self._hidden():
            super().truncate(size)

    def _in_full(self, call: Callable, buffer) -> memoryview:
        rest, pos = memoryview(buffer).cast("B"), self.tell()
        with self._hidden():
            while rest and (size := call(self.fileno(), rest, pos)):
                rest, pos = rest[size:], pos + size
        return rest

    @contextlib.contextmanager
    def _hidden(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[h5py.File]:
    """A finished part, to read.

    Raises Damage: it holds something else; OSError: the system failed, or somebody writes to it.
    """
    with CarefulFile(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # HDF5's own way to keep others out
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EBADF, errno.EINVAL):
                raise OSError(error.errno, "it is open in another program", str(path)) from error
        if os.pread(file.fileno(), 1, 11) not in (b"", b"\0"):  # the superblock's consistency flags
            raise Damage(f"{path.name}: whoever had it open for writing died; h5clear -s mends it")
        with file.truthful(), h5py.File(file, "r") as part:
            yield part


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
    if storage_dtype == "bfloat16" and name.startswith(TOKEN_KINDS):
        file_type.set_fields(15, 7, 8, 0, 7)
        file_type.set_size(2)
        file_type.set_ebias(127)
    return file_type


@functools.lru_cache(maxsize=1024)
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
    return storage_type(name, storage_dtype), h5py.h5s.create_simple((width,)), layout, links


def bytes_per_sample(shapes: dict[str, int], storage_dtype: str) -> int:
    """What one sample takes on the disk, uncompressed."""
    sizes = {name: storage_type(name, storage_dtype).get_size() for name in shapes}
    return SAMPLE_OVERHEAD + sum(n * sizes[name] + VECTOR_OVERHEAD for name, n in shapes.items())


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file that is safe on the disk; a crash leaves the old or the new one, whole."""
    os.replace(partial, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems do not know this for a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


class PartWriter:
    """Writes one part under another name, and renames it into place once it is safe on the disk.

    What a finished file of the same number holds is taken over with the first thing to write; if
    there is none, it stays as it is. Memory does not grow with the part.
    Every method raises OSError if the system failed, or Damage: the part is given up with that.
    """

    def __init__(self, path: Path, attributes: dict, compression: str = "none") -> None:
        self._path = path
        self._partial = path.with_suffix(".partial")
        self._attributes = attributes
        self._storage = (attributes["storage_dtype"], compression)
        self._part: h5py.File | None = None  # once there was something to write

    @contextlib.contextmanager
    def _writing(self) -> Iterator[h5py.File]:
        try:
            if self._part is None:
                self._open()
            with self._file.truthful():
                yield self._part
        except (OSError, Damage) as error:
            self.close()
            if isinstance(error, Damage) and self._path.exists():  # it was there before
                set_aside(self._path, error)
            raise

    def _open(self) -> None:
        if is_there := self._path.exists():
            shutil.copyfile(self._path, self._partial)
        self._file = CarefulFile(self._partial, "r+" if is_there else "w+")
        with self._file.truthful():
            # HDF5 1.10's format: smaller, with checksums over all but the vectors themselves.
            mode = "r+" if is_there else "w"
            self._part = h5py.File(self._file, mode, libver=("v110", "v110"))
            self._part.attrs.update(self._attributes)

    def add(self, row: Row, answer: str, vectors: dict[str, np.ndarray], attributes: dict) -> None:
        """Write one sample; `vectors` are float32, [width] each."""
        with self._writing() as part:
            group = part.create_group(group_name(row.question_id))
            group["question"] = row.question
            group["image_id"] = row.image_id
            group["answer"] = answer
            group["ground_truth_answer"] = row.ground_truth
            crc32 = 0  # of the vectors as they are read back, in the order of their names
            for name, vector in sorted(vectors.items()):
                layout = vector_layout(name, len(vector), *self._storage)
                stored = vector
                if layout[0].get_size() == 2:
                    rounded = torch.from_numpy(vector).bfloat16()
                    stored, vector = rounded.view(torch.int16).numpy(), rounded.float().numpy()
                dataset = h5py.h5d.create(group.id, name.encode(), *layout)
                dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, stored, layout[0])
                crc32 = zlib.crc32(vector.tobytes(), crc32)
            group["vision_only_representation"] = h5py.SoftLink(VISION)
            named = {"question_id": row.question_id, "row": row.index, "crc32": crc32}
            group.attrs.update(named | attributes)

    def amend(self, row: Row) -> None:
        """Bring the place in the CSV and the ground truth of a stored sample up to date."""
        with self._writing() as part:
            group = part[group_name(row.question_id)]
            group.attrs["row"] = row.index
            del group["ground_truth_answer"]
            group["ground_truth_answer"] = row.ground_truth

    def finish(self) -> None:
        """Write, sync, check and rename; a part that gained nothing stays as it was."""
        if self._part is None and self._path.exists():
            return
        with self._writing() as part:
            count = len(part)
            part.attrs["num_samples"] = count
            part.attrs["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
            part.close()
            os.fsync(self._file.fileno())
            self._file.close()  # where some file systems tell that a write went wrong
        try:
            with open_part(self._partial) as written:
                if len(written) != count:
                    raise Damage(f"{self._partial} holds {len(written)} samples, not {count}")
            put_in_place(self._partial, self._path)
        except (OSError, Damage):
            self.close()
            raise

    def close(self) -> None:
        """Give up what is not in place."""
        if self._part is not None:
            with contextlib.suppress(OSError, Damage), self._file.truthful():
                self._part.close()
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)


def check_part(path: Path, part: h5py.File, settings: dict) -> None:
    """Look at a part's attributes and the number of its samples, and at nothing else.

    Raises Damage: they are not whole, or do not agree; ExtractionError: other settings.
    """
    attributes = {
        name: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        for name, value in part.attrs.items()
    }
    needed = {*IDENTITY, "model_name", "dataset_sha256", "num_samples"}
    absent = sorted(needed - attributes.keys())
    differing = [n for n in IDENTITY if n not in absent and attributes[n] != settings[n]]
    if differing:
        shown = ["model_name"] * ("model_revision" in differing) + differing
        pairs = [f"{n} was {attributes.get(n)!r} and is {settings[n]!r}" for n in shown]
        raise ExtractionError(
            f"{path} was written with other settings: {'; '.join(pairs)} "
            "| go on with the old ones, choose another --output-dir, or --overwrite"
        )
    if absent:
        raise Damage(f"its attributes {absent} are gone")
    if attributes["num_samples"] != len(part):
        raise Damage(f"{len(part)} samples; expected {attributes['num_samples']}")


def find_changes(path: Path, part: h5py.File, by_id: dict[str, Row]) -> list[Row]:
    """The rows of the CSV that are stored with another place or ground truth.

    Raises ExtractionError: with another question or image_id, on which vectors depend.
    """
    changed = []
    for group in part.values():
        names = ("image_id", "question", "ground_truth_answer")
        texts = [group[name].asstr()[()] for name in names]
        stored = Row(int(group.attrs["row"]), group.attrs["question_id"], *texts)
        row = by_id.get(stored.question_id, stored)
        for name in ("question", "image_id"):
            was, now = getattr(stored, name), getattr(row, name)
            if was != now:
                raise ExtractionError(
                    f"{path} was written with another {name} of question_id {row.question_id!r}: "
                    f"it was {was!r} and is {now!r} | give what changed another question_id, "
                    "choose another --output-dir, or --overwrite"
                )
        if row != stored:
            changed.append(row)
    return changed


def scan_parts(output_dir: Path, settings: dict, rows: Iterable[Row] = ()) -> dict[str, Path]:
    """In which part each stored question_id stands; what changed in `rows`, but no vector depends
    on, is brought up to date there. A part is set aside where it is damaged, or repeats what
    stands in an earlier one.

    Raises ExtractionError: a part is of another kind of run, and none is rewritten; OSError.
    """
    by_id = {row.question_id: row for row in rows}
    stored: dict[str, Path] = {}
    changed: dict[Path, list[Row]] = {}
    for path in find_parts(output_dir):
        try:
            with open_part(path) as part:
                check_part(path, part, settings)
                question_ids = list(map(urllib.parse.unquote, part))
                if again := stored.keys() & set(question_ids):
                    first = min(again)
                    raise Damage(f"question_id {first!r} stands in {stored[first].name} already")
                if by_id and part.attrs["dataset_sha256"] != settings["dataset_sha256"]:
                    changed[path] = find_changes(path, part, by_id)
            stored.update(dict.fromkeys(question_ids, path))
        except Damage as damage:
            set_aside(path, damage)
    names = ("storage_dtype", "dataset", "dataset_sha256")
    for path, moved in changed.items():
        writer = PartWriter(path, {name: settings[name] for name in names})
        for row in moved:
            writer.amend(row)
        writer.finish()
    if count := sum(map(len, changed.values())):
        log.info("row or ground truth of %d samples brought up to date", count)
    return stored


def set_aside(path: Path, damage: Damage) -> None:
    """Give a damaged part another name, so that it is computed again."""
    aside = path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):  # another process was first
        os.replace(path, aside)
        log.warning("%s is damaged (%s): set aside as %s", path, damage, aside.name)


def update_failures(
    output_dir: Path, is_open: Callable[[str], bool], new: Iterable[Failure] = ()
) -> set[str]:
    """Keep of `failed_samples.csv` the question_ids that are still open, and add new failures.

    No failures, no file; a line that somebody spoilt goes. Returns the ids that it held before.
    """
    path, header = output_dir / FAILED_NAME, ["question_id", "image_id", "error"]
    before: list[list[str]] = []
    with contextlib.suppress(FileNotFoundError, csv.Error):
        text = path.read_bytes().decode(errors="replace")
        lines = list(csv.reader(io.StringIO(text, newline="")))
        before = [line for line in lines if len(line) == 3 and line != header]
    lines = [line for line in before if is_open(line[0])]
    lines += [[failure.row.question_id, failure.row.image_id, failure.error] for failure in new]
    partial = path.with_suffix(".partial")
    if lines:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file).writerows([header, *lines])
            file.flush()
            os.fsync(file.fileno())
        put_in_place(partial, path)
    else:
        path.unlink(missing_ok=True)
    return {line[0] for line in before}


def remove_files(output_dir: Path, everything: bool) -> None:
    """Delete what a killed run left half written, or everything this program ever wrote here."""
    for path in output_dir.iterdir():
        if OUR_FILES.fullmatch(path.name) and (everything or path.suffix == ".partial"):
            path.unlink()


# ─────────────────────────────────── processes on one output ───────────────────────────────────
class OutputLock:
    """POSIX record locks on `{output_dir}/.lock`, which the kernel drops with their process.

    Byte 0 is the directory: one process's while it checks it, then shared by all that are at
    work. Byte k is part k: whoever holds it writes that part. The file says in JSON who is there,
    with which settings, and which parts have been worked through.
    """

    RECORD = 1 << 40  # the byte of the JSON, and of `failed_samples.csv`: they belong to all
    TAKE, SHARE, GIVE = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_UN

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.has_locks = True
        self._name = f"process {os.getpid()} on {socket.gethostname()}"
        self._thread_lock = threading.Lock()  # POSIX's do not keep out one's own threads
        # Never opened a second time: to close any descriptor of a file drops all its locks.
        self._descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)

    def _lock(self, kind: int, byte: int) -> bool:
        """Whether it is granted; without locks on the file system always."""
        try:
            fcntl.lockf(self._descriptor, kind, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if self.has_locks:
                rule = "this must be the only process at work there"
                if IS_LAUNCHED:
                    rule = "each process takes its share by its rank"
                log.warning("the file system of %s has no locks: %s", self.output_dir, rule)
            self.has_locks = False
        return True

    def join(self, settings: dict) -> bool:
        """Enter the directory. True for who is alone there: it is to check all, and `open`.

        Raises ExtractionError: those who are at work have other settings or rows.
        """
        for attempt in itertools.count(1):
            if self._lock(self.TAKE, 0):
                return True
            if self._lock(self.SHARE, 0):
                break
            if attempt % 600 == 0:  # 30 s
                log.info("waiting for the process that checks %s", self.output_dir)
            time.sleep(0.05)
        with self.record() as record:
            there = record["settings"]
            differing = [name for name in settings if there.get(name) != settings[name]]
            if not differing:
                record["processes"].append(self._name)
                return False
        self._lock(self.GIVE, 0)
        if self._lock(self.TAKE, 0):  # they have just left
            return True
        pairs = [
            f"{name} is {there.get(name)!r} there, {settings[name]!r} here" for name in differing
        ]
        raise ExtractionError(
            f"{self.output_dir} is in use by {', '.join(record['processes'])} with other settings: "
            f"{'; '.join(pairs)} | wait, or choose another --output-dir"
        )

    def open(self, settings: dict) -> None:
        """Let the others in."""
        with self.record() as record:
            record |= {"settings": settings, "processes": [self._name], "done": []}
        self._lock(self.SHARE, 0)

    def claim(self, number: int) -> bool:
        """Whether part `number` is this process's to write from now on."""
        is_granted = self._lock(self.TAKE, number)
        return is_granted and (self.has_locks or number % NUM_RANKS == RANK)

    def release(self, number: int, is_done: bool = False) -> None:
        """Let go of a part; what `is_done` nobody tries again while anybody is at work."""
        if is_done:
            with self.record() as record:
                record["done"].append(number)
        self._lock(self.GIVE, number)

    @contextlib.contextmanager
    def record(self) -> Iterator[dict]:
        """What the file says, to read and to change, one process at a time."""
        with self._thread_lock:
            while not self._lock(self.TAKE, self.RECORD):
                time.sleep(0.01)
            try:
                text = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
                record = {"settings": {}, "processes": [], "done": []}
                with contextlib.suppress(ValueError, TypeError):  # cut short, or somebody else's
                    record |= json.JSONDecoder().raw_decode(text.decode())[0]
                yield record
                changed = json.dumps(record).encode()
                if changed != text:  # the rest of a longer text would do no harm
                    os.pwrite(self._descriptor, changed, 0)
                    os.ftruncate(self._descriptor, len(changed))
            finally:
                self._lock(self.GIVE, self.RECORD)

    def leave(self) -> None:
        """Give everything back."""
        with contextlib.suppress(OSError), self.record() as record:  # a full disk is no matter
            if self._name in record["processes"]:
                record["processes"].remove(self._name)
        os.close(self._descriptor)


# ─────────────────────────────────────────── the run ───────────────────────────────────────────
def describe_run(options: Options, config, prompter: Prompter, rows: list[Row], device) -> dict:
    """The root attributes of every part; those in `IDENTITY` may not change."""
    import transformers

    decoder = config.text_config
    described = {
        "model_name": str(Path(options.model)) if Path(options.model).exists() else options.model,
        "model_revision": find_revision(options.model, config),
        "device": options.device_map or str(device),
        "dtype": options.dtype,
        "layers": choose_layers(options.layers, decoder.num_hidden_layers),
        "num_layers": decoder.num_hidden_layers,
        "hidden_size": decoder.hidden_size,
        "vision_hidden_size": config.vision_config.hidden_size,
        "max_new_tokens": options.max_new_tokens,
        "prompt": prompter.render("{question}"),
        "image_processor": type(prompter.processor.image_processor).__name__,
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
    if device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
        described["cuda_version"] = str(torch.version.cuda)
        described["cudnn_version"] = str(torch.backends.cudnn.version())
    return described


def open_output(
    options: Options, lock: OutputLock, settings: dict, rows: list[Row], sample_size: int
) -> Plan:
    """Enter the directory, look at what is there already, and plan the rest.

    Raises ExtractionError: in use, of another run, or too small for what is to come; OSError.
    """
    output_dir = options.output_dir
    identity = {name: settings[name] for name in (*IDENTITY, "dataset_sha256")}
    is_first = lock.join(identity)
    if options.overwrite and not is_first:
        raise ExtractionError(f"--overwrite: others are at work in {output_dir} | wait for them")
    checks = is_first and (lock.has_locks or RANK == 0)
    compared = rows if checks else ()
    stored = {} if options.overwrite else scan_parts(output_dir, settings, compared)
    unstored = {row.question_id for row in rows} - stored.keys()
    wanted = rows[:NUM_TEST_ROWS] if options.test else rows
    to_do = unstored.intersection(row.question_id for row in wanted)
    if checks:
        if lock.has_locks:  # or others may be at work unseen
            remove_files(output_dir, everything=False)
        check_disk(output_dir, len(to_do) * sample_size, options.overwrite)
    if options.overwrite:
        remove_files(output_dir, everything=True)
    with lock.record():
        known_failures = update_failures(output_dir, unstored.__contains__)
    if is_first:
        lock.open(identity)
    about: dict[str, tuple[Path, str]] = {}
    for row in rows:
        if path := stored.get(row.question_id):
            about.setdefault(row.image_id, (path, row.question_id))
    missing: dict[int, list[Row]] = {}
    for number, part in plan_parts(rows, options.checkpoint_interval).items():
        if left := [row for row in part if row.question_id in to_do]:
            missing[number] = left
    return Plan(len(wanted), missing, about, known_failures)


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


def count_elsewhere(plan: Plan, lock: OutputLock) -> int:
    """Missing rows of the parts that other processes hold; without locks, that are not in place."""
    count = 0
    for number, rows in plan.missing.items():
        if lock.claim(number):
            lock.release(number)
        elif lock.has_locks or not part_path(lock.output_dir, number).exists():
            count += len(rows)
    return count


def work_through(
    options: Options, plan: Plan, lock: OutputLock, extractor: Extractor, recorder: Recorder
) -> None:
    """Extract every row that this process can claim, or until it is to stop.

    Raises ExtractionError, OSError or Damage: it could not go on; what was done is saved.
    """
    try:
        while not STOP.status:
            num_left = len(plan.missing)
            rows = claim_rows(plan, lock, recorder.expect)
            images = asked_images(options, extractor.prompter, plan, rows, recorder.record)
            with contextlib.closing(images):
                for outcome in extractor.run(images, lambda: bool(STOP.status)):
                    recorder.record(outcome)
            recorder.drain()
            if len(plan.missing) == num_left:
                # A launcher ends everybody with the first process that fails: none may end early.
                if not (IS_LAUNCHED and count_elsewhere(plan, lock)):
                    break
                time.sleep(0.5)
    finally:
        recorder.finish()


def extract(options: Options) -> int:
    """Run an extraction, from the CSV to the last part; the exit status.

    Raises ExtractionError: it could not start or go on; OSError, Damage: a file failed.
    """
    if options.overwrite and NUM_RANKS > 1:
        raise ExtractionError(
            "--overwrite needs the directory for itself: a process that came late would delete "
            "what others wrote | empty --output-dir first, or overwrite with one process"
        )
    rows = read_rows(options.vqa_dataset)
    check_images(rows, options.images_dir)
    device = check_device(options.device)
    config, processor = load_processor(options)
    with explain_load_errors(options.model):
        prompter = Prompter(processor, config)
    settings = describe_run(options, config, prompter, rows, device)
    shapes = state_shapes(config, settings["layers"])
    sample_size = bytes_per_sample(shapes, options.storage_dtype)
    # With --overwrite nothing is deleted before the model has shown that it loads.
    model = load_model(options, config, device) if options.overwrite else None
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        lock = OutputLock(options.output_dir)
    except OSError as error:
        raise ExtractionError(
            f"--output-dir {options.output_dir}: {error.strerror} | choose one to write to"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(lock.leave)
        plan = open_output(options, lock, settings, rows, sample_size)
        num_missing = sum(map(len, plan.missing.values()))
        log.info("%d rows in the plan, %d to do", plan.num_rows, num_missing)
        if not (num_missing or options.test):
            return summarise(plan, lock, 0, 0, 0.0)
        model = model or load_model(options, config, device)
        billions = model.num_parameters() / 1e9
        size = f"{billions:.0f}b" if billions >= 0.5 else f"{1e3 * billions:.1f}m"
        settings["model_type"] = f"gemma-3-{size}-multimodal"
        batch_size = choose_batch_size(options, config, len(prompter.tokenize("?")), device)
        limits = (options.max_new_tokens, batch_size)
        extractor = Extractor(model, prompter, settings["layers"], *limits)
        stack.enter_context(STOP.deferred())
        stack.enter_context(logging_redirect_tqdm([log]))
        recorder = Recorder(options, settings, prompter, lock, num_missing)
        start = time.monotonic()
        with contextlib.closing(recorder.bar):
            work_through(options, plan, lock, extractor, recorder)
        num_seconds = time.monotonic() - start
        is_sound = True
        if options.test and RANK == 0 and not STOP.status:
            is_sound = report_test(options, settings, sample_size, extractor, rows)
        if STOP.status:
            log.warning("stopped; what was done is saved, and the same command goes on from there")
            return STOP.status
        status = summarise(plan, lock, recorder.num_extracted, recorder.num_failed, num_seconds)
        return status if is_sound else 1


def summarise(plan: Plan, lock: OutputLock, extracted: int, failed: int, seconds: float) -> int:
    """The last line; the exit status."""
    if failed:
        log.warning("what failed, and why: %s", lock.output_dir / FAILED_NAME)
    elsewhere = count_elsewhere(plan, lock)
    already = plan.num_rows - extracted - failed - elsewhere
    others = f", {elsewhere} in other processes" if elsewhere else ""
    print(
        f"Extracted {extracted} of {plan.num_rows} samples ({failed} failed, {already} already "
        f"done{others}) in {seconds:.1f} s: {extracted / max(seconds, 1e-9):.2f} samples/s",
        file=sys.stderr,
    )
    return 3 if failed else 0


# ─────────────────────────────────────────── --test ────────────────────────────────────────────
@torch.inference_mode()
def plain_forward(model, processor, image: Image.Image, question: str, has_mask: bool = True):
    """The same prompt by transformers alone: its own layers, no cache, nothing shared.

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


def compare_with_plain(images_dir: Path, extractor: Extractor, asked: Asked) -> tuple:
    """Run the questions about an image, and compare the first with plain forward passes.

    Returns whether they have the same tokens, the relative L2 effect of the image mask at the soft
    tokens, and the relative L2 error of every vector.
    """
    prompt, prompter, model = asked.prompts[0], extractor.prompter, extractor.model
    for outcome in extractor.run(iter([asked])):
        if isinstance(outcome, Failure):
            where = f"question_id {outcome.row.question_id!r}"
            raise ExtractionError(f"--test: {where} failed: {outcome.error}")
        if outcome.prompt is prompt:
            states = outcome.states
    image, _ = open_image(images_dir, prompt.row.image_id)
    where = (model, prompter.processor, image, prompt.row.question)
    input_ids, patches, hidden = plain_forward(*where)
    _, _, unmasked = plain_forward(*where, has_mask=False)
    kept = hidden[extractor.layers]  # [layers, T, D]
    soft = slice(prompter.soft_start, prompter.soft_stop)
    expected = [patches, *kept[:, soft.stop - 1], *kept[:, -1], *kept.mean(dim=1)]
    errors = list(map(relative_error, states.values(), expected))
    effect = relative_error(unmasked[-1, soft], hidden[-1, soft])
    return input_ids == prompt.input_ids, effect, errors


def print_checks(options: Options, extractor: Extractor, asked: list[Asked]) -> bool:
    """Print what comparisons show, and the errors of each layer; whether all is well."""
    prompter, layers = extractor.prompter, extractor.layers
    compared = [compare_with_plain(options.images_dir, extractor, one) for one in asked]
    same_tokens, effects, all_errors = zip(*compared, strict=True)
    errors, effect = torch.tensor(all_errors).amax(dim=0), min(effects)  # amax keeps a NaN
    worst, bound = float(errors.max()), TEST_BOUNDS[options.dtype]
    positions = [len(one.prompts[0].input_ids) - 1 for one in asked]
    last_soft, eps = prompter.soft_stop - 1, torch.finfo(getattr(torch, options.dtype)).eps
    checks = {
        "the processor's own tokens, one <bos>": all(same_tokens),
        f"soft tokens {prompter.soft_start} to {last_soft}, vision token {last_soft}, query tokens "
        f"{positions}": min(positions) > last_soft,
        f"the image mask changes soft tokens by {effect:.1e}": effect > 10 * eps,
        f"plain forward passes give the same: error {worst:.1e}, bound {bound:g}": worst <= bound,
    }
    for what, is_well in checks.items():
        print(f"{'ok  ' if is_well else 'FAIL'}  {what}")
    print(f"      {VISION} {errors[0]:.1e}; by layer {', '.join(map(str, layers))}:")
    for kind, of_kind in zip(LAYER_KINDS, errors[1:].split(len(layers))):
        print(f"      {kind:<28}{' '.join(f'{error:.1e}' for error in of_kind)}")
    return all(checks.values())


def report_test(
    options: Options, settings: dict, sample_size: int, extractor: Extractor, rows: list[Row]
) -> bool:
    """Print what the first rows show and what the whole CSV would take; whether all is well."""
    prompter, first, asked = extractor.prompter, rows[:NUM_TEST_ROWS], []
    for row in first:  # its image is asked all the questions, so that it goes the shared way
        others = [dataclasses.replace(r, image_id=row.image_id) for r in first if r is not row]
        one, _ = ask(options, prompter, [row, *others])
        if one and one.prompts[0].row is row:
            asked.append(one)
    if not asked:
        print("none of the first rows can be extracted, so nothing was checked")
        return True
    is_sound = print_checks(options, extractor, asked)
    (in_order,) = plan_parts(rows, len(rows)).values()
    by_image = [list(about) for _, about in itertools.groupby(in_order, lambda row: row.image_id)]
    some = by_image[:: max(1, len(rows) // extractor.batch_size)]  # about a batch, from everywhere
    ahead = ask_ahead(options, prompter, itertools.chain(*some))
    begin = time.monotonic()
    images = itertools.chain(asked, (one for one, _ in ahead if one))
    outcomes = list(extractor.run(images, lambda: bool(STOP.status)))
    answers = [len(outcome.answer) for outcome in outcomes if isinstance(outcome, Sample)]
    seconds = (time.monotonic() - begin) / max(1, len(answers)) / NUM_RANKS
    num_tokens, num_images = np.mean(answers or [0]), len({row.image_id for row in rows})
    free = shutil.disk_usage(options.output_dir).free / 1e9
    print(
        f"torch {settings['torch_version']}, transformers {settings['transformers_version']}; "
        f"{options.dtype} on {settings.get('device_name', settings['device'])}; attention by "
        f"{name_attention_kernel(extractor)}\npeak memory {peak_memory(extractor.device)}\n"
        f"the whole CSV takes {len(rows) * sample_size / 1e9:.2f} GB; {free:.0f} GB are free\n"
        f"{len(rows)} rows about {num_images} images take {len(rows) * seconds / 3600:.2f} h at "
        f"{1 / seconds:.2f} samples/s, if answers have {num_tokens:.0f} tokens as here",
        flush=True,
    )
    return is_sound


def name_attention_kernel(extractor: Extractor) -> str:
    """What PyTorch takes for the decoder's attention on this device."""
    config = extractor.decoder.config
    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    like = {"dtype": extractor.decoder.dtype, "device": extractor.device}
    query, key = (torch.zeros(1, kv_heads, n, config.head_dim, **like) for n in (group, 64))
    bias = torch.zeros(1, 1, group, 64, **like)
    choice = torch._fused_sdp_choice(query, key, key, attn_mask=bias)
    return torch.nn.attention.SDPBackend(choice).name.lower()


def peak_memory(device: torch.device) -> str:
    """Of the process, and of the card where there is one."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the card"
    return text


# ───────────────────────────────────────── command line ────────────────────────────────────────
def positive(text: str) -> int:
    """A whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def size_or_auto(text: str) -> int | None:
    """A whole number from 1; None for `auto`."""
    return None if text == "auto" else positive(text)


def layer_list(text: str) -> tuple[int, ...] | str:
    """Comma-separated whole numbers, or `all`."""
    return text if text == "all" else tuple(int(part) for part in text.split(","))


def dtype_name(text: str) -> str:
    """A type that holds Gemma 3's states."""
    if text == "float16":
        raise argparse.ArgumentTypeError("Gemma 3's states pass float16's 65504; use bfloat16")
    return text


def read_options(words: list[str]) -> Options:
    """What the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    dtypes, cores = list(TEST_BOUNDS), min(8, len(os.sched_getaffinity(0)))

    columns = "the CSV's columns: question_id, image_id|image_name, question, answer|gt_answer"
    add = parser.add_argument_group("what to read and where to write", columns).add_argument
    add("--vqa-dataset", type=Path, required=True, metavar="CSV", help="a line a question")
    add("--images-dir", type=Path, required=True, metavar="DIR", help="where image_id names a file")
    add("--output-dir", type=Path, default="output", metavar="DIR", help="for parts (%(default)s)")
    add("--overwrite", action="store_true", help="start afresh: delete what this program wrote")
    add("--test", action="store_true", help="first 3 rows, then checks, and time and disk for all")
    add("--strict", action="store_true", help="stop at the first row that fails")

    add = parser.add_argument_group("the model").add_argument
    add("--model", default="google/gemma-3-12b-it", help="on the hub, or a directory (%(default)s)")
    add("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    add("--cache-dir", type=Path, default="model_cache", help="for downloads (%(default)s)")
    add("--device", default="cuda", help="cuda, cpu or any torch device (%(default)s)")
    add("--device-map", choices=["auto"], help="spread one model over GPUs and CPU")
    add("--dtype", type=dtype_name, choices=dtypes, default="bfloat16", help="(%(default)s)")

    add = parser.add_argument_group("what is extracted").add_argument
    layers = "negative: from the end (default: first, quarters and last)"
    add("--layers", type=layer_list, metavar="I,J|all", help=layers)
    tokens = "limit of an answer; 0: none (%(default)s)"
    add("--max-new-tokens", type=int, default=200, metavar="N", help=tokens)

    add = parser.add_argument_group("how it is run and stored").add_argument
    size = "questions answered side by side; auto: what suits the device (%(default)s)"
    add("--batch-size", type=size_or_auto, default="auto", metavar="N|auto", help=size)
    workers = "threads that prepare images (%(default)s here)"
    add("--num-workers", type=positive, default=cores, metavar="N", help=workers)
    interval = "samples per part file (%(default)s)"
    add("--checkpoint-interval", type=positive, default=1000, metavar="N", help=interval)
    add("--storage-dtype", choices=dtypes, default="float32", help="of the vectors (%(default)s)")
    packing = {"choices": ["none", "gzip", "lzf"], "default": "none"}
    add("--compression", **packing, help="of the vectors (%(default)s)")

    options = parser.parse_args(words)
    if options.max_new_tokens < 0:
        parser.error("argument --max-new-tokens: less than 0")
    return options


class Unfailing(io.FileIO):
    """What cannot be written here is lost: a message without room must not end the run."""

    def write(self, content) -> int:
        """Write if possible."""
        with contextlib.suppress(OSError):
            super().write(content)
        return len(content)


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--layers" in words[:-1]:  # "-1,2" looks like a flag to argparse, but not behind a "="
        place = words.index("--layers")
        words[place : place + 2] = [f"--layers={words[place + 1]}"]
    options = read_options(words)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"process {RANK}: %(message)s" if RANK else None))
    log.handlers = [handler]
    log.setLevel(logging.WARNING if RANK else logging.INFO)
    try:
        return extract(options)
    except ExtractionError as error:
        told = str(error)
    except torch.OutOfMemoryError as error:
        advice = "a smaller --batch-size, --device-map auto, or a larger card"
        told = f"the device's memory is too small: {error} | {advice}"
    except (OSError, RuntimeError, MemoryError, Damage) as error:
        told = (
            f"{str(error) or type(error).__name__} | what is in place in {options.output_dir} is "
            "whole, what could not be written is lost; the same command goes on"
        )
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            told += ", once there is room"
    log.error("%s", " ".join(told.split()))
    return 1


if __name__ == "__main__":
    descriptor = 2 if sys.stderr else os.open(os.devnull, os.O_WRONLY)  # it may be closed
    unfailing = Unfailing(descriptor, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(unfailing, errors="backslashreplace", write_through=True)
    exit_status = main()
    for signum in StopSignal.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # nothing is left to stop
    raise SystemExit(exit_status)
