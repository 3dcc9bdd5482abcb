"""What sparse prefill kept of one sequence, and the budgets that its next span starts with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qwen_longctx.errors import NotFinite
from qwen_longctx.sparsity.budgets import HeadBudgets

NOT_MEASURED = -1.0  # no recall is negative
_TOO_MUCH_RECALL = 1e-3  # rounding of two float32 log-sum-exps stays well below


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
        `NOT_MEASURED` for heads whose turn it was not.
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


class DenseRecord(NamedTuple):
    """A span of one layer that attended to everything, because it was short or the end of its prompt."""

    layer: int
    start: int
    stop: int
    pairs: int  # as in `SpanRecord`; all of them kept


class SparseState:
    """Budgets and records of one sequence. Lives on its cache.

    Under tensor parallelism every process has a state of its own, of the heads that it holds: budgets, recall and
    density are those of the local heads.

    Attributes
    ----------
    budgets : dict
        By rule and layer: budgets of the heads for the next span.
    records : list of SpanRecord
    dense : list of DenseRecord
        The other spans of the prompts that were prefilled sparsely.
    head_budgets : HeadBudgets, optional
        The checkpoint's, of the local heads, read once a sequence.
    """

    def __init__(self) -> None:
        self.budgets: dict[tuple[str, int], torch.Tensor] = {}
        self.records: list[SpanRecord] = []
        self.dense: list[DenseRecord] = []
        self.head_budgets: HeadBudgets | None = None
        self.budgets_asked: Any = None  # for which `head_budgets` is the answer
        self.turns: dict[int, int] = {}  # by layer: sparse spans so far, whose heads are measured in turn
        self._checked = 0

    def snapshot(self) -> Any:
        """This state, for `restore`. Costs no copy of a tensor: budgets and records are replaced, never changed."""
        return {**vars(self), **self._copies()}

    def restore(self, snapshot: Any) -> None:
        """Go back to what `snapshot` returned; the snapshot can be used again."""
        vars(self).update(snapshot)
        vars(self).update(self._copies())

    def _copies(self) -> dict[str, Any]:
        return {name: copy(getattr(self, name)) for name in ("budgets", "records", "dense", "turns")}

    def check(self) -> None:
        """Stop a run that has gone wrong, by the recall of the spans since the last check. One transfer to the host.

        Raises
        ------
        NotFinite
            It is no number.
        RuntimeError
            It is above 1.001: kept keys weigh more than all keys do, so that a kernel or mask is broken.
        """
        fresh = self.records[self._checked :]
        self._checked = len(self.records)
        if not fresh:
            return
        device = fresh[0].recall.device
        # max() hands a NaN on
        worst = torch.stack([record.recall.max().to(device) for record in fresh]).tolist()
        for record, recall in zip(fresh, worst, strict=True):
            where = f"layer {record.layer}, tokens {record.start} to {record.stop}"
            if math.isnan(recall):
                raise NotFinite(
                    f"sparse prefill of {where}, with kernel {record.kernel!r}, recalls {recall}: the activations of "
                    "the model are not finite there. Load it in bfloat16 or float32, or copy the checkpoint anew"
                )
            if recall > 1 + _TOO_MUCH_RECALL:  # a defect, of this package or of a kernel
                raise RuntimeError(
                    f"sparse prefill of {where}, recalls {recall:.4f} of the dense attention with kernel "
                    f'{record.kernel!r}: the kernel is wrong here. Run with sparse="off" or another kernel, and report '
                    "this"
                )

    def by_layer(self) -> list[dict[str, Any]]:
        """Density of every sparse layer, and its recall: mean over spans, rows and heads, and that of the worst head.

        "measured" is the share of spans and heads whose recall was measured; the means are of those. Empty if no span
        was sparse.
        """
        records: dict[int, list[SpanRecord]] = defaultdict(list)
        for record in self.records:
            records[record.layer].append(record)
        return [{"layer": n, **_summary(records[n], self._dense_pairs(n))} for n in sorted(records)]

    def density(self) -> float:
        """Blocks kept among blocks seen, over all layers of the prompts prefilled sparsely; 1 if nothing was sparse."""
        return _density(self.records, self._dense_pairs())

    def _dense_pairs(self, layer: int | None = None) -> int:
        return sum(record.pairs for record in self.dense if layer in (None, record.layer))


def _summary(records: list[SpanRecord], dense_pairs: int) -> dict[str, float]:
    recall, measured = recall_of_heads(records)
    seen = recall[measured > 0]
    return {
        "density": _density(records, dense_pairs),
        "recall": float(seen.mean()),
        "lowest_recall": float(seen.min()),
        "measured": float(measured.mean()),
    }


def recall_of_heads(records: Sequence[SpanRecord]) -> tuple[torch.Tensor, torch.Tensor]:
    """Recall of every head of one layer, mean over rows and the spans that measured it, and the share of those spans.

    Both of shape (heads,); the recall of a head that no span measured is 0.
    """
    every = torch.stack([record.recall.mean(dim=0).cpu() for record in records])
    measured = every > NOT_MEASURED
    times = measured.sum(dim=0)
    return every.where(measured, 0).sum(dim=0) / times.clamp(min=1), times / len(records)


def _density(records: list[SpanRecord], dense_pairs: int) -> float:
    if not records:
        return 1.0
    kept = sum(float(record.kept) for record in records)
    return (kept + dense_pairs) / (sum(record.pairs for record in records) + dense_pairs)
