"""A seeded sample of the fuzz against the float64 definition; the long run is ``python tests/fuzz.py``."""

from __future__ import annotations

from collections import Counter

import pytest

import fuzz
from definition import dense_model
from fuzz import TOLERANCE, Case

SAMPLE = range(150)
KINDS = {"calls": 90, "generate": 10, "classify": 10}  # at least so many of each


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("first", SAMPLE[::10])
def test_random_cases_are_those_of_the_definition(first):
    for seed in range(first, first + 10):
        case = Case(seed)
        try:
            error = case.run()
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {case.describe()}") from problem
        assert error <= TOLERANCE, f"seed {seed}: {case.describe()}"


def test_the_sample_holds_all_kinds():
    """What the cases are to cover is drawn often enough in the first of them."""
    cases = [Case(seed) for seed in SAMPLE]
    kinds = Counter(case.kind for case in cases)
    assert all(kinds[kind] >= least for kind, least in KINDS.items()), kinds
    assert sum(case.training for case in cases) >= 5
    assert {case.settings["attention_temperature"] for case in cases} == {True, False, "position"}
    assert {case.settings["sparse"] for case in cases} == {"off", "block_scores", "vertical_slash"}


def test_another_definition_is_noticed(monkeypatch):
    """The sample can fail: with another chunk size in the definition, cases that reach a second chunk do."""
    monkeypatch.setattr(fuzz, "dense_model", lambda model, ids, c, w, heat: dense_model(model, ids, c + 1, w, heat))
    errors = [Case(seed).run() for seed in range(20)]
    assert 5 <= sum(error > TOLERANCE for error in errors) < 20
