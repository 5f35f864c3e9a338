"""Kills, signals, a full disk, too little memory, a broken device: what is done stays done."""

import itertools
import os
import signal
import socket
import subprocess
import time
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import pytest
import torch
from conftest import assert_same_samples, read_failed, read_samples
from fault_test import STATUS, FaultTest, Program, make_rows, words_of

import run_gemma3_extraction as script

Extractor, PartWriter = script.Extractor, script.PartWriter
EIO = OSError(5, "Input/output error")
NO_MEMORY = torch.OutOfMemoryError("CUDA")
DEAD = 2**22 + 1  # no process has such a number


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A CSV of 12 rows in three parts, and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("plain")
    csv_path = make_rows(root, 12, missing_every=0)
    assert Program(words_of(csv_path, root / "out"), root / "err").end()[0] == 0
    return csv_path, read_samples(root / "out")


@pytest.fixture
def run_rows(run_here, plain, monkeypatch, tmp_path):
    """Run the program on those rows here; `do` is called before every call of a method."""

    def run(owner=script, name="main", do=lambda *_: None, more=(), out=tmp_path / "out"):
        method, numbers = getattr(owner, name), itertools.count(1)

        def wrapped(*args, **kwargs):
            do(next(numbers), *args)
            return method(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrapped)
            status, stderr = run_here(*words_of(plain[0], out, *more))
        assert ("Traceback" in stderr, list(out.glob("*.partial"))) == (False, [])
        return status, stderr.splitlines()[-1], read_samples(out)

    return run


def test_nothing_is_lost_by_kills_and_signals(tmp_path):
    FaultTest(tmp_path, num_rows=40, seed=1).run(num_kills=2, num_signals=2)


@pytest.mark.parametrize(
    ("owner", "name", "call", "what", "num_stored"),
    [
        (Extractor, "_forward", 11, signal.SIGINT, 2),  # a step a token, four an answer
        (Extractor, "_forward", 12, signal.SIGTERM, 3),
        (Extractor, "_forward", 13, signal.SIGUSR1, 3),
        (Extractor, "prefill", 8, torch.AcceleratorError("ECC", 214), 7),  # a RuntimeError
        (script.Prompter, "pixels", 4, MemoryError("too little"), 6),
        (script.Prompter, "pixels", 4, RuntimeError("can't allocate memory"), 6),
        (PartWriter, "write", 2, EIO, 4),
        (script.h5py.h5d, "create", 100, RuntimeError("Unable to create"), 4),
        (script, "update_failures", 3, EIO, 8),
    ],
)
def test_what_ends_a_run(run_rows, plain, owner, name, call, what, num_stored):
    """In whatever thread, the model's, the recorder's, another: what was done is saved."""

    def strike(number, *_):
        if number == call and what in STATUS:
            os.kill(os.getpid(), what)
        elif number == call:
            raise what

    status, told, found = run_rows(owner, name, strike, ["--batch-size", 1, "--num-workers", 1])
    assert (status, len(found)) == (STATUS.get(what, 1), num_stored)
    assert ("the same command goes on" if what in STATUS else str(what)) in told
    _, told, found = run_rows()
    assert f"d {12 - num_stored} of 12 samples (0 failed, {num_stored} already done)" in told
    assert_same_samples(found, plain[1])


def get_stuck(script):
    """The first image takes an hour."""
    script.Extractor.encode = lambda *_: time.sleep(3600)


def test_a_second_ctrl_c_ends_at_once(plain, tmp_path):
    program = Program(words_of(plain[0], tmp_path / "out"), tmp_path / "err", patch=get_stuck)
    program.wait_until(program.is_extracting)
    program.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert program.process.exitcode is None  # the first waits for the pass in hand
    program.send_signal(signal.SIGINT)
    assert program.end()[0] == 130


def test_a_hangup_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with script.catch_signals() as stops:
        os.kill(os.getpid(), signal.SIGHUP)
    assert (signal.signal(signal.SIGHUP, before), stops) == (signal.SIG_IGN, [])


@pytest.mark.parametrize(("name", "first"), [("encode", 1), ("prefill", 1), ("decode", 3)])
def test_too_little_memory_halves_the_batch_for_good(run_rows, plain, name, first):
    """No more than two fit: 7 become 3, and 3 become 1; at `decode` answers are half there."""
    sizes = []

    def run_short(number, extractor, *_):
        sizes.append(extractor.scheduler.batch_size)
        if number >= first and sizes[-1] > 2:
            raise NO_MEMORY

    status, _, found = run_rows(Extractor, name, run_short, ["--batch-size", 7])
    assert (status, sizes) == (0, [7] * first + [3] + [1] * (len(sizes) - first - 1))
    assert_same_samples(found, plain[1])


@pytest.mark.parametrize("index", [0, 5])
def test_a_question_that_does_not_fit_alone_fails(run_rows, plain, tmp_path, index):
    """Afterwards batches are as large as before it."""
    sizes = []
    culprit = list(plain[1])[index]

    def run_short(_, extractor, sequences):
        sizes.append(extractor.scheduler.batch_size)
        if culprit in [sequence.prompt.row.question_id for sequence in sequences]:
            raise NO_MEMORY

    status, _, found = run_rows(Extractor, "prefill", run_short, ["--batch-size", 4])
    assert (status, list(read_failed(tmp_path / "out"))) == (3, [culprit])
    assert_same_samples(found, {name: plain[1][name] for name in plain[1] if name != culprit})
    assert (min(sizes), sizes[-1]) == (1, 4)


@pytest.mark.parametrize("kind", ["once there is room", "File too large"])
def test_where_there_is_no_room_nothing_is_lost(run_rows, plain, tmp_path, request, kind):
    """On a disk of 4 MB, or under `ulimit -f`. What a killed run has left takes no room."""
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]):
        pytest.skip("may not mount")
    request.addfinalizer(lambda: subprocess.call(["umount", "-l", tmp_path]))
    out, filler, before = tmp_path / "out", tmp_path / "else", getrlimit(RLIMIT_FSIZE)
    out.mkdir()
    (out / f"gemma3_12b_embeddings_part_001.{socket.gethostname()}-{DEAD}.partial").write_bytes(bytes(4_100_000))

    def fill(number, *_):
        if number == 2 and kind == "File too large":
            setrlimit(RLIMIT_FSIZE, (10_000, before[1]))
        elif number == 2:
            subprocess.call(["dd", "if=/dev/zero", f"of={filler}"])

    status, told, found = run_rows(PartWriter, "write", fill)
    setrlimit(RLIMIT_FSIZE, before)
    assert (status, len(found)) == (1, 4)
    assert kind in told
    filler.unlink(missing_ok=True)
    assert_same_samples(run_rows()[2], plain[1])
