"""Block lists: which blocks of keys each tile of queries attends to, and how to make them from a mask."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

_WIDTH = 1024  # blocks at a time; narrower rows are no faster, and each width is compiled anew


class BlockLists(NamedTuple):
    """Key blocks of every query tile, one list for each query head.

    Attributes
    ----------
    counts : torch.Tensor
        Shape (batch, heads, tiles), int32: blocks listed.
    indices : torch.Tensor
        Shape (batch, heads, tiles, blocks), int32: ascending up to the count, valid but meaningless beyond it. Kernels
        that mask the last, incomplete block only where it is the last of a list rely on the order.
    size : int
        Tokens per tile of queries and per block of keys.
    """

    counts: torch.Tensor
    indices: torch.Tensor
    size: int


def compact(mask: torch.Tensor, size: int) -> BlockLists:
    """Lists of the blocks set in `mask`, bool of shape (batch, heads, tiles, blocks)."""
    if uses_triton(mask):
        counts, indices = compact_triton(mask)
        return BlockLists(counts, indices, size)
    counts = mask.sum(dim=-1, dtype=torch.int32)
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return BlockLists(counts, order.to(torch.int32), size)


@on_its_device
def compact_triton(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `compact`: counts and indices."""
    *lead, blocks = mask.shape
    rows = math.prod(lead)
    counts = torch.empty(lead, dtype=torch.int32, device=mask.device)
    indices = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    if rows and blocks:
        flat = mask.contiguous().view(torch.uint8)
        _compact[(rows,)](flat, counts, indices, blocks, WIDTH=_WIDTH, num_warps=4)
    else:
        counts.zero_()
    return counts, indices


@triton.jit(do_not_specialize=("blocks",))
def _compact(mask, counts, indices, blocks, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    listed = 0
    for first in range(0, blocks, WIDTH):
        at = first + tl.arange(0, WIDTH)
        kept = tl.load(mask + row * blocks + at, mask=at < blocks, other=0).to(tl.int32)
        place = listed + tl.cumsum(kept, 0) - 1
        tl.store(indices + row * blocks + place, at, mask=kept > 0)
        listed += tl.sum(kept, 0)
    tl.store(counts + row, listed)
