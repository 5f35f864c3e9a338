"""Kill the real program again and again, and see that nothing is lost.

    python tests/fault_test.py --kills 30 --signals 10
    python tests/fault_test.py --memory
    python tests/fault_test.py --startup

Every run is ended by SIGKILL, SIGINT, SIGTERM, SIGHUP or SIGUSR1 at a random moment and started
again with the same command; whatever is in the output directory then must be whole, and in the end
all must be as in an uninterrupted run. Exit status 1 if anything is not.
"""

import argparse
import atexit
import ctypes
import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from conftest import (
    IMAGES,
    ROOT,
    SCRIPT,
    TESTS,
    assert_same_samples,
    flags,
    read_csv,
    read_failed,
    read_samples,
    write_csv,
)

import run_gemma3_extraction as script

STATUS = {signal.SIGKILL: -9, signal.SIGINT: 130}  # of any other signal: 143
GENTLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
DONE = 3  # every row has its outcome: one in 20 has an image that is not there
PATIENCE = 600  # seconds, on a machine that has better things to do
MEMORY_ROWS, MEMORY_LIMIT = (1500, 5000), 50  # MB
STARTUP_PARTS, STARTUP_LIMIT = 20, 2  # of 1,000 samples each; seconds
PART_1 = script.PART_NAME.format(1)
SETTINGS = dict.fromkeys((*script.IDENTITY, "model_name", "dataset", "dataset_sha256"), "as ever")
SETTINGS |= {"schema_version": script.SCHEMA_VERSION, "storage_dtype": "float32"}


def make_rows(root: Path, num_rows: int, missing_every: int = 20, per_image: int = 3) -> Path:
    """A CSV of the test data over and over, under other ids and other names of the images.

    The images go to `images` beside it; some rows ask about one that is not there.
    """
    texts, names = list(read_csv().values()), sorted(path.name for path in IMAGES.iterdir())
    (root / "images").mkdir(exist_ok=True)
    rows = []
    for i in range(num_rows):
        number, text = i // per_image, texts[i % len(texts)]
        image_id = f"{number}_{names[number % len(names)]}"
        link = root / "images" / image_id
        if not link.is_symlink():
            link.symlink_to(IMAGES / names[number % len(names)])
        if missing_every and i % missing_every == missing_every - 1:
            image_id = f"missing_{i % 3}.png"
        rows.append((f"{i}/{text['question_id']}", image_id, text["question"], text["answer"]))
    return write_csv(root / "rows.csv", rows)


def words_of(csv_path: Path, output_dir: Path, *more) -> list[str]:
    """The tiny model's command line: many small parts, few questions side by side."""
    small = ("--max-new-tokens", 4, "--checkpoint-interval", 4, "--batch-size", 3)
    images_dir = csv_path.parent / "images"
    return flags(output_dir, *small, *more, csv_path=csv_path, images_dir=images_dir)


def start_cold(words: list[str], stderr_path: Path, **kwargs) -> subprocess.Popen:
    """The program as a shell starts it."""
    with open(stderr_path, "w") as stderr:
        return subprocess.Popen([sys.executable, str(SCRIPT), *words], stderr=stderr, **kwargs)


class Program:
    """The whole program in a process that has its imports behind it: as a Popen, 5 s earlier.

    `env` is added to its environment. `inject`: what strace is to do to it, attached before its
    first line. `patch` is shown the script as a module before it runs.
    """

    def __init__(self, words, stderr_path, env=None, inject=(), patch=None) -> None:
        stderr_path.write_text("")
        self._process = warm_process(run_program, words, stderr_path, env or {}, inject, patch)
        self.pid = self._process.pid
        atexit.register(self.kill)  # it may be one that heeds no SIGTERM

    def poll(self) -> int | None:
        """Its exit status, negative if a signal ended it."""
        return self._process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError("the program hangs")
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """At once."""
        self._process.kill()


def warm_process(target, *args):
    """A process that has started, with torch and transformers imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_test", *WARM_MODULES])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(ROOT)])
    multiprocessing.forkserver.ensure_running()  # Python 3.11 gives it no other path
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


WARM_MODULES = (
    "accelerate",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gemma3.processing_gemma3",
    "transformers.models.gemma3.image_processing_pil_gemma3",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.gemma.tokenization_gemma",
)


def run_program(words: list[str], stderr_path: Path, env: dict, inject: tuple, patch) -> None:
    """What a `Program` does."""
    multiprocessing.set_start_method("fork", force=True)  # as in any program: tqdm looks
    os.environ.update(env)
    descriptor = os.open(stderr_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    for signum in GENTLE:
        signal.signal(signum, signal.SIG_DFL)
    if inject:
        attach_strace(stderr_path.with_suffix(".strace"), inject)
    sys.argv = [str(SCRIPT), *words]
    status = 1
    try:
        if patch:
            patch(importlib.reload(script))  # it has read the environment when it was imported
            raise SystemExit(script.main(words))
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # as at any program's end, where HDF5 may still fail
    atexit._run_exitfuncs()
    gc.collect()
    ctypes.CDLL(None).exit(status)


def attach_strace(log_path: Path, inject: tuple) -> None:
    """Let strace watch this process from here on."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1))  # PR_SET_PTRACER: anybody
    command = ["strace", "-f", "-qq", "-o", log_path, *inject, "-p", str(os.getpid())]
    strace = subprocess.Popen(list(map(str, command)))
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        assert strace.poll() is None, "strace has ended"
        time.sleep(0.01)


def wait_for(is_reached, process) -> bool:
    """Whether the process came to something before it ended."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if is_reached():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    process.kill()
    raise TimeoutError("the program hangs")


def catches_signals(process) -> bool:
    """Whether the program has come to its first lines; before that a signal is Python's own."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(caught) and bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)


def is_writing(output_dir: Path) -> bool:
    """Whether a part is in hand."""
    return output_dir.is_dir() and any(output_dir.glob("gemma3*.partial"))


def root_attributes(output_dir: Path) -> dict[str, dict]:
    """By part, without the time of writing."""
    found = {}
    for path in sorted(output_dir.glob("*.h5")):
        with h5py.File(path) as file:
            found[path.name] = {
                name: value.tolist() if hasattr(value, "tolist") else value
                for name, value in file.attrs.items()
                if name != "created_at"
            }
    return found


def check_parts(output_dir: Path) -> set[str]:
    """That every *.h5 is complete; the question_ids in them.

    Raises:
        AssertionError: one is not.
    """
    stored: set[str] = set()
    for path in sorted(output_dir.glob("*.h5")):
        with h5py.File(path) as file:
            assert file.attrs["num_samples"] == len(file), f"{path.name}: count"
            for group in [file[name] for name in file]:  # file.values() holds h5py's lock
                check_sample(group, file.attrs["layers"])
                assert group.attrs["question_id"] not in stored, f"{group.name} is there twice"
                stored.add(group.attrs["question_id"])
    return stored


def check_sample(group: h5py.Group, layers) -> None:
    """That all of a sample is there, finite, and as its crc32 says."""
    widths = {f"{kind}/layer_{i}": 32 for kind in script.LAYER_KINDS for i in layers}
    num_tokens = group.attrs["num_answer_tokens"] + (not group.attrs["answer_truncated"])
    widths |= {"vision_representation": 24, "answer_logprobs": num_tokens}
    texts = {"question", "image_id", "answer", "ground_truth_answer"}
    kinds = {name.split("/")[0] for name in widths}
    assert set(group) == texts | kinds | {"vision_only_representation"}, group.name
    crc32 = 0
    for name in sorted(widths):
        vector = group[name][()]
        assert vector.shape == (widths[name],), f"{group.name}/{name}: {vector.shape}"
        assert np.isfinite(vector).all(), f"{group.name}/{name}"
        crc32 = zlib.crc32(vector.tobytes(), crc32)
    assert group.attrs["crc32"] == crc32, group.name


@dataclass
class FaultTest:
    """One data set, an uninterrupted run over it, and what the others need to know of that."""

    root: Path
    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.csv_path = make_rows(self.root, self.num_rows)
        self.stderr_path = self.root / "stderr.txt"
        self.reference = self.root / "reference"
        began = time.monotonic()
        process = start_cold(words_of(self.csv_path, self.reference), self.stderr_path)
        wait_for(lambda: is_writing(self.reference), process)
        self.startup = time.monotonic() - began
        status = process.wait(PATIENCE)
        self.work = time.monotonic() - began - self.startup
        assert status == DONE, self.stderr_path.read_text()

    def strike(self, output_dir: Path, signum: signal.Signals) -> str | None:
        """Run until a random moment; what the moment was, or None if the run ended before it."""
        is_early = self.random.random() < 0.2
        begin = start_cold if is_early else Program
        process = begin(words_of(self.csv_path, output_dir), self.stderr_path)
        if not wait_for(lambda: catches_signals(process), process):
            raise AssertionError(f"exit status {process.poll()} before the first line")
        if is_early:
            delay, since = self.random.uniform(0, self.startup), "the start"
        else:
            delay, since = self.random.uniform(0, self.work / 2), "the first sample"
            wait_for(lambda: is_writing(output_dir), process)
        time.sleep(delay)
        is_running = process.poll() is None
        process.send_signal(signum)
        status = process.wait(PATIENCE)
        stderr = self.stderr_path.read_text()
        assert "Traceback" not in stderr, stderr
        has_ended = stderr.splitlines()[-1:] and stderr.splitlines()[-1].startswith("Extracted")
        if not is_running or (has_ended and status in (DONE, -signum)):
            return None  # Python was already on its way out, or gone
        assert status == STATUS.get(signum, 143), f"exit status {status}: {stderr}"
        return f"{delay:.2f} s after {since}, exit status {status}"

    def finish(self, output_dir: Path) -> None:
        """Let a run come to its end, and compare all that it left."""
        status = Program(words_of(self.csv_path, output_dir), self.stderr_path).wait()
        assert status == DONE, f"exit status {status}: {self.stderr_path.read_text()}"
        assert_same_samples(read_samples(output_dir), read_samples(self.reference))
        assert root_attributes(output_dir) == root_attributes(self.reference)
        assert read_failed(output_dir) == read_failed(self.reference)
        names = {path.name for path in output_dir.iterdir()}
        assert names == {path.name for path in self.reference.iterdir()}, names

    def check(self, output_dir: Path, before: set[str]) -> set[str]:
        """That all there is, is whole, and nothing of what was there is gone."""
        stored = check_parts(output_dir) if output_dir.exists() else set()
        assert stored >= before, f"lost: {before - stored}"
        failed = read_failed(output_dir).items()
        assert failed <= read_failed(self.reference).items()
        return stored

    def run(self, num_kills: int, num_signals: int) -> int:
        """Use up all the kills and signals; the number of directories they took."""
        gentle = itertools.islice(itertools.cycle(GENTLE), num_signals)
        faults = [signal.SIGKILL] * num_kills + list(gentle)
        self.random.shuffle(faults)
        num_stored = len(read_samples(self.reference))
        count, stored = 1, set()
        while faults:
            output_dir = self.root / f"run_{count}"
            moment = self.strike(output_dir, faults[-1])
            stored = self.check(output_dir, stored)
            if moment:
                name = faults.pop().name
                print(f"{name:8}{moment}: {len(stored)} samples in whole parts", flush=True)
            if moment is None or len(stored) == num_stored:
                self.finish(output_dir)
                print("done: all as in the uninterrupted run, next directory", flush=True)
                count, stored = count + 1, set()
        self.finish(self.root / f"run_{count}")
        return count


def tell_memory(script) -> None:
    """Let the program tell its peak and its present memory with every sample."""
    record = script.Recorder._record

    def tell(self, outcome):
        record(self, outcome)
        status = Path("/proc/self/status").read_text()
        kilobytes = [re.search(rf"{name}:\s+(\d+)", status)[1] for name in ("VmHWM", "VmRSS")]
        print("memory", self.num_extracted, *kilobytes, file=sys.stderr)

    script.Recorder._record = tell


def measure_memory(root: Path) -> dict[int, tuple[float, float]]:
    """Peak and present memory in MB, by the number of samples extracted."""
    csv_path = make_rows(root, MEMORY_ROWS[-1], missing_every=0, per_image=10)
    more = ("--checkpoint-interval", 1000, "--max-new-tokens", 0, "--batch-size", 64)
    words = words_of(csv_path, root / "memory", *more)
    process = Program(words, root / "stderr.txt", patch=tell_memory)
    assert process.wait() == 0, (root / "stderr.txt").read_text()
    lines = (root / "stderr.txt").read_text().splitlines()
    table = [map(int, line.split()[1:]) for line in lines if line.startswith("memory")]
    return {count: (peak / 1024, rss / 1024) for count, peak, rss in table}


def check_memory(root: Path) -> None:
    """That memory does not grow with what has been extracted."""
    memory = measure_memory(root)
    (peak, rss), (last_peak, last_rss) = (memory[count] for count in MEMORY_ROWS)
    print(f"after {MEMORY_ROWS} rows: peak {peak:.0f}, {last_peak:.0f} MB; ", end="")
    print(f"present {rss:.0f}, {last_rss:.0f} MB")
    assert last_peak - peak < MEMORY_LIMIT
    assert last_rss - rss < MEMORY_LIMIT


def make_parts(output_dir: Path, num_parts: int, num_samples: int) -> None:
    """Parts with the 12B's number of vectors, but short ones."""
    output_dir.mkdir()
    names = [f"{kind}/layer_{i}" for kind in script.LAYER_KINDS for i in range(5)]
    vectors = dict.fromkeys([script.VISION, *names], np.zeros(8, np.float32))
    indices = itertools.count()
    for number in range(1, num_parts + 1):
        writer = script.PartWriter(script.part_path(output_dir, number), SETTINGS, "none")
        for index in itertools.islice(indices, num_samples):
            row = script.Row(index, f"question {index:07}", "a.png", "what is it?", "it")
            writer.add(row, "it", vectors, {"num_answer_tokens": 1})
        writer.finish()


def check_startup(root: Path) -> None:
    """That going on takes no longer for all that is stored."""
    seconds = {}
    for num_parts, num_samples in ((1, 1), (STARTUP_PARTS, 1000)):
        output_dir = root / f"{num_parts}"
        make_parts(output_dir, num_parts, num_samples)
        began = time.monotonic()
        stored = script.scan_parts(output_dir, SETTINGS)
        seconds[len(stored)] = time.monotonic() - began
        assert len(stored) == num_parts * num_samples
    print(", ".join(f"{count} samples: {value:.3f} s" for count, value in seconds.items()))
    assert max(seconds.values()) - min(seconds.values()) < STARTUP_LIMIT


def check_faults(root: Path, args: argparse.Namespace) -> None:
    """That kills and signals lose nothing."""
    test = FaultTest(root, args.rows, args.seed)
    print(f"start-up {test.startup:.1f} s, work {test.work:.1f} s", flush=True)
    count = test.run(args.kills, args.signals)
    print(f"{args.kills} kills and {args.signals} signals in {count} directories: ", end="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="by SIGKILL")
    parser.add_argument("--signals", type=int, default=10, help="SIGINT, SIGTERM, SIGHUP, SIGUSR1")
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--startup", action="store_true", help="measure going on instead")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        try:
            if args.memory:
                check_memory(Path(root))
            elif args.startup:
                check_startup(Path(root))
            else:
                check_faults(Path(root), args)
        except AssertionError as error:
            print(f"VIOLATED: {error}")
            return 1
    print(f"nothing was lost ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
