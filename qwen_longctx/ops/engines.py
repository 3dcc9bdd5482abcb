"""PyTorch's fused attention, forward and backward: FlashAttention, cuDNN, efficient attention, the CPU's flash kernel.

Forwards are ``run(q, k, v, causal, scale) -> (out, lse)``. Backwards are
``run(grad, q, k, v, out, lse, causal, scale) -> (dq, dk, dv)``; `out` and `lse` may be those of a softmax over more keys
than `k` holds, and the gradients are then exact for the share of these keys. Shapes are as in `ops`. A causal mask is
given for as many keys as queries only: `pieces` cuts every other call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional

from qwen_longctx.errors import InvalidType
from qwen_longctx.ops.device import capability
from qwen_longctx.ops.reference import reference, reference_backward

# cuDNN builds a plan for each new shape, which pays for long spans only; decode would build one per token
_CUDNN_MIN_QUERIES = 256
_HALF = (torch.float16, torch.bfloat16)
_LSE_ALIGNMENT = 32  # the backward of efficient attention reads the log-sum-exp in blocks of this many queries
_aten = torch.ops.aten

Result = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Piece(NamedTuple):
    """A part of one call that the fused kernels agree on: the queries from `start` to the last, and some keys."""

    start: int
    keys: slice
    causal: bool


def pieces(queries: int, keys: int, causal: bool) -> list[Piece]:
    """Cut a call into pieces; a query that attends to no key is in none of them.

    The fused kernels disagree on how a causal mask is aligned when queries and keys differ in number. Here the last
    query attends to every key, so that such a call is a causal square and the keys before it, which need no mask.
    """
    if queries == 0 or keys == 0:
        return []
    if not causal or queries == 1:
        return [Piece(0, slice(0, keys), False)]
    past = keys - queries
    square = Piece(max(0, -past), slice(max(0, past), keys), True)
    return [square, Piece(0, slice(0, past), False)] if past > 0 else [square]


def engine(q: torch.Tensor) -> str:
    """Which fused kernel takes queries like `q`, of shape (batch, queries, heads, head_dim)."""
    if q.device.type == "cpu" and q.dtype in (*_HALF, torch.float32, torch.float64):
        return "cpu"
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return "reference"
    if q.dtype not in _HALF:
        return "efficient"
    if capability(q.device) < (8, 0):
        # FlashAttention needs 8.0; efficient attention takes float16 on older devices, bfloat16 does not exist there
        return "efficient" if q.dtype == torch.float16 else "reference"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return "efficient"
    if q.shape[1] >= _CUDNN_MIN_QUERIES and q.shape[-1] in (64, 128) and _has_fast_cudnn(q.device):
        return "cudnn"
    return "flash"


@lru_cache
def _has_fast_cudnn(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and capability(device) >= (9, 0)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> list[Result]:
    """Results of the pieces of one call by the fastest engine, each for all queries; there is at least one."""
    check_dtypes(q, k, v)
    name = engine(q)
    if name == "reference" or k.shape[1] == 0 or q.shape[1] == 0:
        return [reference(q, k, v, causal=causal, scale=scale)]
    run = _FORWARD[name]
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    return [
        _from_row(piece.start, run(q[:, piece.start :], k[:, piece.keys], v[:, piece.keys], piece.causal, scale))
        for piece in pieces(q.shape[1], k.shape[1], causal)
    ]


def backward(
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
    """Gradients of one call whose keys are some of those of a softmax.

    Parameters
    ----------
    grad, out : torch.Tensor
        Of the shape of `q`: the gradient of the softmax's result, and the result.
    q, k, v : torch.Tensor
        As for the forward.
    lse : torch.Tensor
        Shape (batch, heads, queries): log-sum-exp over all keys of the softmax, inf where there are none.
    causal, scale
        As for the forward.
    """
    name = engine(q)
    if name == "reference":
        return reference_backward(grad, q, k, v, out, lse, causal=causal, scale=scale)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    for start, keys, masked in pieces(q.shape[1], k.shape[1], causal):
        found = _BACKWARD[name](
            *(x[:, start:] for x in (grad, q)),
            *(x[:, keys] for x in (k, v)),
            out[:, start:],
            lse[..., start:],
            masked,
            scale,
        )
        dq[:, start:] += found[0]
        dk[:, keys], dv[:, keys] = found[1], found[2]
    return dq, dk, dv


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse tensors of different dtypes, which some fused kernels would misread."""
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidType(
            f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}: attention takes one dtype, cast them first"
        )


def roomless(x: torch.Tensor) -> torch.Tensor:
    """`x`, where it is one row with strides that tell nothing of the room of the cache it is a view of.

    cuDNN plans for strides, also that of a single row, which nothing reads: caches of other room would plan anew.
    """
    return x[0][None] if x.shape[0] == 1 else x


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with the numbers of a head side by side, as every fused kernel wants them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _from_row(start: int, result: Result) -> Result:
    """A result for the queries from `start` on as one for all queries: those before attend to no key."""
    if start == 0:
        return result
    out, lse = result
    return functional.pad(out, (0, 0, 0, 0, start, 0)), functional.pad(lse, (start, 0), value=-torch.inf)


def _cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Result:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Result:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Result:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *(roomless(x).transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.view(lse.shape[:3])


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Result:
    """This kernel wants as many query heads as key heads: one call for each member of the groups."""
    group = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for member in range(group):
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q[:, :, member::group].transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            True,
            0.0,
            causal,
            scale=scale,
        )
        outs.append(out.transpose(1, 2))
        lses.append(lse[..., : q.shape[1]])
    return torch.stack(outs, dim=3).flatten(2, 3), torch.stack(lses, dim=2).flatten(1, 2)


Backward = Callable[..., Gradients]


def _by_member(run: Backward) -> Backward:
    """A backward that knows no grouped queries, called once for each member of the groups; their dk and dv are summed.

    Of the two kernels that need it, the CPU's writes beyond the keys in torch 2.6.
    """

    def grouped(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> Gradients:
        group = q.shape[2] // k.shape[2]
        if group == 1:
            return run(grad, q, k, v, out, lse, causal, scale)
        exact = torch.promote_types(k.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
        for member in range(group):
            heads = slice(member, None, group)
            grad_m, q_m, out_m = (x[:, :, heads] for x in (grad, q, out))
            dq[:, :, heads], dk_m, dv_m = run(grad_m, q_m, k, v, out_m, lse[:, heads], causal, scale)
            dk += dk_m
            dv += dv_m
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    return grouped


def _cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in found)


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Takes grouped queries as they are; also where cuDNN ran forward, whose own backward plans for each shape."""
    queries, keys, nothing = q.shape[1], k.shape[1], _no_dropout(q)
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    found = _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, queries, keys, 0.0, causal, nothing, nothing, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in found)


def _efficient_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    lse = functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=torch.inf)
    wanted, nothing = [True, True, True, False], _no_dropout(q)
    # the kernel takes `out` as contiguous in this order of dimensions whatever its strides say
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    found = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse.contiguous(), nothing, nothing, 0.0, wanted, causal, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in found[:3])


def _no_dropout(x: torch.Tensor) -> torch.Tensor:
    """In place of the random state of a dropout that is 0."""
    return torch.zeros((), dtype=torch.int64, device=x.device)


_FORWARD = {"cpu": _cpu, "flash": _flash, "cudnn": _cudnn, "efficient": _efficient}
_BACKWARD = {
    "cpu": _by_member(_cpu_backward),
    "flash": _flash_backward,
    "cudnn": _flash_backward,
    "efficient": _by_member(_efficient_backward),
}
