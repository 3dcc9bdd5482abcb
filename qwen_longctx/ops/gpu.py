"""Triton kernels. Each does what the PyTorch function of the same name does; see there.

Imported where Triton is installed only. Softmaxes run in base 2, and results are natural logs again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))
_KEYS_AT_A_TIME = 64
_ROWS_AT_A_TIME = 64
_MERGED_ROWS = 16
_ROTATED_ROWS = 32
_PROGRAMS_WANTED = 2048  # splits of long key ranges fill the device with at least so many programs
_BITS = 31  # of a float32 that is not negative


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make that the device of the first argument."""

    @functools.wraps(launch)
    def launched(first: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, torch.Tensor) else first[0][0]):
            return launch(first, *args, **kwargs)

    return launched


@_on_its_device
def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lists.compact`: counts and indices."""
    *lead, blocks = mask.shape
    rows = math.prod(lead)
    counts = torch.empty(lead, dtype=torch.int32, device=mask.device)
    indices = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    if rows and blocks:
        width = min(1024, triton.next_power_of_2(blocks))
        flat = mask.contiguous().view(torch.uint8)
        _compact[(rows,)](flat, counts, indices, blocks, WIDTH=width, num_warps=4)
    else:
        counts.zero_()
    return counts, indices


@triton.jit
def _compact(mask, counts, indices, blocks, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = 0
    for first in range(0, blocks, WIDTH):
        at = first + tl.arange(0, WIDTH)
        kept = tl.load(mask + row * blocks + at, mask=at < blocks, other=0).to(tl.int32)
        place = found + tl.cumsum(kept, 0) - 1
        tl.store(indices + row * blocks + place, at, mask=kept > 0)
        found += tl.sum(kept, 0)
    tl.store(counts + row, found)


@_on_its_device
def keep(
    scores: torch.Tensor,
    whole: torch.Tensor,
    visible: torch.Tensor,
    amount: torch.Tensor,
    *,
    by: str,
    most: torch.Tensor | None,
    sink: int,
    window: int | torch.Tensor,
) -> torch.Tensor:
    """See `sparsity.keep.keep`; `whole` and `visible` are those of its tiles."""
    batch, heads, tiles, blocks = scores.shape
    kept = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    amount = amount.to(torch.float32).expand(heads, tiles).contiguous()
    limit = amount if most is None else most.to(torch.int32).expand(heads, tiles).contiguous()
    width = max(1024, triton.next_power_of_2(blocks))  # each width is compiled anew
    _keep[(batch * heads * tiles,)](
        scores.contiguous(),
        kept,
        whole,
        visible,
        amount,
        limit,
        whole - window,
        heads * tiles,
        tiles,
        blocks,
        sink,
        MASS=by == "mass",
        LIMITED=most is not None,
        BITS=_BITS,
        WIDTH=width,
        num_warps=min(16, width // 512),
    )
    return kept.view(torch.bool)


@triton.jit
def _keep(
    scores,
    kept,
    whole,
    visible,
    amount,
    most,
    near,
    lists,
    tiles,
    blocks,
    sink,
    MASS: tl.constexpr,
    LIMITED: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = row % tiles
    at = tl.arange(0, WIDTH)
    seen_whole = tl.load(whole + tile)
    seen = tl.load(visible + tile)
    wanted = tl.load(amount + row % lists)
    score = tl.load(scores + row * blocks + at, mask=(at < blocks) & (at < seen_whole), other=0.0).to(tl.float32)
    always = (at < seen) & ((at >= seen_whole) | (at < sink) | (at >= tl.load(near + tile)))
    choice = tl.where(always, 0.0, score)
    everything = wanted <= 0
    lowest = tl.max(score, 0) * wanted
    if MASS:
        everything = wanted >= 1
        lowest = tl.full([], 0.0, tl.float32)
    if MASS or LIMITED:
        enough = tl.full([], 0, tl.int1)
        if MASS:
            missing = wanted * tl.sum(score, 0) - tl.sum(tl.where(always, score, 0.0), 0)
            enough = missing <= 0
        if LIMITED:
            limit = tl.load(most + row % lists)
            everything = everything & (limit >= seen)
            room = limit - tl.sum(always.to(tl.int32), 0)
            enough = enough | (room <= 0)
        # The largest value that still gathers what is missing or fills the room, one bit of the float at a time
        bits = choice.to(tl.int32, bitcast=True)
        low = tl.full([], 0, tl.int32)
        for step in range(BITS):
            guess = low | (1 << (BITS - 1 - step))
            reached = tl.full([], 0, tl.int1)
            if MASS:
                reached = tl.sum(tl.where(bits >= guess, choice, 0.0), 0) >= missing
            if LIMITED:
                reached = reached | (tl.sum((bits >= guess).to(tl.int32), 0) >= room)
            low = tl.where(reached, guess, low)
        lowest = tl.maximum(lowest, tl.where(enough, float("inf"), low.to(tl.float32, bitcast=True)))
    chosen = (choice > 0) & (choice >= lowest)
    result = always | chosen | (at < tl.where(everything, seen_whole, 0))
    tl.store(kept + row * blocks + at, result.to(tl.uint8), mask=at < blocks)


@_on_its_device
def row_lse(q: torch.Tensor, k: torch.Tensor, limits: torch.Tensor, *, scale: float) -> torch.Tensor:
    """See `lse.row_lse`. Long key ranges are split, so that a few rows fill the device too."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    tiles = triton.cdiv(queries, _ROWS_AT_A_TIME)
    splits = max(1, min(triton.cdiv(keys, 4096), _PROGRAMS_WANTED // max(1, tiles * batch * heads)))
    part = triton.cdiv(triton.cdiv(keys, splits), _KEYS_AT_A_TIME) * _KEYS_AT_A_TIME
    found = torch.full((splits, batch, heads, queries), -torch.inf, dtype=torch.float32, device=q.device)
    if keys == 0:
        return found[0]
    _row_lse[(tiles, batch * heads, splits)](
        q,
        k,
        limits.to(torch.int32),
        found,
        *q.stride()[:3],
        *k.stride()[:3],
        batch * heads * queries,
        queries,
        keys,
        heads,
        heads // k.shape[2],
        part,
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        ROWS=_ROWS_AT_A_TIME,
        KEYS=_KEYS_AT_A_TIME,
        num_warps=4,
    )
    return found[0] if splits == 1 else torch.logsumexp(found, dim=0)


@triton.jit
def _row_lse(
    q,
    k,
    limits,
    lse,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    split_stride,
    queries,
    keys,
    heads,
    group,
    part,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile, owner, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (owner // heads).to(tl.int64), owner % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = (row < queries)[:, None] & (dim < HEAD_DIM)[None, :]
    mine = tl.load(
        q + batch * q_batch + row[:, None].to(tl.int64) * q_token + head * q_head + dim[None, :], mask=inside, other=0.0
    )
    limit = tl.load(limits + row, mask=row < queries, other=0)
    start = split * part
    stop = tl.minimum(tl.minimum(start + part, keys), tl.max(limit, 0))
    k += batch * k_batch + (head // group) * k_head
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, KEYS):
        at = first + tl.arange(0, KEYS)
        some = tl.load(
            k + at[None, :].to(tl.int64) * k_token + dim[:, None],
            mask=(at < keys)[None, :] & (dim < HEAD_DIM)[:, None],
            other=0.0,
        )
        logits = tl.dot(mine, some, input_precision="ieee") * scale
        logits = tl.where((at[None, :] < limit[:, None]) & (at < stop)[None, :], logits, -float("inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        most = higher
    result = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(lse + split * split_stride + owner.to(tl.int64) * queries + row, result * _LN2, mask=row < queries)


@_on_its_device
def block_shares(
    q: torch.Tensor,
    means: torch.Tensor,
    lse: torch.Tensor,
    limits: torch.Tensor,
    *,
    rows: int,
    per_block: int,
    scale: float,
) -> torch.Tensor:
    """See `scores.block_shares`. `rows` and `per_block` are powers of two, at most 64."""
    batch, queries, heads, head_dim = q.shape
    tiles, blocks = queries // rows, triton.cdiv(means.shape[1], per_block)
    found = torch.zeros((batch, heads, tiles, blocks), dtype=torch.float32, device=q.device)
    if found.numel() == 0:
        return found
    grid = (triton.cdiv(queries, _ROWS_AT_A_TIME), triton.cdiv(means.shape[1], _KEYS_AT_A_TIME), batch * heads)
    _block_shares[grid](
        q,
        means,
        lse.contiguous(),
        limits.to(torch.int32),
        found,
        *q.stride()[:3],
        *means.stride()[:3],
        queries,
        means.shape[1],
        tiles,
        blocks,
        heads,
        heads // means.shape[2],
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        ROWS=_ROWS_AT_A_TIME,
        KEYS=_KEYS_AT_A_TIME,
        PER_TILE=rows,
        PER_BLOCK=per_block,
        num_warps=4,
    )
    return found


@triton.jit
def _block_shares(
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
):
    part, column, owner = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (owner // heads).to(tl.int64), owner % heads
    row = part * ROWS + tl.arange(0, ROWS)
    limit = tl.load(limits + row, mask=row < queries, other=0)
    if column * KEYS >= tl.max(limit, 0):
        return
    at = column * KEYS + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    inside = (row < queries)[:, None] & (dim < HEAD_DIM)[None, :]
    mine = tl.load(
        q + batch * q_batch + row[:, None].to(tl.int64) * q_token + head * q_head + dim[None, :], mask=inside, other=0.0
    )
    some = tl.load(
        means + batch * k_batch + (head // group) * k_head + at[None, :].to(tl.int64) * k_token + dim[:, None],
        mask=(at < keys)[None, :] & (dim < HEAD_DIM)[:, None],
        other=0.0,
    )
    own = tl.load(lse + owner.to(tl.int64) * queries + row, mask=row < queries, other=0.0) * _LOG2E
    logits = tl.dot(mine, some, input_precision="ieee") * scale - own[:, None]
    met = (at[None, :] < limit[:, None]) & (at < keys)[None, :]
    share = tl.where(met, tl.exp2(tl.where(met, logits, 0.0)), 0.0)
    share = tl.sum(tl.reshape(share, (ROWS, KEYS // PER_BLOCK, PER_BLOCK)), 2)
    share = tl.max(tl.reshape(share, (ROWS // PER_TILE, PER_TILE, KEYS // PER_BLOCK)), 1)
    tile = part * (ROWS // PER_TILE) + tl.arange(0, ROWS // PER_TILE)
    block = column * (KEYS // PER_BLOCK) + tl.arange(0, KEYS // PER_BLOCK)
    place = (owner.to(tl.int64) * tiles + tile[:, None]) * blocks + block[None, :]
    tl.store(shares + place, share, mask=(tile < tiles)[:, None] & (block < blocks)[None, :])


@_on_its_device
def columns(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, *, size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `columns.columns`."""
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
        KEYS=_KEYS_AT_A_TIME,
        num_warps=4,
    )
    return out, lse


@triton.jit
def _columns(
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
    mine = tl.load(
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
        some = tl.load(k + at[:, None] * HEAD_DIM + dim[None, :], mask=there, other=0.0)
        logits = tl.dot(mine, tl.trans(some), input_precision="ieee") * scale
        logits = tl.where(kept, logits, -float("inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(most - safe)
        total = total * fade + tl.sum(share, 1)
        values = tl.load(v + at[:, None] * HEAD_DIM + dim[None, :], mask=there, other=0.0)
        sums = sums * fade[:, None] + tl.dot(share.to(values.dtype), values, input_precision="ieee")
        most = higher
    some_kept = total > 0
    divisor = tl.where(some_kept, total, 1.0)
    result = sums / divisor[:, None]
    spot = out + batch * o_batch + row[:, None].to(tl.int64) * o_token + head * o_head + dim[None, :]
    tl.store(spot, result.to(out.dtype.element_ty), mask=inside)
    natural = tl.where(some_kept, (most + tl.log2(divisor)) * _LN2, -float("inf"))
    tl.store(lse + owner * queries + row, natural, mask=row < queries)


@_on_its_device
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `rotary.rotate`."""
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


@triton.jit
def _rotate(
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


@_on_its_device
def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """See `merge.merge`, for two to four parts."""
    first = parts[0][0]
    batch, queries, heads, head_dim = first.shape
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=first.device)
    four = [(o, s.contiguous()) for o, s in parts] + [parts[0]] * (4 - len(parts))
    strides = [stride for o, _ in four for stride in o.stride()[:3]]
    _merge[(triton.cdiv(queries, _MERGED_ROWS), batch * heads)](
        *[tensor for part in four for tensor in part],
        out,
        lse,
        *strides,
        *out.stride()[:3],
        queries,
        heads,
        PARTS=len(parts),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        ROWS=_MERGED_ROWS,
        num_warps=4,
    )
    return out, lse


@triton.jit
def _merge(
    o0, s0, o1, s1, o2, s2, o3, s3, out, lse,
    b0, t0, h0, b1, t1, h1, b2, t2, h2, b3, t3, h3, bo, to, ho,
    queries, heads,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(1).to(tl.int64)
    batch, head = owner // heads, owner % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    within = row < queries
    inside = within[:, None] & (dim < HEAD_DIM)[None, :]
    at = owner * queries + row
    none = -float("inf")
    l0 = tl.load(s0 + at, mask=within, other=none)
    l1 = tl.load(s1 + at, mask=within, other=none)
    most = tl.maximum(l0, l1)
    if PARTS > 2:
        l2 = tl.load(s2 + at, mask=within, other=none)
        most = tl.maximum(most, l2)
    if PARTS > 3:
        l3 = tl.load(s3 + at, mask=within, other=none)
        most = tl.maximum(most, l3)
    safe = tl.where(most == none, 0.0, most)
    token = row[:, None].to(tl.int64)
    w0 = tl.exp(l0 - safe)
    w1 = tl.exp(l1 - safe)
    total = w0 + w1
    spot = o0 + batch * b0 + token * t0 + head * h0 + dim[None, :]
    sums = tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w0[:, None]
    spot = o1 + batch * b1 + token * t1 + head * h1 + dim[None, :]
    sums += tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w1[:, None]
    if PARTS > 2:
        w2 = tl.exp(l2 - safe)
        total += w2
        spot = o2 + batch * b2 + token * t2 + head * h2 + dim[None, :]
        sums += tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w2[:, None]
    if PARTS > 3:
        w3 = tl.exp(l3 - safe)
        total += w3
        spot = o3 + batch * b3 + token * t3 + head * h3 + dim[None, :]
        sums += tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w3[:, None]
    divisor = tl.where(total > 0, total, 1.0)
    spot = out + batch * bo + token * to + head * ho + dim[None, :]
    tl.store(spot, (sums / divisor[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + at, tl.where(total > 0, most + tl.log(divisor), none), mask=within)
