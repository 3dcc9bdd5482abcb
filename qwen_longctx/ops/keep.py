"""From scores of blocks to the blocks that are kept: by mass or by a threshold, up to a count."""

from __future__ import annotations

from typing import Literal

import torch

from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.device import uses_triton

By = Literal["mass", "threshold"]


def keep(
    scores: torch.Tensor,
    tiles: Tiles,
    amount: torch.Tensor,
    *,
    by: By,
    most: torch.Tensor | None = None,
    sink: int,
    window: int | torch.Tensor,
) -> torch.Tensor:
    """Which blocks every tile keeps.

    The first `sink` blocks, the last `window` blocks that a tile sees whole and all that it sees in part are kept
    always. Of the others

    - "mass" keeps the fewest whose scores, with those kept always, reach `amount` of the sum;
    - "threshold" keeps those with at least `amount` times the best score;

    or as many of the best of these as `most` allows, which counts those kept always too. Equal scores are kept or
    dropped together; a score of 0 is dropped, unless everything is wanted (a mass of 1 or a threshold of 0, and `most`
    no less than all blocks).

    Parameters
    ----------
    scores : torch.Tensor
        Shape (batch, heads, tiles, blocks), not negative; read for blocks that are seen whole.
    tiles : Tiles
    amount : torch.Tensor
        Shape (heads, tiles) or one that expands to it, floating point.
    by : {"mass", "threshold"}
    most : torch.Tensor, optional
        Likewise, int32: blocks.
    sink : int
        Blocks.
    window : int or torch.Tensor
        Blocks, for all tiles or of shape (tiles,), int32.

    Returns
    -------
    torch.Tensor
        Bool, of the shape of `scores`.
    """
    if uses_triton(scores):
        from qwen_longctx.ops import gpu

        return gpu.keep(scores, tiles.whole, tiles.visible, amount, by=by, most=most, sink=sink, window=window)
    block = torch.arange(tiles.blocks, device=scores.device)
    whole = block < tiles.whole[:, None]
    always = tiles.sees() & (~whole | (block < sink) | (block >= (tiles.whole - window)[:, None]))
    scores = scores.masked_fill(~whole, 0.0)
    choice = scores.masked_fill(always, 0.0)
    everything = amount >= 1 if by == "mass" else amount <= 0
    if most is not None:
        everything = everything & (most >= tiles.visible)
    chosen = (choice > 0) & (choice >= _lowest(scores, choice, always, amount, by, most))
    return always | chosen | (everything[..., None] & whole)


def _lowest(
    scores: torch.Tensor,
    choice: torch.Tensor,
    always: torch.Tensor,
    amount: torch.Tensor,
    by: By,
    most: torch.Tensor | None,
) -> torch.Tensor:
    """Lowest score that is kept, shape (batch, heads, tiles, 1); infinite if none is."""
    ordered = choice.sort(dim=-1, descending=True).values
    wanted = torch.full(choice.shape[:-1], choice.shape[-1], device=choice.device)
    if most is not None:
        wanted = torch.minimum(wanted, most - always.sum(dim=-1))
    if by == "mass":
        missing = amount * scores.sum(dim=-1) - (scores * always).sum(dim=-1)
        wanted = torch.minimum(wanted, (ordered.cumsum(dim=-1) - ordered < missing[..., None]).sum(dim=-1))
    lowest = ordered.gather(-1, (wanted - 1).clamp(min=0)[..., None])
    lowest = lowest.masked_fill(wanted[..., None] <= 0, torch.inf)
    if by == "threshold":
        lowest = torch.maximum(lowest, scores.amax(dim=-1, keepdim=True) * amount[..., None])
    return lowest
