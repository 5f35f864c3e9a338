"""The script as a person runs it: files, flags, the last line, `--test`, exit status."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import random
import re
import shutil
import zlib
from pathlib import Path

import easy_vqa
import h5py
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    HEADER,
    IMAGES,
    MODEL,
    assert_same_samples,
    flags,
    no_hang,
    read_csv,
    read_failed,
    read_samples,
    write_csv,
)

import run_gemma3_extraction as script

LAST_LINE = re.compile(
    r"Extracted (\d+) of (\d+) samples \((\d+) failed, (\d+) already done\) "
    r"in \d+\.\d s: \d+\.\d\d samples/s"
)
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
DEFAULT_LAYERS = [0, 2, 4, 6, 7]
ROWS = [tuple(row[name] for name in HEADER) for row in read_csv().values()]
SOME = [row for row in ROWS if row[1] in ("circle.png", "grey.png")]


def run_program(tmp_path, *more, rows, **places):
    """In this process: exit status, what the last line counts, stdout's lines."""
    csv_path, stdout, stderr = write_csv(tmp_path / "rows.csv", rows), io.StringIO(), io.StringIO()
    words = flags(tmp_path / "out", *more, csv_path=csv_path, **places)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), no_hang():
        status = script.main(words)
    match = LAST_LINE.fullmatch(stderr.getvalue().splitlines()[-1])
    assert match, stderr.getvalue()
    return status, tuple(map(int, match.groups())), stdout.getvalue().splitlines()


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """All rows, parts of 7, one question at a time."""
    root = tmp_path_factory.mktemp("plain")
    words = ("--checkpoint-interval", 7, "--batch-size", 1)
    assert run_program(root, *words, rows=ROWS) == (0, (28, 28, 0, 0), [])
    return root / "out"


@pytest.fixture(scope="module")
def plain_samples(plain_run):
    return read_samples(plain_run)


# ──────────────────────────────────────── what a run leaves ──────────────────────────────────────
def test_what_a_run_leaves(plain_run, plain_samples, processor):
    parts = [script.PART_NAME.format(k) for k in (1, 2, 3, 4)]
    assert {path.name for path in plain_run.iterdir()} == {*parts, ".lock", "settings.json"}
    by_image = [
        row for image in dict.fromkeys(r[1] for r in ROWS) for row in ROWS if row[1] == image
    ]
    stored = []
    for name in parts:
        with h5py.File(plain_run / name) as file:
            stored += [group.attrs["question_id"] for group in file.values()]
    assert stored == [row[0] for row in by_image]
    truncated = set()
    for question_id, image_id, question, truth in ROWS:
        sample = plain_samples[question_id]
        texts = [sample[name] for name in ("image_id", "question", "ground_truth_answer")]
        assert texts == [image_id, question, truth]
        assert sample["vision_token_pos"] == 260
        assert sample["query_token_pos"] == sample["num_prompt_tokens"] - 1
        logprobs, entropy = sample["answer_logprobs"], sample["first_token_entropy"]
        assert len(logprobs) == sample["num_answer_tokens"] + (not sample["answer_truncated"]) <= 6
        assert (logprobs <= 0).all()  # the token chosen is the likeliest: at least exp(-entropy)
        assert -1e-4 - logprobs[0] <= entropy <= math.log(len(processor.tokenizer))
        truncated.add(bool(sample["answer_truncated"]))
        widths = {f"{kind}/layer_{i}": 32 for kind in KINDS for i in DEFAULT_LAYERS}
        widths |= {"vision_representation": 24, "answer_logprobs": len(logprobs)}
        vectors = {name: value for name, value in sample.items() if getattr(value, "ndim", 0)}
        assert {name: len(value) for name, value in vectors.items()} == widths
        assert {value.dtype for value in vectors.values()} == {np.dtype("<f4")}
        together = b"".join(vectors[name].tobytes() for name in sorted(vectors))
        assert sample["crc32"] == zlib.crc32(together)
        content = (IMAGES / image_id).read_bytes()
        assert sample["image_sha256"] == hashlib.sha256(content).hexdigest()
    assert truncated == {False, True}


def test_attributes_and_settings(plain_run):
    with h5py.File(plain_run / script.PART_NAME.format(2)) as file:
        attributes = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
        links = [group.get("vision_only_representation", getlink=True) for group in file.values()]
    assert {link.path for link in links} == {"vision_representation"}
    shared = {
        "schema_version": 3,
        "dtype": "float32",
        "layers": DEFAULT_LAYERS,
        "max_new_tokens": 6,
        "checkpoint_interval": 7,
        "prompt": "<bos><start_of_turn>user\n<start_of_image>{question}<end_of_turn>\n"
        "<start_of_turn>model\n",
    }
    expected = shared | {
        "model_name": str(MODEL),
        "model_type": "gemma-3-0.2m-multimodal",
        "device": "cpu",
        "num_samples": 7,
        "num_layers": 8,
        "hidden_size": 32,
        "vision_hidden_size": 24,
        "dataset": "rows.csv",
        "attn_implementation": "sdpa",
        "image_processor": "Gemma3ImageProcessorPil",
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
    }
    assert {name: attributes[name] for name in expected} == expected
    hashes = {name: attributes[name] for name in ("model_revision", "dataset_sha256")}
    assert attributes.keys() == {*expected, *hashes, "created_at", "python_version"}
    assert json.loads((plain_run / "settings.json").read_text()) == shared | hashes


# ───────────────────────────────── what changes it, and what does not ────────────────────────────
NO_ANSWERS = ("--max-new-tokens", 0, "--compression", "gzip")
WHAT_IS_EXTRACTED = {
    "batches of 5": (("--batch-size", 5), DEFAULT_LAYERS, 1e-4),
    "negative layers": (("--layers", "-1,2", "--compression", "lzf"), [2, 7], 1e-4),
    "one word": (("--layers=-1,-1,0",), [0, 7], 1e-4),
    "all layers": (("--layers", "all"), list(range(8)), 1e-4),
    "no answers": (NO_ANSWERS, DEFAULT_LAYERS, 1e-4),
    "bfloat16": (("--dtype", "bfloat16"), DEFAULT_LAYERS, 0.05),
}


@pytest.mark.parametrize("name", WHAT_IS_EXTRACTED)
def test_flags_of_what_is_extracted(name, plain_samples, tmp_path):
    words, layers, bound = WHAT_IS_EXTRACTED[name]
    assert run_program(tmp_path, *words, rows=SOME)[0] == 0
    found = read_samples(tmp_path / "out")
    assert found.keys() == {row[0] for row in SOME}
    for question_id, sample in found.items():
        expected = plain_samples[question_id]
        names = {f"{kind}/layer_{i}" for kind in KINDS for i in layers}
        assert {name for name in sample if "/" in name} == names
        for name in names & expected.keys() | {"vision_representation"}:
            error = np.linalg.norm(sample[name] - expected[name]) / np.linalg.norm(expected[name])
            assert error <= bound, (question_id, name)
        if words == NO_ANSWERS:
            assert (sample["answer"], sample["num_answer_tokens"]) == ("", 0)
            assert not {"answer_logprobs", "first_token_entropy"} & sample.keys()
        elif bound == 1e-4:
            assert sample["answer"] == expected["answer"]
    with h5py.File(tmp_path / "out" / script.PART_NAME.format(1)) as file:
        assert file.attrs["layers"].tolist() == layers
        packing = file[next(iter(file))]["vision_representation"].compression
    assert packing == (words[-1] if "--compression" in words else None)


def test_300_rows_of_easy_vqa_come_back_as_one_at_a_time(tmp_path, monkeypatch):
    """Answers of mixed lengths, most short, one in twelve at the limit."""
    draw = random.Random(0)
    lengths = [24 if draw.random() < 1 / 12 else draw.randint(1, 6) for _ in range(300)]
    monkeypatch.setattr(
        script.Extractor,
        "has_ended",
        lambda self, live: len(live.answer_ids) == lengths[int(live.question.row.question_id)],
    )
    questions, answers, image_ids = easy_vqa.get_train_questions()
    paths = [Path(path) for path in easy_vqa.get_train_image_paths().values()]
    names = [f"{image_id}.png" for image_id in image_ids]
    rows = [(f"{i:05d}", names[i], questions[i], answers[i]) for i in range(300)]
    words = ("--checkpoint-interval", 50, "--max-new-tokens", 24)
    found = []
    for batch_size in ("auto", 1):
        more = (*words, "--batch-size", batch_size)
        status, counts, _ = run_program(tmp_path, *more, rows=rows, images_dir=paths[0].parent)
        assert (status, counts) == (0, (300, 300, 0, 0))
        found.append(read_samples(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert sorted(found[0]) == [row[0] for row in rows]
    for i, row in enumerate(rows):  # sorted by image, so worked through as it stands
        sample = found[0][row[0]]
        assert sample["part"] == script.PART_NAME.format(i // 50 + 1)
        assert len(sample["answer_logprobs"]) == lengths[i]
    assert_same_samples(*found)


def test_the_model_ships_as_its_script_makes_it(tmp_path):
    import make_tiny_gemma3

    make_tiny_gemma3.main(tmp_path)
    shipped = {path.name: path.read_bytes() for path in MODEL.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped
    assert sum(map(len, shipped.values())) < 2e6


# ───────────────────────────────────────────── --test ────────────────────────────────────────────
def layer_errors(lines):
    """The report's relative errors: of the mean of patches, and by kind and layer."""
    vision, layers = re.search(r"vision_representation (\S+); by layer (.*):", lines[4]).groups()
    errors = {"vision_representation": float(vision)}
    for kind, *of_kind in map(str.split, lines[5:8]):
        for layer, error in zip(map(int, layers.split(", ")), of_kind, strict=True):
            errors[kind, layer] = float(error)
    return errors


def test_three_rows_first_and_then_the_rest(plain_samples, tmp_path):
    words = ("--checkpoint-interval", 5, "--batch-size", 3)
    missing = [(f"bad {i}", f"nowhere{i}.png", "what?", "") for i in range(30)]
    status, counts, lines = run_program(tmp_path, *words, "--test", rows=[*SOME, *missing])
    assert (status, counts) == (0, (3, 3, 0, 0))
    assert read_samples(tmp_path / "out").keys() == {row[0] for row in SOME[:3]}
    assert [line[:6] for line in lines[:4]] == ["ok    "] * 4
    positions = [int(plain_samples[row[0]]["query_token_pos"]) for row in SOME[:3]]
    by_image = sorted(positions), positions
    assert re.search(r"soft tokens 5 to 260, vision token 260, query tokens \[", lines[1])
    assert sorted(json.loads(lines[1].rpartition("tokens ")[2])) == by_image[0]
    errors = layer_errors(lines)
    assert errors.keys() - {"vision_representation"} == set(
        itertools.product(KINDS, DEFAULT_LAYERS)
    )
    assert max(errors.values()) < 1e-5
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert re.fullmatch(
        re.escape(versions) + r"; float32 on cpu\npeak memory \d+\.\d GiB\n"
        r"the whole CSV takes 0\.00 GB; \d+ GB are free\n"
        r"38 rows about 32 images take 0\.\d\d h at \d+\.\d\d samples/s, "
        r"if answers have \d tokens as here",
        "\n".join(lines[8:]),
    )
    assert run_program(tmp_path, *words, rows=SOME)[:2] == (0, (5, 8, 0, 3))
    found = read_samples(tmp_path / "out")
    assert [sample["part"] for sample in found.values()].count(script.PART_NAME.format(1)) == 5
    expected = {row[0]: plain_samples[row[0]] | {"part": found[row[0]]["part"]} for row in SOME}
    assert_same_samples(found, expected)


FAILING = {  # the check that fails, and the vectors that show it
    "one <bos> more": (0, set()),
    "no mask": (2, set()),
    "a layer off": (3, {(kind, 4) for kind in KINDS}),
    "a NaN": (3, {(kind, 7) for kind in KINDS[1:]}),
}


@pytest.mark.parametrize("mistake", FAILING)
def test_a_failed_check_of_the_test_run_is_an_error(mistake, tmp_path, monkeypatch):
    plain_forward = script.plain_forward

    def mistaken(*args, **kwargs):
        if mistake == "no mask":
            kwargs = {}
        input_ids, patches, hidden_states = plain_forward(*args, **kwargs)
        if mistake == "one <bos> more":
            input_ids = [input_ids[0], *input_ids]
        hidden_states = hidden_states.clone()
        if mistake == "a layer off":
            hidden_states[4] *= 1.01
        if mistake == "a NaN":
            hidden_states[7, -1, 0] = torch.nan
        return input_ids, patches, hidden_states

    monkeypatch.setattr(script, "plain_forward", mistaken)
    status, counts, lines = run_program(tmp_path, "--test", rows=SOME[:1])
    assert (status, counts) == (1, (1, 1, 0, 0))
    failing, vectors = FAILING[mistake]
    assert [i for i, line in enumerate(lines) if line.startswith("FAIL  ")] == [failing]
    assert {name for name, error in layer_errors(lines).items() if not error < 1e-4} == vectors


def test_a_test_run_without_a_row_that_can_be_extracted(tmp_path):
    bad = [(f"bad {i}", f"nowhere{i}.png", "what?", "") for i in range(3)]
    status, counts, lines = run_program(tmp_path, "--test", rows=[*bad, SOME[0]])
    assert (status, counts) == (3, (0, 3, 3, 0))
    assert lines == ["none of the first rows can be extracted, so nothing was checked"]
    assert read_failed(tmp_path / "out").keys() == {row[0] for row in bad}
