"""Processes that share a directory: each part is one's, and what one leaves another takes."""

import dataclasses
import multiprocessing
import re
import signal
import sys
import time

import pytest
from conftest import assert_same_samples, read_failed, read_samples, run_script
from fault_test import SETTINGS, Program, make_rows, warm_process, words_of

import run_gemma3_extraction as script

TORCHRUN = "torch.distributed.run --nproc_per_node 3"
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2"


def read_last_lines(stderr):
    """Of every process: extracted, failed, already done, by other processes."""
    form = r"Extracted (\d+) of 40 samples \((\d+) failed, (\d+) already done"
    form += r"(?:, (\d+) by other processes)?\) in \d"
    return [[int(number or 0) for number in found] for found in re.findall(form, stderr)]


def slow_down(script):
    """Every image takes its time."""
    open_image = script.open_image

    def open_slowly(*args):
        time.sleep(0.2)
        return open_image(*args)

    script.open_image = open_slowly


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """40 rows, two without their image, in 10 parts; and what one process makes of them."""
    root = tmp_path_factory.mktemp("alone")
    csv_path = make_rows(root, 40, per_image=2)
    assert Program(words_of(csv_path, root / "out"), root / "err").end()[0] == 3
    return csv_path, root / "out"


@pytest.fixture
def start(alone, tmp_path):
    """Start a program on the same directory, as from another shell."""

    def start(*more, csv_path=alone[0]):
        words = words_of(csv_path, tmp_path / "out", "--num-workers", 1, *more)
        return Program(words, tmp_path / f"stderr_{time.monotonic_ns()}", patch=slow_down)

    return start


def assert_as_alone(alone, out):
    """All is there, and nothing else."""
    assert_same_samples(read_samples(out), read_samples(alone[1]))
    assert read_failed(out) == read_failed(alone[1])
    assert {path.name for path in out.iterdir()} == {path.name for path in alone[1].iterdir()}


def test_processes_come_and_go(alone, start, tmp_path):
    """Four from plain shells, one killed, one stopped, one late."""
    killed, stopped, third = start(), start(), start()
    for program in (killed, stopped):
        program.wait_until(program.is_extracting)
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    stopped.send_signal(signal.SIGTERM)
    late = start()
    assert (killed.end()[0], stopped.end()[0]) == (-9, 143)
    for status, stderr in (third.end(), late.end()):
        assert status in (0, 3)
        assert len(read_last_lines(stderr)) == 1
    assert_as_alone(alone, tmp_path / "out")


def test_others_are_refused_while_one_is_at_work(start, tmp_path):
    first = start()
    first.wait_until(lambda: list(tmp_path.glob("out/*.h5")))
    for told, program in {
        "dtype was 'float32' and is 'bfloat16'": start("--dtype", "bfloat16"),
        "dataset_sha256 was": start(csv_path=make_rows(tmp_path / "less", 8)),
        "--overwrite needs": start("--overwrite"),
    }.items():
        status, stderr = program.end()
        assert (status, told in stderr.splitlines()[-1]) == (1, True)
    assert first.process.exitcode is None
    first.process.kill()


@pytest.mark.parametrize("more", [(), ("--layers", "1")], ids=["same", "other"])
def test_two_whole_programs_start_at_once(alone, start, tmp_path, more):
    ends = [program.end() for program in (start(), start(*more))]
    told = read_last_lines("".join(stderr for _, stderr in ends))
    if more:
        assert sorted(status for status, _ in ends) == [1, 3]
        assert len(read_samples(tmp_path / "out")) == told[0][0] == 38
    else:
        for one, other in (told, told[::-1]):  # who failed with a row may have tried it again
            assert 0 <= one[2] + one[3] - other[0] <= 2, told
        assert_as_alone(alone, tmp_path / "out")


@pytest.mark.parametrize(("launcher", "num_processes"), [(TORCHRUN, 3), (ACCELERATE, 2)])
def test_launchers(alone, tmp_path, launcher, num_processes):
    """Rows without an image fail, in whatever process: the others finish all the same."""
    out, command = tmp_path / "out", [sys.executable, "-m", *launcher.split()]
    more = words_of(alone[0], out)[2:]  # behind the CSV
    result = run_script(out, *more, csv_path=alone[0], launcher=command)
    assert result.returncode == 0, result.stderr
    told = read_last_lines(result.stderr)
    assert (len(told), sum(one[0] for one in told)) == (num_processes, 38)
    assert_as_alone(alone, out)


def race(dtype, connection):
    """All of a run but the model, again and again: the parts it gets, or why it gets none."""
    rows = [script.Row(f"q{i}", f"{i}.png", "what?", "it") for i in range(24)]
    while message := connection.recv():
        job_dir, moment = message
        lock = script.OutputLock(job_dir)  # held to the end
        claimed = []
        told = ""
        time.sleep(max(0, moment - time.time()))
        try:
            settings = dataclasses.replace(SETTINGS, dtype=dtype)
            job = script.Job(rows, rows, None, None, None, settings, sample_bytes=1000)
            to_do = script.open_output(lock, job, False, "none")
            parts = script.make_parts(job_dir, script.plan_parts(rows, 4), to_do)
            claimed = [part.number for part in parts if lock.claim(part, take_over=False)]
        except script.ExtractionError as error:
            told = str(error)
        connection.send((claimed, told))


@pytest.mark.parametrize("dtypes", [("same", "same"), ("one", "other")], ids=["same", "other"])
def test_two_start_within_milliseconds(tmp_path, dtypes):
    """Never two settings in one directory, never a part that nobody has or that both have."""
    racers, ends = zip(*[multiprocessing.Pipe() for _ in dtypes], strict=True)
    for dtype, end in zip(dtypes, ends, strict=True):
        warm_process(race, dtype, end)
        end.close()  # so that a racer's death is no hang
    for i in range(20):
        moment = time.time() + 0.03
        for k, racer in enumerate(racers):
            racer.send((tmp_path / f"{i}", moment + k * (i % 10 - 5) * 0.001))
        assert all(racer.poll(60) for racer in racers), "the race hangs"
        (parts, told), (other_parts, also_told) = (racer.recv() for racer in racers)
        assert sorted(parts + other_parts) == [1, 2, 3, 4, 5, 6], told + also_told
        assert (told + also_told).count("dtype was") == (dtypes[0] != dtypes[1])
    for racer in racers:
        racer.send(None)
