"""What a shell, a launcher, a cluster and a colleague do to a run."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch
from conftest import SCRIPT, assert_same_samples, flags, read_samples, write_csv
from fault_test import Program, make_rows, words_of
from PIL import Image

import run_gemma3_extraction as script

Q = "what is it?"
ROWS = [("1", "circle.png", Q, "red"), ("2", "grey.png", "how many?", "NA")]
QUICK = ("--max-new-tokens", 0)


# ─────────────────────────────────────── the log goes away ────────────────────────────────────────


def run_with_log(tmp_path, log, *more, **kwargs):
    """The whole program in a process of its own, its messages going to `log`."""
    command = [sys.executable, str(SCRIPT), *flags(tmp_path / "out", *QUICK, *more)]
    return subprocess.run(command, stderr=log, timeout=300, **kwargs).returncode


def test_a_full_disk_for_the_log_changes_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        assert run_with_log(tmp_path, full) == 0
    assert len(read_samples(tmp_path / "out")) == 28


def test_a_dead_tee_changes_nothing(tmp_path):
    """Nor does a dead reader of what `--test` prints."""
    reader, writer = os.pipe()
    os.close(reader)
    assert run_with_log(tmp_path, writer, "--test", stdout=writer) == 0
    os.close(writer)
    assert len(read_samples(tmp_path / "out")) == 3


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_stream_that_forgives(is_closed, tmp_path):
    with contextlib.closing(open(tmp_path / "log", "w")) as file:
        stream = script.ForgivingStream(file)
        assert stream.write("one\n") == 4
        stream.flush()
        if is_closed:
            file.close()
        assert stream.write("two\n") == 4
        stream.flush()
        assert stream.name == file.name
    assert (tmp_path / "log").read_text() == ("one\n" if is_closed else "one\ntwo\n")


# ──────────────────────────────────────────── launchers ───────────────────────────────────────────


@pytest.fixture
def cards(monkeypatch):
    """So many visible cards, of which `choose_device` takes one."""
    taken = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    empty = torch.empty

    class Stand:
        def __init__(self, device):
            self.device = torch.device(device)

    def fake_empty(*args, device=None):
        return Stand(device) if str(device).startswith("cuda") else empty(*args, device=device)

    monkeypatch.setattr(torch, "empty", fake_empty)

    def choose(num_cards, **variables):
        for name in ("LOCAL_RANK", "SLURM_LOCALID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
        return script.choose_device("cuda").index

    return choose


@pytest.mark.parametrize(
    ("num_cards", "variables", "expected"),
    [
        (8, {"LOCAL_RANK": "3"}, 3),
        (8, {"SLURM_LOCALID": "5"}, 5),
        (8, {"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 2),
        (1, {"SLURM_LOCALID": "5"}, 0),  # one card a task
        (2, {"SLURM_LOCALID": "5"}, 1),
        (2, {"LOCAL_RANK": "", "SLURM_LOCALID": "1"}, 1),
    ],
)
def test_the_card_is_the_launchers_choice(cards, num_cards, variables, expected):
    assert cards(num_cards, **variables) == expected


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"])
def test_a_variable_that_is_no_number_is_named(variable, run_here, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "node7")
    status, stderr = run_here("--device", "cuda", "--overwrite", rows=ROWS)
    assert status == 1
    assert f"{variable}=node7" in stderr.splitlines()[-1]
    assert "unset it" in stderr.splitlines()[-1]


def test_messages_name_what_they_read(run_here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # left over from yesterday
    status, stderr = run_here("--overwrite", rows=ROWS)
    assert (status, "WORLD_SIZE=8 says that a launcher" in stderr) == (1, True)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setenv("RANK", "2")
    _, stderr = run_here("--device", "cuda", rows=ROWS)
    assert "RANK 2: --device cuda:0, by SLURM_LOCALID=3 with 0 visible:" in stderr


@pytest.mark.parametrize("has_launcher", [False, True])
def test_ctrl_c_twice_within_a_second(has_launcher, monkeypatch):
    """A launcher passes on the one that the terminal has sent already."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if has_launcher:
        monkeypatch.setenv("WORLD_SIZE", "1")
    with script.catch_signals() as stops:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stops[0] == 130
        assert ended == ([] if has_launcher else [130])
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
    assert ended


# ─────────────────────────────── locks that reach one host only ───────────────────────────────────


def reach_one_host(script):
    """As on BeeGFS or Lustre's `localflock`: every lock is granted. And every image is slow."""
    script.fcntl.lockf = lambda *_: None
    pid = os.getpid()
    script.socket.gethostname = lambda: f"node-{pid}.cluster"
    open_image = script.open_image

    def open_slowly(*args):
        time.sleep(0.2)
        return open_image(*args)

    script.open_image = open_slowly


@pytest.fixture
def forty_rows(tmp_path):
    return make_rows(tmp_path, 40, per_image=2, missing_every=0)


def start(csv_path, out, number):
    words = words_of(csv_path, out, "--num-workers", 1)
    return Program(words, out.parent / f"stderr_{number}", patch=reach_one_host)


def count_extracted(stderr):
    return int(stderr.splitlines()[-1].split()[1])


def test_hosts_share_the_work_without_common_locks(forty_rows, tmp_path):
    """Without marks each would compute all 40. What others have in hand at the end, a few of these
    small parts, is computed twice.
    """
    out = tmp_path / "out"
    programs = [start(forty_rows, out, number) for number in range(3)]
    ends = [program.end() for program in programs]
    assert [status for status, _ in ends] == [0, 0, 0], ends
    counts = [count_extracted(stderr) for _, stderr in ends]
    assert 40 <= sum(counts) < 100, counts
    assert len(read_samples(out)) == 40
    assert not list(out.glob("*.partial"))
    alone = tmp_path / "alone"
    assert Program(words_of(forty_rows, alone), tmp_path / "err").end()[0] == 0
    assert_same_samples(read_samples(out), read_samples(alone))


def test_what_a_dead_host_had_is_computed_in_the_end(forty_rows, tmp_path):
    """Its mark remains: nobody else can know that it is dead."""
    out = tmp_path / "out"
    out.mkdir()
    mark = out / "gemma3_12b_embeddings_part_002.node-1.cluster-77.partial"
    mark.write_bytes(b"half")
    time.sleep(0.01)
    status, stderr = Program(words_of(forty_rows, out), tmp_path / "err").end()
    assert (status, count_extracted(stderr)) == (0, 40)
    samples = read_samples(out)
    assert len(samples) == 40
    assert [path.name for path in out.glob("*.partial")] == [mark.name]
    created = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert max(created, key=created.get) == script.PART_NAME.format(2)


def test_another_host_at_work_with_other_settings_is_not_mixed_with(forty_rows, tmp_path):
    out = tmp_path / "out"
    first = start(forty_rows, out, 1)
    first.wait_until(lambda: list(out.glob("*.partial")) and (out / "settings.json").exists())
    words = words_of(forty_rows, out, "--layers", 1)
    status, stderr = Program(words, tmp_path / "err", patch=reach_one_host).end()
    assert status == 1
    assert "layers was [0, 2, 4, 6, 7] and is [1]" in stderr.splitlines()[-1]
    first.process.kill()


def test_nobody_puts_a_file_of_another_process_in_place(tmp_path, monkeypatch):
    """Two hosts write the same part at once: each has an unfinished file of its own."""
    path = tmp_path / script.PART_NAME.format(1)
    names = []
    for host in ("one", "other"):
        monkeypatch.setattr(script.socket, "gethostname", lambda host=host: host)
        names.append(script.partial_path(path).name)
    assert len(set(names)) == 2
    assert all(script.OUR_FILES.fullmatch(name) for name in names)
    assert names[0].startswith("gemma3_12b_embeddings_part_001.one_")


def test_overwrite_does_not_delete_what_another_host_works_on(run_here, tmp_path):
    out = tmp_path / "out"
    assert run_here(*QUICK, rows=ROWS)[0] == 0
    mark = out / "gemma3_12b_embeddings_part_007.elsewhere-7.partial"
    mark.touch()
    status, stderr = run_here(*QUICK, "--overwrite", rows=ROWS)
    assert (status, f"delete {mark}" in stderr.splitlines()[-1]) == (1, True)
    assert len(read_samples(out)) == 2


def test_a_directory_that_was_removed_is_not_written_to(run_here, tmp_path, monkeypatch):
    """Another run may be in its place, whose parts would be mixed with ours."""
    out = tmp_path / "out"
    prefill = script.Extractor.prefill

    def remove(self, sequences):
        for path in out.iterdir():
            path.unlink()
        (out / ".lock").touch()
        return prefill(self, sequences)

    monkeypatch.setattr(script.Extractor, "prefill", remove)
    status, stderr = run_here(*QUICK, rows=ROWS)
    assert (status, "was removed during the run" in stderr.splitlines()[-1]) == (1, True)
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_part_of_other_settings_is_never_added_to(run_here, tmp_path, monkeypatch):
    """However it came there since we looked."""
    out = tmp_path / "out"
    other = tmp_path / "other"
    assert run_here(*QUICK, "--layers", 1, rows=ROWS[:1], output_dir=other)[0] == 0
    prefill = script.Extractor.prefill

    def put_other(self, sequences):
        for path in other.glob("*.h5"):
            (out / path.name).write_bytes(path.read_bytes())
        return prefill(self, sequences)

    monkeypatch.setattr(script.Extractor, "prefill", put_other)
    status, stderr = run_here(*QUICK, rows=ROWS)
    assert (status, "layers was [1]" in stderr.splitlines()[-1]) == (1, True)


def die_after_claiming(script):
    """A process that takes a part and dies before it has written it."""
    script.Extractor.encode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_process_had_that_dies_meanwhile_is_done_too(tmp_path):
    """Parts of one picture: they are read, and so claimed, long before the others are done."""
    csv_path = make_rows(tmp_path, 12, per_image=12, missing_every=0)
    out = tmp_path / "out"
    first = Program(words_of(csv_path, out), tmp_path / "first", patch=die_after_claiming)
    second = Program(words_of(csv_path, out), tmp_path / "second", patch=reach_all)
    ends = [first.end(), second.end()]
    assert ends[1][0] == 0, ends
    assert len(read_samples(out)) == 12


def reach_all(script):
    """Begins while the other is at work, and is slow."""
    encode = script.Extractor.encode

    def encode_slowly(self, images):
        time.sleep(3)
        return encode(self, images)

    script.Extractor.encode = encode_slowly


# ─────────────────────────────────── colleagues, disks, diagrams ──────────────────────────────────


def test_a_colleagues_lock_file_is_named(tmp_path, monkeypatch):
    """Its permissions are what keeps us out, not those of the directory."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch(0o644)
    os.chmod(out / ".lock", 0o644)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(script.os, "open", refuse)
    with pytest.raises(script.ExtractionError) as caught:
        script.OutputLock(out)
    assert f"permissions of {out / '.lock'}: -rw-r--r--, of uid {os.getuid()}" in str(caught.value)


def test_compression_may_need_less_room(run_here, monkeypatch, tmp_path):
    usage = script.shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    assert run_here(*QUICK, rows=ROWS)[0] == 1
    status, stderr = run_here(*QUICK, "--compression", "gzip", rows=ROWS)
    assert (status, stderr.count("without compression, so it may not be enough")) == (0, 1)


def test_dropped_transparency_is_one_warning(run_here, tmp_path):
    """Black on transparent becomes black on black."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGBA", (40, 40), (0, 0, 0, 255)).save(images / "opaque.png")
    diagram = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    diagram.putpixel((3, 3), (0, 0, 0, 255))
    diagram.save(images / "diagram.png")
    palette = Image.new("P", (40, 40))
    palette.save(images / "palette.gif", transparency=0)
    rows = [(str(i), path.name, Q, "") for i, path in enumerate(sorted(images.iterdir()))]
    _, stderr = run_here(*QUICK, rows=rows, images_dir=images)
    assert stderr.count("2 images have transparency") == 1
    assert "'diagram.png'" in stderr
    assert "transparency" not in run_here(*QUICK, "--overwrite", rows=ROWS)[1]


def test_the_allocator_of_cuda_keeps_its_memory_in_one_piece():
    """Unless the user has said otherwise; torch reads it as it is imported."""
    code = "import os, run_gemma3_extraction; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    for given, expected in ((None, "expandable_segments:True"), ("backend:native", None)):
        environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
        if given:
            environment["PYTORCH_CUDA_ALLOC_CONF"] = given
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=SCRIPT.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == str(expected)


def test_names_that_are_not_utf8_and_numbers_that_are_too_large(tmp_path, run_here):
    """Told or stored, but not found out when hours are to be written."""
    csv_path = os.fsdecode(bytes(write_csv(tmp_path / "rows.csv", ROWS)).replace(b"rows", b"r\xe9"))
    os.rename(tmp_path / "rows.csv", csv_path)
    words = ("--checkpoint-interval", 10**20)
    status, stderr = run_here(*QUICK, *words, csv_path=csv_path)
    assert status == 0, stderr
    with h5py.File(tmp_path / "out" / script.PART_NAME.format(1)) as part:
        assert part.attrs["dataset"] == "r\\xe9.csv"


def test_a_pipe_named_like_a_part_is_no_part(tmp_path, run_here):
    assert run_here(*QUICK, rows=ROWS)[0] == 0
    os.mkfifo(tmp_path / "out" / script.PART_NAME.format(2))
    status, stderr = run_here(*QUICK, rows=ROWS)
    assert (status, "it is no file" in stderr.splitlines()[-1]) == (1, True)
