"""Kills, signals, a full disk, too little memory, a broken device: what is done stays done.

The long version of the first test is `python tests/fault_test.py`.
"""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_samples, no_hang, read_samples
from fault_test import (
    PATIENCE,
    FaultTest,
    catches_signals,
    check_parts,
    command,
    is_writing,
    read_failed,
    sample_shapes,
    start,
    wait_for,
    write_csv,
)

import run_gemma3_extraction as script


def end(process, stderr_path):
    """Exit status and stderr."""
    status = process.wait(PATIENCE)
    return status, Path(stderr_path).read_text()


def run_to_the_end(csv_path, output_dir, *flags, **kwargs):
    stderr_path = csv_path.with_suffix(".stderr")
    return end(start(command(csv_path, output_dir, *flags), stderr_path, **kwargs), stderr_path)


# ─────────────────────────────────────── kills and signals ───────────────────────────────────────


def test_nothing_is_lost_by_kills_and_signals(tmp_path):
    FaultTest(tmp_path, num_rows=60, seed=1).run(num_kills=3, num_signals=3)


def test_ctrl_c_during_the_imports_is_quiet(tmp_path):
    csv_path = write_csv(tmp_path / "rows.csv", 4)
    process = start(command(csv_path, tmp_path / "out"), tmp_path / "stderr.txt")
    assert wait_for(lambda: catches_signals(process), process)
    process.send_signal(signal.SIGINT)
    assert end(process, tmp_path / "stderr.txt") == (130, "")
    assert not (tmp_path / "out").exists()


# The program itself, whose sixth batch takes an hour.
STUCK_CODE = """
import itertools, sys, time
sys.path.insert(0, sys.argv.pop(1))
import run_gemma3_extraction as script
run, calls = script.Extractor.run, itertools.count(1)
def stuck(self, prompts):
    if next(calls) == 6:
        print("stuck", flush=True)
        time.sleep(3600)
    return run(self, prompts)
script.Extractor.run = stuck
raise SystemExit(script.main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_stops_at_once_and_leaves_whole_parts(tmp_path):
    csv_path, out = write_csv(tmp_path / "rows.csv", 12, missing_every=0), tmp_path / "out"
    arguments = command(csv_path, out, "--batch-size", "1")[2:]
    process = start(
        [sys.executable, "-c", STUCK_CODE, str(ROOT), *arguments],
        tmp_path / "stderr.txt",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "stuck\n"
    assert wait_for(lambda: list(out.glob("*.h5")), process)  # the recorder is behind
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None  # the first waits for the batch in hand
    process.send_signal(signal.SIGINT)
    status, stderr = end(process, tmp_path / "stderr.txt")
    assert status == 130
    assert "Traceback" not in stderr
    assert len(check_parts(out, sample_shapes(out))) == 4
    status, stderr = run_to_the_end(csv_path, out)
    assert status == 0
    assert "Extracted 8 of 12 samples (0 failed, 4 already done)" in stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_costs_nothing_that_was_computed(in_process, monkeypatch, signum, tmp_path):
    """It comes while batch 6 is at work: six samples are stored, a part and a half."""
    run, calls = script.Extractor.run, []

    def struck(self, prompts):
        calls.append(prompts)
        if len(calls) == 6:
            os.kill(os.getpid(), signum)
        return run(self, prompts)

    monkeypatch.setattr(script.Extractor, "run", struck)
    status, stderr = in_process()
    assert status == (130 if signum == signal.SIGINT else 143)
    assert "the same command" in stderr.splitlines()[-1]
    out = tmp_path / "out"
    assert len(check_parts(out, sample_shapes(out))) == 6
    assert not list(out.glob("*.partial"))
    monkeypatch.undo()
    status, stderr = in_process()
    assert status == 0
    assert "Extracted 6 of 12 samples (0 failed, 6 already done)" in stderr


def workers_of(launcher):
    """The processes that torchrun has started."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_one_of_two_processes_is_killed_and_three_go_on(tmp_path):
    csv_path, out = write_csv(tmp_path / "rows.csv", 60), tmp_path / "out"

    def launch(num_processes, output_dir):
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
        python, *script_and_flags = command(csv_path, output_dir)
        return start([python, *torchrun, *script_and_flags], tmp_path / "stderr.txt")

    process = launch(2, out)
    assert wait_for(lambda: list(out.glob("*.h5")) and len(workers_of(process)) == 2, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(PATIENCE) != 0
    stored = check_parts(out, sample_shapes(out))
    assert 0 < len(stored) < 57
    assert launch(3, out).wait(PATIENCE) != 0  # a launcher's own code: three rows have no image
    assert run_to_the_end(csv_path, tmp_path / "alone")[0] == 3
    assert_same_samples(read_samples(out), read_samples(tmp_path / "alone"))
    assert read_failed(out) == read_failed(tmp_path / "alone")
    assert not list(out.glob("*.partial"))


# ───────────────────────────────────── memory and the device ─────────────────────────────────────


@pytest.fixture
def in_process(tmp_path, capsys):
    """Run the program in this process on 12 rows: its status and stderr."""
    csv_path = write_csv(tmp_path / "rows.csv", 12, missing_every=0)

    def run(*flags, output_dir=tmp_path / "out"):
        with no_hang():
            status = script.main(command(csv_path, output_dir, *flags)[2:])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("fails_late", [False, True])
def test_too_little_memory_halves_the_batch(in_process, monkeypatch, tmp_path, fails_late):
    """More than two prompts do not fit, be it noticed at the start or when all is computed."""
    assert in_process(output_dir=tmp_path / "plain")[0] == 0
    run, sizes = script.Extractor.run, []

    def run_in_little_memory(self, prompts):
        sizes.append(len(prompts))
        result = run(self, prompts) if fails_late or sizes[-1] <= 2 else None
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(script.Extractor, "run", run_in_little_memory)
    status, stderr = in_process("--batch-size", "7")
    assert status == 0
    assert "halved" in stderr
    assert max(sizes) == 7
    assert not list(tmp_path.glob("out/failed*"))
    assert_same_samples(read_samples(tmp_path / "out"), read_samples(tmp_path / "plain"))


def test_a_row_that_does_not_fit_alone_fails(in_process, monkeypatch, tmp_path):
    run = script.Extractor.run

    def run_in_little_memory(self, prompts):
        if any(prompt.row.index == 5 for prompt in prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, prompts)

    monkeypatch.setattr(script.Extractor, "run", run_in_little_memory)
    assert in_process("--batch-size", "4")[0] == 3
    (error,) = read_failed(tmp_path / "out").values()
    assert "memory" in error[1]
    assert len(read_samples(tmp_path / "out")) == 11


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
    in_process, monkeypatch, tmp_path, error
):
    break_down(monkeypatch, script.Extractor, "run", error, call=7)
    status, stderr = in_process()
    assert status == 1
    assert "Traceback" not in stderr
    assert str(error) in stderr.splitlines()[-1]
    out = tmp_path / "out"
    assert len(check_parts(out, sample_shapes(out))) == 6
    monkeypatch.undo()
    assert in_process()[0] == 0


# h5py tells a failed write in many ways.
WRITE_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Unable to flush"),
    ValueError("Unable to create group (unable to insert)"),
    KeyError("Unable to open object"),
]


@pytest.mark.parametrize("error", WRITE_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["add", "finish", "__init__"])
def test_a_write_that_fails_stops_the_run_instead_of_hanging(
    in_process, monkeypatch, tmp_path, name, error
):
    """Whatever ends the thread that writes must reach the one that computes."""
    break_down(monkeypatch, script.PartWriter, name, error, call=3 if name == "finish" else 2)
    status, stderr = in_process()
    assert status == 1
    assert "Traceback" not in stderr
    monkeypatch.undo()
    assert in_process()[0] == 0
    assert len(check_parts(tmp_path / "out", sample_shapes(tmp_path / "out"))) == 12


# ─────────────────────────────────────────── full disks ──────────────────────────────────────────


def assert_stopped_for_want_of_room(status, stderr, out):
    assert status == 1, stderr
    assert "Traceback" not in stderr
    assert str(out) in stderr.splitlines()[-1]
    assert "room" in stderr.splitlines()[-1]
    assert len(stderr.splitlines()) < 8


def test_a_file_that_may_not_grow_loses_nothing_that_was_stored(tmp_path):
    csv_path = write_csv(tmp_path / "rows.csv", 16, missing_every=0)
    lines = csv_path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("6/"))
    lines[place] += "x" * 4_000_000  # of the answer
    csv_path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))

    for _ in range(2):
        status, stderr = run_to_the_end(csv_path, out, preexec_fn=limit)
        assert_stopped_for_want_of_room(status, stderr, out)
        stored = check_parts(out, sample_shapes(out))
        assert 0 < len(stored) < 16
    assert run_to_the_end(csv_path, out)[0] == 0
    assert len(check_parts(out, sample_shapes(out))) == 16
    assert not list(out.glob("*.partial"))


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
    csv_path, out = write_csv(tmp_path / "rows.csv", 100), small_disk / "out"
    stderr_path = tmp_path / "stderr.txt"
    process = start(command(csv_path, out), stderr_path)
    assert wait_for(lambda: list(out.glob("*.h5")) and is_writing(out), process)
    fill(small_disk / "somebody_elses")
    assert_stopped_for_want_of_room(*end(process, stderr_path), out)
    stored = check_parts(out, sample_shapes(out))
    assert 0 < len(stored) < 95

    status, stderr = run_to_the_end(csv_path, out)  # still full, or nearly
    assert status == 1
    assert "Traceback" not in stderr
    assert check_parts(out, sample_shapes(out)) >= stored

    (small_disk / "somebody_elses").unlink()
    status, stderr = run_to_the_end(csv_path, out)
    assert status == 3, stderr
    assert len(check_parts(out, sample_shapes(out))) == 95
    assert len(read_failed(out)) == 5
    assert not list(out.glob("*.partial"))


def test_what_a_killed_run_left_takes_no_room(tmp_path, small_disk):
    csv_path, out = write_csv(tmp_path / "rows.csv", 8, missing_every=0), small_disk / "out"
    out.mkdir()
    (out / "gemma3_12b_embeddings_part_001.partial").write_bytes(bytes(4_100_000))
    assert run_to_the_end(csv_path, out)[0] == 0
    assert len(check_parts(out, sample_shapes(out))) == 8
