"""Which blocks of keys a decoding step attends to, chosen on the device from means of keys."""

from __future__ import annotations

import torch

from qwen_longctx.kv.store import KeyValues
from qwen_longctx.ops.decode import BLOCK, SEGMENTS, Reach
from qwen_longctx.ops.device import cast
from qwen_longctx.ops.rotate import rotate

MEAN = 32  # keys of a mean; reading the means costs 1/64 of reading keys and values
LEAST = 4096  # keys that a KV head keeps whatever the share: shorter sequences are attended to exactly
NEWEST = 1024  # keys at the end that are kept always
_STEP = 16384  # the number of blocks follows the length in such steps, so that shapes stay while a sequence grows


def blocks_kept(share: float, length: int) -> int | None:
    """Blocks that a KV head keeps of a cache of `length` tokens; None where those are all."""
    whole = -(-length // _STEP) * _STEP
    count = max(LEAST // BLOCK, -(-int(share * whole) // BLOCK))
    return count if count < -(-length // BLOCK) else None


def choose(q: torch.Tensor, kv: KeyValues, reach: Reach, length: int, count: int, *, scale: float) -> torch.Tensor:
    """The `count` blocks of `ops.decode.BLOCK` keys that score best, for each row and KV head.

    A query scores each mean of 32 keys with its rotation for the segment in which the last of those keys lies, and
    takes a softmax over all means of its row. A mean counts as the query that wants it most, among the new tokens and
    the heads of a group, and a block scores the sum of its means. The block in which a row begins, the one after it,
    and the newest 1,024 keys are kept always. Nothing waits for the device, and no shape depends on its numbers.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tokens, heads, head_dim), not rotated.
    kv : KeyValues
    reach : Reach
    length : int
        Keys in the cache.
    count : int
        Less than the blocks of the cache.
    scale : float
        Softmax scale without the attention temperature.

    Returns
    -------
    torch.Tensor
        Shape (batch, kv_heads, count), int32, in rising order.
    """
    means = kv.key_means(MEAN)[:, : length // MEAN]
    kv_heads = means.shape[2]
    start, stop = reach.ranges.unbind(-1)  # (batch, tokens, segments)
    begins = start.masked_fill(start >= stop, length).amin((1, 2))[:, None]  # (batch, 1)
    first = torch.arange(0, means.shape[1] * MEAN, MEAN, device=q.device)
    inside = (first + MEAN > start[..., None]) & (first + MEAN <= stop[..., None])  # the last key of a mean
    inside = (inside & (first >= begins)[:, None, None])[:, None, None]  # (batch, 1, 1, tokens, segments, means)
    turned = torch.stack([cast(rotate(q, reach.cos[s], reach.sin[s]), q.dtype) for s in range(SEGMENTS)], 2)
    turned = turned.unflatten(3, (kv_heads, -1))  # (batch, tokens, segments, kv_heads, group, head_dim)
    each = torch.einsum("btxngd,bmnd->bngtxm", turned, means)
    logits = each.masked_fill(~inside, 0.0).sum(-2, dtype=torch.promote_types(q.dtype, torch.float32))
    logits = logits * (reach.heat[:, None, None, :, None].to(logits) * scale)
    logits = logits.masked_fill(~inside.any(-2), torch.finfo(logits.dtype).min)
    shares = logits.softmax(-1).amax((2, 3))  # (batch, kv_heads, means)
    block = torch.arange(-(-length // BLOCK), device=q.device)
    per_block = BLOCK // MEAN
    shares = torch.nn.functional.pad(shares, (0, len(block) * per_block - shares.shape[2]))
    always = (block >= begins // BLOCK) & (block <= begins // BLOCK + 1) | (block * BLOCK + BLOCK > length - NEWEST)
    scores = shares.unflatten(2, (-1, per_block)).sum(3).masked_fill(always[:, None], 2.0)
    return scores.topk(count, -1, sorted=False).indices.sort(-1).values.to(torch.int32)
