"""Block lists: which blocks of keys each tile of queries attends to, and how to make them from a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx.ops.device import uses_triton


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
        Tokens a tile of queries and a block of keys.
    """

    counts: torch.Tensor
    indices: torch.Tensor
    size: int


def compact(mask: torch.Tensor, size: int) -> BlockLists:
    """Lists of the blocks set in `mask`, bool of shape (batch, heads, tiles, blocks)."""
    if uses_triton(mask):
        from qwen_longctx.ops import gpu

        counts, indices = gpu.compact(mask)
        return BlockLists(counts, indices, size)
    counts = mask.sum(dim=-1, dtype=torch.int32)
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return BlockLists(counts, order.to(torch.int32), size)
