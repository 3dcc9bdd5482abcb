"""Linear layers of a few rows, as decoding has them: every weight is read once, at the speed of memory.

Products of so few rows are bound by reading weights, and a decoded token launches hundreds of them. So layers that take
the same rows share a launch, and SwiGLU is part of the launch of its two layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx.ops import fp8
from qwen_longctx.ops.device import HALF, capability, uses_triton
from qwen_longctx.ops.fp8 import Rows
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

MOST_ROWS = 16  # the fewest that the matrix units take
_WARPS, _STAGES = 2, 4
_MANY_OUTPUTS = 1 << 14
_CAPABILITY = (8, 0)  # older devices lack asynchronous copies


class Weight(NamedTuple):
    """What a linear layer holds.

    Attributes
    ----------
    values : torch.Tensor
        Shape (outputs, inputs), contiguous, of the dtype of the rows, or e4m3.
    bias : torch.Tensor, optional
        Shape (outputs,), of the dtype of the rows.
    scales : torch.Tensor, optional
        Shape (outputs, 1), float32: of a weight in e4m3.
    """

    values: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None = None


def pays(x: torch.Tensor | Rows) -> bool:
    """Whether this is faster than a product for each layer: for up to 16 rows, `x` of shape (..., inputs)."""
    numbers = x.values if isinstance(x, Rows) else x
    if not 0 < numbers.numel() <= MOST_ROWS * numbers.shape[-1] or numbers.dtype not in (*HALF, fp8.E4M3):
        return False
    return uses_triton(numbers) and capability(numbers.device) >= _CAPABILITY


def linear(x: torch.Tensor | Rows, *weights: Weight) -> list[torch.Tensor]:
    """``x @ values.T + bias`` for up to three layers, summed in float32; for weights in e4m3 rows are cast to it too.

    Parameters
    ----------
    x : torch.Tensor or Rows
        Shape (..., inputs), on a CUDA device fp16, bf16, or `Rows` of bf16 for weights in e4m3; of at most 16 rows.
    weights : Weight
        All in e4m3 or none, and all with a bias or none.

    Returns
    -------
    list of torch.Tensor
        Shapes (..., outputs), of the dtype of `x`, bf16 for `Rows`.
    """
    if uses_triton(x.values if isinstance(x, Rows) else x):
        return linear_triton(x, *weights)
    return [_linear(x, *one) for one in weights]


def _linear(
    x: torch.Tensor | Rows, values: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None
) -> torch.Tensor:
    if scales is None:
        assert isinstance(x, torch.Tensor)
        return torch.nn.functional.linear(x, values, bias)
    if isinstance(x, Rows):
        return fp8.product(x, Rows(values, scales), bias)
    return fp8.product(fp8.cast_rows(x), Rows(values, scales), bias).to(x.dtype)


def silu_mul(x: torch.Tensor | Rows, gate: Weight, up: Weight) -> torch.Tensor:
    """``silu(gate(x)) * up(x)``, rounded after each of its steps; see `linear`."""
    if uses_triton(x.values if isinstance(x, Rows) else x):
        return silu_mul_triton(x, gate, up)
    first, second = linear(x, gate, up)
    return torch.nn.functional.silu(first) * second


@on_its_device
def linear_triton(x: torch.Tensor | Rows, *weights: Weight) -> list[torch.Tensor]:
    """See `linear`. One launch, and one for a cast."""
    outs = [_empty(x, len(one.values)) for one in weights]
    _launch(x, list(weights), outs, gated=False)
    return outs


@on_its_device
def silu_mul_triton(x: torch.Tensor | Rows, gate: Weight, up: Weight) -> torch.Tensor:
    """See `silu_mul`. One launch, and one for a cast."""
    out = _empty(x, len(gate.values))
    _launch(x, [gate, up], [out], gated=True)
    return out


def _empty(x: torch.Tensor | Rows, outputs: int) -> torch.Tensor:
    if isinstance(x, Rows):
        return x.scales.new_empty((*x.scales.shape[:-1], outputs), dtype=torch.bfloat16)
    return x.new_empty((*x.shape[:-1], outputs))


def _launch(x: torch.Tensor | Rows, weights: list[Weight], outs: list[torch.Tensor], *, gated: bool) -> None:
    if isinstance(x, torch.Tensor):
        x = x.contiguous() if weights[0].scales is None else fp8.cast_rows_triton(x)
    rows, scales = (x.values, x.scales) if isinstance(x, Rows) else (x, None)
    inputs = rows.shape[-1]
    counts = [len(one.values) for one in weights]
    outputs, depth = _tile(sum(counts), weights[0].values.dtype)
    tiles = [triton.cdiv(count, outputs) for count in counts]
    spare = 3 - len(weights)  # that no program works on
    weights, outs = weights + weights[:1] * spare, outs + outs[:1] * (3 - len(outs))
    _thin[(tiles[0] if gated else sum(tiles),)](
        rows,
        scales,
        *(one.values for one in weights),
        *(one.scales for one in weights),
        *(one.bias for one in weights),
        *outs,
        *counts,
        *[0] * spare,
        tiles[0],
        sum(tiles[:2]),
        rows.numel() // inputs,
        inputs,
        GATED=gated,
        OUTPUTS=outputs,
        DEPTH=depth,
        ROWS=MOST_ROWS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


def _tile(outputs: int, dtype: torch.dtype) -> tuple[int, int]:
    """Outputs of a program and inputs at a time: programs are small, so that they share the device evenly."""
    if dtype.itemsize > 1:
        return 16, 256
    return (32, 256) if outputs >= _MANY_OUTPUTS else (16, 512)


@triton.jit(do_not_specialize=("n0", "n1", "n2", "first", "second", "rows"))
def _thin(  # type: ignore[no-untyped-def]
    x, scales, w0, w1, w2, s0, s1, s2, b0, b1, b2, o0, o1, o2, n0, n1, n2, first, second, rows, inputs,
    GATED: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # `first` and `second` are the tiles of outputs of one layer, and of two
    tile = tl.program_id(0)
    w, s, b, o, n = w0, s0, b0, o0, n0
    if not GATED:
        number = (tile >= first).to(tl.int32) + (tile >= second).to(tl.int32)  # of the layer
        if s0 is not None:
            s = _one_of(number, s0, s1, s2)
        if b0 is not None:
            b = _one_of(number, b0, b1, b2)
        w, o = _one_of(number, w0, w1, w2), _one_of(number, o0, o1, o2)
        n = tl.where(number == 0, n0, tl.where(number == 1, n1, n2))
        tile -= tl.where(number == 0, 0, tl.where(number == 1, first, second))
    row = tl.arange(0, ROWS)
    at = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    result = tl.zeros((OUTPUTS, ROWS), tl.float32)
    other = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(0, inputs, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        wanted = (row < rows)[None, :] & (depth < inputs)[:, None]
        some = tl.load(x + row[None, :] * inputs + depth[:, None], mask=wanted, other=0.0)
        spot = at[:, None].to(tl.int64) * inputs + depth[None, :]
        wanted = (at < n)[:, None] & (depth < inputs)[None, :]
        result = tl.dot(tl.load(w + spot, mask=wanted, other=0.0), some, result, input_precision="ieee")
        if GATED:
            other = tl.dot(tl.load(w1 + spot, mask=wanted, other=0.0), some, other, input_precision="ieee")
    if scales is not None:
        scale = tl.load(scales + row, mask=row < rows, other=0.0)[None, :]
        result *= scale * tl.load(s + at, mask=at < n, other=0.0)[:, None]
        if GATED:
            other *= scale * tl.load(s1 + at, mask=at < n, other=0.0)[:, None]
    result = _rounded(result, b, at, n, o.dtype.element_ty)
    if GATED:
        gate = result.to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(o.dtype.element_ty).to(tl.float32)
        other = _rounded(other, b1, at, n, o.dtype.element_ty).to(tl.float32)
        result = (gate * other).to(o.dtype.element_ty)
    tl.store(o + row[None, :].to(tl.int64) * n + at[:, None], result, mask=(at < n)[:, None] & (row < rows)[None, :])


@triton.jit
def _one_of(number, first, second, third):  # type: ignore[no-untyped-def]
    if number == 1:
        first = second
    elif number == 2:
        first = third
    return first


@triton.jit
def _rounded(result, bias, at, n, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if bias is not None:
        result += tl.load(bias + at, mask=at < n, other=0.0).to(tl.float32)[:, None]
    return result.to(dtype)
