"""Part files: names, types, checksums, and what becomes of them."""

import os
import re
import urllib.parse
import zlib
from pathlib import Path
from types import SimpleNamespace as Namespace

import h5py
import numpy as np
import pytest
from fault_test import PART_1, SETTINGS

import run_gemma3_extraction as script

KINDS = (script.VISION_TOKEN, script.QUERY_TOKEN, script.MULTIMODAL)
PROMPTER = Namespace(decode=lambda ids: f"answer {len(ids)}", soft_stop=261)


def make_sample(question_id, layers=(0, 2, 12), width=32, vision_width=24, seed=0):
    """With vectors of the size that Gemma 3's states reach, which float16 does not hold."""
    random = np.random.default_rng(seed)
    names = [f"{kind}/layer_{i}" for kind in KINDS for i in layers]
    widths = dict.fromkeys(names, width) | {script.VISION: vision_width}
    vectors = {n: 1e5 * random.standard_normal(w, np.float32) for n, w in widths.items()}
    row = script.Row(question_id, "000000123456.jpg", "is it so? " * 6, "NA")
    answer = (list(range(29)), False, [-0.1] * 30, 1.25)
    return script.Sample(script.Prompt(row, [0] * 274), "5" * 64, vectors, *answer)


def write_part(path, samples, planned=None, compression="none"):
    writer = script.PartWriter(SETTINGS, {}, PROMPTER, compression)
    writer.write(path, planned or [sample.row for sample in samples], samples)
    return path


def test_ids_come_back_from_their_names_in_order(tmp_path):
    ids = ["007", "a/b", "/", ".", "..", "...", "a.b", "%2F", "50%", "日本/语", " ", "ключ"]
    with h5py.File(write_part(tmp_path / PART_1, list(map(make_sample, ids)))) as file:
        names = list(file)
        assert [file[name].attrs["question_id"] for name in names] == ids
    assert list(map(urllib.parse.unquote, names)) == ids


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_float32_is_exact_and_crc32_tells_of_it(tmp_path, compression):
    sample = make_sample("q")
    vectors, crc32 = sample.vectors | {"answer_logprobs": np.full(30, -0.1, np.float32)}, 0
    with h5py.File(write_part(tmp_path / "a.h5", [sample], compression=compression)) as file:
        for name, vector in sorted(vectors.items()):
            dataset = file["q"][name]
            assert (dataset.dtype, dataset[()].tobytes()) == (np.float32, vector.tobytes())
            packing = (compression, compression != "none")
            assert (dataset.compression or "none", dataset.shuffle) == packing
            crc32 = zlib.crc32(dataset[()].tobytes(), crc32)
        assert file["q"].attrs["crc32"] == crc32
        link = file["q"].get("vision_only_representation", getlink=True)
        assert link.path == "vision_representation"


def test_completing_a_part_keeps_what_was_there_in_the_order_of_the_plan(tmp_path):
    """A row that left the CSV stays too, at the end."""
    samples = [make_sample(name, seed=seed) for seed, name in enumerate("abcdx")]
    planned = [sample.row for sample in samples[:4]]
    path = write_part(tmp_path / PART_1, [samples[4], samples[2], samples[0]])
    write_part(path, [samples[3], samples[1], make_sample("a", seed=9)], planned)
    with h5py.File(path) as file:
        assert (list(file), file.attrs["num_samples"]) == (list("abcdx"), 5)
        for sample in samples:
            group = file[sample.row.question_id]
            for name, vector in sample.vectors.items():
                assert group[name][()].tobytes() == vector.tobytes()


def test_nothing_is_there_before_it_is_whole(tmp_path, monkeypatch):
    replace, seen = script.os.replace, []

    def look(partial, path):
        seen.extend(one.name for one in tmp_path.iterdir())
        replace(partial, path)

    monkeypatch.setattr(script.os, "replace", look)
    path = write_part(tmp_path / "a.h5", [make_sample("a")])
    (partial,) = seen
    assert re.fullmatch(rf"a\..+-{os.getpid()}\.partial", partial)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("num_layers", [1, 5, 48])
def test_a_sample_takes_what_is_told(tmp_path, num_layers):
    samples = [make_sample(str(i), range(num_layers)) for i in range(100)]
    size = write_part(tmp_path / "a.h5", samples).stat().st_size
    vision, text = Namespace(hidden_size=24), Namespace(hidden_size=32)
    config = Namespace(vision_config=vision, text_config=text)
    told = 100 * script.bytes_per_sample(config, range(num_layers))
    assert 0.7 * told < size < told


def tell(name, file="status"):
    """A number that the kernel keeps of this process."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self", file).read_text())[1])


def test_a_part_of_the_12bs_sizes(tmp_path):
    """How much memory it takes, samples included; and to go on reads no vector and no text."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    memory = tell("VmRSS")
    samples = [make_sample(str(i), (0, 12, 24, 36, 47), 3840, 1152) for i in range(1000)]
    size = write_part(tmp_path / PART_1, samples).stat().st_size
    peak, read = (tell("VmHWM") - memory) * 1e3, tell("rchar", "io")
    assert len(script.read_stored_names(tmp_path, SETTINGS)) == 1000
    assert 0 < tell("rchar", "io") - read < size / 1000
    assert 230e6 < size < peak < 700e6
