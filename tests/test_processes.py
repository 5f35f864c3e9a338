"""Processes that share a directory: each part is one's, and what one leaves another takes."""

import collections
import errno
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_samples, make_options, read_failed, read_samples, run_script
from fault_test import SETTINGS, Program, check_parts, make_rows, wait_for, warm_process, words_of

import run_gemma3_extraction as script

LAST_LINE = re.compile(
    r"Extracted (\d+) of (\d+) samples \((\d+) failed, (\d+) already done"
    r"(?:, (\d+) in other processes)?\) in \d+\.\d s: \d+\.\d\d samples/s"
)
NUM_PARTS = 6
RACES = 50


def last_line(stderr):
    """extracted, all, failed, already done, in other processes"""
    match = LAST_LINE.fullmatch(stderr.splitlines()[-1])
    assert match, stderr
    return tuple(int(number or 0) for number in match.groups())


def slow_down(script, seconds=0.2, log_path=None):
    """Every image takes its time, and who puts which part in place is noted."""
    open_image, put_in_place = script.open_image, script.put_in_place

    def open_slowly(*args):
        time.sleep(seconds)
        return open_image(*args)

    def note(partial, path):
        put_in_place(partial, path)
        if log_path and path.suffix == ".h5":
            with open(log_path, "a") as file:
                file.write(f"{os.getpid()} {path.name}\n")

    script.open_image, script.put_in_place = open_slowly, note


def without_locks(script, error=errno.ENOSYS):
    """As on Lustre without flock."""

    def lockf(*_):
        raise OSError(error, os.strerror(error))

    script.fcntl.lockf = lockf
    slow_down(script)


def holder(output_dir, number):
    """The process that has locked part `number`, or None."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    with open(output_dir / ".lock", "r+b") as file:
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, request))
    return None if kind == fcntl.F_UNLCK else pid


def held_parts(output_dir, pid, numbers):
    return [number for number in numbers if holder(output_dir, number) == pid]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """40 rows, two without their image, in 10 parts; and what one process makes of them."""
    root = tmp_path_factory.mktemp("alone")
    csv_path = make_rows(root, 40, per_image=2)
    assert Program(words_of(csv_path, root / "out"), root / "stderr.txt").wait() == 3
    return csv_path, root / "out"


class Crew:
    """Programs on one directory, as plain shells start them."""

    def __init__(self, csv_path, root):
        self.csv_path, self.root, self.out = csv_path, root, root / "out"
        self.log_path = root / "parts.txt"
        self.members = []

    def start(self, *more, csv_path=None, env=None, patch=None):
        stderr_path = self.root / f"stderr_{len(self.members)}.txt"
        words = words_of(csv_path or self.csv_path, self.out, "--num-workers", 1, *more)
        patch = patch or functools.partial(slow_down, log_path=self.log_path)
        self.members.append((Program(words, stderr_path, env=env, patch=patch), stderr_path))
        return self.members[-1][0]

    def end(self, program):
        """Exit status and stderr."""
        status = program.wait(120)
        return status, next(path for one, path in self.members if one is program).read_text()

    def writers(self):
        """The processes that put each part in place, by the number of the part."""
        found = collections.defaultdict(list)
        for line in self.log_path.read_text().splitlines():
            pid, name = line.split()
            found[int(re.search(r"(\d+)\.h5", name)[1])].append(int(pid))
        return found


@pytest.fixture
def crew(alone, tmp_path):
    crew = Crew(alone[0], tmp_path)
    yield crew
    for program, _ in crew.members:
        program.kill()


# ─────────────────────────────────────── elastic processes ───────────────────────────────────────


def test_processes_come_and_go(alone, crew):
    """Four that start at different moments, two of them ended, and a fifth that joins late."""
    programs = []
    for _ in range(4):
        programs.append(crew.start())
        time.sleep(0.3)
    killed, stopped, *others = programs
    numbers = range(1, 11)
    assert wait_for(lambda: held_parts(crew.out, killed.pid, numbers), killed)
    assert wait_for(lambda: list(crew.out.glob("*.partial")), killed)
    lost = held_parts(crew.out, killed.pid, numbers)
    killed.send_signal(signal.SIGKILL)
    stopped.send_signal(signal.SIGTERM)
    killed.wait()
    fifth = crew.start()
    ends = [crew.end(program) for program in (*others, fifth)]
    assert all(status in (0, 3) for status, _ in ends), ends
    status, stderr = crew.end(stopped)
    assert status == 143, stderr
    expected = read_samples(alone[1])
    assert_same_samples(read_samples(crew.out), expected)
    assert read_failed(crew.out) == read_failed(alone[1])
    assert not list(crew.out.glob("*.partial"))
    writers = crew.writers()
    assert sorted(writers) == list(numbers)
    for number, pids in writers.items():  # a part cut short by SIGTERM is completed by another
        assert len([pid for pid in pids if pid != stopped.pid]) <= 1, (number, pids)
    took_over = [number for number in lost if writers[number][-1] != killed.pid]
    assert took_over or not lost
    assert all(last_line(stderr)[1] == 40 for _, stderr in ends)


def test_others_are_refused_while_one_is_at_work(crew, tmp_path):
    """The same program with another dtype, other rows, or --overwrite."""
    first = crew.start()
    assert wait_for(lambda: list(crew.out.glob("*.h5")), first)
    (tmp_path / "less").mkdir()
    less = make_rows(tmp_path / "less", 8, per_image=2)
    dtype, rows = crew.start("--dtype", "bfloat16"), crew.start(csv_path=less)
    overwrite = crew.start("--overwrite")
    who = f"process {first.pid} on {socket.gethostname()}"
    for program, words in (
        (dtype, ["dtype is 'float32' there, 'bfloat16' here", who]),
        (rows, ["dataset_sha256 is", who]),
        (overwrite, ["--overwrite", "others are at work"]),
    ):
        status, stderr = crew.end(program)
        assert status == 1, stderr
        assert all(word in stderr.splitlines()[-1] for word in words), stderr
        assert "Traceback" not in stderr
    first.send_signal(signal.SIGTERM)
    assert crew.end(first)[0] == 143
    assert check_parts(crew.out)


@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc_per_node", "3"),
        ("accelerate.commands.launch", "--cpu", "--num_processes", "2"),
    ],
    ids=["torchrun 3", "accelerate 2"],
)
def test_launchers(alone, tmp_path, launcher):
    """Rows without an image fail, in whatever process: the others finish all the same."""
    csv_path, reference = alone
    words = words_of(csv_path, tmp_path / "out")
    images_dir = csv_path.parent / "images"
    result = run_script(
        tmp_path / "out",
        *words[6:],
        "--images-dir",
        images_dir,
        csv_path=csv_path,
        launcher=[sys.executable, "-m", *launcher],
    )
    assert result.returncode not in (0, 2), result.stderr
    assert_same_samples(read_samples(tmp_path / "out"), read_samples(reference))
    assert read_failed(tmp_path / "out") == read_failed(reference)
    assert not list((tmp_path / "out").glob("*.partial"))
    assert sum(map(int, re.findall(r"Extracted (\d+) of", result.stderr))) == 38


def test_under_a_launcher_nobody_ends_before_the_last(alone, crew):
    """The one that is done first has failures, so it would end everybody."""
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    slow = functools.partial(slow_down, seconds=0.6)
    second = crew.start(env=env | {"RANK": "1"}, patch=slow)
    assert wait_for(lambda: list(crew.out.glob("*.partial")), second)
    first = crew.start(env=env)
    status, stderr = crew.end(first)
    assert status == 3, stderr
    assert last_line(stderr)[4] == 0  # nothing is in other hands any more
    assert_same_samples(read_samples(crew.out), read_samples(alone[1]))
    assert crew.end(second)[0] in (0, 3)


def test_under_a_launcher_what_comes_free_is_taken(alone, crew):
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    stuck = crew.start(env=env | {"RANK": "1"}, patch=functools.partial(slow_down, seconds=60))
    assert wait_for(lambda: (crew.out / ".lock").exists() and holder(crew.out, 1), stuck)
    first = crew.start(env=env)
    assert wait_for(lambda: len(list(crew.out.glob("*.h5"))) >= 5, first)
    time.sleep(1)
    assert first.poll() is None
    stuck.kill()
    assert crew.end(first)[0] == 3
    assert_same_samples(read_samples(crew.out), read_samples(alone[1]))


# ────────────────────────────────────────── small races ──────────────────────────────────────────


def work(output_dir, dtype, delay, connection):
    """All of a run but the model: what came of it goes to `connection`."""
    rows = [script.Row(i, f"q{i}", f"{i // 4}.png", "what?", "it") for i in range(4 * NUM_PARTS)]
    options = make_options(output_dir=Path(output_dir), checkpoint_interval=4)
    settings = SETTINGS | {"dtype": dtype}
    lock = script.OutputLock(options.output_dir)
    time.sleep(delay)
    try:
        plan = script.open_output(options, lock, settings, rows, 1000)
        written = claim_all(options.output_dir, plan, lock, settings)
        connection.send((dtype, written, None))
    except script.ExtractionError as error:
        connection.send((dtype, [], str(error)))
    lock.leave()


def claim_all(output_dir, plan, lock, settings):
    """Write whatever part can be had; their numbers."""
    written, expected = [], {}
    while True:
        num_before = len(written)
        rows = script.claim_rows(plan, lock, lambda number, rows: expected.update({number: rows}))
        for number, of_part in itertools.groupby(rows, key=lambda row: row.index // 4 + 1):
            writer = script.PartWriter(script.part_path(output_dir, number), settings, "none")
            for row in of_part:
                writer.add(row, "it", {script.VISION: np.zeros(2, np.float32)}, {})
            writer.finish()
            lock.release(number, is_done=True)
            written.append(number)
        if len(written) == num_before:
            return written


def race_again_and_again(dtype, connection):
    """One of two that begin at the same moments."""
    while job := connection.recv():
        work(job[0], dtype, job[1], connection)


@pytest.mark.parametrize("dtypes", [("same", "same"), ("one", "other")], ids=["same", "other"])
def test_two_start_within_milliseconds(tmp_path, dtypes):
    """Never two settings in one directory, never a lost part, never one written twice."""
    racers = []
    for dtype in dtypes:
        ours, theirs = multiprocessing.Pipe()
        racers.append((warm_process(race_again_and_again, dtype, theirs), ours))
    outcomes = collections.Counter()
    for i in range(RACES):
        out = tmp_path / f"{i}"
        out.mkdir()
        for k, (_, connection) in enumerate(racers):
            connection.send((out, ((i * 7) % 10 - 5) * (k - 0.5) * 0.001 + 0.0025))
        found = []
        for _, connection in racers:
            assert connection.poll(20), f"race {i} hangs"
            found.append(connection.recv())
        written = sorted(number for _, numbers, _ in found for number in numbers)
        assert written == list(range(1, NUM_PARTS + 1)), found
        stored = script.scan_parts(out, SETTINGS | {"dtype": written_dtype(found)})
        assert len(stored) == 4 * NUM_PARTS
        errors = [error for _, _, error in found if error]
        assert len(errors) == (dtypes[0] != dtypes[1]), found
        assert all("dtype" in error for error in errors)
        outcomes[sum(bool(numbers) for _, numbers, _ in found)] += 1
    for process, connection in racers:
        connection.send(None)
        process.join(10)
    if dtypes[0] == dtypes[1]:
        assert outcomes[2] > 5, outcomes  # they did share


def written_dtype(found):
    (dtype,) = {dtype for dtype, numbers, _ in found if numbers}
    return dtype


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16")], ids=["same", "other"])
def test_two_whole_programs_start_at_once(alone, crew, more):
    patch = functools.partial(slow_down, seconds=0.05, log_path=crew.log_path)
    programs = [crew.start(patch=patch), crew.start(*more, patch=patch)]
    ends = [crew.end(program) for program in programs]
    writers = crew.writers()
    assert sorted(writers) == list(range(1, 11))
    assert all(len(pids) == 1 for pids in writers.values())
    assert len(read_samples(crew.out)) == 38
    if more:
        assert sorted(status for status, _ in ends) == [1, 3]
        assert len({pid for (pid,) in writers.values()}) == 1
    else:
        assert {status for status, _ in ends} <= {0, 3}
        assert_same_samples(read_samples(crew.out), read_samples(alone[1]))


def check_forever(output_dir, settings):
    """Be the first in a directory, and get stuck there."""
    lock = script.OutputLock(Path(output_dir))
    assert lock.join(settings)
    (Path(output_dir) / "checking").touch()
    time.sleep(600)


def test_who_waits_for_a_checker_that_dies_checks_itself(tmp_path):
    checker = warm_process(check_forever, tmp_path, {"dtype": "other"})
    while not (tmp_path / "checking").exists():
        time.sleep(0.01)
    ours, theirs = multiprocessing.Pipe()
    waiting = warm_process(work, tmp_path, "float32", 0, theirs)
    assert not ours.poll(1)
    checker.kill()
    assert ours.poll(20)
    assert ours.recv() == ("float32", list(range(1, NUM_PARTS + 1)), None)
    waiting.join()


def hold(output_dir, number):
    """Keep a part locked."""
    with open(Path(output_dir) / ".lock", "a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, number)
        time.sleep(600)


def test_rows_in_other_hands_are_named(run_here, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    other = warm_process(hold, out, 2)
    while not (out / ".lock").exists() or holder(out, 2) != other.pid:
        time.sleep(0.01)
    status, stderr = run_here("--checkpoint-interval", 7, "--max-new-tokens", 0)
    other.kill()
    assert status == 0
    assert last_line(stderr) == (21, 28, 0, 0, 7)
    other.join()
    status, stderr = run_here("--checkpoint-interval", 7, "--max-new-tokens", 0)
    assert last_line(stderr) == (7, 28, 0, 21, 0)


def test_what_another_finished_meanwhile_is_not_computed_again(run_here, monkeypatch, tmp_path):
    words = ("--checkpoint-interval", 7, "--max-new-tokens", 0)
    assert run_here(*words, output_dir=tmp_path / "other")[0] == 0
    open_output, name = script.open_output, script.PART_NAME.format(3)

    def meanwhile(options, *args):
        plan = open_output(options, *args)
        shutil.copy(tmp_path / "other" / name, options.output_dir)
        return plan

    monkeypatch.setattr(script, "open_output", meanwhile)
    status, stderr = run_here(*words)
    assert status == 0
    assert last_line(stderr) == (21, 28, 0, 7, 0)
    assert_same_samples(read_samples(tmp_path / "out"), read_samples(tmp_path / "other"))


def test_what_is_worked_through_is_not_tried_again(alone, crew):
    """Rows that failed in one process are not tried by those that are at work with it."""
    first = crew.start(patch=functools.partial(slow_down, seconds=0.3))
    assert wait_for(lambda: read_failed(crew.out), first)
    record = json.loads((crew.out / ".lock").read_text())
    assert record["processes"] == [f"process {first.pid} on {socket.gethostname()}"]
    _, stderr = crew.end(crew.start())
    failed = last_line(stderr)[2]
    assert failed < 2, stderr
    _, stderr = crew.end(first)
    assert last_line(stderr)[2] + failed == 2
    assert_same_samples(read_samples(crew.out), read_samples(alone[1]))


# ───────────────────────────────────────── without locks ─────────────────────────────────────────


def test_without_locks_each_takes_its_share_by_rank(alone, crew):
    """The second begins while the first is at work."""
    env = {"WORLD_SIZE": "2"}
    first = crew.start(env=env | {"RANK": "1"}, patch=without_locks)
    assert wait_for(lambda: list(crew.out.glob("*.partial")), first)
    second = crew.start(env=env | {"RANK": "0"}, patch=without_locks)
    for program in (first, second):
        status, stderr = crew.end(program)
        assert status in (0, 3), stderr
        assert stderr.count("has no locks: each process takes its share by its rank") == 1
        assert last_line(stderr)[4] == 0
        in_place = {path.name for path in crew.out.glob("*.h5")}  # it has waited for the other
        assert in_place == {path.name for path in alone[1].glob("*.h5")}
    assert_same_samples(read_samples(crew.out), read_samples(alone[1]))


def test_without_locks_one_process_does_all(run_here, monkeypatch, tmp_path):
    def lockf(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(script.fcntl, "lockf", lockf)
    status, stderr = run_here("--checkpoint-interval", 7, "--max-new-tokens", 0)
    assert status == 0
    assert stderr.count("has no locks: this must be the only process at work there") == 1
    assert last_line(stderr) == (28, 28, 0, 0, 0)


def test_overwrite_needs_the_directory_for_itself(run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "NUM_RANKS", 2)
    status, stderr = run_here("--overwrite")
    assert status == 1
    assert "--overwrite" in stderr
    assert not (tmp_path / "out").exists()
