"""Query tiles of a span and what they see of the blocks of keys. Blocks are counted from position 0."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx.geometry.positions import Span


def pairs_of(span: Span, size: int) -> int:
    """Pairs of a tile of the span and a block of which its last query sees something."""
    ends = range(span.start + size, span.stop + size, size)
    return sum((min(end, span.stop) - 1) // size + 1 for end in ends)


class Tiles(NamedTuple):
    """Tiles of `size` queries, the last may be shorter.

    Attributes
    ----------
    starts, stops : torch.Tensor
        Shape (tiles,), int32: positions of the first query and of the one after the last.
    whole : torch.Tensor
        Shape (tiles,), int32: leading blocks that every query of the tile sees whole.
    visible : torch.Tensor
        Shape (tiles,), int32: leading blocks of which the tile's last query sees something.
    size : int
    blocks : int
        Blocks that the last tile sees.
    pairs : int
        Pairs of a tile and a block it sees, the denominator of the density.
    """

    starts: torch.Tensor
    stops: torch.Tensor
    whole: torch.Tensor
    visible: torch.Tensor
    size: int
    blocks: int
    pairs: int

    @classmethod
    def of(cls, span: Span, size: int, device: torch.device) -> Tiles:
        """The tiles of one span."""
        starts = torch.arange(span.start, span.stop, size, dtype=torch.int32, device=device)
        stops = (starts + size).clamp(max=span.stop)
        blocks = (span.stop - 1) // size + 1
        return cls(starts, stops, (starts + 1) // size, (stops - 1) // size + 1, size, blocks, pairs_of(span, size))

    def sees(self) -> torch.Tensor:
        """Bool of shape (tiles, blocks): the last query of the tile sees something of the block."""
        return torch.arange(self.blocks, device=self.visible.device) < self.visible[:, None]
