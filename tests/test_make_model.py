"""Random models of the released sizes: their names, shapes and numbers, and the writing."""

import json

import make_tiny_gemma3
import pytest
import torch
from conftest import MODEL
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import run_gemma3_extraction as script

PARAMETERS = {"4b": 4_300_079_472, "12b": 12_187_325_040, "27b": 27_432_406_640}
TENSORS = {"4b": 883, "12b": 1065, "27b": 1247}
INDEX_NAME = "model.safetensors.index.json"
TINY_SHARD = 230_000  # bytes: several shards of the tiny model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_gemma3.make_tokenizer()


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_are_those_of_the_released_models(size, tokenizer):
    config = make_tiny_gemma3.make_released_config(tokenizer, size)
    model = make_tiny_gemma3.make_meta_model(config)
    assert model.num_parameters() == PARAMETERS[size]
    weights = make_tiny_gemma3.stored_weights(model)
    assert len(weights) == TENSORS[size]
    assert sum(weight.numel() for weight in weights.values()) == PARAMETERS[size]
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("size", "hidden", "query_width", "key_width"),
    [("4b", 2560, 2048, 1024), ("12b", 3840, 4096, 2048), ("27b", 5376, 4096, 2048)],
)
def test_shapes_are_those_of_the_released_models(size, hidden, query_width, key_width, tokenizer):
    config = make_tiny_gemma3.make_released_config(tokenizer, size)
    weights = make_tiny_gemma3.stored_weights(make_tiny_gemma3.make_meta_model(config))
    last = f"language_model.model.layers.{config.text_config.num_hidden_layers - 1}"
    expected = {
        "language_model.model.embed_tokens.weight": (262_208, hidden),
        f"{last}.self_attn.q_proj.weight": (query_width, hidden),
        f"{last}.self_attn.k_proj.weight": (key_width, hidden),
        f"{last}.mlp.down_proj.weight": (hidden, 4 * hidden),
        "multi_modal_projector.mm_input_projection_weight": (1152, hidden),
        "vision_tower.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision_tower.embeddings.position_embedding.weight": (4096, 1152),
        "vision_tower.encoder.layers.26.mlp.fc1.weight": (4304, 1152),
    }
    assert {name: tuple(weights[name].shape) for name in expected} == expected
    assert "lm_head.weight" not in weights
    assert not any(".head." in name for name in weights)


@pytest.mark.parametrize(("size", "scalar"), [("4b", 256), ("12b", 256), ("27b", 168)])
def test_configs_are_those_of_the_released_models(size, scalar, tokenizer):
    config = make_tiny_gemma3.make_released_config(tokenizer, size)
    text = config.text_config
    assert text.query_pre_attn_scalar == scalar
    assert text.sliding_window == 1024
    is_full = [kind == "full_attention" for kind in text.layer_types]
    assert is_full == [i % 6 == 5 for i in range(text.num_hidden_layers)]
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
    sliding = {"rope_type": "default", "rope_theta": 10_000.0}
    assert text.rope_parameters == {"full_attention": full, "sliding_attention": sliding}
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image_soft_token>")
    assert config.image_token_id < len(tokenizer) < text.vocab_size


@pytest.fixture(scope="module")
def sharded(tokenizer, tmp_path_factory):
    """The tiny config's weights, written in shards."""
    directory = tmp_path_factory.mktemp("sharded")
    config = make_tiny_gemma3.make_config(tokenizer)
    make_tiny_gemma3.write_shards(config, len(tokenizer), directory, shard_size=TINY_SHARD)
    return directory


def read_shards(directory):
    """All stored weights by name."""
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def test_shards_and_index_are_as_transformers_writes_them(sharded, tmp_path):
    AutoModelForImageTextToText.from_pretrained(MODEL).save_pretrained(
        tmp_path, max_shard_size=TINY_SHARD
    )
    names = {path.name for path in sharded.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    found = json.loads((sharded / INDEX_NAME).read_text())
    assert len(set(found["weight_map"].values())) > 2
    assert found == json.loads((tmp_path / INDEX_NAME).read_text())
    for name in ("config.json", "generation_config.json"):
        assert (sharded / name).read_text() == (tmp_path / name).read_text()


def test_shards_load_without_a_missing_or_surplus_weight(sharded):
    model, report = AutoModelForImageTextToText.from_pretrained(sharded, output_loading_info=True)
    assert {name: list(value) for name, value in report.items() if value} == {}
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    stored = read_shards(sharded)
    embedding = stored["language_model.model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, embedding)


def test_weights_are_random_and_none_is_too_large(sharded, tokenizer):
    stored = read_shards(sharded)
    for name, weight in stored.items():
        assert weight.dtype == torch.bfloat16
        assert weight.isfinite().all(), name
        assert weight.float().std() > 0, name
    embedding = stored["language_model.model.embed_tokens.weight"].float()
    assert embedding[len(tokenizer) :].std() < 0.2 * embedding[: len(tokenizer)].std()
    projection = stored["multi_modal_projector.mm_input_projection_weight"].float()
    assert float(projection.std()) == pytest.approx(1.5 / 32**0.5, rel=0.1)


def test_a_large_model_is_written_whole(tokenizer, tmp_path, monkeypatch, capsys):
    """What `--size` calls, at the tiny model's widths: the extractor can read it."""
    tiny = make_tiny_gemma3.make_config(tokenizer)
    monkeypatch.setattr(make_tiny_gemma3, "make_released_config", lambda *_: tiny)
    make_tiny_gemma3.main(tmp_path, "12b")
    assert not (tmp_path / INDEX_NAME).exists()  # one file has none
    assert "model.safetensors: 0.00 GB" in capsys.readouterr().err
    checkpoint = script.find_checkpoint(str(tmp_path), "main", None)
    assert checkpoint.config.eos_token_id == tiny.eos_token_id
    assert len(checkpoint.processor.tokenizer) == len(tokenizer)


def test_old_weights_are_not_mixed_with_new_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("sys.argv", ["make_tiny_gemma3.py", "--size", "4b", str(tmp_path)])
    with pytest.raises(SystemExit):
        make_tiny_gemma3.parse_args()
    assert "holds weights already" in capsys.readouterr().err
