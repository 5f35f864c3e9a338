"""What an accelerator would have to wait for, counted on a make-believe one."""

import json
import os
import subprocess
import sys

import pytest
from conftest import TESTS, assert_same_samples, flags, read_samples, run_script

HOOKS = {"on_vision_tower", "on_decoder_layer"}  # the script's forward hooks
DECODE = "Extractor.decode"  # one step of all answers
MAX_TRANSFERS = 4  # copies and waits of a decoding step


def run_on_card(counts_path, *words, **environment):
    """Run the script on the make-believe card: the finished process, and its counts."""
    command = [sys.executable, str(TESTS / "make_believe_card.py"), str(counts_path), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert counts_path.exists(), done.stderr
    return done, json.loads(counts_path.read_text())


@pytest.fixture(scope="module")
def on_card(tmp_path_factory):
    """The whole test data: the output directory, and the counts."""
    root = tmp_path_factory.mktemp("card")
    done, counts = run_on_card(root / "counts.json", *flags(root / "out"))
    assert done.returncode == 0, done.stderr
    return root / "out", counts


def test_a_card_gives_what_the_cpu_gives(on_card, tmp_path):
    output_dir, counts = on_card
    assert counts["mixed"] == {}
    assert run_script(tmp_path / "out").returncode == 0
    assert_same_samples(read_samples(output_dir), read_samples(tmp_path / "out"), bound=1e-5)


def test_hooks_neither_copy_nor_wait(on_card):
    """A wait in the middle of a pass leaves the card idle until the host has caught up."""
    _, counts = on_card
    of_hooks = {name: of for name, of in counts.items() if name.rpartition(".")[2] in HOOKS}
    assert {name.rpartition(".")[2] for name in of_hooks} == HOOKS
    assert all(of["calls"] for of in of_hooks.values())
    assert {name: of["below"] for name, of in of_hooks.items()} == dict.fromkeys(of_hooks, 0)


def test_a_decoding_step_copies_and_waits_little(on_card):
    _, counts = on_card
    assert counts[DECODE]["calls"] >= 5  # answers have up to six tokens, the first of the prefill
    assert 0 < counts[DECODE]["below"] <= MAX_TRANSFERS * counts[DECODE]["calls"]


# ───────────────────────────────── the card itself counts rightly ─────────────────────────────────


PLANTED = """
import torch

def upload():
    return torch.ones(3).to("card")

def upload_numbers():
    return torch.tensor([1, 2, 0], device="card")

def index_from_host(card):
    return card[torch.tensor([0, 1])]

def fill_from_host(card):
    card.clone().copy_(torch.zeros(3), non_blocking=True)

def read_back(card):
    host = torch.zeros(3)
    host.copy_(card)
    return card.cpu(), card.to(torch.float16).tolist()

def choose(card):
    return card[card > 0], card.nonzero()

def decide(card):
    return bool(card.any()) and card.max().item()

def call_others():
    return [upload() for _ in range(2)] + [torch.zeros(1).to("card") for _ in range(3)]

def stay_on_card(card):
    pos = torch.arange(len(card), device="card")
    masked = card.masked_fill(pos > 1, 0) + torch.full((3,), 2, device="card")
    return torch.stack([masked, card[pos].float()], dim=1).softmax(-1).argmax(-1)

def mix(card):
    try:
        card + torch.ones(3)
    except RuntimeError:
        torch.ones(3)[card.long()]

def main(argv):
    assert argv == ["--layers", "all", "--device", "card"]
    card = upload()
    for act in (index_from_host, fill_from_host, read_back, choose, decide, stay_on_card):
        act(card)
    assert read_back(upload_numbers())[1] == [1, 2, 0]
    call_others()
    try:
        mix(card)
    except RuntimeError:
        return 7
"""
PLANTED_COUNTS = {  # up, down, wait, below, calls
    "upload": (3, 0, 0, 3, 3),
    "upload_numbers": (1, 0, 0, 1, 1),
    "index_from_host": (1, 0, 0, 1, 1),
    "fill_from_host": (1, 0, 0, 1, 1),
    "read_back": (0, 6, 0, 6, 2),
    "choose": (0, 0, 2, 2, 1),
    "decide": (0, 0, 2, 2, 1),
    "call_others": (3, 0, 0, 5, 1),
    "stay_on_card": (0, 0, 0, 0, 1),
    "mix": (0, 0, 0, 0, 1),
    "main": (0, 0, 0, 19, 1),
}


def test_every_copy_wait_and_mistake_is_counted(tmp_path):
    (tmp_path / "run_gemma3_extraction.py").write_text(PLANTED)
    words = ("--layers", "all")
    done, counts = run_on_card(tmp_path / "counts.json", *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 7, done.stderr
    assert counts.pop("mixed") == {"mix": 2}
    assert {name: tuple(of.values()) for name, of in counts.items()} == PLANTED_COUNTS
