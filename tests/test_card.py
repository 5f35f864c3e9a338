"""What a card will meet, as far as it can be known without one."""

import benchmark
import pytest
import torch
from conftest import make_options
from transformers import Gemma3Config

import run_gemma3_extraction as script

TEXT = {  # layers, hidden, intermediate, heads, kv_heads, head_dim
    "4b": (34, 2560, 10240, 8, 4, 256),
    "12b": (48, 3840, 15360, 16, 8, 256),
    "27b": (62, 5376, 21504, 32, 16, 128),
}
PARAMETERS = {"4b": 4.30e9, "12b": 12.19e9, "27b": 27.4e9}
NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
NAMES = (*NAMES, "num_key_value_heads", "head_dim")
GIB = 2**30


@pytest.fixture(scope="module")
def large():
    """The 12B without its numbers."""
    return benchmark.make_model("12b", torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize(("questions", "num_lanes", "floor"), [(1, 16, 11.5), (10, 80, 1.4)])
def test_flops_and_launches(large, processor, questions, num_lanes, floor):
    """Tower and prefix once an image, own tokens once; a step launches little."""
    prompter, text = script.Prompter(processor, large.config), "what color is the shape?"
    with benchmark.nothing_read_back(), benchmark.Meter() as meter:
        extractor = benchmark.PaperExtractor(large, prompter, 200, num_lanes, meter)
        extractor.has_ended = lambda live: False
        passes = extractor.run(benchmark.pictures_for_ever(prompter, questions, text))
        while len(extractor.passes["decode"]) < 3:
            next(passes)
    vision, config = large.config.vision_config, large.config.text_config
    num_images, prefix = num_lanes // questions, len(prompter.prefix)
    own = num_lanes * (len(prompter.tokenize(text)) - prefix)
    tower = sum(p.numel() for p in large.model.vision_tower.encoder.parameters())
    per_token = sum(p.numel() for p in large.model.language_model.layers.parameters())
    least = 2 * per_token * (prefix * num_images + own) + 2 * 4096 * tower * num_images
    least += 4 * 4096**2 * vision.hidden_size * vision.num_hidden_layers * num_images
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    least += 4 * width * prefix * (prefix * num_images + own)
    flops = sum(one[2] for name in ("encode", "prefill") for one in extractor.passes[name])
    flops -= 2 * large.lm_head.weight.numel() * num_lanes  # for the first tokens
    assert sum(one[1] for one in extractor.passes["encode"]) == num_images
    assert 1 < flops / least < 1.02
    assert flops / num_lanes / 1e12 == pytest.approx(floor, rel=0.02)
    assert max(num_ops for num_ops, *_ in extractor.passes["decode"]) <= 2100
    for _, num_live, _, kv_bytes in extractor.passes["decode"]:
        assert num_live == num_lanes
        slots = -(-len(prompter.tokenize(text)) // 8) * 8 + 8
        assert kv_bytes <= num_live * slots * 2 * 2 * 48 * 8 * 256  # a lane's own, not copied


def make_config(size):
    text = dict(zip(NAMES, TEXT[size], strict=True)) | {"vocab_size": 262_208}
    vision = dict(zip(benchmark.VISION, benchmark.SIZES["12b"][1])) | {
        "image_size": 896,
        "patch_size": 14,
    }
    return Gemma3Config(text_config=text, vision_config=vision)


@pytest.mark.parametrize(
    ("size", "memory", "expected"),
    [
        *(("4b", 24, (100, 190)), ("4b", 40, (256, 256)), ("12b", 40, (45, 75))),
        *(("12b", 80, (225, 256)), ("27b", 80, (60, 100))),
    ],
)
def test_batch_size_follows_from_free_memory(size, memory, expected):
    """Cards show a little less than their name; a context takes half a GiB."""
    free = int((memory * 0.985 - 0.5) * GIB - 2 * PARAMETERS[size])
    found = script.fit_batch_size(free, make_config(size), 2, benchmark.NUM_SLOTS)
    assert expected[0] <= found <= expected[1]


def test_the_batch_size_is_the_users_or_follows_from_the_device(monkeypatch):
    config, cuda = make_config("12b"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (55 * GIB, 80 * GIB))

    def choose(device, **options):
        return script.choose_batch_size(make_options(**options), config, 576, device)

    assert choose(cuda, batch_size=7) == 7
    assert choose(torch.device("cpu")) == script.CPU_BATCH_SIZE
    assert choose(cuda) == script.fit_batch_size(55 * GIB, config, 2, 576)
    assert choose(cuda) > choose(cuda, dtype="float32") > 1


def place(monkeypatch, large, free, num_cards=1, **options):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * GIB), 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
    monkeypatch.setattr(script, "get_max_memory", lambda: {0: 5, "cpu": 99})
    return script.place_weights(make_options(**options), large.config, torch.device("cuda", 0))


def test_what_does_not_fit_stays_in_host_memory(monkeypatch, large, caplog):
    assert place(monkeypatch, large, 79) == {"device_map": {"": torch.device("cuda", 0)}}
    with caplog.at_level("INFO"):
        placed = place(monkeypatch, large, 23.2, num_cards=2)
    room = placed["max_memory"].pop(0)
    assert placed == {"device_map": "auto", "max_memory": {"cpu": 99}}  # the one card only
    needed = script.pass_memory(large.config, 2)
    lane = benchmark.NUM_SLOTS * 2 * 2 * 48 * 8 * 256
    assert room + needed + 8 * lane < 23.2 * GIB  # beside them, several questions
    hosted = large.num_parameters() * 2 - room
    assert f"{hosted / GIB:.1f} GiB of the weights stay in host memory" in caplog.text


def test_all_visible_cards_are_used_when_asked(monkeypatch, large, caplog):
    with caplog.at_level("INFO"):
        placed = place(monkeypatch, large, 23.2, num_cards=2, device_map="auto")
    assert placed["max_memory"].keys() == {0, 1, "cpu"}
    assert "host memory" not in caplog.text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
    ],
)
def test_want_of_memory_is_known_in_all_its_forms(error, expected):
    assert script.is_out_of_memory(error) is expected
