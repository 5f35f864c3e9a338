#!/usr/bin/env python3
"""Store what Gemma 3 holds inside, for every question of a VQA data set, before it answers.

    python run_gemma3_extraction.py --vqa-dataset vqa.csv --images-dir images --test
    python run_gemma3_extraction.py --vqa-dataset vqa.csv --images-dir images

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

How a row travels:

    read_rows → plan_parts → read_ahead → Extractor.run (encode, prefill, decode)
    → Recorder → PartWriter → part_NNN.h5

Every prompt is a prefix, the same for all (up to the end of the image), and the question's own
tokens. An image runs through the vision tower and the prefix once; each question about it takes a
lane of keys and values, with the image's copied into it, and leaves as its answer ends.

The same command again goes on where the last one stopped, and helps where one is at work. Exit
status: 0 every row is stored, 1 could not start or go on, 2 wrong usage, 3 some rows failed, 130
Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
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
import operator
import os
import platform
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import torch
import transformers
from accelerate.utils import get_max_memory
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

# ────────────────────────────────────────── constants ──────────────────────────────────────────
SCHEMA_VERSION = 3
PART_NAME = "gemma3_12b_embeddings_part_{:03d}.h5"
FAILED_NAME = "failed_samples.csv"
OUR_FILES = re.compile(
    r"gemma3_12b_embeddings_part_\d+\.(h5|partial)|(failed_samples|settings)\.(csv|json|partial)"
)
COLUMNS = {  # a field of `Row`, and what the CSV may call it
    "question_id": ("question_id",),
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "ground_truth": ("answer", "gt_answer"),
}
VISION = "vision_representation"
LAYER_KINDS = (
    "vision_token_representation",
    "query_token_representation",
    "multimodal_representation",
)
# What every stored vector depends on: no run goes on in a directory where these were others.
IDENTITY = ("schema_version", "model_revision", "dtype", "layers", "max_new_tokens", "prompt")
IDENTITY = (*IDENTITY, "checkpoint_interval")
FILTERS = {"gzip": (h5py.h5z.FILTER_DEFLATE, 0, (1,)), "lzf": (h5py.h5z.FILTER_LZF, 1)}
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
RANK, NUM_RANKS = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
MAX_FAILED_IMAGES = 25  # if so many fail before any succeeds, something is wrong with all
SAMPLED_BYTES = 2**16  # at a time, of a local model's weights
SAMPLE_OVERHEAD, VECTOR_OVERHEAD = 6000, 350  # bytes of a file beside the vectors themselves
NUM_TEST_ROWS = 3
TEST_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2 error to a plain forward pass

CPU_BATCH_SIZE = 64  # no result depends on it
MAX_BATCH_SIZE = 256
MAX_PASS_TOKENS = 8192  # of a prefill pass
PASS_COST, CPU_PASS_COST = 512, 48  # tokens whose arithmetic takes as long as an empty pass
MAX_PASS_IMAGES = 8  # of an encoding pass on an accelerator; a CPU is faster one by one
TYPICAL_QUESTION = 64  # tokens behind the prefix; no result depends on it

PLAIN_NORM = Gemma3RMSNorm.forward
Options = argparse.Namespace  # what `read_options` makes of the command line
log = logging.getLogger("gemma3_extraction")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we refuse such images ourselves


class ExtractionError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


class RowError(ValueError):
    """One row cannot be extracted; the message says why."""


# ────────────────────────────────────────── what flows ─────────────────────────────────────────
@dataclass(frozen=True)
class Row:
    """One line of the CSV, to the letter."""

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
class Question:
    """One row as the model reads it."""

    row: Row
    input_ids: list[int]  # [T]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image, and the questions about it."""

    pixel_values: Tensor  # [3, height, width]
    image_sha256: str  # of the file
    questions: list[Question]


@dataclass(frozen=True, eq=False)
class Sample:
    """What the model gives for a question."""

    question: Question
    image_sha256: str
    vectors: dict[str, np.ndarray]  # by their names in the file, float32
    answer_ids: list[int]  # without the end token
    is_truncated: bool
    logprobs: list[float]  # natural log of every generated token's probability, the end included
    first_token_entropy: float  # nats


# ─────────────────────────────────── reading rows and images ───────────────────────────────────
def read_rows(csv_path: Path) -> list[Row]:
    """Every row of the CSV, text as it stands: `007`, `NA`, `None` and empty answers survive."""
    csv.field_size_limit(sys.maxsize)
    rows: dict[str, Row] = {}
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = find_columns(list(reader.fieldnames or ()))
            for line in reader:
                if None in line or None in line.values():  # a key for too many, values for few
                    than = "more" if None in line else "fewer"
                    raise ValueError(f"{than} fields than the header; check its commas")
                row = Row(**{name: line[column] for name, column in columns.items()})
                if any("\0" in text for text in dataclasses.astuple(row)):
                    raise ValueError("holds a NUL byte; remove it")
                if not row.question_id.strip():
                    raise ValueError("the question_id is empty")
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
        told = f"{csv_path}, line {reader.reader.line_num}: {error}{advice}"
        raise ExtractionError(told) from error
    return list(rows.values())


def find_columns(header: list[str]) -> dict[str, str]:
    """What the CSV calls each field of `Row`. Raises ValueError: missing, or there twice."""
    columns = {}
    for name, accepted in COLUMNS.items():
        named, present = " or ".join(accepted), [c for c in header if c in accepted]
        if len(set(present)) > 1:
            raise ValueError(f"columns {' and '.join(present)} are both there; remove one")
        if len(present) > 1:
            raise ValueError(f"column {present[0]} is there twice; remove one")
        if len(header) == 1 and re.search("[;\t]", header[0]):
            raise ValueError("it looks separated by semicolons or tabs: save it with commas")
        if header and not present:
            raise ValueError(f"column {named} is not there; its columns: {header}")
        columns[name] = next(iter(present), "")
    return columns


def group_by_image(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of every image, images as they first appear."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image_id, []).append(row)
    return list(by_image.values())


def plan_parts(rows: list[Row], interval: int) -> dict[int, list[Row]]:
    """The rows of every part: image by image, as they first appear, `interval` rows a part."""
    ordered = list(itertools.chain.from_iterable(group_by_image(rows)))
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
    """The image, upright and RGB, and the sha256 of its file. Raises RowError."""
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
        is_no_image = isinstance(error, Image.UnidentifiedImageError)
        reason = f"it begins with {content[:16]!r}" if is_no_image else str(error)
        raise RowError(f"{path} cannot be read as an image: {reason}") from error


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
    """Turn what is raised for a missing, gated or broken model into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:800] or type(error).__name__
        advice = "the directory must hold the whole model, its weights as *.safetensors"
        if not Path(model).is_dir():
            page = f"https://huggingface.co/{model}"
            advice = f"if it is gated, accept its licence at {page} and run `hf auth login`; "
            advice += "if it is here already, name the place: --cache-dir or --model DIR"
        raise ExtractionError(f"cannot load {model}: {reason} | {advice}") from error


def find_model(options: Options) -> tuple[Path, str]:
    """The model's directory, with all of its small files, and its revision: a hub's commit, or of a
    local directory a hash of its files' names, sizes and contents, of large ones by samples.
    """
    name, directory, small = options.model, Path(options.model), ["*.json", "*.jinja", "*.model"]
    if not directory.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ExtractionError(f"--model {name}: there is no such directory | check the path")
        where = {"cache_dir": options.cache_dir, "revision": options.revision}
        directory = Path(snapshot_download(name, allow_patterns=small, **where))
        return directory, directory.name
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                for start in range(0, size, max(SAMPLED_BYTES, size // 256)):
                    file.seek(start)
                    digest.update(file.read(SAMPLED_BYTES))
    return directory, digest.hexdigest()


def fetch_weights(options: Options, directory: Path) -> None:
    """Download the weights of a hub's model, unless they are all there."""
    index_path, needed = directory / "model.safetensors.index.json", {"model.safetensors"}
    if index_path.exists():
        needed = set(json.loads(index_path.read_text())["weight_map"].values())
    if not (Path(options.model).is_dir() or all((directory / name).exists() for name in needed)):
        where = {"cache_dir": options.cache_dir, "revision": directory.name}
        snapshot_download(options.model, allow_patterns=["*.safetensors"], **where)


def load_processor(directory: Path):
    """The model's config and processor: small files, enough to plan and check a run."""
    config = transformers.AutoConfig.from_pretrained(directory)
    if config.model_type != "gemma3":
        raise ValueError(f"its type is {config.model_type}; expected gemma3 (4B, 12B or 27B)")
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "a method")
        raise ValueError(f"quantised weights ({method}) are not supported; take the original")
    # With torchvision's back end pixels differ by 1/255 in places; Pillow is always there.
    return config, transformers.AutoProcessor.from_pretrained(directory, backend="pil")


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


def choose_layers(asked: tuple[int, ...] | str | None, n: int) -> list[int]:
    """Of n layers those asked for, negatives from the end, or HALP's: first, quarters, last."""
    if asked == "all":
        return list(range(n))
    chosen = asked or (0, n // 4, n // 2, 3 * n // 4, n - 1)
    if wrong := [i for i in chosen if not -n <= i < n]:
        raise ExtractionError(f"--layers {wrong[0]}: the model has layers 0 to {n - 1}")
    return sorted({i % n for i in chosen})


def short_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Gemma3RMSNorm's `forward`, the same in three operations instead of ten."""
    if not hasattr(norm, "scale"):  # made at the first call, when an offloaded weight is there
        norm.scale = 1.0 + norm.weight.detach().float()
    normed = nn.functional.rms_norm(hidden.float(), norm.scale.shape, norm.scale, norm.eps)
    return normed.type_as(hidden)


def load_model(options: Options, directory: Path, config, device: torch.device):
    """The whole model, in evaluation mode, its weights from safetensors and complete."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length, 23 to 37 ms each
    Gemma3RMSNorm.forward = short_norm
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        directory,
        dtype=getattr(torch, options.dtype),
        attn_implementation="sdpa",  # flash attention cannot carry the image mask
        use_safetensors=True,
        output_loading_info=True,
        **place_weights(options, config, device),
    )
    if absent := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
        raise ValueError(f"{len(absent)} weights are missing or misshapen, first {absent[0]}")
    return model.eval()


def place_weights(options: Options, config, device: torch.device) -> dict:
    """For transformers: what does not fit on the cards beside the work stays in host memory."""
    if device.type != "cuda":
        return {"device_map": options.device_map or {"": device}}
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    itemsize = getattr(torch, options.dtype).itemsize
    cards = range(torch.cuda.device_count()) if options.device_map else [device.index]
    needed = pass_memory(config, itemsize)
    room = {card: int(0.9 * torch.cuda.mem_get_info(card)[0] - needed) for card in cards}
    num_hosted = model.num_parameters() * itemsize - sum(room.values())
    if not options.device_map and num_hosted <= 0:
        return {"device_map": {"": device}}
    if num_hosted > 0:
        log.info("%.1f GiB of the weights stay in host memory: slower", num_hosted / 2**30)
    return {"device_map": "auto", "max_memory": room | {"cpu": get_max_memory()["cpu"]}}


def choose_batch_size(options: Options, config, num_slots: int, device: torch.device) -> int:
    """`--batch-size`, or what suits the device; the log says why."""
    if options.batch_size:
        return options.batch_size
    if device.type != "cuda":
        log.info("batch size %d: a fixed number for a %s", CPU_BATCH_SIZE, device.type)
        return CPU_BATCH_SIZE
    cards = range(torch.cuda.device_count()) if options.device_map else [device.index]
    free = min(torch.cuda.mem_get_info(card)[0] for card in cards)
    size = fit_batch_size(free, config, getattr(torch, options.dtype).itemsize, num_slots)
    log.info("batch size %d: %.1f GiB are free beside the model", size, free / 2**30)
    return size


def fit_batch_size(free: int, config, itemsize: int, num_slots: int) -> int:
    """How many lanes of `num_slots` tokens fit into `free` bytes beside what a pass needs."""
    text = config.text_config
    slot_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    fitting = (0.95 * free - pass_memory(config, itemsize)) / (slot_bytes * num_slots)
    return max(1, min(MAX_BATCH_SIZE, int(fitting)))


def pass_memory(config, itemsize: int) -> int:
    """Bytes that passes need at most beside weights and lanes."""
    text, vision = config.text_config, config.vision_config
    num_patches = MAX_PASS_IMAGES * (vision.image_size // vision.patch_size) ** 2
    decoder = MAX_PASS_TOKENS * (3 * text.intermediate_size + 8 * text.hidden_size) * itemsize
    logits = MAX_BATCH_SIZE * text.vocab_size * (itemsize + 12)
    tower = num_patches * (2 * vision.intermediate_size + 6 * vision.hidden_size) * itemsize
    slot_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    cache = MAX_PASS_IMAGES * (config.mm_tokens_per_image + 6) * slot_bytes
    return decoder + logits + tower + cache


# ──────────────────────────────── prompts, and pictures read ahead ─────────────────────────────
class Prompter:
    """Turns questions and images into what the model reads, with the model's own processor.

    `prefix` are the tokens up to and with <end_of_image>, the same in every prompt.
    """

    def __init__(self, processor, config) -> None:
        self.processor = processor
        self._tokenizer = processor.tokenizer
        added = self._tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}
        self._special.add(config.image_token_id)
        self._lock = threading.Lock()  # a fast tokenizer must not serve two threads at once
        plain = self._encode("?")
        if plain.count(self._tokenizer.bos_token_id) != 1:
            raise ValueError("its chat template does not give exactly one <bos>")
        soft = [pos for pos, token in enumerate(plain) if token == config.image_token_id]
        if len(soft) != config.mm_tokens_per_image or soft != list(range(soft[0], soft[-1] + 1)):
            raise ValueError(f"{len(soft)} image soft tokens in a prompt, or not in one run")
        self.soft_start, self.soft_stop = soft[0], soft[-1] + 1
        self.prefix = plain[: self.soft_stop + 1]
        self._plain_special = [token for token in plain if token in self._special]

    def render(self, question: str) -> str:
        """The chat template with one user turn, image then question, and the generation prompt."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns, how = [{"role": "user", "content": content}], {"add_generation_prompt": True}
        return self.processor.apply_chat_template(turns, tokenize=False, **how)

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
        if input_ids[: len(self.prefix)] != self.prefix:
            raise RowError("its prompt does not begin as that of other questions")
        return input_ids

    def pixels(self, image: Image.Image) -> Tensor:
        """`pixel_values` of one image, [3, height, width], float32."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def decode(self, answer_ids: list[int]) -> str:
        """An answer's text: no special tokens, whitespace kept; NUL would end it in HDF5."""
        plainly = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = self._tokenizer.decode(answer_ids, **plainly)
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def read_picture(options: Options, prompter: Prompter, rows: list[Row]) -> tuple:
    """A `Picture` of the rows about one image, or None, and the failures of other rows."""
    questions, failures = [], []
    for row in rows:
        try:
            questions.append(Question(row, prompter.tokenize(row.question)))
        except RowError as error:
            failures.append(Failure(row, str(error)))
    if not questions:
        return None, failures
    try:
        image, sha256 = open_image(options.images_dir, rows[0].image_id)
    except RowError as error:
        return None, failures + [Failure(question.row, str(error)) for question in questions]
    pixel_values = prompter.pixels(image).to(getattr(torch, options.dtype))
    return Picture(pixel_values, sha256, questions), failures


def read_ahead(
    options: Options, prompter: Prompter, parts: Iterable[list[Row]], fail: Callable
) -> Iterator[Picture]:
    """Images with their questions, in order, read by threads beside the model, part by part.

    A `Failure` of a row that cannot be read goes to `fail`. Few images are in memory at a time.
    """
    image_of = operator.attrgetter("image_id")
    with ThreadPoolExecutor(options.num_workers) as pool:
        by_image = (group for rows in parts for _, group in itertools.groupby(rows, image_of))
        jobs = (pool.submit(read_picture, options, prompter, list(about)) for about in by_image)
        pending = deque(itertools.islice(jobs, 2 * options.num_workers + 1))
        try:
            while pending:
                picture, failures = pending.popleft().result()
                for failure in failures:
                    fail(failure)
                if picture:
                    yield picture
                pending.extend(itertools.islice(jobs, 1))
        finally:
            pool.shutdown(cancel_futures=True)


# ──────────────────────────────────────────── hooks ────────────────────────────────────────────
@contextlib.contextmanager
def capture(model: nn.Module, layers: list[int], kept_pos: Tensor, lengths: Tensor) -> Iterator:
    """Forward hooks on the vision tower and the chosen decoder layers, for one pass of n rows.

    Gives what they will see, in float32: if the tower runs, the mean over its patches [n, D_v]; by
    layer the token at index `kept_pos` [n] of each row, [n, D]; by layer the sum over a row's first
    `lengths` [n] tokens, [n, D]: what stands behind them is padding.
    """
    patches, kept, sums, handles = {}, {}, {}, []  # dicts, as `to_numpy` takes them

    def see_tower(module, args, output) -> None:
        patches[0] = output.last_hidden_state.mean(dim=1, dtype=torch.float32)

    def see_layer(layer_idx: int, module, args, output: Tensor) -> None:
        device = output.device  # [n, L, D]
        index, count = kept_pos.to(device), lengths.to(device)
        is_padding = torch.arange(output.shape[1], device=device) >= count[:, None]  # [n, L]
        tokens = output.masked_fill(is_padding[:, :, None], 0)
        sums[layer_idx] = tokens.sum(dim=1, dtype=torch.float32)
        kept[layer_idx] = output[torch.arange(len(index), device=device), index].float()

    try:
        handles.append(model.model.vision_tower.register_forward_hook(see_tower))
        for i in layers:
            hook = functools.partial(see_layer, i)
            handles.append(model.model.language_model.layers[i].register_forward_hook(hook))
        yield patches, kept, sums
    finally:
        for handle in handles:
            handle.remove()


def to_numpy(vectors: dict[int, Tensor]) -> np.ndarray:
    """Tensors [n, ...] side by side, in host memory: [n, tensors, ...]."""
    device = next(iter(vectors.values())).device
    return torch.stack([one.to(device) for one in vectors.values()], dim=1).cpu().numpy()


# ──────────────────────────────────────────── lanes ────────────────────────────────────────────
class Lanes:
    """Keys and values of the questions that are being answered, one lane each.

    Those of a layer are [2, lanes, kv_heads, slots, head_dim], on the layer's device. A slot is a
    position in the prompt and its answer, so what a lane holds behind its last token is seen by
    nobody, and no lane sees another. Live lanes stand side by side from 0 on.
    """

    def __init__(self) -> None:
        self.shape = (0, 0)  # lanes, slots
        self.layers: list[Tensor] = []

    def resize(self, shape: tuple[int, int], num_live: int, cache) -> None:
        """Make it [lanes, slots], layer by layer; the first `num_live` lanes stay."""
        if shape == self.shape:
            return
        num_slots = min(shape[1], self.shape[1])
        for i, layer in enumerate(cache.layers):
            _, num_heads, _, head_dim = layer.keys.shape
            lanes = layer.keys.new_empty(2, shape[0], num_heads, shape[1], head_dim)
            if num_live:
                lanes[:, :num_live, :, :num_slots] = self.layers[i][:, :num_live, :, :num_slots]
                lanes[:, :num_live, :, num_slots:] = 0
            self.layers[i : i + 1] = [lanes]
        self.shape = shape

    def seat(self, start: int, cache, images: list[int]) -> None:
        """Copy the prefix of one of the cache's images into each of the lanes from `start` on.

        The slots behind it become 0: attention multiplies what it does not see by 0, and NaN, which
        the lane's last owner may have left, would survive that.
        """
        index = torch.tensor(images)
        for layer, lanes in zip(cache.layers, self.layers, strict=True):
            index = index.to(lanes.device)
            own, num_slots = lanes[:, start : start + len(images)], layer.keys.shape[2]
            torch.index_select(layer.keys, 0, index, out=own[0, :, :, :num_slots])
            torch.index_select(layer.values, 0, index, out=own[1, :, :, :num_slots])
            own[:, :, :, num_slots:] = 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy lanes into others."""
        source, target = torch.tensor(sources), torch.tensor(targets)
        for lanes in self.layers:
            source, target = source.to(lanes.device), target.to(lanes.device)
            lanes[:, target] = lanes[:, source]


class LaneView:
    """The lanes of one pass, n of them, as transformers' layers want a cache."""

    def __init__(self, lanes: Lanes, chosen: list[int], pos: Tensor, num_slots: int) -> None:
        self._layers = lanes.layers
        self._chosen = torch.tensor(chosen, device=pos.device)  # [n]
        self._pos = pos  # [n, L]
        self._num_slots = num_slots  # that may be in use
        side_by_side = range(chosen[0], chosen[0] + len(chosen))
        self._slice = slice(chosen[0], side_by_side.stop) if chosen == list(side_by_side) else None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple:
        """Store the tokens' [n, kv_heads, L, head_dim]; gives all that their lanes hold."""
        lanes = self._layers[layer_idx]  # [2, lanes, kv_heads, slots, head_dim]
        chosen, pos = self._chosen.to(keys.device), self._pos.to(keys.device)
        lanes[0][chosen[:, None], :, pos] = keys.transpose(1, 2)  # [n, L, kv_heads, head_dim]
        lanes[1][chosen[:, None], :, pos] = values.transpose(1, 2)
        held = lanes[:, self._slice or chosen, :, : self._num_slots]  # of a slice no copy
        return held[0], held[1]


def causal_masks(pos: Tensor, num_slots: int, window: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What attention adds in each kind of layer, [n, 1, L, slots], for tokens at `pos` [n, L].

    A token sees its lane up to itself, in sliding layers `window` positions, itself included.
    """
    slot = torch.arange(num_slots, device=pos.device)
    distance = pos[:, None, :, None] - slot  # [n, 1, L, slots]
    hidden = {"full_attention": distance < 0}
    hidden["sliding_attention"] = hidden["full_attention"] | (distance >= window)
    nothing = torch.zeros((), dtype=dtype, device=pos.device)
    return {kind: nothing.masked_fill(mask, -math.inf) for kind, mask in hidden.items()}


def lane_width(prompter: Prompter, max_new_tokens: int, lives: Iterable[Live] = ()) -> int:
    """Slots for usual prompts and those of `lives`, each with its answer, rounded up."""
    lengths = [len(live.question.input_ids) for live in lives]
    usual = len(prompter.prefix) + TYPICAL_QUESTION
    return -(-(max([usual, *lengths]) + max_new_tokens) // 64) * 64


# ───────────────────────────────────────── extraction ──────────────────────────────────────────
@dataclass(eq=False)
class Live:
    """A question from its image's encoding to the end of its answer; states in host memory."""

    question: Question
    image_sha256: str
    patches: np.ndarray  # [D_v], mean
    vision_token: np.ndarray  # [layers, D], last soft token
    token_sum: np.ndarray  # [layers, D], over the prefix; from the prefill on over the prompt
    query_token: np.ndarray | None = None  # [layers, D], last prompt token
    answer_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: float = math.nan  # nats, of the first token's distribution


class Extractor:
    """The loaded model: turns images with their questions into states and answers.

    Each image goes through the vision tower and the prefix once, each question's own tokens
    through the decoder once; states and answers come from that same pass.
    """

    def __init__(
        self, model, prompter: Prompter, layers: list, max_new_tokens: int, batch_size: int, device
    ) -> None:
        self.model = model
        self.prompter = prompter
        self.layers = layers
        self.max_new_tokens = max_new_tokens
        self.device = device  # not the model's, which is `meta` where its tower is offloaded
        self.max_pass_images = 1 if device.type == "cpu" else MAX_PASS_IMAGES
        self.pass_cost = CPU_PASS_COST if device.type == "cpu" else PASS_COST
        end = model.generation_config.eos_token_id
        self._end_ids = set(end if isinstance(end, list) else [end])
        self.restart(batch_size)

    def restart(self, batch_size: int) -> None:
        """Forget whatever is under way, and begin with another batch size."""
        self.batch_size = batch_size  # lanes of the usual width
        self._lanes = Lanes()
        self._live: list[Live | None] = []  # by lane; None once its answer has ended
        self._waiting: deque[tuple[Live, int]] = deque()  # encoded, and its image in the cache
        self._cache = None  # keys and values of the images that were encoded last
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def run(self, pictures: Iterator[Picture]) -> Iterator[list[Sample | Failure]]:
        """What comes of each pass, which may be nothing: samples as their answers end, failures.

        What stands side by side depends on the order of `pictures` and on the batch size alone.
        """
        while True:
            num_free = self.batch_size - self.num_live()
            if not self.num_live() or 4 * num_free >= self.batch_size:  # few, but large passes
                num_entered = yield from self._admit(pictures)
                if not self.num_live() and not num_entered:
                    return
            if self.num_live():
                yield self._decode()

    def num_live(self) -> int:
        """How many questions are being answered."""
        return sum(live is not None for live in self._live)

    def _admit(self, pictures: Iterator[Picture]) -> Iterator[list[Sample | Failure]]:
        """Fill the lanes, and run the questions that have entered; returns how many those are."""
        self._close_gaps()
        num_before = len(self._live)
        while len(self._live) < self.batch_size:
            if not self._waiting:
                chunk = list(itertools.islice(pictures, min(self.batch_size, self.max_pass_images)))
                if not chunk:
                    break
                self._encode(chunk)
                yield []
            if not self._seat_waiting():
                break
        entered = list(range(num_before, len(self._live)))
        for lanes in self._split_passes(entered) if entered else ():
            yield self._prefill(lanes)
        return len(entered)

    def _close_gaps(self) -> None:
        """The last live lanes move into those whose answers have ended."""
        num_live = self.num_live()
        targets = [i for i, live in enumerate(self._live[:num_live]) if live is None]
        sources = [i for i in range(num_live, len(self._live)) if self._live[i] is not None]
        if targets:
            self._lanes.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self._live[target] = self._live[source]
        del self._live[num_live:]

    def _encode(self, chunk: list[Picture]) -> None:
        """Run images through the tower, and the prefix with them through the decoder."""
        prompter = self.prompter
        input_ids = torch.tensor([prompter.prefix] * len(chunk), device=self.device)
        lengths = torch.full((len(chunk),), len(prompter.prefix), device=self.device)
        kept_pos = torch.full_like(lengths, prompter.soft_stop - 1)
        pixel_values = torch.stack([picture.pixel_values for picture in chunk])
        self._cache = transformers.DynamicCache()  # without a config it keeps every position
        with capture(self.model, self.layers, kept_pos, lengths) as seen:
            self.model.model(
                input_ids=input_ids,
                pixel_values=pixel_values.to(self.device),
                token_type_ids=(input_ids == self.model.config.image_token_id).int(),
                past_key_values=self._cache,
                use_cache=True,
            )
        patches, kept, sums = map(to_numpy, seen)  # [images, 1, D_v], [images, layers, D] twice
        for i, picture in enumerate(chunk):
            states = (picture.image_sha256, patches[i, 0], kept[i], sums[i])
            self._waiting.extend((Live(question, *states), i) for question in picture.questions)

    def _seat_waiting(self) -> int:
        """Give lanes to questions of the images that were encoded last; how many got one.

        All lanes together are never larger than the batch in its usual width: a question that is
        too wide for that waits until enough lanes are free, and enters alone if need be.
        """
        start, images = len(self._live), []
        budget = self.batch_size * lane_width(self.prompter, self.max_new_tokens)  # slots
        while self._waiting:
            live, image = self._waiting[0]
            wider = lane_width(self.prompter, self.max_new_tokens, [live, *self._live])
            if len(self._live) >= max(1, budget // wider):
                break
            width = wider
            self._live.append(live)
            images.append(image)
            self._waiting.popleft()
        if images:
            self._lanes.resize((max(1, budget // width), width), start, self._cache)
            self._lanes.seat(start, self._cache, images)
        if not self._waiting:
            self._cache = None
        return len(images)

    def _split_passes(self, lanes: list[int]) -> Iterator[list[int]]:
        """Lanes whose questions run together: those of few tokens apart from those of many, where
        that saves more padding than a pass costs.
        """
        num_prefix = len(self.prompter.prefix)
        num_own = {i: len(self._live[i].question.input_ids) - num_prefix for i in lanes}
        by_length = sorted(lanes, key=num_own.get)
        lengths = [num_own[lane] for lane in by_length]
        saved = [i * (lengths[-1] - length) for i, length in enumerate(lengths, start=1)]
        if max(saved) > self.pass_cost:
            cut = saved.index(max(saved)) + 1
        elif len(lanes) > 1 and len(lanes) * lengths[-1] > MAX_PASS_TOKENS:
            cut = len(lanes) // 2
        else:
            yield sorted(lanes)
            return
        yield from self._split_passes(by_length[:cut])
        yield from self._split_passes(by_length[cut:])

    def _prefill(self, lanes: list[int]) -> list[Sample | Failure]:
        """Run the own tokens of the questions in these lanes: their states and first tokens."""
        lives, num_prefix = [self._live[lane] for lane in lanes], len(self.prompter.prefix)
        own = [torch.tensor(live.question.input_ids[num_prefix:]) for live in lives]
        lengths = torch.tensor([len(tokens) for tokens in own])
        input_ids = nn.utils.rnn.pad_sequence(own, batch_first=True)  # [n, L], on the right
        pos = num_prefix + torch.arange(input_ids.shape[1]).expand_as(input_ids)
        with capture(self.model, self.layers, lengths - 1, lengths) as (_, kept, sums):
            hidden = self._forward(lanes, input_ids, pos)  # [n, L, D]
        for live, query_token, own_sum in zip(lives, to_numpy(kept), to_numpy(sums), strict=True):
            live.query_token, live.token_sum = query_token, live.token_sum + own_sum
        if not self.max_new_tokens:
            return [self._finish(lane, is_truncated=False) for lane in lanes]
        last = hidden[torch.arange(len(lives)), lengths - 1]  # [n, D]
        tokens, logprobs, logits = self._choose_tokens(last)
        first_token = torch.distributions.Categorical(logits=logits, validate_args=False)
        entropies = to_numpy({0: first_token.entropy()})
        for live, (entropy,) in zip(lives, entropies.tolist(), strict=True):
            live.entropy = entropy
        return self._add_tokens(lanes, tokens, logprobs)

    def _decode(self) -> list[Sample | Failure]:
        """The next token of every live question. Dead lanes run along, and are overwritten."""
        input_ids = torch.zeros(len(self._live), 1, dtype=torch.long)
        pos = torch.zeros_like(input_ids)
        for lane, live in enumerate(self._live):
            if live:
                input_ids[lane] = live.answer_ids[-1]
                pos[lane] = len(live.question.input_ids) + len(live.answer_ids) - 1
        lanes = list(range(len(self._live)))
        hidden = self._forward(lanes, input_ids, pos)  # [n, 1, D]
        tokens, logprobs, _ = self._choose_tokens(hidden[:, 0])
        return self._add_tokens(lanes, tokens, logprobs)

    def _forward(self, lanes: list[int], input_ids: Tensor, pos: Tensor) -> Tensor:
        """Run tokens [n, L] at their positions in n lanes; normed states [n, L, D]."""
        num_slots = min(-(-(int(pos.max()) + 1) // 8) * 8, self._lanes.shape[1])
        input_ids, pos = input_ids.to(self.device), pos.to(self.device)
        window = self.model.config.text_config.sliding_window
        output = self.model.model.language_model(
            input_ids=input_ids,
            attention_mask=causal_masks(pos, num_slots, window, self.model.dtype),
            position_ids=pos,
            past_key_values=LaneView(self._lanes, lanes, pos, num_slots),
        )
        return output.last_hidden_state

    def _choose_tokens(self, hidden: Tensor) -> tuple[list, list, Tensor]:
        """Of normed states [n, D] the likeliest tokens, log-probabilities, and the logits."""
        head = self.model.lm_head
        if self.device.type == "cpu" and not head.weight.is_meta:
            logits = (head.weight @ hidden.T).T.contiguous()  # for few rows in half the time
        else:
            logits = head(hidden)
        logits = logits.float()  # [n, vocabulary]
        best, tokens = logits.max(dim=-1)
        columns = {0: tokens.double(), 1: (best - logits.logsumexp(dim=-1)).double()}
        tokens, logprobs = to_numpy(columns).T.tolist()
        return list(map(int, tokens)), logprobs, logits

    def _add_tokens(self, lanes: list, tokens: list, logprobs: list) -> list[Sample | Failure]:
        """Give every live one of the lanes its token; what has come to an end leaves."""
        outcomes = []
        for lane, token, logprob in zip(lanes, tokens, logprobs, strict=True):
            live = self._live[lane]
            if live is None:
                continue
            live.answer_ids.append(token)
            live.logprobs.append(logprob)
            has_ended = self.has_ended(live)
            is_over = len(live.answer_ids) == self.max_new_tokens or not math.isfinite(logprob)
            if has_ended or is_over:
                outcomes.append(self._finish(lane, is_truncated=not has_ended))
        return outcomes

    def has_ended(self, live: Live) -> bool:
        """Whether the last token of an answer is its end."""
        return live.answer_ids[-1] in self._end_ids

    def _finish(self, lane: int, is_truncated: bool) -> Sample | Failure:
        """What has become of a lane's question, which leaves it."""
        live, self._live[lane] = self._live[lane], None
        question, vectors = live.question, {VISION: live.patches}
        mean = live.token_sum / np.float32(len(question.input_ids))
        by_kind = (live.vision_token, live.query_token, mean)  # [layers, D] each
        for kind, states in zip(LAYER_KINDS, by_kind, strict=True):
            for i, vector in zip(self.layers, states, strict=True):
                vectors[f"{kind}/layer_{i}"] = vector
        if not all(np.isfinite(vector).all() for vector in vectors.values()):
            return Failure(question.row, "its states are not finite")
        if not np.isfinite(live.logprobs).all():
            return Failure(question.row, "the logits of its answer are not finite")
        answer_ids = live.answer_ids if is_truncated else live.answer_ids[:-1]
        rest = (answer_ids, is_truncated, live.logprobs, live.entropy)
        return Sample(question, live.image_sha256, vectors, *rest)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it was for want of the device's memory, which its libraries tell in many ways."""
    signs = ("ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


# ─────────────────────────────── parts: whole, or not there ────────────────────────────────────
def group_name(question_id: str) -> str:
    """A name that HDF5 takes; `urllib.parse.unquote` gives the question_id back."""
    name = question_id.replace("%", "%25").replace("/", "%2F")
    return name.replace(".", "%2E") if not name.strip(".") else name


def put_in_place(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name and rename it, once it is safe on the disk: a crash or an
    OSError at any moment leaves the old file or the new one, whole.
    """
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # where it was not put in place
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system's no
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[h5py.File]:
    """A finished part, to read. Raises ExtractionError: it cannot be read, or the body fails."""
    try:
        with h5py.File(path, "r", locking=False) as part:
            yield part
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ExtractionError(
            f"{path} cannot be read: {error} | move it away and give the same command again"
        ) from error


@functools.lru_cache(maxsize=1024)
def vector_layout(width: int, compression: str) -> tuple:
    """HDF5's space, creation and link properties of a vector: half the time of `create_dataset`."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if compression != "none":
        layout.set_chunk((width,))
        layout.set_shuffle()
        layout.set_filter(*FILTERS[compression])
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return h5py.h5s.create_simple((width,)), layout, links


def write_sample(part: h5py.File, sample: Sample, prompter: Prompter, compression: str) -> None:
    """Add a sample's group to a part."""
    row, num_tokens = sample.question.row, len(sample.question.input_ids)
    vectors = dict(sample.vectors)
    attributes = {
        "question_id": row.question_id,
        "num_prompt_tokens": num_tokens,
        "vision_token_pos": prompter.soft_stop - 1,
        "query_token_pos": num_tokens - 1,
        "num_answer_tokens": len(sample.answer_ids),
        "answer_truncated": sample.is_truncated,
        "image_sha256": sample.image_sha256,
    }
    if sample.logprobs:
        vectors["answer_logprobs"] = np.array(sample.logprobs, dtype=np.float32)
        attributes["first_token_entropy"] = sample.first_token_entropy
    group = part.create_group(group_name(row.question_id))
    group["question"] = row.question
    group["image_id"] = row.image_id
    group["answer"] = prompter.decode(sample.answer_ids)
    group["ground_truth_answer"] = row.ground_truth
    crc32, file_type = 0, h5py.h5t.IEEE_F32LE
    for name, vector in sorted(vectors.items()):
        space, layout, links = vector_layout(len(vector), compression)
        dataset = h5py.h5d.create(group.id, name.encode(), file_type, space, layout, links)
        vector = np.ascontiguousarray(vector, dtype="<f4")
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, vector, file_type)
        crc32 = zlib.crc32(vector, crc32)
    group["vision_only_representation"] = h5py.SoftLink(VISION)
    group.attrs.update(attributes | {"crc32": crc32})


class PartWriter:
    """Puts parts together in memory, in the order of the plan, and then in place."""

    def __init__(self, settings: dict, prompter: Prompter, compression: str = "none") -> None:
        self._settings = settings  # the root attributes
        self._prompter = prompter
        self._compression = compression

    def write(self, path: Path, planned: list[Row], samples: Iterable[Sample]) -> None:
        """Write a part: what is stored in its file already, and new samples. Raises OSError or
        ExtractionError: the old one stays as it is.
        """
        new = {group_name(sample.question.row.question_id): sample for sample in samples}
        order = [group_name(row.question_id) for row in planned]
        content = io.BytesIO()
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(open_part(path)) if path.exists() else {}
            # HDF5 1.10's format: smaller, with checksums over all but the vectors themselves.
            like = {"track_order": True, "libver": ("v110", "v110")}
            part = stack.enter_context(h5py.File(content, "w", **like))
            for name in dict.fromkeys([*order, *old]):
                if name in old:
                    h5py.h5o.copy(old.id, name.encode(), part.id, name.encode())
                elif name in new:
                    write_sample(part, new[name], self._prompter, self._compression)
            created_at = datetime.now(UTC).isoformat(timespec="seconds")
            part.attrs.update(self._settings)
            part.attrs.update({"num_samples": len(part), "created_at": created_at})
        put_in_place(path, content.getbuffer())


def bytes_per_sample(config, layers: list[int]) -> int:
    """What one sample takes on the disk, uncompressed."""
    num_vectors = len(LAYER_KINDS) * len(layers)
    width = config.vision_config.hidden_size + num_vectors * config.text_config.hidden_size
    return SAMPLE_OVERHEAD + 4 * width + (num_vectors + 1) * VECTOR_OVERHEAD


def tell_differences(was: dict, now: dict) -> str:
    """Which of the settings `now` were others, with both values."""
    differing = [name for name in now if was.get(name) != now[name]]
    return "; ".join(f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in differing)


def count_other_truths(path: Path, part: h5py.File, by_name: dict[str, Row]) -> int:
    """How many stored ground truths are not the CSV's. Raises ExtractionError: a question or
    image_id is another, and vectors depend on those.
    """
    count = 0
    for name in filter(by_name.__contains__, part):
        group, row = part[name], by_name[name]
        was = {text: group[text].asstr()[()] for text in ("question", "image_id")}
        now = {"question": row.question, "image_id": row.image_id}
        if differences := tell_differences(was, now):
            raise ExtractionError(
                f"{path} was written with another row of question_id {row.question_id!r}: "
                f"{differences} | give what changed another question_id, choose another "
                "--output-dir, or --overwrite"
            )
        count += group["ground_truth_answer"].asstr()[()] != row.ground_truth
    return count


def scan_parts(output_dir: Path, settings: dict, rows: Iterable[Row] = ()) -> set[str]:
    """The group names of all stored samples, from attributes and names alone; where the rows' hash
    is another, texts are compared with `rows`, if there are any.

    Raises ExtractionError: a part cannot be read, is of another kind of run, or repeats another.
    """
    by_name = {group_name(row.question_id): row for row in rows}
    owners: dict[str, Path] = {}
    num_other = 0
    for path in sorted(output_dir.glob("gemma3_12b_embeddings_part_*.h5")):
        with open_part(path) as part:
            stored = {name: np.asarray(value).tolist() for name, value in part.attrs.items()}
            if differences := tell_differences(stored, {name: settings[name] for name in IDENTITY}):
                advice = "go on with the old ones, choose another --output-dir, or --overwrite"
                if "schema_version" in differences:
                    advice = "older files can be inspected only: choose another --output-dir"
                raise ExtractionError(
                    f"{path} was written with other settings: {differences} | {advice}"
                )
            if stored["num_samples"] != len(part):
                raise ValueError(f"{len(part)} samples; expected {stored['num_samples']}")
            for name in part:
                if name in owners:
                    raise ValueError(f"sample {name!r} stands in {owners[name].name} already")
                owners[name] = path
            if by_name and stored["dataset_sha256"] != settings["dataset_sha256"]:
                num_other += count_other_truths(path, part, by_name)
    if num_other:
        log.warning("%d stored ground truths differ from the CSV's; they stay", num_other)
    return set(owners)


def update_failures(output_dir: Path, is_missing: Callable, new: Iterable[Failure] = ()) -> None:
    """Keep of `failed_samples.csv` what is still missing, and add new failures."""
    path, header = output_dir / FAILED_NAME, ["question_id", "image_id", "error"]
    before: list[list[str]] = []
    with contextlib.suppress(FileNotFoundError, csv.Error):
        text = path.read_bytes().decode(errors="replace")
        before = [line for line in csv.reader(io.StringIO(text, newline="")) if len(line) == 3]
    lines = [line for line in before if line != header and is_missing(line[0])]
    lines += [[failure.row.question_id, failure.row.image_id, failure.error] for failure in new]
    if lines:
        table = io.StringIO(newline="")
        csv.writer(table).writerows([header, *lines])
        put_in_place(path, table.getvalue().encode(errors="backslashreplace"))
    else:
        path.unlink(missing_ok=True)


# ─────────────────────────────────── processes on one output ───────────────────────────────────
class OutputLock:
    """POSIX record locks on `{output_dir}/.lock`, which the kernel drops with their process.

    Byte 0 is the directory: one process's while it checks it, then shared by all at work. Byte k
    is part k: whoever holds it writes that part, and keeps it until the process ends.
    """

    FAILURES = 1 << 40  # the byte of `failed_samples.csv`, which is everybody's
    ALONE, SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._has_locks = True
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            # Never opened a second time: to close any descriptor of a file drops all its locks.
            self._descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            told = f"--output-dir {output_dir}: {error.strerror} | choose one to write to"
            raise ExtractionError(told) from error

    def _lock(self, kind: int, byte: int) -> bool:
        """Whether it is granted; without locks on the file system always."""
        try:
            fcntl.lockf(self._descriptor, kind, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if self._has_locks:
                rule = "this must be the only process at work there"
                log.warning("the file system of %s has no locks: %s", self.output_dir, rule)
            self._has_locks = False
        return True

    def enter(self, settings: dict) -> bool:
        """Enter the directory. True for who is alone there: it is to check all, and `share`."""
        while not self._lock(self.ALONE, 0):
            if self._lock(self.SHARED, 0) and not self._lock(self.ALONE, 0):  # others are there
                there = json.loads((self.output_dir / "settings.json").read_bytes())
                if differences := tell_differences(there, settings):
                    raise ExtractionError(
                        f"{self.output_dir} is in use with other settings: {differences} "
                        "| wait, or choose another --output-dir"
                    )
                return False
            time.sleep(0.05)  # somebody checks it
        return True

    def share(self, settings: dict) -> None:
        """Let the others in."""
        text = json.dumps(settings, indent=1)
        put_in_place(self.output_dir / "settings.json", text.encode())
        self._lock(self.SHARED, 0)

    def claim(self, number: int) -> bool:
        """Whether part `number` is this process's to write from now on."""
        return self._lock(self.ALONE, number)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """One process at a time."""
        while not self._lock(self.ALONE, self.FAILURES):
            time.sleep(0.01)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, self.FAILURES)

    def close(self) -> None:
        """Give everything back."""
        os.close(self._descriptor)


# ─────────────────────────────────────────── the run ───────────────────────────────────────────
@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Within this, Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (Slurm's early warning), unless they are
    ignored, are wishes to stop: the list holds their exit statuses. Ctrl-C once more is the end.
    """
    asked: list[int] = []
    first_time = math.inf

    def receive(signum: int, frame) -> None:
        nonlocal first_time
        # A launcher passes on the Ctrl-C that the terminal has sent already: not a second one.
        if signum == signal.SIGINT and time.monotonic() - first_time > 1:
            os._exit(130)
        asked.append(130 if signum == signal.SIGINT else 143)
        first_time = min(first_time, time.monotonic())

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    caught = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, receive) for signum in caught}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Recorder:
    """Gathers outcomes by part, and writes each part with its last one, beside the model.

    Answers end in another order than the plan's, so several parts are open at once; one at a time
    is written. What went wrong there comes out of a later call.
    """

    def __init__(self, lock: OutputLock, planned: dict[int, list[Row]]) -> None:
        self.num_extracted = self.num_failed = 0
        self.writer: PartWriter | None = None  # both set before the first outcome
        self.bar: tqdm | None = None
        self._lock = lock
        self._planned = planned
        self._waiting: dict[str, tuple[int, Row]] = {}  # by question_id: part, row
        self._outcomes: dict[int, list[Sample | Failure]] = {}  # by part
        self._num_expected: dict[int, int] = {}  # by part
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future = self._thread.submit(lambda: None)

    def expect(self, number: int, rows: list[Row]) -> None:
        """Part `number` is this process's; these rows are missing in it."""
        self._outcomes[number], self._num_expected[number] = [], len(rows)
        self._waiting.update((row.question_id, (number, row)) for row in rows)

    def waiting(self) -> list[Row]:
        """The rows that are expected and have no outcome yet, in the order they were claimed."""
        return [row for _, row in self._waiting.values()]

    def record(self, outcome: Sample | Failure) -> None:
        """Take an outcome."""
        has_failed = isinstance(outcome, Failure)
        row = outcome.row if has_failed else outcome.question.row
        number, _ = self._waiting.pop(row.question_id)
        self._outcomes[number].append(outcome)
        self.num_failed += has_failed
        self.num_extracted += not has_failed
        self.bar.set_postfix(failed=self.num_failed, refresh=False)
        self.bar.update()
        if len(self._outcomes[number]) == self._num_expected[number]:
            self._save(number)
        elif self._saving.done():
            self._saving.result()

    def finish(self) -> None:
        """Write what there is of the parts in hand."""
        for number in list(self._outcomes):
            self._save(number)
        self._saving.result()

    def _save(self, number: int) -> None:
        self._saving.result()
        self._saving = self._thread.submit(self._write, number, self._outcomes.pop(number))

    def _write(self, number: int, outcomes: list[Sample | Failure]) -> None:
        path = self._lock.output_dir / PART_NAME.format(number)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        samples = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
        is_whole = len(outcomes) == self._num_expected[number]
        if samples or (is_whole and not path.exists()):
            self.writer.write(path, self._planned[number], samples)
        settled = {one.row.question_id for one in failures}
        settled |= {one.question.row.question_id for one in samples}
        with self._lock.failures():
            update_failures(self._lock.output_dir, lambda q: q not in settled, failures)


def describe_run(options: Options, revision: str, config, prompter: Prompter, rows, device) -> dict:
    """The root attributes of every part; those in `IDENTITY` may not change."""
    decoder, texts = config.text_config, json.dumps([dataclasses.astuple(row) for row in rows])
    described = {
        "model_name": options.model,
        "model_revision": revision,
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
        "dataset": options.vqa_dataset.name,
        "dataset_sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }
    if device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
        described["cuda_version"] = str(torch.version.cuda)
    return described


def open_output(
    options: Options, lock: OutputLock, settings: dict, rows: list[Row], sample_size: int
) -> tuple[dict, dict]:
    """Enter the directory and look at what is there: the plan, and the rows missing in each part.

    Raises ExtractionError: in use, of another run, or too small for what is to come.
    """
    output_dir, planned = options.output_dir, plan_parts(rows, options.checkpoint_interval)
    identity = {name: settings[name] for name in (*IDENTITY, "dataset_sha256")}
    is_alone = lock.enter(identity)
    if options.overwrite and (NUM_RANKS > 1 or not is_alone):
        raise ExtractionError(
            f"--overwrite needs {output_dir} for itself | wait for the others, or start one process"
        )
    stored: set[str] = set()
    if not options.overwrite:
        stored = scan_parts(output_dir, settings, rows if is_alone else ())
    unstored = {row.question_id for row in rows if group_name(row.question_id) not in stored}
    wanted = rows[:NUM_TEST_ROWS] if options.test else rows
    to_do = unstored.intersection(row.question_id for row in wanted)
    if is_alone:
        ours = [path for path in output_dir.iterdir() if OUR_FILES.fullmatch(path.name)]
        doomed = [path for path in ours if options.overwrite or path.suffix == ".partial"]
        free = shutil.disk_usage(output_dir).free + sum(path.stat().st_size for path in doomed)
        if len(to_do) * sample_size > free:
            raise ExtractionError(
                f"{output_dir} has {free / 1e6:.1f} MB free; the run needs "
                f"{len(to_do) * sample_size / 1e6:.1f} MB | make room, or give another --output-dir"
            )
        for path in doomed:
            path.unlink()
        with lock.failures():
            update_failures(output_dir, unstored.__contains__)
        lock.share(identity)
    missing = {k: [r for r in part if r.question_id in to_do] for k, part in planned.items()}
    return planned, {number: left for number, left in missing.items() if left}


def claim_parts(lock: OutputLock, missing: dict, recorder: Recorder) -> Iterator[list[Row]]:
    """The missing rows of parts that no other process has, which the recorder is told to expect;
    at the end once more of the others, as what a process that died had is free again.
    """
    left, has_claimed = dict(missing), True
    while has_claimed:
        has_claimed = False
        for number in list(left):
            if not lock.claim(number):
                continue
            has_claimed = True
            rows, path = left.pop(number), lock.output_dir / PART_NAME.format(number)
            if path.exists():  # with more than before, if others were here meanwhile
                with open_part(path) as part:
                    rows = [row for row in rows if group_name(row.question_id) not in part]
            if rows:
                recorder.expect(number, rows)
                yield rows


def work_through(
    options: Options, extractor: Extractor, parts: Iterator, recorder: Recorder, stops: list[int]
) -> None:
    """Extract the rows of all parts, or until it is to stop.

    Where the device's memory runs short, half the batch goes on with the rows that have no outcome
    yet; a question that does not fit alone fails, and batches are as large as before it again.
    """
    usual, num_since, is_done = extractor.batch_size, 0, False  # outcomes since it last ran short
    failed_images: set[str] = set()
    while not is_done:
        rows = itertools.chain([recorder.waiting()], parts)
        pictures = read_ahead(options, extractor.prompter, rows, recorder.record)
        try:
            with contextlib.closing(pictures):
                for outcomes in extractor.run(pictures):
                    for outcome in outcomes:
                        recorder.record(outcome)
                    num_since += len(outcomes)
                    failed_images |= {o.row.image_id for o in outcomes if isinstance(o, Failure)}
                    is_vain = outcomes and not (recorder.num_extracted or extractor.num_live())
                    if is_vain and len(failed_images) >= MAX_FAILED_IMAGES:
                        raise ExtractionError(
                            f"the first {len(failed_images)} images that the model saw all failed: "
                            "something is wrong with all of them | the last, question_id "
                            f"{outcomes[-1].row.question_id!r}: {outcomes[-1].error}"
                        )
                    if stops:
                        break
            is_done = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if num_since >= usual:  # this size has held for long, so it is not what was too much
                usual = extractor.batch_size
            num_since = 0
        if not is_done and extractor.batch_size == 1:
            reason = "the device's memory is too small for it"
            recorder.record(Failure(recorder.waiting()[0], reason))
            extractor.restart(usual)
        elif not is_done:
            extractor.restart(extractor.batch_size // 2)
            log.warning("out of memory: batch size %d from here on", extractor.batch_size)


def extract(options: Options) -> int:
    """Run an extraction, from the CSV to the last part; the exit status."""
    rows = read_rows(options.vqa_dataset)
    check_images(rows, options.images_dir)
    device = check_device(options.device)
    with explain_load_errors(options.model):
        directory, revision = find_model(options)
        config, processor = load_processor(directory)
        prompter = Prompter(processor, config)
    settings = describe_run(options, revision, config, prompter, rows, device)
    sample_size = bytes_per_sample(config, settings["layers"])
    with contextlib.closing(OutputLock(options.output_dir)) as lock:
        planned, missing = open_output(options, lock, settings, rows, sample_size)
        num_rows = min(len(rows), NUM_TEST_ROWS) if options.test else len(rows)
        num_missing = sum(map(len, missing.values()))
        log.info("%d rows in the plan, %d to do", num_rows, num_missing)
        recorder = Recorder(lock, planned)
        parts = claim_parts(lock, missing, recorder)
        # The rows of the first part wait in the recorder; without one no model need be loaded.
        if next(parts, None) is None and not options.test:
            return summarise(recorder, num_rows, num_missing, 0.0)
        with explain_load_errors(options.model):
            fetch_weights(options, directory)
            model = load_model(options, directory, config, device)
        settings["model_type"] = f"gemma-3-{model.num_parameters() / 1e9:.0f}b-multimodal"
        width = lane_width(prompter, options.max_new_tokens)
        limits = (options.max_new_tokens, choose_batch_size(options, config, width, device))
        extractor = Extractor(model, prompter, settings["layers"], *limits, device)
        recorder.writer = PartWriter(settings, prompter, options.compression)
        start, interval = time.monotonic(), 0.5 if sys.stderr.isatty() else 30
        style = {"unit": " samples", "smoothing": 0, "mininterval": interval, "disable": RANK > 0}
        with catch_signals() as stops, logging_redirect_tqdm([log]):
            try:
                with tqdm(total=num_missing, **style) as recorder.bar:
                    work_through(options, extractor, parts, recorder, stops)
            finally:
                recorder.finish()
        seconds = time.monotonic() - start
        if stops:
            log.warning("stopped; what was done is saved, and the same command goes on from there")
            return stops[0]
        is_sound = not options.test or RANK or report_test(options, settings, extractor, rows)
        status = summarise(recorder, num_rows, num_missing, seconds)
        return status if is_sound else 1


def summarise(recorder: Recorder, num_rows: int, num_missing: int, seconds: float) -> int:
    """Print the last line; the exit status."""
    num_extracted, num_failed = recorder.num_extracted, recorder.num_failed
    if num_failed:
        log.warning("what failed, and why: %s in the output directory", FAILED_NAME)
    counts = f"{num_failed} failed, {num_rows - num_missing} already done"
    if num_others := num_missing - num_extracted - num_failed:
        counts += f", {num_others} by other processes"
    rate = f"{seconds:.1f} s: {num_extracted / max(seconds, 1e-9):.2f} samples/s"
    print(f"Extracted {num_extracted} of {num_rows} samples ({counts}) in {rate}", file=sys.stderr)
    # A launcher of several processes ends all of them with the first that ends with an error.
    return 3 if num_failed and NUM_RANKS == 1 else 0


# ─────────────────────────────────────────── --test ────────────────────────────────────────────
@torch.inference_mode()
def plain_forward(extractor: Extractor, image: Image.Image, question: str, has_mask: bool = True):
    """The same prompt by transformers alone: its own norm, no cache, no hook, nothing shared.

    Gives input_ids [T], the patches' mean [D_v], and every layer's output [num_layers, T, D].
    """
    model, processor = extractor.model, extractor.prompter.processor
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    turns = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(turns, add_generation_prompt=True, **how)
    inputs = inputs.to(extractor.device, model.dtype)
    if not has_mask:
        del inputs["token_type_ids"]
    decoder, norm = model.model.language_model, model.model.language_model.norm
    decoder.norm, Gemma3RMSNorm.forward = nn.Identity(), PLAIN_NORM
    try:
        outputs = model.model(**inputs, output_hidden_states=True, use_cache=False)
    finally:
        decoder.norm, Gemma3RMSNorm.forward = norm, short_norm
    patches = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    hidden_states = torch.stack([h[0].float().cpu() for h in outputs.hidden_states[1:]])
    return inputs["input_ids"][0].tolist(), patches[0].float().mean(0).cpu(), hidden_states


def compare_with_plain(options: Options, extractor: Extractor, sample: Sample) -> tuple:
    """Compare a sample with plain forward passes of its prompt.

    Gives whether they have the same tokens, the relative L2 effect of the image mask at the soft
    tokens, and the relative L2 error of each vector.
    """
    row, prompter = sample.question.row, extractor.prompter
    image, _ = open_image(options.images_dir, row.image_id)
    input_ids, patches, hidden = plain_forward(extractor, image, row.question)
    _, _, unmasked = plain_forward(extractor, image, row.question, has_mask=False)
    kept = hidden[extractor.layers]  # [layers, T, D]
    soft = slice(prompter.soft_start, prompter.soft_stop)
    expected = [patches, *kept[:, soft.stop - 1], *kept[:, -1], *kept.mean(dim=1)]
    found = map(torch.as_tensor, sample.vectors.values())
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    effect = (unmasked[-1, soft] - hidden[-1, soft]).norm() / hidden[-1, soft].norm()
    return input_ids == sample.question.input_ids, float(effect), errors


def print_checks(options: Options, extractor: Extractor, samples: list[Sample]) -> bool:
    """Print what comparisons show, and the errors of each layer; whether all is well."""
    prompter, layers = extractor.prompter, extractor.layers
    compared = [compare_with_plain(options, extractor, sample) for sample in samples]
    same_tokens, effects, all_errors = zip(*compared, strict=True)
    errors, effect = torch.tensor(all_errors).amax(dim=0), min(effects)  # amax keeps a NaN
    worst, bound = float(errors.max()), TEST_BOUNDS[options.dtype]
    positions = [len(sample.question.input_ids) - 1 for sample in samples]
    last_soft, eps = prompter.soft_stop - 1, torch.finfo(extractor.model.dtype).eps
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
    for kind, of_kind in zip(LAYER_KINDS, errors[1:].split(len(layers)), strict=True):
        print(f"      {kind:<28}{' '.join(f'{error:.1e}' for error in of_kind)}")
    return all(checks.values())


def report_test(options: Options, settings: dict, extractor: Extractor, rows: list[Row]) -> bool:
    """Print what the first rows show and what the whole CSV would take; whether all is well."""

    def run(rows: list[Row]) -> list[Sample]:
        pictures = read_ahead(options, extractor.prompter, [rows], lambda failure: None)
        outcomes = itertools.chain.from_iterable(extractor.run(pictures))
        return [outcome for outcome in outcomes if isinstance(outcome, Sample)]

    samples = run(rows[:NUM_TEST_ROWS])
    if not samples:
        print("none of the first rows can be extracted, so nothing was checked")
        return True
    is_sound = print_checks(options, extractor, samples)
    by_image = group_by_image(rows)
    some = by_image[:: max(1, len(rows) // extractor.batch_size)]  # about a batch, from everywhere
    start = time.monotonic()
    lengths = [len(sample.answer_ids) for sample in run([row for about in some for row in about])]
    seconds = (time.monotonic() - start) / max(1, len(lengths)) / NUM_RANKS
    num_tokens = sum(lengths) / max(1, len(lengths))
    sample_size = bytes_per_sample(extractor.model.config, extractor.layers)
    free = shutil.disk_usage(options.output_dir).free / 1e9
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    if extractor.device.type == "cuda":
        memory += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card"
    print(
        f"torch {settings['torch_version']}, transformers {settings['transformers_version']}; "
        f"{options.dtype} on {settings.get('device_name', settings['device'])}\n"
        f"peak memory {memory}\n"
        f"the whole CSV takes {len(rows) * sample_size / 1e9:.2f} GB; {free:.0f} GB are free\n"
        f"{len(rows)} rows about {len(by_image)} images take {len(rows) * seconds / 3600:.2f} h at "
        f"{1 / seconds:.2f} samples/s, if answers have {num_tokens:.0f} tokens as here",
        flush=True,
    )
    return is_sound


# ───────────────────────────────────────── command line ────────────────────────────────────────
def positive(text: str) -> int:
    """A whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def number_or_auto(text: str) -> int | None:
    """A whole number from 1, or None for `auto`."""
    return None if text == "auto" else positive(text)


def layer_list(text: str) -> tuple[int, ...] | str:
    """Comma-separated whole numbers, or `all`."""
    return text if text == "all" else tuple(int(part) for part in text.split(","))


def read_options(words: list[str]) -> Options:
    """What the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    dtypes, cores = list(TEST_BOUNDS), min(8, len(os.sched_getaffinity(0)))
    add = parser.add_argument
    columns = "with question_id, image_id or image_name, question, answer or gt_answer"
    add("--vqa-dataset", type=Path, required=True, metavar="CSV", help=columns)
    add("--images-dir", type=Path, required=True, metavar="DIR", help="where image_id names a file")
    add("--output-dir", type=Path, default="output", metavar="DIR", help="for parts (%(default)s)")
    add("--overwrite", action="store_true", help="start afresh: delete what this program wrote")
    add("--test", action="store_true", help="first 3 rows, then checks, and time and disk for all")
    add("--model", default="google/gemma-3-12b-it", help="on the hub, or a directory (%(default)s)")
    add("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    add("--cache-dir", type=Path, default="model_cache", help="for downloads (%(default)s)")
    add("--device", default="cuda", help="cuda, cpu or any torch device (%(default)s)")
    add("--device-map", choices=["auto"], help="spread one model over all visible GPUs")
    add("--dtype", choices=[*dtypes, "float16"], default="bfloat16", help="(%(default)s)")
    add("--layers", type=layer_list, metavar="I,J|all", help="negative: from the end (the five)")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="0: no answers (%(default)s)")
    auto = {"type": number_or_auto, "default": "auto", "metavar": "N|auto"}
    add("--batch-size", **auto, help="questions side by side (%(default)s)")
    add("--num-workers", type=positive, default=cores, metavar="N", help="threads (%(default)s)")
    add("--checkpoint-interval", type=positive, default=1000, metavar="N", help="per file (1000)")
    packing = {"choices": ["none", "gzip", "lzf"], "default": "none"}
    add("--compression", **packing, help="of the vectors (%(default)s)")
    options = parser.parse_args(words)
    if options.dtype == "float16":
        parser.error("argument --dtype: Gemma 3's states pass float16's 65504; take bfloat16")
    if options.max_new_tokens < 0:
        parser.error("argument --max-new-tokens: less than 0")
    return options


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
    except KeyboardInterrupt:
        return 130
    except ExtractionError as error:
        told = str(error)
    except (OSError, RuntimeError, MemoryError) as error:
        told = f"{str(error) or type(error).__name__} | what {options.output_dir} holds is whole, "
        told += "what could not be written is lost; the same command goes on"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            told += ", once there is room"
    log.error("%s", " ".join(told.split()))
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
