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
The memory that passes need is measured: what is alive beside weights and lanes at the worst moment.
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
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
import torch
import transformers
from conftest import MODEL, make_options, write_csv  # puts the scripts on the path
from make_tiny_gemma3 import join_configs, make_released_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import run_gemma3_extraction as script

EQUAL_LENGTH = 16  # tokens of each answer in `equal`
LONG_LENGTH = 100  # tokens of the long answers in `mixed`
PLAIN_BATCH_SIZE = 16
NUM_PLAIN_BATCH_ROWS = 32  # two batches

# On paper.
ANSWER_LIMIT = 200  # the script's own default
MEAN_ANSWER = 30  # tokens
# An H100.
PEAK_FLOPS = 790e12  # dense bfloat16, a second, as large matrix products reach it
BANDWIDTH = 3.35e12  # bytes a second
LAUNCH_SECONDS = 7e-6  # of an operation that eager torch starts
CARD_MEMORY = 79.6  # GiB
CONTEXT_MEMORY = 0.5  # GiB that CUDA itself takes
# Prompts of 32 tokens after the prefix fill 256 lanes and MAX_PASS_TOKENS alike. Of longer ones a
# pass has fewer, and shorter ones use fewer slots: 24 took 2.2 GiB, 32 2.9, 40 2.6, 63 2.1.
LARGEST_PREFILL_TOKENS = 32


def make_small_config(tokenizer) -> Gemma3Config:
    """The decoder of Gemma 3 270M, with a small tower."""
    return join_configs(
        tokenizer,
        text_config={
            "vocab_size": 262_144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    )


def make_model(
    size: str, tokenizer, device: torch.device, dtype: torch.dtype
) -> Gemma3ForConditionalGeneration:
    """A random model of a given size, made on the device; no token is an end to it."""
    if size == "small":
        config = make_small_config(tokenizer)
    else:
        config = make_released_config(tokenizer, size)
    torch.manual_seed(0)
    with device:
        model = Gemma3ForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    # It begins with zeros, and then every image would look the same to the decoder.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    model.generation_config.eos_token_id = [-1]
    return model.eval()


def find_images_dir() -> Path:
    """Where easy-VQA's images are."""
    return Path(easy_vqa.get_train_image_paths()[0]).parent


def make_rows(num_images: int, questions_per_image: int | None) -> list[script.Row]:
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
    return rows


def draw_lengths(answers: str, num_rows: int) -> list[int]:
    """Answer tokens of every row."""
    if answers == "none":
        return [0] * num_rows
    if answers == "equal":
        return [EQUAL_LENGTH] * num_rows
    draw = random.Random(0)
    lengths = []
    for _ in range(num_rows):
        is_long = draw.random() < 1 / 12
        lengths.append(LONG_LENGTH if is_long else draw.randint(2, 8))
    return lengths


def dtype_name(model) -> str:
    """The model's dtype as the script's `--dtype` has it."""
    return str(model.dtype).removeprefix("torch.")


# ─────────────────────────────────────────── measured ────────────────────────────────────────────
@dataclass
class Bench:
    """A loaded model, and what it takes to run it."""

    model: Gemma3ForConditionalGeneration
    processor: transformers.ProcessorMixin
    device: torch.device
    images_dir: Path

    def make_inputs(self, rows: list[script.Row]) -> transformers.BatchFeature:
        """Rows by the processor's own means, padded on the left."""
        conversations = []
        for row in rows:
            image, _, _ = script.open_image(self.images_dir, row.image_id)
            turn = script.make_user_turn({"type": "image", "image": image}, row.question)
            conversations.append([turn])
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return inputs.to(self.device, self.model.dtype)

    def reference_forward(self, rows: list[script.Row], num_tokens: int) -> None:
        """Answers of so many tokens to rows side by side; one forward pass if there are none."""
        inputs = self.make_inputs(rows)
        if not num_tokens:
            self.model.model(**inputs)
            return
        self.model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            disable_compile=True,
        )

    @torch.inference_mode()
    def time_plainly(
        self, rows: list[script.Row], lengths: list[int], batch_size: int = 1
    ) -> float:
        """Seconds a row, `batch_size` rows side by side until the longest answer has ended."""
        # As transformers has them: `load_model` has changed both.
        script.use_rms_norm(self.model, Gemma3RMSNorm.forward)
        torch.backends.cuda.enable_cudnn_sdp(True)
        start = time.perf_counter()
        for first in range(0, len(rows), batch_size):
            stop = first + batch_size
            self.reference_forward(rows[first:stop], max(lengths[first:stop]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / len(rows)

    def time_ours(
        self, rows: list[script.Row], lengths: list[int], batch_size: int | None
    ) -> float:
        """Seconds a row of the whole program, but for loading the model."""
        # As `load_model` has them.
        script.use_rms_norm(self.model, script.fused_rms_norm)
        torch.backends.cuda.enable_cudnn_sdp(False)
        with (
            tempfile.TemporaryDirectory() as directory,
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            self.put_in_script(patch, rows, lengths)
            table = [dataclasses.astuple(row) for row in rows]
            options = make_options(
                write_csv(Path(directory) / "rows.csv", table),
                self.images_dir,
                model=str(MODEL),
                output_dir=Path(directory) / "out",
                dtype=dtype_name(self.model),
                device=str(self.device),
                max_new_tokens=max(lengths),
                batch_size=batch_size,
            )
            torch.cuda.empty_cache()  # `auto` measures what is free
            start = time.perf_counter()
            status = script.extract(options)
            seconds = time.perf_counter() - start
        assert status == 0
        return seconds / len(rows)

    def put_in_script(
        self, patch: pytest.MonkeyPatch, rows: list[script.Row], lengths: list[int]
    ) -> None:
        """Let the script take the model in memory, and end each answer at its row's length."""
        checkpoint = script.Checkpoint(
            name=str(MODEL),
            directory=MODEL,
            revision="random",
            config=self.model.config,
            processor=self.processor,
        )
        ids = [row.question_id for row in rows]
        length_by_id = dict(zip(ids, lengths, strict=True))

        def has_ended(_, sequence: script.Sequence) -> bool:
            length = length_by_id[sequence.prompt.row.question_id]
            return len(sequence.generated_ids) == length

        patch.setattr(script, "find_checkpoint", lambda *_: checkpoint)
        patch.setattr(script, "load_model", lambda *_: self.model)
        patch.setattr(script.Extractor, "has_ended", has_ended)


def spread_evenly(lengths: list[int], num_chosen: int) -> list[int]:
    """Indices of rows evenly from all lengths, so that their mean is that of all rows."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    step = len(lengths) / num_chosen
    return [by_length[int((k + 0.5) * step)] for k in range(num_chosen)]


def measure_case(
    args: argparse.Namespace,
    bench: Bench,
    questions_per_image: int | None,
    answers: str,
    batch_size: int | None,
) -> str:
    """A line of the table."""
    rows = make_rows(args.images, questions_per_image)
    lengths = draw_lengths(answers, len(rows))
    chosen = spread_evenly(lengths, min(args.plain_rows, len(rows)))
    plain_rows = [rows[i] for i in chosen]
    plain_lengths = [lengths[i] for i in chosen]
    batched = bench.time_plainly(
        rows[:NUM_PLAIN_BATCH_ROWS], lengths[:NUM_PLAIN_BATCH_ROWS], PLAIN_BATCH_SIZE
    )
    ratios = []
    seconds = []
    for _ in range(args.pairs):
        plain_seconds = bench.time_plainly(plain_rows, plain_lengths)
        our_seconds = bench.time_ours(rows, lengths, batch_size)
        ratios.append(plain_seconds / our_seconds)
        seconds.append(our_seconds)
    ratio = statistics.median(ratios)
    ours = statistics.median(seconds)
    num_images = len({row.image_id for row in rows})
    return (
        f"{len(rows) / num_images:>9.1f} {answers:<7} {batch_size or 'auto':>8}|"
        f" {ratio:>8.2f} {batched / ours:>9.2f} |"
        f" {ours:>5.3f}  {ours * ratio:>6.3f}   {min(ratios):.2f} to {max(ratios):.2f}"
    )


def measure(args: argparse.Namespace, bench: Bench) -> None:
    """Print the table, a line a case."""
    warm_up = make_rows(2, 1)
    bench.time_plainly(warm_up, [1, 1])
    bench.time_ours(warm_up, [1, 1], batch_size=2)
    dtype = dtype_name(bench.model)
    print(f"{args.size}, {args.device}, {dtype}, medians of {args.pairs} pairs")
    print("questions answers  batch |      times as fast as  | seconds a row")
    print(" an image           size |  forward  batch 16 |  ours forward")
    for questions in args.questions:
        for answers in args.answers:
            for batch_size in args.batch_sizes:
                line = measure_case(args, bench, questions, answers, batch_size)
                print(line, flush=True)


# ──────────────────────────────────────────── on paper ───────────────────────────────────────────
class Meter(TorchDispatchMode):
    """Counts the operations of meta tensors, and the time and memory that they take on the card.

    What gives a view or its input back is no operation; a reshape that copies is one. Attention is
    one operation that needs its inputs and its output, as in the fused kernels of a card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_launches = 0
        self.flops = 0
        self.kv_bytes = 0  # keys and values that attention reads
        self.seconds = 0.0
        self.live_bytes = 0  # of the tensors that were made under this meter
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = list(tensors_in([args, kwargs]))
        outputs = list(tensors_in(result))
        if not any(tensor.is_meta for tensor in inputs + outputs):
            return result
        made = [tensor for tensor in outputs if not is_alias(tensor, inputs)]
        if not made and not func._schema.is_mutable:
            return result
        name = func._overloadpacket.__name__
        flops = self.count_flops(name, args, outputs)
        num_bytes = count_bytes(name, args, inputs, outputs)
        self.num_launches += 1
        self.flops += flops
        self.seconds += max(LAUNCH_SECONDS, flops / PEAK_FLOPS, num_bytes / BANDWIDTH)
        self.follow(made)
        if name == "logsumexp":  # within it torch 2.13 computes exp(input - maxima), in one tensor
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + size_of(args[0]))
        return result

    def count_flops(self, name: str, args: tuple, outputs: list[Tensor]) -> int:
        if name == "linear":
            return 2 * outputs[0].numel() * args[1].shape[1]
        if name == "matmul":
            return 2 * outputs[0].numel() * args[0].shape[-1]
        if name == "conv2d":
            return 2 * outputs[0].numel() * args[1][0].numel()
        if name == "scaled_dot_product_attention":
            queries, keys, values = args[:3]
            self.kv_bytes += size_of(keys) + size_of(values)
            return 4 * queries.numel() * keys.shape[2]
        return 0

    def follow(self, made: list[Tensor]) -> None:
        """Count new tensors as live until nobody holds their memory any more, as a view may."""
        for tensor in made:
            storage = tensor.untyped_storage()
            self.live_bytes += storage.nbytes()
            weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def forget(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def count_bytes(name: str, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """What an operation reads and writes."""
    if name in ("index", "embedding", "index_select"):
        return 2 * sum(map(size_of, outputs))
    if name in ("index_put_", "index_put"):
        return 2 * size_of(args[2])
    if name in ("zeros", "new_zeros", "empty", "zero_", "zeros_like"):
        return sum(map(size_of, outputs))
    distinct = {id(tensor): tensor for tensor in inputs + outputs}
    return sum(map(size_of, distinct.values()))


def tensors_in(value) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def is_alias(tensor: Tensor, others: list[Tensor]) -> bool:
    """Whether it lies in the memory of one of the others."""
    return any(torch._C._is_alias_of(tensor, other) for other in others)


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Pass:
    """What was counted in one pass."""

    num_items: int  # images, or questions whose answers have not ended
    num_launches: int
    flops: int
    kv_bytes: int
    peak_bytes: int  # beside weights and lanes


class PaperExtractor(script.Extractor):
    """The program's own, on the meta device; answers end by chance."""

    def __init__(self, model, prompter: script.Prompter, batch_size: int, meter: Meter) -> None:
        script.use_rms_norm(model, script.fused_rms_norm)  # as `load_model` does
        layers = script.choose_layers(None, model.config.text_config.num_hidden_layers)
        meta = torch.device("meta")
        super().__init__(model, prompter, layers, ANSWER_LIMIT, batch_size, meta)
        self.meter = meter
        self.draw = random.Random(0)
        self.passes: dict[str, list[Pass]] = {"encode": [], "prefill": [], "decode": []}

    def has_ended(self, sequence: script.Sequence) -> bool:
        return self.draw.random() < 1 / MEAN_ANSWER

    @contextlib.contextmanager
    def counted(self, kind: str, num_items: int) -> Iterator[None]:
        """Add what happens within it to `passes`."""
        meter = self.meter
        launches_before = meter.num_launches
        flops_before = meter.flops
        kv_bytes_before = meter.kv_bytes
        meter.peak_bytes = meter.live_bytes
        yield
        counted = Pass(
            num_items=num_items,
            num_launches=meter.num_launches - launches_before,
            flops=meter.flops - flops_before,
            kv_bytes=meter.kv_bytes - kv_bytes_before,
            peak_bytes=meter.peak_bytes - sum(map(size_of, self.lanes.layers)),
        )
        self.passes[kind].append(counted)

    def encode(self, images: list[script.PreparedImage]) -> None:
        with self.counted("encode", len(images)):
            super().encode(images)

    def prefill(self, sequences: list[script.Sequence]) -> list[script.Outcome]:
        with self.counted("prefill", len(sequences)):
            return super().prefill(sequences)

    def decode(self) -> list[script.Outcome]:
        with self.counted("decode", self.scheduler.num_running):
            return super().decode()


@contextlib.contextmanager
def nothing_read_back() -> Iterator[None]:
    """What a meta tensor cannot tell is given in its place; transformers' checks of it are off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "to_numpy", to_ones)
        patch.setattr(modeling_gemma3, "torch_compilable_check", lambda *_: None)
        yield


def to_ones(tensors: list[Tensor]) -> np.ndarray:
    """As many ones as the tensors have numbers, in the shape of `to_numpy`."""
    stacked = torch.stack(tensors, dim=1)  # which is counted
    return np.ones(stacked.shape, dtype=np.float32)


def images_for_ever(
    prompter: script.Prompter, num_questions: int, texts: list[str] | None = None
) -> Iterator[script.PreparedImage]:
    """Images without end, with easy-VQA's questions, or with these again and again."""
    rows = make_rows(40, None)
    if texts is None:
        texts = [row.question for row in rows]
    prompts = [script.Prompt(rows[0], prompter.tokenize(text)) for text in texts]
    prompts_for_ever = itertools.cycle(prompts)
    while True:
        pixel_values = torch.empty(3, 896, 896, dtype=torch.bfloat16)  # in host memory, as read
        about_image = list(itertools.islice(prompts_for_ever, num_questions))
        yield script.PreparedImage(pixel_values, "", about_image)


def make_question(prompter: script.Prompter, num_tokens: int) -> str:
    """A question whose prompt has so many tokens after the prefix."""
    question = "what"
    while len(prompter.tokenize(question)) < len(prompter.prefix) + num_tokens:
        question += " what"
    return question


def measure_working_memory(model, prompter: script.Prompter) -> dict[str, int]:
    """Bytes beside weights and lanes that the largest pass of each kind needs with default flags.

    The cache of the images encoded last is there too, while questions about them wait.
    """
    with nothing_read_back(), Meter() as meter:
        extractor = PaperExtractor(model, prompter, script.MAX_BATCH_SIZE, meter)
        extractor.has_ended = lambda _: False
        # Two lengths in turn: what runs together is not side by side, so its lanes are copied.
        short = make_question(prompter, LARGEST_PREFILL_TOKENS)
        long = make_question(prompter, LARGEST_PREFILL_TOKENS + 1)
        passes = extractor.run(images_for_ever(prompter, 10, [short, long]))
        while not extractor.passes["decode"]:
            next(passes)
        # The next step shall use every slot of all lanes.
        num_slots = extractor.lanes.num_slots
        for sequence in extractor.scheduler.running:
            sequence.generated_ids = [0] * (num_slots - len(sequence.prompt.input_ids))
        next(passes)
    largest = {}
    for kind, counted in extractor.passes.items():
        largest[kind] = max(one.peak_bytes for one in counted)
    return largest


@dataclass
class OnPaper:
    """A case's figures."""

    tflop: float  # a question, without answers
    prefill_launches: float  # of a pass, median
    step_launches: int  # of a decoding step, median
    kv_gb: float  # keys and values read a step, median
    occupancy: float  # of the batch, mean
    rate: float  # questions a second


def run_on_paper(
    model, prompter: script.Prompter, questions_per_image: int, batch_size: int
) -> OnPaper:
    """One batch of answers, from when as many as the batch holds have ended."""
    with nothing_read_back(), Meter() as meter:
        extractor = PaperExtractor(model, prompter, batch_size, meter)
        passes = extractor.run(images_for_ever(prompter, questions_per_image))
        outcomes = itertools.chain.from_iterable(passes)
        drop(outcomes, batch_size)
        for counted in extractor.passes.values():
            counted.clear()
        seconds_before = meter.seconds
        drop(outcomes, batch_size)
        seconds = meter.seconds - seconds_before
    encoded = extractor.passes["encode"]
    prefilled = extractor.passes["prefill"]
    decoded = extractor.passes["decode"]
    flops = flops_an_item(encoded) / questions_per_image + flops_an_item(prefilled)
    num_running = statistics.mean(one.num_items for one in decoded)
    return OnPaper(
        tflop=flops / 1e12,
        prefill_launches=statistics.median(one.num_launches for one in prefilled),
        step_launches=int(statistics.median(one.num_launches for one in decoded)),
        kv_gb=statistics.median(one.kv_bytes for one in decoded) / 1e9,
        occupancy=num_running / batch_size,
        rate=batch_size / seconds,
    )


def drop(outcomes: Iterator[script.Outcome], count: int) -> None:
    """Let so many answers end."""
    for _ in itertools.islice(outcomes, count):
        pass


def flops_an_item(passes: list[Pass]) -> float:
    """FLOPs of an image or a question, of all these passes together."""
    return sum(one.flops for one in passes) / sum(one.num_items for one in passes)


def usual_slots(prompter: script.Prompter) -> int:
    """Slots of a lane with default flags."""
    num_prompt_tokens = len(prompter.prefix) + script.TYPICAL_QUESTION
    return script.lane_slots(num_prompt_tokens, ANSWER_LIMIT)


def bytes_per_slot(config: Gemma3Config) -> int:
    """A position's keys and values in all layers, in bfloat16."""
    text = config.text_config
    return 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


def print_paper(processor) -> None:
    """The table, and the line that the README quotes."""
    gib = 2**30
    model = make_model("12b", processor.tokenizer, torch.device("meta"), torch.bfloat16)
    prompter = script.Prompter(processor, model.config)
    num_slots = usual_slots(prompter)
    weights = 2 * model.num_parameters() / gib
    lane = num_slots * bytes_per_slot(model.config) / gib
    needed = max(measure_working_memory(model, prompter).values()) / gib
    free = int((CARD_MEMORY - CONTEXT_MEMORY - weights) * gib)
    size = script.fit_batch_size(free, model.config, model.dtype, num_slots)
    print("Gemma 3 12B on paper: arithmetic, not measured. Answers of mean 30 tokens, limit 200.")
    print(f"GiB: weights {weights:.2f}, a lane {lane:.2f}, passes {needed:.1f}: {size} lanes")
    print("questions batch   TFLOP a   launches of a   keys, values  live  questions")
    print(" an image  size  question  prefill     step   GB a step          a second")
    rates = {}  # by questions an image, of the larger batch
    launches = 0
    for questions in (1, 10):
        for batch_size in (64, size):
            case = run_on_paper(model, prompter, questions, batch_size)
            print(
                f"{questions:>9} {batch_size:>5} {case.tflop:>9.2f} {case.prefill_launches:>8.0f} "
                f"{case.step_launches:>8} {case.kv_gb:>11.1f} {case.occupancy:>7.0%} "
                f"{case.rate:>9.1f}",
                flush=True,
            )
            rates[questions] = case.rate
            launches = max(launches, case.step_launches)
    print(
        f"on paper, H100, default flags: {rates[1]:.0f} questions/s at 1 question an image, "
        f"{rates[10]:.0f} at 10; {launches} launches a step"
    )


# ───────────────────────────────────────── command line ──────────────────────────────────────────
def number_or(word: str, text: str) -> int | None:
    """A number, or None where the text is this word."""
    return None if text == word else int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--paper", action="store_true", help="count operations instead of measuring")
    add("--size", choices=["small", "12b"], default="small", help="of the model")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--batch-sizes", default="auto", help="comma-separated numbers, or auto")
    add("--answers", nargs="+", default=["none", "equal", "mixed"])
    add("--questions", default="all,1", help="comma-separated, an image; all: easy-VQA's 9.7")
    add("--images", type=int, default=20, help="images of ours: lanes are to be filled again")
    add("--plain-rows", type=int, default=23, help="rows of the others")
    add("--pairs", type=int, default=3, help="timings of each way, in turns")
    args = parser.parse_args()
    args.batch_sizes = [number_or("auto", text) for text in args.batch_sizes.split(",")]
    args.questions = [number_or("all", text) for text in args.questions.split(",")]
    return args


def main() -> None:
    args = parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(MODEL, backend="pil")
    if args.paper:
        print_paper(processor)
        return
    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    model = make_model(args.size, processor.tokenizer, args.device, dtype)
    measure(args, Bench(model, processor, args.device, find_images_dir()))


if __name__ == "__main__":
    main()
