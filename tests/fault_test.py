"""Kill the real program again and again, and see that nothing is lost.

    python tests/fault_test.py --kills 30 --signals 10
    python tests/fault_test.py --memory

Every run is ended by SIGKILL, SIGINT, SIGTERM or SIGUSR1 at a random moment and started again with
the same command; whatever is in the output directory then must be whole, and in the end all must
be as in an uninterrupted run. Exit status 1 if anything is not.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from conftest import CSV, IMAGES, MODEL, ROOT, assert_same_samples, read_csv, read_samples

HEADER = ("question_id", "image_id", "question", "answer")
STATUS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
DONE = 3  # every row has its outcome: one in 20 has an image that is not there
PATIENCE = 600  # seconds, on a machine that has better things to do
MEMORY_ROWS, MEMORY_LIMIT = (1500, 5000), 50  # MB


def write_csv(path: Path, num_rows: int, missing_every: int = 20) -> Path:
    """The test data over and over under other ids; some rows ask about a missing image."""
    rows = list(read_csv(CSV).values())
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for i in range(num_rows):
            row = rows[i % len(rows)]
            is_missing = missing_every and i % missing_every == missing_every - 1
            image_id = f"missing_{i % 3}.png" if is_missing else row["image_id"]
            writer.writerow([f"{i}/{row['question_id']}", image_id, row["question"], row["answer"]])
    return path


def command(csv_path: Path, output_dir: Path, *flags) -> list[str]:
    """The tiny model's run: many small parts, one question a pass."""
    flags = [
        *("--vqa-dataset", csv_path, "--images-dir", IMAGES, "--output-dir", output_dir),
        *("--model", MODEL, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 4),
        *("--checkpoint-interval", 4, *flags),
    ]
    return [sys.executable, str(ROOT / "run_gemma3_extraction.py"), *map(str, flags)]


def start(arguments: list[str], stderr_path: Path, **kwargs) -> subprocess.Popen:
    """The program, as it runs beside us."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(stderr_path, "w") as stderr:
        return subprocess.Popen(arguments, stderr=stderr, env=env, **kwargs)


def wait_for(is_reached, process: subprocess.Popen) -> bool:
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


def catches_signals(process: subprocess.Popen) -> bool:
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


def read_failed(output_dir: Path) -> dict[str, tuple[str, ...]]:
    """`failed_samples.csv` by question_id."""
    path = output_dir / "failed_samples.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {line[0]: tuple(line[1:]) for line in list(csv.reader(file))[1:]}


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


def check_parts(output_dir: Path, shapes: dict[str, tuple]) -> set[str]:
    """That every *.h5 is complete; the question_ids in them.

    Raises:
        AssertionError: one is not.
    """
    stored: set[str] = set()
    for path in sorted(output_dir.glob("*.h5")):
        with h5py.File(path) as file:
            assert file.attrs["num_samples"] == len(file), f"{path.name}: count"
            for group in list(file.values()):  # the view holds h5py's lock
                found = {name: group[name].shape for name in shapes if name in group}
                assert found == shapes, f"{path.name}{group.name}: {found}"
                vectors = [group[name][()] for name, shape in shapes.items() if shape]
                assert all(np.isfinite(vector).all() for vector in vectors), group.name
                assert group.attrs["question_id"] not in stored, f"{group.name} is there twice"
                stored.add(group.attrs["question_id"])
    return stored


def sample_shapes(output_dir: Path) -> dict[str, tuple]:
    """Every data set of a sample of a finished run."""
    shapes = {"vision_only_representation": (24,)}

    def keep(name, item):
        if isinstance(item, h5py.Dataset):
            shapes[name] = item.shape

    with h5py.File(min(output_dir.glob("*.h5"))) as file:
        next(iter(file.values())).visititems(keep)
    assert len(shapes) == 4 + 2 + 3 * 5
    return shapes


@dataclass
class FaultTest:
    """One data set, an uninterrupted run over it, and what the others need to know of that."""

    root: Path
    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.csv_path = write_csv(self.root / "rows.csv", self.num_rows)
        self.stderr_path = self.root / "stderr.txt"
        self.reference = self.root / "reference"
        began = time.monotonic()
        process = self.start(self.reference)
        wait_for(lambda: is_writing(self.reference), process)
        self.startup = time.monotonic() - began
        status = process.wait(PATIENCE)
        self.work = time.monotonic() - began - self.startup
        assert status == DONE, self.stderr_path.read_text()
        self.shapes = sample_shapes(self.reference)

    def start(self, output_dir: Path) -> subprocess.Popen:
        """The same command, every time."""
        return start(command(self.csv_path, output_dir), self.stderr_path)

    def strike(self, output_dir: Path, signum: signal.Signals) -> str | None:
        """Run until a random moment; what the moment was, or None if the run ended before it."""
        process = self.start(output_dir)
        if not wait_for(lambda: catches_signals(process), process):
            raise AssertionError(f"exit status {process.returncode} before the first line")
        is_early = self.random.random() < 0.2
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
        assert status == STATUS[signum], f"exit status {status}: {stderr}"
        return f"{delay:.2f} s after {since}, exit status {status}"

    def finish(self, output_dir: Path) -> None:
        """Let a run come to its end, and compare all that it left."""
        process = self.start(output_dir)
        status = process.wait(PATIENCE)
        assert status == DONE, f"exit status {status}: {self.stderr_path.read_text()}"
        assert_same_samples(read_samples(output_dir), read_samples(self.reference))
        assert root_attributes(output_dir) == root_attributes(self.reference)
        assert read_failed(output_dir) == read_failed(self.reference)
        names = {path.name for path in output_dir.iterdir()}
        assert names == {path.name for path in self.reference.iterdir()}, names

    def check(self, output_dir: Path, before: set[str]) -> set[str]:
        """That all there is, is whole, and nothing of what was there is gone."""
        stored = check_parts(output_dir, self.shapes) if output_dir.exists() else set()
        assert stored >= before, f"lost: {before - stored}"
        failed = read_failed(output_dir).items()
        assert failed <= read_failed(self.reference).items()
        return stored

    def run(self, num_kills: int, num_signals: int) -> int:
        """Use up all the kills and signals; the number of directories they took."""
        gentle = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        faults = [signal.SIGKILL] * num_kills + [gentle[i % 3] for i in range(num_signals)]
        self.random.shuffle(faults)
        count, stored = 1, set()
        while faults:
            output_dir = self.root / f"run_{count}"
            moment = self.strike(output_dir, faults[-1])
            stored = self.check(output_dir, stored)
            if moment:
                name = faults.pop().name
                print(f"{name:8}{moment}: {len(stored)} samples in whole parts", flush=True)
            if moment is None or len(read_samples(output_dir)) == len(read_samples(self.reference)):
                self.finish(output_dir)
                print("done: all as in the uninterrupted run, next directory", flush=True)
                count, stored = count + 1, set()
        self.finish(self.root / f"run_{count}")
        return count


# The program itself, telling its peak and its present memory after every batch.
MEMORY_CODE = """
import pathlib, re, sys
sys.path.insert(0, sys.argv.pop(1))
import run_gemma3_extraction as script
update = script.Progress.update
def tell(self, *counts):
    extracted, failed = update(self, *counts)
    status = pathlib.Path("/proc/self/status").read_text()
    kilobytes = [re.search(rf"{name}:\\\\s+(\\\\d+)", status)[1] for name in ("VmHWM", "VmRSS")]
    print(extracted, *kilobytes, flush=True)
    return extracted, failed
script.Progress.update = tell
raise SystemExit(script.main(sys.argv[1:]))
""".replace("\\\\", "\\")


def measure_memory(root: Path) -> dict[int, tuple[float, float]]:
    """Peak and present memory in MB, by the number of samples extracted."""
    csv_path = write_csv(root / "memory.csv", MEMORY_ROWS[-1], missing_every=0)
    flags = ["--checkpoint-interval", 1000, "--max-new-tokens", 0, "--batch-size", 64]
    arguments = command(csv_path, root / "memory", *flags)[2:]
    process = start(
        [sys.executable, "-c", MEMORY_CODE, str(ROOT), *arguments],
        root / "memory.txt",
        stdout=subprocess.PIPE,
        text=True,
    )
    lines, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (root / "memory.txt").read_text()
    table = (map(int, line.split()) for line in lines.splitlines())
    return {count: (peak / 1024, rss / 1024) for count, peak, rss in table}


def check_memory(root: Path) -> None:
    """That memory does not grow with what has been extracted."""
    memory = measure_memory(root)
    (peak, rss), (last_peak, last_rss) = (memory[count] for count in MEMORY_ROWS)
    print(f"after {MEMORY_ROWS} rows: peak {peak:.0f}, {last_peak:.0f} MB; ", end="")
    print(f"present {rss:.0f}, {last_rss:.0f} MB")
    assert last_peak - peak < MEMORY_LIMIT
    assert last_rss - rss < MEMORY_LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="by SIGKILL")
    parser.add_argument("--signals", type=int, default=10, help="SIGINT, SIGTERM and SIGUSR1")
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        try:
            if args.memory:
                check_memory(Path(root))
            else:
                test = FaultTest(Path(root), args.rows, args.seed)
                print(f"start-up {test.startup:.1f} s, work {test.work:.1f} s", flush=True)
                count = test.run(args.kills, args.signals)
                print(
                    f"{args.kills} kills and {args.signals} signals in {count} directories: ",
                    end="",
                )
        except AssertionError as error:
            print(f"VIOLATED: {error}")
            return 1
    print(f"nothing was lost ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
