"""Kills, signals, a full disk, too little memory, a broken device: what is done stays done.

The long version of the first test is `python tests/fault_test.py`.
"""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same_samples, read_failed, read_samples
from fault_test import (
    PART_1,
    PATIENCE,
    SETTINGS,
    FaultTest,
    Program,
    catches_signals,
    check_parts,
    is_writing,
    make_parts,
    make_rows,
    start_cold,
    wait_for,
    words_of,
)

import run_gemma3_extraction as script


def end(process, stderr_path):
    """Exit status and stderr."""
    status = process.wait(PATIENCE)
    return status, Path(stderr_path).read_text()


def run_to_the_end(csv_path, output_dir, patch=None):
    stderr_path = csv_path.with_suffix(".stderr")
    return end(Program(words_of(csv_path, output_dir), stderr_path, patch=patch), stderr_path)


# ─────────────────────────────────────── kills and signals ───────────────────────────────────────


def test_nothing_is_lost_by_kills_and_signals(tmp_path):
    FaultTest(tmp_path, num_rows=40, seed=1).run(num_kills=2, num_signals=2)


def test_ctrl_c_during_the_imports_is_quiet(tmp_path):
    csv_path = make_rows(tmp_path, 4)
    process = start_cold(words_of(csv_path, tmp_path / "out"), tmp_path / "stderr.txt")
    assert wait_for(lambda: catches_signals(process), process)
    process.send_signal(signal.SIGINT)
    assert end(process, tmp_path / "stderr.txt") == (130, "")
    assert not (tmp_path / "out").exists()


def get_stuck(script):
    """The seventh pass takes an hour."""
    run, calls = script.Decoder.run, []

    def stuck(*args):
        calls.append(args)
        if len(calls) == 7:
            script.log.warning("stuck")
            time.sleep(3600)
        return run(*args)

    script.Decoder.run = stuck


def test_a_second_ctrl_c_stops_at_once_and_leaves_whole_parts(tmp_path):
    csv_path, out = make_rows(tmp_path, 12, missing_every=0), tmp_path / "out"
    words = words_of(csv_path, out, "--max-new-tokens", 0, "--batch-size", 1)
    process = Program(words, tmp_path / "stderr.txt", patch=get_stuck)
    assert wait_for(lambda: "stuck" in (tmp_path / "stderr.txt").read_text(), process)
    assert wait_for(lambda: list(out.glob("*.h5")), process)  # the recorder is behind
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None  # the first waits for the pass in hand
    process.send_signal(signal.SIGINT)
    status, stderr = end(process, tmp_path / "stderr.txt")
    assert status == 130
    assert "Traceback" not in stderr
    assert len(read_samples(out)) == 4
    process = Program(words, tmp_path / "stderr.txt")
    status, stderr = end(process, tmp_path / "stderr.txt")
    assert status == 0
    assert "Extracted 8 of 12 samples (0 failed, 4 already done)" in stderr


@pytest.fixture
def run_rows(run_here, tmp_path):
    """Run the program in this process on 12 rows: its status and stderr."""
    csv_path = make_rows(tmp_path, 12, missing_every=0)

    def run(*more, output_dir=tmp_path / "out"):
        words = ("--checkpoint-interval", 4, "--batch-size", 3, *more)
        images_dir = tmp_path / "images"
        return run_here(*words, csv_path=csv_path, images_dir=images_dir, output_dir=output_dir)

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What an undisturbed run makes of those rows."""
    root = tmp_path_factory.mktemp("plain")
    csv_path = make_rows(root, 12, missing_every=0)
    words = words_of(csv_path, root / "out", "--max-new-tokens", 6)
    assert Program(words, root / "stderr.txt").wait() == 0
    return read_samples(root / "out")


def watch_prefills(monkeypatch, strike=lambda calls: None):
    """The question_ids that entered, pass by pass; `strike` is called before each of them."""
    prefill, entered = script.Extractor._prefill, []

    def watched(self, entering):
        ids = [live.prompt.row.question_id for _, lives in entering for live in lives]
        entered.append(ids)
        strike(entered)
        return prefill(self, entering)

    monkeypatch.setattr(script.Extractor, "_prefill", watched)
    return entered


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_costs_nothing_that_was_computed(run_rows, monkeypatch, plain, signum, tmp_path):
    """What is being answered is answered and saved, and nothing new is begun."""

    def strike(entered):
        if len(entered) == 2:
            os.kill(os.getpid(), signum)

    entered = watch_prefills(monkeypatch, strike)
    status, stderr = run_rows()
    assert status == (130 if signum == signal.SIGINT else 143)
    assert "the same command" in stderr.splitlines()[-1]
    out, begun = tmp_path / "out", {one for ids in entered for one in ids}
    assert len(entered) == 2
    assert check_parts(out) == begun
    assert_same_samples(read_samples(out), {name: plain[name] for name in begun})
    assert not list(out.glob("*.partial"))
    numbers = {int(name.split("/")[0]) // 4 + 1 for name in begun}  # no part without a sample
    assert {path.name for path in out.glob("*.h5")} == {script.PART_NAME.format(k) for k in numbers}
    monkeypatch.undo()
    status, stderr = run_rows()
    assert status == 0
    num_begun = len(begun)
    assert f"Extracted {12 - num_begun} of 12 samples (0 failed, {num_begun} already" in stderr
    assert_same_samples(read_samples(out), plain)


def test_a_hangup_is_ignored_under_nohup(run_rows, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watch_prefills(monkeypatch, lambda entered: os.kill(os.getpid(), signal.SIGHUP))
        status, stderr = run_rows()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == 0, stderr
    assert "Extracted 12 of 12" in stderr


# ───────────────────────────────────── memory and the device ─────────────────────────────────────


def little_memory(monkeypatch, name, moment, is_too_much):
    """Let one step fail for want of memory, before or after it; how many were live, each time."""
    owner = script.Decoder if name == "run" else script.Extractor
    method, sizes, extractors = getattr(owner, name), [], []
    init = script.Extractor.__init__

    def remember(self, *args):
        init(self, *args)
        self.max_pass_tokens = script.MAX_PASS_TOKENS  # several images a pass, as on a card
        extractors.append(self)

    def step(self, *args):
        live = extractors[-1]._live
        sizes.append(len(live))
        is_short = is_too_much(live)
        result = method(self, *args) if moment == "after" or not is_short else None
        if is_short:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(script.Extractor, "__init__", remember)
    monkeypatch.setattr(owner, name, step)
    return sizes


@pytest.mark.parametrize(
    ("name", "moment", "most"),
    [
        ("_prefill", "before", 1),
        ("_prefill", "after", 3),
        ("_decode", "before", 3),
        ("_decode", "after", 1),
        ("run", "after", 1),
    ],
)
def test_too_little_memory_halves_the_batch_for_good(
    run_rows, monkeypatch, plain, tmp_path, name, moment, most
):
    """No more than `most` fit: 7 become 3, and 3 become 1."""
    sizes = little_memory(monkeypatch, name, moment, lambda live: len(live) > most)
    status, stderr = run_rows("--batch-size", 7)
    assert status == 0, stderr
    too_many = [7, 3] if most == 1 else [7]
    assert [size for size in sizes if size > most] == too_many
    assert stderr.count("questions at once are too many") == len(too_many)
    assert f"batch size {most} from here on" in stderr
    assert not list(tmp_path.glob("out/failed*"))
    assert_same_samples(read_samples(tmp_path / "out"), plain)


def test_memory_runs_short_in_the_middle_of_answers(run_rows, monkeypatch, plain, tmp_path):
    """Once, when some have half of their answer: it starts again, and nothing is there twice."""
    moments = []

    def is_too_much(live):
        lengths = [len(one.answer) for one in live]
        if moments or max(lengths) < 3:
            return False
        moments.append(lengths)
        return True

    little_memory(monkeypatch, "_decode", "before", is_too_much)
    status, stderr = run_rows("--batch-size", 6)
    assert status == 0, stderr
    assert moments
    assert "batch size 3 from here on" in stderr
    assert_same_samples(read_samples(tmp_path / "out"), plain)


@pytest.mark.parametrize("index", [0, 5])
def test_a_question_that_does_not_fit_alone_fails(run_rows, monkeypatch, plain, tmp_path, index):
    """Afterwards batches are as large as before it."""

    def is_too_much(live):
        return any(one.prompt.row.index == index for one in live)

    sizes = little_memory(monkeypatch, "_prefill", "before", is_too_much)
    status, stderr = run_rows("--batch-size", 4)
    assert status == 3, stderr
    ((failed, (_, error)),) = read_failed(tmp_path / "out").items()
    assert failed.startswith(f"{index}/")
    assert "memory" in error
    assert max(sizes[-3:]) == 4
    expected = {name: sample for name, sample in plain.items() if name != failed}
    assert_same_samples(read_samples(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("name", "call"),
    [("pixels", 2), ("tokenize", 6)],  # one call is the program's own, three are the first image's
)
@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_memory_that_runs_short_beside_the_model_stops_the_run(
    run_rows, monkeypatch, tmp_path, name, call, kind
):
    """In a thread that prepares images no smaller batch helps."""
    error = kind("DefaultCPUAllocator: can't allocate memory")
    break_down(monkeypatch, script.Prompter, name, error, call)
    status, stderr = run_rows("--num-workers", 1)
    assert status == 1
    assert "can't allocate memory" in stderr.splitlines()[-1]
    assert len(check_parts(tmp_path / "out")) == 3  # about the first image
    monkeypatch.undo()
    assert run_rows()[0] == 0


def break_down(monkeypatch, owner, name, error, call):
    """Let a method raise in its `call`th call."""
    method, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: unspecified launch failure"), torch.AcceleratorError("ECC", 214)],
    ids=["RuntimeError", "AcceleratorError"],
)
def test_a_broken_device_stops_the_run_with_what_was_done_saved(
    run_rows, monkeypatch, tmp_path, error
):
    """Seven passes, one question each, and the device is gone."""
    break_down(monkeypatch, script.Decoder, "run", error, call=8)
    status, stderr = run_rows("--max-new-tokens", 0, "--batch-size", 1)
    assert status == 1
    assert "Traceback" not in stderr
    assert str(error) in stderr.splitlines()[-1]
    out = tmp_path / "out"
    assert len(read_samples(out)) == 7
    assert not list(out.glob("*.partial"))
    monkeypatch.undo()
    assert run_rows("--max-new-tokens", 0)[0] == 0
    assert len(read_samples(out)) == 12


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [  # h5py tells a failed write in many ways
        (script.PartWriter, "add", OSError(errno.EIO, "Input/output error")),
        (script.h5py.Group, "create_group", ValueError("Unable to create group (insert)")),
        (script.h5py.h5d, "create", KeyError("Unable to open object")),
        (script.h5py.File, "close", RuntimeError("Unable to flush")),
        (script, "put_in_place", OSError(errno.ESTALE, "Stale file handle")),
    ],
    ids=lambda word: word if isinstance(word, str) else type(word).__name__,
)
def test_a_write_that_fails_stops_the_run_instead_of_hanging(
    run_rows, monkeypatch, tmp_path, owner, name, error
):
    """Whatever ends the thread that writes must reach the one that computes."""
    break_down(monkeypatch, owner, name, error, call=2)
    status, stderr = run_rows("--max-new-tokens", 1)
    assert status == 1
    assert "Traceback" not in stderr
    assert str(error.args[-1]) in stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.partial"))
    monkeypatch.undo()
    assert run_rows("--max-new-tokens", 1)[0] == 0
    assert len(check_parts(tmp_path / "out")) == 12


def test_a_write_that_fails_is_told_whatever_else_stopped_the_run(run_rows, monkeypatch, tmp_path):
    """A part in hand cannot be saved as `--strict` ends the run."""
    csv_path = tmp_path / "rows.csv"
    lines = csv_path.read_text().splitlines()
    csv_path.write_text("\n".join([*lines[:4], "bad,no.png,what?,", *lines[4:]]) + "\n")
    break_down(monkeypatch, script, "put_in_place", OSError(errno.EIO, "Input/output error"), 1)
    status, stderr = run_rows("--strict", "--checkpoint-interval", 12)
    assert status == 1
    assert "Input/output error" in stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.h5"))


# ─────────────────────────────────────────── full disks ──────────────────────────────────────────


def assert_stopped(status, stderr, out, words):
    assert status == 1, stderr
    assert "Traceback" not in stderr
    assert str(out) in stderr.splitlines()[-1]
    assert words in stderr.splitlines()[-1]
    assert len(stderr.splitlines()) < 8


def limit_file_size(_):
    """As `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))


def test_a_file_that_may_not_grow_loses_nothing_that_was_stored(tmp_path):
    csv_path = make_rows(tmp_path, 16, missing_every=0)
    lines = csv_path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("6/"))
    lines[place] += "x" * 4_000_000  # of the answer
    csv_path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    for _ in range(2):
        status, stderr = run_to_the_end(csv_path, out, patch=limit_file_size)
        assert_stopped(status, stderr, out, "File too large")
        assert 0 < len(check_parts(out)) < 16
        assert not list(out.glob("*.partial"))
    assert run_to_the_end(csv_path, out)[0] == 0
    assert len(check_parts(out)) == 16


@pytest.fixture
def small_disk(tmp_path):
    """4 MB of their own."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(path):
    """Write until there is no room left."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, small_disk):
    csv_path, out = make_rows(tmp_path, 100), small_disk / "out"
    stderr_path = tmp_path / "stderr.txt"
    process = Program(words_of(csv_path, out), stderr_path)
    assert wait_for(lambda: list(out.glob("*.h5")) and is_writing(out), process)
    fill(small_disk / "somebody_elses")
    assert_stopped(*end(process, stderr_path), out, "once there is room")
    stored = check_parts(out)
    assert 0 < len(stored) < 95

    status, stderr = run_to_the_end(csv_path, out)  # still full, or nearly
    assert status == 1
    assert "Traceback" not in stderr
    assert "room" in stderr.splitlines()[-1]
    assert check_parts(out) >= stored

    (small_disk / "somebody_elses").unlink()
    status, stderr = run_to_the_end(csv_path, out)
    assert status == 3, stderr
    assert len(check_parts(out)) == 95
    assert len(read_failed(out)) == 5
    assert not list(out.glob("*.partial"))


def test_what_a_killed_run_left_takes_no_room(tmp_path, small_disk):
    csv_path, out = make_rows(tmp_path, 8, missing_every=0), small_disk / "out"
    out.mkdir()
    (out / PART_1).with_suffix(".partial").write_bytes(bytes(4_100_000))
    assert run_to_the_end(csv_path, out)[0] == 0
    assert len(check_parts(out)) == 8


# ─────────────────────────────────────────── going on ────────────────────────────────────────────


def test_going_on_reads_no_more_than_names_and_attributes(tmp_path, monkeypatch):
    """A thousand samples: a small part of the file is read, and nothing but its ends decides."""
    make_parts(tmp_path / "out", 1, 1000)
    preadv, num_bytes = os.preadv, []

    def counted(*args):
        num_bytes.append(preadv(*args))
        return num_bytes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    stored = script.scan_parts(tmp_path / "out", SETTINGS)
    assert len(stored) == 1000
    size = (tmp_path / "out" / PART_1).stat().st_size
    assert sum(num_bytes) < 0.1 * size, (sum(num_bytes), size)
