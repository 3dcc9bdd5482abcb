"""Whole models of every family: stock up to the chunk size, a dense float64 dual-chunk model beyond it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from definition import dense_model
from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, patch_qwen, patched_qwen

CHUNK, LOCAL = 64, 16


def prompt(tokens, batch=1):
    return torch.randint(1, 90, (batch, tokens))  # 0 pads


@torch.no_grad()
def continued(model, ids, cuts, cache=None):
    """Logits of all tokens, fed a piece at a time."""
    cache = cache if cache is not None else LongContextCache()
    outs = [
        model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, CHUNK - LOCAL, CHUNK - LOCAL + 1, CHUNK])
@torch.no_grad()
def test_up_to_the_chunk_size_it_is_the_stock_model(family, tokens):
    model = tiny_model(family, dtype=torch.float32)
    ids = prompt(tokens, batch=2)
    stock = model(ids).logits
    patch_qwen(model)
    torch.testing.assert_close(model(ids).logits, stock, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beyond_it_is_the_dense_dual_chunk_model(family):
    model = tiny_model(family, dtype=torch.float64)
    ids = prompt(210)
    heat = LongContextConfig.from_model_config(model.config).temperature(210)
    assert heat > 1
    wanted = dense_model(model, ids, CHUNK, LOCAL, heat)
    patch_qwen(model, attention_temperature=True)
    torch.testing.assert_close(model(ids).logits, wanted)
    patch_qwen(model, attention_temperature=True, kernel="reference")
    torch.testing.assert_close(model(ids).logits, wanted)


@torch.no_grad()
def test_the_stock_model_differs_beyond():
    """The comparison above can fail: without the patch it does."""
    model = tiny_model("qwen2", dtype=torch.float64)
    ids = prompt(210)
    assert (model(ids).logits - dense_model(model, ids, CHUNK, LOCAL, 1.0)).abs().max() > 1e-3


MODEL = None


def shared_model():
    """One model for the property test, which cannot use function fixtures."""
    global MODEL
    if MODEL is None:
        torch.manual_seed(0)
        MODEL = patch_qwen(tiny_model("qwen3", dtype=torch.float64))
    return MODEL


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 220), st.integers(1, 80), st.data())
def test_any_prefill_chunking_and_any_continuation(tokens, size, data):
    model = shared_model()
    ids = prompt(tokens)
    with torch.no_grad(), patched_qwen(model, attention_temperature=False):
        whole = model(ids).logits
    cuts = sorted({0, tokens} | data.draw(st.sets(st.integers(0, tokens), max_size=4)))
    with torch.no_grad(), patched_qwen(model, attention_temperature=False, prefill_chunk_size=size):
        torch.testing.assert_close(model(ids).logits, whole)
        torch.testing.assert_close(continued(model, ids, cuts), whole)


@pytest.mark.parametrize("size", [7, 48, 64, 500])
@torch.no_grad()
def test_the_temperature_is_the_whole_prompts_whatever_the_chunks(size):
    model = tiny_model("qwen2", dtype=torch.float64)
    ids = prompt(230)
    wanted = dense_model(model, ids, CHUNK, LOCAL, LongContextConfig(64, 16, 64).temperature(230))
    patch_qwen(model, prefill_chunk_size=size, attention_temperature=True)
    torch.testing.assert_close(model(ids).logits, wanted)


@torch.no_grad()
def test_decode_takes_the_sequences_length():
    model = patch_qwen(tiny_model("qwen2", dtype=torch.float64), attention_temperature=True)
    ids = prompt(200)
    cache = LongContextCache()
    model(ids[:, :199], past_key_values=cache, use_cache=True)
    found = model(ids[:, 199:], past_key_values=cache, use_cache=True).logits
    hot = model(ids).logits[:, -1:]
    assert found.shape == hot.shape
    # the prefix ran at the temperature of 199 tokens, so the two agree closely but not to rounding
    assert 0 < (found - hot).abs().max() < 0.05 * hot.abs().max()


@torch.no_grad()
def test_yarn_checkpoints_keep_their_frequencies():
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10_000.0,
    }
    model = tiny_model("qwen2", dtype=torch.float64, rope=rope, max_position_embeddings=256)
    assert model.model.rotary_emb.attention_scaling != 1.0
    ids = prompt(60)
    stock = model(ids).logits
    heat = LongContextConfig(64, 16, 64).temperature(210)
    ids = prompt(210)
    wanted = dense_model(model, ids, CHUNK, LOCAL, heat)
    patch_qwen(model, attention_temperature=True)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-6, rtol=1e-6)
    assert stock.shape[1] == 60


@torch.no_grad()
def test_mlp_slices_change_nothing():
    model = tiny_model("qwen2", dtype=torch.float64)
    ids = prompt(60)
    whole = patch_qwen(model)(ids).logits
    patch_qwen(model, mlp_chunk_size=7)
    torch.testing.assert_close(model(ids).logits, whole)


@torch.no_grad()
def test_two_sequences_run_through_one_model_in_turn():
    model = patch_qwen(tiny_model("qwen2", dtype=torch.float64), attention_temperature=False)
    first, second = prompt(150), prompt(90)
    alone = model(first).logits, model(second).logits
    caches = LongContextCache(), LongContextCache()
    mixed: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for start in range(0, 150, 30):
        for which, ids in enumerate((first, second)):
            if start < ids.shape[1]:
                part = ids[:, start : start + 30]
                mixed[which].append(model(part, past_key_values=caches[which], use_cache=True).logits)
    for parts, wanted in zip(mixed, alone, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), wanted)
