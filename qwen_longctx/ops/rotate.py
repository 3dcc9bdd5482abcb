"""Rotary position embedding from a table."""

from __future__ import annotations

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

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
    if uses_triton(x):
        return rotate_triton(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def place(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    buffers: tuple[torch.Tensor, torch.Tensor],
    slot: torch.Tensor,
) -> None:
    """`rotate` the key of one token of every row, and write it and its value where the device says.

    Parameters
    ----------
    k, v : torch.Tensor
        Shape (batch, 1, kv_heads, head_dim), any float dtype.
    cos, sin
        See `rotate`.
    buffers : tuple of torch.Tensor
        Keys and values, shape (batch, room, kv_heads, head_dim), of the dtype of `k` and `v`.
    slot : torch.Tensor
        Shape (1,), int64: a number within the room.
    """
    if uses_triton(k, v):
        place_triton(k, v, cos, sin, buffers, slot)
        return
    for buffer, new in zip(buffers, (rotate(k, cos, sin), v), strict=True):
        buffer.index_copy_(1, slot, new)


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


@on_its_device
def place_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    buffers: tuple[torch.Tensor, torch.Tensor],
    slot: torch.Tensor,
) -> None:
    """See `place`. One launch."""
    batch, _, heads, head_dim = k.shape
    keys, values = buffers
    _place[(batch * heads,)](
        k,
        v,
        cos,
        sin,
        keys,
        values,
        slot,
        k.stride(0),
        k.stride(2),
        v.stride(0),
        v.stride(2),
        *keys.stride()[:3],
        *values.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        heads,
        HALF=head_dim // 2,
        DIM=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )


@triton.jit(do_not_specialize=("heads",))
def _place(  # type: ignore[no-untyped-def]
    k, v, cos, sin, keys, values, slot,
    k_batch, k_head, v_batch, v_head, keys_batch, keys_token, keys_head, values_batch, values_token, values_head,
    t_batch, heads,
    HALF: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    at = tl.load(slot)
    dim = tl.arange(0, DIM)
    inside = dim < HALF
    k += batch * k_batch + head * k_head + dim
    first = tl.load(k, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(k + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + batch * t_batch + dim, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + batch * t_batch + dim + HALF, mask=inside, other=0.0).to(tl.float32)
    keys += batch * keys_batch + at * keys_token + head * keys_head + dim
    tl.store(keys, (first * c - second * s).to(keys.dtype.element_ty), mask=inside)
    tl.store(keys + HALF, (second * c + first * s).to(keys.dtype.element_ty), mask=inside)
    v += batch * v_batch + head * v_head + dim
    values += batch * values_batch + at * values_token + head * values_head + dim
    tl.store(values, tl.load(v, mask=inside, other=0.0), mask=inside)
    tl.store(values + HALF, tl.load(v + HALF, mask=inside, other=0.0), mask=inside)


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
