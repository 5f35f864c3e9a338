"""Going on: what is stored stays, what changed is noticed, what is damaged is computed again."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import h5py
import pytest
from conftest import (
    IMAGES,
    MODEL,
    ROOT,
    assert_same_samples,
    flags,
    read_failed,
    read_samples,
    write_csv,
)

import run_gemma3_extraction as script

PART = script.PART_NAME.format(1)
Q = "what is it?"
GOOD = [
    ("good 1", "circle.png", "what color is the shape?", "red"),
    ("good 2", "circle.png", "how many?", "NA"),
    ("good 3", "wide.jpg", "a < b <tag> & {question}?", ""),
    ("good 4", "circle.png", "is it round?", "yes"),
]
NAMES = {row[0] for row in GOOD}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run over the good rows."""
    out = tmp_path_factory.mktemp("finished") / "out"
    csv_path = write_csv(out.parent / "rows.csv", GOOD)
    with contextlib.redirect_stderr(io.StringIO()):
        assert script.main(flags(out, csv_path=csv_path)) == 0
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def done(finished, out):
    """A copy of a finished run, as the run to come finds it."""
    return shutil.copytree(finished, out)


@pytest.fixture
def no_model(monkeypatch):
    """What is wrong must be found before the model is loaded."""
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("the model was loaded first"))


def assert_refused(found, *culprits):
    """Refused in one clear line that names the culprits and what to do, without a traceback."""
    status, stderr = found
    assert status == 1, stderr
    assert "Traceback" not in stderr
    for culprit in (*culprits, " | "):
        assert str(culprit) in stderr.splitlines()[-1]


def last_line(stderr):
    """Without the time."""
    return stderr.splitlines()[-1].rpartition(" in ")[0]


def leave_out(samples, *without):
    """Samples without some of what they hold."""
    return {
        question_id: {name: value for name, value in sample.items() if name not in without}
        for question_id, sample in samples.items()
    }


# ────────────────────────────────────── what is done is done ─────────────────────────────────────


def test_finished_run_loads_no_model(run_here, done, no_model):
    before = (done / PART).read_bytes()
    status, stderr = run_here(rows=GOOD)
    assert status == 0
    assert last_line(stderr) == "Extracted 0 of 4 samples (0 failed, 4 already done)"
    assert (done / PART).read_bytes() == before


def test_leftovers_of_a_killed_run_are_removed(run_here, done, no_model):
    leftovers = ["gemma3_12b_embeddings_part_002.partial", "failed_samples.partial"]
    for name in (*leftovers, "mine.partial"):
        (done / name).write_bytes(b"half")
    assert run_here(rows=GOOD)[0] == 0
    assert {path.name for path in done.iterdir()} == {PART, ".lock", "mine.partial"}


@pytest.mark.parametrize("content", ["", '{"settings": {"a": 1}, "processes": [1]}', "\0garbage"])
def test_lock_file_of_a_dead_run_is_no_obstacle(content, run_here, done, no_model):
    (done / ".lock").write_text(content)
    assert run_here(rows=GOOD)[0] == 0


# ─────────────────────────────────────── rows that failed ────────────────────────────────────────


def test_failed_rows_are_tried_again_and_the_list_shrinks(run_here, out, tmp_path):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    rows = [*GOOD[:2], ("bad 1", "late.png", Q, ""), ("bad 2", "never.png", Q, "")]
    assert run_here(rows=rows, images_dir=images)[0] == 3
    assert read_failed(out).keys() == {"bad 1", "bad 2"}
    shutil.copy(IMAGES / "grey.png", images / "late.png")
    status, stderr = run_here(rows=rows, images_dir=images)
    assert status == 3
    assert last_line(stderr) == "Extracted 1 of 4 samples (1 failed, 2 already done)"
    assert read_failed(out).keys() == {"bad 2"}
    assert run_here(rows=rows[:3], images_dir=images)[0] == 0  # "bad 2" left the CSV
    assert not (out / "failed_samples.csv").exists()
    assert read_samples(out).keys() == {"good 1", "good 2", "bad 1"}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"a\0b\n", b'"open', b"1;2;3\n4;5;6\n"])
def test_list_of_failures_that_somebody_spoilt_is_written_anew(content, run_here, done):
    (done / "failed_samples.csv").write_bytes(content)
    status, stderr = run_here(rows=[*GOOD, ("bad", "nowhere.png", Q, "")])
    assert status == 3, stderr
    assert read_failed(done).keys() == {"bad"}


def test_parts_whose_rows_all_failed_are_written_empty(run_here, out):
    """With ids that have line breaks of every kind."""
    ids = ["bad\u2028id", "bad\x0cid", "bad\x85id", "bad\nid", "bad\rid"]
    rows = [GOOD[0], *((question_id, "no\u0085pe\n.png", Q, "") for question_id in ids)]
    for _ in range(2):
        assert run_here("--checkpoint-interval", 1, rows=rows)[0] == 3
        assert read_failed(out).keys() == set(ids)
        counts = []
        for k in range(1, 7):
            with h5py.File(out / script.PART_NAME.format(k)) as file:
                counts.append((len(file), int(file.attrs["num_samples"])))
        assert counts == [(1, 1), *[(0, 0)] * 5]
    status, stderr = run_here("--checkpoint-interval", 1, "--strict", rows=rows)
    assert status == 1
    assert "pe .png does not exist" in stderr.splitlines()[-1]  # in one line


def test_a_directory_whose_name_is_no_text_spoils_no_list(run_here, out, tmp_path):
    images_dir = tmp_path / os.fsdecode(b"images\xff")
    images_dir.mkdir()
    shutil.copy(IMAGES / "circle.png", images_dir)
    rows = [GOOD[0], ("bad", "nowhere.png", Q, "")]
    status, stderr = run_here(rows=rows, images_dir=images_dir)
    assert (status, "Traceback" in stderr) == (3, False)
    assert read_failed(out).keys() == {"bad"}


def test_a_list_of_failures_that_cannot_be_written_costs_no_part(run_here, out, monkeypatch):
    replace = os.replace

    def full_disk(source, target):
        if str(target).endswith(".csv"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    rows = [*GOOD[:2], ("bad", "nowhere.png", Q, "")]
    with monkeypatch.context() as patch:
        patch.setattr(script.os, "replace", full_disk)
        status, stderr = run_here(rows=rows)
    assert status == 1
    assert "No space left on device" in stderr.splitlines()[-1]
    assert "room" in stderr.splitlines()[-1]
    assert {path.name for path in out.glob("gemma3*")} == {PART}
    status, stderr = run_here(rows=rows)
    assert last_line(stderr) == "Extracted 0 of 3 samples (1 failed, 2 already done)"


# ──────────────────────────────────────── other settings ─────────────────────────────────────────


OTHER_SETTINGS = {
    "layers": (["--layers", "1,2"], "layers was [0, 2, 4, 6, 7] and is [1, 2]"),
    "max_new_tokens": (["--max-new-tokens", 5], "max_new_tokens was 6 and is 5"),
    "dtype": (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
    "interval": (["--checkpoint-interval", 7], "checkpoint_interval was 1000 and is 7"),
    "storage": (
        ["--storage-dtype", "bfloat16"],
        "storage_dtype was 'float32' and is 'bfloat16'",
    ),
    "several": (
        ["--layers", "all", "--max-new-tokens", 5],
        "layers was [0, 2, 4, 6, 7] and is [0, 1, 2, 3, 4, 5, 6, 7]; max_new_tokens was 6 and is 5",
    ),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_with_both_values(name, run_here, done, no_model):
    words, difference = OTHER_SETTINGS[name]
    before = (done / PART).read_bytes()
    assert_refused(run_here(*words, rows=GOOD), PART, difference, "--overwrite")
    assert (done / PART).read_bytes() == before


def test_the_version_before_is_refused(run_here, done, no_model):
    with h5py.File(done / PART, "a") as file:
        file.attrs["schema_version"] = 1
    before = (done / PART).read_bytes()
    assert_refused(run_here(rows=GOOD), PART, "schema_version was 1 and is 2", "--overwrite")
    assert (done / PART).read_bytes() == before


def copy_model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def test_the_same_model_by_another_path_goes_on(run_here, done, tmp_path):
    words = ["--model", copy_model(tmp_path)]
    assert run_here(*words, rows=GOOD)[0] == 0
    status, stderr = run_here(*words, rows=[*GOOD, ("new", "wide.jpg", Q, "")])
    assert status == 0
    assert last_line(stderr) == "Extracted 1 of 5 samples (0 failed, 4 already done)"


def test_another_prompt_is_refused(run_here, done, no_model, tmp_path):
    model = copy_model(tmp_path)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "Well,")
    names = (f"model_name was '{MODEL}' and is '{model}'", "model_revision was")
    assert_refused(run_here("--model", model, rows=GOOD), *names, "prompt was", "Well,")


def test_other_weights_of_the_same_size_are_refused(run_here, done, no_model, tmp_path):
    from safetensors.torch import load_file, save_file

    path = copy_model(tmp_path) / "model.safetensors"
    size = path.stat().st_size
    weights = load_file(path)
    weights[max(weights)] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == size
    names = (f"model_name was '{MODEL}' and is '{path.parent}'", "model_revision was")
    assert_refused(run_here("--model", path.parent, rows=GOOD), *names)


# ───────────────────────────────────────── another CSV ───────────────────────────────────────────


def test_rows_put_in_front_reordered_and_corrected_go_on(run_here, done, finished):
    """What is stored stays where it is, with its place and ground truth brought up to date."""
    corrected = {"good 2": ("good 2", *GOOD[1][1:3], "two")}
    rows = [("new", "wide.jpg", Q, ""), *(corrected.get(row[0], row) for row in reversed(GOOD))]
    status, stderr = run_here(rows=rows)
    assert status == 0, stderr
    assert last_line(stderr) == "Extracted 1 of 5 samples (0 failed, 4 already done)"
    told = [line for line in stderr.splitlines() if "up to date" in line]
    assert len(told) == 1
    assert "of 3 samples" in told[0]  # the third of four is the third of five
    before, after = read_samples(finished), read_samples(done)
    assert after.keys() == NAMES | {"new"}
    assert {q: sample["row"] for q, sample in after.items()} == {
        row[0]: index for index, row in enumerate(rows)
    }
    assert {q: sample["ground_truth_answer"] for q, sample in after.items()} == {
        row[0]: row[3] for row in rows
    }
    del after["new"]
    free = ("row", "ground_truth_answer")
    assert_same_samples(leave_out(after, *free), leave_out(before, *free), bound=0)
    with h5py.File(done / PART) as file:
        link = file["good 2"].get("vision_only_representation", getlink=True)
        assert isinstance(link, h5py.SoftLink)
    status, stderr = run_here(rows=rows)
    assert (status, "up to date" in stderr) == (0, False)


def test_rows_that_left_the_csv_stay_in_the_files(run_here, done, no_model, finished):
    status, stderr = run_here(rows=GOOD[:2])
    assert status == 0
    assert last_line(stderr) == "Extracted 0 of 2 samples (0 failed, 2 already done)"
    assert_same_samples(read_samples(done), read_samples(finished), bound=0)


def test_several_parts_are_brought_up_to_date_in_one_line_or_not_at_all(run_here, out):
    words = ["--checkpoint-interval", 1, "--max-new-tokens", 0]
    assert run_here(*words, rows=GOOD)[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.h5")}
    changed = [(*row[:2], "is it?", *row[3:]) if row[0] == "good 3" else row for row in GOOD]
    assert_refused(run_here(*words, rows=changed[::-1]), "'good 3'")
    assert {path.name: path.read_bytes() for path in out.glob("*.h5")} == before
    status, stderr = run_here(*words, rows=GOOD[::-1])
    assert status == 0
    (told,) = [line for line in stderr.splitlines() if "up to date" in line]
    assert "of 4 samples" in told
    assert [read_samples(out)[row[0]]["row"] for row in GOOD] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("column", "name", "new"), [(1, "image_id", "tall.jpeg"), (2, "question", "is it?")]
)
def test_row_changed_under_its_id_is_refused(column, name, new, run_here, done, no_model):
    rows = [list(row) for row in GOOD]
    old, rows[1][column] = rows[1][column], new
    before = (done / PART).read_bytes()
    found = run_here(rows=rows[::-1])
    assert_refused(found, "'good 2'", name, f"was {old!r} and is {new!r}", "--overwrite")
    assert (done / PART).read_bytes() == before


def test_a_text_that_is_gone_is_damage_when_texts_are_read(run_here, done, finished):
    with h5py.File(done / PART, "a") as file:
        del file["good 2/question"]
    status, stderr = run_here(rows=[*GOOD, ("new", "wide.jpg", Q, "")])
    assert status == 0, stderr
    assert f"{PART} is damaged" in stderr
    after = read_samples(done)
    del after["new"]
    assert_same_samples(after, read_samples(finished))


# ──────────────────────────────────────── another image ──────────────────────────────────────────


def test_an_image_replaced_under_its_name_is_refused(run_here, done, tmp_path):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    shutil.copy(IMAGES / "grey.png", images / "circle.png")
    before = read_samples(done)
    rows = [*GOOD, ("new", "circle.png", Q, "")]
    found = run_here(rows=rows, images_dir=images)
    assert_refused(found, "'circle.png' has changed", "'good 1'", "--overwrite")
    assert_same_samples(read_samples(done), before, bound=0)
    shutil.copy(IMAGES / "circle.png", images / "circle.png")
    assert run_here(rows=rows, images_dir=images)[0] == 0


def test_what_was_answered_before_the_replaced_image_is_saved(run_here, done, tmp_path):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    shutil.copy(IMAGES / "grey.png", images / "wide.jpg")
    rows = [*GOOD, ("new 1", "grey.png", Q, ""), ("new 2", "wide.jpg", Q, "")]
    by_image = [*rows[:2], rows[3], rows[4], rows[2], rows[5]]
    assert_refused(run_here(rows=by_image, images_dir=images), "'wide.jpg' has changed")
    assert read_samples(done).keys() == NAMES | {"new 1"}


def test_a_lost_image_sha256_is_damage(run_here, done, finished):
    with h5py.File(done / PART, "a") as file:
        del file["good 1"].attrs["image_sha256"]
    rows = [*GOOD, ("new", "circle.png", Q, "")]
    assert run_here(rows=rows)[0] in (0, 1)
    status, stderr = run_here(rows=rows)
    assert status == 0, stderr
    after = read_samples(done)
    del after["new"]
    assert_same_samples(after, read_samples(finished))


# ──────────────────────────────────────── damaged parts ──────────────────────────────────────────


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def lose_a_sample(path):
    with h5py.File(path, "a") as file:
        del file["good 2"]


@pytest.mark.parametrize("damage", [cut_short, lose_a_sample])
def test_damaged_part_is_set_aside_and_computed_again(damage, run_here, done, finished):
    damage(done / PART)
    status, stderr = run_here(rows=GOOD)
    assert status == 0, stderr
    (aside,) = done.glob("*damaged*")
    (told,) = [line for line in stderr.splitlines() if "damaged" in line]
    assert f"{PART} is damaged" in told
    assert aside.name in told
    assert last_line(stderr) == "Extracted 4 of 4 samples (0 failed, 0 already done)"
    assert_same_samples(read_samples(done), read_samples(finished))


def test_a_sample_that_nobody_reads_stops_no_run_and_verify_finds_it(run_here, out, tmp_path):
    """Its object header is gone, which shows in no list of names."""
    images = shutil.copytree(IMAGES, tmp_path / "images")
    rows = [*GOOD[:2], ("late", "late.png", Q, "")]
    assert run_here(rows=rows, images_dir=images)[0] == 3
    with h5py.File(out / PART) as file:
        place = h5py.h5o.get_info(file["good 2"].id).addr
    with open(out / PART, "r+b") as file:
        file.seek(place + 4)
        file.write(bytes(16))
    shutil.copy(IMAGES / "grey.png", images / "late.png")
    status, stderr = run_here(rows=rows, images_dir=images)
    assert status == 0, stderr
    with h5py.File(out / PART) as part:
        assert set(part) == {row[0] for row in rows}
        assert part["late/answer"].shape == ()
    verify = [sys.executable, ROOT / "inspect_h5.py", out, "--verify"]
    found = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "cannot be read as a part" in found.stdout


@pytest.mark.parametrize("more", [[], [("new", "circle.png", Q, "")]])
def test_a_part_that_a_dead_program_left_open_is_not_done(run_here, done, more):
    """HDF5 marks it, and no reader opens it by its name."""
    die = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'a'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", die, done / PART], check=False)
    with pytest.raises(OSError, match="h5clear"):
        h5py.File(done / PART)
    assert run_here(rows=[*GOOD, *more])[0] == 0
    assert read_samples(done).keys() == NAMES | {row[0] for row in more}


def test_a_part_that_cannot_be_added_to_stops_no_run_for_good(run_here, done):
    """What is damaged is where there is room in it: nobody looks there before writing."""
    content = bytearray((done / PART).read_bytes())
    place = content.index(b"FSHD")
    content[place + 8] ^= 1
    (done / PART).write_bytes(content)
    rows = [*GOOD, ("new", "circle.png", Q, "")]
    status, stderr = run_here(rows=rows)
    assert status == 1
    assert f"{PART} is damaged" in stderr
    assert "the same command goes on" in stderr.splitlines()[-1]
    assert run_here(rows=rows)[0] == 0
    assert read_samples(done).keys() == NAMES | {"new"}
    assert len(list(done.glob("*.damaged-*"))) == 1


def test_a_part_copied_over_another_is_computed_again(run_here, out):
    words, rows = ["--checkpoint-interval", 2, "--max-new-tokens", 0], GOOD
    assert run_here(*words, rows=rows)[0] == 0
    before = read_samples(out)
    first, second = (out / script.PART_NAME.format(k) for k in (1, 2))
    shutil.copy(first, second)
    status, stderr = run_here(*words, rows=rows)
    assert status == 0
    assert f"{second} is damaged" in stderr
    assert f"stands in {PART} already" in stderr
    assert last_line(stderr) == "Extracted 2 of 4 samples (0 failed, 2 already done)"
    assert_same_samples(read_samples(out), before)
    # So it is if what it repeats has other texts, and comes from another CSV.
    shutil.copy(first, second)
    with h5py.File(second, "r+") as file:
        name = next(iter(file))
        del file[name]["question"]
        file[name]["question"] = "as it was once"
        file.attrs["dataset_sha256"] = "another"
    status, stderr = run_here(*words, rows=rows)
    assert status == 0
    assert f"{second} is damaged" in stderr
    assert_same_samples(read_samples(out), before)


@contextlib.contextmanager
def other_program(code, *words):
    """It says 1 when it is ready, and ends when it may."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(1, flush=True)\ninput()", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "1\n"
        yield process
    finally:
        process.communicate("\n", timeout=60)


def test_part_that_somebody_has_open_is_not_damaged(run_here, done, no_model):
    """HDF5 locks what a notebook opened for writing; that is no reason to set the part aside."""
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'a')"
    with other_program(code, done / PART):
        assert_refused(run_here(rows=GOOD), done / PART, "open in another program")
    assert (done / PART).exists()
    assert run_here(rows=GOOD)[0] == 0


# ──────────────────────────────────── others in the directory ────────────────────────────────────


@pytest.mark.parametrize("content", [b"4242\n", b"[1]", b"\xff\xfe"])
def test_somebody_elses_lock_file_is_taken_over(run_here, out, content):
    out.mkdir()
    (out / ".lock").write_bytes(content)
    assert run_here(rows=GOOD)[0] == 0
    assert b"settings" in (out / ".lock").read_bytes()


# Holds the directory as a process at work does, and parts of it: a POSIX lock does not keep its
# own process out.
HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "r+")
fcntl.lockf(lock, fcntl.LOCK_SH, 1, 0)
for part in sys.argv[2:]:
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(part))
"""


def test_rows_in_others_hands_are_named_in_the_last_line(run_here, out):
    words = ["--checkpoint-interval", 1, "--max-new-tokens", 0]
    assert run_here(*words, rows=GOOD)[0] == 0
    for k in (2, 3):
        (out / script.PART_NAME.format(k)).unlink()
    record = json.loads((out / ".lock").read_text())
    (out / ".lock").write_text(json.dumps(record | {"done": []}))
    with other_program(HOLD, out / ".lock", 2):
        status, stderr = run_here(*words, rows=GOOD)
    assert status == 0, stderr
    told = "Extracted 1 of 4 samples (0 failed, 2 already done, 1 in other processes)"
    assert last_line(stderr) == told
    assert read_samples(out).keys() == NAMES - {"good 2"}


# ────────────────────────────────────────── --overwrite ──────────────────────────────────────────


def test_overwrite_deletes_the_programs_own_files_only(run_here, done):
    own = ["gemma3_12b_embeddings_part_007.h5", "gemma3_12b_embeddings_part_1234.h5"]
    own += ["gemma3_12b_embeddings_part_002.partial", "failed_samples.csv"]
    own += ["gemma3_12b_embeddings_part_003.damaged-0123abcd"]
    mine = ["failed_samples_of_last_week.csv", "failed_samples.xlsx", "notes.txt", "my.h5"]
    mine += ["gemma3_12b_embeddings_part_001_pca.png", "gemma3_12b_embeddings_part_001.h5.bak"]
    for name in (*own, *mine):
        (done / name).write_bytes(b"old")
    (done / "failed_samples").mkdir()
    assert run_here("--overwrite", "--layers", "1", rows=GOOD)[0] == 0
    assert {path.name for path in done.iterdir()} == {PART, *mine, "failed_samples", ".lock"}
    with h5py.File(done / PART) as file:
        assert file.attrs["layers"].tolist() == [1]


def test_overwrite_is_refused_while_others_are_at_work(run_here, done, finished):
    with other_program(HOLD, done / ".lock"):
        assert_refused(run_here("--overwrite", rows=GOOD), "--overwrite", "at work", done)
        status, _ = run_here("--overwrite", "--layers", "1", rows=GOOD)
        assert status == 1
    assert_same_samples(read_samples(done), read_samples(finished), bound=0)
    assert run_here("--overwrite", rows=GOOD)[0] == 0


def test_overwrite_is_refused_for_several_processes(run_here, done, no_model, monkeypatch):
    monkeypatch.setattr(script, "NUM_RANKS", 2)
    before = (done / PART).read_bytes()
    assert_refused(run_here("--overwrite", rows=GOOD), "--overwrite", "one process")
    assert (done / PART).read_bytes() == before


def test_overwrite_keeps_what_is_there_when_the_model_does_not_load(run_here, done, tmp_path):
    model = copy_model(tmp_path)
    os.truncate(model / "model.safetensors", 100_000)
    before = (done / PART).read_bytes()
    assert_refused(run_here("--overwrite", "--model", model, rows=GOOD), model)
    assert (done / PART).read_bytes() == before


def test_overwrite_keeps_what_is_there_when_the_disk_is_too_small(run_here, done, monkeypatch):
    size = sum(path.stat().st_size for path in done.glob("*.h5"))
    before = (done / PART).read_bytes()
    usage = shutil.disk_usage(done)._replace(free=0)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    rows = [(f"{i}", *GOOD[0][1:]) for i in range(size // 2000)]
    assert_refused(run_here("--overwrite", rows=rows), done, "free", "needs")
    assert (done / PART).read_bytes() == before
    assert run_here("--overwrite", rows=GOOD[:1])[0] == 0  # which takes less than what goes
    assert read_samples(done).keys() == {"good 1"}


def test_the_lock_file_tells_who_is_there(run_here, done, no_model):
    """Nobody, once a run has ended; with the settings for the next one to compare."""
    assert run_here(rows=GOOD)[0] == 0
    record = json.loads((done / ".lock").read_text())
    assert record["processes"] == []
    assert record["settings"]["layers"] == [0, 2, 4, 6, 7]
