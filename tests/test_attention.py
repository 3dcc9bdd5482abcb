"""attend() against the per-token float64 definition, by property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from definition import dual_chunk_attention
from qwen_longctx import LongContextConfig
from qwen_longctx.attention.dense import attend, weights
from qwen_longctx.geometry.layout import Call, RotarySource, make_layout, read_call
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import Tensors

HEAD_DIM = 8
ROTARY = RotarySource(100.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), 1.0)


def config(chunk_size, local_size, **overrides):
    return LongContextConfig(chunk_size, local_size, 10**9, **overrides)


def layout_of(call, start, stop, settings_, dtype=torch.float64, rotary=ROTARY, device="cpu"):
    how = {"settings": settings_, "rotary": rotary, "dtype": dtype, "device": torch.device(device)}
    return make_layout(call, start, stop, **how)


def run(q, k, v, settings_, cuts, mask=None, position_ids=None, announced=0):
    """One call in chunks that end at `cuts`, as a chunked prefill makes it."""
    call = read_call(mask, position_ids, batch=q.shape[0], tokens=q.shape[1], cached=0, announced=announced)
    kept, outs = [], []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        layout = layout_of(call, start, stop, settings_, q.dtype)
        kept.append(rotate(k[:, start:stop], layout.tables.keys))
        outs.append(attend(q[:, start:stop], Tensors(torch.cat(kept, 1), v[:, :stop]), layout, 0.4))
    return torch.cat(outs, 1)


def tensors(batch, tokens, kv_heads, group):
    shape = (batch, tokens, kv_heads, HEAD_DIM)
    k, v = torch.randn(2, *shape, dtype=torch.float64)
    return torch.randn(batch, tokens, kv_heads * group, HEAD_DIM, dtype=torch.float64), k, v


@st.composite
def cases(draw):
    chunk_size = draw(st.integers(4, 20))
    local_size = draw(st.integers(1, chunk_size // 2))
    tokens = draw(st.integers(1, 50))
    inner = draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=5))
    cuts = sorted({0, tokens} | {c for c in inner if c < tokens})
    return chunk_size, local_size, tokens, cuts, draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(["sdpa", "reference"]))
def test_any_chunking_is_the_definition(case, kernel):
    chunk_size, local_size, tokens, cuts, (kv_heads, group) = case
    q, k, v = tensors(1, tokens, kv_heads, group)
    found = run(q, k, v, config(chunk_size, local_size, kernel=kernel), cuts)
    wanted = dual_chunk_attention(q[0], k[0], v[0], ROTARY.inv_freq, chunk_size, local_size, 0.4)
    torch.testing.assert_close(found[0], wanted)


@settings(max_examples=30, deadline=None)
@given(cases(), st.lists(st.integers(0, 60), min_size=2, max_size=3))
def test_padded_rows_are_the_rows_alone(case, paddings):
    chunk_size, local_size, tokens, cuts, (kv_heads, group) = case
    paddings = [min(p, tokens) for p in paddings]
    q, k, v = tensors(len(paddings), tokens, kv_heads, group)
    mask = torch.ones(len(paddings), tokens, dtype=torch.long)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=1)  # what generate makes: padding stands at 1
    position_ids = torch.where(mask.bool(), mask.cumsum(-1) - 1, position_ids)
    found = run(q, k, v, config(chunk_size, local_size), cuts, mask, position_ids)
    for row, padding in enumerate(paddings):
        wanted = dual_chunk_attention(
            q[row], k[row], v[row], ROTARY.inv_freq, chunk_size, local_size, 0.4, first_key=padding
        )
        torch.testing.assert_close(found[row], wanted)
        assert not found[row, :padding].any()


def test_right_padding_hides_the_end():
    q, k, v = tensors(2, 30, 1, 2)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    found = run(q, k, v, config(12, 4), [0, 13, 30], mask)
    wanted = dual_chunk_attention(q[1, :20], k[1, :20], v[1, :20], ROTARY.inv_freq, 12, 4, 0.4)
    torch.testing.assert_close(found[1, :20], wanted)


def test_temperature_is_the_prompts_then_each_tokens_own():
    q, k, v = tensors(1, 40, 1, 1)
    long = LongContextConfig(12, 4, original_max_position_embeddings=10)

    def row(i, length):
        heat = (0.1 * math.log(length / 10) + 1) ** 2
        alone = dual_chunk_attention(q[0], k[0], v[0], ROTARY.inv_freq, 12, 4, 0.4 * heat)
        return alone[i]

    found = run(q, k, v, long, [0, 17, 30, 31, 36, 40], announced=30)[0]
    for i, length in ((0, 30), (16, 30), (29, 30), (30, 31), (33, 34), (39, 40)):
        torch.testing.assert_close(found[i], row(i, length))


def test_temperature_counts_real_tokens_only():
    settings_ = LongContextConfig(12, 4, original_max_position_embeddings=10)
    q, k, v = tensors(2, 40, 1, 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :25] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = run(q, k, v, settings_, [0, 40], mask, positions)
    alone = run(q[:1, 25:], k[:1, 25:], v[:1, 25:], settings_, [0, 15])
    torch.testing.assert_close(found[:1, 25:], alone)


def test_no_temperature_within_the_trained_length():
    settings_ = LongContextConfig(12, 4, original_max_position_embeddings=40)
    assert settings_.temperature(40) == 1.0
    assert settings_.temperature(41) > 1.0
    assert LongContextConfig(12, 4, 10, attention_temperature=False).temperature(1000) == 1.0
    assert LongContextConfig(262144, 8192, 262144).temperature(1_010_000) == pytest.approx(1.1349**2, rel=1e-4)


def test_unused_room_of_a_static_cache_is_ignored():
    q, k, v = tensors(1, 9, 1, 2)
    layout = layout_of(Call.whole(1, 9), 0, 9, config(12, 4))
    rotated = rotate(k, layout.tables.keys)
    room = torch.full((1, 5, 1, HEAD_DIM), torch.nan, dtype=torch.float64)
    found = attend(q, Tensors(torch.cat((rotated, room), 1), torch.cat((v, room), 1)), layout, 0.4)
    torch.testing.assert_close(found, attend(q, Tensors(rotated, v), layout, 0.4))


def test_weights_sum_the_values_to_the_output():
    q, k, v = tensors(2, 8, 1, 2)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    call = read_call(mask, (mask.cumsum(-1) - 1).clamp(min=0), batch=2, tokens=8, cached=0)
    layout = layout_of(call, 0, 8, config(12, 4))
    kv = Tensors(rotate(k, layout.tables.keys), v)
    found = torch.einsum("bhts,bshd->bthd", weights(q, kv, layout, 0.4), v.repeat_interleave(2, 2))
    torch.testing.assert_close(found, attend(q, kv, layout, 0.4))


@pytest.mark.gpu
def test_on_a_gpu_error_is_at_most_twice_that_of_plain_attention():
    """bf16 on CUDA, a length that crosses two chunks, against float64."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 3000, h, 128, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    rotary = RotarySource(10_000.0 ** -(torch.arange(0, 128, 2, device="cuda") / 128), 1.0)

    def attended(dtype, kernel):
        layout = layout_of(Call.whole(1, 3000), 0, 3000, config(1280, 256, kernel=kernel), dtype, rotary, q.device)
        keys = rotate(k.to(dtype), layout.tables.keys)
        return attend(q.to(dtype), Tensors(keys, v.to(dtype)), layout, 128**-0.5).double()

    true = attended(torch.float64, "reference")
    plain = attended(torch.bfloat16, "reference")
    found = attended(torch.bfloat16, "sdpa")
    assert (found - true).abs().max() <= 2 * (plain - true).abs().max() + 2 * torch.finfo(torch.bfloat16).eps
