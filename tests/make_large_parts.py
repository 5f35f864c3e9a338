"""Write synthetic part files at the 12B's sizes, in the exact layout: 2.4 GB for 10,000 samples.

    python tests/make_large_parts.py DIRECTORY [--num-samples 10000] [--layers 0,12,24,36,47]

To measure `inspect_h5.py`, and to look at its plots and its table. Ten questions are about one
image. The states form a cloud for every ground truth, a few directions hold most of their variance,
and whether the answer is wrong (three in ten) moves them: those of the query token the more the
deeper the layer, those of the image's token by what is common to an image's questions.
"""

import argparse
import hashlib
import zlib
from pathlib import Path

import h5py
import numpy as np

WIDTH, VISION_WIDTH, NUM_LAYERS, NUM_FACTORS = 3840, 1152, 48, 64
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
SIGNALS = (0.2, 1.0, 0.5)  # of each kind in its last layer
ATTRIBUTES = {
    "model_name": "synthetic",
    "model_type": "gemma-3-12b-multimodal",
    "model_revision": "main",
    "device": "cpu",
    "dtype": "bfloat16",
    "num_layers": NUM_LAYERS,
    "hidden_size": WIDTH,
    "vision_hidden_size": VISION_WIDTH,
    "max_new_tokens": 200,
    "prompt": "{question}",
    "image_processor": "none",
    "attn_implementation": "sdpa",
    "torch_version": "none",
    "transformers_version": "none",
    "python_version": "none",
    "dataset": "synthetic.csv",
    "dataset_sha256": "0" * 64,
    "created_at": "2026-01-01T00:00:00+00:00",
}


def write_vector(group: h5py.Group, name: str, vector: np.ndarray) -> None:
    """One contiguous float32 data set, by the calls that the extractor uses."""
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(vector.shape)
    file_type = h5py.h5t.IEEE_F32LE
    dataset = h5py.h5d.create(group.id, name.encode(), file_type, space, None, links)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, vector)


def checksum(vectors: dict[str, np.ndarray]) -> int:
    """The crc32 of vectors in the order of their names."""
    crc = 0
    for name in sorted(vectors):
        crc = zlib.crc32(vectors[name].astype("<f4").tobytes(), crc)
    return crc


def make_mixing() -> np.ndarray:
    """Directions that all states share, ever weaker: float32 [NUM_FACTORS, WIDTH]."""
    strengths = np.arange(1, NUM_FACTORS + 1, dtype=np.float32)[:, None] ** -0.5
    return np.random.default_rng(1).standard_normal((NUM_FACTORS, WIDTH), np.float32) * strengths


def draw_states(rng, image_rng, layers: list[int], answer: int, is_wrong: bool) -> dict:
    """A sample's vectors: what its image gives, what its question adds, and what is asked for."""
    centre = np.sin(np.arange(WIDTH, dtype=np.float32) * (answer + 1))
    vectors = {"vision_representation": image_rng.standard_normal(VISION_WIDTH, np.float32)}
    for depth, layer in enumerate(layers, start=1):
        for kind, signal in zip(KINDS, SIGNALS, strict=True):
            factors = image_rng.standard_normal(NUM_FACTORS, np.float32)
            factors += rng.standard_normal(NUM_FACTORS, np.float32)
            factors[20:40] += np.float32(signal * is_wrong * depth / len(layers))
            noise = rng.standard_normal(WIDTH, np.float32)
            state = factors @ MIXING + noise + centre * ((depth - 1) / 2)
            vectors[f"{kind}/layer_{layer}"] = state.astype(np.float32)
    return vectors


MIXING = make_mixing()


def write_sample(
    file: h5py.File, row: int, layers: list[int], num_answers: int, schema_version: int
) -> None:
    """One sample; its ground truth, and so the cloud that it belongs to, follows from `row`."""
    rng, image_rng = np.random.default_rng([0, row]), np.random.default_rng([1, row // 10])
    answer = int(rng.zipf(1.5)) % num_answers
    hardness = image_rng.standard_normal()  # some images are asked about in vain
    is_wrong = bool(hardness + rng.standard_normal() > 0.74)
    said = answer + num_answers if is_wrong else answer
    group = file.create_group(f"{row:06d}")
    texts = (f"question {row}?", f"{row // 10}.jpg", f"It is number {said}.", f"number {answer}")
    names = ("question", "image_id", "answer", "ground_truth_answer")
    for name, text in zip(names, texts, strict=True):
        group.create_dataset(name, data=text, dtype=h5py.string_dtype())
    vectors = draw_states(rng, image_rng, layers, answer, is_wrong)
    counts = {"num_prompt_tokens": 275, "num_answer_tokens": 4, "answer_truncated": False}
    positions = {"vision_token_pos": 260, "query_token_pos": 274}
    group.attrs.update({"question_id": f"{row:06d}", **counts, **positions})
    if schema_version < 3:
        group.attrs["row"] = row
    if schema_version >= 2:
        doubt = rng.exponential(0.5 if is_wrong else 0.3, 5)  # four tokens and the end's
        vectors["answer_logprobs"] = -doubt.astype(np.float32)
        group.attrs["first_token_entropy"] = np.float32(doubt[0] + rng.exponential(0.2))
        group.attrs["image_sha256"] = hashlib.sha256(texts[1].encode()).hexdigest()
        group.attrs["crc32"] = checksum(vectors)
    for name, vector in vectors.items():
        write_vector(group, name, vector)
    group["vision_only_representation"] = h5py.SoftLink("vision_representation")


def write_parts(
    directory: Path,
    num_samples: int,
    layers: list[int],
    interval: int = 1000,
    num_answers: int = 2,
    schema_version: int = 3,
) -> None:
    """Parts of `interval` samples each."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, num_samples, interval), start=1):
        path = directory / f"gemma3_12b_embeddings_part_{number:03d}.h5"
        rows = range(start, min(num_samples, start + interval))
        with h5py.File(path, "w") as file:
            file.attrs.update({**ATTRIBUTES, "layers": layers, "num_samples": len(rows)})
            file.attrs.update({"checkpoint_interval": interval, "schema_version": schema_version})
            for row in rows:
                write_sample(file, row, layers, num_answers, schema_version)


def main() -> None:
    """The command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="outside the repository")
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--layers", default="0,12,24,36,47", help="comma-separated, or all")
    parser.add_argument("--num-answers", type=int, default=2)
    args = parser.parse_args()
    layers = list(range(NUM_LAYERS))
    if args.layers != "all":
        layers = [int(layer) for layer in args.layers.split(",")]
    write_parts(args.directory, args.num_samples, layers, num_answers=args.num_answers)


if __name__ == "__main__":
    main()
