"""Attention over single keys chosen for each head (the verticals of MInference), gathered once a span."""

from __future__ import annotations

import math

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import KEYS_AT_A_TIME, LN2, on_its_device, tl, triton

_LOGITS_AT_A_TIME = 1 << 24  # bounds the logits that exist at once


def columns(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, *, size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over gathered keys, without those that a tile attends to otherwise.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, queries, heads, head_dim).
    k, v : torch.Tensor
        Shape (batch, heads, columns, head_dim): each query head has columns of its own.
    keep : torch.Tensor
        Shape (batch, heads, tiles, columns), bool: which columns the tiles of queries attend to.
    size : int
        Queries per tile.
    scale : float

    Returns
    -------
    out, lse
        As in `ops`; 0 and -inf where a tile keeps no column.
    """
    if uses_triton(q, k, v):
        return columns_triton(q, k, v, keep, size=size, scale=scale)
    tiles = max(1, _LOGITS_AT_A_TIME // max(1, q.shape[0] * q.shape[2] * size * k.shape[2]))
    parts = [
        _tiles(q[:, t * size : (t + tiles) * size], k, v, keep[:, :, t : t + tiles], size, scale)
        for t in range(0, keep.shape[2], tiles)
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=-1)


def _tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bthd,bhcd->bhtc", q.to(exact), k.to(exact)) * scale
    kept = keep.repeat_interleave(size, dim=2)[:, :, : q.shape[1]]
    logits = logits.masked_fill(~kept, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    probabilities = torch.exp(logits - lse.clamp(min=torch.finfo(exact).min)[..., None])
    return torch.einsum("bhtc,bhcd->bthd", probabilities, v.to(exact)).to(q.dtype), lse


@on_its_device
def columns_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, *, size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `columns`."""
    batch, queries, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rows = min(64, triton.next_power_of_2(size))
    _columns[(triton.cdiv(queries, rows), batch * heads)](
        q,
        k.contiguous(),
        v.contiguous(),
        keep.contiguous().view(torch.uint8),
        out,
        lse,
        *q.stride()[:3],
        *out.stride()[:3],
        queries,
        k.shape[2],
        keep.shape[2],
        heads,
        size,
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        ROWS=rows,
        KEYS=KEYS_AT_A_TIME,
        num_warps=4,
    )
    return out, lse


@triton.jit(do_not_specialize=("queries", "keys", "tiles", "heads", "size"))
def _columns(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    keep,
    out,
    lse,
    q_batch,
    q_token,
    q_head,
    o_batch,
    o_token,
    o_head,
    queries,
    keys,
    tiles,
    heads,
    size,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    owner = tl.program_id(1).to(tl.int64)
    batch, head = owner // heads, owner % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = (row < queries)[:, None] & (dim < HEAD_DIM)[None, :]
    q_rows = tl.load(
        q + batch * q_batch + row[:, None].to(tl.int64) * q_token + head * q_head + dim[None, :], mask=inside, other=0.0
    )
    k += owner * keys * HEAD_DIM
    v += owner * keys * HEAD_DIM
    keep += (owner * tiles) * keys
    tile = tl.minimum(row, queries - 1) // size
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(0, keys, KEYS):
        at = first + tl.arange(0, KEYS)
        kept = tl.load(keep + tile[:, None] * keys + at[None, :], mask=(at < keys)[None, :], other=0) > 0
        there = (at < keys)[:, None] & (dim < HEAD_DIM)[None, :]
        some_keys = tl.load(k + at[:, None] * HEAD_DIM + dim[None, :], mask=there, other=0.0)
        logits = tl.dot(q_rows, tl.trans(some_keys), input_precision="ieee") * scale
        logits = tl.where(kept, logits, -float("inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp2(logits - safe[:, None])
        decay = tl.exp2(most - safe)
        total = total * decay + tl.sum(share, 1)
        values = tl.load(v + at[:, None] * HEAD_DIM + dim[None, :], mask=there, other=0.0)
        sums = sums * decay[:, None] + tl.dot(share.to(values.dtype), values, input_precision="ieee")
        most = higher
    some_kept = total > 0
    divisor = tl.where(some_kept, total, 1.0)
    result = sums / divisor[:, None]
    spot = out + batch * o_batch + row[:, None].to(tl.int64) * o_token + head * o_head + dim[None, :]
    tl.store(spot, result.to(out.dtype.element_ty), mask=inside)
    natural = tl.where(some_kept, (most + tl.log2(divisor)) * LN2, -float("inf"))
    tl.store(lse + owner * queries + row, natural, mask=row < queries)
