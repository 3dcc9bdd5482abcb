"""Exact gradients of attention that is computed in parts.

Partial results merge by their log-sum-exp, but the fused kernels give that number no gradient, so that autograd through
kernel and merge would miss a term. Here the backward of every part gets the result and the log-sum-exp of the whole
softmax: ``exp(logits - lse)`` are then the true probabilities, and the gradients of each part are exact by themselves.
Nothing of size queries x keys exists, forward or backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qwen_longctx.errors import InvalidValue, Unsupported
from qwen_longctx.ops import engines
from qwen_longctx.ops.merge import merge


class Part(NamedTuple):
    """Some keys of a softmax, with the queries as they are rotated for them.

    Attributes
    ----------
    q : torch.Tensor
        Shape (batch, queries, heads, head_dim), any float dtype; of the same shape and dtype in all parts.
    k, v : torch.Tensor
        Shape (batch, keys, kv_heads, head_dim), of the dtype of `q`; there may be no keys.
    causal : bool
        Whether query i of n attends to the first m - n + i + 1 of m keys only.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool


def merged_attention(parts: Sequence[Part], *, scale: float) -> torch.Tensor:
    """Attention of one softmax over the keys of all parts, differentiable once in every `q`, `k` and `v`.

    Parameters
    ----------
    parts : sequence of Part
        One or more.
    scale : float
        Factor of the logits.

    Returns
    -------
    torch.Tensor
        Shape and dtype of `q`; zero where a query attends to no key.

    Raises
    ------
    InvalidValue
        There are no parts, or their queries differ in shape or dtype.
    InvalidType
        Queries, keys and values of a part differ in dtype.
    """
    return attention_with_lse(parts, scale=scale)[0]


def attention_with_lse(parts: Sequence[Part], *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`merged_attention` and its log-sum-exp, shape (batch, heads, queries), whose gradient is refused."""
    kinds = {(part.q.shape, part.q.dtype) for part in parts}
    if len(kinds) != 1:
        got = ", ".join(sorted(map(str, kinds))) or "no parts"
        raise InvalidValue(f"attention needs parts whose queries are alike in shape and dtype, got {got}")
    tensors = [x for part in parts for x in part[:3]]
    return _MergedAttention.apply(tuple(part.causal for part in parts), scale, *tensors)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, causal: tuple[bool, ...], scale: float, *tensors: torch.Tensor) -> engines.Result:
        results = []
        for masked, (q, k, v) in zip(causal, _threes(tensors), strict=True):
            results += engines.forward(q, k, v, causal=masked, scale=scale)
        out, lse = merge(results)
        ctx.causal, ctx.scale = causal, scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *tensors)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        if grad_lse is not None:
            raise Unsupported(
                "the log-sum-exp of fused attention has no gradient: give all parts of a softmax to merged_attention, "
                'or take kernel="reference"'
            )
        out, lse, *tensors = ctx.saved_tensors
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        if grad is None:
            return None, None, *gradients
        # a query without any key has the probabilities exp(-inf) = 0 for every logit
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        wanted = _threes(ctx.needs_input_grad[2:])
        for at, (masked, (q, k, v)) in enumerate(zip(ctx.causal, _threes(tensors), strict=True)):
            if any(wanted[at]):
                three = engines.backward(grad, q, k, v, out, lse, causal=masked, scale=ctx.scale)
                asked = zip(three, wanted[at], strict=True)
                gradients[3 * at : 3 * at + 3] = [x if needed else None for x, needed in asked]
        return None, None, *gradients


def _threes(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(items[at : at + 3]) for at in range(0, len(items), 3)]
