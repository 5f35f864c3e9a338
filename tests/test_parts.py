"""Part files: names, types, checksums, and what becomes of them."""

import csv
import errno
import os
import subprocess
import sys
import urllib.parse
import zlib

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, read_failed

import run_gemma3_extraction as script

SHAPES = {
    "vision_representation": 24,
    "vision_token_representation/layer_2": 32,  # behind layer_12, in the order of names
    "vision_token_representation/layer_12": 32,
    "query_token_representation/layer_2": 32,
    "multimodal_representation/layer_2": 32,
}
SETTINGS = dict.fromkeys(script.IDENTITY, "as ever") | {
    "model_name": "tiny",
    "device": "cpu",
    "storage_dtype": "float32",
    "schema_version": 2,
    "dataset_sha256": "0" * 64,
}
ATTRIBUTES = {
    "num_prompt_tokens": 274,
    "vision_token_pos": 260,
    "query_token_pos": 273,
    "num_answer_tokens": 29,
    "answer_truncated": False,
    "image_sha256": "5" * 64,
    "first_token_entropy": 1.25,
}


def make_vectors(seed=0, scale=1e5):
    """Vectors of the size that Gemma 3's residual stream reaches, which float16 does not hold."""
    random = np.random.default_rng(seed)
    widths = SHAPES | {"answer_logprobs": 30}
    return {
        name: (random.standard_normal(width) * scale).astype(np.float32)
        for name, width in widths.items()
    }


def make_row(index, question_id=None):
    return script.Row(index, question_id or str(index), "a.png", f"q{index}", "NA")


def write_part(path, rows, compression="none", storage_dtype="float32"):
    writer = script.PartWriter(path, SETTINGS | {"storage_dtype": storage_dtype}, compression)
    for row in rows:
        writer.add(row, f"answer {row.index}", make_vectors(row.index), ATTRIBUTES)
    writer.finish()
    return path


@pytest.fixture(scope="module")
def two_samples(tmp_path_factory):
    """The bytes of a finished part."""
    path = tmp_path_factory.mktemp("two_samples") / "a.h5"
    return write_part(path, [make_row(0), make_row(1)]).read_bytes()


@pytest.fixture
def part(two_samples, tmp_path):
    """A finished part of two samples."""
    path = tmp_path / script.PART_NAME.format(1)
    path.write_bytes(two_samples)
    return path


# ──────────────────────────────────────────── writing ────────────────────────────────────────────


def test_ids_come_back_from_their_names(tmp_path):
    ids = ["007", "a/b", "/", ".", "..", "...", "a.b", "%2F", "50%", "日本/语", " ", "ключ"]
    path = write_part(tmp_path / "a.h5", list(map(make_row, range(12), ids)))
    with h5py.File(path) as file:
        names = {group.attrs["question_id"]: name for name, group in file.items()}
    assert names.keys() == set(ids)
    for question_id, name in names.items():
        assert urllib.parse.unquote(name) == question_id
    with script.open_part(path) as part:
        assert [names[question_id] for question_id in ids] == list(map(script.group_name, ids))
        script.check_part(path, part, SETTINGS)


@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
def test_float32_is_exact(tmp_path, compression):
    with h5py.File(write_part(tmp_path / "a.h5", [make_row(3)], compression)) as file:
        for name, vector in make_vectors(3).items():
            dataset = file["3"][name]
            assert dataset.dtype == np.float32
            np.testing.assert_array_equal(dataset, vector)
            assert dataset.compression == {"none": None}.get(compression, compression)
            assert dataset.shuffle == (compression != "none")
        link = file["3"].get("vision_only_representation", getlink=True)
        assert isinstance(link, h5py.SoftLink)
        assert file["3/vision_only_representation"] == file["3/vision_representation"]


def test_bfloat16_rounds_as_torch_and_leaves_means_and_logprobs_alone(tmp_path):
    with h5py.File(write_part(tmp_path / "a.h5", [make_row(3)], storage_dtype="bfloat16")) as file:
        for name, vector in make_vectors(3).items():
            is_halved = "_token_" in name
            rounded = torch.from_numpy(vector).bfloat16().float().numpy()
            np.testing.assert_array_equal(file["3"][name], rounded if is_halved else vector)
            assert file["3"][name].id.get_storage_size() == vector.size * (2 if is_halved else 4)


@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16"])
def test_crc32_is_that_of_the_vectors_as_they_are_read_back(tmp_path, storage_dtype):
    path = write_part(tmp_path / "a.h5", [make_row(3)], storage_dtype=storage_dtype)
    with h5py.File(path) as file:
        crc32, names = 0, []
        file["3"].visit(names.append)  # goes by no soft link
        for name in sorted(names):
            item = file["3"][name]
            if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
                crc32 = zlib.crc32(item[()].astype("<f4").tobytes(), crc32)
        assert file["3"].attrs["crc32"] == crc32


def test_a_part_takes_over_what_was_there(part):
    write_part(part, [make_row(2)])
    assert script.scan_parts(part.parent, SETTINGS) == dict.fromkeys("012", part)
    with h5py.File(part) as file:
        assert file.attrs["num_samples"] == 3
        for index in range(3):
            sample = file[str(index)]
            assert sample["answer"].asstr()[()] == f"answer {index}"
            assert dict(sample.attrs).items() >= ATTRIBUTES.items()
            vision = make_vectors(index)["vision_representation"]
            np.testing.assert_array_equal(sample["vision_only_representation"], vision)


def test_nothing_is_there_before_it_is_whole(tmp_path):
    path = tmp_path / "a.h5"
    writer = script.PartWriter(path, SETTINGS, "none")
    writer.add(make_row(0), "", make_vectors(), {})
    assert not list(tmp_path.glob("*.h5"))
    writer.finish()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_given_up_leaves_the_old_part(part):
    before = part.read_bytes()
    writer = script.PartWriter(part, SETTINGS, "none")
    writer.add(make_row(2), "", make_vectors(), {})
    writer.close()
    assert part.read_bytes() == before
    assert list(part.parent.iterdir()) == [part]


def test_a_part_whose_rows_all_failed_is_written_empty(tmp_path):
    path = write_part(tmp_path / "a.h5", [])
    with h5py.File(path) as file:
        script.check_part(path, file, SETTINGS)
        assert (len(file), file.attrs["num_samples"]) == (0, 0)


def test_a_part_that_gained_nothing_stays_as_it_was(part):
    os.utime(part, ns=(1, 1))
    write_part(part, [])
    assert part.stat().st_mtime_ns == 1
    assert list(part.parent.iterdir()) == [part]


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
vectors = dict.fromkeys(names, np.ones(3840, np.float32)) | {script.VISION: np.ones(1152, "f4")}
writer = script.PartWriter(Path(sys.argv[1]), {"storage_dtype": "float32"}, "none")
for index in range(1000):
    row = script.Row(index, str(index), "a.png", "q", "NA")
    writer.add(row, "", vectors, {})
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
    vectors = {name: np.ones(width, np.float32) for name, width in shapes.items()}
    vectors["answer_logprobs"] = np.ones(30, np.float32)
    writer = script.PartWriter(tmp_path / "a.h5", SETTINGS, "none")
    for index in range(100):
        row = script.Row(index, str(index), f"{index:012d}.jpg", "is it so? " * 6, "NA")
        writer.add(row, "an answer " * 12, vectors, ATTRIBUTES)
    writer.finish()
    told = 100 * script.bytes_per_sample(shapes, "float32")
    assert 0.7 * told < (tmp_path / "a.h5").stat().st_size < told


# ──────────────────────────────────────────── reading ────────────────────────────────────────────


def edit(change):
    """A damage done through HDF5."""

    def damage(path):
        with h5py.File(path, "a") as file:
            change(file)

    return damage


def overwrite_page(path):
    """What a disk without a sync may leave: zeros, here where the root's attributes are."""
    content = path.read_bytes()
    place = content.index(b"checkpoint_interval") // 512 * 512
    path.write_bytes(content[:place] + bytes(512) + content[place + 512 :])


DAMAGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "no HDF5": lambda path: path.write_text("I am a text.\n"),
    "zeroed page": overwrite_page,
    "sample lost": edit(lambda file: file.__delitem__("1")),
    "sample too many": edit(lambda file: file.create_group("2")),
    "stray dataset": edit(lambda file: file.__setitem__("stray", 1.0)),
    "count wrong": edit(lambda file: file.attrs.__setitem__("num_samples", 3)),
    "count lost": edit(lambda file: file.attrs.__delitem__("num_samples")),
    "setting lost": edit(lambda file: file.attrs.__delitem__("layers")),
    "version lost": edit(lambda file: file.attrs.__delitem__("schema_version")),
    "hash lost": edit(lambda file: file.attrs.__delitem__("dataset_sha256")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_part_is_set_aside(part, name, capsys):
    content = part.read_bytes()
    DAMAGES[name](part)
    damaged = part.read_bytes()
    assert damaged != content
    assert script.scan_parts(part.parent, SETTINGS) == {}
    (aside,) = part.parent.iterdir()
    assert script.OUR_FILES.fullmatch(aside.name)
    assert aside.suffix != ".h5"
    assert aside.read_bytes() == damaged


def test_no_vector_and_no_text_is_read_to_go_on(tmp_path, monkeypatch):
    path = tmp_path / script.PART_NAME.format(1)
    writer = script.PartWriter(path, SETTINGS, "none")
    for index in range(20):
        row = script.Row(index, str(index), "a.png", "q" * 100_000, "")
        vectors = {name: np.ones(100_000, np.float32) for name in SHAPES}
        writer.add(row, "", vectors, ATTRIBUTES)
    writer.finish()
    preadv, num_bytes = os.preadv, 0

    def counted(*args):
        nonlocal num_bytes
        read = preadv(*args)
        num_bytes += read
        return read

    monkeypatch.setattr(script.os, "preadv", counted)
    assert len(script.scan_parts(tmp_path, SETTINGS)) == 20
    assert 0 < num_bytes < path.stat().st_size / 400


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_for_a_moment_is_no_damage(part, monkeypatch, code):
    preadv, calls = os.preadv, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return preadv(*args)

    monkeypatch.setattr(script.os, "preadv", failing)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        script.scan_parts(part.parent, SETTINGS)
    assert caught.value.filename == str(part)
    assert list(part.parent.iterdir()) == [part]
    assert script.scan_parts(part.parent, SETTINGS) == {"0": part, "1": part}


def test_other_settings_are_not_damage(part):
    with pytest.raises(script.ExtractionError, match="layers was 'as ever' and is 'others'"):
        script.scan_parts(part.parent, SETTINGS | {"layers": "others"})
    assert list(part.parent.iterdir()) == [part]


def test_another_device_goes_on(part):
    """A card's name and libraries are attributes too, which a part from a CPU does not have."""
    settings = SETTINGS | {"device": "cuda:0", "device_name": "H100", "cuda_version": "13.0"}
    assert script.scan_parts(part.parent, settings) == {"0": part, "1": part}


def test_another_version_of_the_program_is_refused(part):
    edit(lambda file: file.attrs.__setitem__("schema_version", 1))(part)
    with pytest.raises(
        script.ExtractionError, match=r"schema_version was 1 and is 2.* --overwrite"
    ):
        script.scan_parts(part.parent, SETTINGS)
    assert list(part.parent.iterdir()) == [part]


def test_a_part_that_repeats_an_earlier_one_is_set_aside(part, capsys):
    later = part.with_name(script.PART_NAME.format(2))
    later.write_bytes(part.read_bytes())
    assert script.scan_parts(part.parent, SETTINGS) == {"0": part, "1": part}
    assert part.exists()
    assert not later.exists()


def test_failures_come_back_and_go_away(tmp_path):
    rows = [make_row(0, "a,b"), make_row(1, "ключ"), make_row(2, "c")]
    failures = [script.Failure(row, f'said "no"\nto {row.index}') for row in rows]
    lines = {failure.row.question_id: ("a.png", failure.error) for failure in failures}
    assert script.update_failures(tmp_path, lambda _: True, failures[:2]) == set()
    assert read_failed(tmp_path) == {name: lines[name] for name in ("a,b", "ключ")}
    known = script.update_failures(tmp_path, lambda id_: id_ != "a,b", failures[2:])
    assert known == {"a,b", "ключ"}
    assert read_failed(tmp_path) == {name: lines[name] for name in ("ключ", "c")}
    script.update_failures(tmp_path, lambda _: False)
    assert not list(tmp_path.iterdir())


def test_what_somebody_spoilt_of_the_failures_goes(tmp_path):
    path = tmp_path / "failed_samples.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("x",), ("a", "a.png", "no"), (), ("b",), ("c", "d", "e", "f")])
    assert script.update_failures(tmp_path, lambda _: True) == {"a"}
    assert read_failed(tmp_path) == {"a": ("a.png", "no")}
