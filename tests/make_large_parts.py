"""Write synthetic part files at the 12B's sizes, in the exact layout: 2.4 GB for 10,000 samples.

    python tests/make_large_parts.py DIRECTORY [--num-samples 10000] [--layers 0,12,24,36,47]

To measure `inspect_h5.py`, and to look at its plots: the states form a cloud for every answer.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np

WIDTH, VISION_WIDTH, NUM_LAYERS = 3840, 1152, 48
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
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
    "schema_version": 1,
    "storage_dtype": "float32",
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


def write_sample(file: h5py.File, row: int, layers: list[int], rng, num_answers: int) -> None:
    """One sample; its answer, and so the cloud that it belongs to, follows from `row`."""
    answer = int(rng.zipf(1.5)) % num_answers
    group = file.create_group(f"{row:06d}")
    texts = (f"question {row}?", f"{row // 10}.jpg", f"It is {answer}.", f"answer {answer}")
    names = ("question", "image_id", "answer", "ground_truth_answer")
    for name, text in zip(names, texts, strict=True):
        group.create_dataset(name, data=text, dtype=h5py.string_dtype())
    centre = np.sin(np.arange(WIDTH, dtype=np.float32) * (answer + 1))
    write_vector(group, "vision_representation", rng.standard_normal(VISION_WIDTH, np.float32))
    for depth, layer in enumerate(layers):
        for kind in KINDS:
            noise = rng.standard_normal(WIDTH, np.float32)
            write_vector(group, f"{kind}/layer_{layer}", noise + centre * depth / 2)
    group["vision_only_representation"] = h5py.SoftLink("vision_representation")
    counts = {"num_prompt_tokens": 275, "num_answer_tokens": 4, "answer_truncated": False}
    positions = {"vision_token_pos": 260, "query_token_pos": 274}
    group.attrs.update({"question_id": f"{row:06d}", "row": row, **counts, **positions})


def write_parts(
    directory: Path, num_samples: int, layers: list[int], interval: int = 1000, num_answers: int = 2
) -> None:
    """Parts of `interval` samples each."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, num_samples, interval), start=1):
        path = directory / f"gemma3_12b_embeddings_part_{number:03d}.h5"
        rows = range(start, min(num_samples, start + interval))
        with h5py.File(path, "w") as file:
            file.attrs.update({**ATTRIBUTES, "layers": layers, "num_samples": len(rows)})
            file.attrs["checkpoint_interval"] = interval
            for row in rows:
                write_sample(file, row, layers, rng, num_answers)


def main() -> None:
    """The command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="outside the repository")
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--layers", default="0,12,24,36,47")
    parser.add_argument("--num-answers", type=int, default=2)
    args = parser.parse_args()
    layers = [int(layer) for layer in args.layers.split(",")]
    write_parts(args.directory, args.num_samples, layers, num_answers=args.num_answers)


if __name__ == "__main__":
    main()
