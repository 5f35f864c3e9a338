"""Checkpoints as people have them: hashes, caches, surplus tensors, answers without an end."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from conftest import MODEL, flags, read_samples, write_csv
from safetensors.torch import load_file, save_file

import run_gemma3_extraction as script

Q = "what is it?"
ROWS = [("1", "circle.png", Q, "red"), ("2", "circle.png", "how many?", "NA")]


def save(weights, model):
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def model_copy(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


# ───────────────────────────────────────── the local hash ─────────────────────────────────────────


def test_any_edited_tensor_changes_the_hash(model_copy):
    """Each norm is a tensor of its own, however small: one edited value in any is noticed."""
    weights = load_file(model_copy / "model.safetensors")
    before = script.hash_local_model(model_copy)
    norms = [name for name in weights if "norm" in name]
    assert len(norms) > 50
    for name in [*norms[::7], norms[-1]]:
        edited = {**weights, name: weights[name] + 1}
        save(edited, model_copy)
        assert script.hash_local_model(model_copy) != before, name
    save(weights, model_copy)
    assert script.hash_local_model(model_copy) == before


def test_names_shapes_and_small_files_are_in_the_hash(model_copy):
    weights = load_file(model_copy / "model.safetensors")
    hashes = {script.hash_local_model(model_copy)}
    name, tensor = next((n, t) for n, t in weights.items() if t.dim() == 2)
    save({**weights, name: tensor.reshape(1, *tensor.shape)}, model_copy)
    hashes.add(script.hash_local_model(model_copy))
    save({f"{n}_" if n == name else n: t for n, t in weights.items()}, model_copy)
    hashes.add(script.hash_local_model(model_copy))
    save({**weights, name: tensor.view(torch.int16)}, model_copy)
    hashes.add(script.hash_local_model(model_copy))
    save(weights, model_copy)
    (model_copy / "generation_config.json").write_text("{}")
    hashes.add(script.hash_local_model(model_copy))
    assert len(hashes) == 5


def test_the_hash_does_not_depend_on_the_path(model_copy):
    assert script.hash_local_model(model_copy) == script.hash_local_model(MODEL)


# ──────────────────────────────── the machine's Hugging Face cache ────────────────────────────────


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A made-up cache of the machine, where the work is elsewhere; its snapshot of org/name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return put_snapshot(tmp_path / "hub", "a" * 40)


def put_snapshot(cache, commit):
    root = cache / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return shutil.copytree(MODEL, root / "snapshots" / commit)


def test_a_whole_model_in_the_machines_cache_is_used(hub_cache, run_here, tmp_path):
    status, stderr = run_here("--model", "org/name", "--max-new-tokens", 0, rows=ROWS)
    assert (status, str(hub_cache) in stderr) == (0, True), stderr
    assert not (tmp_path / "work" / "model_cache").exists()
    assert script.find_checkpoint("org/name", "main", None).revision == "a" * 40


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_an_incomplete_model_there_is_not(hub_cache, tmp_path, missing):
    (hub_cache / missing).unlink()
    put_snapshot(tmp_path / "work" / "model_cache", "b" * 40)
    assert script.find_checkpoint("org/name", "main", None).revision == "b" * 40


def test_the_cache_that_is_named_is_the_one(hub_cache, tmp_path):
    put_snapshot(tmp_path / "mine", "c" * 40)
    assert script.find_checkpoint("org/name", "main", tmp_path / "mine").revision == "c" * 40


def test_only_missing_weights_are_downloaded_and_of_the_same_commit(tmp_path, monkeypatch):
    snapshot = put_snapshot(tmp_path / "mine", "c" * 40)
    checkpoint = script.find_checkpoint("org/name", "main", tmp_path / "mine")
    calls = []
    monkeypatch.setattr(script, "snapshot_download", lambda *args, **kwargs: calls.append(kwargs))
    script.download_weights(checkpoint)
    assert calls == []
    (snapshot / "model.safetensors").unlink()
    script.download_weights(checkpoint)
    (call,) = calls
    assert call["revision"] == "c" * 40
    assert call["cache_dir"] == tmp_path / "mine"
    assert call["allow_patterns"] == ["*.safetensors"]


def test_an_adapter_beside_a_hubs_weights_is_refused_too(hub_cache, run_here):
    (hub_cache / "adapter_config.json").write_text("{}")
    status, stderr = run_here("--model", "org/name", rows=ROWS)
    assert status == 1
    assert "adapter_config.json" in stderr.splitlines()[-1]
    assert "merge it" in stderr.splitlines()[-1]


# ───────────────────────────────── what may be intended, but is told ──────────────────────────────


def test_surplus_tensors_are_one_warning(model_copy, run_here):
    weights = load_file(model_copy / "model.safetensors")
    save({**weights, "model.extra.a": torch.ones(2), "model.extra.b": torch.ones(2)}, model_copy)
    status, stderr = run_here("--model", model_copy, "--max-new-tokens", 0, rows=ROWS)
    assert status == 0
    assert stderr.count("2 tensors are not Gemma 3's and not used: model.extra.a") == 1


def lose_the_end_of_turn(model_copy):
    """As many fine-tuned checkpoints have it: `<eos>` alone ends an answer."""
    path = model_copy / "generation_config.json"
    config = json.loads(path.read_text())
    config["eos_token_id"] = config["eos_token_id"][0]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("limit", [6, 0])
def test_a_lost_end_of_turn_is_told_at_the_start(model_copy, run_here, limit):
    told = "with which the chat template ends a turn, does not end an answer"
    words = ("--model", model_copy, "--max-new-tokens", limit)
    assert told not in run_here(*words, rows=ROWS)[1]
    lose_the_end_of_turn(model_copy)
    status, stderr = run_here(*words, "--overwrite", rows=ROWS)
    assert (status, stderr.count(told)) == (0, int(limit > 0))


def test_the_test_run_says_that_no_answer_ended(model_copy, tmp_path, capsys):
    lose_the_end_of_turn(model_copy)
    csv_path = write_csv(tmp_path / "rows.csv", ROWS)
    words = flags(tmp_path / "out", "--test", "--model", model_copy, csv_path=csv_path)
    assert script.main(words) == 0
    assert "none of 2 answers ended within 6 tokens" in capsys.readouterr().out
    assert all(sample["answer_truncated"] for sample in read_samples(tmp_path / "out").values())


def test_a_model_in_shards_is_the_same_model(model_copy, tmp_path):
    weights = load_file(model_copy / "model.safetensors")
    os.unlink(model_copy / "model.safetensors")
    names = sorted(weights)
    weight_map = {}
    for k, some in enumerate([names[::2], names[1::2]], start=1):
        shard = f"model-0000{k}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, model_copy / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(some, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = script.find_checkpoint(str(model_copy), "main", None)
    found = script.load_model(checkpoint, torch.float32, torch.device("cpu"), None).state_dict()
    single = script.find_checkpoint(str(MODEL), "main", None)
    expected = script.load_model(single, torch.float32, torch.device("cpu"), None).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
