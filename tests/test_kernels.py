"""Every kernel against float64 with the same mask: error at most twice that of plain attention in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import DEVICES
from qwen_longctx import ops
from qwen_longctx.ops.aten import roomless
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.reference import reference, weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SHAPES = [
    (1, 1, 1, 2, 2),
    (2, 5, 5, 4, 2),
    (1, 3, 70, 6, 2),
    (1, 64, 64, 4, 1),
    (2, 1, 33, 7, 1),
    (1, 300, 411, 4, 2),
]


def draw(shape, dtype, device="cpu", head_dim=64):
    batch, queries, keys, heads, kv_heads = shape
    q = torch.randn(batch, queries, heads, head_dim, device=device).to(dtype)
    room = torch.randn(2, batch, keys + 9, kv_heads, head_dim, device=device).to(dtype)
    return q, room[0, :, :keys], room[1, :, :keys]


def plain(q, k, v, causal, scale):
    """Attention as a beginner writes it, in the dtype of its input."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    logits = q.transpose(1, 2) @ k.transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[1])
        logits = logits.masked_fill(hidden, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(name, dtype, causal, shape, device):
    q, k, v = draw(shape, dtype, device)
    true_out, true_lse = plain(q.double(), k.double(), v.double(), causal, 0.125)
    plain_out, _ = plain(q, k, v, causal, 0.125)
    out, lse = ops.get(name)(q, k, v, causal=causal, scale=0.125)
    # float64 has no better judge than itself: there, some rounding steps
    allowed = 2 * (plain_out - true_out).abs().max() + (64 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
    assert (out - true_out).abs().max() <= allowed
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    close = 2e-4 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(lse.double(), true_lse, atol=close, rtol=close)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_no_keys_give_zero_and_minus_infinity(name):
    q, k, v = draw((1, 4, 6, 4, 2), torch.float32)
    out, lse = ops.get(name)(q, k[:, :0], v[:, :0], causal=False, scale=1.0)
    assert not out.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_rows_before_all_keys_are_empty(name):
    """More queries than keys under a causal mask: the first rows attend to nothing."""
    q, k, v = draw((1, 6, 4, 4, 2), torch.float32)
    out, lse = ops.get(name)(q, k, v, causal=True, scale=1.0)
    assert not out[:, :2].any() and bool((lse[..., :2] == -torch.inf).all())
    assert out[:, 2:].abs().sum() > 0 and bool(lse[..., 2:].isfinite().all())


def test_reference_in_slices_is_the_same(monkeypatch):
    import importlib

    q, k, v = draw((2, 17, 23, 4, 2), torch.float64)
    whole = reference(q, k, v, causal=True, scale=0.3)
    monkeypatch.setattr(importlib.import_module("qwen_longctx.ops.reference"), "_LOGITS_AT_A_TIME", 400)
    for a, b in zip(whole, reference(q, k, v, causal=True, scale=0.3), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_those_of_the_definition():
    q, k, v = draw((2, 5, 9, 4, 2), torch.float64)
    result = weights(q, k, causal=True, scale=0.3)
    out = torch.einsum("bhts,bshd->bthd", result, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, plain(q, k, v, True, 0.3)[0])


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of .*got 'fast'"):
        ops.get("fast")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(1, 5), st.sampled_from(DTYPES[:2]))
def test_merge_of_any_split_is_one_softmax(lengths, queries, dtype):
    total = sum(lengths)
    q, k, v = draw((2, queries, total, 4, 2), dtype, head_dim=8)
    whole_out, whole_lse = reference(q, k, v, causal=False, scale=0.3)
    parts = [
        reference(q, pk, pv, causal=False, scale=0.3)
        for pk, pv in zip(k.split(lengths, 1), v.split(lengths, 1), strict=True)
    ]
    out, lse = merge(parts)
    torch.testing.assert_close(out, whole_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


def test_merge_in_slices(monkeypatch):
    import importlib

    q, k, v = draw((1, 50, 40, 4, 2), torch.float64)
    parts = [reference(q, k[:, a:b], v[:, a:b], causal=False, scale=0.3) for a, b in ((0, 11), (11, 40))]
    whole = merge(parts)
    monkeypatch.setattr(importlib.import_module("qwen_longctx.ops.merge"), "TOKENS_AT_A_TIME", 7)
    for a, b in zip(whole, merge(parts), strict=True):
        torch.testing.assert_close(a, b)


def test_strides_of_one_row_do_not_depend_on_the_room_of_its_cache():
    one, two = ([torch.zeros(rows, room, 2, 8)[:, :30] for room in (30, 40)] for rows in (1, 2))
    views = [roomless(x) for x in one]
    assert views[0].stride() == views[1].stride() != one[1].stride()
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a, b in zip(views, one, strict=True))
    assert all(roomless(x) is x for x in two)
