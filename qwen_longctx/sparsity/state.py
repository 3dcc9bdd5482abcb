"""Sparse prefill of one sequence: the request, budgets that follow recall, and the record of what was kept."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.positions import Span
from qwen_longctx.geometry.tiles import Tiles, pairs_of
from qwen_longctx.sparsity.budgets import HeadBudgets
from qwen_longctx.sparsity.rules.rule import Rule, steer

_DENSE_TILES = 2
_TOO_MUCH_RECALL = 1e-3  # rounding of two float32 log-sum-exps stays well below


@dataclass(frozen=True)
class Request:
    """What is asked of the sparse prefill of one forward.

    Parameters
    ----------
    name : str
        Of the rule.
    rule : Rule
    settings : LongContextConfig
    head_budgets : HeadBudgets, optional
        Budgets of the checkpoint, for vertical-slash.
    state : SparseState
        Of the sequence.
    length : int
        Of the whole prompt, in tokens.
    """

    name: str
    rule: Rule
    settings: LongContextConfig
    head_budgets: HeadBudgets | None
    state: SparseState
    length: int
    _tiles: dict[tuple[Span, torch.device], Tiles] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def times_trained(self) -> float:
        """Length of the prompt, in lengths that the model was trained to attend."""
        return self.length / self.settings.original_max_position_embeddings

    @property
    def dense_end(self) -> int:
        """Tokens at the end of a prompt, where the question stands, that attend to everything."""
        return _DENSE_TILES * self.settings.tile

    def takes(self, span: Span, dense_from: int) -> bool:
        """Whether a span is prefilled sparsely: a tile or more, not the prompt's end, with keys from position 0 on."""
        long = span.stop - span.start >= self.settings.tile
        return long and span.start < dense_from and span.segments[-1].key_start == 0

    def tiles(self, span: Span, device: torch.device) -> Tiles:
        """The tiles of a span, worked out once for all layers of a device."""
        key = span, device
        if key not in self._tiles:
            self._tiles[key] = Tiles.of(span, self.settings.tile, device)
        return self._tiles[key]

    def observe_dense(self, layer: int, span: Span, lists: int) -> None:
        """Count a span that was prefilled densely, of so many rows times heads."""
        pairs = pairs_of(span, self.settings.tile) * lists
        self.state.dense_pairs[layer] = self.state.dense_pairs.get(layer, 0) + pairs

    @property
    def recall_target(self) -> float | None:
        """Recall to steer towards; None where budgets are fixed."""
        own = None if self.settings.has_share else self.rule.recall_target
        return self.settings.recall_target or own

    def budget(self, layer: int) -> torch.Tensor | None:
        """Budgets of a layer's heads for the next span, shape (heads,), float32; None before the first."""
        return self.state.budgets.get((self.name, layer))

    def observe(self, record: SpanRecord, budget: torch.Tensor) -> None:
        """Note what a span kept and recalled, and steer the layer's budgets by it."""
        self.state.records.append(record)
        target = self.recall_target
        if target is not None:
            budget = steer(budget, record.recall, target, self.rule)
        self.state.budgets[self.name, record.layer] = budget


@dataclass(frozen=True)
class SpanRecord:
    """What one span of one layer kept.

    Attributes
    ----------
    layer, start, stop : int
        Layer, and positions of the queries.
    kernel : str
    recall : torch.Tensor
        Shape (batch, heads): share of the dense attention that the kept keys hold, mean over the last queries.
    kept : torch.Tensor
        Blocks kept, over all rows, heads and tiles; columns counted by their share of a block.
    pairs : int
        Blocks seen, counted in the same way.
    """

    layer: int
    start: int
    stop: int
    kernel: str
    recall: torch.Tensor
    kept: torch.Tensor
    pairs: int


class SparseState:
    """Budgets and records of one sequence. Lives on its cache.

    Attributes
    ----------
    budgets : dict
        By rule and layer: budgets of the heads for the next span.
    records : list of SpanRecord
    dense_pairs : dict
        By layer: blocks seen by spans too short for sparse prefill or at the prompt's end, all of them kept.
    head_budgets : HeadBudgets, optional
        The checkpoint's, read once a sequence.
    """

    def __init__(self) -> None:
        self.budgets: dict[tuple[str, int], torch.Tensor] = {}
        self.records: list[SpanRecord] = []
        self.dense_pairs: dict[int, int] = {}
        self.head_budgets: HeadBudgets | None = None
        self._checked = 0

    def snapshot(self):
        return dict(self.budgets), len(self.records), dict(self.dense_pairs), self._checked

    def restore(self, s):
        self.budgets, n, self.dense_pairs, self._checked = s
        del self.records[n:]

    def check(self) -> None:
        """Stop a run whose kept keys weigh more than all keys do: a kernel or mask is broken.

        Raises
        ------
        RuntimeError
            Recall above 1.001 or not a number, since the last check. One transfer to the host.
        """
        fresh = self.records[self._checked :]
        self._checked = len(self.records)
        if not fresh:
            return
        device = fresh[0].recall.device
        # max() hands a NaN on
        worst = torch.stack([record.recall.max().to(device) for record in fresh]).tolist()
        for record, recall in zip(fresh, worst, strict=True):
            if not recall <= 1 + _TOO_MUCH_RECALL:
                raise RuntimeError(
                    f"sparse prefill of layer {record.layer}, tokens {record.start} to {record.stop}, recalls "
                    f"{recall:.4f} of the dense attention with kernel {record.kernel!r}: the kernel is wrong here, or "
                    'activations are not finite. Run with sparse="off" or another kernel, and report this'
                )

    def by_layer(self) -> list[dict[str, Any]]:
        """Density of every layer, and its recall: the mean over sparse spans, rows and heads, and the worst head's."""
        records: dict[int, list[SpanRecord]] = defaultdict(list)
        for record in self.records:
            records[record.layer].append(record)
        return [{"layer": n, **_summary(records[n], self.dense_pairs.get(n, 0))} for n in sorted(records)]

    def density(self) -> float:
        """Blocks kept among blocks seen, over all layers; 1 if nothing was sparse."""
        return _density(self.records, sum(self.dense_pairs.values()))


def _summary(records: list[SpanRecord], dense_pairs: int) -> dict[str, float]:
    heads = torch.stack([record.recall.mean(dim=0) for record in records]).mean(dim=0)
    return {
        "density": _density(records, dense_pairs),
        "recall": float(heads.mean()),
        "lowest_recall": float(heads.min()),
    }


def _density(records: list[SpanRecord], dense_pairs: int) -> float:
    if not records:
        return 1.0
    kept = sum(float(record.kept) for record in records)
    return (kept + dense_pairs) / (sum(record.pairs for record in records) + dense_pairs)


def state_of(cache: Any) -> SparseState:
    """The state of a sequence, kept on its cache; a new one where there is no cache."""
    if cache is None:
        return SparseState()
    if not hasattr(cache, "sparse_state"):
        cache.sparse_state = SparseState()
    return cache.sparse_state
