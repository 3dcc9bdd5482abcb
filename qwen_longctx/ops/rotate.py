"""Rotary position embedding from a table."""

from __future__ import annotations

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

_FUSED_TOKENS = 256  # for fewer, as in decode, a Triton launch costs more than the passes saved
_ROTATED_ROWS = 32


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` by halves (the NeoX layout that Qwen uses).

    Parameters
    ----------
    x : torch.Tensor
        Shape (batch, tokens, heads, head_dim), any float dtype.
    cos, sin : torch.Tensor
        Shape (1 or batch, 1 or tokens, 1, head_dim), of the dtype of `x`; the first half of `sin` is negated.

    Returns
    -------
    torch.Tensor
        Like `x`: ``x * cos + roll(x, head_dim / 2) * sin``.
    """
    if x.shape[1] >= _FUSED_TOKENS and uses_triton(x):
        return rotate_triton(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@on_its_device
def rotate_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `rotate`."""
    batch, tokens, heads, head_dim = x.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    table = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1) if cos.shape[1] > 1 else 0)
    _rotate[(triton.cdiv(tokens, _ROTATED_ROWS), batch * heads)](
        x,
        cos,
        sin,
        out,
        *x.stride()[:3],
        *out.stride()[:3],
        *table,
        tokens,
        heads,
        HALF=head_dim // 2,
        DIM=triton.next_power_of_2(head_dim // 2),
        ROWS=_ROTATED_ROWS,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=("tokens", "heads"))
def _rotate(  # type: ignore[no-untyped-def]
    x, cos, sin, out,
    x_batch, x_token, x_head, o_batch, o_token, o_head, t_batch, t_token,
    tokens, heads,
    HALF: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(1).to(tl.int64)
    batch, head = owner // heads, owner % heads
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    inside = (row < tokens) & (dim < HALF)
    spot = x + batch * x_batch + row * x_token + head * x_head + dim
    first = tl.load(spot, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(spot + HALF, mask=inside, other=0.0).to(tl.float32)
    at = batch * t_batch + row * t_token + dim
    # both halves of the cosines are alike, and the first half of the sines is that of the second, negated
    c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at + HALF, mask=inside, other=0.0).to(tl.float32)
    spot = out + batch * o_batch + row * o_token + head * o_head + dim
    tl.store(spot, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(spot + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
