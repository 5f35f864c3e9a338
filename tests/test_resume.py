"""Going on: what is stored stays, what changed is noticed, what cannot be read is named."""

import contextlib
import io
import os
import shutil

import h5py
import pytest
from conftest import IMAGES, MODEL, assert_same_samples, flags, read_failed, read_samples, write_csv

import run_gemma3_extraction as script

PART = script.PART_NAME.format(1)
SECOND = script.PART_NAME.format(2)
DEAD = f"{script.host_name()}-{2**22 + 1}"  # no process has such a number
DEAD_PART = f"gemma3_12b_embeddings_part_002.{DEAD}.partial"
Q = "what is it?"
GOOD = [  # about images in the order of the plan
    ("good 1", "circle.png", "what color is the shape?", "red"),
    ("good 2", "circle.png", "how many?", "NA"),
    ("good 4", "circle.png", "is it round?", "yes"),
    ("good 3", "wide.jpg", "a < b <tag> & {question}?", ""),
]
PAIRS = ("--checkpoint-interval", 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run over the good rows, two parts of two."""
    out = tmp_path_factory.mktemp("finished") / "out"
    csv_path = write_csv(out.parent / "rows.csv", GOOD)
    with contextlib.redirect_stderr(io.StringIO()):
        assert script.main(flags(out, *PAIRS, csv_path=csv_path)) == 0
    return out


@pytest.fixture
def done(finished, tmp_path):
    """A copy of a finished run, as the run to come finds it."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def no_model(monkeypatch):
    """What is wrong, or needs nothing, must be found before the model is loaded."""
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("the model was loaded first"))


def assert_refused(found, *culprits):
    """Refused in one clear line that names the culprits and what to do, without a traceback."""
    status, stderr = found
    assert (status, "Traceback" in stderr) == (1, False), stderr
    for culprit in (*culprits, " | "):
        assert str(culprit) in stderr.splitlines()[-1]


def last_line(found):
    """Exit status, and the last line without the time."""
    return found[0], found[1].splitlines()[-1].rpartition(" in ")[0]


def parts_of(out):
    return {path.name: path.read_bytes() for path in out.glob("*.h5")}


def test_finished_run_loads_no_model_and_removes_what_a_killed_one_left(run_here, done, no_model):
    before = parts_of(done)
    for name in (DEAD_PART, f"settings.{DEAD}.partial", "mine.partial"):
        (done / name).write_bytes(b"half")
    assert "(0 failed, 4 already done)" in last_line(run_here(*PAIRS, rows=GOOD))[1]
    assert parts_of(done) == before
    names = {path.name for path in done.iterdir()}
    assert names == {PART, SECOND, ".lock", "settings.json", "mine.partial"}


def test_failed_rows_are_tried_again_and_take_their_places(run_here, tmp_path):
    """The list shrinks; groups stand as planned; what all failed is there, empty."""
    images, out = shutil.copytree(IMAGES, tmp_path / "images"), tmp_path / "out"
    bad = [(f"bad\u2028\r\n{i}", f"late{i}\n.png", Q, "") for i in range(4)]
    rows, words = [bad[0], GOOD[0], bad[1], GOOD[3], *bad[2:]], ("--checkpoint-interval", 4)
    for late, told in ((None, "2 of 6 samples (4 failed, 0"), (1, "1 of 6 samples (3 failed, 2")):
        if late:
            shutil.copy(IMAGES / "grey.png", images / bad[late][1])
        found = run_here(*words, rows=rows, images_dir=images)
        assert last_line(found) == (3, f"Extracted {told} already done)")
        assert read_failed(out)[bad[3][0]][1].endswith("late3\n.png does not exist, or is no file")
        with h5py.File(out / PART) as file, h5py.File(out / SECOND) as empty:
            assert list(file) == [row[0] for row in rows[:4] if row[0] not in read_failed(out)]
            counts = [(len(part), part.attrs["num_samples"]) for part in (file, empty)]
        assert counts == [(3 if late else 2,) * 2, (0, 0)]
    assert run_here(*words, rows=rows[1:4], images_dir=images)[0] == 0
    assert not (out / "failed_samples.csv").exists()  # the others left the CSV


OTHER_SETTINGS = {
    "layers": (["--layers", "1,2"], "layers was [0, 2, 4, 6, 7] and is [1, 2]"),
    "interval": (["--checkpoint-interval", 7], "checkpoint_interval was 2 and is 7"),
    "version": ([], "schema_version was 2 and is 3 | older files can only be inspected"),
    "two": (["--layers", "3", "--max-new-tokens", 0], "is [3]; max_new_tokens was 6 and is 0"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_with_both_values(name, run_here, done, no_model):
    words, told = OTHER_SETTINGS[name]
    if name == "version":
        with h5py.File(done / PART, "a") as file:
            file.attrs["schema_version"] = 2
    before = parts_of(done)
    assert_refused(run_here(*PAIRS, *words, rows=GOOD), PART, told)
    assert parts_of(done) == before


def test_a_local_model_is_known_by_its_contents(run_here, done, no_model, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    words = (*PAIRS, "--model", model)
    assert run_here(*words, rows=GOOD)[0] == 0
    with open(model / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    assert_refused(run_here(*words, rows=GOOD), "model_revision was")


def test_a_hubs_model_is_known_by_its_commit(run_here, tmp_path):
    cache, out = tmp_path / "models--org--name", tmp_path / "out"
    for name, commit in (("main", "a" * 40), ("other", "b" * 40)):
        shutil.copytree(MODEL, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    words = ("--max-new-tokens", 0, "--model", "org/name", "--cache-dir", tmp_path)
    assert run_here(*words, rows=GOOD)[0] == 0
    with h5py.File(out / PART) as file:
        assert file.attrs["model_revision"] == "a" * 40
    told = f"model_revision was '{'a' * 40}' and is '{'b' * 40}'"
    assert_refused(run_here(*words, "--revision", "other", rows=GOOD), told)
    (cache / "refs" / "main").write_text("b" * 40)
    assert_refused(run_here(*words, rows=GOOD), told)


@pytest.mark.parametrize(("column", "name"), [(1, "image_id"), (2, "question")])
def test_row_changed_under_its_id_is_refused(column, name, run_here, done, no_model):
    rows, before = [list(row) for row in GOOD], parts_of(done)
    old, rows[1][column] = rows[1][column], "grey.png"
    told = (f"was {old!r} and is 'grey.png'", "--overwrite")
    assert_refused(run_here(*PAIRS, rows=rows[::-1]), "'good 2'", name, *told)
    assert parts_of(done) == before


def test_rows_removed_reordered_added_and_corrected_go_on(run_here, done):
    """What is stored stays as it is."""
    before = parts_of(done)
    rows = [(*row[:3], "corrected") for row in GOOD[2:0:-1]] + GOOD[:1]
    status, stderr = run_here(*PAIRS, rows=rows)
    assert (status, stderr.count("2 stored ground truths differ")) == (0, 1)
    assert parts_of(done) == before
    samples = read_samples(done)
    assert run_here(*PAIRS, rows=[*rows, ("new", "grey.png", Q, "")])[0] == 0
    added = {"new": read_samples(done)["new"]}
    assert_same_samples(read_samples(done), samples | added, bound=0)


def lose_a_sample(path):
    with h5py.File(path, "a") as file:
        del file[next(iter(file))]


SPOIL = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a sample lost": lose_a_sample,
    "a copy": lambda path: shutil.copy(path.parent / PART, path),
}


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_part_that_cannot_be_read_is_named(spoil, run_here, done, finished):
    """Once it is moved away, the same command finishes with the same samples."""
    SPOIL[spoil](done / SECOND)
    before, told = parts_of(done), "move it away and run the same command again"
    assert_refused(run_here(*PAIRS, rows=GOOD), done / SECOND, "cannot be read", told)
    assert parts_of(done) == before
    (done / SECOND).rename(done.parent / "away")
    assert run_here(*PAIRS, rows=GOOD)[0] == 0
    assert_same_samples(read_samples(done), read_samples(finished))


def test_overwrite_deletes_the_programs_own_files_only(run_here, done):
    own = ["gemma3_12b_embeddings_part_1234.h5", DEAD_PART, "settings.elsewhere-1.partial"]
    mine = ["failed_samples_of_last_week.csv", "notes.txt", "my.h5", f"{PART}.bak", "pca.png"]
    for name in (*own, *mine, "failed_samples.csv"):
        (done / name).write_bytes(b"old")
    assert run_here("--overwrite", "--layers", "1", rows=GOOD)[0] == 0
    assert {path.name for path in done.iterdir()} == {PART, *mine, ".lock", "settings.json"}
