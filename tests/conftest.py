"""What all tests share: the tiny checkpoint, the data, the script run as a person runs it."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny model's threads wait for each other

MODEL = TESTS / "tiny_gemma3"
CSV = TESTS / "data" / "vqa.csv"
IMAGES = TESTS / "data" / "images"


def pytest_addoption(parser):
    parser.addoption("--batch-size", default="1", help="questions per pass in every run")


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
def run_script(request):
    """Run the extractor on the test data and the tiny model; flags given override."""

    def run(output_dir, *flags, launcher=(sys.executable,), **kwargs):
        defaults = {
            "--vqa-dataset": CSV,
            "--images-dir": IMAGES,
            "--output-dir": output_dir,
            "--model": MODEL,
            "--device": "cpu",
            "--dtype": "float32",
            "--max-new-tokens": 6,
            "--batch-size": request.config.getoption("--batch-size"),
        }
        pairs = [part for pair in defaults.items() for part in pair]
        command = [*launcher, ROOT / "run_gemma3_extraction.py", *pairs, *flags]
        kwargs = {"capture_output": True, "text": True, "timeout": 300} | kwargs
        return subprocess.run([str(part) for part in command], **kwargs)

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


def read_csv(path=CSV):
    """The CSV's rows by question_id, with nothing of the extractor's."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["question_id"]: row for row in csv.DictReader(file)}


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
    """Vectors within a relative L2 error, all else to the letter."""
    assert found.keys() == expected.keys()
    for question_id, sample in expected.items():
        assert found[question_id].keys() == sample.keys()
        for name, value in sample.items():
            other = found[question_id][name]
            if getattr(value, "ndim", 0):
                error = ((other - value) ** 2).sum() ** 0.5 / (value**2).sum() ** 0.5
                assert error <= bound, (question_id, name, error)
            else:
                assert other == value, (question_id, name)
