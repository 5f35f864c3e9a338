"""How fast the extractor is, beside what people would write with transformers alone; or on paper.

    python tests/benchmark.py                                a 270M decoder, two CPU cores
    python tests/benchmark.py --size 12b --device cuda --batch-sizes 1,16,64,256,auto
    python tests/benchmark.py --paper                        the 12B on cards, without a card

Random models, rows of easy-VQA, image reading and writing of files included. For every case it
prints how many times as fast it is as

    forward     one bare forward pass a row (`generate` with answers): nothing captured or written
    batch 16    the same in left-padded batches of 16 with the processor's own padding

Answers: none; `equal`, 16 tokens each; `mixed`, as real ones are: most of 2 to 8 tokens, one in
twelve of 100, drawn once and the same for every way. Medians of `--pairs` pairs.

`--paper` runs the extractor itself on torch's meta device at the 12B's exact size and counts every
operation. Its time is arithmetic: for each operation the largest of one launch, its FLOPs at the
card's peak and its bytes at the card's bandwidth. Answers there are geometric, mean 30, limit 200.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
import torch
import transformers
from conftest import MODEL, make_options, write_csv  # puts the scripts on the path
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3 import modeling_gemma3

import run_gemma3_extraction as script

TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
TEXT = (*TEXT, "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window")
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {  # the decoder of Gemma 3 270M with a small tower; the 12B
    "small": ((262_144, 640, 2048, 18, 4, 1, 256, 512), (192, 768, 4, 3)),
    "12b": ((262_208, 3840, 15360, 48, 16, 8, 256, 1024), (1152, 4304, 27, 16)),
}
GREEDY = {"do_sample": False, "top_k": None, "top_p": None, "disable_compile": True}
MIXED_LIMIT, EQUAL_LENGTH = 100, 16
NUM_SLOTS = 576  # of a lane: prefix, question and 200 tokens of an answer, as `lane_width` has it


def make_model(size: str, device: torch.device, dtype: torch.dtype):
    """A random model of a given size, made on the device; no token is an end to it."""
    base = Gemma3Config.from_pretrained(MODEL)
    text = base.text_config.to_dict() | dict(zip(TEXT, SIZES[size][0], strict=True))
    text |= {"query_pre_attn_scalar": 256, "layer_types": None}
    vision = base.vision_config.to_dict() | dict(zip(VISION, SIZES[size][1], strict=True))
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "vision_use_head": False},
        image_token_index=base.image_token_id,
        mm_tokens_per_image=base.mm_tokens_per_image,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with device:
        model = Gemma3ForConditionalGeneration._from_config(config, dtype=dtype).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    model.generation_config.eos_token_id = [-1]
    return model


def make_rows(num_images: int, questions_per_image: int | None) -> tuple[Path, list[script.Row]]:
    """Rows of easy-VQA; None: as many questions an image as there are, 9.7 on average."""
    questions, answers, image_ids = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    counts: Counter = Counter()
    rows = []
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        if image_id not in counts and len(counts) == num_images:
            break
        counts[image_id] += 1
        if questions_per_image is None or counts[image_id] <= questions_per_image:
            name = Path(paths[image_id]).name
            rows.append(script.Row(str(len(rows)), name, question, answer))
    return Path(paths[0]).parent, rows


def draw_lengths(answers: str, num_rows: int) -> list[int]:
    """Answer tokens of every row."""
    draw = random.Random(0)
    if answers == "none":
        return [0] * num_rows
    if answers == "equal":
        return [EQUAL_LENGTH] * num_rows
    return [MIXED_LIMIT if draw.random() < 1 / 12 else draw.randint(2, 8) for _ in range(num_rows)]


@dataclass
class Bench:
    """A loaded model, and what it takes to run it."""

    model: Gemma3ForConditionalGeneration
    processor: object
    device: torch.device
    images_dir: Path

    def inputs(self, rows: list[script.Row]):
        """Rows by the processor's own means, padded on the left."""
        turns = []
        for row in rows:
            image, _ = script.open_image(self.images_dir, row.image_id)
            content = [{"type": "image", "image": image}, {"type": "text", "text": row.question}]
            turns.append([{"role": "user", "content": content}])
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        how |= {"processor_kwargs": {"padding": True, "padding_side": "left"}}
        inputs = self.processor.apply_chat_template(turns, add_generation_prompt=True, **how)
        return inputs.to(self.device, self.model.dtype)

    def forward(self, inputs, length: int) -> None:
        if length:
            self.model.generate(**inputs, max_new_tokens=length, **GREEDY)
        else:
            self.model.model(**inputs)

    @torch.inference_mode()
    def time_rows(self, rows: list[script.Row], lengths: list[int], size: int = 1) -> float:
        """Seconds a row, `size` rows side by side until the longest answer has ended."""
        torch.backends.cuda.enable_cudnn_sdp(True)  # as transformers has it
        start = time.perf_counter()
        for i in range(0, len(rows), size):
            self.forward(self.inputs(rows[i : i + size]), max(lengths[i : i + size]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / len(rows)

    def time_ours(self, rows: list[script.Row], lengths: list[int], size: int | None) -> float:
        """Seconds a row of the whole program, but for loading the model."""
        ends = {row.question_id: length for row, length in zip(rows, lengths, strict=True)}

        def has_ended(_, live) -> bool:
            return len(live.answer_ids) == ends[live.question.row.question_id]

        with (
            tempfile.TemporaryDirectory() as directory,
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            patch.setattr(script, "load_processor", lambda _: (self.model.config, self.processor))
            patch.setattr(script, "load_model", lambda *_: self.model)
            patch.setattr(script.Gemma3RMSNorm, "forward", script.short_norm)
            patch.setattr(script.Extractor, "has_ended", has_ended)
            table = [dataclasses.astuple(row) for row in rows]
            options = make_options(
                write_csv(Path(directory) / "rows.csv", table),
                self.images_dir,
                model=str(MODEL),
                output_dir=Path(directory) / "out",
                dtype=str(self.model.dtype).partition(".")[2],
                device=str(self.device),
                max_new_tokens=max(lengths),
                batch_size=size,
            )
            torch.backends.cuda.enable_cudnn_sdp(False)  # as `load_model` has it
            torch.cuda.empty_cache()  # `auto` measures what is free
            start = time.perf_counter()
            assert script.extract(options) == 0
            return (time.perf_counter() - start) / len(rows)


def measure(args: argparse.Namespace, bench: Bench) -> None:
    """Print the table, a line a case."""
    _, warm_up = make_rows(2, 1)
    bench.time_rows(warm_up, [1, 1])
    bench.time_ours(warm_up, [1, 1], 2)
    dtype = str(bench.model.dtype).partition(".")[2]
    print(f"{args.size}, {args.device}, {dtype}, medians of {args.pairs} pairs")
    print("questions answers  batch |      times as fast as  | seconds a row")
    print(" an image           size |  forward  batch 16 |  ours forward")
    cases = itertools.product(args.questions, args.answers, args.batch_sizes)
    for questions, answers, batch_size in cases:
        _, rows = make_rows(args.images, questions)
        lengths = draw_lengths(answers, len(rows))
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        num = min(args.plain_rows, len(rows))
        # Evenly from all lengths, so that their mean is that of all rows.
        chosen = [order[(2 * k + 1) * len(rows) // (2 * num)] for k in range(num)]
        plain, plain_lengths = [rows[i] for i in chosen], [lengths[i] for i in chosen]
        batches = bench.time_rows(rows[:32], lengths[:32], size=16)
        ratios, ours = [], []
        for _ in range(args.pairs):
            forward = bench.time_rows(plain, plain_lengths)
            seconds = bench.time_ours(rows, lengths, batch_size)
            ratios.append(forward / seconds)
            ours.append(seconds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        mean, ratio, size = statistics.median(ours), statistics.median(ratios), batch_size or "auto"
        print(
            f"{len(rows) / len({r.image_id for r in rows}):>9.1f} {answers:<7} {size:>8}|"
            f" {ratio:>8.2f} {batches / mean:>9.2f} |"
            f" {mean:>5.3f}  {mean * ratio:>6.3f}   {spread}",
            flush=True,
        )


# ──────────────────────────────────────────── on paper ───────────────────────────────────────────


# An H100: dense FLOP/s as reached, bytes/s, seconds of an eager launch, GiB (half for the context).
PEAK, BANDWIDTH, LAUNCH, MEMORY = 790e12, 3.35e12, 7e-6, 79.6


class Meter(TorchDispatchMode):
    """Counts operations, FLOPs, bytes, and the time that they take on the card.

    What gives a view or its input back is no operation; a reshape that copies is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = self.flops = self.kv_bytes = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = list(tensors_in([args, kwargs])), list(tensors_in(out))
        if not any(tensor.is_meta for tensor in inputs + outputs):
            return out
        is_alias = all(any(torch._C._is_alias_of(o, i) for i in inputs) for o in outputs)
        if is_alias and not func._schema.is_mutable:
            return out
        name = func._overloadpacket.__name__
        flops = self.count_flops(name, args, outputs)
        num_bytes = self.count_bytes(name, args, inputs, outputs)
        self.num_ops, self.flops = self.num_ops + 1, self.flops + flops
        self.seconds += max(LAUNCH, flops / PEAK, num_bytes / BANDWIDTH)
        return out

    def count_flops(self, name: str, args, outputs) -> int:
        if name == "linear":
            return 2 * outputs[0].numel() * args[1].shape[1]
        if name == "matmul":
            return 2 * outputs[0].numel() * args[0].shape[-1]
        if name == "conv2d":
            return 2 * outputs[0].numel() * args[1][0].numel()
        if name == "scaled_dot_product_attention":
            if len(args) > 3 or args[0].shape[2] != args[1].shape[2]:
                self.kv_bytes += size_of(args[1]) + size_of(args[2])
            return 4 * args[0].numel() * args[1].shape[2]
        return 0

    @staticmethod
    def count_bytes(name: str, args, inputs, outputs) -> int:
        if name in ("index", "embedding", "index_select"):
            return 2 * sum(map(size_of, outputs))
        if name in ("index_put_", "index_put"):
            return 2 * size_of(args[2])
        if name in ("zeros", "new_zeros", "empty", "zero_", "zeros_like"):
            return sum(map(size_of, outputs))
        return sum(map(size_of, list({id(tensor): tensor for tensor in inputs + outputs}.values())))


def tensors_in(value):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class PaperExtractor(script.Extractor):
    """The program's own, on the meta device; answers end by chance."""

    def __init__(self, model, prompter, limit: int, batch_size: int, meter: Meter) -> None:
        layers = script.choose_layers(None, model.config.text_config.num_hidden_layers)
        super().__init__(model, prompter, layers, limit, batch_size, torch.device("meta"))
        self.meter = meter
        self.draw = random.Random(0)
        # Of each pass: operations, live questions or images, FLOPs, bytes of keys and values.
        self.passes: dict[str, list[tuple]] = {"encode": [], "prefill": [], "decode": []}

    def has_ended(self, live) -> bool:
        return self.draw.random() < 1 / 30

    def counted(self, name: str, count: int, method, *args):
        meter = self.meter
        before = (meter.num_ops, meter.flops, meter.kv_bytes)
        result = method(*args)
        num_ops, flops, kv_bytes = meter.num_ops, meter.flops, meter.kv_bytes
        deltas = (flops - before[1], kv_bytes - before[2])
        self.passes[name].append((num_ops - before[0], count, *deltas))
        return result

    def _encode(self, chunk):
        return self.counted("encode", len(chunk), super()._encode, chunk)

    def _prefill(self, lanes):
        return self.counted("prefill", len(lanes), super()._prefill, lanes)

    def _decode(self):
        return self.counted("decode", self.num_live(), super()._decode)


@contextlib.contextmanager
def nothing_read_back():
    """What a meta tensor cannot tell is given in its place; transformers' checks of it are off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "to_numpy", to_ones)
        patch.setattr(modeling_gemma3, "torch_compilable_check", lambda *_: None)
        patch.setattr(script.Gemma3RMSNorm, "forward", script.short_norm)
        yield


def to_ones(vectors: dict) -> np.ndarray:
    """As many ones as there are vectors."""
    found = list(vectors.values())
    torch.stack(found, dim=1)  # which is counted
    return np.ones((len(found[0]), len(found), *found[0].shape[1:]), dtype=np.float32)


def pictures_for_ever(prompter: script.Prompter, num_questions: int, question: str | None = None):
    """Images of the meta device, without end, with easy-VQA's questions, or one again and again."""
    _, rows = make_rows(40, None)
    again = itertools.cycle(rows)
    pixel_values = torch.empty(3, 896, 896, dtype=torch.bfloat16, device="meta")
    while True:
        rows = list(itertools.islice(again, num_questions))
        texts = [question or row.question for row in rows]
        questions = [
            script.Question(row, prompter.tokenize(text)) for row, text in zip(rows, texts)
        ]
        yield script.Picture(pixel_values, "", questions)


@dataclass
class OnPaper:
    """A case's figures."""

    tflop: float  # a question, without answers
    prefill_ops: float  # of a pass
    step_ops: int  # of a decoding step, median
    kv_gb: float  # keys and values read a step, median
    occupancy: float  # of the batch, mean
    rate: float  # questions a second


def run_on_paper(model, prompter, questions: int, batch_size: int, num_batches: int = 1) -> OnPaper:
    """The lanes in their stride: from when as many answers as the batch holds have ended."""
    with nothing_read_back(), Meter() as meter:
        extractor = PaperExtractor(model, prompter, 200, batch_size, meter)
        passes = extractor.run(pictures_for_ever(prompter, questions))
        outcomes = itertools.chain.from_iterable(passes)
        for _ in itertools.islice(outcomes, batch_size):
            pass
        before = meter.seconds
        firsts = {name: len(passes) for name, passes in extractor.passes.items()}
        num_done = num_batches * batch_size
        for _ in itertools.islice(outcomes, num_done):
            pass
    later = {name: passes[firsts[name] :] for name, passes in extractor.passes.items()}
    encoded, prefilled, decoded = (list(zip(*later[name])) for name in later)
    of_image = sum(encoded[2]) / sum(encoded[1])
    of_question = sum(prefilled[2]) / sum(prefilled[1])
    return OnPaper(
        (of_image / questions + of_question) / 1e12,
        statistics.median(prefilled[0]),
        int(statistics.median(decoded[0])),
        statistics.median(decoded[3]) / 1e9,
        statistics.mean(decoded[1]) / batch_size,
        num_done / (meter.seconds - before),
    )


def print_paper(processor) -> None:
    """The table, and the line that the README quotes."""
    model = make_model("12b", torch.device("meta"), torch.bfloat16)
    prompter, weights = script.Prompter(processor, model.config), 2 * model.num_parameters()
    assert script.lane_width(prompter, 200) == NUM_SLOTS
    lane, needed = NUM_SLOTS * 393_216 / 2**30, script.pass_memory(model.config, 2) / 2**30
    free = int((MEMORY - 0.5) * 2**30 - weights)
    size = script.fit_batch_size(free, model.config, 2, NUM_SLOTS)
    print("Gemma 3 12B on paper: arithmetic, not measured. Answers of mean 30 tokens, limit 200.")
    print(
        f"GiB: weights {weights / 2**30:.2f}, a lane {lane:.2f}, passes {needed:.1f}: {size} lanes"
    )
    print("questions batch   TFLOP a   launches of a   keys, values  live  questions")
    print(" an image  size  question  prefill     step   GB a step          a second")
    rates, launches = [], 0
    for questions, batch_size in itertools.product([1, 10], [64, size]):
        case = run_on_paper(model, prompter, questions, batch_size)
        print(
            f"{questions:>9} {batch_size:>5} {case.tflop:>9.2f} {case.prefill_ops:>8.0f} "
            f"{case.step_ops:>8} {case.kv_gb:>11.1f} {case.occupancy:>7.0%} {case.rate:>9.1f}",
            flush=True,
        )
        rates.append(case.rate)
        launches = max(launches, case.step_ops)
    print(
        f"on paper, H100, default flags: {rates[1]:.0f} questions/s at 1 question an image, "
        f"{rates[3]:.0f} at 10; {launches} launches a step"
    )


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--paper", action="store_true", help="count operations instead of measuring")
    add("--size", choices=SIZES, default="small")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--batch-sizes", default="auto", help="comma-separated")
    add("--answers", nargs="+", default=["none", "equal", "mixed"])
    add("--questions", default="all,1", help="questions an image; all: easy-VQA's 9.7")
    add("--images", type=int, default=20, help="images of ours: lanes are to be filled again")
    add("--plain-rows", type=int, default=23, help="rows of the others")
    add("--pairs", type=int, default=3)
    args = parser.parse_args()
    args.batch_sizes = [None if w == "auto" else int(w) for w in args.batch_sizes.split(",")]
    args.questions = [None if w == "all" else int(w) for w in args.questions.split(",")]
    return args


def main() -> None:
    args = parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(MODEL, backend="pil")
    if args.paper:
        return print_paper(processor)
    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    model = make_model(args.size, args.device, dtype)
    measure(args, Bench(model, processor, args.device, make_rows(1, 1)[0]))


if __name__ == "__main__":
    main()
