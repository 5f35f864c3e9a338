"""The script as a person runs it: files, flags, the last line, `--test`, exit status."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import random
import re
import zlib
from pathlib import Path

import easy_vqa
import h5py
import make_tiny_gemma3
import numpy as np
import pytest
import torch
import transformers
from conftest import IMAGES, MODEL, assert_same_samples, flags, read_csv, read_samples, write_csv

import run_gemma3_extraction as script

LAST_LINE = r"Extracted (\d+) of (\d+) samples \((\d+) failed, (\d+) already done\) "
LAST_LINE += r"in \d+\.\d s: \d+\.\d\d samples/s"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
DEFAULT_LAYERS = [0, 2, 4, 6, 7]
FAILING = {"no <bos>": 0, "no effect of the mask": 2, "a layer is off": 3, "a NaN": 3}  # checks
ROWS = [tuple(row.values()) for row in read_csv().values()]
SOME = [row for row in ROWS if row[1] in ("circle.png", "grey.png")]


def run_program(tmp_path, *more, rows):
    """In this process: exit status, what the last line counts, stdout's lines."""
    csv_path, stdout, stderr = write_csv(tmp_path / "rows.csv", rows), io.StringIO(), io.StringIO()
    words = flags(tmp_path / "out", *more, csv_path=csv_path)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = script.main(words)
    match = re.fullmatch(LAST_LINE, stderr.getvalue().splitlines()[-1])
    assert match, stderr.getvalue()
    return status, tuple(map(int, match.groups())), stdout.getvalue().splitlines()


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """All rows, parts of 7, one question at a time: the directory, and its samples."""
    root = tmp_path_factory.mktemp("plain")
    found = run_program(root, "--checkpoint-interval", 7, "--batch-size", 1, rows=ROWS)
    assert found == (0, (28, 28, 0, 0), [])
    return root / "out", read_samples(root / "out")


def test_what_a_run_leaves(plain_run, processor):
    out, samples = plain_run
    parts = [script.PART_NAME.format(k) for k in (1, 2, 3, 4)]
    assert {path.name for path in out.iterdir()} == {*parts, ".lock", "settings.json"}
    planned = sorted(ROWS, key=lambda row: [r[1] for r in ROWS].index(row[1]))
    assert list(samples) == [row[0] for row in planned]  # as they stand in the files
    for question_id, image_id, question, truth in ROWS:
        sample = samples[question_id]
        texts = [sample[name] for name in ("image_id", "question", "ground_truth_answer")]
        assert texts == [image_id, question, truth]
        assert sample["vision_token_pos"] == 260
        assert sample["query_token_pos"] == sample["num_prompt_tokens"] - 1
        logprobs, entropy = sample["answer_logprobs"], sample["first_token_entropy"]
        assert len(logprobs) == sample["num_answer_tokens"] + (not sample["answer_truncated"]) <= 6
        assert (logprobs <= 0).all()  # the token chosen is the likeliest: at least exp(-entropy)
        assert -1e-4 - logprobs[0] <= entropy <= math.log(len(processor.tokenizer))
        widths = {f"{kind}/layer_{i}": 32 for kind in KINDS for i in DEFAULT_LAYERS}
        widths |= {"vision_representation": 24, "answer_logprobs": len(logprobs)}
        vectors = {name: value for name, value in sample.items() if getattr(value, "ndim", 0)}
        assert {name: len(value) for name, value in vectors.items()} == widths
        assert {value.dtype for value in vectors.values()} == {np.dtype("<f4")}
        together = b"".join(vectors[name].tobytes() for name in sorted(vectors))
        assert sample["crc32"] == zlib.crc32(together)
        sha256 = hashlib.sha256((IMAGES / image_id).read_bytes()).hexdigest()
        assert sample["image_sha256"] == sha256
    assert {bool(sample["answer_truncated"]) for sample in samples.values()} == {False, True}


def test_attributes_and_settings(plain_run):
    with h5py.File(plain_run[0] / script.PART_NAME.format(2)) as file:
        found = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
        links = [group.get("vision_only_representation", getlink=True) for group in file.values()]
    assert {link.path for link in links} == {"vision_representation"}
    prompt = "<bos><start_of_turn>user\n<start_of_image>{question}<end_of_turn>\n"
    prompt += "<start_of_turn>model\n"
    shared = {"schema_version": 3, "dtype": "float32", "layers": DEFAULT_LAYERS, "prompt": prompt}
    shared |= {"max_new_tokens": 6, "checkpoint_interval": 7}
    expected = {"model_name": str(MODEL), "model_type": "gemma-3-0b-multimodal", "device": "cpu"}
    expected |= {"num_samples": 7, "num_layers": 8, "hidden_size": 32, "vision_hidden_size": 24}
    expected |= {"torch_version": str(torch.__version__), "attn_implementation": "sdpa"}
    expected |= {"transformers_version": transformers.__version__, "dataset": "rows.csv"}
    expected |= {"image_processor": "Gemma3ImageProcessorPil"} | shared
    assert {name: found[name] for name in expected} == expected
    hashes = {name: found[name] for name in ("model_revision", "dataset_sha256")}
    assert found.keys() == {*expected, *hashes, "created_at", "python_version"}
    assert json.loads((plain_run[0] / "settings.json").read_text()) == shared | hashes


WHAT_IS_EXTRACTED = {
    "negative layers": (("--layers=-1,2",), [2, 7], 1e-4),
    "all layers": (("--layers", "all"), list(range(8)), 1e-4),
    "none": (("--max-new-tokens", 0, "--compression", "gzip"), DEFAULT_LAYERS, 1e-4),
    "bfloat16": (("--dtype", "bfloat16"), DEFAULT_LAYERS, 0.05),
}


@pytest.mark.parametrize("name", WHAT_IS_EXTRACTED)
def test_flags_of_what_is_extracted(name, plain_run, tmp_path):
    words, layers, bound = WHAT_IS_EXTRACTED[name]
    assert run_program(tmp_path, *words, rows=SOME)[0] == 0
    found = read_samples(tmp_path / "out")
    assert found.keys() == {row[0] for row in SOME}
    for question_id, sample in found.items():
        expected = plain_run[1][question_id]
        names = {f"{kind}/layer_{i}" for kind in KINDS for i in layers}
        assert names == {one for one in sample if "/" in one}
        for one in {"vision_representation", *names} & expected.keys():
            error = np.linalg.norm(sample[one] - expected[one]) / np.linalg.norm(expected[one])
            assert error <= bound, (question_id, one)
        if name == "none":
            assert (sample["answer"], sample["num_answer_tokens"]) == ("", 0)
            assert not {"answer_logprobs", "first_token_entropy"} & sample.keys()
        elif bound == 1e-4:
            assert sample["answer"] == expected["answer"]
    with h5py.File(tmp_path / "out" / script.PART_NAME.format(1)) as file:
        packing = file[next(iter(file))]["vision_representation"].compression
    assert packing == (words[-1] if "--compression" in words else None)


def test_300_rows_of_easy_vqa_come_back_as_one_at_a_time(tmp_path, monkeypatch):
    """Answers of mixed lengths, most short, one in twelve at the limit."""
    draw, found = random.Random(0), []
    lengths = [24 if draw.random() < 1 / 12 else draw.randint(1, 6) for _ in range(300)]

    def has_ended(self, sequence):
        return len(sequence.generated_ids) == lengths[int(sequence.prompt.row.question_id)]

    monkeypatch.setattr(script.Extractor, "has_ended", has_ended)
    images_dir = Path(easy_vqa.get_train_image_paths()[0]).parent
    train = itertools.islice(zip(*easy_vqa.get_train_questions()), 300)
    rows = [(f"{i:03d}", f"{image}.png", q, answer) for i, (q, answer, image) in enumerate(train)]
    limits = ("--checkpoint-interval", 50, "--max-new-tokens", 24, "--images-dir", images_dir)
    limits += ("--batch-size",)
    for size in ("auto", 1):
        assert run_program(tmp_path, *limits, size, rows=rows)[:2] == (0, (300, 300, 0, 0))
        found.append(read_samples((tmp_path / "out").rename(tmp_path / str(size))))
    assert [len(found[0][row[0]]["answer_logprobs"]) for row in rows] == lengths
    assert_same_samples(*found)


def test_the_model_ships_as_its_script_makes_it(tmp_path):
    make_tiny_gemma3.main(tmp_path)
    shipped = {path.name: path.read_bytes() for path in MODEL.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped


def layer_errors(lines):
    """The report's relative errors: of the mean of patches, and by kind and layer."""
    vision, layers = re.search(r"vision_representation (\S+); by layer (.*):", lines[4]).groups()
    errors = {"vision": float(vision)}
    for kind, *of_kind in map(str.split, lines[5:8]):
        for layer, error in zip(map(int, layers.split(", ")), of_kind, strict=True):
            errors[kind, layer] = float(error)
    return errors


def test_three_rows_first_and_then_the_rest(plain_run, tmp_path):
    words = ("--checkpoint-interval", 5, "--batch-size", 3)
    missing = [(f"bad {i}", f"nowhere{i}.png", "what?", "") for i in range(30)]
    status, counts, lines = run_program(tmp_path, *words, "--test", rows=[*SOME, *missing])
    assert (status, counts) == (0, (3, 3, 0, 0))
    assert [line[:6] for line in lines[:4]] == ["ok    "] * 4
    positions = r"soft tokens 5 to 260, vision token 260, query tokens \[\d+, \d+, \d+\]"
    assert re.fullmatch("ok +" + positions, lines[1])
    errors = layer_errors(lines)
    assert errors.keys() == {"vision", *itertools.product(KINDS, DEFAULT_LAYERS)}
    assert re.fullmatch(r"torch 2\S+, transformers 5\S+; float32 on cpu", lines[8])
    assert re.fullmatch(
        r"peak memory \d+\.\d GiB\nthe whole CSV takes 0\.00 GB; \d+ GB are free\n"
        r"38 rows about 32 images take 0\.\d\d h at \d+\.\d\d samples/s, "
        r"if answers have \d tokens as here",
        "\n".join(lines[9:]),
    )
    assert run_program(tmp_path, *words, rows=SOME)[:2] == (0, (5, 8, 0, 3))
    found = read_samples(tmp_path / "out")
    expected = {row[0]: plain_run[1][row[0]] | {"part": found[row[0]]["part"]} for row in SOME}
    assert_same_samples(found, expected)


@pytest.mark.parametrize("mistake", FAILING)
def test_a_failed_check_of_the_test_run_is_an_error(mistake, tmp_path, monkeypatch):
    factors = {"a layer is off": 1.01, "a NaN": math.nan}
    reference_forward = script.reference_forward

    def mistaken(*args, has_image_mask=True):
        has_image_mask = has_image_mask or mistake == "no effect of the mask"
        input_ids, vectors, soft_states = reference_forward(*args, has_image_mask=has_image_mask)
        for name in vectors:
            if name.endswith("layer_4"):
                vectors[name] = vectors[name] * factors.get(mistake, 1)
        return input_ids[mistake == "no <bos>" :], vectors, soft_states

    monkeypatch.setattr(script, "reference_forward", mistaken)
    status, counts, lines = run_program(tmp_path, "--test", rows=SOME[:1])
    assert (status, counts) == (1, (1, 1, 0, 0))
    failing = [i for i, line in enumerate(lines) if line.startswith("FAIL  ")]
    assert failing == [FAILING[mistake]]
    wrong = {name for name, error in layer_errors(lines).items() if not error < 1e-4}
    assert wrong == ({(kind, 4) for kind in KINDS} if mistake in factors else set())
