"""Prompts of exact length, and the bundled checkpoint at many times its trained length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_longctx import patched_qwen
from qwen_longctx.cli import BUNDLED
from qwen_longctx.evaluation import passkey

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@settings(max_examples=30, deadline=None)
@given(st.integers(90, 3000), st.floats(0, 1), st.integers(10_000, 99_999))
def test_prompts(length, depth, key):
    ids = passkey.prompt(TOKENIZER, length, depth, str(key))
    text = TOKENIZER.decode(ids[0])
    assert ids.shape == (1, length)
    assert text.startswith("There is an important info") and text.endswith("What is the pass key? The pass key is")
    assert text.count(f" The pass key is {key}. Remember it. {key} is the pass key.") == 1


def test_depth_moves_the_key():
    places = [
        TOKENIZER.decode(passkey.prompt(TOKENIZER, 2000, depth, "12345")[0]).index("12345")
        for depth in (0, 0.25, 0.5, 1)
    ]
    assert places == sorted(places) and places[0] < 200


@pytest.mark.parametrize(
    "answer, right", [(" 28884.", True), ("28884", True), (" 2 8 8 8 4", True), (" 28885.", False), ("", False)]
)
def test_judging(answer, right):
    assert passkey.is_correct(answer, "28884") is right


def test_the_bundled_checkpoint_is_a_plain_qwen2(model):
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.max_position_embeddings == 256
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) < 10e6


@pytest.mark.parametrize("multiple, keys", [(1, 10), (4, 8), (16, 5), (64, 2)])
def test_found_with_the_patch(model, multiple, keys):
    depths = [(i + 0.5) / keys for i in range(keys)]
    with patched_qwen(model):
        records = passkey.evaluate(model, TOKENIZER, [256 * multiple], depths, seed=multiple)
    assert passkey.accuracy(records)[256 * multiple] == 1.0


def test_lost_without_the_patch(model):
    records = passkey.evaluate(model, TOKENIZER, [256 * 16], [0.1, 0.3, 0.6, 0.9])
    assert passkey.accuracy(records) == {256 * 16: 0.0}


def test_records_are_sorted_and_repeatable(model):
    runs = [passkey.evaluate(model, TOKENIZER, [256, 128], [0.5], repeats=2, seed=3) for _ in range(2)]
    assert [r.length for r in runs[0]] == [128, 128, 256, 256]
    assert [r.key for r in runs[0]] == [r.key for r in runs[1]]
