"""What the file system answers, by strace's fault injection: parts are right, or not there."""

import shutil
import subprocess

import pytest
from conftest import assert_same_samples, read_failed, read_samples
from fault_test import DONE, PART_1, Program, make_rows, words_of

import run_gemma3_extraction as script

PARTIAL_2 = script.PART_NAME.format(2).replace(".h5", ".partial")
FAILED = "failed_samples.partial"
NO_ROOM = ("EDQUOT", "ENOSPC")
SAYS = {
    "EIO": "Input/output error",
    "EDQUOT": "Disk quota exceeded",
    "ENOSPC": "No space left on device",
    "ESTALE": "Stale file handle",
}
READS = "pread64,preadv,preadv2,read,sendfile,copy_file_range"


@pytest.fixture(scope="module", autouse=True)
def strace():
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    sleep = subprocess.Popen(["sleep", "60"])
    attach = ["timeout", "2", "strace", "-qq", "-o", "/dev/null", "-p", str(sleep.pid)]
    status = subprocess.run(attach, capture_output=True).returncode
    sleep.kill()
    if status == 1:
        pytest.skip("strace may not attach to a process here")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Its CSV, 12 rows in three parts, the last about a missing image; and its output."""
    root = tmp_path_factory.mktemp("undisturbed")
    csv_path = make_rows(root, 12, missing_every=12)
    inject = ("-P", root / "out" / PARTIAL_2, "-e", "trace=pwrite64")
    assert run(csv_path, root / "out", *inject)[0] == DONE
    return csv_path, root / "out"


@pytest.fixture(scope="module")
def num_writes(undisturbed):
    """Of part 2."""
    return undisturbed[1].with_suffix(".strace").read_text().count("pwrite64(")


def run(csv_path, out, *inject):
    """Exit status and stderr of a run, and what strace saw."""
    stderr_path = out.with_suffix(".stderr")
    words = words_of(csv_path, out, "--max-new-tokens", 2)
    status = Program(words, stderr_path, inject=inject).wait(120)
    return status, stderr_path.read_text()


def faults(path, calls, error, when="1"):
    """strace's words: these calls on this path are answered so, by their number in a thread."""
    return "-P", path, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"


def assert_whole(out, expected):
    """Every *.h5 is as the undisturbed run's, to the last bit, and nothing half written is left."""
    found = read_samples(out)
    assert_same_samples(found, {name: expected[name] for name in found}, bound=0)
    assert not list(out.glob("gemma3*.partial"))
    assert not list(out.glob("*.damaged*"))


def assert_stopped(status, stderr, error):
    assert status == 1, stderr
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert SAYS[error] in last
    assert ("once there is room" in last) == (error in NO_ROOM)


def assert_finished(run_here, csv_path, out, expected):
    """The same command finishes the job."""
    words = ("--max-new-tokens", 2, "--checkpoint-interval", 4, "--batch-size", 3)
    images_dir = csv_path.parent / "images"
    status, stderr = run_here(*words, csv_path=csv_path, images_dir=images_dir, output_dir=out)
    assert status == DONE, stderr
    assert_same_samples(read_samples(out), expected)
    assert len(read_failed(out)) == 1


@pytest.mark.parametrize(
    ("name", "calls", "error", "when"),
    [
        (PARTIAL_2, "pwrite64", "EIO", "1"),
        (PARTIAL_2, "pwrite64", "EDQUOT", "{middle}"),  # a vector, once
        (PARTIAL_2, "pwrite64", "EIO", "{last}"),  # as it is closed
        (PARTIAL_2, "pwrite64", "ENOSPC", "{middle}+"),
        (PARTIAL_2, "ftruncate", "EDQUOT", "1"),
        (PARTIAL_2, "fsync", "EIO", "1"),
        (PARTIAL_2, "close", "ESTALE", "1"),
        (PARTIAL_2, READS, "EIO", "1"),
        (PARTIAL_2, "rename", "EIO", "1"),
        (FAILED, "write", "ENOSPC", "1"),
        (".lock", "pwrite64", "EDQUOT", "2+"),
    ],
)
def test_what_fails_is_noticed(
    undisturbed, num_writes, run_here, tmp_path, name, calls, error, when
):
    csv_path, reference = undisturbed
    when = when.format(middle=num_writes // 2, last=num_writes)
    out, expected = tmp_path / "out", read_samples(reference)
    status, stderr = run(csv_path, out, *faults(out / name, calls, error, when))
    assert_stopped(status, stderr, error)
    assert_whole(out, expected)
    assert len(read_samples(out)) < len(expected) or name == FAILED
    assert_finished(run_here, csv_path, out, expected)


def test_a_directory_that_cannot_be_synced_is_no_error(undisturbed, tmp_path):
    csv_path, reference = undisturbed
    out = tmp_path / "out"
    status, stderr = run(csv_path, out, *faults(out, "fsync", "EINVAL", "1+"))
    assert status == DONE, stderr
    assert_same_samples(read_samples(out), read_samples(reference), bound=0)


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK"])
def test_without_locks_there_is_one_warning(undisturbed, tmp_path, error):
    csv_path, reference = undisturbed
    out = tmp_path / "out"
    files = [word for path in sorted(reference.glob("*.h5")) for word in ("-P", out / path.name)]
    inject = faults(out / ".lock", "fcntl,flock", error, "1+")
    status, stderr = run(csv_path, out, *files, "-P", out / PARTIAL_2, *inject)
    assert status == DONE, stderr
    assert stderr.count("has no locks") == 1
    assert_same_samples(read_samples(out), read_samples(reference), bound=0)


@pytest.mark.parametrize("when", ["1", "4+"])
def test_a_read_that_fails_is_not_damage(undisturbed, run_here, tmp_path, when):
    csv_path, reference = undisturbed
    out, expected = tmp_path / "out", read_samples(reference)
    shutil.copytree(reference, out)
    (out / script.PART_NAME.format(2)).unlink()
    content = (out / PART_1).read_bytes()
    status, stderr = run(csv_path, out, *faults(out / PART_1, READS, "EIO", when))
    assert_stopped(status, stderr, "EIO")
    assert_whole(out, expected)
    assert (out / PART_1).read_bytes() == content
    assert_finished(run_here, csv_path, out, expected)


@pytest.mark.parametrize("number", [1, 40])
def test_a_read_that_fails_while_texts_are_brought_up_to_date(undisturbed, tmp_path, number):
    """Ground truths changed, so that a part is read whole and written anew."""
    csv_path, reference = undisturbed
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    shutil.copytree(csv_path.parent / "images", tmp_path / "images", symlinks=True)
    changed = tmp_path / "rows.csv"
    changed.write_text(csv_path.read_text().replace(",red\n", ",crimson\n"))
    assert changed.read_text() != csv_path.read_text()
    content = (out / PART_1).read_bytes()
    status, stderr = run(changed, out, *faults(out / PART_1, READS, "EIO", f"{number}+"))
    assert_stopped(status, stderr, "EIO")
    assert (out / PART_1).read_bytes() == content
    assert_whole(out, read_samples(reference))
    assert run(changed, out)[0] == DONE
    truths = [sample["ground_truth_answer"] for sample in read_samples(out).values()]
    assert "crimson" in truths
    assert "red" not in truths
