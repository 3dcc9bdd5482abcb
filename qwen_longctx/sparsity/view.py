"""What a selection rule sees of a span of queries, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from qwen_longctx.geometry.positions import Kind, Segment, Span
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.row_lse import joint_lse
from qwen_longctx.sparsity.budgets import HeadBudgets

ALL_OWNERS = slice(None)  # all KV heads


class Piece(NamedTuple):
    """Queries of a span, rotated towards one segment: shape (batch, queries, heads, head_dim)."""

    segment: Segment
    q: torch.Tensor


@dataclass(frozen=True)
class SpanView:
    """One span of one layer.

    Parameters
    ----------
    layer : int
    span : Span
    tiles : Tiles
    pieces : tuple of Piece
        Intra first.
    k : torch.Tensor
        Shape (batch, keys, kv_heads, head_dim): rotated keys from position 0 to the end of the span.
    scale : float
        Softmax scale, the attention temperature included.
    key_means : callable
        ``key_means(size)``: means of every `size` keys, shape (batch, keys // size, kv_heads, head_dim).
    selection_q : callable
        ``selection_q(kind, rows)``: the last `rows` queries, rotated towards a kind of segment at the unclamped
        positions that serve selection only (Qwen2.5-1M report, section 5.2).
    kept : dict, optional
        See `once`.
    """

    layer: int
    span: Span
    tiles: Tiles
    pieces: tuple[Piece, ...]
    k: torch.Tensor
    scale: float
    key_means: Callable[[int], torch.Tensor]
    selection_q: Callable[[Kind, int], torch.Tensor]
    kept: dict[str, Any] | None = None

    @cached_property
    def heads(self) -> int:
        """Query heads."""
        return self.pieces[0].q.shape[2]

    def last_tile(self) -> SpanView:
        """The view of this span's last tile alone."""
        span = self.span._replace(start=self.span.start + self.tiles.size * (len(self.tiles.starts) - 1))
        rows = span.stop - span.start
        pieces = tuple(Piece(segment, q[:, -rows:]) for segment, q in self.pieces)
        tiles = Tiles.of(span, self.tiles.size, self.k.device)
        return replace(self, span=span, tiles=tiles, pieces=pieces, kept={})

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """``work()``, whose result depends on no budget: kept while a first budget is tried on one tile many times."""
        if self.kept is None:
            return work()
        if name not in self.kept:
            self.kept[name] = work()
        return self.kept[name]

    def keys(self, segment: Segment) -> torch.Tensor:
        """Keys of one segment."""
        return self.k[:, segment.key_start : segment.key_stop]

    def full_lse(self, rows: int, owners: slice = ALL_OWNERS) -> torch.Tensor:
        """Log-sum-exp of the last `rows` queries over all keys, of the heads of some KV heads: that of dense attention.

        Shape (batch, heads, rows).
        """
        positions = torch.arange(self.span.stop - rows, self.span.stop, device=self.k.device)
        heads = self.heads_of(owners)
        parts = ((q[:, -rows:, heads], self.keys(s)[:, :, owners], positions + 1 - s.key_start) for s, q in self.pieces)
        return joint_lse(parts, scale=self.scale)

    def heads_of(self, owners: slice) -> slice:
        """The query heads of some KV heads."""
        first, last, _ = owners.indices(self.k.shape[2])
        group = self.heads // self.k.shape[2]
        return slice(first * group, last * group)


class Prompt(NamedTuple):
    """What a selection rule may know beside the span.

    Attributes
    ----------
    options
        The settings that the rule owns: the ``Options`` of its file.
    times_trained : float
        Length of the whole prompt, in lengths that the model was trained to attend.
    last_q : int
        Queries at the end of a span that speak for it.
    head_budgets : HeadBudgets, optional
        The checkpoint's budgets of this process's heads, for rules that need them.
    steered : bool
        Whether budgets follow the recall; if not, they are those that the rule starts with.
    """

    options: Any
    times_trained: float
    last_q: int
    head_budgets: HeadBudgets | None = None
    steered: bool = True


class Selection(NamedTuple):
    """What is kept of the keys of a span.

    Attributes
    ----------
    mask : torch.Tensor
        Shape (batch, heads, tiles, blocks), bool: blocks kept, counted from position 0.
    columns : torch.Tensor, optional
        Shape (batch, heads, columns), int64: positions of single keys kept, where no kept block holds them already.
    """

    mask: torch.Tensor
    columns: torch.Tensor | None = None
