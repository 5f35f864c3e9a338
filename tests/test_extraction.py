"""States, answers and their probabilities against transformers alone: nothing shared, no lanes."""

import itertools
import json
import math
import random
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import IMAGES, MODEL, read_csv
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import run_gemma3_extraction as script

LAYERS = [0, 2, 4, 6, 7]
MAX_NEW_TOKENS = 40
CPU = torch.device("cpu")


def make_rows():
    """The test data, and a question far longer than the sliding window."""
    rows = [
        script.Row(question_id, row["image_id"], row["question"], row["answer"])
        for question_id, row in read_csv().items()
    ]
    words = "which of the shapes in this image " * 214 + "is red?"  # 1,500 words
    return [*rows, script.Row("very long", "wide.jpg", words, "")]


@torch.inference_mode()
def reference(model, processor, row):
    """One prompt by transformers alone, without hooks: `generate`, and `output_hidden_states` with
    the final norm taken out.
    """
    image, _, _ = script.open_image(IMAGES, row.image_id)
    content = [{"type": "image", "image": image}, {"type": "text", "text": row.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.dtype)
    kwargs = {"do_sample": False, "top_k": None, "top_p": None, "disable_compile": True}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **kwargs)
    decoder = model.model.language_model
    norm, decoder.norm = decoder.norm, torch.nn.Identity()
    outputs = model.model(**inputs, output_hidden_states=True)
    decoder.norm = norm
    patches = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0]
    input_ids = inputs["input_ids"][0]
    last_soft = int((input_ids == model.config.image_token_id).nonzero()[-1])
    vectors = {"vision_representation": patches.float().mean(0)}
    for i in LAYERS:
        hidden = outputs.hidden_states[i + 1][0].float()
        vectors[f"vision_token_representation/layer_{i}"] = hidden[last_soft]
        vectors[f"query_token_representation/layer_{i}"] = hidden[-1]
        vectors[f"multimodal_representation/layer_{i}"] = hidden.mean(0)
    tokens = generated.sequences[0, len(input_ids) :].tolist()
    logits = torch.cat(generated.logits).float()
    end = model.generation_config.eos_token_id
    first = logits[0].double().softmax(0)
    return {
        "vectors": vectors,
        "input_ids": input_ids.tolist(),
        "answer": [token for token in tokens if token not in end],
        "truncated": tokens[-1] not in end,
        "logprobs": logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(),
        "entropy": float(-(first * first.log()).sum()),
    }


@pytest.fixture(scope="module")
def references(model, processor):
    return {row.question_id: reference(model, processor, row) for row in make_rows()}


def load(directory, dtype="float32"):
    """The program's own loading: model and prompter."""
    checkpoint = script.find_checkpoint(str(directory), "main", None)
    model = script.load_model(checkpoint, getattr(torch, dtype), CPU, device_map=None)
    return model, script.Prompter(checkpoint.processor, checkpoint.config)


@pytest.fixture(scope="module")
def ours():
    return load(MODEL)[0]


def make_extractor(model, prompter, batch_size=16, max_new_tokens=MAX_NEW_TOKENS):
    return script.Extractor(model, prompter, LAYERS, max_new_tokens, batch_size, CPU)


def read_all(prompter, rows, dtype="float32"):
    """The images with their prompts, as the run reads them."""
    dtype = getattr(torch, dtype)
    reader = script.ImageReader(prompter, IMAGES, dtype, num_workers=2, is_pinned=False)
    return reader.read_ahead([rows], on_failure=pytest.fail)


def run_all(extractor, rows=None):
    """The extractor's own pipeline, without files: samples and failures by question_id."""
    dtype = str(extractor.model.dtype).partition(".")[2]
    found = {}
    images = read_all(extractor.prompter, rows or make_rows(), dtype)
    for outcome in itertools.chain.from_iterable(extractor.run(images)):
        assert outcome.row.question_id not in found
        found[outcome.row.question_id] = outcome
    return found


def relative_error(found, expected):
    return float(np.linalg.norm(found - np.asarray(expected)) / np.linalg.norm(expected))


def worst_error(found, references):
    """The largest relative L2 error of any vector."""
    errors = []
    for question_id, sample in found.items():
        expected = references[question_id]["vectors"]
        assert sample.vectors.keys() == expected.keys()
        errors += [relative_error(vector, expected[n]) for n, vector in sample.vectors.items()]
    return max(errors)


def assert_as_references(found, references):
    assert worst_error(found, references) < 1e-4
    for question_id, sample in found.items():
        expected = references[question_id]
        assert sample.prompt.input_ids == expected["input_ids"]
        assert sample.answer_ids == expected["answer"]
        assert sample.is_truncated == expected["truncated"]
        assert sample.logprobs == pytest.approx(expected["logprobs"], abs=1e-4)
        assert sample.first_token_entropy == pytest.approx(expected["entropy"], abs=1e-4)


# ──────────────────────────────────── against transformers alone ──────────────────────────────────


BATCHES = [(1, 1), *itertools.product([5, 16, 64], [1, 8])]


@pytest.mark.parametrize(("batch_size", "max_pass_images"), BATCHES)
def test_all_equals_plain_passes(ours, prompter, references, batch_size, max_pass_images):
    extractor = make_extractor(ours, prompter, batch_size)
    extractor.max_pass_images = max_pass_images
    found = run_all(extractor)
    assert found.keys() == references.keys()
    assert_as_references(found, references)


def test_the_data_are_of_all_kinds(references, processor):
    lengths = {len(r["answer"]) for r in references.values()}
    assert len(lengths) > 5  # or the tests of decoding show little
    assert {r["truncated"] for r in references.values()} == {True, False}
    assert max(len(r["input_ids"]) for r in references.values()) > 1500
    bos = processor.tokenizer.bos_token_id
    assert {r["input_ids"].count(bos) for r in references.values()} == {1}


def test_without_answers_the_head_is_not_run(ours, prompter, references, monkeypatch):
    monkeypatch.setattr(ours.lm_head, "forward", lambda *_: pytest.fail("the head was run"))
    found = run_all(make_extractor(ours, prompter, max_new_tokens=0))
    assert worst_error(found, references) < 1e-4
    assert {(*s.answer_ids, s.is_truncated, *s.logprobs) for s in found.values()} == {(False,)}


def test_bfloat16_stays_within_rounding_of_float32(references):
    """bfloat16 keeps 8 bits: 2**-8 an operation, which eight layers of the tiny model add up."""
    found = run_all(make_extractor(*load(MODEL, "bfloat16"), 5, 0))
    assert 2**-9 < worst_error(found, references) < 0.1


OFFLOADED = {
    "layers": ["model.language_model.layers.1", "model.language_model.layers.7"],
    "embedding and head": ["model.language_model.embed_tokens", "lm_head"],
    "tower": ["model.vision_tower.encoder", "model.multi_modal_projector"],
}


@pytest.mark.parametrize("name", OFFLOADED)
def test_what_is_offloaded_changes_nothing(prompter, references, tmp_path, monkeypatch, name):
    """As on a card that is too small: accelerate brings weights when they are needed."""
    # The released models' towers have no head; accelerate cannot offload the tiny one's.
    modules = [f"vision_tower.{one}" for one in ("embeddings", "encoder", "post_layernorm", "head")]
    modules += ["multi_modal_projector", "language_model.embed_tokens"]
    modules += ["language_model.rotary_emb", "language_model.norm"]
    modules += [f"language_model.layers.{i}" for i in range(8)]
    places = {f"model.{module}": "cpu" for module in modules} | {"lm_head": "cpu"}
    places |= dict.fromkeys(OFFLOADED[name], "disk")
    monkeypatch.setattr(script, "place_weights", lambda *_: (places, None))
    model, _ = load(MODEL)
    assert any(weight.is_meta for weight in model.parameters())
    rows = make_rows()[::3]
    assert_as_references(run_all(make_extractor(model, prompter, 5), rows), references)


def write_hub_layout(directory, image_token_id=None):
    """The tiny model as the released ones lie there: old names of weights, a sparse config; on
    demand with an image token outside the vocabulary.
    """
    shutil.copytree(MODEL, directory)
    renamed = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        if ".head." not in name:  # the vision tower's, which the released ones have not
            renamed[name.replace("model.multi_modal_projector.", "multi_modal_projector.")] = tensor
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    dropped = ("layer_types", "rope_parameters", "vocab_size_per_layer_input", "dtype")
    text = {name: value for name, value in config["text_config"].items() if name not in dropped}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    config |= {"text_config": text, "torch_dtype": "bfloat16"}
    config["vision_config"]["vision_use_head"] = False
    if image_token_id:
        old, config["image_token_index"] = config["image_token_index"], image_token_id
        config.pop("image_token_id", None)
        tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
        for token in tokenizer["added_tokens"]:
            token["id"] = image_token_id if token["id"] == old else token["id"]
        vocab = tokenizer["model"]["vocab"]
        vocab[next(piece for piece, i in vocab.items() if i == old)] = image_token_id
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("image_token_id", [None, 900])
def test_checkpoints_as_they_are_on_the_hub(tmp_path, image_token_id):
    directory = write_hub_layout(tmp_path / "hub", image_token_id)
    plain = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    processor = AutoProcessor.from_pretrained(directory, backend="pil")
    model, prompter = load(directory)
    vocab_size = model.config.text_config.vocab_size
    assert model.config.image_token_id == (image_token_id or plain.config.image_token_id)
    assert (model.config.image_token_id >= vocab_size) == bool(image_token_id)
    rows = [row for row in make_rows() if row.image_id in ("circle.png", "wide.jpg")][:5]
    expected = {row.question_id: reference(plain, processor, row) for row in rows}
    assert_as_references(run_all(make_extractor(model, prompter, 4), rows), expected)


def test_the_short_norm_is_gemmas():
    torch.manual_seed(0)
    norm = Gemma3RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        hidden = (1000 * torch.randn(3, 5, 64)).to(dtype)
        found = script.fused_rms_norm(norm, hidden)
        expected = norm(hidden)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=bound, atol=0)


# ─────────────────────────────────── mistakes that people make here ───────────────────────────────


def reverse_after(close_gaps):
    def broken(self):
        moves = close_gaps(self)
        self.running.reverse()
        for lane, sequence in enumerate(self.running):
            sequence.lane = lane
        return moves

    return broken


def keep_ended(finish):
    def broken(self, sequence):
        outcome = finish(self, sequence)
        if len(sequence.generated_ids) < 20:
            self.scheduler.running[sequence.lane] = sequence
        return outcome

    return broken


def hook_decoding(decode):
    def broken(self):
        running = list(self.scheduler.running)
        zeros = torch.zeros(len(running), dtype=torch.long)
        is_padding = torch.zeros(len(running), 1, dtype=torch.bool)
        with script.capture_states(self.model, self.layers, zeros, is_padding) as states:
            outcomes = decode(self)
        for sequence, query_token in zip(running, script.to_numpy(states.kept_tokens), strict=True):
            if sequence:
                sequence.query_token = query_token
        return outcomes

    return broken


def drop_image_mask(call):
    def broken(self, *args, **kwargs):
        kwargs.pop("token_type_ids", None)
        return call(self, *args, **kwargs)

    return broken


def leave_what_was(fill):
    def broken(self, start, cache, image_indices):
        before = [lanes.clone() for lanes in self.layers]
        fill(self, start, cache, image_indices)
        width = cache.layers[0].keys.shape[2]
        for lanes, old in zip(self.layers, before, strict=True):
            lanes[:, start:, :, width:] = old[:, start:, :, width:]

    return broken


def take_the_neighbours(fill):
    def broken(self, start, cache, image_indices):
        return fill(self, start, cache, [max(0, index - 1) for index in image_indices])

    return broken


def change_capture(change):
    return lambda capture: lambda model, layers, *args: capture(model, layers, *change(*args))


def shift_padding(kept_pos, is_padding):
    """One token less of each row that has padding."""
    return kept_pos, torch.roll(is_padding, -1, dims=1) | is_padding


def norm_the_last(read):
    def broken(tensors):
        if len(tensors) == len(LAYERS):
            tensors = [*tensors[:-1], tensors[-1] / tensors[-1].norm()]
        return read(tensors)

    return broken


MISTAKES = {  # whose method, its name, and what becomes of it
    "a lane sees a slot beyond its position": (
        *(script, "causal_masks"),
        lambda masks: lambda positions, *rest: masks(positions + 1, *rest),
    ),
    "the window counts from another token": (
        *(script, "causal_masks"),
        lambda masks: (
            lambda positions, slots, window, dtype: masks(positions, slots, window + 1, dtype)
        ),
    ),
    "padding counts in the mean": (
        *(script, "capture_states"),
        change_capture(lambda kept, is_padding: (kept, torch.zeros_like(is_padding))),
    ),
    "the kept token is off by one": (
        *(script, "capture_states"),
        change_capture(lambda kept, is_padding: (kept - 1, is_padding)),
    ),
    "the mean leaves out a token": (*(script, "capture_states"), change_capture(shift_padding)),
    "a lane moves without its keys": (script.Lanes, "move", lambda _: lambda *args: None),
    "a lane moves without its sequence": (script.Scheduler, "close_gaps", reverse_after),
    "a token is stored after the end": (script.Extractor, "_finish", keep_ended),
    "a neighbour's image": (script.Lanes, "fill", take_the_neighbours),
    "hooks keep a decoding step": (script.Extractor, "decode", hook_decoding),
    "no image mask": (script.nn.Module, "__call__", drop_image_mask),
    "the last layer normed": (script, "to_numpy", norm_the_last),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(ours, prompter, references, monkeypatch, name):
    owner, method, mistake = MISTAKES[name]
    monkeypatch.setattr(owner, method, mistake(getattr(owner, method)))
    extractor = make_extractor(ours, prompter, 5)
    extractor.max_pass_images = 8
    with pytest.raises((AssertionError, IndexError)):
        assert_as_references(run_all(extractor, make_rows()[:-1]), references)


@pytest.mark.parametrize("is_left", [False, True])
def test_nan_stays_in_its_own_lane(ours, prompter, references, monkeypatch, is_left):
    """Of the third image all is NaN: its question fails, a shorter one that takes its lane does
    not, unless what the last owner left behind the prefix stays.
    """
    if is_left:
        monkeypatch.setattr(script.Lanes, "fill", leave_what_was(script.Lanes.fill))
    rows = make_rows()
    rows = [rows[16], rows[18], rows[17], *rows[:16]]  # the longest first, one an image
    images = [image for row in rows for image in read_all(prompter, [row])]
    images[2].pixel_values.fill_(math.nan)
    passes = make_extractor(ours, prompter, 3).run(iter(images))
    outcomes = list(itertools.chain.from_iterable(passes))
    failures = [one for one in outcomes if isinstance(one, script.Failure)]
    sound = {one.row.question_id: one for one in outcomes if one not in failures}
    if is_left:
        assert {failure.row.question_id for failure in failures} > {"017"}
    else:
        assert [failure.row.question_id for failure in failures] == ["017"]
        assert {failure.error for failure in failures} == {"its states are not finite"}
        assert_as_references(sound, references)


# ───────────────────────────────────────── how it is worked ───────────────────────────────────────


def end_after(monkeypatch, lengths):
    """Answers end after so many tokens, by question_id."""

    def has_ended(self, sequence):
        return len(sequence.generated_ids) == lengths[sequence.prompt.row.question_id]

    monkeypatch.setattr(script.Extractor, "has_ended", has_ended)


def count_tokens(monkeypatch, model):
    """The shapes of what the tower and the decoder run."""
    shapes = {"tower": [], "decoder": []}

    def watch(module, name):
        forward = module.forward

        def watched(*args, **kwargs):
            given = kwargs.get("pixel_values", kwargs.get("input_ids"))
            given = kwargs["inputs_embeds"] if given is None else given
            shapes[name].append(tuple(given.shape[:2]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", watched)

    watch(model.model.vision_tower, "tower")
    watch(model.model.language_model, "decoder")
    return shapes


def test_each_image_and_each_token_is_run_once(ours, prompter, monkeypatch):
    """500 questions of equal length about one image, 16 side by side."""
    shapes = count_tokens(monkeypatch, ours)
    questions = [f"is it {i:03d}?" for i in range(500)]
    rows = [script.Row(str(i), "circle.png", q, "") for i, q in enumerate(questions)]
    assert len(run_all(make_extractor(ours, prompter, max_new_tokens=0), rows)) == 500
    (own,) = {len(prompter.tokenize(q)) - len(prompter.prefix) for q in questions}
    assert shapes["tower"] == [(1, 3)]
    assert shapes["decoder"] == [(1, 262), *[(16, own)] * 31, (4, own)]


@pytest.mark.parametrize("num_questions", [1, 3, 50])
def test_the_batch_stays_nearly_full(ours, prompter, monkeypatch, num_questions):
    """At least three quarters, until the rows run out, however many questions an image has."""
    draw = random.Random(0)
    lengths = {str(i): draw.choice([1, 2, 3, 4, 20]) for i in range(60)}
    end_after(monkeypatch, lengths)
    rows = [
        script.Row(str(i), f"{'./' * (i // num_questions)}circle.png", f"is it {i}?", "")
        for i in range(60)
    ]
    seen = []
    num_entered = 0
    prefill = script.Extractor.prefill
    decode = script.Extractor.decode

    def watched_prefill(self, sequences):
        nonlocal num_entered
        num_entered += len(sequences)
        return prefill(self, sequences)

    def watched_decode(self):
        seen.append((self.scheduler.num_running, num_entered))
        return decode(self)

    monkeypatch.setattr(script.Extractor, "prefill", watched_prefill)
    monkeypatch.setattr(script.Extractor, "decode", watched_decode)
    found = run_all(make_extractor(ours, prompter, 8), rows)
    assert {name: len(sample.logprobs) for name, sample in found.items()} == lengths
    full = [count for count, entered in seen if entered < 60]
    assert len(full) > 5
    assert min(full) >= 0.75 * 8
    assert sum(count for count, _ in seen) == sum(lengths.values()) - 60  # the first is prefill's


def test_a_long_prompt_narrows_the_batch_while_it_lives(ours, prompter, monkeypatch, references):
    """All lanes together are never larger than the batch in its usual width, or one lane."""
    shapes = []
    resize = script.Lanes.resize

    def watched(self, num_lanes, num_slots, *args):
        shapes.append((num_lanes, num_slots))
        return resize(self, num_lanes, num_slots, *args)

    monkeypatch.setattr(script.Lanes, "resize", watched)
    rows = make_rows()
    rows.insert(5, rows.pop())
    found = run_all(make_extractor(ours, prompter, 8), rows)
    usual = script.lane_slots(len(prompter.prefix) + script.TYPICAL_QUESTION, MAX_NEW_TOKENS)
    longest = len(found["very long"].prompt.input_ids)
    assert (8, usual) in (shapes[0], shapes[-1])
    assert max(num_slots for _, num_slots in shapes) >= longest + MAX_NEW_TOKENS
    assert all(num_lanes * slots <= 8 * usual or num_lanes == 1 for num_lanes, slots in shapes)
    assert_as_references(found, references)


def test_threads_change_nothing(ours, prompter, monkeypatch):
    """What stands side by side must not depend on how fast images are prepared."""
    pixels, draw = script.Prompter.pixels, random.Random(1)

    def slow(self, image):
        time.sleep(draw.random() / 20)
        return pixels(self, image)

    runs = []
    for patched in (pixels, slow):
        monkeypatch.setattr(script.Prompter, "pixels", patched)
        runs.append(run_all(make_extractor(ours, prompter, 5, 6), make_rows()[:-1]))
    first, second = runs
    assert list(first) == list(second)
    for question_id, sample in first.items():
        for name, vector in sample.vectors.items():
            assert np.array_equal(vector, second[question_id].vectors[name])
        assert sample.logprobs == second[question_id].logprobs


# ─────────────────────────────────────────── the pieces ───────────────────────────────────────────


def test_hooks_are_gone_after_a_pass(ours):
    def count():
        return sum(len(module._forward_hooks) for module in ours.modules())

    def fail_in_a_pass():
        zeros = torch.zeros(1, dtype=torch.long)
        with script.capture_states(ours, LAYERS, zeros, zeros[:, None] > 0):
            assert count() == before + 1 + len(LAYERS)
            raise ZeroDivisionError

    before = count()
    with pytest.raises(ZeroDivisionError):
        fail_in_a_pass()
    assert count() == before


def test_masks_follow_the_definition():
    positions = torch.tensor([[4, 5], [0, 1]])
    window = 3
    masks = script.causal_masks(positions, 8, window, torch.float32)
    for row, column, slot in itertools.product(range(2), range(2), range(8)):
        distance = int(positions[row, column]) - slot
        for kind, is_seen in (
            ("full_attention", distance >= 0),
            ("sliding_attention", 0 <= distance < window),
        ):
            assert masks[kind][row, 0, column, slot] == (0 if is_seen else -math.inf)


def test_soft_tokens_must_be_one_run(processor, model, monkeypatch):
    text = processor.full_image_sequence
    for broken in (text + text, text.replace("<image_soft_token>", "", 1), "", "?".join(text[9:])):
        monkeypatch.setattr(processor, "full_image_sequence", broken)
        with pytest.raises(ValueError, match="soft tokens"):
            script.Prompter(processor, model.config)


def test_every_special_token_is_refused_in_a_question(processor, prompter):
    special = [t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
    assert {"<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"} <= set(special)
    for token in special:
        with pytest.raises(script.RowError, match="special tokens") as error:
            prompter.tokenize(f"what is {token} there?")
        assert token in str(error.value)


def test_default_layers_come_from_the_model():
    assert script.choose_layers(None, 48) == [0, 12, 24, 36, 47]
    assert script.choose_layers(None, 2) == [0, 1]
    assert script.choose_layers("all", 3) == [0, 1, 2]
    assert script.choose_layers((-1, 3, 3), 8) == [3, 7]
    with pytest.raises(script.ExtractionError, match="layers 0 to 7"):
        script.choose_layers((8,), 8)
