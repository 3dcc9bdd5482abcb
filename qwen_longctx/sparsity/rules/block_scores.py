"""Selection by block scores: pooled queries of a tile against means of keys, a softmax a row, the best blocks kept.

After the block selection of FlashPrefill (arXiv 2603.06199) with changes that the project measured on Qwen2.5: rows are
normalised one by one, and a block counts as much as the row that wants it most, so that a few queries which look
elsewhere are served; and means are of 32 keys, which rank blocks of 128 nearly as well as their true share does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional

from qwen_longctx.config import share
from qwen_longctx.errors import InvalidValue
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.block_shares import block_shares
from qwen_longctx.ops.keep import By, keep
from qwen_longctx.ops.row_lse import joint_lse
from qwen_longctx.sparsity.rules.rule import Rule
from qwen_longctx.sparsity.view import Prompt, Selection, SpanView

MEANS_A_BLOCK = 4
POOLED_ROWS = 8  # a tile; neighbours ask for much the same
SINK = 1  # blocks at the start kept always, beside those that a tile sees in part
MASS = 0.93  # within the trained length
FAR = 16  # times that length: beyond it the rule changes until there, and was measured until there
FAR_MASS = 0.85, 0.35  # just beyond the trained length, and at FAR
NEAR = 96  # at FAR the nearest of so many blocks is kept always, before it fewer


@dataclass(frozen=True)
class Options:
    """What block scores keep, instead of their own choice; None leaves the choice to the rule.

    Attributes
    ----------
    density : float, optional
        Share of the blocks; beside one of the others it is their limit.
    mass : float, optional
        Share of the scored mass.
    score_threshold : float, optional
        Fraction of a tile's best score from which on a block is kept.

    Raises
    ------
    TypeError, ValueError
        One is no number above 0 and up to 1, or both a mass and a threshold are given.
    """

    density: float | None = None
    mass: float | None = None
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, share(field.name, value))
        if self.mass is not None and self.score_threshold is not None:
            raise InvalidValue(
                "mass and score_threshold are given: a head's budget follows one of them, leave the other out"
            )

    @property
    def fixed(self) -> bool:
        """Whether the user says what is kept, so that budgets are not steered unless a recall is asked for."""
        return any(getattr(self, field.name) is not None for field in fields(self))


def select(view: SpanView, budget: torch.Tensor, prompt: Prompt) -> Selection:
    """Keep the best blocks until their scores are a share of the sum, a tile and a head at a time: `default_mass`.

    Such a share gives every tile the number of blocks it needs. With a density, mass or threshold in the settings,
    that instead. A budget of b divides what a mass leaves out and a threshold by b, and multiplies a density by it.
    The blocks before a tile are kept always, see `window`.
    """
    options, times, budget = prompt.options, prompt.times_trained, budget[:, None]
    mass = options.mass if options.fixed else default_mass(times)
    by: By = "threshold" if mass is None else "mass"
    amount = (options.score_threshold or 0.0) / budget if mass is None else 1 - (1 - mass) / budget
    most = None
    if options.density is not None:
        most = (options.density * budget * view.tiles.visible).ceil().to(torch.int32)
    estimates = view.once("scores", lambda: scores(view))
    kept = keep(estimates, view.tiles, amount, by=by, most=most, sink=SINK, window=window(view.tiles, times))
    return Selection(kept)


def default_mass(times: float) -> float:
    """Share of the scored mass kept on a prompt `times` as long as the model was trained to attend.

    Within the trained length attention is worth keeping. Beyond it ever more of it spreads over keys at distances that
    the model never learned to tell apart: on Qwen2.5 it costs blocks and, from 16 times that length on, likelihood.
    """
    if times <= 1:
        return MASS
    first, last = FAR_MASS
    return first + (last - first) * min(math.log(times, FAR), 1.0)


def window(tiles: Tiles, times: float) -> torch.Tensor:
    """Blocks just before each tile that are kept whatever they score, shape (tiles,), int32.

    One, and on long prompts a share of those seen that grows with the prompt: the more keys lie beyond the trained
    length, the more of the likelihood is in the near ones.
    """
    return (tiles.whole * min(times / FAR, 1.0) / NEAR).to(torch.int32).clamp(min=1)


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
    shares = [
        block_shares(q, k, lse, limit, rows=POOLED_ROWS, per_block=MEANS_A_BLOCK, scale=view.scale)
        for q, k, limit in parts
    ]
    joined = torch.cat(shares, dim=3)
    return functional.pad(joined, (0, view.tiles.blocks - joined.shape[3]))


def _pool(q: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Means of neighbouring queries, shape (batch, tiles * POOLED_ROWS, heads, head_dim); the last query fills up."""
    missing = len(tiles.starts) * tiles.size - q.shape[1]
    if missing:
        q = torch.cat((q, q[:, -1:].expand(-1, missing, -1, -1)), dim=1)
    return q.unflatten(1, (-1, tiles.size // POOLED_ROWS)).mean(dim=2)


RULE = Rule(select, start=1.0, lowest=1.0, highest=8.0, recall_target=0.1)
