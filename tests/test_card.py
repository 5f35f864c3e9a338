"""What a card will meet, as far as it can be known without one."""

import itertools
import json

import benchmark
import pytest
import torch
from conftest import MODEL, make_options
from safetensors.torch import load_file, save_file
from test_extraction import make_extractor, reference, run_all, worst_error
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3Config

import run_gemma3_extraction as script

META = torch.device("meta")
H100 = benchmark.CARDS[0]


# ─────────────────────────────────────────── on paper ────────────────────────────────────────────


@pytest.fixture(scope="module")
def large():
    """The 12B without its numbers."""
    return benchmark.make_model("12b", META, torch.bfloat16)


@pytest.fixture(scope="module")
def large_prompter(large, processor):
    return script.Prompter(processor, large.config)


def run_some(model, prompter, questions, batch_size, num_decoding):
    with benchmark.nothing_read_back(), benchmark.Meter() as meter, torch.inference_mode():
        extractor = benchmark.PaperExtractor(model, prompter, 200, batch_size, meter)
        extractor.has_ended = lambda live: False
        source = benchmark.ask_for_ever(prompter, questions)
        while len(extractor._live) < batch_size:
            extractor._prefill(extractor._admit(source))
        for _ in range(num_decoding):
            extractor._decode()
    return extractor


@pytest.mark.parametrize(("questions", "floor"), [(1, 11.5), (10, 1.4)])
def test_flops_are_at_the_floor(large, large_prompter, questions, floor):
    """Tower and shared tokens once an image, own tokens once: nothing is padding."""
    extractor = run_some(large, large_prompter, questions, 10, 0)
    flops = sum(flops for _, _, flops in extractor.prefills)
    found = flops / sum(n for _, n, _ in extractor.prefills) / 1e12
    vision = large.config.vision_config
    tower = sum(p.numel() for p in large.model.vision_tower.encoder.parameters())
    per_token = sum(p.numel() for p in large.model.language_model.layers.parameters())
    images = itertools.islice(benchmark.ask_for_ever(large_prompter, questions), 10 // questions)
    least = 0
    for asked in images:
        own = sum(len(prompt.input_ids) - asked.num_shared for prompt in asked.prompts)
        least += 2 * per_token * (asked.num_shared + own) + 2 * 4096 * tower
        least += 4 * 4096**2 * vision.hidden_size * vision.num_hidden_layers
    assert 1 < found / (least / 10 / 1e12) < 1.04  # attention of the decoder comes on top
    assert found == pytest.approx(floor, rel=0.07)


@pytest.mark.parametrize("questions", [1, 10])
def test_a_decoding_step_launches_little(large, large_prompter, questions):
    """At most 2,000 operations, whatever the batch; and reads only its own images' keys."""
    steps = [run_some(large, large_prompter, questions, size, 4).steps[2:] for size in (10, 20)]
    num_ops = {ops for step in steps for ops, _, _ in step}
    assert max(num_ops) <= 2000
    per_slot = 2 * 2 * 48 * 8 * 256
    for size, step in zip((10, 20), steps, strict=True):
        for _, num_going, kv_bytes in step:
            assert num_going == size
            rows = size // questions
            assert kv_bytes <= rows * per_slot * (264 + questions * 32)


# ─────────────────────────────────────── memory and placing ──────────────────────────────────────

TEXT = {  # layers, hidden, intermediate, heads, kv_heads, head_dim
    "4b": (34, 2560, 10240, 8, 4, 256),
    "12b": (48, 3840, 15360, 16, 8, 256),
    "27b": (62, 5376, 21504, 32, 16, 128),
}
PARAMETERS = {"4b": 4.30e9, "12b": 12.19e9, "27b": 27.4e9}
NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
NAMES = (*NAMES, "num_key_value_heads", "head_dim")


def make_config(size):
    text = dict(zip(NAMES, TEXT[size], strict=True)) | {"vocab_size": 262_208}
    vision = benchmark.SIZES["12b"]["vision_config"] | {"image_size": 896, "patch_size": 14}
    return Gemma3Config(text_config=text, vision_config=vision)


@pytest.mark.parametrize(
    ("size", "memory", "expected"),
    [
        *(("4b", 24, (140, 190)), ("4b", 40, (256, 256)), ("4b", 80, (256, 256))),
        *(("12b", 24, (1, 1)), ("12b", 40, (45, 75)), ("12b", 80, (240, 256))),
        *(("27b", 40, (1, 1)), ("27b", 80, (60, 100))),
    ],
)
def test_batch_size_follows_from_free_memory(size, memory, expected):
    """Cards show a little less than their name; a context takes half a GiB."""
    free = int((memory * 0.985 - 0.5) * 2**30 - 2 * PARAMETERS[size])
    found = script.fit_batch_size(free, make_config(size), 2, 274 + 64 + 200)
    assert expected[0] <= found <= expected[1]


def test_batch_size_is_the_users_or_fixed_on_a_cpu(monkeypatch):
    config = make_config("12b")
    options = make_options(device="cpu")
    device = torch.device("cpu")
    assert script.choose_batch_size(options, config, 274, device) == script.CPU_BATCH_SIZE
    asked = make_options(batch_size=7)
    cuda = torch.device("cuda", 0)
    assert script.choose_batch_size(asked, config, 274, cuda) == 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (55 * 2**30, 80 * 2**30))
    auto = script.choose_batch_size(make_options(), config, 274, cuda)
    assert auto == script.fit_batch_size(55 * 2**30, config, 2, 274 + 64 + 200)


def place(monkeypatch, large, free, num_cards=1, **options):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 2**30), 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    device = torch.device("cuda", 0)
    return script.place_weights(make_options(**options), large.config, device)


def test_the_embedding_stays_behind_on_a_card_of_24_gb(monkeypatch, large, caplog):
    card = torch.device("cuda", 0)
    headless = {"device_map": "auto", "max_new_tokens": 0}
    with caplog.at_level("INFO"):
        found = place(monkeypatch, large, 22.2, **headless)
    assert found == {"": card, script.EMBEDDING: "cpu", "lm_head": "cpu"}
    assert "22.2 GiB free, the weights take 22.7" in caplog.text
    assert place(monkeypatch, large, 79, max_new_tokens=0) == {"": card}
    assert place(monkeypatch, large, 20, **headless) == "auto"  # too small even so
    assert place(monkeypatch, large, 22.2, num_cards=2, **headless) == "auto"
    assert place(monkeypatch, large, 22.2, device_map="auto") == "auto"  # it answers


def test_a_card_that_is_too_small_is_told_what_is_missing(monkeypatch, large):
    with pytest.raises(script.ExtractionError, match=r"0\.7 GiB are missing.*--max-new-tokens 0"):
        place(monkeypatch, large, 22.0)


def test_an_embedding_in_host_memory_is_looked_up_there(prompter, model):
    """accelerate's hook, which would carry the matrix to the card, is gone."""
    device_map = {"": "cpu", script.EMBEDDING: "cpu", "lm_head": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "place_weights", lambda *_: device_map)
        options = make_options(model=str(MODEL), dtype="float32", device="cpu")
        loaded = script.load_model(options, model.config, torch.device("cpu"))
    embedding = loaded.get_submodule(script.EMBEDDING)
    assert not hasattr(embedding, "_hf_hook")
    assert embedding.weight.device.type == "cpu"
    torch.testing.assert_close(embedding.weight, model.get_submodule(script.EMBEDDING).weight)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it plans anew for every length


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (script.ExtractionError("out of memory"), False),
    ],
)
def test_want_of_memory_is_known_in_all_its_forms(error, expected):
    assert script.is_out_of_memory(error) is expected


def test_buffers_grow_a_layer_at_a_time(model, monkeypatch):
    """Never are two copies of more than one layer's keys or values held."""
    decoder = script.Decoder(model)
    bank = script.Bank(512, decoder.config, decoder.devices, decoder.dtype)
    row = bank.take_row()

    def take_slots(count):
        for _ in range(count):
            bank.slots[row].take()

    take_slots(100)
    bank.grow()
    bank.keys[3][row, 7] = 5.0
    held, enlarge = [], script.enlarge

    def watched(old, rows, slots):
        sizes = [t.shape[1] for t in bank.keys + bank.values]
        held.append(len(set(sizes)))
        return enlarge(old, rows, slots)

    monkeypatch.setattr(script, "enlarge", watched)
    take_slots(100)
    bank.grow()
    assert max(held) == 2
    assert len(held) == 2 * 8 + 1
    assert (bank.keys[3][row, 7] == 5.0).all()
    assert {t.shape[1] for t in bank.keys + bank.values} == {256}


# ─────────────────────────────────── checkpoints as they are on the hub ──────────────────────────


def write_hub_layout(directory, **text_config):
    """The tiny model as the released ones lie there: old names of weights, a sparse config."""
    weights = load_file(MODEL / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        if ".head." in name:
            continue  # the vision tower's, which the released ones have not
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        renamed[name.replace("model.multi_modal_projector.", "multi_modal_projector.")] = tensor
    assert not any(name.startswith("model.") or "lm_head" in name for name in renamed)
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "vocab_size")
    kept = (*kept, "num_attention_heads", "num_key_value_heads", "head_dim")
    kept = (*kept, "query_pre_attn_scalar")
    sparse = {name: text[name] for name in kept} | {"model_type": "gemma3_text"} | text_config
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small = {name: vision[name] for name in (*kept, "image_size", "patch_size")}
    small |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    names = ("architectures", "image_token_index", "boi_token_index", "eoi_token_index")
    names = (*names, "eos_token_id", "mm_tokens_per_image", "model_type")
    whole = {name: config[name] for name in names if name in config}
    whole |= {"text_config": sparse, "vision_config": small, "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(whole))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((MODEL / name).read_bytes())
    for name in ("generation_config.json", "processor_config.json"):
        (directory / name).write_bytes((MODEL / name).read_bytes())
    processor = json.loads((MODEL / "processor_config.json").read_text())
    image_processor = processor["image_processor"] | {"processor_class": "Gemma3Processor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(image_processor))
    return directory


def load(directory):
    config, processor = script.load_processor(make_options(model=str(directory)))
    options = make_options(model=str(directory), dtype="float32", device="cpu")
    loaded = script.load_model(options, config, torch.device("cpu"))
    return loaded, script.Prompter(processor, config), processor


def some_rows():
    from test_extraction import make_rows

    return [row for row in make_rows() if row.image_id in ("circle.png", "wide.jpg")][:6]


def assert_as_transformers(directory):
    """The program's own loading and extraction, against transformers' on the same directory."""
    plain = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    plain_processor = AutoProcessor.from_pretrained(directory, backend="pil")
    loaded, prompter, _ = load(directory)
    found = run_all(make_extractor(loaded, prompter, 4), some_rows())
    expected = {row.question_id: reference(plain, plain_processor, row) for row in some_rows()}
    assert worst_error(found, expected) < 1e-4
    for question_id, sample in found.items():
        assert sample.answer == expected[question_id]["answer"]
    return loaded, expected


def test_a_checkpoint_in_the_hubs_layout(tmp_path, model):
    rope = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    loaded, _ = assert_as_transformers(write_hub_layout(tmp_path, **rope))
    theirs = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():  # the same numbers under today's names
        torch.testing.assert_close(weight, theirs[name])
    rotary = loaded.model.language_model.rotary_emb
    plain = model.model.language_model.rotary_emb
    scaled = rotary.full_attention_inv_freq * 8
    torch.testing.assert_close(scaled, plain.full_attention_inv_freq)


def test_an_image_token_outside_the_vocabulary(tmp_path):
    """As in decoders whose vocabulary ends before it: transformers looks up another instead."""
    directory = write_hub_layout(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    vocab_size = config["text_config"]["vocab_size"]
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    old, new = config["image_token_index"], vocab_size + 3
    for token in tokenizer["added_tokens"]:
        if token["id"] == old:
            token["id"] = new
    vocab = tokenizer["model"]["vocab"]
    vocab[next(piece for piece, i in vocab.items() if i == old)] = new
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    decoder = settings.get("added_tokens_decoder", {})
    if str(old) in decoder:
        decoder[str(new)] = decoder.pop(str(old))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config["image_token_index"] = new
    (directory / "config.json").write_text(json.dumps(config))
    loaded, expected = assert_as_transformers(directory)
    assert loaded.config.image_token_id >= loaded.config.text_config.vocab_size
    assert all(new in reference["input_ids"] for reference in expected.values())
