"""Selection by block scores: pooled queries of a tile against means of keys, a softmax a row, the best blocks kept.

After the block selection of FlashPrefill (arXiv 2603.06199) with changes that the project measured on Qwen2.5: rows are
normalised one by one, and a block counts as much as the row that wants it most, so that a few queries which look
elsewhere are served; and means are of 32 keys, which rank blocks of 128 nearly as well as their true share does.

Means do not show the one key that a query looks up far away. Few heads do that, and the same ones all along a text:
they are found by the attention of each span's last tile, and attend to everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from qwen_longctx.config import share
from qwen_longctx.errors import InvalidValue
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.block_shares import Pool, joint_shares
from qwen_longctx.ops.keep import By, keep
from qwen_longctx.sparsity.rules.rule import Rule
from qwen_longctx.sparsity.view import Prompt, Selection, SpanView

MEANS_A_BLOCK = 4
POOLED_ROWS = 8  # a tile; neighbours ask for much the same
SINK = 1  # blocks at the start kept always, beside those that a tile sees in part
# Share of the scored mass at lengths of the prompt, in trained lengths; between them it follows their logarithm
MASSES = {
    "fast": ((1.0, 0.93), (1.0, 0.85), (16.0, 0.35)),
    "balanced": ((8.0, 0.93), (16.0, 0.85)),
    "careful": ((8.0, 0.97), (16.0, 0.93)),
}
_AMOUNTS = ("density", "mass", "score_threshold")  # settings that take the place of a fidelity
# Share of a query's attention in one block that its head drops, from which on the head drops none
MISSED = {"fast": None, "balanced": 0.2, "careful": 0.05}
FAR, NEAR = 16, 96  # at FAR trained lengths the nearest of NEAR blocks is kept always, before it fewer


@dataclass(frozen=True)
class Options:
    """What is kept: as much as a fidelity asks for, or one of the others in its place.

    Attributes
    ----------
    fidelity : {"fast", "balanced", "careful"}
        See `mass_of`.
    density : float, optional
        Share of the blocks; beside one of the others it is their limit.
    mass : float, optional
        Share of the scored mass.
    score_threshold : float, optional
        Fraction of a tile's best score from which on a block is kept.

    Raises
    ------
    TypeError, ValueError
        One is no number above 0 and up to 1, there is no such fidelity, or two settings say how much is kept.
    """

    fidelity: str = "balanced"
    density: float | None = None
    mass: float | None = None
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in _AMOUNTS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, share(name, value))
        if not isinstance(self.fidelity, str) or self.fidelity not in MASSES:
            raise InvalidValue(f"fidelity must be one of {', '.join(MASSES)}, got {self.fidelity!r}")
        if self.fixed and self.fidelity != "balanced":
            raise InvalidValue(
                f"fidelity={self.fidelity!r} is given beside density, mass or score_threshold, which replace it: leave "
                "one out"
            )
        if self.mass is not None and self.score_threshold is not None:
            raise InvalidValue(
                "mass and score_threshold are given: a head's budget follows one of them, leave the other out"
            )

    @property
    def fixed(self) -> bool:
        """Whether the user says what is kept, so that budgets are not steered unless a recall is asked for."""
        return any(getattr(self, name) is not None for name in _AMOUNTS)


def select(view: SpanView, budget: torch.Tensor, prompt: Prompt) -> Selection:
    """`best_blocks` by `scores`; where a fidelity says how much is kept, also all blocks for heads that `miss` some."""
    selection = best_blocks(view, view.once("scores", lambda: scores(view)), budget, prompt)
    most = None if prompt.options.fixed else MISSED[prompt.options.fidelity]
    if most is None:
        return selection
    return Selection(selection.mask | (miss(view, selection.mask, most) & view.tiles.sees()))


def best_blocks(view: SpanView, estimates: torch.Tensor, budget: torch.Tensor, prompt: Prompt) -> Selection:
    """Keep the best blocks until their scores are a share of the sum, a tile and a head at a time: `mass_of`.

    Such a share gives every tile the number of blocks it needs. With a density, mass or threshold in the settings,
    that instead. A budget of b divides what a mass leaves out and a threshold by b, and multiplies a density by it.
    The blocks before a tile are kept always, see `window`.

    Parameters
    ----------
    view : SpanView
    estimates : torch.Tensor
        Scores of shape (batch, heads, tiles, blocks), not negative.
    budget : torch.Tensor
        Shape (heads,), float32.
    prompt : Prompt
    """
    options, times, budget = prompt.options, prompt.times_trained, budget[:, None]
    mass = options.mass if options.fixed else mass_of(options.fidelity, times)
    by: By = "threshold" if mass is None else "mass"
    amount = (options.score_threshold or 0.0) / budget if mass is None else 1 - (1 - mass) / budget
    most = None
    if options.density is not None:
        most = (options.density * budget * view.tiles.visible).ceil().to(torch.int32)
    return Selection(keep(estimates, view.tiles, amount, by=by, most=most, sink=SINK, window=window(view.tiles, times)))


def mass_of(fidelity: str, times: float) -> float:
    """Share of the scored mass that is kept on a prompt `times` as long as the model was trained to attend.

    Up to eight times the trained length "balanced" keeps the likelihood of text and of most answers; "careful" halves
    what is left out. Beyond it attention spreads over keys at distances that the model never learned to tell apart,
    and keeping less costs no likelihood. "fast" gives up retrieval of one key among thousands for blocks from the
    trained length on.
    """
    points = MASSES[fidelity]
    if times <= points[0][0]:
        return points[0][1]
    for (start, first), (stop, last) in pairwise(points):
        if start < times <= stop:
            return first + (last - first) * math.log(times / start) / math.log(stop / start)
    return points[-1][1]


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
    for segment, q in view.pieces[::-1]:
        first = segment.key_start // size
        parts.append((_pool(q, view.tiles), means[:, first : segment.key_stop // size], limits - first))
    blocks = view.tiles.blocks
    return joint_shares(parts, rows=POOLED_ROWS, per_block=MEANS_A_BLOCK, scale=view.scale, blocks=blocks)


def miss(view: SpanView, mask: torch.Tensor, most: float) -> torch.Tensor:
    """Whether a query of the span's last tile has more than a share `most` of its attention in one dropped block.

    Parameters
    ----------
    view : SpanView
    mask : torch.Tensor
        Shape (batch, heads, tiles, blocks), bool: blocks kept.
    most : float

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, 1, 1), bool.
    """
    wanted = view.once("wanted", lambda: largest_shares(view.last_tile()))
    return (wanted.masked_fill(mask[:, :, -1:], 0.0) > most).any(dim=3, keepdim=True)


def largest_shares(view: SpanView) -> torch.Tensor:
    """`exact_shares` of all that the queries see, the largest of a tile."""
    limits = view.span.start + 1 + torch.arange(len(view.tiles.starts) * view.tiles.size, device=view.k.device)
    return exact_shares(view, limits.clamp(max=view.span.stop), "max")  # the last query fills the last tile up


def exact_shares(view: SpanView, limits: torch.Tensor, pool: Pool) -> torch.Tensor:
    """Share of attention that the queries of each tile give each block, exactly: it costs as dense attention does.

    Parameters
    ----------
    view : SpanView
    limits : torch.Tensor
        Shape (tiles * size,), integer: each query attends to this many keys from position 0 on.
    pool : {"max", "mean"}
        The largest share of a tile, or the mean.

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, tiles, blocks), float32 (float64 for float64 input), between 0 and 1.
    """
    tiles = view.tiles
    parts = [(in_tiles(q, tiles), view.keys(segment), limits - segment.key_start) for segment, q in view.pieces[::-1]]
    return joint_shares(parts, rows=tiles.size, per_block=tiles.size, scale=view.scale, blocks=tiles.blocks, pool=pool)


def _pool(q: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Means of neighbouring queries, shape (batch, tiles * POOLED_ROWS, heads, head_dim)."""
    return in_tiles(q, tiles).unflatten(1, (-1, tiles.size // POOLED_ROWS)).mean(dim=2)


def in_tiles(q: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Queries of whole tiles, shape (batch, tiles * size, heads, head_dim): the last query fills the last tile up."""
    missing = len(tiles.starts) * tiles.size - q.shape[1]
    return torch.cat((q, q[:, -1:].expand(-1, missing, -1, -1)), dim=1) if missing else q


RULE = Rule(select, start=1.0, lowest=1.0, highest=8.0, recall_target=0.1)
