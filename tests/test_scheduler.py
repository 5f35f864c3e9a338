"""Who waits, who runs in which lane, what runs together: plain Python, so no model is needed."""

import random

import pytest

import run_gemma3_extraction as script

NUM_PREFIX = 262
MAX_NEW_TOKENS = 40


def make_scheduler(batch_size=8, max_pass_tokens=8192):
    return script.Scheduler(batch_size, NUM_PREFIX, MAX_NEW_TOKENS, max_pass_tokens)


def make_sequences(*num_own):
    """Sequences with so many tokens after the prefix."""
    rows = [script.Row(str(i), "a.png", "", "") for i in range(len(num_own))]
    prompts = [
        script.Prompt(row, [0] * (NUM_PREFIX + num)) for row, num in zip(rows, num_own, strict=True)
    ]
    return [script.Sequence(prompt, image=None) for prompt in prompts]


def lengths_of(batches):
    return [[len(one.prompt.input_ids) - NUM_PREFIX for one in batch] for batch in batches]


def assert_is_sound(scheduler):
    """Every running sequence is in its own lane, and all lanes together keep to their budget."""
    for lane, sequence in enumerate(scheduler.running):
        assert sequence is None or sequence.lane == lane
    usual = script.lane_slots(NUM_PREFIX + script.TYPICAL_QUESTION, MAX_NEW_TOKENS)
    assert len(scheduler.running) <= scheduler.num_lanes <= scheduler.batch_size
    total = scheduler.num_lanes * scheduler.num_slots
    assert total <= scheduler.batch_size * usual or scheduler.num_lanes == 1
    for sequence in filter(None, scheduler.running):
        assert len(sequence.prompt.input_ids) + MAX_NEW_TOKENS <= scheduler.num_slots


@pytest.mark.parametrize("seed", range(20))
def test_any_sequences_come_through_in_their_order(seed):
    draw = random.Random(seed)
    sequences = make_sequences(
        *[draw.choice([9, 11, 15, 30, 90, 1500]) if draw.random() < 0.3 else 12 for _ in range(80)]
    )
    scheduler = make_scheduler(batch_size=draw.choice([1, 2, 5, 16]))
    coming = list(sequences)
    admitted = []
    prefilled = []
    while coming or scheduler.waiting or scheduler.num_running:
        if scheduler.wants_more():
            before = {one.lane: one for one in filter(None, scheduler.running)}
            moves = dict(scheduler.close_gaps())
            assert all(before[lane].lane == moves.get(lane, lane) for lane in before)
            assert None not in scheduler.running
            while scheduler.has_room() and (coming or scheduler.waiting):
                if not scheduler.waiting:
                    scheduler.waiting.extend(coming[:3])
                    del coming[:3]
                admitted += scheduler.admit()
                assert_is_sound(scheduler)
            for batch in scheduler.prefill_batches():
                prefilled += batch
        running = [one for one in scheduler.running if one is not None]
        assert running, "it never stops while something waits"
        for sequence in running:
            if draw.random() < 0.3:
                scheduler.finish(sequence)
    assert admitted == sequences
    assert len(prefilled) == len(set(map(id, prefilled))) == 80


def test_it_wants_more_once_a_quarter_is_free():
    scheduler = make_scheduler(batch_size=8)
    scheduler.waiting.extend(make_sequences(*[10] * 8))
    running = scheduler.admit()
    found = []
    for sequence in running:
        found.append(scheduler.wants_more())
        scheduler.finish(sequence)
    assert found == [False, False, True, True, True, True, True, True]
    assert scheduler.wants_more()


def test_the_last_move_into_the_gaps():
    scheduler = make_scheduler(batch_size=6)
    sequences = make_sequences(*[10] * 6)
    scheduler.waiting.extend(sequences)
    scheduler.admit()
    for lane in (0, 3, 5):
        scheduler.finish(sequences[lane])
    assert scheduler.close_gaps() == [(4, 0)]
    assert scheduler.running == [sequences[4], sequences[1], sequences[2]]


def test_a_long_prompt_waits_for_room_and_narrows_the_batch():
    scheduler = make_scheduler(batch_size=4)
    short, other, long, last = make_sequences(10, 10, 900, 10)
    scheduler.waiting.extend([short, other, long, last])
    assert scheduler.admit() == [short, other]  # the long one is as wide as four
    scheduler.finish(short)
    scheduler.close_gaps()
    assert scheduler.admit() == []
    scheduler.finish(other)
    scheduler.close_gaps()
    assert scheduler.admit() == [long]
    assert scheduler.num_lanes == 1
    scheduler.finish(long)
    scheduler.close_gaps()
    assert scheduler.admit() == [last]
    assert scheduler.num_lanes == 4


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([9, 11, 10], 8192, [[9, 11, 10]]),  # in the order of their lanes
        ([9, 9, 1500, 15], 100, [[9, 9, 15], [1500]]),
        ([20, 10] * 4, 40, [[10] * 4, [20, 20], [20, 20]]),
        ([1500], 100, [[1500]]),
    ],
)
def test_similar_lengths_are_run_together(lengths, max_tokens, expected):
    scheduler = make_scheduler(batch_size=256, max_pass_tokens=max_tokens)
    scheduler.waiting.extend(make_sequences(*lengths))
    scheduler.admit()
    batches = scheduler.prefill_batches()
    assert lengths_of(batches) == expected
    assert scheduler.prefill_batches() == []
    for batch in batches:
        assert [one.lane for one in batch] == sorted(one.lane for one in batch)
