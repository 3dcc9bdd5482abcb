"""Share of attention that each block of keys gets from a tile of queries, estimated from means of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.row_lse import joint_lse, row_logits, rows_at_a_time
from qwen_longctx.ops.triton_runtime import KEYS_AT_A_TIME, LOG2E, ROWS_AT_A_TIME, on_its_device, tl, triton

_LOGITS_AT_A_TIME = 1 << 24  # bounds the logits that exist at once
_COLUMNS = 8  # blocks or groups of them that a program goes through with the same rows

Pool = Literal["max", "mean"]


def joint_shares(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    rows: int,
    per_block: int,
    scale: float,
    blocks: int,
    pool: Pool = "max",
) -> torch.Tensor:
    """`block_shares` of one set of queries over several sets of keys, side by side: the shares of all sum to 1.

    `parts` are ``(q, k, limits)``, as `joint_lse` takes them; all but the last have keys for whole blocks. The last
    dimension of the result has `blocks` blocks, 0 beyond those of the keys.
    """
    q = parts[0][0]
    lse = joint_lse(parts, scale=scale)
    joined = lse.new_zeros(q.shape[0], q.shape[2], q.shape[1] // rows, blocks)
    first = 0
    for q, k, limits in parts:
        block_shares(q, k, lse, limits, joined, first, rows=rows, per_block=per_block, scale=scale, pool=pool)
        first += -(-k.shape[1] // per_block)
    return joined


def block_shares(
    q: torch.Tensor,
    means: torch.Tensor,
    lse: torch.Tensor,
    limits: torch.Tensor,
    out: torch.Tensor,
    first: int = 0,
    *,
    rows: int,
    per_block: int,
    scale: float,
    pool: Pool = "max",
) -> None:
    """Softmax shares of keys or of means of keys, summed by block: the largest or the mean over the rows of a tile.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tiles * rows, heads, head_dim): the rows that stand for each tile.
    means : torch.Tensor
        Shape (batch, means, kv_heads, head_dim).
    lse : torch.Tensor
        Shape (batch, heads, tiles * rows): each row's log-sum-exp over all the means that it attends to.
    limits : torch.Tensor
        Shape (tiles * rows,), integer: each row attends to this many of the first means.
    out : torch.Tensor
        Shape (batch, heads, tiles, blocks), contiguous, of the dtype of `lse`: the ``ceil(means / per_block)`` blocks
        from number `first` on take the shares. They must be 0 before.
    first : int
    rows : int
        Rows per tile.
    per_block : int
        Means per block.
    scale : float
    pool : {"max", "mean"}
    """
    if uses_triton(q, means, lse):
        return block_shares_triton(
            q, means, lse, limits, out, first, rows=rows, per_block=per_block, scale=scale, pool=pool
        )
    step = rows * max(1, _LOGITS_AT_A_TIME // max(1, q.shape[0] * q.shape[2] * rows * means.shape[1]))
    floor = torch.finfo(lse.dtype).min
    blocks = slice(first, first - (-means.shape[1] // per_block))
    for start in range(0, q.shape[1], step):
        at = slice(start, start + step)
        logits = row_logits(q[:, at], means, limits[at], scale=scale)
        shares = torch.exp(logits - lse[:, :, at].clamp(min=floor)[..., None])
        shares = functional.pad(shares, (0, -means.shape[1] % per_block)).unflatten(3, (-1, per_block)).sum(dim=4)
        shares = shares.unflatten(2, (-1, rows))
        pooled = shares.amax(dim=3) if pool == "max" else shares.mean(dim=3)
        out[:, :, start // rows : start // rows + pooled.shape[2], blocks] = pooled
    return None


@on_its_device
def block_shares_triton(
    q: torch.Tensor,
    means: torch.Tensor,
    lse: torch.Tensor,
    limits: torch.Tensor,
    out: torch.Tensor,
    first: int = 0,
    *,
    rows: int,
    per_block: int,
    scale: float,
    pool: str = "max",
) -> None:
    """See `block_shares`. `rows` and `per_block` are powers of two."""
    batch, queries, heads, head_dim = q.shape
    if 0 in (batch, heads, queries // rows, means.shape[1]):
        return
    dim = triton.next_power_of_2(head_dim)
    widest = 2 * ROWS_AT_A_TIME if q.element_size() <= 2 else ROWS_AT_A_TIME
    part = min(rows, widest)  # of a tile
    at_a_time = max(rows_at_a_time(q, dim), part)
    keys_at_a_time = min(max(KEYS_AT_A_TIME, per_block), widest)
    steps = triton.cdiv(per_block, keys_at_a_time)  # that a program takes over the keys of one block
    target, blocks = out, out.shape[3]
    if part < rows:
        target = out.new_zeros(batch, heads, queries // part, blocks)
    columns = triton.cdiv(means.shape[1], keys_at_a_time * steps * _COLUMNS)
    grid = (triton.cdiv(queries, at_a_time), columns, batch * heads)
    _block_shares[grid](
        q,
        means,
        lse.contiguous(),
        limits.to(torch.int32),
        target,
        *q.stride()[:3],
        *means.stride()[:3],
        queries,
        means.shape[1],
        queries // part,
        first,
        triton.cdiv(means.shape[1], per_block),
        blocks,
        heads,
        heads // means.shape[2],
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=at_a_time,
        KEYS=keys_at_a_time,
        PER_TILE=part,
        PER_BLOCK=min(per_block, keys_at_a_time),
        STEPS=steps,
        COLUMNS=_COLUMNS,
        MEAN=pool == "mean",
        num_warps=4 if at_a_time * keys_at_a_time <= 4096 else 8,
        num_stages=1 if steps > 1 else 2 if keys_at_a_time > KEYS_AT_A_TIME else 3,  # for which all cards have room
    )
    if part < rows:
        at = slice(first, first + triton.cdiv(means.shape[1], per_block))
        split = target[..., at].unflatten(2, (-1, rows // part))
        out[..., at] = split.amax(dim=3) if pool == "max" else split.mean(dim=3)


@triton.jit(do_not_specialize=("queries", "keys", "tiles", "first", "held", "blocks", "heads", "group"))
def _block_shares(  # type: ignore[no-untyped-def]
    q,
    means,
    lse,
    limits,
    shares,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    queries,
    keys,
    tiles,
    first,
    held,
    blocks,
    heads,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PER_TILE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MEAN: tl.constexpr,
):
    part, owner = tl.program_id(0), tl.program_id(2)
    batch, head = (owner // heads).to(tl.int64), owner % heads
    row = part * ROWS + tl.arange(0, ROWS)
    limit = tl.load(limits + row, mask=row < queries, other=0)
    begin = tl.program_id(1) * COLUMNS
    most = tl.minimum(tl.max(limit, 0), keys)
    stop = tl.minimum(begin + COLUMNS, (most + STEPS * KEYS - 1) // (STEPS * KEYS))
    if begin >= stop:
        return
    dim = tl.arange(0, DIM)
    inside = (row < queries)[:, None] & (dim < HEAD_DIM)[None, :]
    q_rows = tl.load(
        q + batch * q_batch + row[:, None].to(tl.int64) * q_token + head * q_head + dim[None, :], mask=inside, other=0.0
    )
    row_lse = tl.load(lse + owner.to(tl.int64) * queries + row, mask=row < queries, other=0.0) * LOG2E
    means += batch * k_batch + (head // group) * k_head
    tile = part * (ROWS // PER_TILE) + tl.arange(0, ROWS // PER_TILE)
    place = shares + (owner.to(tl.int64) * tiles + tile[:, None]) * blocks + first
    for column in range(begin, stop):
        share = tl.zeros((ROWS, KEYS // PER_BLOCK), tl.float32)
        for step in tl.static_range(STEPS):
            at = (column * STEPS + step) * KEYS + tl.arange(0, KEYS)
            mean_keys = tl.load(
                means + at[None, :].to(tl.int64) * k_token + dim[:, None],
                mask=(at < keys)[None, :] & (dim < HEAD_DIM)[:, None],
                other=0.0,
            )
            logits = tl.dot(q_rows, mean_keys, input_precision="ieee") * scale - row_lse[:, None]
            seen = (at[None, :] < limit[:, None]) & (at < keys)[None, :]
            each = tl.where(seen, tl.exp2(tl.where(seen, logits, 0.0)), 0.0)
            share += tl.sum(tl.reshape(each, (ROWS, KEYS // PER_BLOCK, PER_BLOCK)), 2)
        pooled = tl.reshape(share, (ROWS // PER_TILE, PER_TILE, KEYS // PER_BLOCK))
        pooled = tl.sum(pooled, 1) / PER_TILE if MEAN else tl.max(pooled, 1)
        block = column * (KEYS // PER_BLOCK) + tl.arange(0, KEYS // PER_BLOCK)
        tl.store(place + block[None, :], pooled, mask=(tile < tiles)[:, None] & (block < held)[None, :])
