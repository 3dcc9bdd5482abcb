"""Selection by block scores: pooled queries of a tile against means of keys, a softmax a row, the best blocks kept.

After the block selection of FlashPrefill (arXiv 2603.06199) with changes that the project measured on Qwen2.5: rows are
normalised one by one, and a block counts as much as the row that wants it most, so that a few queries which look
elsewhere are served; and means are of 32 keys, which rank blocks of 128 nearly as well as their true share does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from qwen_longctx.kernels.lse import joint_lse
from qwen_longctx.kernels.scores import block_shares
from qwen_longctx.sparsity.keep import By, keep
from qwen_longctx.sparsity.rule import Rule
from qwen_longctx.sparsity.tiles import Tiles
from qwen_longctx.sparsity.view import Selection, SpanView

if TYPE_CHECKING:
    from qwen_longctx.sparsity.state import Request

MEANS_A_BLOCK = 4
POOLED_ROWS = 8  # a tile; neighbours ask for much the same
SINK, WINDOW = 1, 1  # blocks kept always, beside those that a tile sees in part
THRESHOLD = 0.02  # of a tile's best score
LIMIT = 1.1  # blocks for each square root of the blocks seen, beyond the trained length


def select(view: SpanView, budget: torch.Tensor, request: Request) -> Selection:
    """Keep the blocks that score at least some fraction of a tile's best, `THRESHOLD`.

    Such a threshold gives every tile the number of blocks it needs. Beyond the trained length, where diffuse heads
    would take far more than they are worth, a tile of n blocks keeps at most ``LIMIT * sqrt(n)``. With a density, mass
    or threshold in the settings, that instead of both. A budget of b divides a threshold, and what a mass leaves out,
    by b, and multiplies a limit by it.
    """
    settings, visible, budget = request.settings, view.tiles.visible, budget[:, None]
    shape = (view.heads, len(visible))
    by: By = "threshold" if settings.mass is None else "mass"
    if settings.mass is not None:
        amount = 1 - (1 - settings.mass) / budget
    elif settings.has_share:
        amount = (settings.score_threshold or 0.0) / budget
    else:
        amount = THRESHOLD / budget
    most = None
    if settings.density is not None:
        most = (settings.density * budget * visible).ceil().to(torch.int32)
    elif not settings.has_share and request.beyond_trained:
        most = (LIMIT * budget * visible.sqrt()).ceil().to(torch.int32)
    found = view.once("scores", lambda: scores(view))
    kept = keep(found, view.tiles, amount.expand(shape), by=by, most=most, sink=SINK, window=WINDOW)
    return Selection(kept)


def scores(view: SpanView) -> torch.Tensor:
    """Estimated share of attention that each block gets from the query of a tile that wants it most.

    Among blocks seen whole.

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, tiles, blocks), float32 (float64 for float64 input), between 0 and 1.
    """
    size = view.tiles.size // MEANS_A_BLOCK
    means = view.key_means(size)
    limits = (view.tiles.whole * MEANS_A_BLOCK).repeat_interleave(POOLED_ROWS)
    parts = []
    for segment, q in reversed(view.pieces):
        first = segment.key_start // size
        parts.append((_pool(q, view.tiles), means[:, first : segment.key_stop // size], limits - first))
    lse = joint_lse(parts, scale=view.scale)
    found = [
        block_shares(q, k, lse, met, rows=POOLED_ROWS, per_block=MEANS_A_BLOCK, scale=view.scale) for q, k, met in parts
    ]
    joined = torch.cat(found, dim=3)
    return functional.pad(joined, (0, view.tiles.blocks - joined.shape[3]))


def _pool(q: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Means of neighbouring queries, shape (batch, tiles * POOLED_ROWS, heads, head_dim); the last query fills up."""
    missing = len(tiles.starts) * tiles.size - q.shape[1]
    if missing:
        q = torch.cat((q, q[:, -1:].expand(-1, missing, -1, -1)), dim=1)
    return q.unflatten(1, (-1, tiles.size // POOLED_ROWS)).mean(dim=2)


RULE = Rule(select, start=1.0, lowest=1.0, highest=8.0, recall_target=0.5)
