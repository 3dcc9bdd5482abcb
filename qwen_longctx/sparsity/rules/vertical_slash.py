"""Vertical-slash selection (MInference, arXiv 2407.02490) as Qwen2.5-1M runs it on dual chunk attention.

The last queries of a span score all keys; each head keeps its best columns (verticals: single keys for all queries) and
its best diagonals (slashes: keys at one distance from each query). For selection only, queries rotate towards earlier
chunks at unclamped positions, so that diagonals stay diagonals (Qwen2.5-1M report, section 5.2).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.device import on_device
from qwen_longctx.ops.row_lse import joint_lse, row_logits
from qwen_longctx.sparsity.rules.rule import NoOptions, Rule
from qwen_longctx.sparsity.view import Prompt, Selection, SpanView

FORCED_COLUMNS = 30
FORCED_DIAGONALS = 100
_KEYS_AT_A_TIME = 1 << 16  # bounds the shares that exist at once

Options = NoOptions


def select(view: SpanView, budget: torch.Tensor, prompt: Prompt) -> Selection:
    """Keep columns, and the blocks that diagonals pass through: `budget` times the checkpoint's numbers of them."""
    sizes = prompt.head_budgets
    assert sizes is not None
    numbers = sizes.verticals[view.layer], sizes.slashes[view.layer]
    verticals, slashes = (_times(budget, one) for one in numbers)
    # budgets that nobody steers are 1, so that nothing has to be read from the device
    most = None if prompt.steered else (max(numbers[0]), max(numbers[1]))
    columns, distances = indices(view, verticals, slashes, prompt.last_q, most)
    return Selection(_blocks(distances, view.tiles), columns)


def _times(budget: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    return (on_device(numbers, torch.int64, budget.device) * budget).round().long()


def indices(
    view: SpanView,
    verticals: torch.Tensor,
    slashes: torch.Tensor,
    last_q: int,
    most: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns and diagonals that each head keeps.

    Parameters
    ----------
    view : SpanView
    verticals, slashes : torch.Tensor
        Shape (heads,), int64: columns and diagonals of each head, forced ones among them. All forced ones are kept,
        also where a number is smaller.
    last_q : int
        Queries that score the keys.
    most : tuple of int, optional
        The largest of `verticals` and of `slashes`; without them the host waits for the device to tell.

    Returns
    -------
    columns, distances : torch.Tensor
        Shape (batch, heads, most of any head), int64: positions of columns, and distances of diagonals from the query;
        a head with fewer is filled up with -1.
    """
    rows = min(last_q, view.span.stop - view.span.start)
    column_sums, diagonal_sums = view.once("sums", lambda: _sums(view, rows))
    column_sums[..., :FORCED_COLUMNS] = torch.inf
    diagonal_sums[..., -FORCED_DIAGONALS:] = torch.inf
    # never fewer than the forced ones: among those, equal sums would choose
    longest, broadest = most or (int(verticals.max()), int(slashes.max()))
    distance = _best(diagonal_sums, slashes.clamp(min=FORCED_DIAGONALS), max(broadest, FORCED_DIAGONALS))
    distances = torch.where(distance < 0, distance, view.span.stop - 1 - distance)
    return _best(column_sums, verticals.clamp(min=FORCED_COLUMNS), max(longest, FORCED_COLUMNS)), distances


def _sums(view: SpanView, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention shares of the last queries, summed along columns and diagonals: (batch, heads, keys) each.

    A diagonal has the number of the column in which the last query lies on it.
    """
    stop = view.span.stop
    positions = torch.arange(stop - rows, stop, device=view.k.device)
    pieces = [(segment, view.selection_q(segment.kind, rows)) for segment, _ in view.pieces]
    lse = joint_lse(((q, view.keys(s), positions + 1 - s.key_start) for s, q in pieces), scale=view.scale)
    shape = (view.k.shape[0], view.heads, stop)
    columns, diagonals = (torch.zeros(shape, dtype=lse.dtype, device=lse.device) for _ in range(2))
    for segment, q in pieces:
        for start in range(segment.key_start, segment.key_stop, _KEYS_AT_A_TIME):
            end = min(start + _KEYS_AT_A_TIME, segment.key_stop)
            logits = row_logits(q, view.k[:, start:end], positions + 1 - start, scale=view.scale)
            shares = torch.exp(logits - lse[..., None])
            columns[..., start:end] = shares.sum(dim=2)
            sheared = _along_diagonals(shares)[..., : stop - start]
            diagonals[..., start : start + sheared.shape[-1]] += sheared
    return columns, diagonals


def _along_diagonals(shares: torch.Tensor) -> torch.Tensor:
    """Sums along diagonals of (…, rows, keys), numbered by their column in the last row: (…, keys + rows - 1)."""
    rows, keys = shares.shape[-2:]
    padded = functional.pad(shares.flip(-2), (0, rows))  # row i, counted from the last, moves i to the right
    sheared = padded.flatten(-2)[..., : rows * (keys + rows - 1)].unflatten(-1, (rows, -1))
    return sheared.sum(dim=-2)


def _best(sums: torch.Tensor, counts: torch.Tensor, most: int) -> torch.Tensor:
    """Indices of each head's largest sums, -1 beyond its count; `most` is the largest count."""
    counts = counts.to(sums.device)
    best = sums.topk(min(most, sums.shape[-1]), dim=-1).indices
    return best.masked_fill(torch.arange(best.shape[-1], device=best.device) >= counts[:, None], -1)


def _blocks(distances: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Blocks that hold a key at one of the distances from any query of a tile; those seen in part always.

    All tiles start at the same place within a block, so a head's diagonals give one pattern of blocks before the tile's
    own, which shifts with the tile.
    """
    size, device = tiles.size, distances.device
    phase = tiles.starts[0] % size
    batch, heads, _ = distances.shape
    # block offsets, relative to the block in which the tile starts, of the first and the last query's key
    first = torch.div(phase - distances, size, rounding_mode="floor")
    last = torch.div(phase + size - 1 - distances, size, rounding_mode="floor")
    width = tiles.blocks + 2
    pattern = torch.zeros(batch, heads, width + 2, dtype=torch.bool, device=device)  # by minus the offset, plus 1
    for offset in (first, last):
        place = torch.where(distances < 0, torch.full_like(offset, width + 1), (1 - offset).clamp(max=width))
        pattern.scatter_(2, place, True)
    block = torch.arange(tiles.blocks, device=device)
    own = torch.div(tiles.starts, size, rounding_mode="floor")
    behind = own[:, None] - block + 1
    mask = pattern[:, :, behind.clamp(min=0, max=width).long()] & (behind >= 0)
    sees = tiles.sees()
    return (mask & sees) | (sees & (block >= tiles.whole[:, None]))


RULE = Rule(select, start=1.0, lowest=0.25, highest=64.0, recall_target=None, needs_budgets=True)
