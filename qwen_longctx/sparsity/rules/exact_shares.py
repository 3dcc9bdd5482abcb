"""Selection by the exact share of attention of each block: what block scores estimate.

It costs more than dense attention does. It is there to tell what an estimate loses from what a density loses: the
options are those of block scores.
"""

from __future__ import annotations

import torch

from qwen_longctx.sparsity.rules import block_scores
from qwen_longctx.sparsity.rules.block_scores import Options, best_blocks
from qwen_longctx.sparsity.view import Prompt, Selection, SpanView

__all__ = ["RULE", "Options", "scores", "select"]


def select(view: SpanView, budget: torch.Tensor, prompt: Prompt) -> Selection:
    """`block_scores.best_blocks` by `scores`."""
    return best_blocks(view, view.once("scores", lambda: scores(view)), budget, prompt)


def scores(view: SpanView) -> torch.Tensor:
    """Share of the attention to blocks seen whole that each of them gets, mean over the queries of a tile.

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, tiles, blocks), float32 (float64 for float64 input), between 0 and 1.
    """
    tiles = view.tiles
    limits = (tiles.whole * tiles.size).repeat_interleave(tiles.size)
    return block_scores.exact_shares(view, limits, "mean")


RULE = block_scores.RULE._replace(select=select)
