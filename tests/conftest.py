"""The tiny checkpoint, the CSV and the images that all tests share."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(TESTS))

MODEL = TESTS / "tiny_gemma3"
CSV = TESTS / "data" / "vqa.csv"
IMAGES = TESTS / "data" / "images"


@pytest.fixture(scope="session")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(MODEL, backend="pil")


@pytest.fixture(scope="session")
def model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@pytest.fixture
def run_script():
    """Run the extractor as a person does; flags override the tiny model's defaults."""

    def run(output_dir, *flags, script="run_gemma3_extraction.py", **kwargs):
        defaults = ["--vqa-dataset", CSV, "--images-dir", IMAGES, "--output-dir", output_dir]
        defaults += ["--model", MODEL, "--device", "cpu", "--dtype", "float32"]
        command = [sys.executable, ROOT / script, *defaults, "--max-new-tokens", "6", *flags]
        return subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=300, **kwargs
        )

    return run
