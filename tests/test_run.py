"""The script as a person runs it: files, flags, the last line, `--test`, exit status."""

import contextlib
import hashlib
import io
import logging
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import easy_vqa
import h5py
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    IMAGES,
    MODEL,
    assert_same_samples,
    flags,
    make_options,
    no_hang,
    read_csv,
    read_failed,
    read_samples,
    run_script,
    write_csv,
)

import run_gemma3_extraction as script

LAST_LINE = re.compile(
    r"Extracted (\d+) of (\d+) samples \((\d+) failed, (\d+) already done\) "
    r"in \d+\.\d s: \d+\.\d\d samples/s"
)
PARTS_OF_7 = ("--checkpoint-interval", 7)
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
# The rows of the test data about two of its eight images.
SOME = [
    (question_id, *list(row.values())[1:])
    for question_id, row in read_csv().items()
    if row["image_id"] in ("circle.png", "grey.png")
]


def last_line(stderr):
    """extracted, all, failed, already done"""
    match = LAST_LINE.fullmatch(stderr.splitlines()[-1])
    assert match, stderr
    return tuple(map(int, match.groups()))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Parts of 7, one question at a time: directory, stdout and stderr."""
    output_dir = tmp_path_factory.mktemp("plain") / "out"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), no_hang():
        assert script.main(flags(output_dir, *PARTS_OF_7, "--batch-size", 1)) == 0
    return output_dir, stdout.getvalue(), stderr.getvalue()


@pytest.fixture(scope="module")
def plain_samples(plain_run):
    return read_samples(plain_run[0])


# ──────────────────────────────────────── what a run leaves ──────────────────────────────────────


def test_what_a_run_leaves(plain_run, plain_samples):
    output_dir, stdout, stderr = plain_run
    assert last_line(stderr) == (28, 28, 0, 0)
    assert stdout == ""
    parts = {script.PART_NAME.format(k) for k in (1, 2, 3, 4)}
    assert {path.name for path in output_dir.iterdir()} == {*parts, ".lock"}
    rows = read_csv()
    assert plain_samples.keys() == rows.keys()
    for index, (question_id, row) in enumerate(rows.items()):
        sample = plain_samples[question_id]
        assert (sample["question"], sample["image_id"]) == (row["question"], row["image_id"])
        assert (sample["ground_truth_answer"], sample["row"]) == (row["answer"], index)
        assert sample["vision_token_pos"] == 260
        assert sample["query_token_pos"] == sample["num_prompt_tokens"] - 1
        vectors = {f"{kind}/layer_{i}": 32 for kind in KINDS for i in (0, 2, 4, 6, 7)}
        vectors |= {"vision_representation": 24, "answer_logprobs": len(sample["answer_logprobs"])}
        found = {name: value for name, value in sample.items() if getattr(value, "ndim", 0)}
        assert {name: value.shape for name, value in found.items()} == {
            name: (width,) for name, width in vectors.items()
        }
        assert {value.dtype for value in found.values()} == {np.dtype("<f4")}


def test_root_attributes(plain_run):
    with h5py.File(plain_run[0] / script.PART_NAME.format(2)) as file:
        attributes = dict(file.attrs)
        assert all(isinstance(item, h5py.Group) for item in file.values())
    expected = {
        "model_name": str(MODEL),
        "model_type": "gemma-3-0.2m-multimodal",
        "device": "cpu",
        "dtype": "float32",
        "num_samples": 7,
        "num_layers": 8,
        "hidden_size": 32,
        "vision_hidden_size": 24,
        "max_new_tokens": 6,
        "checkpoint_interval": 7,
        "schema_version": 2,
        "storage_dtype": "float32",
        "dataset": "vqa.csv",
        "attn_implementation": "sdpa",
        "image_processor": "Gemma3ImageProcessorPil",
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
        "prompt": "<bos><start_of_turn>user\n<start_of_image>{question}<end_of_turn>\n"
        "<start_of_turn>model\n",
    }
    assert {name: attributes[name] for name in expected} == expected
    assert attributes["layers"].tolist() == [0, 2, 4, 6, 7]
    others = {"model_revision", "created_at", "dataset_sha256", "python_version"}
    assert others <= attributes.keys()


def test_every_answer_has_its_probabilities(plain_samples):
    vocabulary = script.load_processor(make_options(model=str(MODEL)))[1].tokenizer
    truncated = set()
    for sample in plain_samples.values():
        num_generated = sample["num_answer_tokens"] + (not sample["answer_truncated"])
        assert len(sample["answer_logprobs"]) == num_generated
        assert 1 <= num_generated <= 6
        assert (sample["answer_logprobs"] <= 0).all()
        # The token that was chosen is the likeliest: it has at least exp(-entropy).
        entropy = sample["first_token_entropy"]
        assert -1e-4 - sample["answer_logprobs"][0] <= entropy <= math.log(len(vocabulary))
        assert sample["num_answer_tokens"] == 6 or not sample["answer_truncated"]
        truncated.add(bool(sample["answer_truncated"]))
    assert truncated == {False, True}


def test_checksums_are_those_of_the_vectors_and_of_the_image_file(plain_samples):
    for sample in plain_samples.values():
        crc32 = 0
        for name in sorted(name for name, value in sample.items() if getattr(value, "ndim", 0)):
            crc32 = zlib.crc32(sample[name].astype("<f4").tobytes(), crc32)
        assert sample["crc32"] == crc32
        content = (IMAGES / sample["image_id"]).read_bytes()
        assert sample["image_sha256"] == hashlib.sha256(content).hexdigest()


# ───────────────────────────────── what changes it, and what does not ────────────────────────────


@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_batch_size_changes_nothing(plain_samples, run_here, tmp_path, batch_size):
    assert run_here(*PARTS_OF_7, "--batch-size", batch_size)[0] == 0
    assert_same_samples(read_samples(tmp_path / "out"), plain_samples)


def test_a_deleted_part_is_computed_again_and_a_new_row_added(plain_run, run_here, tmp_path):
    out = shutil.copytree(plain_run[0], tmp_path / "out")
    before = read_samples(out)
    (out / script.PART_NAME.format(3)).unlink()
    rows = [(question_id, *list(row.values())[1:]) for question_id, row in read_csv().items()]
    rows.append(("new", "turned.jpg", "what is new?", "yes"))
    status, stderr = run_here(*PARTS_OF_7, rows=rows)
    assert (status, last_line(stderr)) == (0, (8, 29, 0, 21))
    after = read_samples(out)
    assert after.pop("new")["row"] == 28
    assert_same_samples(after, before)
    third = {q for q, sample in before.items() if sample["part"] == script.PART_NAME.format(3)}
    kept = before.keys() - third
    assert_same_samples({q: after[q] for q in kept}, {q: before[q] for q in kept}, bound=0)


WITHOUT_ANSWERS = ("--max-new-tokens", 0, "--storage-dtype", "bfloat16", "--compression", "gzip")
WHAT_IS_EXTRACTED = {
    "negative layers": (("--layers", "-1,2"), [2, 7], 1e-4),
    "one word": (("--layers=-1,-1,0",), [0, 7], 1e-4),
    "all layers": (("--layers", "all"), list(range(8)), 1e-4),
    "no answers, small": (WITHOUT_ANSWERS, [0, 2, 4, 6, 7], 2**-8),
    "bfloat16": (("--dtype", "bfloat16"), [0, 2, 4, 6, 7], 0.05),
}


@pytest.mark.parametrize("name", WHAT_IS_EXTRACTED)
def test_flags_of_what_is_extracted(name, plain_samples, run_here, tmp_path):
    words, layers, bound = WHAT_IS_EXTRACTED[name]
    status, stderr = run_here(*words, rows=SOME)
    assert status == 0, stderr
    found = read_samples(tmp_path / "out")
    assert found.keys() == {row[0] for row in SOME}
    for question_id, sample in found.items():
        expected = plain_samples[question_id]
        names = {f"{kind}/layer_{i}" for kind in KINDS for i in layers}
        assert {name for name in sample if "/" in name} == names
        for name in names & expected.keys() | {"vision_representation"}:
            error = np.linalg.norm(sample[name] - expected[name]) / np.linalg.norm(expected[name])
            assert error <= bound, (question_id, name)
        if bound == 1e-4:
            assert sample["answer"] == expected["answer"]
    with h5py.File(tmp_path / "out" / script.PART_NAME.format(1)) as file:
        assert file.attrs["layers"].tolist() == layers


def test_without_answers_there_are_no_probabilities(run_here, tmp_path):
    assert run_here(*WITHOUT_ANSWERS, rows=SOME[:2])[0] == 0
    for sample in read_samples(tmp_path / "out").values():
        assert (sample["answer"], sample["num_answer_tokens"]) == ("", 0)
        assert not sample["answer_truncated"]
        assert not {"answer_logprobs", "first_token_entropy"} & sample.keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), f"batch size {script.CPU_BATCH_SIZE}: "),
        (("--batch-size", "auto"), f"batch size {script.CPU_BATCH_SIZE}: "),
        (("--batch-size", 3), ""),
    ],
)
def test_the_log_says_what_batch_size_was_chosen_and_why(run_here, words, told):
    status, stderr = run_here("--max-new-tokens", 0, *words, rows=SOME[:1])
    assert status == 0
    assert [line for line in stderr.splitlines() if line.startswith("batch size")] == (
        [f"{told}a fixed number for a cpu"] if told else []
    )


def test_300_rows_of_easy_vqa_come_back_as_one_at_a_time(run_here, tmp_path, monkeypatch):
    """Answers of mixed lengths, most short, one in twelve at the limit."""
    draw = random.Random(0)
    lengths = [24 if draw.random() < 1 / 12 else draw.randint(1, 6) for _ in range(300)]
    monkeypatch.setattr(
        script.Extractor,
        "has_ended",
        lambda self, live: len(live.answer) == lengths[live.prompt.row.index],
    )
    questions, answers, image_ids = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    rows = [
        (f"{i:05d}", Path(paths[image_ids[i]]).name, questions[i], answers[i]) for i in range(300)
    ]
    header = ("question_id", "image_name", "question", "gt_answer")
    csv_path = write_csv(tmp_path / "easy.csv", rows, header)
    images_dir = Path(paths[0]).parent
    words = ("--checkpoint-interval", 50, "--max-new-tokens", 24)
    status, stderr = run_here(*words, csv_path=csv_path, images_dir=images_dir)
    assert (status, last_line(stderr)) == (0, (300, 300, 0, 0))
    samples = read_samples(tmp_path / "out")
    assert list(samples) == [f"{i:05d}" for i in range(300)]  # sorted by image, as it stands
    for i, sample in enumerate(samples.values()):
        assert sample["part"] == script.PART_NAME.format(i // 50 + 1)
        assert (sample["question"], sample["ground_truth_answer"]) == (questions[i], answers[i])
        assert sample["row"] == i
        assert len(sample["answer_logprobs"]) == lengths[i]
    shutil.move(tmp_path / "out", tmp_path / "many")
    words += ("--batch-size", 1)
    assert run_here(*words, csv_path=csv_path, images_dir=images_dir)[0] == 0
    assert_same_samples(read_samples(tmp_path / "out"), samples)


def test_the_model_ships_as_its_script_makes_it(tmp_path):
    import make_tiny_gemma3

    make_tiny_gemma3.main(tmp_path)
    names = {path.name for path in MODEL.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name
    assert sum((MODEL / name).stat().st_size for name in names) < 2e6


# ───────────────────────────────────────────── --test ────────────────────────────────────────────


@pytest.fixture
def test_here(tmp_path, capsys):
    """Run `--test` in this process: exit status, the report's lines, stderr."""

    def run(*more, rows=None):
        words = flags(tmp_path / "out", "--test", *more)
        if rows:
            csv_path = write_csv(tmp_path / "rows.csv", rows)
            words = flags(tmp_path / "out", "--test", *more, csv_path=csv_path)
        with no_hang():
            status = script.main(words)
        found = capsys.readouterr()
        return status, found.out.splitlines(), found.err

    return run


def layer_errors(lines):
    """The report's relative errors: of the mean of patches, and by kind and layer."""
    (place,) = [i for i, line in enumerate(lines) if "vision_representation" in line]
    vision, _, layers = lines[place].partition("; by layer ")
    layers = [int(layer) for layer in layers.rstrip(":").split(",")]
    errors = {"vision_representation": float(vision.split()[1])}
    for line in lines[place + 1 :][:3]:
        kind, *of_kind = line.split()
        for layer, error in zip(layers, of_kind, strict=True):
            errors[kind, layer] = float(error)
    return errors


def test_three_rows_first_and_then_the_rest(plain_samples, test_here, run_here, tmp_path):
    out, words = tmp_path / "out", ("--checkpoint-interval", 5, "--batch-size", 3)
    status, lines, stderr = test_here(*words, rows=SOME)
    assert (status, last_line(stderr)) == (0, (3, 3, 0, 0))
    assert read_samples(out).keys() == {row[0] for row in SOME[:3]}
    assert [line[:6] for line in lines[:4]] == ["ok    "] * 4
    assert "one <bos>" in lines[0]
    positions = [int(plain_samples[row[0]]["query_token_pos"]) for row in SOME[:3]]
    assert f"soft tokens 5 to 260, vision token 260, query tokens {positions}" in lines[1]
    errors = layer_errors(lines)
    assert errors.keys() == {
        "vision_representation",
        *((kind, layer) for kind in KINDS for layer in (0, 2, 4, 6, 7)),
    }
    assert max(errors.values()) < 1e-5
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert re.fullmatch(
        re.escape(versions) + r"; float32 on cpu; attention by \w+\n"
        r"peak memory \d+\.\d GiB\n"
        r"the whole CSV takes 0\.00 GB; \d+ GB are free\n"
        r"8 rows about 2 images take 0\.00 h at \d+\.\d\d samples/s, "
        r"if answers have \d tokens as here",
        "\n".join(lines[8:]),
    )
    assert last_line(run_here(*words, rows=SOME)[1]) == (5, 8, 0, 3)
    found, expected = read_samples(out), {row[0]: dict(plain_samples[row[0]]) for row in SOME}
    assert [sample["part"] for sample in found.values()].count(script.PART_NAME.format(1)) == 5
    for sample in (*found.values(), *expected.values()):
        del sample["part"], sample["row"]
    assert_same_samples(found, expected)


def ignore_the_mask(plain_forward):
    return lambda *args, has_mask=True: plain_forward(*args, has_mask=True)


def err_in_a_layer(plain_forward):
    def forward(*args, **kwargs):
        input_ids, patches, hidden_states = plain_forward(*args, **kwargs)
        hidden_states = hidden_states.clone()
        hidden_states[4] *= 1.01
        return input_ids, patches, hidden_states

    return forward


def give_nan(plain_forward):
    def forward(*args, **kwargs):
        input_ids, patches, hidden_states = plain_forward(*args, **kwargs)
        hidden_states = hidden_states.clone()
        hidden_states[7, -1, 0] = torch.nan
        return input_ids, patches, hidden_states

    return forward


def begin_twice(plain_forward):
    def forward(*args, **kwargs):
        input_ids, *rest = plain_forward(*args, **kwargs)
        return [input_ids[0], *input_ids], *rest

    return forward


FAILING = {  # the line that fails, and the vectors that show it
    ignore_the_mask: (2, set()),
    err_in_a_layer: (3, {(kind, 4) for kind in KINDS}),
    give_nan: (3, {(kind, 7) for kind in KINDS[1:]}),
    begin_twice: (0, set()),
}


@pytest.mark.parametrize("mistake", FAILING)
def test_a_failed_check_of_the_test_run_is_an_error(test_here, monkeypatch, mistake):
    monkeypatch.setattr(script, "plain_forward", mistake(script.plain_forward))
    status, lines, stderr = test_here("--batch-size", 1, rows=SOME[:1])
    assert (status, last_line(stderr)) == (1, (1, 1, 0, 0))
    failing, vectors = FAILING[mistake]
    assert [i for i, line in enumerate(lines) if line.startswith("FAIL  ")] == [failing]
    errors = layer_errors(lines)
    assert {name for name, error in errors.items() if not error < 1e-4} == vectors


def test_a_test_run_looks_no_further_than_it_must(test_here):
    """30 images are missing: that is no reason to withhold what the first three rows show."""
    rows = [*SOME[:3], *((f"bad {i}", f"nowhere{i}.png", "what?", "") for i in range(30))]
    status, lines, stderr = test_here("--strict", rows=rows)
    assert (status, last_line(stderr)) == (0, (3, 3, 0, 0))
    assert "33 rows about 32 images take" in lines[-1]


def test_a_test_run_on_a_row_that_the_model_fails(test_here, monkeypatch):
    pixels = script.Prompter.pixels
    monkeypatch.setattr(script.Prompter, "pixels", lambda *args: pixels(*args) * torch.nan)
    status, _, stderr = test_here(rows=SOME[:1])
    assert status == 1
    assert "Traceback" not in stderr
    assert f"--test: question_id {SOME[0][0]!r} failed: its states are" in stderr.splitlines()[-1]


def test_a_line_of_progress_does_not_wait_for_the_log(capsys):
    """The log waits for the bar's lock with its own in hand: both ways round they would hang."""
    handler = logging.StreamHandler()
    script.log.addHandler(handler)
    handler.acquire()
    try:
        thread = threading.Thread(
            target=lambda: script.ProgressLines().write("\r 7/9 "), daemon=True
        )
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    finally:
        handler.release()
        script.log.removeHandler(handler)
    assert capsys.readouterr().err == "7/9\n"


def test_a_test_run_without_a_row_that_can_be_extracted(test_here, tmp_path):
    bad = [(f"bad {i}", f"nowhere{i}.png", "what?", "") for i in range(3)]
    status, lines, stderr = test_here(rows=[*bad, SOME[0]])
    assert (status, last_line(stderr)) == (3, (0, 3, 3, 0))
    assert lines == ["none of the first rows can be extracted, so nothing was checked"]
    assert read_failed(tmp_path / "out").keys() == {row[0] for row in bad}


# ─────────────────────────────────────── nowhere to write to ─────────────────────────────────────


def test_output_that_finds_no_room_is_no_traceback(plain_run, tmp_path):
    """Of the report it is an error, of messages not."""
    csv_path = write_csv(tmp_path / "rows.csv", SOME[:1])
    report = (tmp_path / "report", "--test", "--max-new-tokens", 0)
    messages = (shutil.copytree(plain_run[0], tmp_path / "messages"), *PARTS_OF_7)
    with open("/dev/full", "w") as full, ThreadPoolExecutor(2) as pool:
        streams = {"stdout": full, "stderr": subprocess.PIPE, "capture_output": False}
        no_report = pool.submit(run_script, *report, csv_path=csv_path, **streams)
        streams |= {"stdout": subprocess.PIPE, "stderr": full}
        no_messages = pool.submit(run_script, *messages, **streams)
    no_report, no_messages = no_report.result(), no_messages.result()
    assert no_report.returncode == 1
    assert "No space left on device" in no_report.stderr.splitlines()[-1]
    assert "Traceback" not in no_report.stderr
    assert read_samples(tmp_path / "report").keys() == {SOME[0][0]}
    assert (no_messages.returncode, no_messages.stdout) == (0, "")


def test_stderr_may_be_closed():
    command = f"{sys.executable} {script.__file__} --help 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--vqa-dataset" in done.stdout
