"""inspect_h5.py: its figures against plain NumPy, what it finds, and what it refuses."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import CSV, IMAGES, MODEL, ROOT, inspect, no_hang
from make_large_parts import checksum, write_parts

import inspect_h5

LAYERS = (0, 2, 4, 6, 7)
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
NAMES = ["vision_representation", *(f"{kind}/layer_{i}" for kind in KINDS for i in LAYERS)]
QUERY = "query_token_representation/layer_4"
LINK = "vision_only_representation"
LOGPROBS = "answer_logprobs"
PART = "gemma3_12b_embeddings_part_{:03d}.h5"


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """What the extractor leaves of 12 rows about 3 images, and one whose image is missing."""
    directory = tmp_path_factory.mktemp("inspect")
    with open(CSV, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    rows = [row for row in rows if row[1] in ("circle.png", "tall.jpeg", "grey.png")]
    with open(directory / "vqa.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows, ["gone", "gone.png", "where?", "nowhere"]])
    flags = ["--vqa-dataset", directory / "vqa.csv", "--images-dir", IMAGES, "--model", MODEL]
    flags += ["--output-dir", directory / "output", "--device", "cpu", "--dtype", "float32"]
    flags += ["--checkpoint-interval", "5", "--max-new-tokens", "2", "--batch-size", "8"]
    command = [sys.executable, ROOT / "run_gemma3_extraction.py", *flags]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    return directory


@pytest.fixture
def output(run_dir, tmp_path):
    """A copy to destroy."""
    return shutil.copytree(run_dir / "output", tmp_path / "output")


def stored(directory):
    """Every sample as h5py gives it, in the documented order."""
    samples = []
    for path in sorted(directory.glob("*.h5")):
        with h5py.File(path) as file:
            for group in file.values():
                texts = {n: group[n].asstr()[()] for n in inspect_h5.TEXTS}
                vectors = {n: group[n][()] for n in NAMES}
                samples.append({**texts, **vectors, "question_id": group.attrs["question_id"]})
    return samples


# The view


def by_hand(matrix):
    matrix = matrix.astype(np.float64)
    norms = np.linalg.norm(matrix, axis=1)
    return norms.mean(), norms.std(), np.abs(matrix).max(), 0


def test_figures_are_those_of_plain_numpy(run_dir, capsys):
    _, out, _ = inspect(capsys, run_dir / "output", "--json")
    figures, samples = json.loads(out)["figures"], stored(run_dir / "output")
    assert list(figures) == NAMES
    for name, (dim, *values) in ((name, row.values()) for name, row in figures.items()):
        matrix = np.stack([sample[name] for sample in samples])
        assert dim == matrix.shape[1]
        np.testing.assert_allclose(values, by_hand(matrix), rtol=1e-5)


def test_the_table_shows_the_figures(run_dir, capsys):
    _, out, _ = inspect(capsys, run_dir / "output")
    figures = json.loads(inspect(capsys, run_dir / "output", "--json")[1])["figures"]
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    table = out[out.index("mean L2") :].splitlines()
    for name, row in figures.items():
        cells = next(line.split()[1:] for line in table if line.startswith(name))
        shown = [float(cell.rstrip("%")) for cell in cells]
        np.testing.assert_allclose(shown, list(row.values()), rtol=1e-3, atol=1e-3)
    assert lines["layers"] == ["0,", "2,", "4,", "6,", "7"]


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        (r"""it's "\frac{1}{2}" """, 99, r"""it's "\frac{1}{2}" """),
        ("a\nb\x1b", 99, r"a\nb\x1b"),
        ("abcd", 4, "abcd"),
        ("abcde", 4, "abc…"),
        ("図形図", 6, "図形図"),
        ("図形図形", 6, "図形…"),
    ],
)
def test_texts_are_shown_as_they_are_in_one_line(text, width, shown):
    assert inspect_h5.one_line(text, width) == shown


def test_the_view_says_what_was_run(run_dir, capsys):
    status, out, err = inspect(capsys, run_dir / "output", "--max-samples", "100")
    assert (status, err) == (0, "")
    assert "parts: 3, samples: 12, failed: 1" in out
    for text in (
        "float32 [32]",
        "-> vision_representation",
        "кириллица/日本",
        "図形は何色ですか？",
    ):
        assert text in out
    assert all(sum(1 + (ord(c) > 0x2E7F) for c in line) <= 80 for line in out.splitlines()[2:])


def test_json_says_the_same(run_dir, capsys):
    facts = json.loads(inspect(capsys, run_dir / "output", "--json", "--max-samples", "12")[1])
    samples = stored(run_dir / "output")
    assert (facts["num_samples"], facts["num_failed"], len(facts["files"])) == (12, 1, 3)
    assert facts["settings"]["layers"] == list(LAYERS)
    assert [s["question_id"] for s in facts["samples"]] == [s["question_id"] for s in samples]
    assert facts["sample"][QUERY] == "float32 [32]"


def test_a_list_of_failures_that_was_edited_does_not_hide_the_rest(output, capsys):
    path = output / "failed_samples.csv"
    header, line = path.read_text().splitlines()
    path.write_text(f"\ufeff{header}\n{line}\n", encoding="utf-8")
    assert "failed: 1" in inspect(capsys, output)[1]
    for text in (f"{header}\n{line}\n{line}\n", header.replace(",", ";")):
        path.write_text(text)
        status, out, err = inspect(capsys, output)
        assert (status, err) == (0, "")
        assert "parts: 3, samples: 12, failed_samples.csv cannot be read" in out
        assert json.loads(inspect(capsys, output, "--json")[1])["num_failed"] is None


def test_a_layer_alone(run_dir, capsys):
    facts = json.loads(inspect(capsys, run_dir / "output", "--json", "--layer", "4")[1])
    assert list(facts["figures"]) == [f"{kind}/layer_4" for kind in KINDS]


def test_a_sample_of_many_is_drawn_unless_all(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(inspect_h5, "NUM_DRAWN", 4)
    assert "figures of 4 samples, drawn at random" in inspect(capsys, run_dir / "output")[1]
    assert "figures of 12 samples\n" in inspect(capsys, run_dir / "output", "--all")[1]


@pytest.mark.parametrize("question_id", ["кириллица/日本", "..", "50%/a", "000"])
def test_one_sample_by_its_own_id(run_dir, capsys, question_id):
    sample = next(s for s in stored(run_dir / "output") if s["question_id"] == question_id)
    out = inspect(capsys, run_dir / "output", "--question-id", question_id, "--json")[1]
    facts = json.loads(out)
    assert [s["question"] for s in facts["samples"]] == [sample["question"]]
    norm = np.linalg.norm(sample[QUERY])
    assert facts["figures"][QUERY]["norm_mean"] == pytest.approx(norm, rel=1e-5)


def test_an_unknown_id_suggests_the_nearest(run_dir, capsys):
    status, out, err = inspect(capsys, run_dir / "output", "--question-id", "50%25/a")
    assert (status, out) == (1, "")
    assert "'50%/a'" in err


# --verify


def edit(change):
    """A defect within the first part."""

    def plant(output):
        with h5py.File(output / PART.format(1), "r+") as file:
            change(file)

    return plant


def put(file, name, value):
    file[name][...] = value


def all_equal(file):
    for group in file.values():
        group[QUERY][...] = np.arange(32)


def all_equal_but_the_first(file):
    for name in [name for name in file if name != "000"]:
        file[name][QUERY][...] = np.arange(32)


def rewrite(member, value):
    """In the first sample, another data set."""

    def change(file):
        del file[f"000/{member}"]
        file[f"000/{member}"] = value

    return edit(change)


def spoil(file):
    """The first sample's link leads to no object."""
    del file["000"]
    file["000"] = h5py.SoftLink("nowhere")


def copy_to_part_2(output):
    with h5py.File(output / PART.format(1)) as one, h5py.File(output / PART.format(2), "r+") as two:
        one.copy("000", two)
        two.attrs["num_samples"] = len(two)


def truncate(output):
    path = output / PART.format(2)
    path.write_bytes(path.read_bytes()[:5000])


DEFECTS = {
    "a vector": (edit(lambda f: f["000"].__delitem__(QUERY)), f"{QUERY}: .*'000'"),
    "a text": (edit(lambda f: f["000"].__delitem__("answer")), "'answer' doesn't exist.*'000'"),
    "the link": (edit(lambda f: f["000"].__delitem__(LINK)), f"{LINK}: .*'000'"),
    "a link's aim": (rewrite(LINK, h5py.SoftLink("nowhere")), f"{LINK}: .*'000'"),
    "an attribute": (
        edit(lambda f: f["000"].attrs.__delitem__("crc32")),
        "crc32 is missing.*'000'",
    ),
    "inf": (edit(lambda f: put(f, f"000/{QUERY}", [np.inf] + [0] * 31)), "not finite .1: '000'"),
    "nan": (edit(lambda f: put(f, f"000/{QUERY}", [np.nan] + [0] * 31)), "not finite .1: '000'"),
    "a constant": (edit(lambda f: put(f, f"000/{QUERY}", 1)), "only one value .1: '000'"),
    "all the same": (edit(all_equal), f"{QUERY} is the same in all"),
    "a shape": (rewrite(QUERY, np.arange(31, dtype="f4")), f"{QUERY}: .*31.*32.*'000'"),
    "a row more": (rewrite(QUERY, np.ones((1, 32), "f4")), f"{QUERY}: .*1, 32.*'000'"),
    "float16": (rewrite(QUERY, np.arange(32, dtype="f2")), f"{QUERY}: float16.*'000'"),
    "two texts": (rewrite("answer", ["a", "b"]), r"answer: .*2,.*'000'"),
    "an id's type": (edit(lambda f: f["000"].attrs.__setitem__("question_id", 0)), "id differs"),
    "a flag": (edit(lambda f: f["000"].attrs.__delitem__("answer_truncated")), "is missing.*000"),
    "a setting": (edit(lambda f: f.attrs.__setitem__("dtype", "bfloat16")), "dtype is"),
    "the layers": (edit(lambda f: f.attrs.__setitem__("layers", [0, 2])), "layers is"),
    "the count": (edit(lambda f: f.attrs.__setitem__("num_samples", 9)), "num_samples is 9"),
    "another id": (
        edit(lambda f: f["000"].attrs.__setitem__("question_id", "x")),
        "question_id differs .1: '000'",
    ),
    "two data sets more": (
        edit(lambda f: f["000"].update({"notes": "x", f"{QUERY}9": [1.0]})),
        f"does not belong there: notes, {QUERY}9 .1: '000'",
    ),
    "no group": (edit(lambda f: f.__setitem__("zz", 1)), "cannot be opened: .*'zz'"),
    "no sample": (edit(spoil), "part_001.h5: cannot be opened: .*'000'"),
    "an id twice": (copy_to_part_2, "question_id is in .*part_001.h5 too .1: '000'"),
    "a gap": (lambda output: (output / PART.format(2)).unlink(), "part 2 is missing"),
    "a first part": (lambda output: (output / PART.format(1)).unlink(), "part 1 is missing"),
    "half a part": (truncate, "part_002.h5: cannot be read as a part: .*truncated"),
}


def test_verify_finds_nothing_in_sound_parts(run_dir, capsys):
    directory = run_dir / "output"
    assert inspect(capsys, directory, "--verify")[::2] == (0, "")
    parts = (directory / PART.format(3), directory / "../output" / PART.format(1), directory)
    assert inspect(capsys, *parts, "--verify") == (0, "nothing wrong with 12 samples\n", "")


@pytest.mark.parametrize("defect", DEFECTS)
def test_verify_finds(output, capsys, defect):
    plant, finding = DEFECTS[defect]
    plant(output)
    status, out, err = inspect(capsys, output, "--verify")
    assert (status, err) == (1, "")
    assert re.search(finding, out)
    assert len(out.splitlines()) <= 3


def test_verify_tells_all_beside_a_sample_that_cannot_be_opened(output, capsys):
    edit(spoil)(output)
    edit(all_equal_but_the_first)(output)
    with h5py.File(output / PART.format(2), "r+") as file:
        next(iter(file.values())).attrs["crc32"] = 1
    (output / PART.format(3)).rename(output / PART.format(4))
    out = inspect(capsys, output, "--verify")[1]
    for finding in ("cannot be opened", "is the same in all", "crc32 is not", "part 3 is missing"):
        assert finding in out


def test_verify_compares_with_the_csv(run_dir, tmp_path, capsys):
    table = pd.read_csv(run_dir / "vqa.csv", dtype=str, keep_default_na=False)
    table.loc[0, "question"], table.loc[1, "answer"], table.loc[2, "image_id"] = "a", "b", "c"
    table.drop(index=3).to_csv(tmp_path / "other.csv", index=False, encoding="utf-8-sig")
    _, out, _ = inspect(
        capsys, run_dir / "output", "--verify", "--vqa-dataset", tmp_path / "other.csv"
    )
    ids, lines = list(table["question_id"]), out.splitlines()
    expected = {"question is": ids[0], "ground_truth_answer is": ids[1], "image_id is": ids[2]}
    expected |= {"not in the parts": "gone", "but not here": ids[3]}
    assert len(lines) == 5
    for problem, question_id in expected.items():
        assert any(problem in line and f"(1: {question_id!r})" in line for line in lines)


def test_the_csv_may_use_other_names(run_dir, tmp_path, capsys):
    table = pd.read_csv(run_dir / "vqa.csv", dtype=str, keep_default_na=False)[:-1]
    table = table.rename(columns={"image_id": "image_name", "answer": "gt_answer"})
    table.to_csv(tmp_path / "other.csv", index=False)
    args = (run_dir / "output", "--verify", "--vqa-dataset", tmp_path / "other.csv")
    assert inspect(capsys, *args)[0] == 0


# --export and load_embeddings


def test_npz_holds_everything_in_one_order(run_dir, tmp_path, capsys):
    status, out, _ = inspect(capsys, run_dir / "output", "--export", tmp_path / "all.npz")
    samples = stored(run_dir / "output")
    with np.load(tmp_path / "all.npz", allow_pickle=False) as file:
        assert set(file) == {*NAMES, "texts", "question_id", "image_id"}
        for name in ("question_id", "image_id"):
            assert list(file[name]) == [sample[name] for sample in samples]
        for name in NAMES:
            np.testing.assert_array_equal(file[name], [sample[name] for sample in samples])
        texts = pd.DataFrame(json.loads(file["texts"].tobytes()))
    for name in ("question_id", *inspect_h5.TEXTS):
        assert list(texts[name]) == [sample[name] for sample in samples]
    assert status == 0
    assert f"{QUERY}    float32 [12, 32]" in out


def test_a_long_text_makes_the_npz_no_longer_than_itself(output, tmp_path, capsys):
    inspect(capsys, output, "--export", tmp_path / "short.npz")
    rewrite("answer", "x" * 200_000)(output)
    inspect(capsys, output, "--export", tmp_path / "long.npz")
    grown = os.path.getsize(tmp_path / "long.npz") - os.path.getsize(tmp_path / "short.npz")
    assert 199_000 < grown < 201_000


def test_an_export_that_fails_leaves_nothing(output, tmp_path, capsys, monkeypatch):
    """A vector that cannot be read, and Ctrl-C: no .npz, and no part of one."""
    edit(lambda file: file["000"].__delitem__(QUERY))(output)
    status, _, err = inspect(capsys, output, "--export", tmp_path / "x.npz")
    assert (status, len(err.splitlines())) == (1, 1)
    assert not list(tmp_path.glob("x*"))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_h5, "read_matrix", interrupt)
    assert inspect(capsys, output, "--export", tmp_path / "x.npz")[0] == 130
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("flags", [["--export", "none/x.npz"], ["--plot", "none/x.png"]])
def test_a_directory_that_is_not_there_is_one_line(run_dir, tmp_path, capsys, flags):
    flag, path = flags
    status, out, err = inspect(capsys, run_dir / "output", flag, tmp_path / path)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "there is no directory" in err


def test_parts_of_two_runs_are_not_mixed(output, tmp_path, capsys):
    with h5py.File(output / PART.format(2), "r+") as file:
        file.attrs["model_revision"] = "another"
    status, _, err = inspect(capsys, output, "--export", tmp_path / "x.npz")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "model_revision is 'another'" in err
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(("kind", "layer"), [(KINDS[1], 4), ("vision_representation", None)])
def test_load_embeddings(run_dir, kind, layer):
    table, matrix = inspect_h5.load_embeddings(run_dir / "output", kind, layer)
    samples, name = stored(run_dir / "output"), kind if layer is None else f"{kind}/layer_{layer}"
    np.testing.assert_array_equal(matrix, [sample[name] for sample in samples])
    for text in ("question_id", *inspect_h5.TEXTS):
        assert list(table[text]) == [sample[text] for sample in samples]
    assert set(inspect_h5.COUNTS) - {"row"} < set(table)
    assert table["answer_truncated"].dtype == bool


def test_load_embeddings_of_files_in_their_order(run_dir):
    paths = [str(run_dir / "output" / PART.format(k)) for k in (2, 1, 2)]
    table, matrix = inspect_h5.load_embeddings(paths, KINDS[0], 0)
    assert matrix.shape == (10, 32)
    assert list(table["question_id"][5:]) == [
        s["question_id"] for s in stored(run_dir / "output")[:5]
    ]


@pytest.mark.parametrize(("kind", "layer"), [(KINDS[1], 5), (KINDS[1], None), ("nothing", None)])
def test_load_embeddings_refuses(run_dir, kind, layer):
    with pytest.raises(ValueError, match=r"layer_4|layers \[0, 2, 4"):
        inspect_h5.load_embeddings(run_dir / "output", kind, layer)
    with pytest.raises(ValueError, match="no part files"):
        inspect_h5.load_embeddings([], kind, layer)


# --plot


@pytest.mark.parametrize(
    ("flags", "panels"),
    [
        ([], 16),
        (["--layer", "4"], 3),
        (["--color-by", "answer", "--representation", "vision_representation"], 1),
        (["--color-by", "num_prompt_tokens"], 16),
    ],
)
def test_plot_draws_a_panel_for_each(run_dir, tmp_path, capsys, flags, panels):
    status, out, err = inspect(capsys, run_dir / "output", "--plot", tmp_path / "x.png", *flags)
    assert (status, err) == (0, "")
    assert f"{panels} panels of 12 of 12 samples" in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def marks_of(run_dir, field):
    samples = inspect_h5.scan_parts(run_dir / "output")[1]
    return inspect_h5.choose_marks(inspect_h5.read_texts(samples), field)[0]


def test_colours_by_a_column_of_a_csv(run_dir, tmp_path):
    ids = [s["question_id"] for s in stored(run_dir / "output")]
    column = pd.Series(range(10), ids[::-1][:10], dtype=float)
    path = tmp_path / "scores.csv"
    column.rename_axis("question_id").rename("score").to_csv(path, encoding="utf-8-sig")
    ((samples, mark),) = marks_of(run_dir, f"{path}:score")
    assert samples == slice(None)
    np.testing.assert_array_equal(mark["c"], column.reindex(ids))


def test_a_truth_that_the_font_lacks_is_told_by_number(run_dir, tmp_path, capsys):
    ids = [s["question_id"] for s in stored(run_dir / "output")]
    texts = pd.Series(["図形", "кот", "cat"] * 4, ids, name="truth")
    texts.rename_axis("question_id").to_csv(tmp_path / "texts.csv")
    flags = ["--layer", "4", "--color-by", f"{tmp_path / 'texts.csv'}:truth"]
    _, out, err = inspect(capsys, run_dir / "output", "--plot", tmp_path / "x.png", *flags)
    assert err == ""
    assert re.fullmatch("no. [123]: 図形", out.splitlines()[-1])
    labels = [mark["label"] for _, mark in marks_of(run_dir, f"{tmp_path / 'texts.csv'}:truth")]
    assert sorted(label[:7] for label in labels) == ["4 × cat", "4 × no.", "4 × кот"]


# What is refused


@pytest.fixture
def bad_paths(tmp_path, output):
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = np.arange(3)
    (tmp_path / "half.h5").write_bytes((output / PART.format(1)).read_bytes()[:9000])
    shutil.copy(IMAGES / "circle.png", tmp_path / "image.png")
    (tmp_path / "no_parts").mkdir()
    return tmp_path


BAD = ["empty.h5", "text.h5", "foreign.h5", "half.h5", "image.png", "no_parts", "missing.h5"]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("flags", [[], ["--json"], ["--export", "x.npz"], ["--plot", "x.png"]])
def test_bad_input_is_one_line(bad_paths, capsys, name, flags):
    status, out, err = inspect(capsys, bad_paths / name, *flags)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert name in err


def test_a_layer_that_is_not_stored_is_one_line(run_dir, tmp_path, capsys):
    args = (run_dir / "output", "--export", tmp_path / "x.npz", "--layer", "5")
    status, out, err = inspect(capsys, *args)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "layers [0, 2, 4, 6, 7]" in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--vqa-dataset", CSV],
        ["--color-by", "answer"],
        ["--export", "x.txt"],
        ["--plot", "x.gif"],
        ["--verify", "--plot", "x.png"],
        ["--verify", "--json"],
        ["--verify", "--layer", "4"],
    ],
)
def test_wrong_usage_is_status_2(run_dir, capsys, flags):
    status, out, err = inspect(capsys, run_dir / "output", *flags)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("field", ["nothing", "missing.csv:label", f"{CSV}:nothing"])
def test_colours_that_are_not_there(run_dir, tmp_path, capsys, field):
    args = (run_dir / "output", "--plot", tmp_path / "x.png", "--color-by", field)
    status, _, err = inspect(capsys, *args)
    assert (status, len(err.splitlines())) == (1, 1)


def test_a_fifo_among_the_parts_is_one_line(output, capsys):
    message = f"{output / PART.format(4)}: cannot be read as a part: it is not a regular file\n"
    os.mkfifo(output / PART.format(4))
    with no_hang():
        assert inspect(capsys, output) == (1, "", message)
        assert inspect(capsys, output, "--verify") == (1, message, "")


def test_colours_by_the_id_itself(run_dir, tmp_path, capsys):
    flags = ["--layer", "4", "--color-by", f"{run_dir}/vqa.csv:question_id"]
    assert inspect(capsys, run_dir / "output", "--plot", tmp_path / "x.png", *flags)[0] == 0


def test_without_matplotlib_it_says_what_to_install(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = inspect(capsys, run_dir / "output", "--plot", tmp_path / "x.png")
    assert status == 1
    assert "pip install matplotlib" in err


def test_a_closed_pipe_is_no_error(run_dir):
    command = f"{sys.executable} {ROOT}/inspect_h5.py {run_dir}/output | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_a_part_without_samples(output, capsys):
    with h5py.File(output / PART.format(1), "r+") as file:
        file.clear()
        file.attrs["num_samples"] = 0
    assert inspect(capsys, output / PART.format(1))[0] == 0
    assert inspect(capsys, output, "--verify")[0] == 0


MADE = [0, 12, 47]  # layers of parts that a script writes
MADE_NAMES = [NAMES[0], *(f"{kind}/layer_{i}" for kind in KINDS for i in MADE)]
LATE = "query_token_representation/layer_47"


# Schema versions 1 and 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Schema version 2: 12 samples about 2 images in parts of 7, and their CSV."""
    directory = tmp_path_factory.mktemp("made")
    write_parts(directory / "output", 12, MADE, interval=7)
    table, _ = inspect_h5.load_embeddings(directory / "output", NAMES[0])
    table = table[["question_id", "image_id", "question", "ground_truth_answer"]]
    table.rename(columns={"ground_truth_answer": "answer"}).to_csv(
        directory / "vqa.csv", index=False
    )
    return directory


@pytest.fixture
def made_output(made, tmp_path):
    """A copy to destroy."""
    return shutil.copytree(made / "output", tmp_path / "output")


def test_the_checksum_is_the_documented_one(made):
    with h5py.File(made / "output" / PART.format(1)) as file:
        group, floats = file["000000"], {}

        def collect(name, item):
            if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
                floats[name] = item[()]

        group.visititems(collect)  # which does not follow the soft link
        data = b"".join(floats[name].tobytes() for name in sorted(floats))
        assert len(floats) == 2 + 3 * len(MADE)
        assert group.attrs["crc32"] == zlib.crc32(data)


def test_a_bit_that_turned_is_found(made_output, capsys):
    with h5py.File(made_output / PART.format(1), "r+") as file:
        vector = file["000003"][LATE]
        bits = vector[()].view(np.uint32)
        bits[100] ^= 1
        vector[...] = bits.view(np.float32)
    status, out, _ = inspect(capsys, made_output, "--verify")
    assert (status, len(out.splitlines())) == (1, 1)
    assert "crc32 is not that of the vectors (1: '000003')" in out


def attribute(name, value, **more):
    """Other values in the first sample; None takes one away."""

    def change(file):
        for key, other in {name: value, **more}.items():
            del file["000000"].attrs[key]
            if other is not None:
                file["000000"].attrs[key] = other

    return change


def logprobs(values):
    """Other log-probabilities in the first sample, and the checksum of them."""

    def change(file):
        group = file["000000"]
        del group[LOGPROBS]
        if values is not None:
            group[LOGPROBS] = np.array(values, np.float32)
            vectors = {name: group[name][()] for name in [LOGPROBS, *MADE_NAMES]}
            group.attrs["crc32"] = checksum(vectors)

    return change


MADE_DEFECTS = {
    "no checksum": (attribute("crc32", None), "crc32 is missing .1: '000000'"),
    "no hash": (attribute("image_sha256", None), "image_sha256 is missing .1: '000000'"),
    "no entropy": (attribute("first_token_entropy", None), "entropy is missing .1: '000000'"),
    "entropy": (attribute("first_token_entropy", np.nan), "entropy is nan .1: '000000'"),
    "a negative entropy": (attribute("first_token_entropy", -0.1), "entropy is -0.1 .1: '0000"),
    "half a token": (
        attribute("num_prompt_tokens", 275.5, query_token_pos=274.5),
        "num_prompt_tokens is not a positive whole number .1: '000000'",
    ),
    "the query": (
        attribute("query_token_pos", 273),
        "query_token_pos is not num_prompt_tokens - 1",
    ),
    "the picture's end": (attribute("vision_token_pos", 274), "vision_token_pos is not between 0"),
    "a picture before all": (attribute("vision_token_pos", -1), "vision_token_pos is not between"),
    "another picture": (
        attribute("image_sha256", "0" * 64),
        r"image_id '0.jpg': its file changed between samples \(10: '000000'",
    ),
    "no log-probabilities": (logprobs(None), f"answer_logprobs: .*'{'0' * 6}'"),
    "one too few": (logprobs([-1] * 4), "4 of them, not 5 .1: '000000'"),
    "one too many": (logprobs([-1] * 6), "6 of them, not 5 .1: '000000'"),
    "a positive one": (logprobs([-1] * 4 + [0.1]), "answer_logprobs: above 0 .1: '000000'"),
    "one not finite": (logprobs([-1] * 4 + [-np.inf]), "answer_logprobs: not finite .1: '000"),
    "an answer cut": (attribute("answer_truncated", True), "5 of them, not 4 .1: '000000'"),
}


@pytest.mark.parametrize("defect", MADE_DEFECTS)
def test_verify_finds_in_schema_2(made_output, capsys, defect):
    change, finding = MADE_DEFECTS[defect]
    with h5py.File(made_output / PART.format(1), "r+") as file:
        change(file)
    status, out, err = inspect(capsys, made_output, "--verify")
    num_findings = 2 if defect == "another picture" else 1  # and yet its vectors are the same
    assert (status, err, len(out.splitlines())) == (1, "", num_findings)
    assert re.search(finding, out)


def test_an_image_is_followed_through_all_parts(made_output, capsys):
    """Samples 0 to 6 stand in part 1; 7 to 9, about the same image, in part 2."""
    with h5py.File(made_output / PART.format(2), "r+") as file:
        for name in ("000007", "000008", "000009"):
            file[name].attrs["image_sha256"] = "1" * 64
    status, out, _ = inspect(capsys, made_output, "--verify")
    assert (status, len(out.splitlines())) == (1, 1)
    assert "image_id '0.jpg'" in out


def test_schema_1_is_read_as_before(tmp_path, capsys):
    write_parts(tmp_path, 12, MADE, interval=7, schema_version=1)
    assert inspect(capsys, tmp_path, "--verify")[:2] == (0, "nothing wrong with 12 samples\n")
    assert LOGPROBS not in inspect(capsys, tmp_path)[1]
    table, _ = inspect_h5.load_embeddings(tmp_path, NAMES[0])
    assert list(table) == [
        "question_id", *inspect_h5.TEXTS, *inspect_h5.COUNTS, "answer_truncated"
    ]  # fmt: skip


def test_schema_2_without_answers_has_no_log_probabilities(made_output, capsys):
    for path in made_output.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["max_new_tokens"] = 0
            for group in file.values():
                del group[LOGPROBS], group.attrs["first_token_entropy"]
                group.attrs["crc32"] = checksum({name: group[name][()] for name in MADE_NAMES})
    assert inspect(capsys, made_output, "--verify")[:2] == (0, "nothing wrong with 12 samples\n")


def test_schema_2_is_shown_and_loaded(made, capsys):
    out = inspect(capsys, made / "output")[1]
    assert re.search(r"^answer_logprobs +float32 \[5\]$", out, re.MULTILINE)
    args = (made / "output", "--question-id", "000002", "--json")
    (sample,) = json.loads(inspect(capsys, *args)[1])["samples"]
    table, _ = inspect_h5.load_embeddings(made / "output", NAMES[0])
    with h5py.File(made / "output" / PART.format(1)) as file:
        group = file["000002"]
        np.testing.assert_allclose(sample[LOGPROBS], group[LOGPROBS], atol=1e-9)
        np.testing.assert_array_equal(table[LOGPROBS][2], group[LOGPROBS])
        for name in ("first_token_entropy", "image_sha256"):
            assert table[name][2] == group.attrs[name]


def test_parts_of_two_schemas_are_not_mixed(made_output, capsys):
    with h5py.File(made_output / PART.format(2), "r+") as file:
        file.attrs["schema_version"] = 1
    status, _, err = inspect(capsys, made_output)
    assert (status, len(err.splitlines())) == (1, 1)
    assert "schema_version is 1, not 3" in err


def test_two_data_sets_side_by_side(made, made_output, tmp_path, capsys):
    """Other interval, data set and pictures of the same names are fine; equal ids are refused."""
    both = (made / "output", made_output)
    status, _, err = inspect(capsys, *both, "--export", tmp_path / "x.npz")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "part_001.h5: question_id is in " in err
    assert "(first '000000')" in err
    for path in made_output.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs.update({"dataset": "other.csv", "checkpoint_interval": 9})
            for name in list(file):
                file.move(name, f"b{name}")
                file[f"b{name}"].attrs.update({"question_id": f"b{name}", "image_sha256": "1"})
    assert inspect(capsys, *both, "--verify") == (0, "nothing wrong with 24 samples\n", "")
    table, matrix = inspect_h5.load_embeddings(both, LATE.partition("/")[0], 47)
    assert list(table["question_id"][11:13]) == ["000011", "b000000"]
    np.testing.assert_array_equal(matrix[:12], matrix[12:])
    assert inspect(capsys, *both, "--export", tmp_path / "x.npz")[0] == 0
    with h5py.File(made_output / PART.format(2), "r+") as file:
        file.attrs["checkpoint_interval"] = 7
    assert "checkpoint_interval is 7, not 9" in inspect(capsys, *both, "--verify")[1]


# How it ends


def test_a_full_disk_is_one_line(made):
    command = f"{sys.executable} {ROOT}/inspect_h5.py {made}/output --verify > /dev/full"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "No space left" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        ("--verify 2>&-", 0, "nothing wrong with 12 samples\n", ""),
        ("--layer 9 2>&-", 1, "", ""),
        ("--layer none 2>&-", 2, "", ""),
        ("--verify >&-", 1, "", "stdout is closed: results could not be printed\n"),
    ],
)
def test_a_stream_that_is_closed(made, arguments, status, out, err):
    command = f"{sys.executable} {ROOT}/inspect_h5.py {made}/output {arguments}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


# Readers of others, and sizes


def test_halp_probe_scripts_can_read_the_parts(run_dir):
    num_samples = 0
    for path in sorted((run_dir / "output").glob("*.h5")):
        with h5py.File(path, "r") as file:
            for question_id in file.keys():  # noqa: SIM118
                sample = file[question_id]
                assert sample["vision_only_representation"][:].shape == (24,)
                for layer in LAYERS:
                    assert sample["vision_token_representation"][f"layer_{layer}"][:].shape == (32,)
                    assert sample[f"query_token_representation/layer_{layer}"][:].shape == (32,)
                num_samples += 1
    assert num_samples == 12


def test_synthetic_parts_are_like_the_real_ones(run_dir, tmp_path, capsys):
    with h5py.File(run_dir / "output" / PART.format(1)) as file:
        version = int(file.attrs["schema_version"])
    layers = [0, 12, 24, 36, 47]
    write_parts(tmp_path / "large", 12, layers, interval=7, schema_version=version)
    assert inspect(capsys, tmp_path / "large", "--verify")[::2] == (0, "")
    real, synthetic = (
        h5py.File(directory / PART.format(1))
        for directory in (run_dir / "output", tmp_path / "large")
    )
    with real, synthetic:
        assert set(real.attrs) == set(synthetic.attrs)
        one, other = (next(iter(file.values())) for file in (real, synthetic))
        assert set(one) == set(other)
        assert set(one.attrs) == set(other.attrs)
