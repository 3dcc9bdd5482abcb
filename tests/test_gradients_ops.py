"""Gradients of attention in parts, against float64 autograd through one softmax over the concatenated logits."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from helpers import DEVICES
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.ops import engines
from qwen_longctx.ops.gradients import Part, merged_attention
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.reference import reference_backward
from qwen_longctx.ops.sdpa import sdpa

SCALE = 0.3
ENGINES = ["fused", "reference"]


def plain(parts, scale=SCALE):
    """Attention as a beginner writes it, in the dtype of its input; zero where a query attends to no key."""
    logits, values = [], []
    for q, k, v, causal in parts:
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(-1, -2) * scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[1])
            scores = scores.masked_fill(hidden, -torch.inf)
        logits.append(scores)
        values.append(v)
    logits = torch.cat(logits, dim=-1)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    probabilities = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return (probabilities @ torch.cat(values, dim=2)).transpose(1, 2)


def draw(queries, keys, causal, heads=(4, 2), batch=2, head_dim=8, device="cpu"):
    """Parts in float64; every tensor is a strided view of a larger one."""
    parts = []
    for count, masked in zip(keys, causal, strict=True):
        q = torch.randn(batch, heads[0], queries, head_dim, dtype=torch.float64, device=device).transpose(1, 2)
        k, v = torch.randn(2, batch, count + 3, heads[1], head_dim, dtype=torch.float64, device=device)
        parts.append(Part(q, k[:, 1 : count + 1], v[:, 1 : count + 1], masked))
    return parts


def gradients(function, parts, weight, dtype):
    """The result, and the gradients of its sum weighted by `weight`, of every q, k and v in turn."""
    leaves = [[x.to(dtype).requires_grad_() for x in part[:3]] for part in parts]
    out = function([Part(*three, part.causal) for three, part in zip(leaves, parts, strict=True)])
    tensors = [x for three in leaves for x in three]
    grads = torch.autograd.grad(out, tensors, weight.to(out.dtype), allow_unused=True)
    return out, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors, strict=True)]


def merged(parts):
    return merged_attention(parts, scale=SCALE)


def check(parts, dtype, monkeypatch=None):
    """Twice the error of plain attention in the same dtype, and some rounding steps."""
    parts = [Part(*(x.to(dtype).double() for x in part[:3]), part.causal) for part in parts]
    weight = torch.randn_like(parts[0].q).to(dtype).double()
    true_out, wanted = gradients(plain, parts, weight, torch.float64)
    rough_out, rough = gradients(plain, parts, weight, dtype)
    out, ours = gradients(merged, parts, weight, dtype)
    assert out.dtype == dtype
    for exact, beside, result in [(true_out, rough_out, out), *zip(wanted, rough, ours, strict=True)]:
        assert result.dtype == dtype and result.shape == exact.shape
        if not exact.numel():
            continue
        steps = {torch.float64: 64, torch.float32: 64}.get(dtype, 2) * torch.finfo(dtype).eps
        allowed = 2 * (beside - exact).abs().max() + steps * exact.abs().max().clamp(min=1)
        assert (result - exact).abs().max() <= allowed


CASES = st.tuples(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([(2, 2), (4, 2), (7, 1), (14, 2), (3, 1)]),
    st.integers(1, 2),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(ENGINES),
    st.integers(0, 1 << 20),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(CASES)
def test_gradients_are_those_of_one_softmax(case):
    queries, keys, heads, batch, dtype, name, seed = case
    torch.manual_seed(seed)
    parts = draw(queries, [count for count, _ in keys], [causal for _, causal in keys], heads, batch)
    with pytest.MonkeyPatch.context() as patch:
        if name == "reference":
            patch.setattr(engines, "dense", lambda q: engines.ENGINES["reference"])
            patch.setattr(importlib.import_module("qwen_longctx.ops.reference"), "_LOGITS_AT_A_TIME", 500)
        check(parts, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize("keys", [(300,), (300, 411), (411, 0, 64), (100, 300, 33, 5)])
def test_gradients_of_longer_parts(device, dtype, heads, keys):
    """As in dual chunk attention: the first part is causal, with keys before the queries or not, the others are not."""
    check(draw(300, keys, [True] + [False] * (len(keys) - 1), heads, 1, 64, device), dtype)


def test_autograd_through_a_merge_by_hand_is_refused():
    """It would miss the gradient of the log-sum-exp: 19 to 47 % off."""
    parts = [[x.requires_grad_() for x in part[:3]] for part in draw(5, (9, 7), (True, False))]
    out, _ = merge([sdpa(*part, causal=False, scale=SCALE) for part in parts])
    with pytest.raises(Unsupported, match="merged_attention"):
        out.sum().backward()


def test_one_part_by_sdpa_is_exact_with_keys_before_the_queries():
    parts = draw(20, (33,), (True,))
    weight = torch.randn_like(parts[0].q)
    wanted = gradients(plain, parts, weight, torch.float64)
    result = gradients(lambda p: sdpa(*p[0][:3], causal=True, scale=SCALE)[0], parts, weight, torch.float64)
    torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant):
    parts = draw(12, (12, 9), (True, False))
    weight = torch.randn_like(parts[0].q)

    def recomputed(parts):
        flat = [x for part in parts for x in part[:3]]
        return checkpoint(
            lambda *x: merged([Part(*x[:3], True), Part(*x[3:], False)]), *flat, use_reentrant=use_reentrant
        )

    def leaves(function):
        tensors = [x.detach().clone().requires_grad_() for part in parts for x in part[:3]]
        function([Part(*tensors[:3], True), Part(*tensors[3:], False)]).backward(weight)
        return [x.grad for x in tensors]

    torch.testing.assert_close(leaves(recomputed), leaves(plain))


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (5,), (3, 4), (0, 5)])
def test_only_what_asks_for_a_gradient_gets_one(asked):
    """As in prefix tuning, where the keys and values of the prefix alone may be trained."""
    parts = draw(12, (12, 9), (True, False))

    def leaf_gradients(function):
        tensors = [x.detach().clone() for part in parts for x in part[:3]]
        for at in asked:
            tensors[at].requires_grad_()
        function([Part(*tensors[:3], True), Part(*tensors[3:], False)]).square().sum().backward()
        assert [x.grad is not None for x in tensors] == [at in asked for at in range(6)]
        return [tensors[at].grad for at in asked]

    torch.testing.assert_close(leaf_gradients(merged), leaf_gradients(plain))


def test_expanded_gradients_and_shared_queries():
    """The gradient of a sum has no memory of its own; one tensor may serve in several parts."""
    (q, k, v, _), (_, k2, v2, _) = draw(6, (6, 8), (True, False))

    def grads(function):
        tensors = [x.detach().clone().requires_grad_() for x in (q, k, v, k2, v2)]
        function([Part(*tensors[:3], True), Part(tensors[0], *tensors[3:], False)]).sum().backward()
        return [x.grad for x in tensors]

    torch.testing.assert_close(grads(merged), grads(plain))


def test_no_graph_is_kept_where_none_is_asked_for():
    parts = draw(4, (4,), (True,))
    assert not merged(parts).requires_grad
    parts[0].q.requires_grad_()
    with torch.no_grad():
        assert not merged(parts).requires_grad


def test_second_derivatives_are_refused():
    parts = [Part(*(x.requires_grad_() for x in part[:3]), part.causal) for part in draw(4, (4,), (True,))]
    (first,) = torch.autograd.grad(merged(parts).square().sum(), parts[0].q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_memory_of_a_backward_is_linear():
    """A matrix of queries x keys would be 4 GB here."""
    tokens = 32768
    q, k, v = (torch.randn(1, tokens, 1, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        merged([Part(q[:, -256:], k, v, True)]).sum().backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 64 << 20


@pytest.mark.parametrize("function", [merged, lambda parts: sdpa(*parts[0][:3], causal=True, scale=SCALE)])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_different_dtypes_are_refused(function, at):
    (part,) = draw(4, (4,), (True,))
    three = [x.float() if i == at else x.bfloat16() for i, x in enumerate(part[:3])]
    with pytest.raises(InvalidType, match="cast them first"):
        function([Part(*three, True)])


def test_parts_that_do_not_belong_together_are_refused():
    first, second = draw(4, (4,), (True,))[0], draw(5, (4,), (True,))[0]
    with pytest.raises(InvalidValue, match="queries are alike"):
        merged([first, second])
    with pytest.raises(InvalidValue, match="no parts"):
        merged([])


def test_reference_backward_in_slices_is_the_same(monkeypatch):
    (q, k, v, _) = draw(17, (23,), (True,))[0]
    out, lse = sdpa(q, k, v, causal=True, scale=SCALE)
    arguments = (torch.randn_like(q), q, k, v, out, lse)
    whole = reference_backward(*arguments, causal=True, scale=SCALE)
    monkeypatch.setattr(importlib.import_module("qwen_longctx.ops.reference"), "_LOGITS_AT_A_TIME", 400)
    torch.testing.assert_close(reference_backward(*arguments, causal=True, scale=SCALE), whole)
