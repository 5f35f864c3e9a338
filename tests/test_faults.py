"""Kills, signals, a full disk, too little memory, a broken device: what is done stays done."""

import itertools
import os
import signal
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
        method = getattr(owner, name)
        numbers = itertools.count(1)

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


def strike_at(call, what):
    """At this call a signal comes, or an error is raised."""

    def strike(number, *_):
        if number == call and what in STATUS:
            os.kill(os.getpid(), what)
        elif number == call:
            raise what

    return strike


ONE_BY_ONE = ("--batch-size", 1, "--num-workers", 1)


@pytest.mark.parametrize(
    ("owner", "name", "call", "what", "num_stored"),
    [
        (Extractor, "_forward", 11, signal.SIGINT, [2]),  # a step a token, four an answer
        (Extractor, "_forward", 12, signal.SIGTERM, [3]),
        (Extractor, "_forward", 13, signal.SIGUSR1, [3]),
        (PartWriter, "write", 2, EIO, [4, 5]),  # as many of part 3 as are done when it is noticed
        (script, "update_failures", 3, EIO, [8, 9]),
    ],
)
def test_what_ends_a_run(run_rows, plain, owner, name, call, what, num_stored):
    """What was done is saved, and told in one line."""
    status, told, found = run_rows(owner, name, strike_at(call, what), ONE_BY_ONE)
    assert status == STATUS.get(what, 1)
    assert len(found) in num_stored
    assert "the same command continues" in told
    assert what in STATUS or str(what) in told
    num_before = len(found)
    _, told, found = run_rows()
    assert f"d {12 - num_before} of 12 samples (0 failed, {num_before} already done)" in told
    assert_same_samples(found, plain[1])


@pytest.mark.parametrize(
    ("owner", "name", "call", "what", "num_stored"),
    [
        (Extractor, "prefill", 8, torch.AcceleratorError("ECC", 214), 7),  # a RuntimeError
        (Extractor, "decode", 8, TypeError("a mistake of ours"), 2),
        (script.Prompter, "pixels", 4, RuntimeError("a decoder's"), 6),
        (script.h5py.h5d, "create", 100, RuntimeError("Unable to create"), 5),
    ],
)
def test_what_nobody_foresaw_goes_up_after_saving(
    run_rows, plain, tmp_path, owner, name, call, what, num_stored
):
    """In whatever thread, the model's, the recorder's, another: with its traceback."""
    with pytest.raises(type(what), match=str(what)):
        run_rows(owner, name, strike_at(call, what), ONE_BY_ONE)
    assert len(read_samples(tmp_path / "out")) == num_stored
    assert not list(tmp_path.glob("out/*.partial"))
    assert_same_samples(run_rows()[2], plain[1])


@pytest.mark.parametrize(
    "error", [MemoryError("too little"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_memory_of_the_host_that_runs_out_halves_the_batch(run_rows, plain, error):
    """Where an image is prepared, for example."""
    status, told, found = run_rows(script.Prompter, "pixels", strike_at(4, error))
    assert (status, len(found)) == (0, 12), told
    assert_same_samples(found, plain[1])


def test_a_part_that_cannot_be_written_costs_no_other(run_rows, plain, monkeypatch):
    """All rows that have their answer are stored, but those of the part that failed."""
    recorded = []
    record = script.Outcomes.record

    def watch(self, outcome):
        record(self, outcome)
        recorded.append(outcome.row.question_id)

    monkeypatch.setattr(script.Outcomes, "record", watch)
    status, told, found = run_rows(PartWriter, "write", strike_at(1, EIO), ["--batch-size", 12])
    assert (status, "Input/output error" in told) == (1, True)
    (lost,) = {plain[1][name]["part"] for name in recorded if name not in found}
    assert found.keys() == {name for name in recorded if plain[1][name]["part"] != lost}
    assert len(found) > 1
    assert_same_samples(found, {name: plain[1][name] for name in found})


def test_a_sample_that_cannot_be_written_is_not_told_of_the_old_part(run_rows, tmp_path):
    """Reading a part and writing to it fail apart."""
    run_rows(Extractor, "_forward", strike_at(11, signal.SIGINT), ONE_BY_ONE)
    with pytest.raises(RuntimeError, match="Unable to create"):
        run_rows(script.h5py.h5d, "create", strike_at(3, RuntimeError("Unable to create")))
    assert len(read_samples(tmp_path / "out")) >= 2


def get_stuck(script):
    """The first image takes an hour."""
    script.Extractor.encode = lambda *_: time.sleep(3600)


def test_a_second_ctrl_c_ends_at_once(plain, tmp_path):
    program = Program(words_of(plain[0], tmp_path / "out"), tmp_path / "err", patch=get_stuck)
    program.wait_until(program.is_extracting)
    program.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert program.process.exitcode is None  # the first waits for the pass to end
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
    (out / f"gemma3_12b_embeddings_part_001.{script.host_name()}-{DEAD}.partial").write_bytes(
        bytes(4_100_000)
    )

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
