"""Kill the real program again and again, and see that nothing is lost.

    python tests/fault_test.py --kills 30 --signals 10
    python tests/fault_test.py --memory

Every run is ended by a signal at a random moment and started again with the same command; whatever
is in the output directory then must be whole, and in the end all must be as in an uninterrupted
run. Exit status 1 if anything is not.
"""

import argparse
import atexit
import dataclasses
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import conftest
from conftest import assert_same_samples, flags, read_csv, read_failed, read_samples, write_csv

import run_gemma3_extraction as script

GENTLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STATUS = dict.fromkeys(GENTLE, 143) | {signal.SIGINT: 130, signal.SIGKILL: -9}
DONE = 3  # every row has its outcome: one in 20 has an image that is not there
PATIENCE = 300  # seconds, on a machine that has better things to do
MEMORY_ROWS, MEMORY_LIMIT = (1500, 5000), 50  # MB
PART_1 = script.PART_NAME.format(1)
SETTINGS = script.Settings(**{one.name: "as ever" for one in dataclasses.fields(script.Settings)})
MODELS = "transformers.models"
WARM = [f"{MODELS}.gemma3.{name}_gemma3" for name in ("processing", "image_processing_pil")]
WARM += [f"{MODELS}.siglip.modeling_siglip", f"{MODELS}.gemma.tokenization_gemma", "fault_test"]
# Python 3.11 gives its fork server no other path.
os.environ["PYTHONPATH"] = f"{conftest.TESTS}:{conftest.ROOT}:{os.environ.get('PYTHONPATH', '')}"


def make_rows(root: Path, num_rows: int, missing_every: int = 20, per_image: int = 3) -> Path:
    """A CSV of the test data over and over, under other ids and other names of the images.

    The images go to `images` beside it; some rows ask about one that is not there.
    """
    texts, images = list(read_csv().values()), sorted(conftest.IMAGES.iterdir())
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(num_rows):
        text, image = texts[i % len(texts)], images[i // per_image % len(images)]
        image_id = f"{i // per_image}_{image.name}"
        if i % per_image == 0:
            (root / "images" / image_id).symlink_to(image)
        if missing_every and i % missing_every == missing_every - 1:
            image_id = f"missing_{i % 3}.png"
        rows.append((f"{i}/{text['question_id']}", image_id, text["question"], text["answer"]))
    return write_csv(root / "rows.csv", rows)


def words_of(csv_path: Path, output_dir: Path, *more) -> list[str]:
    """The tiny model's command line: many small parts, few questions side by side."""
    small = ("--max-new-tokens", 4, "--checkpoint-interval", 4, "--batch-size", 3)
    images_dir = csv_path.parent / "images"
    return flags(output_dir, *small, *more, csv_path=csv_path, images_dir=images_dir)


# ─────────────────────────── the program, with its imports behind it ───────────────────────────
def warm_process(target, *args):
    """A process that has started, with torch and transformers imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    atexit.register(process.kill)  # it may be one that heeds no SIGTERM
    return process


class Program:
    """The whole program in a process of its own; `patch` is shown the script before it runs."""

    def __init__(self, words: list[str], stderr_path: Path, patch=None) -> None:
        self._stderr_path = stderr_path
        stderr_path.write_text("")
        self.process = warm_process(run_program, words, stderr_path, patch)

    def send_signal(self, signum: int) -> None:
        """Unless it has ended."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, signum)

    def stderr(self) -> str:
        """So far."""
        return self._stderr_path.read_text()

    def end(self) -> tuple[int, str]:
        """Its exit status once it has ended, negative if a signal did that; and its stderr."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "the program hangs"
        assert "Traceback" not in self.stderr(), self.stderr()
        return self.process.exitcode, self.stderr()

    def wait_until(self, is_reached) -> None:
        """Until it has come to something, or has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.exitcode is None and not is_reached():
            assert time.monotonic() < deadline, "the program hangs"
            time.sleep(0.01)

    def is_extracting(self) -> bool:
        """Whether it has begun; before that, signals do what they do to any program."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)


def run_program(words: list[str], stderr_path: Path, patch) -> None:
    """What a `Program` does."""
    multiprocessing.set_start_method("fork", force=True)  # as in any program: tqdm looks
    os.dup2(os.open(stderr_path, os.O_WRONLY | os.O_TRUNC), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    for signum in GENTLE:
        signal.signal(signum, signal.SIG_DFL)
    if patch:
        patch(script)
    raise SystemExit(script.main(words))


# ────────────────────────────────────── kills and signals ──────────────────────────────────────
class FaultTest:
    """One data set, an uninterrupted run over it, and what the others need to know of that."""

    def __init__(self, root: Path, num_rows: int, seed: int) -> None:
        self.root, self.random, self.csv_path = root, random.Random(seed), make_rows(root, num_rows)
        warm_process(int).join()
        began = time.monotonic()
        assert self.start(root / "reference").end()[0] == DONE
        self.seconds = time.monotonic() - began
        self.expected = read_samples(root / "reference")

    def start(self, output_dir: Path) -> Program:
        return Program(words_of(self.csv_path, output_dir), self.root / "stderr.txt")

    def strike(self, output_dir: Path, signum: signal.Signals) -> bool:
        """Run until a random moment; whether that came before the end."""
        program = self.start(output_dir)
        if signum != signal.SIGKILL:
            program.wait_until(program.is_extracting)
        time.sleep(self.random.uniform(0, self.seconds / 2))
        program.send_signal(signum)
        status, stderr = program.end()
        has_ended = "Extracted" in stderr  # and is on its way out, or gone
        expected = (DONE, -signum, 130) if has_ended else (STATUS[signum],)
        assert status in expected, f"exit status {status}: {stderr}"
        return not has_ended

    def check(self, output_dir: Path, before: set[str]) -> set[str]:
        """That all there is, is whole, and nothing of what was there is gone."""
        found = read_samples(output_dir)
        assert found.keys() >= before, f"lost: {before - found.keys()}"
        assert_same_samples(found, {name: self.expected[name] for name in found})
        assert read_failed(output_dir).items() <= read_failed(self.root / "reference").items()
        return set(found)

    def finish(self, output_dir: Path, stored: set[str]) -> None:
        """Let a run come to its end, and compare all that it left."""
        status, stderr = self.start(output_dir).end()
        assert status == DONE, f"exit status {status}: {stderr}"
        self.check(output_dir, stored)
        assert list(read_samples(output_dir)) == list(self.expected), "samples, in the plan's order"
        assert read_failed(output_dir) == read_failed(self.root / "reference")
        names = {path.name for path in output_dir.iterdir()}
        assert names == {path.name for path in (self.root / "reference").iterdir()}, names

    def run(self, num_kills: int, num_signals: int) -> None:
        """Use up all the kills and signals, in as many directories as they take."""
        faults = [signal.SIGKILL] * num_kills + [GENTLE[i % 4] for i in range(num_signals)]
        self.random.shuffle(faults)
        count, stored = 1, set()
        while faults:
            output_dir = self.root / f"run_{count}"
            is_struck = self.strike(output_dir, faults[-1])
            stored = self.check(output_dir, stored)
            if is_struck:
                print(f"{faults.pop().name}: {len(stored)} samples in whole parts", flush=True)
            if not is_struck or len(stored) == len(self.expected) or not faults:
                self.finish(output_dir, stored)
                count, stored = count + 1, set()


# ─────────────────────────────────────────── memory ────────────────────────────────────────────
def tell_memory(script) -> None:
    """Let the program tell its peak and its present memory, in kB."""
    record = script.Recorder.record

    def tell(self, outcome):
        record(self, outcome)
        if self.num_extracted in MEMORY_ROWS:
            told = re.findall(r"(?:VmHWM|VmRSS):\s+\d+", Path("/proc/self/status").read_text())
            print(*told, sep="\n", file=sys.stderr)

    script.Recorder.record = tell


def check_memory(root: Path) -> None:
    """That memory does not grow with what has been extracted."""
    csv_path = make_rows(root, MEMORY_ROWS[-1], missing_every=0, per_image=10)
    more = ("--checkpoint-interval", 1000, "--max-new-tokens", 0, "--batch-size", 64)
    program = Program(words_of(csv_path, root / "out", *more), root / "err", patch=tell_memory)
    status, stderr = program.end()
    assert status == 0, stderr
    for name in ("VmHWM", "VmRSS"):
        first, last = (int(told) / 1024 for told in re.findall(rf"{name}:\s+(\d+)", stderr))
        print(f"{name} after {MEMORY_ROWS} rows: {first:.0f}, {last:.0f} MB")
        assert last - first < MEMORY_LIMIT, "memory grows"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"kills": 30, "signals": 10, "rows": 150, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        try:
            if args.memory:
                check_memory(Path(root))
            else:
                FaultTest(Path(root), args.rows, args.seed).run(args.kills, args.signals)
        except AssertionError as error:
            print(f"VIOLATED: {error}")
            return 1
    print("nothing was lost")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
