"""Keys or values in 8 bits as the numbers that they stand for, written in one pass over memory."""

from __future__ import annotations

import torch

from qwen_longctx.ops.decode import _numbers, _unit
from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.eight_bit import AT_A_TIME, EightBit
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

_PAIRS = 2048  # of numbers that the kernel works on at once: those that are turned together


def read_out(x: EightBit, out: torch.Tensor) -> None:
    """Write what `x` stands for.

    Parameters
    ----------
    x : EightBit
        Of any rows and tokens of larger buffers; those of one row lie one after another.
    out : torch.Tensor
        Shape of `x`, any float dtype; ``out[row]`` is contiguous.
    """
    if uses_triton(out) and out.numel():
        read_out_triton(x, out)
        return
    for at in range(0, x.shape[1], AT_A_TIME):
        part = slice(at, at + AT_A_TIME)
        out[:, part] = x.part(part).numbers()


@on_its_device
def read_out_triton(x: EightBit, out: torch.Tensor) -> None:
    """See `read_out`. Rounds once; sums of the bias differ from PyTorch's by rounding errors of float32."""
    batch, tokens, heads, head_dim = x.shape
    dim = triton.next_power_of_2(head_dim // 2)
    rows = max(1, _PAIRS // dim)
    bias = x.bias if x.spots is not None else None
    _read_out[(triton.cdiv(tokens, rows), batch)](
        x.codes,
        x.scales,
        out,
        None if bias is None else x.spots,
        None if bias is None else bias.vector.contiguous(),
        None if bias is None else bias.turns.contiguous(),
        x.codes.stride(0),
        x.scales.stride(0),
        out.stride(0),
        0 if x.spots is None else x.spots.stride(0),
        1.0 if bias is None else bias.scaling,
        tokens,
        heads,
        HALF=head_dim // 2,
        DIM=dim,
        ROWS=rows,
        num_warps=4,
    )


@triton.jit(do_not_specialize=("s_row", "p_row", "scaling", "tokens", "heads"))
def _read_out(  # type: ignore[no-untyped-def]
    codes, scales, out, spots, bias, frequencies, c_row, s_row, o_row, p_row, scaling, tokens, heads,
    HALF: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    near = token < tokens
    dim = tl.arange(0, DIM)
    real = dim < HALF
    inside = near[:, None] & real[None, :]
    if bias is not None:  # turned alike in all heads
        spot = tl.load(spots + row * p_row + token, mask=near, other=0)
        turns = tl.load(frequencies + dim, mask=real, other=0.0)
        angle = turns[None, :] * spot[:, None]  # in turns, of which the whole ones are dropped while they are exact
        c, s = _circle((angle - tl.floor(angle + 0.5)).to(tl.float32))
        c, s = c * scaling, s * scaling
    scales += row * s_row + token * heads
    place = token[:, None] * (heads * (2 * HALF)) + dim[None, :]
    codes += row * c_row
    out += row * o_row
    for head in range(heads):
        scale = (tl.load(scales + head, mask=near, other=0.0) * _unit(codes))[:, None]
        first = _numbers(tl.load(codes + place, mask=inside, other=0), tl.float32) * scale
        second = _numbers(tl.load(codes + place + HALF, mask=inside, other=0), tl.float32) * scale
        if bias is not None:
            at = bias + head * (2 * HALF) + dim
            x = tl.load(at, mask=real, other=0.0)[None, :]
            y = tl.load(at + HALF, mask=real, other=0.0)[None, :]
            first += x * c - y * s
            second += y * c + x * s
        tl.store(out + place, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + HALF, second.to(out.dtype.element_ty), mask=inside)
        place += 2 * HALF


@triton.jit
def _circle(turn):  # type: ignore[no-untyped-def]
    """Cosine and sine of up to half a turn, within 7e-7: the power series of half the angle, doubled.

    Those of the library bring a branch for large angles along, and with it more instructions than a processor keeps.
    """
    x = turn * 3.141592653589793
    y = x * x
    s = 1 / 362880 + y * (-1 / 39916800 + y * (1 / 6227020800))
    s = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * s))))
    c = 1 / 40320 + y * (-1 / 3628800 + y * (1 / 479001600))
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * c)))
    return 1 - 2 * s * s, 2 * s * c
