"""What the file system answers, by strace's fault injection: parts are right, or not there."""

import ctypes
import functools
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import assert_same_samples, read_failed, read_samples
from fault_test import DONE, Program, make_rows, words_of

import run_gemma3_extraction as script

PART_2 = script.PART_NAME.format(2)
SAYS = {"EIO": "Input/output error", "ESTALE": "Stale file handle"}
NO_ROOM = {"EDQUOT": "Disk quota exceeded", "ENOSPC": "No space left on device"}


def attach_strace(path, calls, answer, _):
    """Let strace watch this process from here on, and answer these calls on a path like this.

    Of a file that is put in place, they are the calls on this process's own unfinished one.
    """
    if path.suffix in (".h5", ".json", ".csv"):
        path = script.partial_path(path)
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1))  # PR_SET_PTRACER: anybody
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(path), "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:{answer}", "-p", str(os.getpid())]
    strace = subprocess.Popen(command)
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        assert strace.poll() is None, "strace has ended"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Its CSV, 12 rows in three parts, the last about a missing image; and its samples."""
    if subprocess.call(["sh", "-c", "strace -o /dev/null true"]):
        pytest.skip("strace is not installed, or may not attach to a process here")
    root = tmp_path_factory.mktemp("undisturbed")
    csv_path = make_rows(root, 12, missing_every=12)
    assert Program(words_of(csv_path, root / "out"), root / "err").end()[0] == DONE
    return csv_path, read_samples(root / "out")


def run(csv_path, path, calls, error, when):
    """Exit status and stderr of a run where these calls on this path are answered so."""
    patch = functools.partial(attach_strace, path, calls, f"error={error}:when={when}")
    out = path if path.name == "out" else path.parent
    return Program(words_of(csv_path, out), out.with_suffix(".err"), patch=patch).end()


@pytest.mark.parametrize(
    ("name", "calls", "error", "num_stored"),
    [
        (PART_2, "write", "EIO", 4),
        (PART_2, "write", "EDQUOT", 4),
        (PART_2, "write", "ENOSPC", 4),
        (PART_2, "fsync", "EIO", 4),
        (PART_2, "rename", "EIO", 4),
        ("settings.json", "fsync", "EIO", 0),
        ("failed_samples.csv", "write", "ENOSPC", 11),
        ("failed_samples.csv", "close", "ESTALE", 11),
    ],
)
def test_what_fails_is_noticed(undisturbed, tmp_path, name, calls, error, num_stored):
    csv_path, expected = undisturbed
    status, stderr = run(csv_path, tmp_path / "out" / name, calls, error, "1")
    assert status == 1, stderr
    assert (SAYS | NO_ROOM)[error] in stderr.splitlines()[-1]
    assert ("once there is room" in stderr.splitlines()[-1]) == (error in NO_ROOM)
    found = read_samples(tmp_path / "out")
    assert_same_samples(found, {name: expected[name] for name in found}, bound=0)
    # Of the part that cannot be written nothing is there, of later ones what was done by then.
    assert num_stored <= len(found) <= (7 if name == PART_2 else num_stored)
    assert name not in {sample["part"] for sample in found.values()}
    assert not list(tmp_path.glob("out/*.partial"))
    assert Program(words_of(csv_path, tmp_path / "out"), tmp_path / "err").end()[0] == DONE
    assert_same_samples(read_samples(tmp_path / "out"), expected)
    assert len(read_failed(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("name", "calls", "error"),
    [("", "fsync", "EINVAL"), (".lock", "fcntl", "ENOSYS"), (".lock", "fcntl", "ENOLCK")],
)
def test_what_it_does_not_know_is_no_error(undisturbed, tmp_path, name, calls, error):
    csv_path, expected = undisturbed
    status, stderr = run(csv_path, tmp_path / "out" / name, calls, error, "1+")
    assert status == DONE, stderr
    assert stderr.count("has no locks: this must be the only process") == (name == ".lock")
    assert_same_samples(read_samples(tmp_path / "out"), expected, bound=0)
