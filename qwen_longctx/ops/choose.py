"""Which blocks of keys a decoding step attends to, chosen on the device from means of keys.

Three launches: logits of all means with the log-sum-exp of every tile of them; from these, scores of the blocks; and
from the scores, lists. Nothing waits for the device, and nothing is compiled anew while a sequence grows. The device
says how long a row is, too: launches are cut for all keys for which there is room, and programs beyond the last key end
at once.
"""

from __future__ import annotations

import math

import torch

from qwen_longctx.ops.decode import BLOCK, SEGMENTS, Reach, takes_head_dim
from qwen_longctx.ops.device import cast, uses_triton
from qwen_longctx.ops.rotate import rotate
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

MEAN = 32  # keys of a mean; reading the means costs 1/64 of reading keys and values
_ALWAYS = 2.0  # the score of blocks that are kept always: no sum of two shares is higher
_TILE = 64  # means at a time of the logits
_MOST_ROWS = 32  # packed query rows of a tile of the logits
_ROW_BYTES = 1 << 14  # of them: with the means they fit the shared memory of every device
_POOLED = 8192  # logits of a tile of the scores
_PARTS = 128  # tiles of the logits whose sums are joined at a time
_LISTED = 8192  # blocks at a time of the lists, up to 1023 times
_WARPS_LISTED = 16
_ROWS_A_WARP = 4  # packed query rows of the logits


def choose(
    q: torch.Tensor, means: torch.Tensor, reach: Reach, room: int, count: int, *, scale: float, newest: int
) -> torch.Tensor:
    """The `count` blocks of `ops.decode.BLOCK` keys that score best, for each row and KV head.

    A query scores each mean of 32 keys with its rotation for the segment in which the last of those keys lies, and
    takes a softmax over all means whose keys come after the first that it attends to. A mean counts as the query that
    wants it most, among the new tokens and the heads of a group, and a block scores the sum of its means. The block in
    which a row begins, the one after it, and those of the newest keys are kept always, as far as `count` reaches. What
    is not a number scores zero. A row ends with the last key that any of its queries attends to; blocks beyond it are
    listed only where `count` is more than the blocks before.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tokens, heads, head_dim), not rotated.
    means : torch.Tensor
        Shape (batch, means, kv_heads, head_dim) of the dtype of `q`: of every `MEAN` keys from index 0 of the cache.
        Those with keys beyond the last of their row are ignored and may hold anything.
    reach : Reach
    room : int
        Keys for which there is room in the cache.
    count : int
        At most the blocks for which there is room.
    scale : float
        Softmax scale without the attention temperature.
    newest : int
        Keys at the end that are kept always.

    Returns
    -------
    torch.Tensor
        Shape (batch, kv_heads, count), int32, in rising order. Sums run in float32 at least.
    """
    if uses_triton(q, means) and takes_head_dim(q.shape[3]):
        return choose_triton(q, means, reach, room, count, scale=scale, newest=newest)
    exact = torch.promote_types(q.dtype, torch.float32)
    means = cast(means, exact)
    start, stop = reach.ranges.unbind(-1)  # (batch, tokens, segments)
    empty = start >= stop
    length = stop.masked_fill(empty, 0).amax((1, 2))[:, None]  # (batch, 1)
    begins = torch.minimum(start.masked_fill(empty, room).amin(2), length)  # (batch, tokens)
    first = torch.arange(0, means.shape[1] * MEAN, MEAN, device=q.device)
    inside = (first + MEAN > start[..., None]) & (first + MEAN <= stop[..., None])  # the last key of a mean
    inside = (inside & (first >= begins[..., None, None]))[:, None, None]  # (batch, 1, 1, tokens, segments, means)
    logits = torch.full((), -torch.inf, dtype=exact, device=q.device)
    for segment in range(SEGMENTS):
        rotated = cast(rotate(q, reach.cos[segment], reach.sin[segment]), q.dtype).unflatten(2, (means.shape[2], -1))
        some = torch.einsum("btngd,bmnd->bngtm", rotated.to(exact), means)
        some = some * (reach.heat[:, None, None, :, None].to(exact) * scale)
        logits = some.where(inside[..., segment, :], logits)
    shares = logits.softmax(-1).nan_to_num(0.0).amax((2, 3))  # (batch, kv_heads, means)
    begins = begins.amin(1, keepdim=True) // BLOCK
    block = torch.arange(-(-room // BLOCK), device=q.device)
    per_block = BLOCK // MEAN
    shares = torch.nn.functional.pad(shares, (0, len(block) * per_block - shares.shape[2]))
    always = (block >= begins) & (block <= begins + 1) | (block * BLOCK + BLOCK > length - newest)
    scores = shares.unflatten(2, (-1, per_block)).sum(3).masked_fill(always[:, None], _ALWAYS)
    scores = scores.masked_fill((block * BLOCK >= length)[:, None], 0.0)
    scores = scores.masked_fill((block * BLOCK >= length.clamp(min=count * BLOCK))[:, None], -1.0)
    return scores.topk(count, -1, sorted=False).indices.sort(-1).values.to(torch.int32)


@on_its_device
def choose_triton(
    q: torch.Tensor, means: torch.Tensor, reach: Reach, room: int, count: int, *, scale: float, newest: int
) -> torch.Tensor:
    """See `choose`. Among blocks of one score the earlier are taken."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = means.shape[2]
    group = heads // kv_heads
    rows, owners, blocks = tokens * group, batch * kv_heads, -(-room // BLOCK)
    chosen = torch.empty((batch, kv_heads, count), dtype=torch.int32, device=q.device)
    if chosen.numel() == 0:
        return chosen
    q, means = (x if x.stride(3) == 1 else x.contiguous() for x in (q, means))
    cos, sin, ranges, heat, _ = reach
    tiles = max(1, -(-means.shape[1] // _TILE))
    logits = torch.empty((owners * rows, tiles * _TILE), dtype=torch.float32, device=q.device)
    lses = torch.empty((owners * rows, tiles), dtype=torch.float32, device=q.device)
    scores = torch.empty((owners, blocks), dtype=torch.float32, device=q.device)
    dim = max(16, triton.next_power_of_2(head_dim))
    at_once = max(16, min(_MOST_ROWS, _ROW_BYTES // (dim * q.element_size()), triton.next_power_of_2(rows)))
    _mean_logits[(tiles, owners, -(-rows // at_once))](
        q,
        means,
        cos,
        sin,
        ranges,
        heat,
        logits,
        lses,
        *q.stride()[:3],
        *means.stride()[:3],
        cos.stride(0),
        cos.stride(1) if cos.shape[1] > 1 else 0,
        cos.stride(2),
        tokens,
        kv_heads,
        means.shape[1],
        scale * math.log2(math.e),
        MEAN=MEAN,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=at_once,
        MEANS=_TILE,
        num_warps=at_once // _ROWS_A_WARP,
        num_stages=1,
    )
    room = triton.next_power_of_2(rows)
    pooled = max(16, min(256, _POOLED // room // (BLOCK // MEAN)))
    _mean_scores[(-(-blocks // pooled), owners)](
        logits,
        lses,
        ranges,
        scores,
        tokens,
        kv_heads,
        tiles,
        blocks,
        newest,
        GROUP=group,
        ROOM=room,
        PARTS=_PARTS,
        TILE=_TILE,
        BLOCKS=pooled,
        PER_BLOCK=BLOCK // MEAN,
        BLOCK=BLOCK,
        ALWAYS=_ALWAYS,
        num_warps=4,
    )
    _best_blocks[(owners,)](
        scores, ranges, chosen, tokens, kv_heads, blocks, count, BLOCK=BLOCK, WIDTH=_LISTED, num_warps=_WARPS_LISTED
    )
    return chosen


@triton.jit
def _row(ranges, batch, tokens):  # type: ignore[no-untyped-def]
    """The first key that any query of a row attends to, and the one after the last; both 0 where there is none."""
    begins = tl.full([], 2147483647, tl.int32)
    length = tl.full([], 0, tl.int32)
    for first in range(0, tokens * 3, 32):
        number = first + tl.arange(0, 32)
        place = ranges + (batch * tokens * 3 + number) * 2
        start = tl.load(place, mask=number < tokens * 3, other=0)
        stop = tl.load(place + 1, mask=number < tokens * 3, other=0)
        begins = tl.minimum(begins, tl.min(tl.where(start < stop, start, 2147483647), 0))
        length = tl.maximum(length, tl.max(tl.where(start < stop, stop, 0), 0))
    return tl.minimum(begins, length), length


@triton.jit(do_not_specialize=("ranges", "tokens", "kv_heads", "room"))  # `ranges` is a view that lies at any address
def _mean_logits(  # type: ignore[no-untyped-def]
    q, means, cos, sin, ranges, heat, logits, lses,
    q_batch, q_token, q_head, m_batch, m_mean, m_head, t_segment, t_batch, t_token,
    tokens, kv_heads, room, scale,
    MEAN: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    tile, owner = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (owner // kv_heads).to(tl.int64), owner % kv_heads
    _, length = _row(ranges, batch, tokens)
    if tile * (MEANS * MEAN) >= length:  # beyond the last key; nobody reads what belongs here
        return
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    within = row < tokens * GROUP
    token = row // GROUP
    dim = tl.arange(0, DIM)
    real = dim < HEAD_DIM
    spot = batch * tokens + token
    heated = tl.load(heat + spot, mask=within, other=0.0) * scale
    at = tile * MEANS + tl.arange(0, MEANS)
    spots = means + batch * m_batch + kv_head * m_head + at[None, :].to(tl.int64) * m_mean + dim[:, None]
    keys = tl.load(spots, mask=(at < room)[None, :] & real[:, None], other=0.0)
    first = at * MEAN
    begins = tl.full((ROWS,), 2147483647, tl.int32)
    for segment in tl.static_range(3):
        start = tl.load(ranges + spot * 6 + 2 * segment, mask=within, other=0)
        stop = tl.load(ranges + spot * 6 + 2 * segment + 1, mask=within, other=0)
        begins = tl.minimum(begins, tl.where(start < stop, start, 2147483647))
    q += batch * q_batch + kv_head * GROUP * q_head
    q_spot = token[:, None].to(tl.int64) * q_token + (row % GROUP)[:, None] * q_head
    table = batch * t_batch + token[:, None] * t_token + dim[None, :]
    turned = (dim + HEAD_DIM // 2) % HEAD_DIM
    result = tl.full((ROWS, MEANS), -float("inf"), tl.float32)
    for segment in range(3):
        start = tl.load(ranges + spot * 6 + 2 * segment, mask=within, other=0)
        stop = tl.load(ranges + spot * 6 + 2 * segment + 1, mask=within, other=0)
        least = tl.min(tl.where(start < stop, start, 2147483647), 0)
        most = tl.max(tl.where(start < stop, stop, 0), 0)
        if (least < (tile + 1) * MEANS * MEAN) & (most > tile * MEANS * MEAN):
            inside = within[:, None] & real[None, :]
            plain = tl.load(q + q_spot + dim[None, :], mask=inside, other=0.0).to(tl.float32)
            other = tl.load(q + q_spot + turned[None, :], mask=inside, other=0.0).to(tl.float32)
            c = tl.load(cos + segment * t_segment + table, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + segment * t_segment + table, mask=inside, other=0.0).to(tl.float32)
            rotated = (plain * c + other * s).to(q.dtype.element_ty)
            some = tl.dot(rotated, keys, input_precision="ieee") * heated[:, None]
            # the last key of a mean says in which segment it lies
            here = (first[None, :] + MEAN > start[:, None]) & (first[None, :] + MEAN <= stop[:, None])
            here = here & (first[None, :] >= begins[:, None]) & (at < room)[None, :]
            result = tl.where(here, some, result)
    highest = tl.max(result, 1)
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    norm = tl.sum(tl.exp2(result - safe[:, None]), 1)
    lse = tl.where(norm == 0, -float("inf"), safe + tl.log2(tl.where(norm == 0, 1.0, norm)))
    spot = owner.to(tl.int64) * (tokens * GROUP) + row
    tiles = tl.num_programs(0)
    tl.store(logits + spot[:, None] * (tiles * MEANS) + at[None, :], result, mask=within[:, None])
    tl.store(lses + spot * tiles + tile, lse, mask=within)


@triton.jit(do_not_specialize=("ranges", "tokens", "kv_heads", "tiles", "blocks", "newest"))
def _mean_scores(  # type: ignore[no-untyped-def]
    logits, lses, ranges, scores, tokens, kv_heads, tiles, blocks, newest,
    GROUP: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(1).to(tl.int64)
    begins, length = _row(ranges, owner // kv_heads, tokens)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if tl.program_id(0) * (BLOCKS * BLOCK) >= length:
        tl.store(scores + owner * blocks + block, tl.zeros((BLOCKS,), tl.float32), mask=block < blocks)
        return
    row = tl.arange(0, ROOM)
    within = row < tokens * GROUP
    spot = owner * (tokens * GROUP) + row
    highest = tl.full((ROOM,), -float("inf"), tl.float32)
    norm = tl.zeros((ROOM,), tl.float32)
    # tiles before the last key, whose mean other caches than ours lack until it is complete
    filled = tl.minimum(tl.cdiv(length, TILE * (BLOCK // PER_BLOCK)), tiles)
    for begin in range(0, filled, PARTS):
        part = begin + tl.arange(0, PARTS)
        inside = within[:, None] & (part < filled)[None, :]
        some = tl.load(lses + spot[:, None] * tiles + part[None, :], mask=inside, other=-float("inf"))
        higher = tl.maximum(highest, tl.max(some, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        norm = norm * tl.exp2(highest - safe) + tl.sum(tl.exp2(some - safe[:, None]), 1)
        highest = higher
    # nothing has a share of a row that has no means or a logit that is no number
    lse = tl.where(norm > 0, highest + tl.log2(tl.where(norm > 0, norm, 1.0)), float("inf"))
    at = tl.program_id(0) * (BLOCKS * PER_BLOCK) + tl.arange(0, BLOCKS * PER_BLOCK)
    inside = within[:, None] & (at < filled * TILE)[None, :]
    some = tl.load(logits + spot[:, None] * (tiles * TILE) + at[None, :], mask=inside, other=-float("inf"))
    share = tl.exp2(some - lse[:, None])
    share = tl.max(tl.where(share > 0, tl.minimum(share, 1.0), 0.0), 0)  # rounding may exceed 1
    score = tl.sum(tl.reshape(share, (BLOCKS, PER_BLOCK)), 1)
    always = (block >= begins // BLOCK) & (block <= begins // BLOCK + 1) | ((block + 1) * BLOCK > length - newest)
    score = tl.where(always, ALWAYS, score)
    tl.store(scores + owner * blocks + block, tl.where(block * BLOCK < length, score, 0.0), mask=block < blocks)


@triton.jit(do_not_specialize=("ranges", "tokens", "kv_heads", "room", "count"))
def _best_blocks(  # type: ignore[no-untyped-def]
    scores, ranges, chosen, tokens, kv_heads, room, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    owner = tl.program_id(0).to(tl.int64)
    _, length = _row(ranges, owner // kv_heads, tokens)
    blocks = tl.maximum(tl.cdiv(length, BLOCK), count)
    scores += owner * room
    chosen += owner * count
    # The largest score that `count` blocks reach, as the bits of a float32 below 2, of which there are 30: two bits at
    # a time, by counting what reaches each of the three guesses above the lowest: 10 bits of a sum for each in every
    # lane, which sees one block of a tile, and 21 bits where lanes are joined.
    low = tl.full([], 0, tl.int32)
    above = tl.full([], 0, tl.int64)  # blocks that score more than all that begins with these bits
    for step in range(15):
        shift = 28 - 2 * step
        sums = tl.zeros((WIDTH,), tl.int32)
        for first in range(0, blocks, WIDTH):
            at = first + tl.arange(0, WIDTH)
            score = tl.load(scores + at, mask=at < blocks, other=-1.0)
            bits = (score * 0.25).to(tl.int32, bitcast=True)  # none is 4 or more
            sums += (bits >= low + (1 << shift)).to(tl.int32)
            sums += (bits >= low + (2 << shift)).to(tl.int32) << 10
            sums += (bits >= low + (3 << shift)).to(tl.int32) << 20
        wide = (sums & 1023).to(tl.int64) | (((sums >> 10) & 1023).to(tl.int64) << 21)
        total = tl.sum(wide | ((sums >> 20).to(tl.int64) << 42), 0)
        digit = ((total & 2097151) >= count).to(tl.int32)
        digit += (((total >> 21) & 2097151) >= count).to(tl.int32)
        digit += ((total >> 42) >= count).to(tl.int32)
        above = tl.where(digit == 3, above, (total >> (21 * digit).to(tl.int64)) & 2097151)
        low += digit << shift
    # Those above it are listed, and as many of those that are like it as there is room for
    spare = count - above
    passed = tl.full([], 0, tl.int64)
    for first in range(0, blocks, WIDTH):
        at = first + tl.arange(0, WIDTH)
        score = tl.load(scores + at, mask=at < blocks, other=-1.0)
        bits = (score * 0.25).to(tl.int32, bitcast=True)
        higher, alike = bits > low, bits == low
        both = higher.to(tl.int64) + (alike.to(tl.int64) << 32)
        before = passed + tl.cumsum(both, 0) - both
        alike_before = before >> 32
        place = before - (alike_before << 32) + tl.minimum(alike_before, spare)
        tl.store(chosen + place, at, mask=higher | (alike & (alike_before < spare)))
        passed += tl.sum(both, 0)
