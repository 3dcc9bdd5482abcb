"""How prompts are cut: every token once, no chunk too long, equal times, and costs that are found again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.prefill import schedule
from qwen_longctx.prefill.schedule import BLOCK, MULTIPLE, SHORTEST, Cost, Measured, Schedule
from qwen_longctx.shapes import known_config

_MILLION = 1_000_000
_SIZE = 32768


def _cost(name: str = "qwen2.5-7b-1m", rule: str | None = None) -> Cost:
    config = known_config(name)
    return schedule.cost_of(Shape.of(config), LongContextConfig.from_model_config(config), rule)


def _lengths(chunks: list[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in chunks]


costs = st.builds(
    lambda token, pair, chunk: Cost(token or 1e-9 * (not pair), pair, chunk),
    st.sampled_from([0.0, 1e-9, 2e-5, 1.0]),
    st.sampled_from([0.0, 1e-18, 6e-10, 1e-3]),
    st.sampled_from([0.0, 1e-3, 0.2, 1e4]),
)


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(0, 5000),
    tokens=st.integers(0, 200_000),
    size=st.one_of(st.integers(1, 600), st.integers(600, 40_000)),
    stages=st.integers(1, 9),
    cost=costs,
)
def test_every_token_once_and_no_chunk_too_long(start: int, tokens: int, size: int, stages: int, cost: Cost) -> None:
    if tokens // size > 300:
        tokens = 300 * size
    chunks = list(Schedule(start, start + tokens, size, stages, cost))
    assert [first for first, _ in chunks[:1]] == [start] * bool(tokens)
    assert [stop for _, stop in chunks[-1:]] == [start + tokens] * bool(tokens)
    assert all(before[1] == after[0] for before, after in zip(chunks, chunks[1:], strict=False))
    lengths = _lengths(chunks)
    assert all(0 < length <= size for length in lengths)
    if stages > 1 and len(lengths) > 1:  # as long as half of the one before, rounding apart
        assert 2 * lengths[-1] + 2 * MULTIPLE >= min(lengths[-2], SHORTEST)
        if size >= 2 * BLOCK:
            assert all(stop % (MULTIPLE if size >= 2 * MULTIPLE else BLOCK) == 0 for _, stop in chunks[:-2])


@pytest.mark.parametrize("rule", [None, "block_scores"])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_equal_times_and_less_time_than_equal_lengths(rule: str | None, stages: int) -> None:
    cost = _cost(rule=rule)
    chunks = list(Schedule(0, _MILLION, _SIZE, stages, cost))
    seconds = [cost.seconds(start, stop - start) for start, stop in chunks]
    lengths = _lengths(chunks)
    # chunks that neither bound holds back take the same time, to the rounding of their ends; the last two share a rest
    free = [i for i, length in enumerate(lengths[:-2]) if SHORTEST + MULTIPLE < length < _SIZE - MULTIPLE]
    assert len(free) > len(lengths) / 4
    same = sum(seconds[i] for i in free) / len(free)
    assert all(abs(lengths[i] - cost.length(chunks[i][0], same)) <= 1.1 * MULTIPLE for i in free)

    def total(found: list[tuple[int, int]]) -> float:
        """By simulation: a stage begins a chunk when it has done the one before, and the stage before has done it."""
        ready = [0.0] * stages
        for start, stop in found:
            done = 0.0
            for stage in range(stages):
                done = ready[stage] = max(done, ready[stage]) + cost.seconds(start, stop - start) / stages
        return ready[-1]

    equal = list(Schedule(0, _MILLION, _SIZE))
    assert total(chunks) < total(equal)
    assert total(chunks) > sum(cost.seconds(start, stop - start) for start, stop in chunks) / stages


def test_one_stage_keeps_equal_chunks() -> None:
    assert _lengths(list(Schedule(7, 100_007, _SIZE, 1, _cost()))) == [_SIZE, _SIZE, _SIZE, 100_000 - 3 * _SIZE]
    assert list(Schedule(7, 100_007, _SIZE, 4)) == list(Schedule(7, 100_007, _SIZE))
    assert list(Schedule(5, 5, _SIZE)) == []


@settings(max_examples=60, deadline=None)
@given(
    token=st.floats(1e-6, 1e-4),
    pair=st.floats(1e-10, 1e-8),
    chunk=st.floats(0, 0.5),
)
def test_a_cost_is_found_again(token: float, pair: float, chunk: float) -> None:
    true = Cost(token, pair, chunk)
    chunks = list(Schedule(0, 300_000, _SIZE, 4, _cost()))
    found = Cost.fit([Measured(a, b - a, true.seconds(a, b - a)) for a, b in chunks], prior=_cost())
    for start, length in [(0, _SIZE), (250_000, 4000), (150_000, 20_000)]:
        assert found.seconds(start, length) == pytest.approx(true.seconds(start, length), rel=0.08)


@pytest.mark.parametrize(
    "measured",
    [
        [],
        [Measured(0, 100, 0.0)],
        [Measured(0, _SIZE, 3.0)],
        [Measured(0, _SIZE, 3.0)] * 4,
        [Measured(i * _SIZE, _SIZE, 2.0) for i in range(5)],  # no growth with the keys
        [Measured(i * _SIZE, _SIZE, 5.0 - i) for i in range(5)],  # faster and faster
        [Measured(i * 10, 10, 1e-9) for i in range(3)],
    ],
)
def test_degenerate_measurements_still_give_a_schedule(measured: list[Measured]) -> None:
    cost = Cost.fit(measured, prior=_cost())
    assert min(cost.token, cost.pair, cost.chunk) >= 0
    lengths = _lengths([(a, b) for a, b in Schedule(0, _MILLION, _SIZE, 4, cost)])
    assert sum(lengths) == _MILLION and max(lengths) <= _SIZE and min(lengths) >= SHORTEST / 2


def test_measured_chunks_change_what_follows_and_not_what_was_cut() -> None:
    plan, true = Schedule(0, _MILLION, _SIZE, 4, _cost(), fitted=True), Cost(6e-5, 2e-9, 0.1)
    still = list(Schedule(0, _MILLION, _SIZE, 4, _cost()))
    for start, stop in plan:
        plan.measured(start, stop, true.seconds(start, stop - start))
    assert plan.chunks[:2] == still[:2] and plan.chunks != still
    tail = [true.seconds(a, b - a) for a, b in plan.chunks[12:-1]]
    assert max(tail) <= 1.35 * min(tail)  # of lengths from 2,560 on, in steps of 512
    unheeded = Schedule(0, _MILLION, _SIZE, 4, _cost())
    for start, stop in unheeded:
        unheeded.measured(start, stop, 1.0)
    assert unheeded.chunks == still


def test_bad_numbers_are_refused() -> None:
    for values in [(-1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (float("nan"), 1.0, 0.0), (float("inf"), 1.0, 0.0)]:
        with pytest.raises(ValueError, match="cost of a chunk must be finite"):
            Cost(*values)
    for wrong in [{"start": 9, "end": 3}, {"size": 0}, {"stages": 0}]:
        with pytest.raises(ValueError, match="a schedule needs"):
            Schedule(**{"start": 0, "end": 10, "size": 4, **wrong})
