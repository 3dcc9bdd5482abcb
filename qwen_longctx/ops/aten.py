"""PyTorch's fused attention, forward and backward: FlashAttention, cuDNN, efficient attention, the CPU's flash kernel.

A forward is ``run(q, k, v, *, causal, scale) -> (out, lse)``, a backward
``run(grad, q, k, v, out, lse, *, causal, scale) -> (dq, dk, dv)``. There, `out` and `lse` may be those of a softmax
over more keys than `k` holds, and the gradients are exact for the share of these keys. Shapes are as in `ops`, with the
numbers of a head side by side. The fused kernels disagree on how a causal mask is aligned when queries and keys differ
in number, so that ``causal=True`` is for as many keys as queries only: `engines.pieces` cuts every other call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from qwen_longctx.ops.device import HALF, older_than

# cuDNN builds a plan for each new shape, which pays for long spans only; decode would build one per token
_CUDNN_MIN_QUERIES = 256
_LSE_ALIGNMENT = 32  # the backward of efficient attention reads the log-sum-exp in blocks of this many queries
_aten = torch.ops.aten

Result = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def why_not_cpu(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why the CPU's flash kernel cannot take such a call; empty if it can. Arguments as in `engines.Engine`."""
    if device.type != "cpu":
        return "runs on CPUs"
    return "" if dtype in (*HALF, torch.float32, torch.float64) else f"takes no {dtype}"


def why_not_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why cuDNN's kernel cannot take such a call or does not pay; empty if it does."""
    if size < _CUDNN_MIN_QUERIES:
        return f"plans anew for each length, which pays from {_CUDNN_MIN_QUERIES} queries on, not for {size}"
    if dtype not in HALF:
        return f"takes half precision only, not {dtype}"
    if head_dim not in (64, 128):
        return f"is used at head dim 64 and 128 only, not {head_dim}"
    if lack := older_than(device, (9, 0)):
        return lack
    return "" if torch.backends.cudnn.is_available() else "needs cuDNN"


def why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why PyTorch's FlashAttention cannot take such a call; empty if it can."""
    if lack := older_than(device, (8, 0)):
        return lack
    if dtype not in HALF:
        return f"takes half precision only, not {dtype}"
    return f"takes head dims up to 256 in steps of 8, not {head_dim}" if head_dim % 8 or head_dim > 256 else ""


def why_not_efficient(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why PyTorch's efficient attention cannot take such a call; empty if it can."""
    if dtype not in (*HALF, torch.float32):
        return f"takes no {dtype}"
    # there is no bfloat16 on devices older than 8.0, and the kernels are built for none older than 5.0
    if lack := older_than(device, (8, 0) if dtype == torch.bfloat16 else (5, 0)):
        return lack
    return f"takes head dims in steps of 4, not {head_dim}" if head_dim % 4 else ""


def roomless(x: torch.Tensor) -> torch.Tensor:
    """`x`, where it is one row with strides that tell nothing of the room of the cache it is a view of.

    cuDNN plans for strides, also that of a single row, which nothing reads: caches of other room would plan anew.
    """
    return x[0][None] if x.shape[0] == 1 else x


def _fold(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Queries of a group of heads side by side: (batch, queries, heads, …) to (batch, queries * group, kv_heads, …)."""
    return x.unflatten(2, (kv_heads, -1)).transpose(2, 3).flatten(1, 2)


def _unfold(x: torch.Tensor, group: int) -> torch.Tensor:
    return x.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)


def _grouped_forward(run: Callable[..., Result]) -> Callable[..., Result]:
    """Grouped queries for a kernel that wants as many key heads as query heads.

    The CPU's kernel is one before torch 2.7, and says nothing. Without a mask the heads of a group count as more
    queries of one head; under a causal mask there is one call for each member of the groups. Keys are never repeated.
    """

    @functools.wraps(run)
    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> Result:
        group = q.shape[2] // k.shape[2]
        if group == 1:
            return run(q, k, v, causal=causal, scale=scale)
        if not causal:
            out, lse = run(_fold(q, k.shape[2]), k, v, causal=False, scale=scale)
            return _unfold(out, group), _unfold(lse.transpose(1, 2), group).transpose(1, 2)
        results = [run(q[:, :, member::group], k, v, causal=True, scale=scale) for member in range(group)]
        outs, lses = zip(*results, strict=True)
        return torch.stack(outs, dim=3).flatten(2, 3), torch.stack(lses, dim=2).flatten(1, 2)

    return grouped


def _grouped_backward(run: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The same for a backward; the gradients of keys and values are summed over the group."""

    @functools.wraps(run)
    def grouped(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> Gradients:
        group = q.shape[2] // k.shape[2]
        if group == 1:
            return run(grad, q, k, v, out, lse, causal=causal, scale=scale)
        if not causal:
            grad, q, out, lse = (_fold(x, k.shape[2]) for x in (grad, q, out, lse.transpose(1, 2)))
            dq, dk, dv = run(grad, q, k, v, out, lse.transpose(1, 2), causal=False, scale=scale)
            return _unfold(dq, group), dk, dv
        exact = torch.promote_types(k.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
        for member in range(group):
            heads = slice(member, None, group)
            dq[:, :, heads], dk_member, dv_member = run(
                grad[:, :, heads], q[:, :, heads], k, v, out[:, :, heads], lse[:, heads], causal=True, scale=scale
            )
            dk += dk_member
            dv += dv_member
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    return grouped


@_grouped_forward
def cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> Result:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> Result:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> Result:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *(roomless(x).transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.view(lse.shape[:3])


@_grouped_forward
def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> Result:
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse[..., : q.shape[1]]


@_grouped_backward
def cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> Gradients:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in gradients)


def flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> Gradients:
    """Takes grouped queries as they are; also where cuDNN ran forward, whose own backward plans for each shape."""
    queries, keys, nothing = q.shape[1], k.shape[1], _no_dropout(q)
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    gradients = _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, queries, keys, 0.0, causal, nothing, nothing, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in gradients)


@_grouped_backward
def efficient_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> Gradients:
    lse = functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=torch.inf)
    wanted, nothing = [True, True, True, False], _no_dropout(q)
    # the kernel takes `out` as contiguous in this order of dimensions whatever its strides say
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    gradients = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse.contiguous(), nothing, nothing, 0.0, wanted, causal, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in gradients[:3])


def _no_dropout(x: torch.Tensor) -> torch.Tensor:
    """In place of the random state of a dropout that is 0."""
    return torch.zeros((), dtype=torch.int64, device=x.device)
