"""Products in 8 bits (float8 e4m3): rows are scaled to its range one by one, and SwiGLU writes them so at once."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from qwen_longctx.ops import triton_runtime
from qwen_longctx.ops.device import older_than, uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # `torch._scaled_mm` takes matrices whose rows and columns are a multiple of it
NEEDED = (8, 9)  # compute capability
_LARGEST = 448.0  # of e4m3
LEAST_SCALE = 1e-30  # a row of zeros is divided by it, and by no denormal, which GPUs take as zero
_WIDTH = 4096  # numbers of a row that a kernel works on at a time
_PARTS = 8  # of so many, at most, that stay in registers
_OF_A_THREAD = 8  # numbers of a part


class Rows(NamedTuple):
    """Rows in 8 bits: ``values * scales`` are the numbers.

    Attributes
    ----------
    values : torch.Tensor
        Shape (..., width), e4m3.
    scales : torch.Tensor
        Shape (..., 1), float32.
    """

    values: torch.Tensor
    scales: torch.Tensor


@lru_cache
def why_not(device: torch.device) -> str:
    """Why products in 8 bits do not run on a device; empty if they do. The first call on a CUDA device tries one."""
    if missing := older_than(device, NEEDED):
        return missing
    if not triton_runtime.AVAILABLE:
        return "needs Triton"
    try:
        tried = cast_rows(torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device))
        product(tried, tried, torch.zeros(MULTIPLE, dtype=torch.bfloat16, device=device)).sum().item()
    except RuntimeError as error:  # such as builds of torch that have it for other devices only
        return f"torch {torch.__version__} cannot: {str(error).splitlines()[0]:.200}"
    return ""


def product(x: Rows, weight: Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``, accumulated as ``use_fast_accum`` does where it runs in 8 bits, in float32 elsewhere.

    Parameters
    ----------
    x : Rows
        Shape (..., inputs).
    weight : Rows
        Shape (outputs, inputs); both must be a multiple of 16 on a CUDA device.
    bias : torch.Tensor, optional
        Shape (outputs,), bf16.

    Returns
    -------
    torch.Tensor
        Shape (..., outputs), bf16. A row of `x` that holds what is not finite gives NaN throughout.
    """
    shape = (*x.values.shape[:-1], weight.values.shape[0])
    if not x.values.is_cuda:
        exact = (x.values.float() * x.scales) @ (weight.values.float() * weight.scales).T
        return (exact if bias is None else exact + bias.float()).to(torch.bfloat16)
    rows = x.values.reshape(-1, x.values.shape[-1])
    if not len(rows):
        return x.scales.new_empty(shape, dtype=torch.bfloat16)
    out = torch._scaled_mm(
        rows,
        weight.values.t(),
        scale_a=x.scales.reshape(-1, 1),
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(shape)


def cast_rows(x: torch.Tensor) -> Rows:
    """The rows of `x`, each divided by its largest magnitude over 448 and rounded to e4m3.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., width), any float dtype. A row that holds an infinity or NaN becomes NaN at those places at least.
    """
    return cast_rows_triton(x) if uses_triton(x) else _cast_rows(x.float())


def silu_mul_rows(gate: torch.Tensor, up: torch.Tensor) -> Rows:
    """`cast_rows` of ``silu(gate) * up``, tensors of one shape and dtype, in one pass over memory.

    The product is rounded to their dtype before it is scaled, as SwiGLU on its own rounds it.
    """
    if uses_triton(gate, up):
        return silu_mul_rows_triton(gate, up)
    return _cast_rows((torch.nn.functional.silu(gate.float()).to(gate.dtype) * up).float())


def _cast_rows(x: torch.Tensor) -> Rows:
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scales = (largest / _LARGEST).clamp_min(LEAST_SCALE)
    return Rows((x / scales).to(E4M3), scales)


@on_its_device
def cast_rows_triton(x: torch.Tensor) -> Rows:
    """See `cast_rows`."""
    return _launch(x.reshape(-1, x.shape[-1]), None, x.shape)


@on_its_device
def silu_mul_rows_triton(gate: torch.Tensor, up: torch.Tensor) -> Rows:
    """See `silu_mul_rows`."""
    width = gate.shape[-1]
    return _launch(gate.reshape(-1, width), up.reshape(-1, width), gate.shape)


def _launch(x: torch.Tensor, up: torch.Tensor | None, shape: torch.Size) -> Rows:
    rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if up is not None and up.stride(1) != 1:
        up = up.contiguous()
    values = torch.empty(shape, dtype=E4M3, device=x.device)
    scales = torch.empty((*shape[:-1], 1), dtype=torch.float32, device=x.device)
    if rows and width:
        wide = min(_WIDTH, triton.next_power_of_2(width))
        parts = triton.cdiv(width, wide)
        _rows[(rows,)](
            x,
            x if up is None else up,
            values,
            scales,
            x.stride(0),
            x.stride(0) if up is None else up.stride(0),
            width,
            GATED=up is not None,
            LEAST=LEAST_SCALE,
            WIDTH=wide,
            PARTS=parts if parts <= _PARTS else 0,
            num_warps=max(1, wide // (32 * _OF_A_THREAD)),
        )
    return Rows(values, scales)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    x, up, values, scales, x_row, up_row, width,
    GATED: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # PARTS parts of a row stay in registers; 0 reads a row of any length twice, from the cache the second time
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    up += row * up_row
    values += row * width
    column = tl.arange(0, WIDTH)
    if PARTS == 0:
        most = tl.zeros([WIDTH], tl.float32)
        for start in range(0, width, WIDTH):
            most = tl.maximum(most, tl.abs(_numbers(x, up, start + column, width, GATED)))
    else:
        n0 = _numbers(x, up, column, width, GATED)
        most = tl.abs(n0)
        if PARTS > 1:
            n1 = _numbers(x, up, column + WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n1))
        if PARTS > 2:
            n2 = _numbers(x, up, column + 2 * WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n2))
        if PARTS > 3:
            n3 = _numbers(x, up, column + 3 * WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n3))
        if PARTS > 4:
            n4 = _numbers(x, up, column + 4 * WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n4))
        if PARTS > 5:
            n5 = _numbers(x, up, column + 5 * WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n5))
        if PARTS > 6:
            n6 = _numbers(x, up, column + 6 * WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n6))
        if PARTS > 7:
            n7 = _numbers(x, up, column + 7 * WIDTH, width, GATED)
            most = tl.maximum(most, tl.abs(n7))
    scale = tl.maximum(tl.max(most, 0) / 448.0, LEAST)
    tl.store(scales + row, scale)
    if PARTS == 0:
        for start in range(0, width, WIDTH):
            spot = start + column
            _put(values, _numbers(x, up, spot, width, GATED), scale, spot, width)
    else:
        _put(values, n0, scale, column, width)
        if PARTS > 1:
            _put(values, n1, scale, column + WIDTH, width)
        if PARTS > 2:
            _put(values, n2, scale, column + 2 * WIDTH, width)
        if PARTS > 3:
            _put(values, n3, scale, column + 3 * WIDTH, width)
        if PARTS > 4:
            _put(values, n4, scale, column + 4 * WIDTH, width)
        if PARTS > 5:
            _put(values, n5, scale, column + 5 * WIDTH, width)
        if PARTS > 6:
            _put(values, n6, scale, column + 6 * WIDTH, width)
        if PARTS > 7:
            _put(values, n7, scale, column + 7 * WIDTH, width)


@triton.jit
def _put(values, number, scale, spot, width):  # type: ignore[no-untyped-def]
    tl.store(values + spot, (number / scale).to(values.dtype.element_ty), mask=spot < width)


@triton.jit
def _numbers(x, up, spot, width, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.load(x + spot, mask=spot < width, other=0.0).to(tl.float32)
    if GATED:
        number = (number * tl.sigmoid(number)).to(x.dtype.element_ty).to(tl.float32)
        number = number * tl.load(up + spot, mask=spot < width, other=0.0).to(tl.float32)
        number = number.to(x.dtype.element_ty).to(tl.float32)
    return number
