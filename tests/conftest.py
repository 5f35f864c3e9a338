"""What all tests share: the tiny checkpoint, the data, the script run as a person runs it."""

import argparse
import contextlib
import csv
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
README = ROOT / "README.md"
sys.path[:0] = [str(ROOT), str(TESTS)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny model's threads wait for each other

MODEL = TESTS / "tiny_gemma3"
CSV = TESTS / "data" / "vqa.csv"
IMAGES = TESTS / "data" / "images"
SCRIPT = ROOT / "run_gemma3_extraction.py"
HEADER = ("question_id", "image_id", "question", "answer")


@pytest.fixture(scope="session")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(MODEL, backend="pil")


@pytest.fixture(scope="session")
def model():
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@pytest.fixture(scope="session")
def prompter(processor, model):
    import run_gemma3_extraction as script

    return script.Prompter(processor, model.config)


def make_options(vqa_dataset=CSV, images_dir=IMAGES, **fields):
    """What the command line makes of its defaults, and of these fields."""
    import run_gemma3_extraction as script

    words = ["--vqa-dataset", str(vqa_dataset), "--images-dir", str(images_dir)]
    return argparse.Namespace(**{**vars(script.read_args(words)), **fields})


def find_blocks():
    """README's fenced blocks that have a name after their language: texts by language and name."""
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+) (\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {(language, name): block for language, name, block in found}


def inspect(capsys, *args):
    """inspect_h5.py's status, stdout and stderr."""
    import inspect_h5

    try:
        status = inspect_h5.main([str(arg) for arg in args])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def write_csv(path, rows, header=HEADER):
    """A CSV of tuples; its path."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path=CSV):
    """The CSV's rows by question_id, with nothing of the extractor's."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["question_id"]: row for row in csv.DictReader(file)}


def flags(output_dir, *more, csv_path=CSV, images_dir=IMAGES):
    """The tiny model's command line; later flags override."""
    words = [
        *("--vqa-dataset", csv_path, "--images-dir", images_dir, "--output-dir", output_dir),
        *("--model", MODEL, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6),
        *more,
    ]
    return [str(word) for word in words]


def run_script(output_dir, *more, launcher=(sys.executable,), csv_path=CSV, **kwargs):
    """Run the program in a process of its own, to its end."""
    command = [*launcher, str(SCRIPT), *flags(output_dir, *more, csv_path=csv_path)]
    kwargs = {"capture_output": True, "text": True, "timeout": 300} | kwargs
    return subprocess.run(command, **kwargs)


@pytest.fixture
def run_here(tmp_path, capsys, monkeypatch):
    """Run the program in this process; its exit status and stderr. Its files go to tmp_path/out."""
    import run_gemma3_extraction as script

    # transformers' logger holds the stderr of the first test that came along.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*more, rows=None, csv_path=CSV, images_dir=IMAGES, output_dir=tmp_path / "out"):
        if rows is not None:
            csv_path = write_csv(tmp_path / "rows.csv", rows)
        with no_hang():
            try:
                status = script.main(
                    flags(output_dir, *more, csv_path=csv_path, images_dir=images_dir)
                )
            except SystemExit as error:
                status = error.code
        return status, capsys.readouterr().err

    return run


@contextlib.contextmanager
def no_hang(seconds=90):
    """A thread that died while another waits for it is a failure, not the end of the suite."""

    def alarm(*_):
        raise TimeoutError("the program hangs")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again, should it hang on the way out
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_failed(output_dir):
    """`failed_samples.csv`: image_id and error by question_id."""
    path = Path(output_dir) / "failed_samples.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["question_id", "image_id", "error"]
    ids = [line[0] for line in lines[1:]]
    assert len(ids) == len(set(ids))
    return {line[0]: tuple(line[1:]) for line in lines[1:]}


def read_samples(output_dir):
    """All that parts hold: name in the file, by question_id and part; vectors as float32."""
    samples = {}
    for path in sorted(Path(output_dir).glob("*.h5")):
        with h5py.File(path) as file:
            for group in [file[name] for name in file]:  # file.values() holds h5py's lock
                sample = {"part": path.name, **group.attrs}

                def read(name, item, sample=sample):
                    if isinstance(item, h5py.Dataset):
                        is_text = h5py.check_string_dtype(item.dtype)
                        sample[name] = item.asstr()[()] if is_text else item[()]

                group.visititems(read)
                assert sample["question_id"] not in samples
                samples[sample["question_id"]] = sample
    return samples


def assert_same_samples(found, expected, bound=1e-4):
    """Vectors within a relative L2 error, all else to the letter; exact if `bound` is 0."""
    assert found.keys() == expected.keys()
    for question_id, sample in expected.items():
        assert found[question_id].keys() == sample.keys()
        for name, value in sample.items():
            other = found[question_id][name]
            if getattr(value, "ndim", 0):
                error = ((other - value) ** 2).sum() ** 0.5 / max((value**2).sum() ** 0.5, 1e-9)
                assert error <= bound, (question_id, name, error)
            elif name == "first_token_entropy":
                assert abs(other - value) <= bound * max(abs(value), 1), (question_id, name)
            elif name != "crc32" or bound == 0:
                assert other == value, (question_id, name)
