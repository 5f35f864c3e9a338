"""States, answers and their probabilities against transformers alone: nothing shared, no pool."""

import itertools
import random
import time
from collections import Counter

import pytest
import torch
from conftest import CSV, IMAGES, MODEL, make_options, read_csv, read_samples
from transformers import AutoModelForImageTextToText
from transformers.models.gemma3 import modeling_gemma3

import run_gemma3_extraction as script

LAYERS = [0, 2, 4, 6, 7]
MAX_NEW_TOKENS = 40


def make_rows():
    """The test data, and a question far longer than the sliding window."""
    rows = [
        script.Row(i, q, row["image_id"], row["question"], row["answer"])
        for i, (q, row) in enumerate(read_csv().items())
    ]
    words = "which of the shapes in this image " * 214 + "is red?"  # 1,500 words
    return [*rows, script.Row(len(rows), "very long", "wide.jpg", words, "")]


def reference(model, processor, row):
    """All of one prompt from the model's own entry points."""
    image, _ = script.open_image(IMAGES, row.image_id)
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
    kept: dict[int, torch.Tensor] = {}

    def keep(module, args, output):  # the prefill, and nothing after it
        kept.setdefault(module.layer_idx, output[0].float())

    layers = [model.model.language_model.layers[i] for i in LAYERS]
    with torch.inference_mode():
        handles = [layer.register_forward_hook(keep) for layer in layers]
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **kwargs)
        for handle in handles:
            handle.remove()
        patches = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0]
    input_ids = inputs["input_ids"][0]
    last_soft = int((input_ids == model.config.image_token_id).nonzero()[-1])
    vectors = {"vision_representation": patches.float().mean(0)}
    vectors |= {f"vision_token_representation/layer_{i}": h[last_soft] for i, h in kept.items()}
    vectors |= {f"query_token_representation/layer_{i}": h[-1] for i, h in kept.items()}
    vectors |= {f"multimodal_representation/layer_{i}": h.mean(0) for i, h in kept.items()}
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


def make_extractor(model, prompter, batch_size=16, max_new_tokens=MAX_NEW_TOKENS):
    return script.Extractor(model, prompter, LAYERS, max_new_tokens, batch_size)


def ask_all(prompter, rows=None, dtype="float32"):
    """The images with their questions, as the run makes them."""
    options = make_options(CSV, IMAGES, dtype=dtype, device="cpu", num_workers=2)
    plan = script.Plan(0, {}, {}, set())
    rows = script.plan_parts(rows or make_rows(), 10**9)[1]
    return script.asked_images(options, prompter, plan, rows, fail=pytest.fail)


def run_all(extractor, rows=None):
    """The extractor's own pipeline, without files: samples and failures by question_id."""
    dtype = str(extractor.decoder.dtype).partition(".")[2]
    found = {}
    for outcome in extractor.run(ask_all(extractor.prompter, rows, dtype)):
        row = outcome.row if isinstance(outcome, script.Failure) else outcome.prompt.row
        assert row.question_id not in found
        found[row.question_id] = outcome
    return found


def worst_error(found, references):
    """The largest relative L2 error of any vector."""
    errors = []
    for question_id, sample in found.items():
        expected = references[question_id]["vectors"]
        assert sample.states.keys() == expected.keys()
        for name, vector in sample.states.items():
            errors.append(script.relative_error(vector, expected[name]))
    return max(errors)


def differences(found, references):
    """The question_ids whose answers are not the plain ones."""
    return [
        question_id
        for question_id, sample in found.items()
        if (sample.answer, sample.is_truncated)
        != (references[question_id]["answer"], references[question_id]["truncated"])
    ]


# ──────────────────────────────────── against transformers alone ──────────────────────────────────


@pytest.mark.parametrize("max_pass_tokens", [0, 8192], ids=["one by one", "joined"])
@pytest.mark.parametrize("batch_size", [1, 5, 16, 64])
def test_all_equals_plain_passes(model, prompter, references, batch_size, max_pass_tokens):
    extractor = make_extractor(model, prompter, batch_size)
    extractor.max_pass_tokens = max_pass_tokens
    found = run_all(extractor)
    assert found.keys() == references.keys()
    assert worst_error(found, references) < 1e-4
    assert differences(found, references) == []
    for question_id, sample in found.items():
        expected = references[question_id]
        assert sample.prompt.input_ids == expected["input_ids"]
        assert sample.logprobs == pytest.approx(expected["logprobs"], abs=1e-4)
        assert sample.first_token_entropy == pytest.approx(expected["entropy"], abs=1e-4)
    assert extractor._banks == {}  # everybody has left


def test_the_data_are_of_all_kinds(references):
    lengths = {len(r["answer"]) for r in references.values()}
    assert len(lengths) > 5  # or the tests of decoding show little
    assert {r["truncated"] for r in references.values()} == {True, False}
    assert max(len(r["input_ids"]) for r in references.values()) > 1500


def test_tokens_are_the_processors_own(prompter, references, processor):
    for row in make_rows():
        input_ids = references[row.question_id]["input_ids"]
        assert prompter.tokenize(row.question) == input_ids
        assert input_ids.count(processor.tokenizer.bos_token_id) == 1


def test_without_answers_the_head_is_not_run(model, prompter, references):
    extractor = make_extractor(model, prompter, max_new_tokens=0)
    head = model.lm_head
    model.lm_head = None
    try:
        found = run_all(extractor)
    finally:
        model.lm_head = head
    assert worst_error(found, references) < 1e-4
    assert {(len(s.answer), s.is_truncated, len(s.logprobs)) for s in found.values()} == {
        (0, False, 0)
    }


def test_bfloat16_stays_within_rounding_of_float32(prompter, references):
    """bfloat16 keeps 8 bits: 2**-8 an operation, which eight layers of the tiny model add up."""
    model = AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    assert 2**-9 < worst_error(run_all(make_extractor(model, prompter, 5, 0)), references) < 0.1


def test_a_model_spread_by_accelerate_gives_the_same(prompter, references, tmp_path):
    whole = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens")
    whole = (*whole, "language_model.rotary_emb", "language_model.norm")
    device_map = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name in whole}
    layers = {f"model.language_model.layers.{i}": "disk" if i > 3 else "cpu" for i in range(8)}
    model = AutoModelForImageTextToText.from_pretrained(
        MODEL,
        dtype=torch.float32,
        attn_implementation="sdpa",
        device_map=device_map | layers,
        offload_folder=tmp_path,
    ).eval()
    found = run_all(make_extractor(model, prompter, max_new_tokens=6))
    assert worst_error(found, references) < 1e-4
    for question_id, sample in found.items():
        assert sample.answer == references[question_id]["answer"][:6]


def test_the_decoders_pieces_are_transformers_own(model):
    """Norm and rotary tables, against the modules that they replace."""
    torch.manual_seed(0)
    decoder, language_model = script.Decoder(model), model.model.language_model
    layer = language_model.layers[3]
    hidden = 100 * torch.randn(5, 32)
    for norm in (layer.input_layernorm, layer.post_feedforward_layernorm, language_model.norm):
        torch.testing.assert_close(decoder._norm(hidden, norm), norm(hidden))
    states, pos = torch.randn(1, 4, 5, 16), torch.tensor([[3, 700, 0, 40, 9]])
    cos, sin = language_model.rotary_emb(states, pos, "full_attention")
    expected, _ = modeling_gemma3.apply_rotary_pos_emb(states, states, cos, sin)
    tables = script.signed_rotary(cos, sin)
    found = script.rotate(states[0].transpose(0, 1), tables)
    torch.testing.assert_close(found.transpose(0, 1)[None], expected)


# ─────────────────────────────────── mistakes that people make here ───────────────────────────────


def change_tokens(monkeypatch, change):
    """Every token of a step becomes `change(token, seat)`."""
    add = script.Step.add

    def broken(self, seat, *args):
        start = len(self.tokens)
        slots = add(self, seat, *args)
        self.tokens[start:] = [change(token, seat) for token in self.tokens[start:]]
        return slots

    monkeypatch.setattr(script.Step, "add", broken)


def change_spans(monkeypatch, change):
    add = script.Spans.add
    monkeypatch.setattr(script.Spans, "add", lambda self, *span: add(self, *change(*span)))


def change_masks(monkeypatch, change):
    masks = script.attention_masks
    monkeypatch.setattr(script, "attention_masks", lambda *args: masks(*change(*args)))


def break_soft_pos(monkeypatch, prompter):
    change_spans(monkeypatch, lambda a, b, kept: (a, b, kept - (kept < b - 1)))


def break_query_pos(monkeypatch, prompter):
    change_spans(monkeypatch, lambda a, b, kept: (a, b, kept - (kept == b - 1)))


def break_mean_without_bos(monkeypatch, prompter):
    change_spans(monkeypatch, lambda a, b, kept: (a + (kept < b - 1), b, kept))


def break_bos(monkeypatch, prompter):
    render = prompter.render
    monkeypatch.setattr(prompter, "render", lambda question: "<bos>" + render(question))
    monkeypatch.setattr(prompter, "_plain_special", [2, *prompter._plain_special])
    monkeypatch.setattr(prompter, "soft_start", prompter.soft_start + 1)
    monkeypatch.setattr(prompter, "soft_stop", prompter.soft_stop + 1)


def break_image_mask(monkeypatch, prompter):
    no_soft = torch.tensor([1, 1, 0, 1])
    change_masks(monkeypatch, lambda query, key, window: (query * no_soft, key, window))


def break_window(monkeypatch, prompter):
    change_masks(monkeypatch, lambda query, key, window: (query, key, window + 1))


def break_last_layer(monkeypatch, prompter):
    run = script.Decoder.run

    def broken(self, step, hidden, observe):
        def normed(i, h):
            observe(i, self.final_norm(h) if i == LAYERS[-1] else h)

        return run(self, step, hidden, normed)

    monkeypatch.setattr(script.Decoder, "run", broken)


def break_positions(monkeypatch, prompter):
    """They count from the row instead of the prompt."""
    change_tokens(monkeypatch, lambda token, seat: token._replace(pos=token.slot))


def break_owner(monkeypatch, prompter):
    """A question sees its neighbours' tokens in its row."""
    change_tokens(monkeypatch, lambda token, seat: token._replace(owner=seat.owner))


def break_slots(monkeypatch, prompter):
    """A slot is used again while its owner lives."""
    take = script.Numbers.take

    def broken(self):
        slot = take(self)
        if slot > 270:
            self.give(slot)
        return slot

    monkeypatch.setattr(script.Numbers, "take", broken)


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 128, 129, 300])
@pytest.mark.parametrize("shape", [(1024, 640), (640, 1024), (700, 900), (40, 60)])
def test_a_product_is_a_linear_layers(num_tokens, shape):
    """The way that a CPU takes for large weights, against float64."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    hidden = torch.randn(num_tokens, shape[1])
    with torch.inference_mode():
        product = script.multiply(linear, hidden)
        expected = torch.nn.functional.linear(hidden.double(), linear.weight.double())
    assert product.shape == expected.shape
    assert product.is_contiguous()
    assert script.relative_error(product.double(), expected) < 1e-6


def test_numbers_are_given_out_lowest_first():
    numbers, taken, draw = script.Numbers(), set(), random.Random(0)
    for _ in range(2000):
        if taken and draw.random() < 0.5:
            number = draw.choice(sorted(taken))
            taken.remove(number)
            numbers.give(number)
        else:
            free = set(range(len(taken) + 1)) - taken
            assert numbers.take() == min(free)
            taken.add(min(free))
        assert numbers.count == max(taken, default=-1) + 1


@pytest.mark.parametrize(
    "break_it",
    [
        *(break_soft_pos, break_query_pos, break_mean_without_bos, break_bos, break_image_mask),
        *(break_window, break_last_layer, break_positions, break_owner, break_slots),
    ],
)
def test_the_comparison_notices(break_it, model, processor, references, monkeypatch):
    """Each mistake is far outside the bound of the tests above."""
    prompter = script.Prompter(processor, model.config)
    break_it(monkeypatch, prompter)
    found = run_all(make_extractor(model, prompter, max_new_tokens=0), make_rows()[:-1])
    assert worst_error(found, references) > 1e-3


@pytest.mark.parametrize("break_it", [break_slots, break_owner, break_positions])
def test_the_comparison_notices_it_in_answers(break_it, model, prompter, references, monkeypatch):
    """The mistake is made in decoding alone, from the second token of an answer on."""
    decode = script.Extractor._decode

    def broken(self):
        with pytest.MonkeyPatch.context() as patch:
            break_it(patch, prompter)
            decode(self)

    monkeypatch.setattr(script.Extractor, "_decode", broken)
    found = run_all(make_extractor(model, prompter), make_rows()[:-1])
    logprobs = {q: references[q]["logprobs"] for q in found}
    assert any(sample.logprobs != pytest.approx(logprobs[q], 1e-3) for q, sample in found.items())


def test_the_comparison_notices_an_answer_that_goes_on(model, prompter, references, monkeypatch):
    has_ended = script.Extractor.has_ended
    monkeypatch.setattr(
        script.Extractor,
        "has_ended",
        lambda self, live: has_ended(self, live) and len(live.answer) > 1,
    )
    assert differences(run_all(make_extractor(model, prompter)), references)


def test_a_sample_in_another_part_is_noticed(run_here, monkeypatch, tmp_path):
    expect = script.Recorder.expect
    monkeypatch.setattr(
        script.Recorder,
        "expect",
        lambda self, number, rows: expect(self, 3 - number, rows),
    )
    assert run_here("--checkpoint-interval", "14")[0] == 0
    plan = script.plan_parts(make_rows()[:-1], 14)
    planned = {row.question_id: number for number, rows in plan.items() for row in rows}
    found = {q: int(sample["part"][-6:-3]) for q, sample in read_samples(tmp_path / "out").items()}
    assert found != planned
    assert found == {question_id: 3 - number for question_id, number in planned.items()}


# ────────────────────────────────────── what goes wrong alone ─────────────────────────────────────


def rare_word(references):
    """A token of one question alone, about an image that has others, which no answer holds."""
    uses = Counter(token for r in references.values() for token in set(r["input_ids"]))
    answered = {token for reference in references.values() for token in reference["answer"]}
    return min(token for token, count in uses.items() if count == 1 and token not in answered)


def spoil_word(monkeypatch, model, word, value):
    embed = model.model.language_model.embed_tokens
    original = embed.forward

    def spoilt(input_ids):
        embeds = original(input_ids)
        embeds[input_ids == word] = value
        return embeds

    monkeypatch.setattr(embed, "forward", spoilt)


@pytest.mark.parametrize("max_new_tokens", [0, MAX_NEW_TOKENS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_question_gone_wrong_spoils_no_other(
    model, prompter, references, monkeypatch, value, max_new_tokens
):
    """Neither those about the same image, which stand in its row, nor who comes after."""
    word = rare_word(references)
    spoil_word(monkeypatch, model, word, value)
    found = run_all(make_extractor(model, prompter, 5, max_new_tokens))
    wrong = {q for q, reference in references.items() if word in reference["input_ids"]}
    assert_only_these_are_wrong(found, references, wrong, has_answers=max_new_tokens > 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_gone_wrong_spoils_no_other(model, prompter, references, monkeypatch, value):
    original = script.Prompter.pixels

    def spoil(self, image):
        return original(self, image) * (value if image.size == (640, 120) else 1)

    monkeypatch.setattr(script.Prompter, "pixels", spoil)
    found = run_all(make_extractor(model, prompter, 5))
    wrong = {row.question_id for row in make_rows() if row.image_id == "wide.jpg"}
    assert_only_these_are_wrong(found, references, wrong)


def test_an_answer_gone_wrong_spoils_no_other(model, prompter, references, monkeypatch):
    """A token that some answers hold gives NaN as they go on from it."""
    answers = {q: reference["answer"][:-1] for q, reference in references.items()}
    asked = {token for reference in references.values() for token in reference["input_ids"]}
    uses = Counter(t for answer in answers.values() for t in set(answer) if t not in asked)
    word = min(uses, key=uses.get)
    spoil_word(monkeypatch, model, word, torch.nan)
    found = run_all(make_extractor(model, prompter))
    wrong = {q for q, answer in answers.items() if word in answer}
    assert 0 < len(wrong) < len(found) / 2
    assert_only_these_are_wrong(found, references, wrong)


def assert_only_these_are_wrong(found, references, wrong, has_answers=True):
    assert {q for q, outcome in found.items() if isinstance(outcome, script.Failure)} == wrong
    assert all("not finite" in found[question_id].error for question_id in wrong)
    good = {question_id: found[question_id] for question_id in found.keys() - wrong}
    assert worst_error(good, references) < 1e-4
    if has_answers:
        assert differences(good, references) == []


def test_what_is_not_cleaned_does_spoil_others(model, prompter, references, monkeypatch):
    """The mistake that the tests above are for: NaN stays in a row that others look at."""
    monkeypatch.setattr(script, "all_finite", lambda values: True)
    word = rare_word(references)
    spoil_word(monkeypatch, model, word, torch.nan)
    found = run_all(make_extractor(model, prompter, 5))
    wrong = {q for q, reference in references.items() if word in reference["input_ids"]}
    assert {q for q, outcome in found.items() if isinstance(outcome, script.Failure)} > wrong


def test_a_model_gone_wrong_stops_the_run(model, prompter, monkeypatch):
    """The states of 25 different images in a row are not finite."""
    original = script.Prompter.pixels
    monkeypatch.setattr(script.Prompter, "pixels", lambda *args: original(*args) * torch.nan)
    extractor = make_extractor(model, prompter, max_new_tokens=0)
    rows = [script.Row(i, str(i), f"{'./' * i}circle.png", "what?", "") for i in range(30)]
    outcomes = []
    with pytest.raises(script.ExtractionError, match="25 different images"):
        outcomes.extend(extractor.run(ask_all(prompter, rows)))
    assert extractor._live == []


# ───────────────────────────────────────── how it is worked ───────────────────────────────────────


class Watch:
    """What the passes run."""

    def __init__(self, monkeypatch, model):
        self.passes = []  # tokens, slots and live questions of each
        self.num_images = 0
        run, tower = script.Decoder.run, model.model.vision_tower.forward

        def watched(decoder, step, *args):
            self.passes.append(len(step.tokens))
            return run(decoder, step, *args)

        def towered(pixel_values, **kwargs):
            self.num_images += len(pixel_values)
            return tower(pixel_values=pixel_values, **kwargs)

        monkeypatch.setattr(script.Decoder, "run", watched)
        monkeypatch.setattr(model.model.vision_tower, "forward", towered)


def test_each_image_and_each_token_is_run_once(model, prompter, monkeypatch):
    """500 questions about one image, 16 side by side: its shared tokens are run once."""
    watch = Watch(monkeypatch, model)
    words = ["red", "green", "blue", "white", "black"]
    questions = [f"what is {' '.join(q)}?" for q in itertools.product(words, repeat=4)][:500]
    rows = [script.Row(i, str(i), "circle.png", q, "") for i, q in enumerate(questions)]
    assert len(run_all(make_extractor(model, prompter, max_new_tokens=0), rows)) == 500
    lengths = [len(prompter.tokenize(question)) for question in questions]
    num_shared = script.count_shared([prompter.tokenize(question) for question in questions])
    assert num_shared > 262
    assert watch.num_images == 1
    assert sum(watch.passes) == num_shared + sum(lengths) - 500 * num_shared
    assert len(watch.passes) == 32


@pytest.mark.parametrize("num_questions", [1, 3, 50])
def test_the_batch_stays_nearly_full(model, prompter, monkeypatch, num_questions):
    """At least three quarters, until the rows run out, however many questions an image has."""
    num_rows, num_live, seen, decode = 60, 8, [], script.Extractor._decode

    def watched(self):
        begun.extend(len(seen) for live in self._live if not live.answer)
        seen.append(len(self._live))
        decode(self)

    begun = []  # the decoding step at which each question came
    monkeypatch.setattr(script.Extractor, "_decode", watched)
    draw = random.Random(0)
    lengths = [draw.choice([1, 2, 3, 4, 20]) for _ in range(num_rows)]
    monkeypatch.setattr(
        script.Extractor,
        "has_ended",
        lambda self, live: len(live.answer) == lengths[live.prompt.row.index],
    )
    rows = [
        script.Row(i, str(i), f"{'./' * (i // num_questions)}circle.png", f"is it {i}?", "")
        for i in range(num_rows)
    ]
    found = run_all(make_extractor(model, prompter, num_live), rows)
    assert [len(found[str(i)].logprobs) for i in range(num_rows)] == lengths
    num_begun = itertools.accumulate(Counter(begun)[step] for step in range(len(seen)))
    full = [count for count, n in zip(seen, num_begun) if n < num_rows]
    assert len(full) > 5
    assert min(full) >= 0.75 * num_live
    assert sum(seen) == sum(lengths)


def test_a_long_prompt_widens_nobody_elses_row(model, prompter, monkeypatch):
    widths, attend = set(), script.Block.attend

    def watched(self, *args):
        widths.add((self.num_slots, self.bank.width))
        return attend(self, *args)

    monkeypatch.setattr(script.Block, "attend", watched)
    found = run_all(make_extractor(model, prompter, 64, 4))
    longest = max(len(sample.prompt.input_ids) for sample in found.values())
    assert max(num_slots for num_slots, _ in widths) >= longest
    others = [num_slots for num_slots, width in widths if width < longest]
    assert max(others) < longest / 2


def test_rows_far_apart_are_copied_and_give_the_same(model, prompter, monkeypatch):
    """Images that enter where others have left: their rows are not neighbours."""
    lengths = [1 + 17 * (i % 5 == 0) + i % 3 for i in range(24)]
    monkeypatch.setattr(
        script.Extractor,
        "has_ended",
        lambda self, live: len(live.answer) == lengths[live.prompt.row.index],
    )
    rows = [script.Row(i, str(i), f"{'./' * i}circle.png", f"is it {i}?", "") for i in range(24)]
    alone = run_all(make_extractor(model, prompter, 1), rows)
    kinds, attend = Counter(), script.Block.attend

    def watched(self, *args):
        kinds[type(self.rows)] += 1
        return attend(self, *args)

    monkeypatch.setattr(script.Block, "attend", watched)
    extractor = make_extractor(model, prompter, 12)
    extractor.max_pass_tokens = 8192
    found = run_all(extractor, rows)
    assert kinds[torch.Tensor] > 0
    assert kinds[slice] > 0
    for question_id, sample in alone.items():
        for name, vector in sample.states.items():
            assert script.relative_error(found[question_id].states[name], vector) < 1e-4
        assert found[question_id].answer == sample.answer
        assert found[question_id].logprobs == pytest.approx(sample.logprobs, abs=1e-4)


def test_threads_change_nothing(model, prompter, monkeypatch):
    """What stands side by side must not depend on how fast images are prepared."""
    pixels, draw = script.Prompter.pixels, random.Random(1)

    def slow(self, image):
        time.sleep(draw.random() / 20)
        return pixels(self, image)

    runs = []
    for patched in (pixels, slow):
        monkeypatch.setattr(script.Prompter, "pixels", patched)
        runs.append(run_all(make_extractor(model, prompter, 5), make_rows()[:-1]))
    first, second = runs
    assert list(first) == list(second)
    for question_id, sample in first.items():
        for name, vector in sample.states.items():
            assert torch.equal(vector, second[question_id].states[name])
        assert sample.logprobs == second[question_id].logprobs


def test_nothing_new_is_begun_once_it_is_to_stop(model, prompter):
    extractor, found = make_extractor(model, prompter, 5), []
    for outcome in extractor.run(ask_all(prompter), lambda: len(found) > 0):
        found.append(outcome)
        live = len(extractor._live)
        assert live + len(found) <= 5
    assert len(found) == 5


# ───────────────────────────────────────────── the rest ───────────────────────────────────────────


def test_a_model_that_is_another_is_an_error(prompter):
    model = torch.nn.Module()
    model.config = type("Config", (), {"text_config": modeling_gemma3.Gemma3TextConfig()})
    with pytest.raises(script.ExtractionError, match=r"requirements\.txt"):
        make_extractor(model, prompter)


def test_soft_tokens_must_be_one_run():
    assert script.find_soft_tokens([2, 9, 9, 9, 5], 9, 3) == (1, 4)
    for input_ids in ([2, 9, 9, 5], [9, 9, 2, 9], [2, 5], [9, 9, 9, 9]):
        with pytest.raises(script.RowError, match="expected one run of 3"):
            script.find_soft_tokens(input_ids, 9, 3)


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
