"""Bad rows, tables, models, directories and parts: told, survived, never a traceback."""

import contextlib
import csv
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import h5py
import pytest
import torch
from conftest import CSV, IMAGES, MODEL, assert_same_samples, no_hang, read_samples
from PIL import Image

import run_gemma3_extraction as script

PART = "gemma3_12b_embeddings_part_001.h5"
HEADER = ("question_id", "image_id", "question", "answer")
GOOD = [
    ("good 1", "circle.png", "what color is the shape?", "red"),
    ("good 2", "wide.jpg", "how many?", "NA"),
    ("good 3", "inside/../grey.png", "a < b <tag> & {question}?", ""),
    ("good 4", "circle.png", "is it round?", "yes"),
]


def write_csv(path, rows, header=HEADER):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def command_line(csv_path, output_dir, *flags, images_dir=IMAGES):
    flags = [
        *("--vqa-dataset", csv_path, "--images-dir", images_dir, "--output-dir", output_dir),
        *("--model", MODEL, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2"),
        *flags,
    ]
    return [str(flag) for flag in flags]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run the program in this process on `rows`, by default good ones: its status and stderr."""
    # transformers' logger holds the stderr of the first test that came along.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run_in_process(*flags, rows=GOOD, images_dir=IMAGES):
        csv_path = write_csv(tmp_path / "rows.csv", rows)
        arguments = command_line(csv_path, tmp_path / "out", *flags, images_dir=images_dir)
        with no_hang():
            try:
                status = script.main(arguments)
            except SystemExit as error:
                status = error.code
        return status, capsys.readouterr().err

    return run_in_process


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def failed(output_dir):
    """`failed_samples.csv`: image_id and error by question_id."""
    path = output_dir / "failed_samples.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["question_id", "image_id", "error"]
    ids = [line[0] for line in lines[1:]]
    assert len(ids) == len(set(ids))
    return {line[0]: (line[1], line[2]) for line in lines[1:]}


# ──────────────────────────────────────────── bad rows ───────────────────────────────────────────


def write_black_png(path, width, height):
    """A real one-bit PNG of any size, a thousand times smaller than its pixels."""

    def block(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    pixels = zlib.compressobj()
    line = bytes(1 + (width + 7) // 8)
    content = b"".join(pixels.compress(line) for _ in range(height)) + pixels.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", header)
        + block(b"IDAT", content)
        + block(b"IEND", b"")
    )


def write_broken_exif(path):
    """A good picture whose EXIF block has a turn to undo, and a text where a number belongs."""
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", 2)
        + struct.pack("<HHII", 0x0112, 3, 1, 6)  # turn by 90 degrees
        + struct.pack("<HHII", 0x0100, 2, 4, int.from_bytes(b"abc\0", "little"))  # width: "abc"
        + struct.pack("<I", 0)
    )
    Image.new("RGB", (32, 20), "red").save(path, exif=exif)


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """The test images, and next to them everything that is no image."""
    root = tmp_path_factory.mktemp("hostile")
    images = shutil.copytree(IMAGES, root / "images")
    (images / "inside").mkdir()
    shutil.copy(IMAGES / "circle.png", root / "outside.png")
    shutil.copytree(IMAGES, root / "images2")  # a name that only begins like that of the directory
    for name, source in (("cut.jpg", "tall.jpeg"), ("cut.png", "circle.png")):
        whole = (IMAGES / source).read_bytes()
        (images / name).write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").touch()
    (images / "text.png").write_text("I am a text.\n")
    (images / "html.jpg").write_text("<html><body>404 Not Found</body></html>")
    (images / "directory.png").mkdir()
    os.mkfifo(images / "pipe.png")
    Image.new("I;16", (32, 20), 3000).save(images / "deep.png")
    write_black_png(images / "bomb.png", 20_000, 20_000)
    write_black_png(images / "large.png", 10_000, 10_000)
    write_broken_exif(images / "exif.jpg")
    (images / "broken.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40))
    (images / "broken.dds").write_bytes(
        struct.pack("<4s4I", b"DDS ", 124, 7, 9, 9).ljust(200, b"\0")
    )
    return images


Q = "what is it?"
BAD_ROWS = {  # question_id: image_id, question, what the error must hold
    "parent": ("../outside.png", Q, "../outside.png"),
    "parent in between": ("inside/../../outside.png", Q, "inside/../../outside.png"),
    "sibling": ("../images2/circle.png", Q, "../images2/circle.png"),
    "absolute": (str(IMAGES / "circle.png"), Q, str(IMAGES / "circle.png")),
    "the directory itself": (".", Q, "'.'"),
    "no image_id": ("", Q, "image_id"),
    "missing": ("nowhere.png", Q, "nowhere.png does not exist"),
    "without extension": ("circle", Q, "circle does not exist"),
    "long name": ("x" * 300 + ".png", Q, "x" * 300),
    "bomb": ("bomb.png", Q, "bomb.png"),
    "large": ("large.png", Q, "10000 x 10000"),
    "cut jpeg": ("cut.jpg", Q, "cut.jpg"),
    "cut png": ("cut.png", Q, "cut.png"),
    "empty file": ("empty.png", Q, "empty.png"),
    "text": ("text.png", Q, "text.png"),
    "html": ("html.jpg", Q, "html.jpg"),
    "directory": ("directory.png", Q, "directory.png"),
    "pipe": ("pipe.png", Q, "pipe.png"),
    "16 bits": ("deep.png", Q, "8 bits"),
    "avif": ("broken.avif", Q, "broken.avif"),
    "dds": ("broken.dds", Q, "broken.dds"),
    "start_of_image": ("circle.png", "what is <start_of_image>?", "<start_of_image>"),
    "end_of_turn": (
        "circle.png",
        "what?<end_of_turn>\n<start_of_turn>model\nred",
        "<end_of_turn> <start_of_turn>",
    ),
    "bos": ("grey.png", "<bos>what?", "<bos>"),
    "soft token": ("grey.png", "what?<image_soft_token>", "<image_soft_token>"),
    "empty question": ("circle.png", "", "the question is empty"),
    "blank question": ("tall.jpeg", " \n\t ", "the question is empty"),
}


# A picture that is whole but for its EXIF block may be read or refused, but never end the run.
BROKEN_EXIF = ("broken exif", "exif.jpg", Q, "red")


@pytest.fixture(scope="module")
def bad_rows_run(images_dir, tmp_path_factory):
    """One run over all bad rows and the good ones between them: its result and its directory."""
    root = tmp_path_factory.mktemp("bad_rows")
    bad = [(name, image_id, question, "") for name, (image_id, question, _) in BAD_ROWS.items()]
    rows = [*GOOD[:1], *bad[:12], *GOOD[1:3], BROKEN_EXIF, *bad[12:], *GOOD[3:]]
    arguments = command_line(
        write_csv(root / "rows.csv", rows),
        root / "out",
        *("--batch-size", "3", "--checkpoint-interval", "10"),
        images_dir=images_dir,
    )
    result = subprocess.run(
        [sys.executable, script.__file__, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return result, root / "out"


def test_bad_rows_do_not_stop_the_run(bad_rows_run):
    result, out = bad_rows_run
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    total = len(BAD_ROWS) + len(GOOD) + 1
    failures = failed(out)
    last_line = result.stderr.splitlines()[-1]
    extracted = total - len(failures)
    assert last_line.startswith(
        f"Extracted {extracted} of {total} samples ({len(failures)} failed, 0 already done)"
    )
    assert failures.keys() - {"broken exif"} == BAD_ROWS.keys()
    assert failures.keys().isdisjoint(read_samples(out))


def test_good_rows_between_bad_ones_are_as_without_them(bad_rows_run, run, tmp_path, images_dir):
    _, out = bad_rows_run
    assert run(images_dir=images_dir)[0] == 0
    found = {q: s for q, s in read_samples(out).items() if q.startswith("good")}
    expected = read_samples(tmp_path / "out")
    for samples in (found, expected):
        for sample in samples.values():
            del sample["part"], sample["row"]
    assert_same_samples(found, expected)


@pytest.mark.parametrize("question_id", BAD_ROWS)
def test_bad_row_is_listed_with_its_reason(bad_rows_run, question_id):
    image_id, _, reason = BAD_ROWS[question_id]
    listed_image, error = failed(bad_rows_run[1])[question_id]
    assert listed_image == image_id
    assert reason in error
    assert "\n" not in error


def test_strict_stops_at_the_first_bad_row(run, out):
    rows = [GOOD[0], ("bad", "nowhere.png", Q, ""), *GOOD[1:3]]
    status, stderr = run("--strict", rows=rows)
    assert status == 1
    assert "'bad'" in stderr.splitlines()[-1]
    assert "nowhere.png" in stderr.splitlines()[-1]
    assert read_samples(out).keys() == {"good 1"}
    assert failed(out).keys() == {"bad"}


def test_25_different_images_in_a_row_stop_the_run(run, out):
    bad = [(f"bad {i}", f"nowhere{i}.png", Q, "") for i in range(40)]
    status, stderr = run(rows=[GOOD[0], *bad, GOOD[1]])
    assert status == 1
    assert "25 different images" in stderr.splitlines()[-1]
    assert "nowhere24.png" in stderr.splitlines()[-1]
    assert read_samples(out).keys() == {"good 1"}
    assert failed(out).keys() == {f"bad {i}" for i in range(25)}


def test_failed_images_do_not_pile_up_before_they_are_counted():
    """A volume that goes away after row 1 must stop the run at image 25, not at the last one."""
    taken = 0

    def failing_rows():
        nonlocal taken
        while taken < 10_000:
            taken += 1
            row = script.Row(taken, str(taken), f"{taken}.png", Q, "")
            yield script.Failure(row, "it is missing")

    next(script.make_batches(failing_rows(), 8))
    assert taken <= script.MAX_FAILED_IMAGES


def test_one_missing_image_with_40_questions_does_not(run, out):
    bad = [(f"bad {i}", "nowhere.png", Q, "") for i in range(40)]
    status, _ = run("--checkpoint-interval", "9", rows=[GOOD[0], *bad, GOOD[1]])
    assert status == 3
    assert read_samples(out).keys() == {"good 1", "good 2"}
    assert failed(out).keys() == {f"bad {i}" for i in range(40)}


def test_success_in_between_starts_the_count_of_failed_images_anew(run, out):
    bad = [(f"bad {i}", f"nowhere{i}.png", Q, "") for i in range(40)]
    assert run(rows=[*bad[:20], GOOD[0], *bad[20:], GOOD[1]])[0] == 3
    assert len(failed(out)) == 40


# ───────────────────────────────────────── the CSV itself ────────────────────────────────────────

H = b"question_id,image_id,question,answer\n"
BAD_CSVS = {
    "empty": (b"", "no rows"),
    "blank lines": (b"\n\n\n", "no rows"),
    "only a header": (H, "no rows"),
    "not UTF-8": (H + "1,a.png,où?,b\n".encode("latin-1"), "not UTF-8"),
    "UTF-16": ((H + b"1,a.png,q,b\n").decode().encode("utf-16"), "not UTF-8"),
    "duplicate ids": (H + b"007,a.png,q,b\n7,a.png,q,b\n007,c.png,q,b\n", "line 4.*'007'.*twice"),
    "short line": (H + b"1,a.png,q,b\n2,a.png,q\n", "line 3.*3 fields.*4"),
    "long line": (H + b"1,a.png,where, and how?,b\n", "line 2.*5 fields.*4"),
    "NUL byte": (H + b"1,a.png,q\x00r,b\n", "line 2.*NUL"),
    "empty id": (H + b"1,a.png,q,b\n,a.png,q,b\n", "line 3.*question_id is empty"),
    "blank id": (H + b"  ,a.png,q,b\n", "line 2.*question_id is empty"),
    "missing column": (b"question_id,image_id,answer\n1,a.png,b\n", "column question is not there"),
    "semicolons": (H.replace(b",", b";") + b"1;a.png;q;b\n", "column question_id is not there"),
    "column twice": (b"question_id," + H + b"1,1,a.png,q,b\n", "column question_id is there twice"),
    "open quote": (H + b'1,a.png,"q,b\n2,a.png,q,b\n', "line 3"),
    "text after a quote": (H + b'1,a.png,q,b\n2,a.png,"what" is it?,b\n', "line 3"),
}


@pytest.mark.parametrize("name", BAD_CSVS)
def test_bad_csv_is_refused(name, tmp_path):
    content, reason = BAD_CSVS[name]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(script.ExtractionError, match=reason) as caught:
        script.read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.csv", "directory"])
def test_csv_that_is_no_file_is_refused(name, tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(script.ExtractionError, match=name):
        script.read_rows(tmp_path / name)


def test_odd_but_good_csv_is_read_to_the_letter(tmp_path):
    rows = [
        ("007", "a b.png", ' "quoted", with\nlines\r\nand , commas ', "NA"),
        ("7", "日本.png", "наконец?", "None"),
        ("nan", "c.png", "q" * 200_000, ""),
    ]
    path = write_csv(tmp_path / "rows.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")  # BOM, blank lines
    read = script.read_rows(path)
    assert [(r.question_id, r.image_id, r.question, r.ground_truth) for r in read] == rows


@pytest.mark.parametrize(
    "question_id",
    [".", "..", "...", "/", "a/b", "/a", "a//b", "%2F", "100%", "./a", "ключ", " a ", "x" * 3000],
)
def test_any_question_id_survives(question_id, run, out):
    rows = [(question_id, *GOOD[0][1:]), GOOD[1]]
    assert run("--max-new-tokens", "0", rows=rows)[0] == 0
    samples = read_samples(out)
    assert samples.keys() == {question_id, "good 2"}
    status, stderr = run("--max-new-tokens", "0", rows=rows)
    assert status == 0
    assert "(0 failed, 2 already done)" in stderr


# ────────────────────────────────────────── cannot start ─────────────────────────────────────────


@pytest.fixture
def no_model(monkeypatch):
    """What is wrong must be found before the model is loaded."""

    def load(*_):
        pytest.fail("the model was loaded first")

    monkeypatch.setattr(script, "load_model", load)


def assert_refused(status, stderr, *culprits, expected=1):
    """Refused in one clear line that names the culprit, without a traceback."""
    assert status == expected, stderr
    assert "Traceback" not in stderr
    for culprit in culprits:
        assert str(culprit) in stderr.splitlines()[-1]


WRONG_USAGE = {
    "float16": (["--dtype", "float16"], "65504"),
    "float8": (["--dtype", "float8"], "float8"),
    "layers": (["--layers", "first"], "first"),
    "batch size": (["--batch-size", "0"], "--batch-size"),
    "interval": (["--checkpoint-interval", "-1"], "--checkpoint-interval"),
    "max new tokens": (["--max-new-tokens", "-1"], "--max-new-tokens"),
    "compression": (["--compression", "zip"], "zip"),
    "unknown flag": (["--no-such-flag"], "--no-such-flag"),
    "abbreviation": (["--over"], "--over"),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage_is_status_2(name, run, no_model, out):
    flags, culprit = WRONG_USAGE[name]
    assert_refused(*run(*flags), culprit, expected=2)
    assert not out.exists()


def test_nothing_given_is_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        script.main([])
    assert caught.value.code == 2
    assert "--vqa-dataset" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["99", "0,-9", "8"])
def test_layers_that_are_not_there(layers, run, no_model, out):
    assert_refused(*run(f"--layers={layers}"), "--layers", "0 to 7")


@pytest.mark.parametrize("layers", ["-1", "-2,-1", "0,-1"])
def test_negative_layers_count_from_the_end(layers, run, out):
    """As two words, which argparse takes for a flag unless it is told."""
    status, stderr = run("--max-new-tokens", "0", "--layers", layers)
    assert status == 0, stderr
    expected = sorted(int(layer) % 8 for layer in layers.split(","))
    with h5py.File(out / PART) as file:
        assert file.attrs["layers"].tolist() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda(device, run, no_model):
    assert_refused(*run("--device", device), f"--device {device}", "--device cpu")


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "cpu:x"])
def test_device_that_does_not_exist(device, run, no_model):
    assert_refused(*run("--device", device), f"--device {device}")


def test_a_launcher_that_tells_only_half_is_refused(run, no_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert_refused(*run(), "WORLD_SIZE", "torchrun")


def test_no_image_at_all(run, no_model, tmp_path, out):
    for images_dir in (tmp_path / "nowhere", CSV, tmp_path):
        assert_refused(*run(images_dir=images_dir), images_dir, "none of the", "circle.png")
    assert not out.exists()


def unwritable_directories(tmp_path):
    a_file = tmp_path / "file"
    a_file.write_text("precious")
    yield a_file
    yield a_file / "below"
    yield Path("/proc/extraction")
    immutable = tmp_path / "immutable"
    immutable.mkdir()
    if os.geteuid() != 0:
        immutable.chmod(0o500)
    elif subprocess.run(["chattr", "+i", immutable], capture_output=True, check=False).returncode:
        return
    try:
        yield immutable
    finally:
        subprocess.run(["chattr", "-i", immutable], capture_output=True, check=False)


def test_output_dir_that_cannot_be_written(run, no_model, tmp_path):
    for output_dir in unwritable_directories(tmp_path):
        status, stderr = run("--output-dir", output_dir)
        assert_refused(status, stderr, f"--output-dir {output_dir}", "|")  # | what to do
    assert (tmp_path / "file").read_text() == "precious"


def test_too_little_room_is_seen_before_the_model_loads(run, no_model, monkeypatch, out):
    usage = shutil.disk_usage(out.parent)._replace(free=10_000)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    assert_refused(*run(), str(out), "free", "needs", "|")


def test_a_model_too_large_for_the_device_is_told_so(run, monkeypatch):
    import transformers

    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB.\nSee the docs.")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
    assert_refused(*run(), "memory is too small", "--device-map auto")


def copy_model(tmp_path, *without):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns(*without))
    return model


def no_weights(tmp_path):
    return copy_model(tmp_path, "*.safetensors")


def only_a_pickle(tmp_path):
    model = no_weights(tmp_path)
    torch.save({"a": torch.zeros(1)}, model / "pytorch_model.bin")
    return model


def weights_cut_short(tmp_path):
    model = copy_model(tmp_path)
    os.truncate(model / "model.safetensors", 100_000)
    return model


def a_weight_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    model = copy_model(tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights[next(name for name in weights if "layers.3.mlp" in name)]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def no_config(tmp_path):
    return copy_model(tmp_path, "config.json")


def empty_directory(tmp_path):
    return copy_model(tmp_path, "*")


def not_json(tmp_path):
    model = copy_model(tmp_path)
    (model / "config.json").write_text("{")
    return model


def another_kind_of_model(tmp_path):
    model = copy_model(tmp_path)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return model


def no_chat_template(tmp_path):
    return copy_model(tmp_path, "chat_template.jinja")


def no_tokenizer(tmp_path):
    return copy_model(tmp_path, "tokenizer.json")


def broken_tokenizer(tmp_path):
    model = copy_model(tmp_path)
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    return model


def no_processor_config(tmp_path):
    return copy_model(tmp_path, "processor_config.json")


def nowhere(tmp_path):
    return tmp_path / "nowhere"


def a_file(tmp_path):
    return CSV


@pytest.mark.parametrize(
    "make",
    [
        *(no_weights, only_a_pickle, weights_cut_short, a_weight_missing, no_config, not_json),
        *(empty_directory, another_kind_of_model, no_chat_template, no_tokenizer),
        *(broken_tokenizer, no_processor_config, nowhere, a_file),
    ],
)
def test_model_that_cannot_be_loaded(make, run, tmp_path, out):
    model = make(tmp_path)
    status, stderr = run("--model", model)
    assert_refused(status, stderr, model)
    assert "pickle" not in stderr.lower() or "safetensors" in stderr
    assert not list(out.glob("*.h5")) if out.exists() else True


# ─────────────────────────────────────────── going on ────────────────────────────────────────────


def test_failed_row_is_tried_again_and_the_list_shrinks(run, out, images_dir, tmp_path):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    rows = [*GOOD[:2], ("bad 1", "late.png", Q, ""), ("bad 2", "never.png", Q, "")]
    assert run(rows=rows, images_dir=images)[0] == 3
    assert failed(out).keys() == {"bad 1", "bad 2"}
    shutil.copy(IMAGES / "grey.png", images / "late.png")
    status, stderr = run(rows=rows, images_dir=images)
    assert status == 3
    assert stderr.splitlines()[-1].startswith("Extracted 1 of 4 samples (1 failed, 2 already done)")
    assert failed(out).keys() == {"bad 2"}
    shutil.copy(IMAGES / "grey.png", images / "never.png")
    assert run(rows=rows, images_dir=images)[0] == 0
    assert not (out / "failed_samples.csv").exists()
    assert read_samples(out).keys() == {"good 1", "good 2", "bad 1", "bad 2"}


def test_failed_row_that_left_the_csv_leaves_the_list(run, out):
    assert run(rows=[GOOD[0], ("bad", "nowhere.png", Q, "")])[0] == 3
    assert run(rows=[GOOD[0]])[0] == 0
    assert not failed(out)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"a\0b\n", b'"open', b"1;2;3\n4;5;6\n"])
def test_list_of_failures_that_somebody_spoilt_is_written_anew(content, run, out):
    rows = [GOOD[0], ("bad", "nowhere.png", Q, "")]
    assert run(rows=rows)[0] == 3
    (out / "failed_samples.csv").write_bytes(content)
    status, stderr = run(rows=rows)
    assert status == 3, stderr
    assert failed(out).keys() == {"bad"}


def test_part_whose_rows_all_failed_is_written_empty(run, out):
    rows = [GOOD[0], ("bad 1", "no.png", Q, ""), ("bad 2", "no.png", Q, ""), GOOD[1]]
    for _ in range(2):
        assert run("--checkpoint-interval", "1", rows=rows)[0] == 3
        counts = []
        for k in range(1, 5):
            with h5py.File(out / f"gemma3_12b_embeddings_part_{k:03d}.h5") as file:
                counts.append((len(file), int(file.attrs["num_samples"])))
        assert counts == [(1, 1), (0, 0), (0, 0), (1, 1)]


def test_failures_with_odd_line_breaks_are_listed_whole(run, out):
    ids = ["bad\u2028id", "bad\x0cid", "bad\x85id", "bad\nid"]
    rows = [GOOD[0], *((question_id, "no\u0085pe\n.png", Q, "") for question_id in ids)]
    for _ in range(2):
        assert run("--checkpoint-interval", "1", rows=rows)[0] == 3
        assert failed(out).keys() == set(ids)
    status, stderr = run("--checkpoint-interval", "1", "--strict", rows=rows)
    assert_refused(status, stderr, "pe .png does not exist")


def test_scattered_failures_do_not_add_up_when_the_run_goes_on(run, out):
    """30 bad images with a good row before each: one after the other only for who skips those."""
    good = [(f"good {i}", f"{'./' * i}circle.png", Q, "") for i in range(30)]
    bad = [(f"bad {i}", f"nowhere{i}.png", Q, "") for i in range(30)]
    rows = [row for pair in zip(good, bad) for row in pair]
    flags = ["--max-new-tokens", "0", "--checkpoint-interval", "7"]
    for _ in range(2):
        assert run(*flags, rows=rows)[0] == 3
        assert failed(out).keys() == {row[0] for row in bad}
    assert run(*flags, rows=[*rows, ("new", *GOOD[0][1:])])[0] == 3
    assert read_samples(out).keys() == {row[0] for row in good} | {"new"}


OTHER_SETTINGS = {
    "layers": (["--layers", "1,2"], "layers was [0, 2, 4, 6, 7] and is [1, 2]"),
    "max_new_tokens": (["--max-new-tokens", "5"], "max_new_tokens was 2 and is 5"),
    "dtype": (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
    "interval": (["--checkpoint-interval", "7"], "checkpoint_interval was 1000 and is 7"),
    "storage": (
        ["--storage-dtype", "bfloat16"],
        "storage_dtype was 'float32' and is 'bfloat16'",
    ),
    "several": (["--layers", "1", "--max-new-tokens", "5"], "max_new_tokens was 2 and is 5"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run over the good rows."""
    out = tmp_path_factory.mktemp("finished") / "out"
    csv_path = write_csv(out.parent / "rows.csv", GOOD)
    assert script.main(command_line(csv_path, out)) == 0
    return out


@pytest.fixture
def done(finished, out):
    """A copy of a finished run, as the run to come finds it."""
    return shutil.copytree(finished, out)


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_with_both_values(name, run, done, no_model):
    flags, difference = OTHER_SETTINGS[name]
    before = (done / PART).read_bytes()
    assert_refused(*run(*flags), PART, difference, "--overwrite")
    assert (done / PART).read_bytes() == before


def test_other_model_prompt_and_revision_are_refused(run, done, no_model, tmp_path):
    model = copy_model(tmp_path)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "Well,")
    status, stderr = run("--model", model)
    assert_refused(status, stderr, "model_name was", str(MODEL), str(model), "prompt was", "Well,")


def test_other_weights_of_the_same_size_are_refused(run, out, tmp_path):
    from safetensors.torch import load_file, save_file

    model = copy_model(tmp_path)
    assert run("--model", model)[0] == 0
    weights = {
        name: tensor * 1.5 for name, tensor in load_file(model / "model.safetensors").items()
    }
    size = (model / "model.safetensors").stat().st_size
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert (model / "model.safetensors").stat().st_size == size
    assert_refused(*run("--model", model), "model_revision was")


@pytest.mark.parametrize(
    ("column", "new"), [(1, "tall.jpeg"), (2, "what colour is the shape?"), (3, "blue")]
)
def test_row_changed_under_its_id_is_refused(column, new, run, done, no_model):
    row = list(GOOD[0])
    old, row[column] = row[column], new
    name = ("question_id", "image_id", "question", "answer")[column]
    status, stderr = run(rows=[row, *GOOD[1:]])
    assert_refused(status, stderr, "'good 1'", f"{name} was {old!r} and is {new!r}")


def test_rows_added_at_the_end_are_accepted(run, done, out):
    before = read_samples(done)
    added = [("new 1", "tall.jpeg", Q, ""), ("new 2", "circle.png", Q, "")]
    status, stderr = run(rows=[*GOOD, *added])
    assert status == 0
    assert stderr.splitlines()[-1].startswith("Extracted 2 of 6 samples (0 failed, 4 already done)")
    after = read_samples(out)
    assert after.keys() == before.keys() | {"new 1", "new 2"}
    assert_same_samples({q: after[q] for q in before}, before, bound=0)


def test_finished_run_loads_no_model(run, done, no_model):
    status, stderr = run()
    assert status == 0
    assert "Extracted 0 of 4 samples (0 failed, 4 already done)" in stderr


def test_leftovers_of_a_killed_run_are_removed(run, done, no_model):
    for name in ("gemma3_12b_embeddings_part_002.partial", "failed_samples.partial"):
        (done / name).write_bytes(b"half")
    (done / "mine.partial").write_bytes(b"precious")
    assert run()[0] == 0
    assert not list(done.glob("gemma3*.partial")) + list(done.glob("failed*.partial"))
    assert (done / "mine.partial").exists()


def test_overwrite_deletes_the_programs_own_files_only(run, done, out):
    own = ["gemma3_12b_embeddings_part_007.h5", "gemma3_12b_embeddings_part_1234.h5"]
    own += ["gemma3_12b_embeddings_part_002.partial", "failed_samples.csv"]
    own += ["gemma3_12b_embeddings_part_003.damaged-0123abcd"]
    mine = ["failed_samples_of_last_week.csv", "failed_samples.xlsx", "notes.txt", "my.h5"]
    mine += ["gemma3_12b_embeddings_part_001_pca.png", "gemma3_12b_embeddings_part_001.h5.bak"]
    for name in (*own, *mine):
        (out / name).write_bytes(b"old")
    (out / "failed_samples").mkdir()
    assert run("--overwrite", "--layers", "1")[0] == 0
    assert {path.name for path in out.iterdir()} - {".lock"} == {PART, *mine, "failed_samples"}
    with h5py.File(out / PART) as file:
        assert file.attrs["layers"].tolist() == [1]


@pytest.mark.parametrize("make", [no_weights, weights_cut_short])
def test_overwrite_keeps_what_is_there_when_the_run_cannot_start(run, done, tmp_path, make):
    status, stderr = run("--overwrite", "--model", make(tmp_path))
    assert_refused(status, stderr, "model")
    assert read_samples(done).keys() == {row[0] for row in GOOD}


def test_overwrite_keeps_what_is_there_when_the_disk_is_too_small(run, done, monkeypatch):
    size = sum(path.stat().st_size for path in done.glob("*.h5"))
    usage = shutil.disk_usage(done)._replace(free=0)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    rows = [(f"{i}", *GOOD[0][1:]) for i in range(size // 2000)]
    assert_refused(*run("--overwrite", rows=rows), str(done), "free", "needs", "|")
    assert read_samples(done).keys() == {row[0] for row in GOOD}
    assert run("--overwrite", rows=GOOD[:1])[0] == 0  # which takes less than what goes


def test_a_process_that_comes_late_overwrites_nothing(run, done, monkeypatch):
    """Of a launch whose other processes have done all the work and left."""
    launch = script.Launch()
    launch.add("overwritten", 1)
    monkeypatch.setattr(script, "Launch", lambda: launch)
    before = read_samples(done)
    status, stderr = run("--overwrite")
    assert (status, "(0 failed, 4 already done)" in stderr) == (0, True)
    assert_same_samples(read_samples(done), before, bound=0)


def test_overwriting_is_left_to_the_process_that_prepares(run, done, monkeypatch):
    """Or another one prepares, keeps the old parts, and nobody overwrites."""
    launch = script.Launch()
    monkeypatch.setattr(script, "Launch", lambda: launch)
    assert run()[0] == 0
    run_id = json.loads((done / ".lock").read_text())["run_id"]
    with lock_held(done, run_id):
        assert run("--overwrite")[0] == 0
    assert launch.add("overwritten", 0) == 0


def test_overwrite_in_a_slurm_array_is_refused(run, done, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    assert_refused(*run("--overwrite"), "--overwrite", "array")
    assert read_samples(done).keys() == {row[0] for row in GOOD}


# ────────────────────────────────────────── damaged parts ────────────────────────────────────────


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def no_hdf5(path):
    path.write_text("I am a text.\n")


def zeroed_page(path):
    """What a disk without a sync may leave: here where the root's attributes are."""
    content = path.read_bytes()
    place = content.index(b"gemma-3-") // 512 * 512
    path.write_bytes(content[:place] + bytes(512) + content[place + 512 :])


def edit(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def sample_lost(path):
    edit(path, lambda file: file.__delitem__("good 2"))


def vector_lost(path):
    edit(path, lambda file: file["good 2"].__delitem__("query_token_representation/layer_4"))


def text_lost(path):
    edit(path, lambda file: file["good 2"].__delitem__("answer"))


def link_lost(path):
    edit(path, lambda file: file["good 2"].__delitem__("vision_only_representation"))


def attribute_lost(path):
    edit(path, lambda file: file["good 2"].attrs.__delitem__("num_prompt_tokens"))


def id_lost(path):
    edit(path, lambda file: file["good 2"].attrs.__delitem__("question_id"))


def not_finite(path):
    edit(path, lambda file: file["good 2/vision_representation"].write_direct(NANS))


def misshapen(path):
    vector_lost(path)
    edit(
        path,
        lambda file: file["good 2"].create_dataset(
            "query_token_representation/layer_4", data=NANS[:3] * 0
        ),
    )


def count_wrong(path):
    edit(path, lambda file: file.attrs.__setitem__("num_samples", 3))


def count_lost(path):
    edit(path, lambda file: file.attrs.__delitem__("num_samples"))


def stray_dataset(path):
    edit(path, lambda file: (file.__delitem__("good 2"), file.__setitem__("good 2", 1.0)))


NANS = torch.full((24,), torch.nan).numpy()


@pytest.mark.parametrize(
    "damage",
    [
        *(cut_short, emptied, no_hdf5, zeroed_page, sample_lost, vector_lost, text_lost),
        *(link_lost, attribute_lost, id_lost, not_finite, misshapen, count_wrong, count_lost),
        stray_dataset,
    ],
)
def test_damaged_part_is_set_aside_and_computed_again(damage, run, done):
    before = read_samples(done)
    damage(done / PART)
    status, stderr = run()
    assert status == 0, stderr
    assert f"{PART} is damaged" in stderr
    aside = [path for path in done.iterdir() if "damaged" in path.name]
    assert len(aside) == 1
    assert aside[0].suffix != ".h5"
    assert aside[0].name in stderr
    assert_same_samples(read_samples(done), before)


def test_part_that_somebody_has_open_is_not_damaged(run, done, no_model):
    """HDF5 locks what a notebook opened for writing; that is no reason to set the part aside."""
    code = f"import h5py; f = h5py.File({str(done / PART)!r}, 'a'); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        holder.stdout.readline()
        status, stderr = run()
    finally:
        holder.communicate("\n", timeout=60)
    assert_refused(status, stderr, PART)
    assert (done / PART).exists()
    assert run()[0] == 0


# ─────────────────────────────────────────── two at once ─────────────────────────────────────────


HOLDER = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(script.__file__).parent)!r})
import run_gemma3_extraction as script
lock = script.OutputLock(pathlib.Path(sys.argv[1]), sys.argv[2])
assert lock.acquire()
if sys.argv[3] == "shares":
    lock.share()
print(1, flush=True)
input()
"""


@contextlib.contextmanager
def lock_held(directory, run_id, how="shares"):
    """By another process: a POSIX lock does not keep its own process out."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, directory, run_id, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_second_run_on_the_same_directory_is_refused(run, done, no_model, monkeypatch):
    monkeypatch.setattr(script, "load_model", lambda *_: None)  # --overwrite loads it first
    with lock_held(done, "another") as first:
        for flags in ([], ["--overwrite"]):
            status, stderr = run(*flags)
            assert_refused(status, stderr, str(done), str(first.pid), socket.gethostname())
    assert (done / PART).exists()
    assert run()[0] == 0  # the lock of a killed process is no obstacle


def test_a_task_of_the_same_array_with_other_settings_is_refused(run, done, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    assert run()[0] == 0
    run_id = json.loads((done / ".lock").read_text())["run_id"]
    with lock_held(done, run_id):
        assert run()[0] == 0
        assert_refused(*run("--max-new-tokens", "9"), "in use")
        assert_refused(*run(rows=GOOD[:3]), "in use")


def test_who_waits_for_a_preparer_that_dies_prepares_itself(run, done, monkeypatch):
    """Or it would go on in a directory that nobody has compared with its settings."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    assert run()[0] == 0
    run_id = json.loads((done / ".lock").read_text())["run_id"]
    with h5py.File(done / PART, "a") as file:
        file.attrs["max_new_tokens"] = 9
    with lock_held(done, run_id, "prepares") as first:
        threading.Timer(3, first.kill).start()
        assert_refused(*run(), "max_new_tokens was 9 and is 2")


@pytest.mark.parametrize("content", ["", '{"run_id": "x", "host": "y", "pid": 1}', "\0garbage"])
def test_lock_file_of_a_dead_run_is_no_obstacle(content, run, done, no_model):
    (done / ".lock").write_text(content)
    started = time.monotonic()
    assert run()[0] == 0
    assert time.monotonic() - started < 120
