"""Part files: names, types, and what becomes of them."""

import csv
import errno
import subprocess
import sys
import urllib.parse

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import run_gemma3_extraction as script

SHAPES = {
    "vision_representation": 24,
    "vision_token_representation/layer_0": 32,
    "query_token_representation/layer_0": 32,
    "multimodal_representation/layer_0": 32,
}

ATTRIBUTES = dict.fromkeys(script.SAMPLE_ATTRIBUTES - {"question_id", "row"}, 0)


def make_states(seed=0, scale=1e5):
    """Vectors of the size that Gemma 3's residual stream reaches, which float16 does not hold."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(width) * scale).astype(np.float32)
        for name, width in SHAPES.items()
    }


SETTINGS = dict.fromkeys(script.IDENTITY, "as ever") | {"storage_dtype": "float32"}


def write_part(path, rows, compression="none", storage_dtype="float32"):
    writer = script.PartWriter(path, SETTINGS | {"storage_dtype": storage_dtype}, compression)
    for row in rows:
        writer.add(row, make_states(row.index), f"answer {row.index}", ATTRIBUTES)
    writer.finish()


def make_row(index, question_id=None):
    return script.Row(index, question_id or str(index), "a.png", f"q{index}", "NA")


@pytest.mark.parametrize(
    "question_id",
    ["007", "a/b", "/", ".", "..", "...", "a.b", "%2F", "50%", "日本/语", " ", "ключ"],
)
def test_ids_come_back_from_their_names(tmp_path, question_id):
    name = script.group_name(question_id)
    assert urllib.parse.unquote(name) == question_id
    write_part(tmp_path / "a.h5", [make_row(0, question_id)])
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file) == [name]
        assert file[name].attrs["question_id"] == question_id


@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
def test_float32_is_exact(tmp_path, compression):
    write_part(tmp_path / "a.h5", [make_row(3)], compression)
    with h5py.File(tmp_path / "a.h5") as file:
        for name, vector in make_states(3).items():
            assert file["3"][name].dtype == np.float32
            np.testing.assert_array_equal(file["3"][name], vector)
            expected = {"none": None}.get(compression, compression)
            assert file["3"][name].compression == expected
        link = file["3"].get("vision_only_representation", getlink=True)
        assert isinstance(link, h5py.SoftLink)
        assert file["3/vision_only_representation"] == file["3/vision_representation"]


def test_bfloat16_rounds_as_torch_and_leaves_means_alone(tmp_path):
    write_part(tmp_path / "a.h5", [make_row(3)], storage_dtype="bfloat16")
    with h5py.File(tmp_path / "a.h5") as file:
        for name, vector in make_states(3).items():
            is_mean = name.startswith(("vision_representation", "multimodal"))
            rounded = torch.from_numpy(vector).bfloat16().float().numpy()
            np.testing.assert_array_equal(file["3"][name], vector if is_mean else rounded)
            assert file["3"][name].id.get_storage_size() == vector.size * (4 if is_mean else 2)


def test_a_part_takes_over_what_was_there(tmp_path):
    path = tmp_path / "a.h5"
    write_part(path, [make_row(0), make_row(1)])
    write_part(path, [make_row(2)])
    assert script.read_part(path, SETTINGS, SHAPES) == {
        str(i): {"question": f"q{i}", "image_id": "a.png", "answer": "NA"} for i in range(3)
    }
    with h5py.File(path) as file:
        assert file.attrs["num_samples"] == 3
        np.testing.assert_array_equal(
            file["1/vision_only_representation"], make_states(1)["vision_representation"]
        )


def test_nothing_is_there_before_it_is_whole(tmp_path):
    path = tmp_path / "a.h5"
    writer = script.PartWriter(path, SETTINGS, "none")
    writer.add(make_row(0), make_states(), "", {})
    assert not list(tmp_path.glob("*.h5"))
    writer.finish()
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_whose_rows_all_failed_is_written_empty(tmp_path):
    path = tmp_path / "a.h5"
    script.PartWriter(path, SETTINGS, "none").finish()
    assert script.read_part(path, SETTINGS, SHAPES) == {}
    with h5py.File(path) as file:
        assert file.attrs["num_samples"] == 0


def test_a_part_that_gained_nothing_stays_as_it_was(tmp_path):
    path = tmp_path / "a.h5"
    write_part(path, [make_row(0)])
    before = path.read_bytes()
    write_part(path, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Writes a part at the 12B's sizes, and tells the peak of its memory in MB on the way.
WRITE_LARGE = """
import sys
from pathlib import Path
import numpy as np
import run_gemma3_extraction as script

def peak():  # ru_maxrss would begin with the memory of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


names = [f"{kind}/layer_{i}" for kind in script.LAYER_KINDS for i in (0, 12, 24, 36, 47)]
states = dict.fromkeys(names, np.ones(3840, np.float32)) | {script.VISION: np.ones(1152, "f4")}
writer = script.PartWriter(Path(sys.argv[1]), {"storage_dtype": "float32"}, "none")
for index in range(1000):
    row = script.Row(index, str(index), "a.png", "q", "NA")
    writer.add(row, states, "", {})
    if index in (499, 999):
        print(peak())
writer.finish()
print(peak())
"""


def test_a_part_is_on_the_disk_and_not_in_memory(tmp_path):
    command = [sys.executable, "-c", WRITE_LARGE, tmp_path / "a.h5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    half, whole, finished = map(float, done.stdout.split())
    assert (tmp_path / "a.h5").stat().st_size > 230e6
    assert finished - half < 50, (half, whole, finished)


@pytest.mark.parametrize("num_layers", [1, 5, 48])
def test_a_sample_takes_what_is_told(tmp_path, num_layers):
    names = [f"{kind}/layer_{i}" for kind in script.LAYER_KINDS for i in range(num_layers)]
    shapes = {script.VISION: 24} | dict.fromkeys(names, 32)
    states = {name: np.ones(width, np.float32) for name, width in shapes.items()}
    writer = script.PartWriter(tmp_path / "a.h5", SETTINGS, "none")
    for index in range(300):
        writer.add(make_row(index), states, "an answer", ATTRIBUTES)
    writer.finish()
    told = 300 * script.bytes_per_sample(shapes, "float32")
    assert 0.7 * told < (tmp_path / "a.h5").stat().st_size < told


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_no_sample_and_no_finished_part(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    writer = script.PartWriter(path, SETTINGS, "none")
    writer.add(make_row(0), make_states(0), "", ATTRIBUTES)
    with monkeypatch.context() as patch:
        patch.setattr(script.os, "posix_fallocate", full_disk)
        with pytest.raises(script.ExtractionError, match="No space left"):
            writer.add(make_row(1), make_states(1), "x" * 2**20, ATTRIBUTES)
        writer.finish()
        before = path.read_bytes()
        writer = script.PartWriter(path, SETTINGS, "none")
        with pytest.raises(script.ExtractionError, match="No space left"):
            writer.add(make_row(1), make_states(1), "", ATTRIBUTES)
        writer.finish()
    assert path.read_bytes() == before
    assert script.read_part(path, SETTINGS, SHAPES).keys() == {"0"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_that_gains_nothing_writes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    write_part(path, [make_row(0)])
    monkeypatch.setattr(script.os, "posix_fallocate", full_disk)
    write_part(path, [])
    assert list(tmp_path.iterdir()) == [path]


def damage_count(file):
    file.attrs["num_samples"] = 2


def damage_vector(file):
    file["0/query_token_representation/layer_0"][3] = np.inf


def damage_text(file):
    del file["0/answer"]


def damage_shape(file):
    del file["0/vision_representation"]
    file["0/vision_representation"] = np.zeros(7, np.float32)


def damage_id(file):
    file["0"].attrs["question_id"] = "1"


@pytest.mark.parametrize(
    "damage", [damage_count, damage_vector, damage_text, damage_shape, damage_id]
)
def test_damage_is_seen(tmp_path, damage):
    write_part(tmp_path / "a.h5", [make_row(0)])
    script.read_part(tmp_path / "a.h5", SETTINGS, SHAPES)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        damage(file)
    with pytest.raises(script.DAMAGE):
        script.read_part(tmp_path / "a.h5", SETTINGS, SHAPES)


def test_other_settings_are_not_damage(tmp_path):
    write_part(tmp_path / "a.h5", [make_row(0)])
    with pytest.raises(script.ExtractionError, match="layers was 'as ever' and is 'others'"):
        script.read_part(tmp_path / "a.h5", SETTINGS | {"layers": "others"}, SHAPES)


def read_failures(directory):
    with open(directory / "failed_samples.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_failures_come_back_and_go_away(tmp_path):
    rows = [make_row(0, "a,b"), make_row(1, "ключ"), make_row(2, "c")]
    failures = [script.Failure(row, f'said "no"\nto {row.index}') for row in rows]
    header = ["question_id", "image_id", "error"]
    lines = [[row.question_id, "a.png", f'said "no"\nto {row.index}'] for row in rows]
    script.update_failures(tmp_path, None, failures[:2])
    assert read_failures(tmp_path) == [header, *lines[:2]]
    script.update_failures(tmp_path, lambda question_id: question_id != "a,b", failures[2:])
    assert read_failures(tmp_path) == [header, *lines[1:]]
    script.update_failures(tmp_path, lambda _: False)
    assert not list(tmp_path.iterdir())
