"""What a card will meet, as far as it can be known without one."""

from types import SimpleNamespace

import benchmark
import pytest
import torch
from make_tiny_gemma3 import make_released_config

import run_gemma3_extraction as script

PARAMETERS = {"4b": 4.30e9, "12b": 12.19e9, "27b": 27.4e9}
GIB = 2**30
NUM_SLOTS = 576  # of a lane with default flags
LANE_BYTES = NUM_SLOTS * 2 * 2 * 48 * 8 * 256  # of the 12B in bfloat16
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def large(processor):
    """The 12B without its numbers."""
    return benchmark.make_model("12b", processor.tokenizer, torch.device("meta"), torch.bfloat16)


# ────────────────────────────────────────── counted work ──────────────────────────────────────────
@pytest.mark.parametrize(
    ("questions_per_image", "num_lanes", "tflop_a_question"), [(1, 16, 11.5), (10, 80, 1.4)]
)
def test_flops_and_launches(large, processor, questions_per_image, num_lanes, tflop_a_question):
    """Tower and prefix once an image, own tokens once; a step launches little."""
    prompter = script.Prompter(processor, large.config)
    question = "what color is the shape?"
    with benchmark.nothing_read_back(), benchmark.Meter() as meter:
        extractor = benchmark.PaperExtractor(large, prompter, num_lanes, meter)
        extractor.has_ended = lambda _: False
        images = benchmark.images_for_ever(prompter, questions_per_image, [question])
        passes = extractor.run(images)
        while len(extractor.passes["decode"]) < 3:
            next(passes)
    encoded = extractor.passes["encode"]
    num_images = num_lanes // questions_per_image
    assert sum(one.num_items for one in encoded) == num_images
    flops = sum(one.flops for one in encoded + extractor.passes["prefill"])
    flops -= 2 * large.lm_head.weight.numel() * num_lanes  # for the first tokens
    num_prompt_tokens = len(prompter.tokenize(question))
    num_own = num_lanes * (num_prompt_tokens - len(prompter.prefix))
    least = least_flops(large, num_images, len(prompter.prefix), num_own)
    assert 1 < flops / least < 1.02
    assert flops / num_lanes / 1e12 == pytest.approx(tflop_a_question, rel=0.02)
    num_slots = num_prompt_tokens + 16  # three tokens of the answer, and rounded up to eights
    for one in extractor.passes["decode"]:
        assert one.num_items == num_lanes
        assert one.num_launches <= 2100
        # A lane's own keys and values, not copied for each head.
        assert one.kv_bytes <= num_lanes * num_slots * LANE_BYTES / NUM_SLOTS


def least_flops(model, num_images, num_prefix, num_own):
    """What images and prompts need by the matrices' sizes alone, with `num_own` tokens behind the
    prefixes in all."""
    text = model.config.text_config
    vision = model.config.vision_config
    num_tokens = num_prefix * num_images + num_own
    tower = sum(weight.numel() for weight in model.model.vision_tower.encoder.parameters())
    layers = sum(weight.numel() for weight in model.model.language_model.layers.parameters())
    flops = 2 * layers * num_tokens + 2 * 4096 * tower * num_images
    flops += 4 * 4096**2 * vision.hidden_size * vision.num_hidden_layers * num_images
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return flops + 4 * width * num_prefix * num_tokens


def test_the_meter_knows_what_is_alive():
    with torch.inference_mode(), benchmark.Meter() as meter:
        numbers = torch.ones(10, device="meta")  # of four bytes
        total = numbers + numbers
        product = numbers * total
        numbers.add_(1)  # in place: nothing new
        assert meter.live_bytes == 120
        first = total[:1]
        del total, numbers
        assert meter.live_bytes == 80  # the view keeps the sum alive
        del first, product
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 120
    assert meter.num_launches == 4


def test_passes_fit_into_the_working_memory(large, processor):
    prompter = script.Prompter(processor, large.config)
    needed = benchmark.measure_working_memory(large, prompter)
    # By hand: a prefill of 248 lanes, copied as they are not side by side, then copied for each of
    # the 16 heads; and the eight images that were encoded last.
    num_slots = len(prompter.prefix) + 34  # 33 tokens of a question, rounded up to eights
    num_copied = 248 * num_slots * 2 * 2 * (8 + 16) * 256
    num_encoded = 8 * len(prompter.prefix) * LANE_BYTES // NUM_SLOTS
    assert num_copied + num_encoded < needed["prefill"] < 1.3 * (num_copied + num_encoded)
    # 256 rows of the vocabulary in float32, twice, beside the images.
    assert needed["decode"] == pytest.approx(2 * 256 * 262_208 * 4 + num_encoded, rel=0.05)
    assert num_encoded < needed["encode"]
    assert max(needed.values()) <= script.WORKING_MEMORY


# ─────────────────────────────────────── memory of a card ─────────────────────────────────────────
def test_lanes_have_their_usual_width(prompter):
    assert benchmark.usual_slots(prompter) == NUM_SLOTS


@pytest.mark.parametrize(
    ("size", "memory", "fewest", "most"),
    [
        ("4b", 24, 90, 190),
        ("4b", 40, 256, 256),
        ("12b", 40, 45, 75),
        ("12b", 80, 225, 256),
        ("27b", 80, 60, 100),
    ],
)
def test_batch_size_follows_from_free_memory(processor, size, memory, fewest, most):
    """Cards show a little less than their name; a context takes half a GiB."""
    config = make_released_config(processor.tokenizer, size)
    free = int((memory * 0.985 - 0.5) * GIB - 2 * PARAMETERS[size])
    found = script.fit_batch_size(free, config, torch.bfloat16, NUM_SLOTS)
    assert fewest <= found <= most


def test_batch_size_follows_from_the_fullest_card(processor, monkeypatch, caplog):
    config = make_released_config(processor.tokenizer, "12b")
    free = {0: 60 * GIB, 1: 50 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 80 * GIB))

    def choose(cards, dtype=torch.bfloat16):
        return script.choose_batch_size(config, dtype, cards, NUM_SLOTS)

    assert choose([]) == script.CPU_BATCH_SIZE
    with caplog.at_level("INFO"):
        assert choose([0, 1]) == script.fit_batch_size(free[1], config, torch.bfloat16, NUM_SLOTS)
    assert f"batch size {choose([1])}: 50.0 GiB are free beside the model" in caplog.text
    assert choose([0]) > choose([1]) > choose([1], torch.float32) > 1


def place(monkeypatch, large, free, num_cards=1, device_map=None):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * GIB), 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
    monkeypatch.setattr(script, "get_max_memory", lambda: {0: 5, "cpu": 99})
    return script.place_weights(large.config, torch.bfloat16, CUDA, device_map)


def test_what_does_not_fit_stays_in_host_memory(monkeypatch, large, caplog):
    assert place(monkeypatch, large, 79) == ({"": CUDA}, None)
    assert not caplog.text
    with caplog.at_level("INFO"):
        placement, max_memory = place(monkeypatch, large, 23.2, num_cards=2)
    assert placement == "auto"
    assert max_memory.keys() == {0, "cpu"}  # the one card only
    assert max_memory["cpu"] == 99
    room = max_memory[0]
    needed = room + script.WORKING_MEMORY + 8 * LANE_BYTES
    assert 0 < needed < 23.2 * GIB  # beside the weights, several questions
    hosted = large.num_parameters() * 2 - room
    assert f"{hosted / GIB:.1f} GiB of the weights stay in host memory" in caplog.text


def test_all_visible_cards_are_used_when_asked(monkeypatch, large, caplog):
    with caplog.at_level("INFO"):
        placement, max_memory = place(monkeypatch, large, 23.2, num_cards=2, device_map="auto")
    assert placement == "auto"
    assert max_memory.keys() == {0, 1, "cpu"}
    assert "host memory" not in caplog.text
    assert script.list_cards(CUDA, "auto") == [0, 1]
    assert script.list_cards(torch.device("cuda", 1), None) == [1]
    assert script.list_cards(torch.device("cpu"), "auto") == []


def test_on_a_cpu_no_card_is_used(large, monkeypatch):
    """Nor if there are some: accelerate would spread the model over them."""
    monkeypatch.setattr(script, "get_max_memory", lambda: {0: 5, "cpu": 99})
    cpu = torch.device("cpu")
    assert script.place_weights(large.config, torch.float32, cpu, None) == ({"": cpu}, None)
    assert script.place_weights(large.config, torch.float32, cpu, "auto") == ("auto", {"cpu": 99})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_want_of_memory_is_known_in_all_its_forms(error, expected):
    assert script.is_out_of_memory(error) is expected


# ───────────────────────────────────────── which card ─────────────────────────────────────────────
@pytest.fixture
def choose_card(monkeypatch):
    """`choose_device` as on a host with so many visible cards, and with these variables."""

    def open_device(_, device):
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.device_count():
            raise RuntimeError("No CUDA GPUs are available\nand more that nobody needs")
        if found.type == "cuda" and found.index is None:
            found = CUDA
        return SimpleNamespace(device=found)

    def choose(num_cards, name="cuda", **variables):
        for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
            monkeypatch.delenv(variable, raising=False)
        for variable, text in variables.items():
            monkeypatch.setenv(variable, text)
        current = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
        monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", open_device)
            device = script.choose_device(name)
        assert current == ([device.index] if device.type == "cuda" else [])
        return str(device)

    return choose


@pytest.mark.parametrize(
    ("num_cards", "variables", "told"),
    [
        (8, {}, "cuda:0"),
        (8, {"LOCAL_RANK": "3"}, "cuda:3, by LOCAL_RANK=3 with 8 visible"),
        (8, {"SLURM_LOCALID": "5"}, "cuda:5, by SLURM_LOCALID=5 with 8 visible"),
        # torchrun within a job
        (8, {"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, "cuda:2, by LOCAL_RANK=2 with 8 visible"),
        (8, {"LOCAL_RANK": "0", "SLURM_LOCALID": "7"}, "cuda:0, by LOCAL_RANK=0 with 8 visible"),
        (8, {"LOCAL_RANK": "", "SLURM_LOCALID": "7"}, "cuda:7, by SLURM_LOCALID=7 with 8 visible"),
        # each task sees its own card only
        (1, {"SLURM_LOCALID": "6"}, "cuda:0, by SLURM_LOCALID=6 with 1 visible"),
        (4, {"LOCAL_RANK": "6"}, "cuda:2, by LOCAL_RANK=6 with 4 visible"),
    ],
)
def test_each_process_takes_a_card(choose_card, caplog, num_cards, variables, told):
    with caplog.at_level("INFO"):
        assert choose_card(num_cards, **variables) == told.partition(",")[0]
    assert caplog.messages == [f"device {told}"]


@pytest.mark.parametrize(("name", "expected"), [("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_device_that_was_named_is_taken(choose_card, name, expected):
    assert choose_card(8, name, LOCAL_RANK="3", SLURM_LOCALID="4") == expected


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
@pytest.mark.parametrize("text", ["one", "-1", "1.0"])
def test_a_launchers_number_that_is_none_is_named(choose_card, variable, text):
    with pytest.raises(script.ExtractionError, match=f"^{variable}={text} in the environment"):
        choose_card(8, **{variable: text})


def test_no_card_is_one_line_that_says_what_to_do(choose_card):
    with pytest.raises(script.ExtractionError) as caught:
        choose_card(0, SLURM_LOCALID="3")
    message = str(caught.value)
    assert "SLURM_LOCALID=3" in message
    assert "No CUDA GPUs are available | without a GPU: --device cpu" in message
    assert "nobody needs" not in message
