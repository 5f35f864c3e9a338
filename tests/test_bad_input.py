"""Bad rows, flags, models and directories: told, survived, never a traceback."""

import contextlib
import io
import itertools
import json
import os
import shutil

import conftest
import pytest
import torch
from conftest import CSV, IMAGES, MODEL, read_failed, read_samples
from PIL import Image
from safetensors.torch import load_file, save_file

import run_gemma3_extraction as script

PART = script.PART_NAME.format(1)
Q = "what is it?"
GOOD = [
    ("good 1", "circle.png", "what color is the shape?", "red"),
    ("good 2", "wide.jpg", "how many?", "NA"),
    ("good 3", "inside/../grey.png", "a < b <tag> & {question}?", ""),
    ("good 4", "circle.png", "is it round?", "yes"),
]


def assert_refused(found, *culprits, expected=1):
    """Refused in one clear line that names the culprits, without a traceback."""
    status, stderr = found
    assert status == expected, stderr
    assert "Traceback" not in stderr
    for culprit in culprits:
        assert str(culprit) in stderr.splitlines()[-1]


@pytest.fixture
def no_model(monkeypatch):
    """What is wrong must be found before the model is loaded."""
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("the model was loaded first"))


BAD_ROWS = {  # question_id: image_id, question, what the error must hold
    "parent": ("../outside.png", Q, "does not name a file inside"),
    "parent in between": ("inside/../../outside.png", Q, "does not name a file inside"),
    "absolute": (str(IMAGES / "circle.png"), Q, "does not name a file inside"),
    "the directory itself": (".", Q, "does not name a file inside"),
    "missing": ("nowhere.png", Q, "nowhere.png does not exist"),
    "long name": ("x" * 300 + ".png", Q, "x" * 300),
    "large": ("large.png", Q, "10000 x 10000 pixels are more than 89,478,485"),
    "cut png": ("cut.png", Q, "cut.png"),
    "empty file": ("empty.png", Q, "empty.png"),
    "html": ("html.jpg", Q, "html.jpg cannot be read as an image: it begins with b'<html>"),
    "directory": ("inside", Q, "is no file"),
    "pipe": ("pipe.png", Q, "is no file"),
    "16 bits": ("deep.png", Q, "8 bits"),
    "start_of_image": ("circle.png", "what is <start_of_image>?", "<start_of_image>"),
    "turns": ("circle.png", "what?<end_of_turn><start_of_turn>", "<end_of_turn> <start_of_turn>"),
    "empty question": ("circle.png", "", "the question is empty"),
}
GAP = [(f"gap {i}", f"gap{i}.png", Q, "") for i in range(40)]  # as HaloQuest has them


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """The test images, and next to them everything that is no image."""
    root = tmp_path_factory.mktemp("hostile")
    images = shutil.copytree(IMAGES, root / "images")
    (images / "inside").mkdir()
    shutil.copy(IMAGES / "circle.png", root / "outside.png")
    (images / "cut.png").write_bytes((IMAGES / "circle.png").read_bytes()[:200])
    (images / "empty.png").touch()
    (images / "html.jpg").write_text("<html><body>404 Not Found</body></html>")
    os.mkfifo(images / "pipe.png")
    Image.new("I;16", (32, 20), 3000).save(images / "deep.png")
    Image.new("1", (10_000, 10_000)).save(images / "large.png")
    return images


@pytest.fixture(scope="module")
def bad_rows_run(images_dir, tmp_path_factory):
    """One run over all bad rows and the good ones between them: status, stderr, directory."""
    root, stderr = tmp_path_factory.mktemp("bad_rows"), io.StringIO()
    bad = [(name, image_id, question, "") for name, (image_id, question, _) in BAD_ROWS.items()]
    rows = [*GOOD[:1], *bad[:12], *GOOD[1:3], *bad[12:], *GAP, *GOOD[3:]]
    csv_path, words = conftest.write_csv(root / "rows.csv", rows), ("--checkpoint-interval", 10)
    with contextlib.redirect_stderr(stderr), conftest.no_hang():
        status = script.main(
            conftest.flags(root / "out", *words, csv_path=csv_path, images_dir=images_dir)
        )
    return status, stderr.getvalue(), root / "out"


def test_bad_rows_and_a_gap_do_not_stop_the_run(bad_rows_run, run_here, images_dir, tmp_path):
    status, stderr, out = bad_rows_run
    num_bad = len(BAD_ROWS) + len(GAP)
    assert (status, "Traceback" in stderr) == (3, False), stderr
    assert f"{len(GAP) + 8} of {len(GAP) + 16} images are missing" in stderr
    counts = f"Extracted 4 of {num_bad + 4} samples ({num_bad} failed, 0 already done) in "
    assert stderr.splitlines()[-1].startswith(counts)
    assert read_failed(out).keys() == {*BAD_ROWS, *(row[0] for row in GAP)}
    assert run_here(rows=GOOD, images_dir=images_dir)[0] == 0
    found, expected = read_samples(out), read_samples(tmp_path / "out")
    assert found.keys() == {row[0] for row in GOOD}
    for sample in (*found.values(), *expected.values()):
        del sample["part"]
    conftest.assert_same_samples(found, expected)


@pytest.mark.parametrize("question_id", BAD_ROWS)
def test_bad_row_is_listed_with_its_reason(bad_rows_run, question_id):
    image_id, _, reason = BAD_ROWS[question_id]
    listed_image, error = read_failed(bad_rows_run[2])[question_id]
    assert listed_image == image_id
    assert reason in error
    assert "\n" not in error
    assert " at 0x" not in error


@pytest.mark.parametrize("first_good", [0, 25])
def test_the_first_25_rows_that_the_model_sees(first_good, run_here, tmp_path, monkeypatch):
    """All failed: it stops. If one came out, whatever it was, it goes on."""
    pixels, calls = script.Prompter.pixels, itertools.count(1)

    def spoilt(*args):
        return pixels(*args) * (1 if next(calls) == first_good else torch.nan)

    monkeypatch.setattr(script.Prompter, "pixels", spoilt)
    rows = [(str(i), f"{i}/../circle.png", Q, "") for i in range(1, 29)]
    words = ("--num-workers", 1, "--batch-size", 5, "--max-new-tokens", 0)
    found = run_here(*words, rows=[*GAP[:30], *rows])
    failed = read_failed(tmp_path / "out").keys() - {row[0] for row in GAP}
    if first_good:
        assert (found[0], failed) == (3, {row[0] for row in rows} - {"25"})
    else:
        assert_refused(found, "the first 25 rows", "something is wrong with all of them")
        assert failed == {row[0] for row in rows[:25]}


def test_any_question_id_survives(run_here, tmp_path):
    ids = [".", "..", "...", "/", "a/b", "/a", "a//b", "%2F", "100%", "./a", "ключ", " a "]
    ids += ["x" * 3000, "007", "7", "a\nb", "NA"]
    rows = [(question_id, *GOOD[0][1:]) for question_id in ids]
    for told in (f"{len(ids)} of {len(ids)} samples (0 failed, 0 already done)", f"{len(ids)} alr"):
        status, stderr = run_here("--max-new-tokens", 0, rows=rows)
        assert (status, told in stderr.splitlines()[-1]) == (0, True), stderr
    assert read_samples(tmp_path / "out").keys() == set(ids)


BAD_FLAGS = {  # the flags, the exit status, what the last line holds
    "float16": (["--dtype", "float16"], 2, "65504"),
    "batch size": (
        ["--batch-size", "0"],
        2,
        "--batch-size: '0' is not a whole number of at least 1",
    ),
    "interval": (["--checkpoint-interval", "-1"], 2, "--checkpoint-interval"),
    "device map": (["--device-map", "balanced"], 2, "balanced"),
    "one that is gone": (["--strict"], 2, "--strict"),
    "layer -9": (["--layers", "0,-9"], 1, "--layers -9: the model has layers 0 to 7"),
    "no device": (["--device", "gpu"], 1, "--device gpu"),
    "no such card": (["--device", "cuda:99"], 1, "--device cpu"),
    "images nowhere": (["--images-dir", "/nowhere"], 1, "none of the 3 images is there, not even"),
    "a file to write to": (["--output-dir", CSV], 1, f"--output-dir {CSV}: File exists | choose"),
    "read-only": (["--output-dir", "/proc/a"], 1, "--output-dir /proc/a: No such file"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_told_before_the_model_loads(name, run_here, no_model, tmp_path):
    words, status, culprit = BAD_FLAGS[name]
    assert_refused(run_here(*words, rows=GOOD), culprit, expected=status)
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_seen_before_the_model_loads(run_here, no_model, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    assert_refused(run_here(rows=GOOD), f"{tmp_path / 'out'} has 0.0 MB free; the run needs", " | ")


def without(name):
    return lambda model: (model / name).unlink()


def a_weight_missing(model):
    weights = load_file(model / "model.safetensors")
    del weights[next(name for name in weights if "layers.3.mlp" in name)]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def add_tensors(*names):
    """Tensors of these names beside the model's own."""

    def add(model):
        weights = load_file(model / "model.safetensors")
        for name in names:
            weights[name] = torch.ones(2, 2)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return add


def change_config(**fields):
    def change(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))

    return change


quantise = change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def cut_short(size):
    return lambda model: os.truncate(model / "model.safetensors", size)


def double_bos(model):
    path = model / "chat_template.jinja"
    path.write_text("{{ bos_token }}" + path.read_text())


def add_adapter(model):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def add_adapter_weights(model):
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")


def change_template(old, new):
    def change(model):
        path = model / "chat_template.jinja"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


no_generation_prompt = change_template("if add_generation_prompt", "if false")
capitals = change_template("item['text'] | trim", "item['text'] | trim | upper")


def add_index(model):
    """Shards beside the single file, as after another save into the same directory."""
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    shutil.copy(model / "model.safetensors", model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


WHOLE = "the directory must contain the whole model"
BAD_MODELS = {
    "no weights": (without("model.safetensors"), "no file named model.safetensors", WHOLE),
    "weights cut short": (cut_short(10_000), "", ""),
    "weights cut to nothing": (cut_short(4), "", ""),
    "a weight missing": (a_weight_missing, "1 weights are missing or misshapen, first model.", ""),
    "quantised": (quantise, "quantised weights (bitsandbytes) are not supported", ""),
    "no config": (without("config.json"), "config.json", ""),
    "config of a wrong type": (change_config(vision_config=30), "", ""),
    "a number of a wrong type": (change_config(mm_tokens_per_image="many"), "", ""),
    "another model": (change_config(model_type="llama"), "its type is llama", ""),
    "no chat template": (without("chat_template.jinja"), "base checkpoints", "jinja"),
    "two bos": (double_bos, "exactly one <bos>", ""),
    "no processor config": (without("processor_config.json"), "preprocessor_config.json", WHOLE),
    "an adapter beside it": (add_adapter, "adapter_config.json", "merge it"),
    "adapter weights beside it": (add_adapter_weights, "adapter_model.safetensors", "merge it"),
    "a template without its end": (no_generation_prompt, "no generation prompt", ""),
    "a template in capitals": (capitals, "changes the question", ""),
    "an adapter in it": (add_tensors("model.language_model.layers.0.mlp.lora_A"), "merge it", ""),
    "a wrapped layer in it": (add_tensors("base_model.model.x.base_layer.weight"), "merge it", ""),
    "two sets of weights": (add_index, "has both model.safetensors and", "out of date"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_model_that_cannot_be_loaded(name, run_here, tmp_path):
    spoil, reason, advice = BAD_MODELS[name]
    model = shutil.copytree(MODEL, tmp_path / "m")
    spoil(model)
    found = run_here("--model", model, rows=GOOD)
    assert_refused(found, model, reason, advice)
    assert (WHOLE in found[1]) == (advice == WHOLE)
    assert len(found[1].splitlines()[-1]) < 2000
    assert not list((tmp_path / "out").glob("*.h5"))


@pytest.mark.parametrize("name", ["/no/where", "org/none"])
def test_model_that_is_not_there(name, run_here, tmp_path):
    told = "no such directory" if name[0] == "/" else "--cache-dir"
    found = run_here("--model", name, "--cache-dir", tmp_path, rows=GOOD)
    assert_refused(found, name, told, "check the path" if name[0] == "/" else "hf auth login")
