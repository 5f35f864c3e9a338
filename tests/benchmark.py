"""How much faster than running every row by itself: ratios within one process, pair by pair.

    python tests/benchmark.py                                        # small random model, CPU
    python tests/benchmark.py --size 12b --device cuda --batch-sizes 1,16,64

Each row of the table is a way to run a VQA data set (questions an image, answer tokens, batch
size), images read and parts written included; its columns say how many times as fast it is as

    forward     one bare forward pass a row (`generate` with answers): nothing captured or written
    hidden      the same with `output_hidden_states=True`
    three       the vision tower, a pass with hidden states and `generate`, one after the other

and where its time goes: in the model, or waiting for images and files; beside it the share of the
time that the threads for images and files were busy. Medians of `--pairs` pairs.
On a card also the arithmetic that sharing leaves, as a fraction of the card's own matmul rate, and
the card's idle time between batches.
"""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import easy_vqa
import torch
from conftest import MODEL, ROOT  # noqa: F401  puts the scripts on the path
from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration

import run_gemma3_extraction as script

SMALL = {  # the decoder of Gemma 3 270M; a tower that costs about as much as its prompt
    "text_config": {
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
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
SIZE_12B = {
    "text_config": {
        "vocab_size": 262_208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
}
SIZES = {"small": SMALL, "12b": SIZE_12B}


def make_model(size: str, device: torch.device, dtype: torch.dtype):
    """A random model of a given size, made on the device."""
    base = Gemma3Config.from_pretrained(MODEL)
    text = {**base.text_config.to_dict(), **SIZES[size]["text_config"], "layer_types": None}
    vision = {**base.vision_config.to_dict(), **SIZES[size]["vision_config"]}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=base.image_token_id,
        mm_tokens_per_image=base.mm_tokens_per_image,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = Gemma3ForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    model.generation_config.eos_token_id = [-1]  # every answer takes all its tokens
    return model


def make_rows(num_images: int, questions_per_image: int) -> tuple[Path, list[script.Row]]:
    """Rows of easy-VQA, each image with the same number of questions."""
    questions, answers, image_ids = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    counts: Counter = Counter()
    rows = []
    for index, (question, answer, image_id) in enumerate(zip(questions, answers, image_ids)):
        is_new = image_id not in counts
        if (is_new and len(counts) == num_images) or counts[image_id] == questions_per_image:
            continue
        counts[image_id] += 1
        name = Path(paths[image_id]).name
        rows.append(script.Row(index, str(index), name, question, answer))
    return Path(paths[0]).parent, rows


@dataclasses.dataclass
class Bench:
    """A loaded model, and what it takes to run it."""

    model: Gemma3ForConditionalGeneration
    processor: object
    device: torch.device
    images_dir: Path

    def inputs(self, row: script.Row):
        """One row by the processor's own means."""
        image = script.open_image(self.images_dir, row.image_id)
        content = [{"type": "image", "image": image}, {"type": "text", "text": row.question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        ).to(self.device, self.model.dtype)

    def generate(self, inputs, num_tokens: int, **kwargs) -> None:
        self.model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            disable_compile=True,
            **kwargs,
        )

    def forward(self, inputs, num_tokens: int) -> None:
        if num_tokens:
            self.generate(inputs, num_tokens)
        else:
            self.model.model(**inputs)

    def hidden(self, inputs, num_tokens: int) -> None:
        if num_tokens:
            flags = {"return_dict_in_generate": True, "output_hidden_states": True}
            self.generate(inputs, num_tokens, **flags)
        else:
            self.model(**inputs, output_hidden_states=True)

    def three(self, inputs, num_tokens: int) -> None:
        self.model.model.vision_tower(inputs["pixel_values"])
        self.model(**inputs, output_hidden_states=True)
        self.generate(inputs, max(num_tokens, 1))

    @torch.inference_mode()
    def time_rows(self, way, rows: list[script.Row], num_tokens: int) -> float:
        """Seconds a row, one row after the other."""
        start = time.perf_counter()
        for row in rows:
            way(self.inputs(row), num_tokens)
        synchronise(self.device)
        return (time.perf_counter() - start) / len(rows)

    def time_ours(self, rows, num_tokens: int, batch_size: int) -> tuple[float, dict[str, float]]:
        """Seconds a row with everything included, and the share of the time in each step."""
        config, prompts = self.model.config, script.Prompts(self.processor)
        with tempfile.TemporaryDirectory() as directory:
            options = script.Options(
                Path("easy_vqa"),
                self.images_dir,
                Path(directory),
                dtype=str(self.model.dtype).partition(".")[2],
                max_new_tokens=num_tokens,
                batch_size=batch_size,
            )
            settings = script.describe_run(options, config, prompts, rows, self.device)
            shapes = script.state_shapes(config, settings["layers"])
            launch = script.Launch()
            run = script.Run(
                options,
                settings,
                shapes,
                prompts,
                self.device,
                launch,
                script.open_output(options, settings, shapes, rows, launch),
                script.Progress(launch, len(rows), 0),
                script.StopSignal(),
            )
            extractor = script.Extractor(
                self.model, prompts, settings["layers"], num_tokens, self.device
            )
            with measure_shares() as seconds:
                start = time.perf_counter()
                script.work_through(run, extractor)
                total = time.perf_counter() - start
            run.work.lock.release()
        return total / len(rows), {name: value / total for name, value in seconds.items()}


@contextlib.contextmanager
def measure_shares():
    """Seconds spent in the pipeline's steps, by wrapping them."""
    seconds: dict[str, float] = {}
    steps = {
        "model": (script, "run_batch"),
        "(images)": (script, "prepare_image"),
        "(files)": (script.Recorder, "record"),
    }
    originals = {name: getattr(*place) for name, place in steps.items()}
    events: list[torch.cuda.Event] = []

    def mark(name) -> None:
        if name == "model" and torch.cuda.is_available():
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

    def wrap(name):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            mark(name)
            try:
                return originals[name](*args, **kwargs)
            finally:
                mark(name)
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - start

        return timed

    for name, (owner, attribute) in steps.items():
        setattr(owner, attribute, wrap(name))
    try:
        yield seconds
    finally:
        for name, (owner, attribute) in steps.items():
            setattr(owner, attribute, originals[name])
    if events:
        torch.cuda.synchronize()
        gaps = zip(events[1:-1:2], events[2::2])
        seconds["idle"] = sum(end.elapsed_time(start) for end, start in gaps) / 1e3


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a large bfloat16 product on random data."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronise(device)
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def count_flop(model, prompts: script.Prompts, rows: list[script.Row]) -> float:
    """What sharing leaves to do: each image's tower and shared tokens once, each question's own."""
    vision = model.config.vision_config
    tower = model.model.vision_tower
    num_patches = (vision.image_size // vision.patch_size) ** 2
    per_image = 2 * num_patches * sum(p.numel() for p in tower.encoder.parameters())
    per_image += 4 * num_patches**2 * vision.hidden_size * vision.num_hidden_layers
    per_token = 2 * sum(p.numel() for p in model.model.language_model.layers.parameters())
    by_image: dict[str, list[int]] = {}
    for row in rows:
        length = len(prompts.tokenize(row.question))
        by_image.setdefault(row.image_id, []).append(length)
    shared = prompts.soft_stop + 1
    tokens = sum(shared + sum(n - shared for n in lengths) for lengths in by_image.values())
    return len(by_image) * per_image + tokens * per_token


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch-sizes", type=numbers, default=[1, 16])
    parser.add_argument("--answers", type=numbers, default=[0, 16], help="answer tokens")
    parser.add_argument("--questions", type=numbers, default=[1, 10], help="questions an image")
    parser.add_argument(
        "--rows", type=int, default=20, help="rows of ours; a quarter for 1 an image"
    )
    parser.add_argument("--plain-rows", type=int, default=2, help="rows of the others")
    parser.add_argument("--pairs", type=int, default=2)
    return parser.parse_args()


def choose_rows(args: argparse.Namespace, questions: int) -> list[script.Row]:
    """What ours runs: as many images as make `--rows`."""
    return make_rows(args.rows // (questions if questions > 1 else 4), questions)[1]


def measure(args: argparse.Namespace, bench: Bench) -> dict[tuple, dict[str, list]]:
    """Ratios, shares and seconds a row of every case, a list with one entry a pair."""
    _, sample = make_rows(args.plain_rows, 1)
    for way in (bench.forward, bench.hidden, bench.three):
        bench.time_rows(way, sample[:1], 1)
    bench.time_ours(sample, 1, 2)
    found: dict[tuple, dict[str, list]] = {}
    for _ in range(args.pairs):
        for answers in args.answers:
            slow = [bench.time_rows(way, sample, answers) for way in (bench.hidden, bench.three)]
            for questions, batch_size in itertools.product(args.questions, args.batch_sizes):
                plain = [bench.time_rows(bench.forward, sample, answers), *slow]
                rows = choose_rows(args, questions)
                ours, shares = bench.time_ours(rows, answers, batch_size)
                case = found.setdefault((questions, answers, batch_size), {})
                case.setdefault("ratios", []).append([other / ours for other in plain])
                case.setdefault("shares", []).append(shares)
                case.setdefault("seconds", []).append(ours)
    return found


def report(args: argparse.Namespace, bench: Bench, found: dict[tuple, dict[str, list]]) -> None:
    """Print the table."""
    median = statistics.median
    print(f"{args.size}, {args.device.type}, {bench.model.dtype}, medians of {args.pairs} pairs")
    print("questions answer batch |   times as fast as    |  share of the time        threads")
    print(" an image tokens  size | forward hidden  three | model waiting  images files")
    for (questions, answers, batch_size), case in sorted(found.items()):
        ratios = [median(column) for column in zip(*case["ratios"])]
        share = {k: median(shares[k] for shares in case["shares"]) for k in case["shares"][0]}
        print(
            f"{questions:>9} {answers:>6} {batch_size:>5} | {ratios[0]:>7.2f} {ratios[1]:>6.2f} "
            f"{ratios[2]:>6.2f} | {share['model']:>5.0%} {1 - share['model']:>7.0%} "
            f" {share['(images)']:>6.0%} {share['(files)']:>5.0%}"
        )
    print(f"peak memory {script.peak_memory(args.device)}")
    if args.device.type != "cuda":
        return
    rate, prompts = matmul_rate(args.device), script.Prompts(bench.processor)
    for (questions, answers, batch_size), case in sorted(found.items()):
        rows = choose_rows(args, questions)
        flop = count_flop(bench.model, prompts, rows) / len(rows)
        idle = median(shares["idle"] for shares in case["shares"])
        print(
            f"questions {questions}, answer {answers}, batch {batch_size}: idle between batches "
            f"{idle:.1%}, {flop / median(case['seconds']) / rate:.0%} of {rate / 1e12:.0f} TFLOP/s"
            + (" (answers not counted)" if answers else "")
        )


def main() -> None:
    args = parse_args()
    logging.disable(logging.WARNING)
    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    bench = Bench(
        make_model(args.size, args.device, dtype),
        AutoProcessor.from_pretrained(MODEL, backend="pil"),
        args.device,
        images_dir=make_rows(1, 1)[0],
    )
    report(args, bench, measure(args, bench))


if __name__ == "__main__":
    main()
