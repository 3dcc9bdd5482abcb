"""Attention of a few new tokens to all keys: every segment of dual chunk attention in one pass over the cache.

Decoding is bound by reading keys and values. So the query heads that share keys are packed into one tile, which reads
each key once; the keys of all segments together are split evenly over the device; and where the segments lie is read
from the device's memory, so that nothing is compiled or planned anew while a sequence grows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from qwen_longctx.ops.device import HALF, cast, check_dtypes, older_than, uses_triton
from qwen_longctx.ops.eight_bit import TILE, EightBit, KeyBias
from qwen_longctx.ops.rotate import rotate
from qwen_longctx.ops.triton_runtime import AVAILABLE, on_its_device, tl, triton

MOST_TOKENS = 8  # new tokens of a row; more are a prefill, which is bound by arithmetic
SEGMENTS = 3
BLOCK = 64  # keys of a block in a list, a multiple of the keys of every tile
_MOST_SPLITS = 128  # parts that are joined at once
_FEWEST_KEYS = 128  # of a part: shorter ones cost more to join than they save
_FEWEST_LISTED = 32  # blocks that a part of a list has room for: each power of 2 is compiled anew
_PROGRAMS_A_PROCESSOR = 2  # resident at once: one loads while the other computes
_ROW_BYTES = 1 << 14  # of the packed queries of a tile
_LEAST_SHARED = 99 << 10  # of a program, in bytes, on any device of compute capability 8.0 and newer
_SCRATCH = 6 << 10  # shared memory beside keys and values
_CAPABILITY = (8, 0)  # older devices lack asynchronous copies, without which it is no faster


class Reach(NamedTuple):
    """Where the queries of a decoding step look, all of it in the memory of their device.

    Attributes
    ----------
    cos, sin : torch.Tensor
        Shape (3, 1 or batch, tokens, 1, head_dim), any float dtype: the rotation of each query towards the keys of each
        segment, as `rotate` takes them.
    ranges : torch.Tensor
        Shape (batch, tokens, 3, 2), int32: the keys ``[start, stop)`` of each segment that a query attends to, as
        indices in the cache. Empty where ``start >= stop``; segments of one query are disjoint.
    heat : torch.Tensor
        Shape (batch, tokens), float32: factor on the logits of each query.
    stride : int
        Keys of a chunk: all segments of a row start a multiple of it apart, with a key that was rotated by 0.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    ranges: torch.Tensor
    heat: torch.Tensor
    stride: int

    def to(self, device: torch.device) -> Reach:
        """The same on another device."""
        cos, sin, ranges, heat = (x.to(device, non_blocking=True) for x in self[:-1])
        return Reach(cos, sin, ranges, heat, self.stride)


def why_not(setting: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int) -> str:
    """Why a decoding step does not take `decode`; empty if it does.

    Parameters
    ----------
    setting : str
        The setting `kernel`: "sdpa" and "reference" ask for engines of that name.
    device, dtype, head_dim
        Of the queries.
    tokens : int
        New tokens of a row.
    """
    if setting in ("sdpa", "reference"):
        return f"kernel is {setting!r}"
    if tokens > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {tokens}"
    if dtype not in (*HALF, torch.float32):
        return f"takes no {dtype}"
    if not takes_head_dim(head_dim):
        return f"takes head dims from 16 to 256 in steps of 8, not {head_dim}"
    if lack := older_than(device, _CAPABILITY):
        return lack
    return "" if AVAILABLE else "needs Triton"


def takes_head_dim(head_dim: int) -> bool:
    """Whether the kernel is made for heads of so many numbers."""
    return head_dim % 8 == 0 and 16 <= head_dim <= 256


def decode(
    q: torch.Tensor,
    k: torch.Tensor | EightBit,
    v: torch.Tensor | EightBit,
    reach: Reach,
    *,
    scale: float,
    blocks: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a few queries to the keys of all segments, one softmax over all of them.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tokens, heads, head_dim), not rotated.
    k, v : torch.Tensor, or both EightBit
        Shape (batch, room, kv_heads, head_dim) of the dtype of `q`, or in 8 bits; keys rotated. What lies outside of
        all ranges, the free room of a cache for example, is not read and may hold anything.
    reach : Reach
    scale : float
        Softmax scale without the attention temperature.
    blocks : torch.Tensor, optional
        Shape (batch, kv_heads, count), int32, in rising order, each once: numbers of the blocks of `BLOCK` keys,
        counted from index 0 of the cache, that are attended to; others are not read. Those beyond the last key are
        ignored.
    table : torch.Tensor, optional
        Shape (batch, columns), int32, rows of stride 1: the pages of each row, in order. Keys and values then have the
        shape (pages, page_size, kv_heads, head_dim), and are not in 8 bits. Columns beyond the ranges are not read.

    Returns
    -------
    torch.Tensor
        Shape and dtype of `q`; zero for a query without keys. Sums run in float32 at least.

    Raises
    ------
    TypeError
        Queries, keys and values are of different dtypes.
    """
    read = tuple(x.codes if isinstance(x, EightBit) else x for x in (k, v))
    if isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor):
        check_dtypes(q, k, v)
    if uses_triton(q, *read) and takes_head_dim(q.shape[3]):
        return decode_triton(q, k, v, reach, scale=scale, blocks=blocks, table=table)
    k, v = (x if isinstance(x, torch.Tensor) else x.numbers() for x in (k, v))
    if table is not None:
        k, v = (x[table.clamp(0, len(x) - 1)].flatten(1, 2) for x in (k, v))
    exact = torch.promote_types(q.dtype, torch.float32)
    index = torch.arange(k.shape[1], device=k.device)
    start, stop = reach.ranges[:, None, None, ..., None].unbind(-2)  # (batch, 1, 1, tokens, segments, 1)
    inside = (index >= start) & (index < stop)  # (batch, 1 or kv_heads, 1, tokens, segments, keys)
    if blocks is not None:
        inside = inside & _kept(blocks, k.shape[1])[:, :, None, None, None]
    logits = torch.zeros((), dtype=exact, device=q.device)
    for segment in range(SEGMENTS):
        rotated = cast(rotate(q, reach.cos[segment], reach.sin[segment]), q.dtype).unflatten(2, (k.shape[2], -1))
        some = torch.einsum("btngd,bsnd->bngts", rotated.to(exact), k.to(exact))
        logits = some.where(inside[..., segment, :], logits)
    logits = logits * (reach.heat[:, None, None, :, None].to(exact) * scale)
    logits = logits.masked_fill(~inside.any(-2), -torch.inf)
    weights = torch.exp(logits - logits.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(exact).min))
    used = inside.any(-2).any(3)[:, :, 0].transpose(1, 2)[..., None]
    values = v.to(exact).where(used, 0.0)
    return torch.einsum("bngts,bsnd->btngd", weights, values).flatten(2, 3).to(q.dtype)


def _kept(blocks: torch.Tensor, keys: int) -> torch.Tensor:
    """Bool of shape (batch, kv_heads, keys): the block of the key is listed."""
    count = -(-keys // BLOCK)
    listed = torch.zeros((*blocks.shape[:2], count + 1), dtype=torch.bool, device=blocks.device)
    listed.scatter_(2, blocks.long().clamp(max=count), True)
    return listed[..., :count].repeat_interleave(BLOCK, -1)[..., :keys]


class Sizes(NamedTuple):
    """How the kernel is cut: packed query rows and keys of a tile, warps, and stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def sizes(shared: int, itemsize: int, head_dim: int, rows: int) -> Sizes:
    """Sizes for `rows` packed query rows; two programs of a decoded token share the memory of a multiprocessor.

    Parameters
    ----------
    shared : int
        Shared memory that one program may have, in bytes.
    itemsize : int
        Bytes of a number of the keys.
    head_dim, rows : int
    """
    width = _padded(head_dim) * itemsize
    tile = min(64, _ROW_BYTES // width, _padded(rows))
    room = shared // _PROGRAMS_A_PROCESSOR - _SCRATCH
    keys = next((keys for keys in (64, 32) if 4 * keys * width <= room), 16)
    stages = max(2, min(4, 1 + room // (2 * keys * width)))  # the last one computes from registers
    return Sizes(max(16, tile), keys, 4 if tile * width <= 1 << 13 else 8, stages)


def split_count(programs: int, owners: int, room: int) -> int:
    """Parts that the keys of every owner (a KV head of a row, and a tile of its queries) are cut into.

    Chosen from what the cache has room for, in powers of 2 where that is short, and never from the length of a
    sequence: a sequence that grows compiles nothing.
    """
    return max(1, min(programs // owners, 1 << (-(-room // _FEWEST_KEYS) - 1).bit_length(), _MOST_SPLITS))


@lru_cache  # asked for each layer
def _cut(
    device: torch.device, itemsize: int, head_dim: int, rows: int, owners: int, room: int, codes: bool
) -> tuple[Sizes, int]:
    """Sizes for a device, and the number of splits that fills it."""
    shared, processors = _LEAST_SHARED, 1
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", shared)  # torch 2.6 does not tell
        processors = properties.multi_processor_count
    by, programs = sizes(shared, itemsize, head_dim, rows), _PROGRAMS_A_PROCESSOR
    if codes and by.warps == 4:  # which need less memory and more arithmetic
        by, programs = by._replace(warps=2, stages=min(3, by.stages)), 3
    return by, split_count(processors * programs, owners * -(-rows // by.rows), room)


def _padded(count: int) -> int:
    """`count` as a side of a tile: a power of 2 from 16 on."""
    return max(16, 1 << (count - 1).bit_length())


@on_its_device
def decode_triton(
    q: torch.Tensor,
    k: torch.Tensor | EightBit,
    v: torch.Tensor | EightBit,
    reach: Reach,
    *,
    scale: float,
    blocks: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    by: Sizes | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """See `decode`: a launch over the splits of all keys, and a small one that joins them.

    `by` and `splits`, up to 128, are for comparing sizes; left out, they are what fits the device.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows, owners = tokens * group, batch * kv_heads
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    listed = 0 if blocks is None else blocks.shape[2]
    codes = isinstance(k, EightBit)
    room = k.shape[1] if table is None else table.shape[1] * k.shape[1]
    fitting, filling = _cut(q.device, q.element_size(), head_dim, rows, owners, listed * BLOCK or room, codes)
    by, splits = by or fitting, splits or filling
    if listed and isinstance(k, EightBit) and k.bias is not None and reach.stride < by.keys:
        k = k.numbers().to(q.dtype)  # a tile of a block would reach over three chunks
        v = v.numbers().to(q.dtype) if isinstance(v, EightBit) else v
    k, k_scales, bias = _held(k)
    v, v_scales, _ = _held(v)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    sums = torch.empty((splits, owners * rows, head_dim), dtype=torch.float32, device=q.device)
    lses = torch.empty((splits, owners * rows), dtype=torch.float32, device=q.device)
    cos, sin, ranges, heat, stride = reach
    dim = _padded(head_dim)
    _decode[(splits, owners, -(-rows // by.rows))](
        q,
        k,
        v,
        cos,
        sin,
        ranges,
        heat,
        k_scales,
        v_scales,
        *((None, None) if bias is None else (bias.tile, bias.turns)),
        heat if blocks is None else blocks.contiguous(),
        table,
        sums,
        lses,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        cos.stride(0),
        cos.stride(1) if cos.shape[1] > 1 else 0,
        cos.stride(2),
        tokens,
        kv_heads,
        min(stride, room),
        listed,
        0 if table is None else table.stride(0),
        scale * math.log2(math.e),
        LISTED=0 if blocks is None else max(_FEWEST_LISTED, 1 << (-(-listed // splits) - 1).bit_length()),
        BLOCK=BLOCK,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=by.rows,
        KEYS=by.keys,
        TILE=TILE,
        PAGE=0 if table is None else k.shape[1],
        num_warps=by.warps,
        num_stages=by.stages,
    )
    _join[(owners * rows,)](
        sums,
        lses,
        out,
        tokens,
        kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM=dim,
        SPLITS=splits,
        ROOM=1 << (splits - 1).bit_length(),
        num_warps=4,
    )
    return out


def _held(x: torch.Tensor | EightBit) -> tuple[torch.Tensor, torch.Tensor | None, KeyBias | None]:
    """Numbers or codes; scales if they are codes, and the bias that they lack."""
    if isinstance(x, torch.Tensor):
        return x, None, None
    return x.codes.contiguous(), x.scales.contiguous(), x.bias


@triton.jit(do_not_specialize=("ranges", "stride"))  # a view that lies at any address
def _decode(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, ranges, heat, k_scales, v_scales, bias, frequencies, blocks, table, sums, lses,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, t_segment, t_batch, t_token,
    tokens, kv_heads, stride, listed, columns, scale,
    LISTED: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    split, owner = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (owner // kv_heads).to(tl.int64), owner % kv_heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    within = row < tokens * GROUP
    token = row // GROUP
    dim = tl.arange(0, DIM)
    real = dim < HEAD_DIM
    spot = batch * tokens + token
    # the keys that any of the queries attends to, all segments one after another, are cut evenly
    total = 0
    for segment in tl.static_range(3):
        start = tl.load(ranges + spot * 6 + 2 * segment, mask=within, other=0)
        stop = tl.load(ranges + spot * 6 + 2 * segment + 1, mask=within, other=0)
        least = tl.min(tl.where(start < stop, start, 2147483647), 0)
        most = tl.max(tl.where(start < stop, stop, 0), 0)
        total += most - tl.minimum(least, most)
    part = tl.cdiv(tl.cdiv(total, tl.num_programs(0)), KEYS) * KEYS
    first = split * part
    last = tl.minimum(first + part, total)
    if LISTED:  # or the blocks of a list are, which has so many for a part at most
        part = tl.cdiv(listed, tl.num_programs(0))
        entry = tl.arange(0, LISTED)
        blocks += owner.to(tl.int64) * listed + split * part
        mine = (entry < part) & (split * part + entry < listed)
        block = tl.load(blocks + entry, mask=mine, other=0)
    heated = tl.load(heat + spot, mask=within, other=0.0) * scale
    q += batch * q_batch + kv_head * GROUP * q_head
    q_spot = token[:, None].to(tl.int64) * q_token + (row % GROUP)[:, None] * q_head
    if k_scales is not None:
        k_scales += batch * (k_batch // HEAD_DIM) + kv_head
        v_scales += batch * (v_batch // HEAD_DIM) + kv_head
    if bias is not None:
        place = kv_head * (TILE * HEAD_DIM) + tl.arange(0, KEYS)[None, :] * HEAD_DIM + dim[:, None]
        common_tile = tl.load(bias + place, mask=real[:, None], other=0.0)
        turns = tl.load(frequencies + dim % (HEAD_DIM // 2))
        c_tile, s_tile = _turned(turns, KEYS)
    k += kv_head * k_head
    v += kv_head * v_head
    if PAGE:  # a batch of pages, those of a row anywhere
        table += batch * columns
    else:
        k += batch * k_batch
        v += batch * v_batch
    turn = batch * t_batch + token[:, None] * t_token + dim[None, :]
    turned = (dim + HEAD_DIM // 2) % HEAD_DIM
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DIM), tl.float32)
    before = 0
    for segment in range(3):
        start = tl.load(ranges + spot * 6 + 2 * segment, mask=within, other=0)
        stop = tl.load(ranges + spot * 6 + 2 * segment + 1, mask=within, other=0)
        most = tl.max(tl.where(start < stop, stop, 0), 0)
        # an empty segment starts at 0: the pipeline asks how far the loop is from its end by adding to where it starts
        least = tl.minimum(tl.min(tl.where(start < stop, start, 2147483647), 0), most)
        count = most - least
        begin = least + tl.minimum(tl.maximum(first - before, 0), count)
        end = least + tl.minimum(tl.maximum(last - before, 0), count)
        before += count
        if LISTED:  # numbers rise, so the blocks of a segment stand together
            passed = tl.sum((mine & ((block + 1) * BLOCK <= least)).to(tl.int32), 0)
            near_or_passed = tl.sum((mine & (block * BLOCK < least + count)).to(tl.int32), 0)
            begin, end = passed * BLOCK, near_or_passed * BLOCK
        inside = within[:, None] & real[None, :]
        plain = tl.load(q + q_spot + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        other = tl.load(q + q_spot + turned[None, :], mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + segment * t_segment + turn, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + segment * t_segment + turn, mask=inside, other=0.0).to(tl.float32)
        exact = plain * c + other * s
        rotated = exact.to(q.dtype.element_ty)
        # The bias of codes was rotated by the spot at which a tile begins and by the place in the tile. The first is
        # undone on the queries instead, so that one rotated tile serves all.
        across = tl.where(dim < HEAD_DIM // 2, 1.0, -1.0)[None, :] * (other * c - plain * s)
        if LISTED:
            for here in range(begin, end, KEYS):
                at = tl.load(blocks + here // BLOCK) * BLOCK + here % BLOCK + tl.arange(0, KEYS)
                near = (at >= least) & (at < least + count)
                common = None
                if bias is not None:  # a tile may reach over the border of two chunks
                    low = tl.min(at, 0) - least
                    low = low - tl.where(low < 0, -stride, low // stride * stride)
                    c_back, s_back = _turned(turns, low)
                    back = exact * c_back[None, :] + across * s_back[None, :]
                    common = tl.dot(back.to(q.dtype.element_ty), common_tile, input_precision="ieee")
                    c_back, s_back = _turned(turns, low - stride)
                    back = exact * c_back[None, :] + across * s_back[None, :]
                    after = tl.dot(back.to(q.dtype.element_ty), common_tile, input_precision="ieee")
                    common = tl.where((low + tl.arange(0, KEYS) < stride)[None, :], common, after)
                page = _pages(table, at, least + count, PAGE)
                highest, norm, result = _tile(
                    rotated, common, k, v, k_scales, v_scales, page, k_batch, v_batch, k_token, v_token, kv_heads, at,
                    near, start, stop, heated, dim, real, highest, norm, result, PAGE,
                )  # fmt: skip
        elif bias is None:
            # a page is looked up a tile ahead, else the pipeline would wait for it and load nothing meanwhile
            page = _pages(table, begin + tl.arange(0, KEYS), end, PAGE)
            for here in range(begin, end, KEYS):
                at = here + tl.arange(0, KEYS)
                near = at < end
                next_page = _pages(table, at + KEYS, end, PAGE)
                highest, norm, result = _tile(
                    rotated, None, k, v, k_scales, v_scales, page, k_batch, v_batch, k_token, v_token, kv_heads, at,
                    near, start, stop, heated, dim, real, highest, norm, result, PAGE,
                )  # fmt: skip
                page = next_page
        else:
            for chunk in range((begin - least) // stride, tl.cdiv(end - least, stride)):
                left = least + chunk * stride
                low = tl.maximum(begin, left)
                high = left + tl.minimum(end - left, stride)
                c_back, s_back = _turned(turns, low - left)
                for here in range(low, high, KEYS):
                    at = here + tl.arange(0, KEYS)
                    near = at < high
                    back = exact * c_back[None, :] + across * s_back[None, :]
                    common = tl.dot(back.to(q.dtype.element_ty), common_tile, input_precision="ieee")
                    c_next = c_back * c_tile - s_back * s_tile
                    s_back = s_back * c_tile + c_back * s_tile
                    c_back = c_next
                    highest, norm, result = _tile(
                        rotated, common, k, v, k_scales, v_scales, None, k_batch, v_batch, k_token, v_token, kv_heads,
                        at, near, start, stop, heated, dim, real, highest, norm, result, PAGE,
                    )  # fmt: skip
    if v_scales is not None:
        result *= _unit(v) / _lift(v)
    divisor = tl.where(norm > 0, norm, 1.0)
    spot = (split * tl.num_programs(1) + owner).to(tl.int64) * (tokens * GROUP) + row
    tl.store(
        sums + spot[:, None] * HEAD_DIM + dim[None, :], result / divisor[:, None], mask=within[:, None] & real[None, :]
    )
    tl.store(lses + spot, tl.where(norm > 0, highest + tl.log2(divisor), -float("inf")), mask=within)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    rotated, common, k, v, k_scales, v_scales, page, k_page, v_page, k_token, v_token, kv_heads, at, near, start, stop,
    heated, dim, real, highest, norm, result, PAGE: tl.constexpr,
):  # fmt: skip
    """The running softmax and its sum of values with the keys `at` a tile added, of which `near` are to be read.

    Logits of codes are those of their numbers but for the scale of each key, and what the keys have in `common`; the
    scale of each value goes into its weight.
    """
    if PAGE:
        page = page.to(tl.int64)
        k_spot, v_spot = page * k_page + at % PAGE * k_token, page * v_page + at % PAGE * v_token
    else:
        k_spot, v_spot = at.to(tl.int64) * k_token, at.to(tl.int64) * v_token
    spots = k + k_spot[None, :] + dim[:, None]
    keys = _numbers(tl.load(spots, mask=near[None, :] & real[:, None], other=0), rotated.dtype)
    logits = tl.dot(rotated, keys, input_precision="ieee")
    if k_scales is not None:
        logits *= (tl.load(k_scales + at.to(tl.int64) * kv_heads, mask=near, other=0.0) * _unit(k))[None, :]
    if common is not None:
        logits += common
    logits = logits * heated[:, None]
    seen = (at[None, :] >= start[:, None]) & (at[None, :] < stop[:, None]) & near[None, :]
    logits = tl.where(seen, logits, -float("inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    shrink = tl.exp2(highest - safe)
    weights = tl.exp2(logits - safe[:, None])
    norm = norm * shrink + tl.sum(weights, 1)
    if v_scales is not None:
        # lifted to the largest number of each value: a fp16 weight times a bare scale would vanish
        weights *= (tl.load(v_scales + at.to(tl.int64) * kv_heads, mask=near, other=0.0) * _lift(v))[None, :]
    spots = v + v_spot[:, None] + dim[None, :]
    values = _numbers(tl.load(spots, mask=near[:, None] & real[None, :], other=0), rotated.dtype)
    result = result * shrink[:, None]
    result += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, norm, result


@triton.jit
def _pages(table, at, end, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The page of each key `at` before `end`; any number where keys are not in pages."""
    if PAGE:
        return tl.load(table + at // PAGE, mask=at < end, other=0)
    else:
        return at


@triton.jit
def _numbers(codes, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as exact numbers of a dtype, in units of `_unit`. By bits: not every device converts floats of 8 bits."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        codes = half.to(tl.float32)  # from here it is two instructions to bf16, and slow ones from half
    return codes.to(dtype)


@triton.jit
def _unit(x):  # type: ignore[no-untyped-def]
    """What numbers of `_numbers` are to be multiplied by."""
    return 256.0 if x.dtype.element_ty == tl.uint8 else 1.0


@triton.jit
def _lift(x):  # type: ignore[no-untyped-def]
    """About the largest code: what a scale times it comes near is the largest number of its vector."""
    return 256.0 if x.dtype.element_ty == tl.uint8 else 128.0


@triton.jit
def _turned(turns, spots):  # type: ignore[no-untyped-def]
    """Cosines and sines at some spots, by frequencies in turns: whole turns are dropped while they are exact."""
    angle = turns * spots
    angle = (angle - tl.floor(angle + 0.5)).to(tl.float32) * 6.283185307179586
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    sums, lses, out, tokens, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    dim = tl.arange(0, DIM)
    real = dim < HEAD_DIM
    split = tl.arange(0, ROOM)
    spot = split.to(tl.int64) * tl.num_programs(0) + at
    lse = tl.load(lses + spot, mask=split < SPLITS, other=-float("inf"))
    highest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(highest == -float("inf"), 0.0, highest))
    norm = tl.sum(weights, 0)
    parts = tl.load(
        sums + spot[:, None] * HEAD_DIM + dim[None, :], mask=(split < SPLITS)[:, None] & real[None, :], other=0.0
    )
    result = tl.sum(parts * weights[:, None], 0) / tl.where(norm > 0, norm, 1.0)
    row, owner = at % (tokens * GROUP), at // (tokens * GROUP)
    batch, head = owner // kv_heads, owner % kv_heads * GROUP + row % GROUP
    place = (batch * tokens + row // GROUP).to(tl.int64) * (kv_heads * GROUP) + head
    tl.store(out + place * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=real)
