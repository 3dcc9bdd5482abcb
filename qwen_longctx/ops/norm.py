"""RMSNorm and SwiGLU in one pass over memory: with the residual that comes before, and with the cast to 8 bits after.

All round where the stock layers round: a sum to the working dtype, the normalised numbers to it, and their product with
the weight.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx.ops import fp8
from qwen_longctx.ops.device import cast, uses_triton
from qwen_longctx.ops.fp8 import Rows
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

_FEWEST = 1 << 20  # numbers; for fewer, as in decode, the launch costs more than the passes saved
_NUMBERS = 4096  # of a program of norms, whose rows may be short, as those of heads are
_GATED = 2048  # numbers of a program of SwiGLU
_OF_A_THREAD = 16


def pays(x: torch.Tensor) -> bool:
    """Whether the Triton kernels run for an activation like `x`, and are worth it."""
    return x.numel() >= _FEWEST and uses_triton(x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x²) + epsilon)`` over the last dimension, normalised in float32 and rounded as in Qwen2.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., hidden).
    weight : torch.Tensor
        Shape (hidden,), of the dtype of `x`.
    epsilon : float
    """
    if uses_triton(x, weight):
        return rms_norm_triton(x, None, weight, epsilon)[1]
    return short_rms_norm(x, weight, epsilon)


def rms_norm_rows(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Rows:
    """`fp8.cast_rows` of `rms_norm`."""
    if uses_triton(x, weight):
        return rms_norm_triton(x, None, weight, epsilon, to_8_bits=True)[1]
    return fp8.cast_rows(short_rms_norm(x, weight, epsilon))


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + y`` and `rms_norm` of it; `x` and `y` of one shape and dtype."""
    if uses_triton(x, y, weight):
        return rms_norm_triton(x, y, weight, epsilon)
    return (total := x + y), short_rms_norm(total, weight, epsilon)


def add_rms_norm_rows(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, Rows]:
    """``x + y`` and `rms_norm_rows` of it; `x` and `y` of one shape and dtype."""
    if uses_triton(x, y, weight):
        return rms_norm_triton(x, y, weight, epsilon, to_8_bits=True)
    return (total := x + y), fp8.cast_rows(short_rms_norm(total, weight, epsilon))


def short_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`rms_norm` by PyTorch's kernel and a product, on any device and for a weight of any dtype.

    Where the Triton kernel does not pay, as in decode: fewer launches than the stock norm, rounded alike.
    """
    normed = torch.rms_norm(x, x.shape[-1:], None, epsilon)
    return weight * cast(normed, x.dtype)  # autocast leaves float32


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, tensors of one shape and dtype; silu is rounded to it before the product."""
    return silu_mul_triton(gate, up) if uses_triton(gate, up) else torch.nn.functional.silu(gate) * up


@on_its_device
def rms_norm_triton(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, epsilon: float, *, to_8_bits: bool = False
) -> tuple[Any, Any]:
    """See `add_rms_norm` and `add_rms_norm_rows`; without `y` the sum is `x` itself."""
    width = x.shape[-1]
    x = x.contiguous()
    y = None if y is None else y.contiguous()
    total = x if y is None else torch.empty_like(x)
    values = torch.empty(x.shape, dtype=fp8.E4M3 if to_8_bits else x.dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if to_8_bits else None
    rows = x.numel() // max(1, width)
    wide = triton.next_power_of_2(max(1, width))
    at_a_time = max(1, _NUMBERS // wide)
    if x.numel():
        _norm[(triton.cdiv(rows, at_a_time),)](
            x,
            x if y is None else y,
            weight,
            total,
            values,
            values if scales is None else scales,
            rows,
            width,
            epsilon,
            ADDED=y is not None,
            CAST=to_8_bits,
            LEAST=fp8.LEAST_SCALE,
            ROWS=at_a_time,
            WIDTH=wide,
            num_warps=min(32, max(4, at_a_time * wide // (32 * _OF_A_THREAD))),
        )
    return total, values if scales is None else Rows(values, scales)


@on_its_device
def silu_mul_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    numbers = gate.numel()
    if numbers:
        _silu_mul[(triton.cdiv(numbers, _GATED),)](gate, up, out, numbers, WIDTH=_GATED, num_warps=8)
    return out


@triton.jit(do_not_specialize=("rows", "epsilon"))
def _norm(  # type: ignore[no-untyped-def]
    x, y, weight, total, values, scales, rows, width, epsilon,
    ADDED: tl.constexpr, CAST: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    number = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        number += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        rounded = number.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        number = rounded.to(tl.float32)
    normed = number * tl.rsqrt(tl.sum(number * number, 1) / width + epsilon)[:, None]
    normed = normed.to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = (normed * factor[None, :]).to(x.dtype.element_ty)
    if CAST:
        exact = result.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(exact), 1) / 448.0, LEAST)
        tl.store(scales + row, scale, mask=row < rows)
        tl.store(values + at, (exact / scale[:, None]).to(values.dtype.element_ty), mask=inside)
    else:
        tl.store(values + at, result, mask=inside)


@triton.jit  # `numbers` is a multiple of 16 at every length, and loads of several at once need to know it
def _silu_mul(gate, up, out, numbers, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < numbers
    number = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    number = (number * tl.sigmoid(number)).to(gate.dtype.element_ty).to(tl.float32)
    number = number * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, number.to(out.dtype.element_ty), mask=inside)
