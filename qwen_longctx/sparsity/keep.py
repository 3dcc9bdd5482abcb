"""From scores of blocks to the blocks that are kept: by count, by mass or by a threshold."""

from __future__ import annotations

from typing import Literal

import torch

from qwen_longctx.kernels.device import uses_triton
from qwen_longctx.sparsity.tiles import Tiles

By = Literal["count", "mass", "threshold"]


def keep(scores: torch.Tensor, tiles: Tiles, amount: torch.Tensor, *, by: By, sink: int, window: int) -> torch.Tensor:
    """Which blocks every tile keeps.

    The first `sink` blocks, the last `window` blocks that a tile sees whole and all that it sees in part are kept
    always. Of the others

    - "count" keeps the best until `amount` are kept, the ones kept always among them;
    - "mass" keeps the fewest whose scores, with those kept always, reach `amount` of the sum;
    - "threshold" keeps those with at least `amount` times the best score.

    Equal scores are kept or dropped together; a score of 0 is dropped, unless everything is wanted (a count of all
    blocks, a mass of 1, a threshold of 0).

    Parameters
    ----------
    scores : torch.Tensor
        Shape (batch, heads, tiles, blocks), not negative; read for blocks that are seen whole.
    tiles : Tiles
    amount : torch.Tensor
        Shape (heads, tiles): int32 blocks for "count", else float32.
    by : {"count", "mass", "threshold"}
    sink, window : int
        Blocks.

    Returns
    -------
    torch.Tensor
        Bool, of the shape of `scores`.
    """
    if uses_triton(scores):
        from qwen_longctx.kernels import gpu

        return gpu.keep(scores, tiles.whole, tiles.visible, amount, by=by, sink=sink, window=window)
    block = torch.arange(tiles.blocks, device=scores.device)
    whole = block < tiles.whole[:, None]
    always = tiles.sees() & (~whole | (block < sink) | (block >= tiles.whole[:, None] - window))
    choice = scores.masked_fill(~whole | always, 0.0)
    lowest = _lowest(scores.masked_fill(~whole, 0.0), choice, always, amount, by)
    return always | ((choice > 0) & (choice >= lowest)) | (_everything(amount, tiles, by)[..., None] & whole)


def _everything(amount: torch.Tensor, tiles: Tiles, by: By) -> torch.Tensor:
    if by == "count":
        return amount >= tiles.visible
    return amount >= 1 if by == "mass" else amount <= 0


def _lowest(
    scores: torch.Tensor, choice: torch.Tensor, always: torch.Tensor, amount: torch.Tensor, by: By
) -> torch.Tensor:
    """Lowest score that is kept, shape (batch, heads, tiles, 1); infinite if none is."""
    if by == "threshold":
        return scores.amax(dim=-1, keepdim=True) * amount[..., None]
    ordered = choice.sort(dim=-1, descending=True).values
    if by == "count":
        wanted = amount - always.sum(dim=-1)
    else:
        missing = amount * scores.sum(dim=-1) - (scores * always).sum(dim=-1)
        wanted = (ordered.cumsum(dim=-1) - ordered < missing[..., None]).sum(dim=-1)
    wanted = wanted.expand(choice.shape[:-1]).clamp(max=choice.shape[-1])
    lowest = ordered.gather(-1, (wanted - 1).clamp(min=0).long()[..., None])
    return lowest.masked_fill(wanted[..., None] <= 0, torch.inf)
