#!/usr/bin/env python3
"""Run Gemma 3 over a VQA data set and store its hidden states from before each answer.

    python run_gemma3_extraction.py --vqa-dataset vqa.csv --images-dir images --test
    python run_gemma3_extraction.py --vqa-dataset vqa.csv --images-dir images

It writes one HDF5 file per `--checkpoint-interval` samples, with one group per sample:

    output/gemma3_12b_embeddings_part_001.h5
      {question_id}/
        question, image_id, answer, ground_truth_answer     UTF-8
        vision_representation                    [D_v]      mean over the vision tower's patches
        vision_only_representation               [D_v]      soft link to it
        vision_token_representation/layer_{i}    [D]        decoder layer i, last image soft token
        query_token_representation/layer_{i}     [D]        decoder layer i, last prompt token
        multimodal_representation/layer_{i}      [D]        decoder layer i, mean over the prompt
        answer_logprobs                          [tokens]   natural log, end token included

How a row travels through this script:

    read_rows → plan_parts → claim_parts → ImageReader → Extractor (encode, prefill, decode)
    → Recorder → PartWriter → part_001.h5

`extract`, in "the run", puts these together.

All prompts begin with the same tokens, up to the end of the image: the prefix. Each image runs
through the vision tower and the prefix once. Each question about it then gets a lane: its own
stretch of the KV cache, which starts as a copy of the image's prefix. Questions are answered side
by side, and when an answer ends, another question takes its lane.

The same command continues where the last run stopped, and shares the work with runs that are still
going. Exit status: 0 done, 1 could not start or continue, or --test failed, 2 wrong usage, 3 some
rows failed (under a launcher 0), 130 stopped by Ctrl-C, 143 by another signal.
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
import socket
import stat
import sys
import threading
import time
import types
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

# Shapes change with every pass and would fragment CUDA's memory. Set before torch reads it.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import h5py
import numpy as np
import psutil
import torch
import transformers
from accelerate.utils import get_max_memory
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

# ────────────────────────────────────────── constants ──────────────────────────────────────────
SCHEMA_VERSION = 3
PART_NAME = "gemma3_12b_embeddings_part_{:03d}.h5"
PARTS_GLOB = "gemma3_12b_embeddings_part_*.h5"
OUR_FILES = re.compile(
    r"(gemma3_12b_embeddings_part_\d+|settings|failed_samples)"
    r"\.(h5|json|csv|(?P<host>.+)-(?P<pid>\d+)\.partial)"
)
FAILED_NAME = "failed_samples.csv"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SMALL_FILES = ["*.json", "*.jinja", "*.model"]  # of a checkpoint: all but its weights

COLUMNS = {  # a field of `Row`, and what the CSV may call it
    "question_id": ("question_id",),
    "image_id": ("image_id", "image_name"),
    "question": ("question",),
    "ground_truth": ("answer", "gt_answer"),
}
VISION = "vision_representation"
VISION_TOKEN = "vision_token_representation"
QUERY_TOKEN = "query_token_representation"
MULTIMODAL = "multimodal_representation"

NUM_TEST_ROWS = 3
TEST_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2 error to a plain forward pass
MAX_FAILED_ROWS = 25  # give up if at least the first 25 rows all fail in the model
MAX_MESSAGE = 1000  # characters
SAMPLE_OVERHEAD = 6000  # bytes of a sample in a file beside its vectors: texts, groups, attributes
VECTOR_OVERHEAD = 350  # bytes of HDF5's own for each vector; tests/test_parts.py measures both
HASHED_BYTES = 2**16  # of the beginning of each tensor of a local model

CPU_BATCH_SIZE = 64  # on two cores 3 % faster than 32; no result depends on it
MAX_BATCH_SIZE = 256  # above this a decoding step slows in proportion, so nothing is gained
MAX_PASS_IMAGES = 8  # encoded together on an accelerator; a CPU is as fast one by one
MAX_PASS_TOKENS = 8192  # of a prefill, padding included
CPU_PASS_TOKENS = 512  # enough to keep a CPU busy; more would only add padding
TYPICAL_QUESTION = 64  # tokens after the prefix for which every lane has room
# Activations of one pass in bfloat16, on top of weights and lanes. `tests/benchmark.py --paper`
# measures 2.9 GiB for the 12B's largest pass. If it is too little, the run halves its batch.
WORKING_MEMORY = 4 * 2**30

log = logging.getLogger("gemma3_extraction")


class ExtractionError(Exception):
    """The run cannot start or continue; the message says why and what to do."""


class RowError(ValueError):
    """One row cannot be extracted; the message says why."""


# ────────────────────────────────────────── what flows ─────────────────────────────────────────
@dataclass(frozen=True)
class Row:
    """One line of the CSV, each text exactly as it is written there."""

    question_id: str
    image_id: str
    question: str
    ground_truth: str


@dataclass(frozen=True)
class Part:
    """One part file of the plan."""

    number: int
    path: Path
    planned: list[Row]
    missing: list[Row]  # those of the planned rows that are not stored yet


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row as the model reads it."""

    row: Row
    input_ids: list[int]  # [T]


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the model reads it, and the prompts about it."""

    pixel_values: Tensor  # [3, height, width]
    image_sha256: str  # of the file
    prompts: list[Prompt]


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What all questions about an image share. States are float32, in host memory."""

    image_sha256: str
    cache_index: int  # which image of the last encoded ones it is
    patch_mean: np.ndarray  # [D_v]
    vision_token: np.ndarray  # [layers, D], at the last image soft token
    prefix_sum: np.ndarray  # [layers, D], over the tokens of the prefix


@dataclass(eq=False)
class Sequence:
    """A prompt from the moment its image is encoded until its answer ends."""

    prompt: Prompt
    image: EncodedImage
    lane: int = -1  # -1 while it waits
    query_token: np.ndarray | None = None  # [layers, D], at the last prompt token
    suffix_sum: np.ndarray | None = None  # [layers, D], over the prompt's tokens after the prefix
    generated_ids: list[int] = field(default_factory=list)  # the end token included
    logprobs: list[float] = field(default_factory=list)  # one for each generated token
    first_token_entropy: float = math.nan  # nats
    is_truncated: bool = False


@dataclass(frozen=True, eq=False)
class Sample:
    """What the model gives for a prompt."""

    prompt: Prompt
    image_sha256: str
    vectors: dict[str, np.ndarray]  # by their names in the file, float32
    answer_ids: list[int]  # without the end token
    is_truncated: bool  # the token limit was reached first
    logprobs: list[float]  # natural log of each generated token's probability, end token included
    first_token_entropy: float  # nats

    @property
    def row(self) -> Row:
        """The row that was asked, as `Failure` has it."""
        return self.prompt.row


@dataclass(frozen=True)
class Failure:
    """A row that cannot be extracted, and why."""

    row: Row
    error: str


Outcome = Sample | Failure


@dataclass(frozen=True)
class Settings:
    """What the stored vectors depend on; all parts in an output directory must agree on it.

    Except for `dataset_sha256`: processes at work together must agree on it, a later run need not.
    """

    schema_version: int
    model_revision: str
    dtype: str
    layers: list[int]
    max_new_tokens: int
    prompt: str  # the chat template with {question}
    checkpoint_interval: int
    dataset_sha256: str  # of the four columns used


def describe_differences(stored: Mapping, current: Mapping) -> str:
    """The values that differ, old and new, as text for a message; empty if none do."""
    differing = [name for name in current if stored.get(name) != current[name]]
    return "; ".join(
        f"{name} was {stored.get(name)!r} and is {current[name]!r}" for name in differing
    )


# ─────────────────────────────────── reading rows and images ───────────────────────────────────
def read_rows(csv_path: Path) -> list[Row]:
    """Every row of the CSV. Texts stay as they are: `007`, `NA`, `None` and empty answers.

    Raises ExtractionError with the number of the line that is wrong.
    """
    csv.field_size_limit(sys.maxsize)
    rows: dict[str, Row] = {}
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = find_columns(list(reader.fieldnames or []))
            for fields in reader:
                row = make_row(fields, columns)
                if row.question_id in rows:
                    raise ValueError(f"question_id {row.question_id!r} appears twice")
                rows[row.question_id] = row
            if not rows:
                raise ValueError("no rows; expected a header line, then one line per question")
    except OSError as error:
        raise ExtractionError(f"cannot read {csv_path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ExtractionError(f"{csv_path} is not UTF-8: {error.reason} | convert it") from error
    except (csv.Error, ValueError) as error:
        advice = " | check the quotes there" if isinstance(error, csv.Error) else ""
        line_num = reader.reader.line_num
        raise ExtractionError(f"{csv_path}, line {line_num}: {error}{advice}") from error
    return list(rows.values())


def find_columns(header: list[str]) -> dict[str, str]:
    """What the CSV calls each field of `Row`. Raises ValueError if one is missing or ambiguous."""
    if not header:
        raise ValueError("no rows; expected a header line, then one line per question")
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise ValueError("it looks separated by semicolons or tabs: save it with commas")
    columns = {}
    for name, accepted in COLUMNS.items():
        present = [column for column in header if column in accepted]
        if not present:
            raise ValueError(f"column {' or '.join(accepted)} is not there; its columns: {header}")
        if len(present) > 1:
            raise ValueError(f"columns {' and '.join(present)} are both there; remove one")
        columns[name] = present[0]
    return columns


def make_row(fields: dict, columns: dict[str, str]) -> Row:
    """A line of the CSV as a `Row`. Raises ValueError."""
    if None in fields:  # where csv puts surplus values
        raise ValueError("more fields than the header; check its commas")
    if None in fields.values():
        raise ValueError("fewer fields than the header; check its commas")
    row = Row(**{name: fields[column] for name, column in columns.items()})
    if any("\0" in text for text in dataclasses.astuple(row)):
        raise ValueError("there is a NUL byte in it; remove it")
    if not row.question_id.strip():
        raise ValueError("the question_id is empty")
    return row


def group_by_image(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each image; images in the order in which they first appear."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image_id, []).append(row)
    return list(by_image.values())


def plan_parts(rows: list[Row], interval: int) -> list[list[Row]]:
    """The rows of each part: image by image, `interval` rows to a part."""
    ordered = [row for about_image in group_by_image(rows) for row in about_image]
    return [ordered[start : start + interval] for start in range(0, len(ordered), interval)]


def find_image(images_dir: Path, image_id: str) -> Path:
    """The path of an image. Raises RowError if it is no file, or not inside `images_dir`."""
    root = os.path.abspath(images_dir)
    path = os.path.normpath(os.path.join(root, image_id))
    if not image_id.strip() or not path.startswith(os.path.join(root, "")):
        raise RowError(f"image_id {image_id!r} does not name a file inside {images_dir}")
    if not os.path.isfile(path):  # a pipe, for example, would never end
        raise RowError(f"{path} does not exist, or is no file")
    return Path(path)


def open_image(images_dir: Path, image_id: str) -> tuple[Image.Image, str, bool]:
    """An image, upright and RGB; the sha256 of its file; whether it was partly transparent.

    Converting to RGB drops the transparency, as transformers does. Raises RowError.
    """
    path = find_image(images_dir, image_id)
    max_pixels = Image.MAX_IMAGE_PIXELS
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"{image.width} x {image.height} pixels are more than {max_pixels:,}"
                )
            if image.mode[0] in "IF":  # Pillow would cut off every value above 255
                raise ValueError(f"its mode is {image.mode}; convert it to 8 bits a channel")
            upright = ImageOps.exif_transpose(image)
        is_transparent = False
        if upright.has_transparency_data:
            is_transparent = upright.convert("RGBA").getchannel("A").getextrema()[0] < 255
        return upright.convert("RGB"), hashlib.sha256(content).hexdigest(), is_transparent
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything: struct.error, TypeError, ...
        reason = str(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it begins with {content[:16]!r}"
        raise RowError(f"{path} cannot be read as an image: {reason}") from error


def check_images(rows: list[Row], images_dir: Path) -> None:
    """Warn of images that are missing. Raises ExtractionError if all of them are."""
    image_ids = dict.fromkeys(row.image_id for row in rows)
    missing = []
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
ADAPTER_TENSOR = re.compile(
    r"(^|[._])(lora|loha|lokr|hada|ia3|oft|boft|vera|adapter|base_layer)[._]"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's small files: enough to plan and check a run before the weights are loaded."""

    name: str  # as the user gave it
    directory: Path
    revision: str  # the hub's commit; for a local directory a hash of what is in it
    config: transformers.PretrainedConfig
    processor: transformers.ProcessorMixin


@contextlib.contextmanager
def explain_load_errors(model_name: str) -> Iterator[None]:
    """Turn whatever a missing, gated or broken model raises into one line."""
    try:
        yield
    except ExtractionError:
        raise
    except Exception as error:  # validation in transformers has exceptions of its own
        reason = " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
        advice = ""
        if isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError)):
            page = f"https://huggingface.co/{model_name}"
            advice = f" | if it is gated, accept its licence at {page} and run `hf auth login`; "
            advice += "if it is on this machine, name the place: --cache-dir or --model DIR"
        elif isinstance(error, OSError):
            advice = " | the directory must contain the whole model, with *.safetensors weights"
        raise ExtractionError(f"cannot load {model_name}: {reason}{advice}") from error


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory ran out, of the device or of the host; libraries say so in several ways."""
    signs = ("ALLOC_FAILED", "out of memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in signs
    )


def find_checkpoint(name: str, hub_revision: str, cache_dir: Path | None) -> Checkpoint:
    """The model's small files, downloaded if need be. Raises ValueError if we cannot run it."""
    directory = Path(name)
    is_local = directory.is_dir()
    if not is_local:
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ExtractionError(f"--model {name}: there is no such directory | check the path")
        directory = find_in_hub(name, hub_revision, cache_dir)
    check_which_weights(directory, is_local)
    config = transformers.AutoConfig.from_pretrained(directory)
    if config.model_type != "gemma3":
        raise ValueError(f"its type is {config.model_type}; expected gemma3 (4B, 12B or 27B)")
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "some method")
        raise ValueError(f"quantised weights ({method}) are not supported; take the original ones")
    # With torchvision's backend pixels differ by 1/255 in places; Pillow is always there.
    processor = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    if not processor.chat_template:
        raise ValueError(
            "it has no chat template, like all base checkpoints; take the instruction-tuned one "
            "(-it), or copy its chat_template.jinja into the directory"
        )
    revision = hash_local_model(directory) if is_local else directory.name
    return Checkpoint(name, directory, revision, config, processor)


def find_in_hub(name: str, revision: str, cache_dir: Path | None) -> Path:
    """The snapshot of a hub's model: a whole one in the machine's cache, or our own download."""
    if cache_dir is None:
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
            names = {"config.json", "tokenizer_config.json"} | list_weights(cached)
            has_rest = any(cached.glob("tokenizer.*")) and any(
                cached.glob("*processor_config.json")
            )
            if has_rest and all((cached / needed).exists() for needed in names):
                log.info("the model is in this machine's Hugging Face cache: %s", cached)
                return cached
        cache_dir = Path("model_cache")
    snapshot = snapshot_download(
        name, revision=revision, cache_dir=cache_dir, allow_patterns=SMALL_FILES
    )
    return Path(snapshot)


def list_weights(directory: Path) -> set[str]:
    """The names of the files that the weights are in."""
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        return {WEIGHTS_NAME}
    return set(json.loads(index_path.read_text())["weight_map"].values())


def download_weights(checkpoint: Checkpoint) -> None:
    """Download the weights of a hub's model, unless they are all there."""
    directory = checkpoint.directory
    has_all = all((directory / name).exists() for name in list_weights(directory))
    if has_all or Path(checkpoint.name).is_dir():
        return
    snapshot_download(
        checkpoint.name,
        revision=checkpoint.revision,
        cache_dir=directory.parents[2],  # of {cache_dir}/models--org--name/snapshots/{commit}
        allow_patterns=["*.safetensors"],
    )


def check_which_weights(directory: Path, is_local: bool) -> None:
    """Raises ExtractionError where it is unclear which weights of a directory are meant."""
    for path in directory.glob("adapter_*"):
        raise ExtractionError(
            f"{directory} has an adapter beside the weights ({path.name}) "
            "| merge it into the weights first, or remove it"
        )
    has_both = (directory / WEIGHTS_NAME).exists() and (directory / INDEX_NAME).exists()
    if is_local and has_both and WEIGHTS_NAME not in list_weights(directory):
        raise ExtractionError(
            f"{directory} has both {WEIGHTS_NAME} and {INDEX_NAME}, and transformers would load "
            "the first | remove the one that is out of date"
        )


def hash_local_model(directory: Path) -> str:
    """A hash of the small files and of each tensor's name, shape, type and first 64 KiB."""
    digest = hashlib.sha256()
    small = [path for pattern in SMALL_FILES for path in directory.glob(pattern)]
    for path in sorted(small):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            # The format: eight bytes with the header's length, the header as JSON, the tensors.
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(min(header_size, path.stat().st_size))
            digest.update(header)
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    file.seek(8 + header_size + start)
                    digest.update(file.read(min(stop - start, HASHED_BYTES)))
    return digest.hexdigest()


def choose_layers(requested: tuple[int, ...] | str | None, num_layers: int) -> list[int]:
    """Indices of the layers to store, sorted. The default is HALP's: first, quarters and last."""
    if requested == "all":
        return list(range(num_layers))
    quarters = (0, num_layers // 4, num_layers // 2, 3 * num_layers // 4, num_layers - 1)
    chosen = requested or quarters
    for layer_idx in chosen:
        if not -num_layers <= layer_idx < num_layers:
            raise ExtractionError(
                f"--layers {layer_idx}: the model has layers 0 to {num_layers - 1}"
            )
    return sorted({layer_idx % num_layers for layer_idx in chosen})


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, device_map: str | None
) -> nn.Module:
    """The whole model in evaluation mode, from safetensors. Raises ValueError if any is missing."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    # cuDNN's attention plans anew for each length, 23 to 37 ms each, and decoding has a new length
    # at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    placement, max_memory = place_weights(checkpoint.config, dtype, device, device_map)
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint.directory,
        dtype=dtype,
        attn_implementation="sdpa",  # flash attention cannot carry the image mask
        use_safetensors=True,
        output_loading_info=True,
        device_map=placement,
        max_memory=max_memory,
    )
    check_tensors(report)
    use_rms_norm(model, fused_rms_norm)
    return model.eval()


def check_tensors(report: dict) -> None:
    """Look at what transformers says of the tensors that it loaded. Raises ValueError."""
    unknown = sorted(report["unexpected_keys"])
    if adapted := [name for name in unknown if ADAPTER_TENSOR.search(name)]:
        raise ValueError(f"an adapter is in its weights ({adapted[0]} ...); merge it first")
    absent = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ValueError(f"{len(absent)} weights are missing or misshapen, first {absent[0]}")
    if unknown:
        log.warning("%d tensors are not Gemma 3's and not used: %s ...", len(unknown), unknown[0])


def fused_rms_norm(norm: Gemma3RMSNorm, hidden_states: Tensor) -> Tensor:
    """What `Gemma3RMSNorm.forward` computes, in three operations instead of ten."""
    if not hasattr(norm, "scale"):  # made at the first call, when an offloaded weight is there
        norm.scale = 1.0 + norm.weight.detach().float()
    normed = nn.functional.rms_norm(hidden_states.float(), norm.scale.shape, norm.scale, norm.eps)
    return normed.type_as(hidden_states)


def use_rms_norm(model: nn.Module, forward: Callable[[Gemma3RMSNorm, Tensor], Tensor]) -> None:
    """Let every Gemma3RMSNorm of the model run this `forward`."""
    for module in model.modules():
        if isinstance(module, Gemma3RMSNorm):
            # accelerate wraps `forward` where it offloads or spreads, and calls `_old_forward`.
            name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(module, name, types.MethodType(forward, module))


def list_cards(device: torch.device, device_map: str | None) -> list[int]:
    """The CUDA cards that the model goes to; none on another device."""
    if device.type != "cuda":
        return []
    return list(range(torch.cuda.device_count())) if device_map else [device.index]


def working_memory(dtype: torch.dtype) -> int:
    """Bytes that a pass needs on a card beside weights and lanes."""
    return WORKING_MEMORY * dtype.itemsize // torch.bfloat16.itemsize


def place_weights(
    config, dtype: torch.dtype, device: torch.device, device_map: str | None
) -> tuple[str | dict, dict | None]:
    """`device_map` and `max_memory` for transformers.

    Room for lanes and activations is set aside first. Weights that do not fit into the rest stay in
    host memory, and the log says so.
    """
    room = {}
    for card in list_cards(device, device_map):
        free = torch.cuda.mem_get_info(card)[0]
        # A tenth is left for lanes.
        room[card] = max(0, int(0.9 * free) - working_memory(dtype))
    host_memory = {"cpu": get_max_memory()["cpu"]}
    if not room:
        return (device_map, host_memory) if device_map else ({"": device}, None)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    num_offloaded_bytes = model.num_parameters() * dtype.itemsize - sum(room.values())
    if num_offloaded_bytes <= 0 and device_map is None:
        return {"": device}, None
    if num_offloaded_bytes > 0:
        log.info("%.1f GiB of the weights stay in host memory: slower", num_offloaded_bytes / 2**30)
    return "auto", room | host_memory


def choose_batch_size(config, dtype: torch.dtype, cards: list[int], num_slots: int) -> int:
    """How many lanes of `num_slots` tokens suit the cards, or a CPU; the log says why."""
    if not cards:
        log.info("batch size %d: a fixed number where there is no CUDA card", CPU_BATCH_SIZE)
        return CPU_BATCH_SIZE
    free = min(torch.cuda.mem_get_info(card)[0] for card in cards)
    batch_size = fit_batch_size(free, config, dtype, num_slots)
    log.info("batch size %d: %.1f GiB are free beside the model", batch_size, free / 2**30)
    return batch_size


def fit_batch_size(free: int, config, dtype: torch.dtype, num_slots: int) -> int:
    """How many lanes fit into `free` bytes beside the working memory, a twentieth to spare."""
    text = config.text_config
    num_values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # of a slot
    num_lanes = (0.95 * free - working_memory(dtype)) / (num_values * dtype.itemsize * num_slots)
    return max(1, min(MAX_BATCH_SIZE, int(num_lanes)))


# ──────────────────────────────── prompts, and images read ahead ───────────────────────────────
class Prompter:
    """Turns questions and images into what the model reads, with the model's own processor.

    `prefix` is the token ids up to and including <end_of_image>, the same in every prompt; its
    image soft tokens are at `soft_start` to `soft_stop - 1`.
    """

    def __init__(self, processor, config) -> None:
        self.processor = processor
        self._tokenizer = processor.tokenizer
        added = self._tokenizer.added_tokens_decoder
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        self._special_ids.add(config.image_token_id)
        self._tokenizer_lock = threading.Lock()  # it must not serve two threads at once
        example = "Is this a Dog?"
        if example not in self.render(example):
            raise ValueError("its chat template changes the question")
        if self.render(example) == self.render(example, add_generation_prompt=False):
            raise ValueError("its chat template has no generation prompt")
        plain = self._encode("?")
        if plain.count(self._tokenizer.bos_token_id) != 1:
            raise ValueError("its chat template does not give exactly one <bos>")
        soft = [pos for pos, token_id in enumerate(plain) if token_id == config.image_token_id]
        if len(soft) != config.mm_tokens_per_image or soft != list(range(soft[0], soft[-1] + 1)):
            raise ValueError(f"{len(soft)} image soft tokens in a prompt, or not in one run")
        self.soft_start = soft[0]
        self.soft_stop = soft[-1] + 1
        self.prefix = plain[: self.soft_stop + 1]
        self._plain_specials = [token_id for token_id in plain if token_id in self._special_ids]
        self.end_of_turn = self._find_end_of_turn()

    def render(self, question: str, add_generation_prompt: bool = True) -> str:
        """The chat template with one user turn, image then question, and the generation prompt."""
        turns = [make_user_turn({"type": "image"}, question)]
        return self.processor.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _encode(self, question: str) -> list[int]:
        boi_token = self.processor.boi_token
        full_image = self.processor.full_image_sequence
        text = self.render(question).replace(boi_token, full_image, 1)  # the image comes first
        with self._tokenizer_lock:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, question: str) -> list[int]:
        """`input_ids` [T]. Raises RowError if the question is empty or has special tokens in it."""
        if not question.strip():
            raise RowError("the question is empty")
        input_ids = self._encode(question)
        specials = [token_id for token_id in input_ids if token_id in self._special_ids]
        if specials != self._plain_specials:
            names = sorted(set(self._tokenizer.convert_ids_to_tokens(specials)))
            found = " ".join(name for name in names if name in question)
            raise RowError(f"the question has special tokens in its text: {found}")
        if input_ids[: len(self.prefix)] != self.prefix:
            raise RowError("its prompt does not begin like those of other questions")
        return input_ids

    def _find_end_of_turn(self) -> int | None:
        """The special token that the chat template puts after a model's turn."""
        answer = {"role": "assistant", "content": [{"type": "text", "text": "?"}]}
        turns = [make_user_turn({"type": "image"}, "?"), answer]
        text = self.processor.apply_chat_template(turns, tokenize=False)
        after_answer = text.rpartition("?")[2]
        input_ids = self._tokenizer(after_answer, add_special_tokens=False)["input_ids"]
        return next((token_id for token_id in input_ids if token_id in self._special_ids), None)

    def pixels(self, image: Image.Image) -> Tensor:
        """`pixel_values` of one image, [3, height, width], float32."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def decode(self, answer_ids: list[int]) -> str:
        """An answer's text: without special tokens, whitespace kept."""
        with self._tokenizer_lock:
            text = self._tokenizer.decode(
                answer_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # NUL would end a string in HDF5


def make_user_turn(image: dict, question: str) -> dict:
    """A user's turn for a chat template: the image, then the question."""
    return {"role": "user", "content": [image, {"type": "text", "text": question}]}


@dataclass
class ImageReader:
    """Reads images and their questions in threads, while the model works on earlier ones."""

    prompter: Prompter
    images_dir: Path
    dtype: torch.dtype
    num_workers: int
    is_pinned: bool  # images are in memory that a card copies from while it computes
    transparent: dict[str, None] = field(default_factory=dict)  # image_ids, in order

    def read_ahead(
        self, parts: Iterable[list[Row]], on_failure: Callable[[Failure], None]
    ) -> Iterator[PreparedImage]:
        """Images with their prompts, in order. Rows that cannot be read go to `on_failure`.

        Only a few images are in memory at a time.
        """
        by_image = (about_image for rows in parts for about_image in group_by_image(rows))
        with ThreadPoolExecutor(self.num_workers) as pool:
            jobs = (pool.submit(self.prepare_image, rows) for rows in by_image)
            pending = deque(itertools.islice(jobs, 2 * self.num_workers + 1))
            try:
                while pending:
                    image, failures = pending.popleft().result()
                    for failure in failures:
                        on_failure(failure)
                    if image is not None:
                        yield image
                    pending.extend(itertools.islice(jobs, 1))
            finally:
                pool.shutdown(cancel_futures=True)

    def prepare_image(self, rows: list[Row]) -> tuple[PreparedImage | None, list[Failure]]:
        """What the model reads of the rows about one image, and the rows that cannot be read."""
        prompts = []
        failures = []
        for row in rows:
            try:
                prompts.append(Prompt(row, self.prompter.tokenize(row.question)))
            except RowError as error:
                failures.append(Failure(row, str(error)))
        if not prompts:
            return None, failures
        image_id = rows[0].image_id
        try:
            image, sha256, is_transparent = open_image(self.images_dir, image_id)
        except RowError as error:
            return None, failures + [Failure(prompt.row, str(error)) for prompt in prompts]
        if is_transparent:
            self.transparent[image_id] = None
        pixel_values = self.prompter.pixels(image).to(self.dtype)
        if self.is_pinned:
            pixel_values = pixel_values.pin_memory()
        return PreparedImage(pixel_values, sha256, prompts), failures


# ──────────────────────────────────────────── hooks ────────────────────────────────────────────
@dataclass(eq=False)
class CapturedStates:
    """What the hooks saw in one pass over n rows: float32, still on the device."""

    patch_mean: Tensor | None = None  # [n, D_v]; None where the vision tower did not run
    kept_tokens: list[Tensor] = field(default_factory=list)  # [n, D] for each hooked layer
    token_sums: list[Tensor] = field(default_factory=list)  # [n, D] for each hooked layer


@contextlib.contextmanager
def capture_states(
    model: nn.Module, layers: list[int], token_pos: Tensor, is_padding: Tensor
) -> Iterator[CapturedStates]:
    """Forward hooks on the vision tower and the chosen decoder layers, for one pass over n rows.

    Of each layer's output they keep the token at index `token_pos` [n] of each row, and the sum
    over its tokens except where `is_padding` [n, L]. All hooks are removed at the end.
    """
    states = CapturedStates()
    # Both are on the device already: a copy during the pass would stall the card. If the model is
    # spread over several cards, each of the others gets one copy.
    places = {token_pos.device: (token_pos[:, None, None], is_padding[:, :, None])}

    def on_vision_tower(module, args, output) -> None:
        states.patch_mean = output.last_hidden_state.mean(dim=1, dtype=torch.float32)

    def on_decoder_layer(module, args, output: Tensor) -> None:
        device = output.device
        if device not in places:
            places[device] = tuple(index.to(device) for index in places[token_pos.device])
        index, padding = places[device]
        states.kept_tokens.append(torch.take_along_dim(output, index, dim=1)[:, 0].float())
        states.token_sums.append(output.masked_fill(padding, 0).sum(dim=1, dtype=torch.float32))

    with contextlib.ExitStack() as hooks:  # a handle's `__exit__` removes its hook
        hooks.enter_context(model.model.vision_tower.register_forward_hook(on_vision_tower))
        for layer_idx in layers:
            layer = model.model.language_model.layers[layer_idx]
            hooks.enter_context(layer.register_forward_hook(on_decoder_layer))
        yield states


def to_numpy(tensors: list[Tensor]) -> np.ndarray:
    """Tensors [n, ...] as one array [n, tensors, ...] in host memory, read in one copy."""
    device = tensors[0].device
    return torch.stack([tensor.to(device) for tensor in tensors], dim=1).cpu().numpy()


# ──────────────────────────────────────────── lanes ────────────────────────────────────────────
class Lanes:
    """The keys and values of all sequences that are running, one lane for each.

    Those of a layer are one tensor [2, lanes, kv_heads, slots, head_dim] on the layer's device. A
    slot is a position in the prompt and its answer. A token attends to its own lane only, up to
    itself. Later slots must still hold finite values: attention weights them by 0, and 0 x NaN is
    NaN.
    """

    def __init__(self) -> None:
        self.num_lanes = 0
        self.num_slots = 0
        self.layers: list[Tensor] = []

    def resize(self, num_lanes: int, num_slots: int, num_kept: int, cache) -> None:
        """Make it this size, layer by layer; the first `num_kept` lanes keep what is in them."""
        if (num_lanes, num_slots) == (self.num_lanes, self.num_slots):
            return
        num_shared = min(num_slots, self.num_slots)
        if not num_kept:
            self.layers = []
        for layer_idx, layer in enumerate(cache.layers):
            _, num_heads, _, head_dim = layer.keys.shape
            resized = layer.keys.new_empty(2, num_lanes, num_heads, num_slots, head_dim)
            if num_kept:
                old = self.layers[layer_idx]
                resized[:, :num_kept, :, :num_shared] = old[:, :num_kept, :, :num_shared]
                resized[:, :num_kept, :, num_shared:] = 0
                self.layers[layer_idx] = resized  # a layer's old ones are freed before the next
            else:
                self.layers.append(resized)
        self.num_lanes = num_lanes
        self.num_slots = num_slots

    def fill(self, start: int, cache, image_indices: list[int]) -> None:
        """Copy the prefix of one of the cache's images into each lane from `start` on.

        The slots behind it become 0, whatever an earlier sequence has left there.
        """
        index = torch.tensor(image_indices)
        stop = start + len(image_indices)
        for cached, layer in zip(cache.layers, self.layers, strict=True):
            index = index.to(layer.device)
            num_filled = cached.keys.shape[2]
            filled = layer[:, start:stop, :, :num_filled]
            torch.index_select(cached.keys, 0, index, out=filled[0])
            torch.index_select(cached.values, 0, index, out=filled[1])
            layer[:, start:stop, :, num_filled:] = 0

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Copy lanes into others, (source, target) each."""
        if not moves:
            return
        index = torch.tensor(moves)  # [moves, 2]
        for layer in self.layers:
            index = index.to(layer.device)
            layer[:, index[:, 1]] = layer[:, index[:, 0]]


class LaneCache:
    """n of the lanes, for one pass, as the cache that transformers' layers take.

    Given masks and positions, Gemma's decoder calls nothing of it but `update`.
    """

    def __init__(self, lanes: Lanes, lane_ids: list[int], positions: Tensor, num_used: int) -> None:
        self._layers = lanes.layers
        self._positions = positions  # [n, L]
        self._num_used = num_used  # slots, of each lane, in which there may be tokens
        start = lane_ids[0]
        stop = start + len(lane_ids)
        self._slice = None
        if lane_ids == list(range(start, stop)):
            self._slice = slice(start, stop)  # which gives a view, where an index copies
            self._index = torch.arange(start, stop, device=positions.device)  # [n]
        else:
            self._index = torch.tensor(lane_ids).to(positions.device, non_blocking=True)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_, **__) -> tuple:
        """Store new keys and values [n, kv_heads, L, head_dim]; returns all of their lanes'."""
        layer = self._layers[layer_idx]  # [2, lanes, kv_heads, slots, head_dim]
        index = self._index.to(keys.device)
        positions = self._positions.to(keys.device)
        layer[0][index[:, None], :, positions] = keys.transpose(1, 2)  # [n, L, kv_heads, head_dim]
        layer[1][index[:, None], :, positions] = values.transpose(1, 2)
        chosen = index if self._slice is None else self._slice
        used = layer[:, chosen, :, : self._num_used]
        return used[0], used[1]


def causal_masks(
    positions: Tensor, num_slots: int, window: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Additive attention masks [n, 1, L, slots] for tokens at `positions` [n, L], by layer type.

    A token attends to its lane up to itself; in sliding layers to the last `window` positions, its
    own included.
    """
    slots = torch.arange(num_slots, device=positions.device)
    distance = positions[:, None, :, None] - slots  # [n, 1, L, slots]
    is_later = distance < 0
    is_too_far = distance >= window
    zero = torch.zeros((), dtype=dtype, device=positions.device)
    return {
        "full_attention": zero.masked_fill(is_later, -math.inf),
        "sliding_attention": zero.masked_fill(is_later | is_too_far, -math.inf),
    }


# ───────────────────────────────────────── scheduling ──────────────────────────────────────────
def lane_slots(num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Slots of a lane for a prompt and its answer, rounded up so that lengths seldom differ."""
    return math.ceil((num_prompt_tokens + max_new_tokens) / 64) * 64


def usual_lane_slots(num_prefix: int, max_new_tokens: int) -> int:
    """Slots of a lane for a question of typical length."""
    return lane_slots(num_prefix + TYPICAL_QUESTION, max_new_tokens)


class Scheduler:
    """Which sequences wait, which run in which lane, and which are run together.

    It holds no tensors. Running sequences occupy lanes 0, 1, 2, ...; one that ends leaves a gap,
    which is still computed until `close_gaps`. All lanes are equally wide: wide enough for a
    typical question, or for the longest running prompt if that needs more. The total never exceeds
    `batch_size` lanes of the usual width, so a long prompt leaves room for fewer lanes.
    """

    def __init__(
        self, batch_size: int, num_prefix: int, max_new_tokens: int, max_pass_tokens: int
    ) -> None:
        self.batch_size = batch_size
        self.waiting: deque[Sequence] = deque()  # encoded, and without a lane yet
        self.running: list[Sequence | None] = []  # by lane; None is a gap
        self._admitted: list[Sequence] = []  # since the last prefill
        self._num_prefix = num_prefix
        self._max_new_tokens = max_new_tokens
        self._max_pass_tokens = max_pass_tokens
        self._usual_slots = usual_lane_slots(num_prefix, max_new_tokens)
        self.num_slots = self._usual_slots  # of each lane

    @property
    def num_running(self) -> int:
        """How many sequences are being answered; gaps do not count."""
        return sum(sequence is not None for sequence in self.running)

    @property
    def num_lanes(self) -> int:
        """How many lanes of the present width there may be."""
        return self._count_lanes(self.num_slots)

    def wants_more(self) -> bool:
        """Whether a quarter of the batch is free: a few large passes are faster than many small."""
        num_free = self.batch_size - self.num_running
        return not self.num_running or 4 * num_free >= self.batch_size

    def close_gaps(self) -> list[tuple[int, int]]:
        """Move the last running sequences into the gaps: (source, target) of each lane."""
        num_running = self.num_running
        gaps = [lane for lane in range(num_running) if self.running[lane] is None]
        behind = [sequence for sequence in self.running[num_running:] if sequence is not None]
        moves = []
        for gap, sequence in zip(gaps, behind, strict=True):
            moves.append((sequence.lane, gap))
            sequence.lane = gap
            self.running[gap] = sequence
        del self.running[num_running:]
        self.num_slots = max(map(self._slots_for, self.running), default=self._usual_slots)
        return moves

    def has_room(self) -> bool:
        """Whether the next sequence fits beside the running ones; alone, any does.

        One that is too long blocks those behind it, so that none waits for ever.
        """
        width = self.num_slots
        if self.waiting:
            width = max(width, self._slots_for(self.waiting[0]))
        return len(self.running) < self._count_lanes(width)

    def admit(self) -> list[Sequence]:
        """Give lanes to as many waiting sequences as there is room for."""
        admitted = []
        while self.waiting and self.has_room():
            sequence = self.waiting.popleft()
            sequence.lane = len(self.running)
            self.running.append(sequence)
            self.num_slots = max(self.num_slots, self._slots_for(sequence))
            admitted.append(sequence)
        self._admitted += admitted
        return admitted

    def prefill_batches(self) -> list[list[Sequence]]:
        """The sequences admitted since the last call, in batches of similar length.

        Each batch is padded to its longest prompt, so similar lengths waste the least.
        """
        by_length = sorted(self._admitted, key=self._num_suffix_tokens)
        self._admitted = []
        batches: list[list[Sequence]] = []
        for sequence in by_length:
            num_tokens = self._num_suffix_tokens(sequence)  # the longest so far
            if batches and (len(batches[-1]) + 1) * num_tokens <= self._max_pass_tokens:
                batches[-1].append(sequence)
            else:
                batches.append([sequence])
        # Lanes that are side by side need not be copied to be run.
        return [sorted(batch, key=operator.attrgetter("lane")) for batch in batches]

    def finish(self, sequence: Sequence) -> None:
        """Its answer has ended: its lane is a gap from here on."""
        self.running[sequence.lane] = None

    def _count_lanes(self, num_slots: int) -> int:
        return max(1, self.batch_size * self._usual_slots // num_slots)

    def _slots_for(self, sequence: Sequence) -> int:
        num_slots = lane_slots(len(sequence.prompt.input_ids), self._max_new_tokens)
        return max(self._usual_slots, num_slots)

    def _num_suffix_tokens(self, sequence: Sequence) -> int:
        return len(sequence.prompt.input_ids) - self._num_prefix


# ───────────────────────────────────────── extraction ──────────────────────────────────────────
class Extractor:
    """The loaded model, and the passes that turn images and prompts into states and answers.

    Each image goes through the vision tower and the prefix once, and each question's own tokens go
    through the decoder once. States and answers come from the same pass.
    """

    def __init__(
        self,
        model: nn.Module,
        prompter: Prompter,
        layers: list[int],
        max_new_tokens: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.prompter = prompter
        self.layers = layers
        self.max_new_tokens = max_new_tokens
        self.device = device  # not `model.device`, which is meta where the tower is offloaded
        is_cpu = device.type == "cpu"
        self.max_pass_images = 1 if is_cpu else MAX_PASS_IMAGES
        self.max_pass_tokens = CPU_PASS_TOKENS if is_cpu else MAX_PASS_TOKENS
        end_ids = model.generation_config.eos_token_id
        self.end_ids = set(end_ids) if isinstance(end_ids, list) else {end_ids}
        self.restart(batch_size)

    def restart(self, batch_size: int) -> None:
        """Drop all that is unfinished, and begin with another batch size."""
        self.scheduler = Scheduler(
            batch_size, len(self.prompter.prefix), self.max_new_tokens, self.max_pass_tokens
        )
        self.lanes = Lanes()
        self._prefix_cache = None  # keys and values of the images that were encoded last
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def run(self, images: Iterator[PreparedImage]) -> Iterator[list[Outcome]]:
        """Yield after each pass the outcomes that it completed, often none.

        Which sequences share a pass depends only on the order of images, the batch size and when
        answers end, never on timing.
        """
        scheduler = self.scheduler
        is_exhausted = False
        while not is_exhausted or scheduler.waiting or scheduler.num_running:
            if scheduler.wants_more():
                self.lanes.move(scheduler.close_gaps())
                while scheduler.has_room():
                    if not scheduler.waiting:
                        num_images = min(scheduler.batch_size, self.max_pass_images)
                        chunk = list(itertools.islice(images, num_images))
                        if not chunk:
                            is_exhausted = True
                            break
                        self.encode(chunk)
                        yield []  # a chance to stop between two passes
                    self._fill_lanes(scheduler.admit())
                for sequences in scheduler.prefill_batches():
                    yield self.prefill(sequences)
            if scheduler.num_running:
                yield self.decode()

    def encode(self, images: list[PreparedImage]) -> None:
        """Run images through the vision tower, and the prefix with them through the decoder."""
        prompter = self.prompter
        pixel_values = torch.stack(
            [image.pixel_values.to(self.device, non_blocking=True) for image in images]
        )
        input_ids = self._to_device(prompter.prefix).expand(len(images), -1)  # [images, prefix]
        is_soft = input_ids == self.model.config.image_token_id
        is_padding = torch.zeros_like(is_soft)
        last_soft = torch.full((len(images),), prompter.soft_stop - 1, device=self.device)
        # Without a config it keeps all positions; with one, sliding layers keep their window.
        self._prefix_cache = transformers.DynamicCache()
        with capture_states(self.model, self.layers, last_soft, is_padding) as states:
            self.model.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                token_type_ids=is_soft.int(),
                past_key_values=self._prefix_cache,
                use_cache=True,
            )
        patch_means = to_numpy([states.patch_mean])  # [images, 1, D_v]
        vision_tokens = to_numpy(states.kept_tokens)  # [images, layers, D]
        prefix_sums = to_numpy(states.token_sums)  # [images, layers, D]
        for i, image in enumerate(images):
            encoded = EncodedImage(
                image.image_sha256, i, patch_means[i, 0], vision_tokens[i], prefix_sums[i]
            )
            self.scheduler.waiting += [Sequence(prompt, encoded) for prompt in image.prompts]

    def _fill_lanes(self, admitted: list[Sequence]) -> None:
        """Copy the prefixes of their images into the lanes of sequences that were just admitted."""
        if not admitted:  # the next one is too long for the room that there is
            return
        scheduler = self.scheduler
        start = admitted[0].lane
        self.lanes.resize(scheduler.num_lanes, scheduler.num_slots, start, self._prefix_cache)
        image_indices = [sequence.image.cache_index for sequence in admitted]
        self.lanes.fill(start, self._prefix_cache, image_indices)
        if not scheduler.waiting:
            self._prefix_cache = None

    def prefill(self, sequences: list[Sequence]) -> list[Outcome]:
        """Run the prompts' tokens after the prefix: their states, and the answers' first tokens."""
        num_prefix = len(self.prompter.prefix)
        suffix_ids = [sequence.prompt.input_ids[num_prefix:] for sequence in sequences]
        num_longest = max(map(len, suffix_ids))
        padded = [ids + [0] * (num_longest - len(ids)) for ids in suffix_ids]
        input_ids = self._to_device(padded)  # [n, L]
        last_pos = self._to_device([len(ids) - 1 for ids in suffix_ids])  # [n]
        offsets = torch.arange(num_longest, device=self.device)  # [L]
        positions = (num_prefix + offsets).expand_as(input_ids)  # [n, L]
        lane_ids = [sequence.lane for sequence in sequences]
        is_padding = offsets > last_pos[:, None]  # [n, L]
        with capture_states(self.model, self.layers, last_pos, is_padding) as states:
            hidden_states = self._forward(lane_ids, input_ids, positions, num_prefix + num_longest)
        if not self.max_new_tokens:
            self._keep_states(sequences, states)
            return [self._finish(sequence) for sequence in sequences]
        index = last_pos[:, None, None].to(hidden_states.device)  # another card under device_map
        last = torch.take_along_dim(hidden_states, index, dim=1)  # [n, 1, D]
        logits = self._logits(last[:, 0])
        chosen = choose_tokens(logits)
        first_token = torch.distributions.Categorical(logits=logits, validate_args=False)
        entropy = first_token.entropy().double()
        # Reading waits for the card, so nothing is read before all has been started.
        self._keep_states(sequences, states)
        tokens, logprobs, entropies = to_numpy([*chosen, entropy]).T.tolist()
        for sequence, entropy in zip(sequences, entropies, strict=True):
            sequence.first_token_entropy = entropy
        return self._add_tokens(sequences, tokens, logprobs)

    @staticmethod
    def _keep_states(sequences: list[Sequence], states: CapturedStates) -> None:
        """Read what the hooks saw of the prompts' ends."""
        query_tokens = to_numpy(states.kept_tokens)  # [n, layers, D]
        suffix_sums = to_numpy(states.token_sums)  # [n, layers, D]
        for i, sequence in enumerate(sequences):
            sequence.query_token = query_tokens[i]
            sequence.suffix_sum = suffix_sums[i]

    def decode(self) -> list[Outcome]:
        """The next token of all running sequences."""
        running = list(self.scheduler.running)
        last_ids = [0] * len(running)  # what a gap is given has no effect
        positions = [0] * len(running)
        for lane, sequence in enumerate(running):
            if sequence is not None:
                last_ids[lane] = sequence.generated_ids[-1]
                num_tokens = len(sequence.prompt.input_ids) + len(sequence.generated_ids)
                positions[lane] = num_tokens - 1
        both = self._to_device([last_ids, positions])[:, :, None]  # [2, n, 1], in one copy
        lane_ids = list(range(len(running)))
        hidden_states = self._forward(lane_ids, both[0], both[1], max(positions) + 1)  # [n, 1, D]
        chosen = choose_tokens(self._logits(hidden_states[:, 0]))
        tokens, logprobs = to_numpy(chosen).T.tolist()
        return self._add_tokens(running, tokens, logprobs)

    def _to_device(self, values: list) -> Tensor:
        return torch.tensor(values).to(self.device, non_blocking=True)

    def _forward(
        self, lane_ids: list[int], input_ids: Tensor, positions: Tensor, num_used: int
    ) -> Tensor:
        """Run tokens [n, L] in n lanes with `num_used` slots in use; returns hidden [n, L, D]."""
        aligned = math.ceil(num_used / 8) * 8  # for attention's kernels
        num_used = min(aligned, self.lanes.num_slots)
        window = self.model.config.text_config.sliding_window
        output = self.model.model.language_model(
            input_ids=input_ids,
            attention_mask=causal_masks(positions, num_used, window, self.model.dtype),
            position_ids=positions,
            past_key_values=LaneCache(self.lanes, lane_ids, positions, num_used),
        )
        return output.last_hidden_state

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """The head's logits [n, vocabulary], float32, of normed states [n, D]."""
        head = self.model.lm_head
        if self.device.type == "cpu" and not head.weight.is_meta:
            # The same product the other way round: for few rows a CPU takes half the time.
            return (head.weight @ hidden_states.T).T.contiguous().float()
        return head(hidden_states).float()

    def _add_tokens(
        self, sequences: list[Sequence | None], tokens: list[float], logprobs: list[float]
    ) -> list[Outcome]:
        """Give each running sequence its next token; those that have come to an end leave."""
        outcomes = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            if sequence is None:
                continue
            sequence.generated_ids.append(int(token))
            sequence.logprobs.append(logprob)
            has_ended = self.has_ended(sequence)
            is_at_limit = len(sequence.generated_ids) == self.max_new_tokens
            # After NaN nothing sensible comes: `_finish` makes a failure of it.
            if has_ended or is_at_limit or not math.isfinite(logprob):
                sequence.is_truncated = not has_ended
                outcomes.append(self._finish(sequence))
        return outcomes

    def has_ended(self, sequence: Sequence) -> bool:
        """Whether the last token of an answer is one that ends it."""
        return sequence.generated_ids[-1] in self.end_ids

    def _finish(self, sequence: Sequence) -> Outcome:
        """Free the sequence's lane and turn it into a Sample, or a Failure if it has NaN or inf."""
        self.scheduler.finish(sequence)
        prompt = sequence.prompt
        image = sequence.image
        token_sum = image.prefix_sum + sequence.suffix_sum
        states = {  # [layers, D] each
            VISION_TOKEN: image.vision_token,
            QUERY_TOKEN: sequence.query_token,
            MULTIMODAL: token_sum / np.float32(len(prompt.input_ids)),
        }
        vectors = {VISION: image.patch_mean}
        for kind, by_layer in states.items():
            for layer_idx, vector in zip(self.layers, by_layer, strict=True):
                vectors[f"{kind}/layer_{layer_idx}"] = vector
        if not all(np.isfinite(vector).all() for vector in vectors.values()):
            return Failure(prompt.row, "its states are not finite")
        if not np.isfinite(sequence.logprobs).all():
            return Failure(prompt.row, "the logits of its answer are not finite")
        generated_ids = sequence.generated_ids
        answer_ids = generated_ids if sequence.is_truncated else generated_ids[:-1]
        return Sample(
            prompt,
            image.image_sha256,
            vectors,
            answer_ids=answer_ids,
            is_truncated=sequence.is_truncated,
            logprobs=sequence.logprobs,
            first_token_entropy=sequence.first_token_entropy,
        )


def choose_tokens(logits: Tensor) -> list[Tensor]:
    """Of logits [n, vocabulary] the likeliest tokens and their log-probabilities, [n] each.

    Both are float64, which represents every token id, so that they are read in one copy.
    """
    best, tokens = logits.max(dim=-1)
    logprobs = best - logits.logsumexp(dim=-1)
    return [tokens.double(), logprobs.double()]


# ─────────────────────────────── parts: whole, or not there ────────────────────────────────────
def group_name(question_id: str) -> str:
    """A name that HDF5 takes; `urllib.parse.unquote` gives the question_id back."""
    name = question_id.replace("%", "%25").replace("/", "%2F")
    return name.replace(".", "%2E") if not name.strip(".") else name


def host_name() -> str:
    """This host, and its PID namespace: containers of one host name count processes anew."""
    return f"{socket.gethostname()}_{os.stat('/proc/self/ns/pid').st_ino}"


def partial_path(path: Path) -> Path:
    """Where this process writes a file before it is whole; no other process has the same name."""
    return path.with_name(f"{path.stem}.{host_name()}-{os.getpid()}.partial")


def put_in_place(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name, and rename it once it is safely on the disk.

    A crash or an OSError at any moment leaves the old file or the new one, whole.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()  # where it could not be put in place
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory, and these are their ways of saying so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn what is raised while a finished part is read into one line that names it."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ExtractionError(
            f"{path} cannot be read: {error} | move it away and run the same command again"
        ) from error


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[h5py.File]:
    """A finished part, to read. Raises ExtractionError, also for errors within the body."""
    with explain_read_errors(path):
        if not path.is_file():  # a pipe, for example, would never open
            raise ValueError("it is no file")
        with h5py.File(path, "r", locking=False) as part:
            yield part


@functools.lru_cache(maxsize=1024)
def vector_layout(width: int, compression: str) -> tuple:
    """HDF5's space, creation and link properties of a vector."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if compression == "gzip":
        layout.set_chunk((width,))
        layout.set_shuffle()
        layout.set_deflate(1)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return h5py.h5s.create_simple((width,)), layout, links


def write_sample(part: h5py.File, sample: Sample, prompter: Prompter, compression: str) -> None:
    """Add a sample's group to a part."""
    row = sample.row
    num_prompt_tokens = len(sample.prompt.input_ids)
    vectors = dict(sample.vectors)
    attributes = {
        "question_id": row.question_id,
        "num_prompt_tokens": num_prompt_tokens,
        "vision_token_pos": prompter.soft_stop - 1,
        "query_token_pos": num_prompt_tokens - 1,
        "num_answer_tokens": len(sample.answer_ids),
        "answer_truncated": sample.is_truncated,
        "image_sha256": sample.image_sha256,
    }
    if sample.logprobs:
        vectors["answer_logprobs"] = np.array(sample.logprobs)
        attributes["first_token_entropy"] = sample.first_token_entropy
    group = part.create_group(group_name(row.question_id))
    group["question"] = row.question
    group["image_id"] = row.image_id
    group["answer"] = prompter.decode(sample.answer_ids)
    group["ground_truth_answer"] = row.ground_truth
    attributes["crc32"] = write_vectors(group, vectors, compression)
    group["vision_only_representation"] = h5py.SoftLink(VISION)
    group.attrs.update(attributes)


def write_vectors(group: h5py.Group, vectors: dict[str, np.ndarray], compression: str) -> int:
    """Write vectors as float32 in the order of their names; returns the crc32 of all.

    By HDF5's low-level calls: `create_dataset` would take 2.6 ms a sample instead of 0.9, and this
    thread holds Python's lock meanwhile, which the thread that starts the card's work needs.
    """
    crc32 = 0
    file_type = h5py.h5t.IEEE_F32LE
    for name, vector in sorted(vectors.items()):
        space, layout, links = vector_layout(len(vector), compression)
        dataset = h5py.h5d.create(group.id, name.encode(), file_type, space, layout, links)
        values = np.ascontiguousarray(vector, dtype="<f4")
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, values, file_type)
        crc32 = zlib.crc32(values, crc32)
    return crc32


class PartWriter:
    """Puts a part together in memory, in the order of the plan, and then in place."""

    def __init__(
        self, settings: Settings, described: dict, prompter: Prompter, compression: str = "none"
    ) -> None:
        self._settings = settings
        self._described = described  # the other root attributes
        self._prompter = prompter
        self._compression = compression

    def write(self, path: Path, planned: list[Row], samples: Iterable[Sample]) -> None:
        """Write a part: the samples that its file has already, and new ones.

        Raises OSError, or ExtractionError where the old file cannot be read; it stays as it is.
        """
        new = {group_name(sample.row.question_id): sample for sample in samples}
        order = dict.fromkeys(group_name(row.question_id) for row in planned)
        content = io.BytesIO()
        with contextlib.ExitStack() as stack:
            old = {}
            if path.exists():
                with explain_read_errors(path):
                    old = stack.enter_context(h5py.File(path, "r", locking=False))
                    order |= dict.fromkeys(old)  # rows that left the CSV stay, at the end
                    check_settings(path, read_attributes(old), self._settings)
            # HDF5 1.10's format: smaller, with checksums over all but the vectors themselves.
            part = stack.enter_context(
                h5py.File(content, "w", track_order=True, libver=("v110", "v110"))
            )
            for name in order:
                if name in old:
                    with explain_read_errors(path):
                        h5py.h5o.copy(old.id, name.encode(), part.id, name.encode())
                elif name in new:
                    write_sample(part, new[name], self._prompter, self._compression)
            part.attrs.update(self._described | dataclasses.asdict(self._settings))
            part.attrs["num_samples"] = len(part)
            part.attrs["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        put_in_place(path, content.getbuffer())


def bytes_per_sample(config, layers: list[int]) -> int:
    """What one sample takes on the disk, uncompressed."""
    num_vectors = 3 * len(layers)
    num_values = config.vision_config.hidden_size + num_vectors * config.text_config.hidden_size
    return SAMPLE_OVERHEAD + 4 * num_values + (num_vectors + 1) * VECTOR_OVERHEAD


def read_stored_names(output_dir: Path, settings: Settings, rows: Iterable[Row] = ()) -> set[str]:
    """The group names of all stored samples, read from attributes and names alone.

    Only where a part was written for other rows are its texts compared with `rows`, if any. Raises
    ExtractionError if a part cannot be read, has other settings, or repeats a sample of another.
    """
    by_name = {group_name(row.question_id): row for row in rows}
    owners: dict[str, Path] = {}
    num_other_truths = 0
    for path in sorted(output_dir.glob(PARTS_GLOB)):
        with open_part(path) as part:
            stored = read_attributes(part)
            check_settings(path, stored, settings)
            if stored["num_samples"] != len(part):
                raise ValueError(f"{len(part)} samples; expected {stored['num_samples']}")
            for name in part:
                if name in owners:
                    raise ValueError(f"sample {name!r} is in {owners[name].name} already")
                owners[name] = path
            if by_name and stored["dataset_sha256"] != settings.dataset_sha256:
                num_other_truths += count_other_truths(path, part, by_name)
    if num_other_truths:
        log.warning("%d stored ground truths differ from the CSV's; they stay", num_other_truths)
    return set(owners)


def read_attributes(part: h5py.File) -> dict:
    """The root attributes of a part, as Python's own types."""
    return {name: np.asarray(value).tolist() for name, value in part.attrs.items()}


def check_settings(path: Path, stored: dict, settings: Settings) -> None:
    """Raises ExtractionError if a part was written with other settings; other rows are allowed."""
    current = dataclasses.asdict(settings)
    del current["dataset_sha256"]
    if differences := describe_differences(stored, current):
        advice = "continue with the old ones, choose another --output-dir, or --overwrite"
        if "schema_version" in differences:
            advice = "older files can only be inspected: choose another --output-dir"
        raise ExtractionError(f"{path} was written with other settings: {differences} | {advice}")


def count_other_truths(path: Path, part: h5py.File, by_name: dict[str, Row]) -> int:
    """How many stored ground truths are not the CSV's.

    Raises ExtractionError if a question or image_id changed, since the vectors depend on them.
    """
    count = 0
    for name in part:
        row = by_name.get(name)
        if row is None:
            continue
        group = part[name]
        stored = {text: group[text].asstr()[()] for text in ("question", "image_id")}
        current = {"question": row.question, "image_id": row.image_id}
        if differences := describe_differences(stored, current):
            raise ExtractionError(
                f"{path} was written with another row of question_id {row.question_id!r}: "
                f"{differences} | give the changed row another question_id, choose another "
                "--output-dir, or --overwrite"
            )
        count += group["ground_truth_answer"].asstr()[()] != row.ground_truth
    return count


def update_failures(
    output_dir: Path, is_missing: Callable[[str], bool], new: Iterable[Failure] = ()
) -> None:
    """Keep of `failed_samples.csv` the rows that are still missing, and add new failures."""
    path = output_dir / FAILED_NAME
    header = ["question_id", "image_id", "error"]
    before: list[list[str]] = []
    with contextlib.suppress(FileNotFoundError, csv.Error):
        text = path.read_bytes().decode(errors="replace")
        before = [line for line in csv.reader(io.StringIO(text, newline="")) if len(line) == 3]
    lines = [line for line in before if line != header and is_missing(line[0])]
    for failure in new:
        lines.append([failure.row.question_id, failure.row.image_id, failure.error])
    if not lines:
        path.unlink(missing_ok=True)
        return
    table = io.StringIO(newline="")
    csv.writer(table).writerows([header, *lines])
    put_in_place(path, table.getvalue().encode(errors="backslashreplace"))


# ───────────────────────────── processes that share an output directory ────────────────────────
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class OutputLock:
    """POSIX record locks on `{output_dir}/.lock`. The kernel drops them when their process ends.

    Byte 0 stands for the directory: a process holds it exclusively while it checks the contents,
    then all running processes share it. Byte k stands for part k: its holder writes that part, and
    holds it until the process ends.

    Some file systems silently keep locks local to one host. So a process also marks each part it
    claims by creating its `.partial` file. Parts that someone else has marked are left for the end;
    if one is then computed twice, that does no harm.
    """

    FAILURES = 1 << 40  # the byte of `failed_samples.csv`, which all processes write to
    EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB
    SHARED = fcntl.LOCK_SH | fcntl.LOCK_NB

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._has_locks = True
        path = output_dir / ".lock"
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            # Never opened a second time: closing any descriptor of a file drops all its locks.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            advice = "choose one to write to"
            if isinstance(error, PermissionError) and os.path.exists(path):
                status = path.stat()
                mode = stat.filemode(status.st_mode)
                advice = f"change the permissions of {path}: {mode}, of uid {status.st_uid}"
            raise ExtractionError(
                f"--output-dir {output_dir}: {error.strerror} | {advice}"
            ) from error

    def _lock(self, kind: int, byte: int) -> bool:
        """Whether the lock is granted; on a file system without locks it always is."""
        try:
            fcntl.lockf(self._descriptor, kind, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if self._has_locks:
                log.warning(
                    "the file system of %s has no locks: this must be the only process there",
                    self.output_dir,
                )
            self._has_locks = False
        return True

    def enter(self) -> bool:
        """Enter the directory. True means that this process is alone, and has to check it all."""
        while True:
            if self._lock(self.EXCLUSIVE, 0):  # nobody is here
                return True
            if self._lock(self.SHARED, 0):  # others are at work, or were and have just left
                return self._lock(self.EXCLUSIVE, 0)
            time.sleep(0.05)  # one is checking: wait for it

    def check_others(self, settings: Settings, is_alone: bool) -> None:
        """Raises ExtractionError if others are at work, or marked a part, with other settings."""
        path = self.output_dir / "settings.json"
        marks = self.list_marks()
        if is_alone and not (marks and path.exists()):
            return
        with explain_read_errors(path):
            stored = json.loads(path.read_bytes())
        if differences := describe_differences(stored, dataclasses.asdict(settings)):
            advice = "wait, or choose another --output-dir"
            if is_alone:  # as far as locks say
                advice += f"; if nobody is at work there, delete {marks[0]}"
            raise ExtractionError(
                f"{self.output_dir} is in use with other settings: {differences} | {advice}"
            )

    def list_marks(self) -> list[Path]:
        """The marks of processes that may be at work."""
        self.remove_leftovers()
        return sorted(self.output_dir.glob("gemma3_12b_embeddings_part_*.partial"))

    def share(self, settings: Settings) -> None:
        """The directory has been checked: let other processes in."""
        text = json.dumps(dataclasses.asdict(settings), indent=1)
        put_in_place(self.output_dir / "settings.json", text.encode())
        self._lock(self.SHARED, 0)

    def check_directory(self) -> None:
        """Raises ExtractionError if somebody removed the directory, or our lock file in it."""
        path = self.output_dir / ".lock"
        ours = os.fstat(self._descriptor)
        if not (path.exists() and os.path.samestat(ours, path.stat())):
            raise ExtractionError(
                f"{path} was removed during the run, so another run may be at work there "
                "| nothing more is written; run the same command again"
            )

    def claim(self, part: Part, take_over: bool) -> bool:
        """Try to claim a part; returns whether this process now owns it.

        A part that another process marked first is refused, unless `take_over`.
        """
        if not self._lock(self.EXCLUSIVE, part.number):
            return False
        mark = partial_path(part.path)  # `put_in_place` later writes the part under this name
        mark.touch()
        if take_over or self._first_to_mark(part.path) == mark.name:
            return True
        self.release(part)
        return False

    def release(self, part: Part) -> None:
        """Give a part back."""
        partial_path(part.path).unlink(missing_ok=True)
        self._lock(fcntl.LOCK_UN, part.number)

    def _first_to_mark(self, path: Path) -> str:
        """The name of the mark that was there first; of marks of one moment the first by name."""
        self.remove_leftovers()
        marks = []
        for mark in self.output_dir.glob(f"{path.stem}.*.partial"):
            with contextlib.suppress(FileNotFoundError):  # its part may be in place by now
                marks.append((mark.stat().st_mtime_ns, mark.name))
        return min(marks)[1]

    def remove_leftovers(self) -> None:
        """Delete the `.partial` files of processes of this host that have ended.

        Those of another host may be needed, so they go when a process there does the same.
        """
        for path in self.output_dir.glob("*.partial"):
            match = OUR_FILES.fullmatch(path.name)
            is_ours = match and match["host"] == host_name()
            if is_ours and not psutil.pid_exists(int(match["pid"])):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """One process at a time may change `failed_samples.csv`."""
        while not self._lock(self.EXCLUSIVE, self.FAILURES):
            time.sleep(0.01)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, self.FAILURES)

    def close(self) -> None:
        """Give everything back."""
        for mark in self.output_dir.glob(partial_path(Path("*")).name):
            mark.unlink()
        self.remove_leftovers()
        os.close(self._descriptor)


def claim_parts(lock: OutputLock, left: list[Part], take_over: bool) -> Iterator[Part]:
    """Parts that nobody else works on, each claimed when it is asked for, with the rows it misses.

    They are taken from `left`. With `take_over`, so are parts that others have marked and not
    finished: they may have died, or run on a host that our locks do not reach.
    """
    for part in list(left):
        if not lock.claim(part, take_over):
            continue
        left.remove(part)
        missing = part.missing
        if part.path.exists():  # others may have stored some of them since we looked
            with open_part(part.path) as file:
                missing = [row for row in missing if group_name(row.question_id) not in file]
        if missing:
            yield dataclasses.replace(part, missing=missing)
        else:
            lock.release(part)


# ─────────────────────────────────────────── the run ───────────────────────────────────────────
def launcher_number(variable: str, default: int | None = None) -> int | None:
    """What torchrun, accelerate or srun say of this process in its environment."""
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise ExtractionError(f"{variable}={text} in the environment is no number | unset it")
    return int(text) if text else default


def choose_device(name: str) -> torch.device:
    """The device; for `cuda` a launcher says which card. Raises ExtractionError."""
    source = ""
    if name == "cuda":
        variable = "LOCAL_RANK" if os.environ.get("LOCAL_RANK") else "SLURM_LOCALID"
        card = launcher_number(variable)
        if card is not None:
            num_cards = torch.cuda.device_count()
            name = f"cuda:{card % max(1, num_cards)}"  # a task that sees one card takes that one
            source = f", by {variable}={card} with {num_cards} visible"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.accelerator.set_device_index(device.index)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        advice = "without a GPU: --device cpu"
        raise ExtractionError(f"--device {name}{source}: {reason} | {advice}") from error
    log.info("device %s%s", device, source)
    return device


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Let Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning) ask the run to stop.

    Each appends its exit status to the list. A second Ctrl-C ends the process at once. Signals that
    are ignored, as under nohup, stay ignored.
    """
    stops: list[int] = []
    first_time = math.inf

    def receive(signum: int, frame) -> None:
        nonlocal first_time
        # A launcher forwards the Ctrl-C that the terminal also sent us: that is not a second one.
        is_echo = "WORLD_SIZE" in os.environ and time.monotonic() - first_time < 1
        if signum == signal.SIGINT and stops and not is_echo:
            os._exit(130)
        stops.append(130 if signum == signal.SIGINT else 143)
        first_time = min(first_time, time.monotonic())

    before = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, receive)
    try:
        yield stops
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Outcomes:
    """The rows that are being extracted, and counts of what has come out."""

    def __init__(self) -> None:
        self.num_extracted = 0
        self.num_failed = 0
        self.num_truncated = 0
        self.num_answer_tokens = 0
        self._num_seen = 0  # by the model
        self._unfinished: dict[str, Row] = {}  # by question_id

    def expect(self, rows: list[Row]) -> None:
        """These rows are on their way."""
        self._unfinished |= {row.question_id: row for row in rows}

    def unfinished(self) -> list[Row]:
        """The rows that are expected and have no outcome yet, in the order of the plan."""
        return list(self._unfinished.values())

    def record(self, outcome: Outcome) -> None:
        """Take the outcome of a row."""
        del self._unfinished[outcome.row.question_id]
        if isinstance(outcome, Failure):
            self.num_failed += 1
        else:
            self.num_extracted += 1
            self.num_truncated += outcome.is_truncated
            self.num_answer_tokens += len(outcome.answer_ids)

    def record_pass(self, outcomes: list[Outcome], num_running: int) -> None:
        """Take the outcomes of a pass of the model; `num_running` are still being answered.

        Raises ExtractionError if the first rows that the model saw have all failed.
        """
        for outcome in outcomes:
            self.record(outcome)
        self._num_seen += len(outcomes)
        have_all_failed = outcomes and not self.num_extracted and not num_running
        if have_all_failed and self._num_seen >= MAX_FAILED_ROWS:
            last = outcomes[-1]
            raise ExtractionError(
                f"the first {self._num_seen} rows that the model saw all failed: something is "
                f"wrong with all of them | the last, {last.row.question_id!r}: {last.error}"
            )


class Recorder(Outcomes):
    """Gathers outcomes by part, and writes each part once it is complete, in a thread.

    Answers end in another order than the plan's, so several parts are in memory at once; they are
    written one at a time. An error of writing is raised by a later call.
    """

    def __init__(self, lock: OutputLock, writer: PartWriter, bar: tqdm) -> None:
        super().__init__()
        self._lock = lock
        self._writer = writer
        self._bar = bar
        self._part_of: dict[str, Part] = {}  # by question_id
        self._in_memory: dict[int, tuple[Part, list[Outcome]]] = {}  # by the part's number
        self._thread = ThreadPoolExecutor(1)
        self._writes: list[Future] = []

    def expect_part(self, part: Part) -> list[Row]:
        """This part is ours; returns its missing rows."""
        self._in_memory[part.number] = (part, [])
        self._part_of |= {row.question_id: part for row in part.missing}
        self.expect(part.missing)
        return part.missing

    def record(self, outcome: Outcome) -> None:
        """Take the outcome of a row; with the last one of its part, the part is written."""
        super().record(outcome)
        part = self._part_of.pop(outcome.row.question_id)
        _, outcomes = self._in_memory[part.number]
        outcomes.append(outcome)
        self._bar.set_postfix(failed=self.num_failed, refresh=False)
        self._bar.update()
        if len(outcomes) == len(part.missing):
            self._raise_failed_write()  # waits, so that at most one part is queued in memory
            self._start_write(part.number)
        elif self._writes and self._writes[-1].done():
            self._raise_failed_write()

    def finish(self) -> None:
        """Write all parts still in memory, complete or not; then raise the first error, if any."""
        for number in list(self._in_memory):
            self._start_write(number)
        wait(self._writes)
        self._raise_failed_write()

    def _raise_failed_write(self) -> None:
        for write in self._writes:
            write.result()

    def _start_write(self, number: int) -> None:
        part, outcomes = self._in_memory.pop(number)
        self._writes.append(self._thread.submit(self._write, part, outcomes))

    def _write(self, part: Part, outcomes: list[Outcome]) -> None:
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        samples = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
        is_complete = len(outcomes) == len(part.missing)
        self._lock.check_directory()
        try:
            if samples or (is_complete and not part.path.exists()):
                self._writer.write(part.path, part.planned, samples)
        except MemoryError as error:  # not for `extract_rows`: a smaller batch would not help here
            raise ExtractionError(
                f"too little memory to put {part.path.name} together | the same command continues; "
                "in a new directory a smaller --checkpoint-interval needs less"
            ) from error
        settled = {outcome.row.question_id for outcome in outcomes}
        with self._lock.failures():
            update_failures(self._lock.output_dir, lambda name: name not in settled, failures)


def extract_rows(
    extractor: Extractor,
    reader: ImageReader,
    parts: Iterator[list[Row]],
    outcomes: Outcomes,
    stops: list[int],
) -> None:
    """Extract the rows that have no outcome yet, then those of `parts`, until asked to stop.

    When memory runs out, the batch size is halved and all unfinished rows start over. A question
    that does not fit even alone is recorded as failed, and the earlier batch size is restored.
    """
    # By question_id: the batch size at the first out-of-memory error that interrupted the question.
    size_before: dict[str, int] = {}
    while True:
        try:
            all_rows = itertools.chain([outcomes.unfinished()], parts)
            with contextlib.closing(reader.read_ahead(all_rows, outcomes.record)) as images:
                for finished in extractor.run(images):
                    outcomes.record_pass(finished, extractor.scheduler.num_running)
                    if stops:
                        break
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Not in the `except`: there the traceback would keep the failed pass's tensors alive.
        batch_size = extractor.scheduler.batch_size
        unfinished = outcomes.unfinished()
        for row in unfinished:
            size_before.setdefault(row.question_id, batch_size)
        if batch_size > 1:
            extractor.restart(batch_size // 2)
            log.warning("out of memory: batch size %d from here on", batch_size // 2)
        else:
            culprit = unfinished[0]
            failure = Failure(culprit, "the memory is too small for it, even alone")
            outcomes.record_pass([failure], num_running=0)
            extractor.restart(size_before[culprit.question_id])


@dataclass(frozen=True)
class Job:
    """A run, checked as far as it can be before the weights are loaded."""

    rows: list[Row]  # of the whole CSV
    wanted: list[Row]  # those to extract: all, or the first ones with --test
    device: torch.device
    checkpoint: Checkpoint
    prompter: Prompter
    settings: Settings
    sample_bytes: int  # on the disk


def prepare(args: argparse.Namespace) -> Job:
    """Read the CSV and the model's small files. Raises ExtractionError."""
    launcher_number("WORLD_SIZE")  # fail now rather than at the end if it is malformed
    rows = read_rows(args.vqa_dataset)
    check_images(rows, args.images_dir)
    device = choose_device(args.device)
    with explain_load_errors(args.model):
        checkpoint = find_checkpoint(args.model, args.revision, args.cache_dir)
        prompter = Prompter(checkpoint.processor, checkpoint.config)
    settings = Settings(
        schema_version=SCHEMA_VERSION,
        model_revision=checkpoint.revision,
        dtype=args.dtype,
        layers=choose_layers(args.layers, checkpoint.config.text_config.num_hidden_layers),
        max_new_tokens=args.max_new_tokens,
        prompt=prompter.render("{question}"),
        checkpoint_interval=args.checkpoint_interval,
        dataset_sha256=hash_rows(rows),
    )
    wanted = rows[:NUM_TEST_ROWS] if args.test else rows
    sample_bytes = bytes_per_sample(checkpoint.config, settings.layers)
    return Job(rows, wanted, device, checkpoint, prompter, settings, sample_bytes)


def hash_rows(rows: list[Row]) -> str:
    """The sha256 of the four columns used."""
    texts = json.dumps([dataclasses.astuple(row) for row in rows])
    return hashlib.sha256(texts.encode()).hexdigest()


def open_output(lock: OutputLock, job: Job, overwrite: bool, compression: str) -> set[str]:
    """Lock and check the output directory; returns the question_ids that are still to do.

    Raises ExtractionError if it is in use, has parts of another run in it, or is too small.
    """
    output_dir = lock.output_dir
    is_alone = lock.enter()
    stored = set()
    if overwrite:
        reason = "" if is_alone else "another process is at work there"
        if marks := lock.list_marks():
            reason = f"another host may be at work there (or delete {marks[0]})"
        if launcher_number("WORLD_SIZE", 1) > 1:
            reason = f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that a launcher starts others"
        if reason:
            raise ExtractionError(f"--overwrite needs {output_dir} for itself, and {reason} | wait")
    else:
        lock.check_others(job.settings, is_alone)
        # Texts are compared by the process that checks, once for all.
        stored = read_stored_names(output_dir, job.settings, job.rows if is_alone else ())
    unstored = {row.question_id for row in job.rows if group_name(row.question_id) not in stored}
    to_do = {row.question_id for row in job.wanted if row.question_id in unstored}
    doomed = []
    if overwrite:
        doomed = [path for path in output_dir.iterdir() if OUR_FILES.fullmatch(path.name)]
    room = shutil.disk_usage(output_dir).free + sum(path.stat().st_size for path in doomed)
    check_room(output_dir, room, len(to_do) * job.sample_bytes, compression)
    for path in doomed:
        path.unlink()
    if is_alone:
        with lock.failures():
            update_failures(output_dir, unstored.__contains__)
        lock.share(job.settings)
    return to_do


def check_room(output_dir: Path, room: int, needed: int, compression: str) -> None:
    """Raises ExtractionError if the disk is too small; where compression may help, it warns."""
    if needed <= room:
        return
    message = f"{output_dir} has {room / 1e6:.1f} MB free; the run needs {needed / 1e6:.1f} MB"
    if compression == "none":
        raise ExtractionError(f"{message} | make room, or choose another --output-dir")
    log.warning("%s without compression, so it may not be enough", message)


def make_parts(output_dir: Path, plan: list[list[Row]], to_do: set[str]) -> list[Part]:
    """The parts of the plan that have rows to do, by question_id."""
    parts = []
    for number, planned in enumerate(plan, start=1):
        missing = [row for row in planned if row.question_id in to_do]
        if missing:
            parts.append(Part(number, output_dir / PART_NAME.format(number), planned, missing))
    return parts


def load_extractor(args: argparse.Namespace, job: Job) -> Extractor:
    """Load the weights, and choose how many questions run side by side."""
    checkpoint = job.checkpoint
    dtype = getattr(torch, args.dtype)
    with explain_load_errors(args.model):
        download_weights(checkpoint)
        model = load_model(checkpoint, dtype, job.device, args.device_map)
    batch_size = args.batch_size
    if batch_size is None:
        cards = list_cards(job.device, args.device_map)
        num_slots = usual_lane_slots(len(job.prompter.prefix), args.max_new_tokens)
        batch_size = choose_batch_size(checkpoint.config, dtype, cards, num_slots)
    layers = job.settings.layers
    extractor = Extractor(model, job.prompter, layers, args.max_new_tokens, batch_size, job.device)
    warn_of_endless_answers(extractor)
    return extractor


def warn_of_endless_answers(extractor: Extractor) -> None:
    """Warn where the token that the chat template puts after an answer does not end one."""
    token_id = extractor.prompter.end_of_turn
    if extractor.max_new_tokens and token_id not in extractor.end_ids:
        log.warning(
            "token %s, with which the chat template ends a turn, does not end an answer: all may "
            "run to --max-new-tokens | add it to eos_token_id in generation_config.json",
            token_id,
        )


def as_utf8(name: str) -> str:
    """A file's name as HDF5 can store it, if the file system has another encoding."""
    return os.fsencode(name).decode(errors="backslashreplace")


def describe_run(args: argparse.Namespace, job: Job, model: nn.Module) -> dict:
    """The root attributes of every part, beside the settings."""
    config = job.checkpoint.config
    described = {
        "model_name": as_utf8(args.model),
        "model_type": f"gemma-3-{model.num_parameters() / 1e9:.0f}b-multimodal",
        "device": args.device_map or str(job.device),
        "num_layers": config.text_config.num_hidden_layers,
        "hidden_size": config.text_config.hidden_size,
        "vision_hidden_size": config.vision_config.hidden_size,
        "image_processor": type(job.checkpoint.processor.image_processor).__name__,
        "attn_implementation": "sdpa",
        "torch_version": str(torch.__version__),  # a kind of str that h5py refuses
        "transformers_version": transformers.__version__,
        "python_version": platform.python_version(),
        "dataset": as_utf8(args.vqa_dataset.name),
    }
    if job.device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(job.device)
        described["cuda_version"] = str(torch.version.cuda)
    return described


def extract(args: argparse.Namespace) -> int:
    """Run an extraction, from the CSV to the last part; returns the exit status."""
    job = prepare(args)
    with contextlib.closing(OutputLock(args.output_dir)) as lock:
        to_do = open_output(lock, job, args.overwrite, args.compression)
        log.info("%d rows in the plan, %d to do", len(job.wanted), len(to_do))
        plan = plan_parts(job.rows, args.checkpoint_interval)
        left = make_parts(args.output_dir, plan, to_do)
        # Claim a part before loading: a process that gets none need not load the model.
        claims = claim_parts(lock, left, take_over=False)
        first_part = next(claims, None) or next(claim_parts(lock, left, take_over=True), None)
        if first_part is None and (to_do or not args.test):
            return summarise(Outcomes(), job, len(to_do), seconds=0)
        extractor = load_extractor(args, job)
        described = describe_run(args, job, extractor.model)
        writer = PartWriter(job.settings, described, job.prompter, args.compression)
        reader = make_reader(args, job)
        start = time.monotonic()
        with catch_signals() as stops, logging_redirect_tqdm([log]), make_bar(len(to_do)) as bar:
            recorder = Recorder(lock, writer, bar)
            parts = itertools.chain([first_part] if first_part else [], claims)
            try:
                rows = map(recorder.expect_part, parts)
                extract_rows(extractor, reader, rows, recorder, stops)
                # By now, processes that had other parts may have died.
                for part in claim_parts(lock, left, take_over=True):
                    if stops:
                        break
                    recorder.expect_part(part)
                    extract_rows(extractor, reader, iter(()), recorder, stops)
            finally:
                recorder.finish()
        seconds = time.monotonic() - start
        if stops:
            log.warning("stopped; what was finished is saved, and the same command continues")
            return stops[0]
        if reader.transparent:
            message = "%d images have transparency, which is dropped as in transformers: %r ..."
            log.warning(message, len(reader.transparent), next(iter(reader.transparent)))
        has_passed = True
        if args.test:  # whoever extracted the first rows checks them
            has_passed = report_test(args, job, extractor)
        status = summarise(recorder, job, len(to_do), seconds)
        return status if has_passed else 1


def make_reader(args: argparse.Namespace, job: Job) -> ImageReader:
    """The reader of the CSV's images."""
    dtype = getattr(torch, args.dtype)
    is_pinned = job.device.type == "cuda"
    return ImageReader(job.prompter, args.images_dir, dtype, args.num_workers, is_pinned)


def make_bar(total: int) -> tqdm:
    """The progress bar: on a terminal twice a second, in a log twice a minute."""
    interval = 0.5 if sys.stderr.isatty() else 30
    is_silent = launcher_number("RANK", 0) > 0
    return tqdm(total=total, unit=" samples", smoothing=0, mininterval=interval, disable=is_silent)


def summarise(outcomes: Outcomes, job: Job, num_to_do: int, seconds: float) -> int:
    """Print the last line; returns the exit status."""
    num_extracted = outcomes.num_extracted
    num_failed = outcomes.num_failed
    if num_failed:
        log.warning("%s in the output directory says which rows failed, and why", FAILED_NAME)
    counts = f"{num_failed} failed, {len(job.wanted) - num_to_do} already done"
    if num_by_others := num_to_do - num_extracted - num_failed:
        counts += f", {num_by_others} by other processes"
    extracted = f"Extracted {num_extracted} of {len(job.wanted)} samples ({counts})"
    rate = num_extracted / max(seconds, 1e-9)
    print(f"{extracted} in {seconds:.1f} s: {rate:.2f} samples/s", file=sys.stderr)
    if num_failed and launcher_number("WORLD_SIZE", 1) > 1:
        # It would end all of its processes with the first that ends with an error.
        log.warning("exit status 0 all the same, for the launcher that set WORLD_SIZE")
        return 0
    return 3 if num_failed else 0


# ─────────────────────────────────────────── --test ────────────────────────────────────────────
@torch.inference_mode()
def reference_forward(
    extractor: Extractor, image: Image.Image, question: str, has_image_mask: bool = True
) -> tuple[list[int], dict[str, Tensor], Tensor]:
    """What transformers alone gives for a prompt: no hook, no cache, nothing shared, Gemma's norm.

    Returns input_ids [T], the vectors by their names, and the last layer at the soft tokens.
    """
    model = extractor.model
    prompter = extractor.prompter
    decoder = model.model.language_model
    inputs = prompter.processor.apply_chat_template(
        [make_user_turn({"type": "image", "image": image}, question)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(extractor.device, model.dtype)
    if not has_image_mask:
        del inputs["token_type_ids"]
    final_norm = decoder.norm
    decoder.norm = nn.Identity()  # so that the last of the hidden states is the last layer's output
    use_rms_norm(model, Gemma3RMSNorm.forward)
    try:
        outputs = model.model(**inputs, output_hidden_states=True, use_cache=False)
    finally:
        decoder.norm = final_norm
        use_rms_norm(model, fused_rms_norm)
    patches = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0].float()
    vectors = {VISION: patches.mean(0).cpu()}
    for layer_idx in extractor.layers:
        states = outputs.hidden_states[layer_idx + 1][0].float().cpu()  # [T, D]
        vectors[f"{VISION_TOKEN}/layer_{layer_idx}"] = states[prompter.soft_stop - 1]
        vectors[f"{QUERY_TOKEN}/layer_{layer_idx}"] = states[-1]
        vectors[f"{MULTIMODAL}/layer_{layer_idx}"] = states.mean(0)
    soft_states = outputs.hidden_states[-1][0, prompter.soft_start : prompter.soft_stop].float()
    return inputs["input_ids"][0].tolist(), vectors, soft_states.cpu()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in L2."""
    return float((found - expected).norm() / expected.norm())


def read_vectors(output_dir: Path, row: Row, names: Iterable[str]) -> dict[str, Tensor]:
    """What is stored for a row; nothing if it is not."""
    for path in output_dir.glob(PARTS_GLOB):
        with open_part(path) as part:
            if group_name(row.question_id) in part:
                group = part[group_name(row.question_id)]
                return {name: torch.as_tensor(group[name][()]) for name in names}
    return {}


def report_test(args: argparse.Namespace, job: Job, extractor: Extractor) -> bool:
    """Print what the first rows show and what the whole CSV would take; returns if all is well."""
    has_same_tokens = []
    query_pos = []
    mask_effects = []
    errors: dict[str, list[float]] = {}  # by the vector's name, of each row
    for row in job.wanted:
        try:
            image, _, _ = open_image(args.images_dir, row.image_id)
            input_ids = job.prompter.tokenize(row.question)
        except RowError:
            continue
        plain_ids, expected, soft_states = reference_forward(extractor, image, row.question)
        _, _, unmasked = reference_forward(extractor, image, row.question, has_image_mask=False)
        has_same_tokens.append(input_ids == plain_ids)
        query_pos.append(len(input_ids) - 1)
        mask_effects.append(relative_error(unmasked, soft_states))
        for name, vector in read_vectors(args.output_dir, row, expected).items():
            errors.setdefault(name, []).append(relative_error(vector, expected[name]))
    has_passed = True
    if errors:
        worst = {name: float(torch.tensor(of_rows).amax()) for name, of_rows in errors.items()}
        has_passed = print_checks(extractor, has_same_tokens, query_pos, min(mask_effects), worst)
    else:
        print("none of the first rows could be extracted, so nothing was checked")
    print_forecast(args, job, extractor)
    return has_passed


def print_checks(
    extractor: Extractor,
    has_same_tokens: list[bool],
    query_pos: list[int],
    mask_effect: float,
    errors: dict[str, float],
) -> bool:
    """Print what the comparisons show, with the errors of each layer; returns if all is well."""
    start = extractor.prompter.soft_start
    last = extractor.prompter.soft_stop - 1
    dtype = extractor.model.dtype
    bound = TEST_BOUNDS[str(dtype).removeprefix("torch.")]
    worst = float(torch.tensor(list(errors.values())).amax())  # amax keeps a NaN
    checks = {
        "tokens are the processor's own, with one <bos>": all(has_same_tokens),
        f"soft tokens {start} to {last}, vision token {last}, query tokens {query_pos}": (
            min(query_pos) > last
        ),
        f"the image mask changes the soft tokens by {mask_effect:.1e}": (
            mask_effect > 10 * torch.finfo(dtype).eps
        ),
        f"states equal plain forward passes: error {worst:.1e}, bound {bound:g}": worst <= bound,
    }
    for what, is_ok in checks.items():
        print(f"{'ok  ' if is_ok else 'FAIL'}  {what}")
    print(f"      {VISION} {errors[VISION]:.1e}; by layer {', '.join(map(str, extractor.layers))}:")
    for kind in (VISION_TOKEN, QUERY_TOKEN, MULTIMODAL):
        of_kind = [f"{errors[f'{kind}/layer_{layer_idx}']:.1e}" for layer_idx in extractor.layers]
        print(f"      {kind:<28}{' '.join(of_kind)}")
    return all(checks.values())


def print_forecast(args: argparse.Namespace, job: Job, extractor: Extractor) -> None:
    """Time about one batch of rows, store nothing, and extrapolate to the whole CSV."""
    num_rows = len(job.rows)
    by_image = group_by_image(job.rows)
    step = max(1, num_rows // extractor.scheduler.batch_size)
    outcomes = Outcomes()
    rows = [row for about_image in by_image[::step] for row in about_image]
    outcomes.expect(rows[: 2 * extractor.scheduler.batch_size])
    start = time.monotonic()
    extract_rows(extractor, make_reader(args, job), iter(()), outcomes, stops=[])
    seconds = time.monotonic() - start
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    device = str(job.device)
    if job.device.type == "cuda":
        memory += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card"
        device = torch.cuda.get_device_name(job.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}; {args.dtype} on {device}\npeak memory {memory}")
    size = num_rows * job.sample_bytes / 1e9
    free = shutil.disk_usage(args.output_dir).free / 1e9
    print(f"the whole CSV takes {size:.2f} GB; {free:.0f} GB are free", flush=True)
    num_samples = outcomes.num_extracted
    if not num_samples:
        return
    rate = num_samples / seconds * launcher_number("WORLD_SIZE", 1)
    mean = outcomes.num_answer_tokens / num_samples
    print(
        f"{num_rows} rows about {len(by_image)} images take {num_rows / rate / 3600:.2f} h at "
        f"{rate:.2f} samples/s, if answers have {mean:.0f} tokens as here",
        flush=True,
    )
    if args.max_new_tokens and outcomes.num_truncated == num_samples:
        print(
            f"none of {num_samples} answers ended within {args.max_new_tokens} tokens", flush=True
        )


# ───────────────────────────────────────── command line ────────────────────────────────────────
class ForgivingStream:
    """A text stream whose writes may fail unnoticed.

    A log on a full disk, a `tee` that died or a terminal that was closed must not end a run.
    """

    def __init__(self, stream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def whole_number(text: str, minimum: int = 0) -> int:
    """A whole number of at least `minimum`, of 31 bits."""
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
    return min(int(text), 2**31 - 1)


def positive_number(text: str) -> int:
    """A whole number of at least 1."""
    return whole_number(text, minimum=1)


def number_or_auto(text: str) -> int | None:
    """A whole number of at least 1, or None for `auto`."""
    return None if text == "auto" else positive_number(text)


def layer_list(text: str) -> tuple[int, ...] | str:
    """Comma-separated whole numbers, or `all`."""
    if text == "all":
        return text
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither `all` nor whole numbers with commas, as in --layers=-1,0,12"
        ) from None


def make_parser() -> argparse.ArgumentParser:
    """The flags; a value in parentheses is a default."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    columns = "question_id, image_id or image_name, question, answer or gt_answer"
    add("--vqa-dataset", type=Path, required=True, metavar="CSV", help=f"CSV with {columns}")
    images = "directory of the images; image_id is a path in it, extension included"
    add("--images-dir", type=Path, required=True, metavar="DIR", help=images)
    output = "where the part files go (%(default)s)"
    add("--output-dir", type=Path, default="output", metavar="DIR", help=output)
    add("--overwrite", action="store_true", help="start afresh: delete this program's files there")
    test = "extract 3 rows, compare them with transformers, forecast time and disk"
    add("--test", action="store_true", help=test)
    model = "name on the hub, or a directory (%(default)s)"
    add("--model", default="google/gemma-3-12b-it", metavar="NAME", help=model)
    add("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    cache = "a Hugging Face cache (yours if it has the whole model, else ./model_cache)"
    add("--cache-dir", type=Path, metavar="DIR", help=cache)
    add("--device", default="cuda", help="cuda, cuda:1, cpu or another torch device (%(default)s)")
    add("--device-map", choices=["auto"], help="spread one model over all visible GPUs")
    dtype = "precision of weights and states, bfloat16 or float32 (%(default)s)"
    dtypes = [*TEST_BOUNDS, "float16"]  # which is refused, with the reason
    add("--dtype", choices=dtypes, default="bfloat16", metavar="TYPE", help=dtype)
    layers = "to store; negative ones from the end, as in --layers=-1,0 (first, quarters, last)"
    add("--layers", type=layer_list, metavar="I,J|all", help=f"decoder layers {layers}")
    limit = "longest answer, in tokens; with 0 none is generated (%(default)s)"
    add("--max-new-tokens", type=whole_number, default=200, metavar="N", help=limit)
    batch_size = "questions answered side by side; auto: as many as fit (%(default)s)"
    add("--batch-size", type=number_or_auto, default="auto", metavar="N", help=batch_size)
    workers = "threads that read and resize images beside the model (%(default)s)"
    cores = min(8, len(os.sched_getaffinity(0)))
    add("--num-workers", type=positive_number, default=cores, metavar="N", help=workers)
    interval = "samples in each part file; kill -9 loses the unfinished ones (%(default)s)"
    add("--checkpoint-interval", type=positive_number, default=1000, metavar="N", help=interval)
    compression = "compression of the vectors (%(default)s)"
    add("--compression", choices=["none", "gzip"], default="none", help=compression)
    return parser


def read_args(argv: list[str] | None) -> argparse.Namespace:
    """What the command line says; exits with status 2 if it is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.dtype == "float16":
        parser.error("argument --dtype: Gemma 3's states exceed float16's 65504; use bfloat16")
    return args


def set_up_log() -> None:
    """Messages go to stderr. Of several processes only rank 0 logs milestones."""
    rank = launcher_number("RANK", 0)
    handler = logging.StreamHandler()
    if rank:
        handler.setFormatter(logging.Formatter(f"RANK {rank}: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.WARNING if rank else logging.INFO)


def main(argv: list[str] | None = None) -> int:
    """The command line's entry; returns the exit status."""
    args = read_args(argv)
    log.handlers = [logging.StreamHandler()]  # for what `set_up_log` itself may raise
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we refuse such images
    try:
        set_up_log()
        return extract(args)
    except KeyboardInterrupt:
        return 130
    except ExtractionError as error:
        message = str(error)
    except OSError as error:
        message = (
            f"{error} | the files in {args.output_dir} are whole; what could not be written is "
            "lost, and the same command continues"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += " once there is room"
    log.error("%s", " ".join(message.split())[: 2 * MAX_MESSAGE])
    return 1


if __name__ == "__main__":
    sys.stdout = ForgivingStream(sys.stdout or open(os.devnull, "w"))  # None where it is closed
    sys.stderr = ForgivingStream(sys.stderr or open(os.devnull, "w"))
    raise SystemExit(main())
