"""States and answers against transformers alone: no hooks, no cache, nothing shared."""

import dataclasses
from collections import Counter

import pytest
import torch
from conftest import IMAGES, read_csv

import run_gemma3_extraction as script

LAYERS = [0, 2, 4, 6, 7]
CPU = torch.device("cpu")
MAX_NEW_TOKENS = 40  # more than the room of a fresh key/value buffer


def make_rows():
    return [
        script.Row(i, q, row["image_id"], row["question"], row["answer"])
        for i, (q, row) in enumerate(read_csv().items())
    ]


def reference(model, processor, row):
    """All vectors, token ids and the answer of one prompt, from the model's own entry points."""
    image = script.open_image(IMAGES, row.image_id)
    content = [{"type": "image", "image": image}, {"type": "text", "text": row.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.dtype)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        answer = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            top_k=None,
            top_p=None,
            disable_compile=True,
        )[0, length:].tolist()
        patches = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[0]
        norm, model.model.language_model.norm = model.model.language_model.norm, torch.nn.Identity()
        try:
            outputs = model(**inputs, output_hidden_states=True, use_cache=False)
        finally:
            model.model.language_model.norm = norm
    hidden = [outputs.hidden_states[i + 1][0].float() for i in LAYERS]
    last_soft = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1])
    vectors = {"vision_representation": patches.float().mean(0)}
    vectors |= {
        f"vision_token_representation/layer_{i}": h[last_soft] for i, h in zip(LAYERS, hidden)
    }
    vectors |= {f"query_token_representation/layer_{i}": h[-1] for i, h in zip(LAYERS, hidden)}
    vectors |= {f"multimodal_representation/layer_{i}": h.mean(0) for i, h in zip(LAYERS, hidden)}
    end = model.generation_config.eos_token_id
    return {
        "vectors": vectors,
        "input_ids": inputs["input_ids"][0].tolist(),
        "answer": [token for token in answer if token not in end],
        "truncated": answer[-1] not in end,
    }


@pytest.fixture(scope="module")
def references(model, processor):
    return {row.question_id: reference(model, processor, row) for row in make_rows()}


def make_extractor(model, processor, max_new_tokens=MAX_NEW_TOKENS):
    return script.Extractor(model, script.Prompts(processor), LAYERS, max_new_tokens, CPU)


def run_all(extractor, batch_size, rows=None):
    """The extractor's own pipeline, without files: vectors, answer, truncated by question_id."""
    shapes = script.state_shapes(extractor.model.config, LAYERS)
    options = script.Options(None, IMAGES, dtype=str(extractor.model.dtype).split(".")[1])

    def prepare(about_image):
        return script.prepare_image(about_image, options, extractor.prompts, CPU)

    ordered = [
        row for part in script.plan_parts(rows or make_rows(), 10**9).values() for row in part
    ]
    items = script.prepare_ahead(ordered, prepare, num_workers=2, num_images=4)
    found = {}
    for batch in script.make_batches(items, batch_size):
        for sample in script.run_batch(extractor, batch):
            sample.wait()
            vectors = dict(zip(shapes, sample.states.split(list(shapes.values()))))
            outcome = (vectors, sample.answer, sample.is_truncated)
            found[sample.prompt.row.question_id] = outcome
    return found


def worst_error(found, references):
    return max(
        script.relative_error(vector, references[question_id]["vectors"][name])
        for question_id, (vectors, _, _) in found.items()
        for name, vector in vectors.items()
    )


@pytest.mark.parametrize("joins_images", [False, True], ids=["one by one", "joined"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_states_and_answers_equal_plain_passes(
    model, processor, references, batch_size, joins_images
):
    extractor = make_extractor(model, processor)
    extractor.joins_images = joins_images
    found = run_all(extractor, batch_size)
    assert found.keys() == references.keys()
    assert worst_error(found, references) < 1e-4
    for question_id, (vectors, answer, truncated) in found.items():
        assert vectors.keys() == references[question_id]["vectors"].keys()
        assert answer == references[question_id]["answer"]
        assert truncated == references[question_id]["truncated"]


def test_answers_in_the_data_are_of_all_kinds(references):
    lengths = {len(r["answer"]) for r in references.values()}
    assert len(lengths) > 5  # or the tests of decoding show little
    assert {r["truncated"] for r in references.values()} == {True, False}


def test_tokens_are_the_processors_own(processor, references):
    prompts = script.Prompts(processor)
    for row in make_rows():
        input_ids = references[row.question_id]["input_ids"]
        assert prompts.tokenize(row.question) == input_ids
        assert input_ids.count(processor.tokenizer.bos_token_id) == 1


def break_soft_pos(monkeypatch, extractor):
    original = script.Captured.__init__
    monkeypatch.setattr(
        script.Captured,
        "__init__",
        lambda self, *fields: original(self, *fields[:-1], fields[-1] - 1),
    )


def break_query_pos(monkeypatch, extractor):
    original = script.lay_out

    def broken(*args):
        layout = original(*args)
        spans = [(row, start, stop - 1) for row, start, stop in layout.spans]
        return dataclasses.replace(layout, spans=spans)

    monkeypatch.setattr(script, "lay_out", broken)


def break_bos(monkeypatch, extractor):
    render = extractor.prompts.render
    monkeypatch.setattr(extractor.prompts, "render", lambda question: "<bos>" + render(question))
    monkeypatch.setattr(extractor.prompts, "_plain_special", [2, *extractor.prompts._plain_special])
    monkeypatch.setattr(extractor.prompts, "soft_start", extractor.prompts.soft_start + 1)
    monkeypatch.setattr(extractor.prompts, "soft_stop", extractor.prompts.soft_stop + 1)


def break_image_mask(monkeypatch, extractor):
    original = script.lay_out
    monkeypatch.setattr(
        script, "lay_out", lambda by_image, num_before, _: original(by_image, num_before, -1)
    )


def break_last_layer(monkeypatch, extractor):
    extractor._layers[-1] = extractor._decoder.norm


def break_mean_without_bos(monkeypatch, extractor):
    original = script._sums
    monkeypatch.setattr(script, "_sums", lambda sequences: original([s[1:] for s in sequences]))


def break_window(monkeypatch, extractor):
    extractor._window += 1


def break_positions(monkeypatch, extractor):
    original = script.lay_out

    def broken(*args):
        layout = original(*args)
        layout.query[:, :, 0] = torch.arange(layout.query.shape[1])
        return layout

    monkeypatch.setattr(script, "lay_out", broken)


@pytest.mark.parametrize(
    "break_it",
    [
        break_soft_pos,
        break_query_pos,
        break_bos,
        break_image_mask,
        break_last_layer,
        break_mean_without_bos,
        break_window,
        break_positions,
    ],
)
def test_the_comparison_notices(break_it, model, processor, references, monkeypatch):
    """Each mistake that people make here is far outside the bound of the tests above."""
    extractor = make_extractor(model, processor, max_new_tokens=0)
    break_it(monkeypatch, extractor)
    assert worst_error(run_all(extractor, 64), references) > 1e-3


def test_padding_stays_out_of_the_mean(model, processor, references):
    extractor = make_extractor(model, processor, max_new_tokens=0)
    extractor.joins_images = True
    rows = [row for row in make_rows() if row.question_id in ("long", "..", "001")]
    seen = []
    extractor._decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "MAX_PADDING", 1.0)
        found = run_all(extractor, 64, rows)
    extractor._decoder._forward_pre_hooks.clear()
    assert seen[0][0] == 2  # a row for each of the two images, one much shorter
    assert worst_error(found, references) < 1e-4


def test_each_image_and_each_token_is_run_once(model, processor):
    extractor = make_extractor(model, processor, max_new_tokens=0)
    images, tokens = [], []
    tower, decoder = model.model.vision_tower, model.model.language_model
    handles = [
        tower.register_forward_pre_hook(
            lambda m, args, kwargs: images.append(len(kwargs["pixel_values"])), with_kwargs=True
        ),
        decoder.register_forward_pre_hook(
            lambda m, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        ),
    ]
    rows = make_rows()
    try:
        run_all(extractor, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert sum(images) == len({row.image_id for row in rows})
    lengths = [len(extractor.prompts.tokenize(row.question)) for row in rows]
    assert sum(tokens) < sum(lengths) - (len(rows) - 8) * 260


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_gone_wrong_spoils_no_other_prompt(
    model, processor, references, monkeypatch, value
):
    original = script.Prompts.pixels

    def spoil(self, image):
        return original(self, image) * (value if image.size == (640, 120) else 1)

    monkeypatch.setattr(script.Prompts, "pixels", spoil)
    found = run_all(make_extractor(model, processor), 64)
    wrong = {row.question_id for row in make_rows() if row.image_id == "wide.jpg"}
    assert_only_these_are_wrong(found, references, wrong)


@pytest.mark.parametrize("max_new_tokens", [0, MAX_NEW_TOKENS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_question_gone_wrong_spoils_no_other_prompt(
    model, processor, references, monkeypatch, value, max_new_tokens
):
    """Neither those about the same image, which stand in the same row, nor others' answers."""
    rows = make_rows()
    tokens = {row.question_id: references[row.question_id]["input_ids"] for row in rows}
    uses = Counter(token for input_ids in tokens.values() for token in set(input_ids))
    answers = {token for reference in references.values() for token in reference["answer"]}
    word = min(token for token, count in uses.items() if count == 1 and token not in answers)
    embed = model.model.language_model.embed_tokens
    original = embed.forward

    def spoil(input_ids):
        embeds = original(input_ids)
        embeds[input_ids == word] = value
        return embeds

    monkeypatch.setattr(embed, "forward", spoil)
    found = run_all(make_extractor(model, processor, max_new_tokens), 64)
    wrong = {question_id for question_id, input_ids in tokens.items() if word in input_ids}
    (image_id,) = {row.image_id for row in rows if row.question_id in wrong}
    assert sum(row.image_id == image_id for row in rows) > 1  # others stand in its row
    assert_only_these_are_wrong(found, references, wrong, has_answers=max_new_tokens > 0)


def assert_only_these_are_wrong(found, references, wrong, has_answers=True):
    assert {q for q, (vectors, _, _) in found.items() if not finite(vectors)} == wrong
    good = {question_id: found[question_id] for question_id in found.keys() - wrong}
    assert worst_error(good, references) < 1e-4
    for question_id, (_, answer, _) in good.items() if has_answers else ():
        assert answer == references[question_id]["answer"]


def finite(vectors):
    return all(vector.isfinite().all() for vector in vectors.values())


def count_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_no_hook_is_left_behind(model, processor, monkeypatch):
    extractor = make_extractor(model, processor, max_new_tokens=0)
    before = count_hooks(model)  # transformers keeps some of its own once it has shown states
    run_all(extractor, 5)
    assert count_hooks(model) == before

    def fail(*_):
        assert count_hooks(model) == before + len(LAYERS) + 1
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Captured, "on_patches", fail)
    with pytest.raises(KeyboardInterrupt):
        run_all(extractor, 5)
    assert count_hooks(model) == before


def test_a_hook_that_does_not_fire_is_an_error():
    with (
        pytest.raises(script.ExtractionError, match="expected once each"),
        script.forward_hooks([(torch.nn.Identity(), print)]),
    ):
        pass


def test_a_module_that_is_not_there_is_an_error(model, processor):
    with pytest.raises(script.ExtractionError, match=r"requirements\.txt"):
        script.Extractor(model, script.Prompts(processor), [99], 0, CPU)


def test_without_answers_the_head_is_not_run(model, processor, references, monkeypatch):
    extractor = make_extractor(model, processor, max_new_tokens=0)
    monkeypatch.setattr(model, "lm_head", None)
    found = run_all(extractor, 5)
    assert worst_error(found, references) < 1e-4
    assert {(len(answer), truncated) for _, answer, truncated in found.values()} == {(0, False)}


def test_bfloat16_stays_within_rounding_of_float32(processor, references):
    """bfloat16 keeps 8 bits: 2**-8 an operation, which eight layers of the tiny model add up."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        processor.tokenizer.name_or_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    assert 2**-9 < worst_error(run_all(make_extractor(model, processor, 0), 5), references) < 0.1


def test_a_model_spread_by_accelerate_gives_the_same(processor, references, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        processor.tokenizer.name_or_path,
        dtype=torch.float32,
        attn_implementation="sdpa",
        device_map={
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "cpu",
            "model.language_model.embed_tokens": "cpu",
            "model.language_model.rotary_emb": "cpu",
            "model.language_model.norm": "cpu",
            "lm_head": "cpu",
            **{f"model.language_model.layers.{i}": "disk" if i > 3 else "cpu" for i in range(8)},
        },
        offload_folder=tmp_path,
    ).eval()
    found = run_all(make_extractor(model, processor, 6), 5)
    assert worst_error(found, references) < 1e-4
    for question_id, (_, answer, _) in found.items():
        assert answer == references[question_id]["answer"][:6]


def test_soft_tokens_must_be_one_run():
    assert script.find_soft_tokens([2, 9, 9, 9, 5], 9, 3) == (1, 4)
    for input_ids in ([2, 9, 9, 5], [9, 9, 2, 9], [2, 5], [9, 9, 9, 9]):
        with pytest.raises(script.RowError, match="expected one run of 3"):
            script.find_soft_tokens(input_ids, 9, 3)


def test_every_special_token_is_refused_in_a_question(processor):
    prompts = script.Prompts(processor)
    special = [t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
    assert {"<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"} <= set(special)
    for token in special:
        with pytest.raises(script.RowError, match="special tokens") as error:
            prompts.tokenize(f"what is {token} there?")
        assert token in str(error.value)


def test_default_layers_come_from_the_model():
    assert script.choose_layers(None, 48) == [0, 12, 24, 36, 47]
    assert script.choose_layers(None, 2) == [0, 1]
    assert script.choose_layers((-1, 3, 3), 8) == [3, 7]
    with pytest.raises(script.ExtractionError, match="layers 0 to 7"):
        script.choose_layers((8,), 8)
