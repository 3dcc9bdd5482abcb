"""How many blocks of keys a decoding step keeps, and which."""

from __future__ import annotations

import torch

from qwen_longctx.kv.store import KeyValues
from qwen_longctx.ops.choose import MEAN, choose
from qwen_longctx.ops.decode import BLOCK, Reach

LEAST = 4096  # keys that a KV head keeps whatever the share: shorter sequences are attended to exactly
NEWEST = 1024  # keys at the end that are kept always
_STEP = 16384  # the number of blocks follows the length in such steps, so that shapes stay while a sequence grows


def blocks_kept(share: float, length: int) -> int | None:
    """Blocks that a KV head keeps of a cache of `length` tokens; None where those are all."""
    whole = -(-length // _STEP) * _STEP
    count = max(LEAST // BLOCK, -(-int(share * whole) // BLOCK))
    return count if count < -(-length // BLOCK) else None


def chosen_blocks(
    q: torch.Tensor,
    kv: KeyValues,
    reach: Reach,
    length: int,
    share: float | None,
    *,
    scale: float,
    slot: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The blocks that `decode` is to attend to, as it takes them; None where those are all.

    Parameters
    ----------
    q, reach, scale
        See `ops.choose.choose`.
    kv : KeyValues
    length : int
        Keys in the cache: it says how many blocks are kept. Where they end says the device.
    share : float, optional
        Of the keys; None keeps all.
    slot : torch.Tensor, optional
        See `KeyValues.means_room`.
    """
    count = None if share is None else blocks_kept(share, length)
    if count is None:
        return None
    means = kv.means_room(MEAN, slot)
    return choose(q, means, reach, kv.size()[0], count, scale=scale, newest=NEWEST)
