"""How a head's budget follows its recall."""

from __future__ import annotations

import torch

from qwen_longctx.sparsity.record import NOT_MEASURED
from qwen_longctx.sparsity.rules.rule import Rule

_SLOWEST, _FASTEST = 0.7, 4.0  # one easy span must not starve a head; a head that becomes global is served at once


def steer(budget: torch.Tensor, recall: torch.Tensor, target: float, rule: Rule) -> torch.Tensor:
    """Budgets for the next span: ``b * sqrt(t / (1 - t) * (1 - r) / r)`` for budget b, target t and recall r.

    Parameters
    ----------
    budget : torch.Tensor
        Shape (heads,), float32.
    recall : torch.Tensor
        Shape (batch, heads): rows share a head's budget, and heads that are `NOT_MEASURED` keep theirs.
    target : float
        Recall wanted, below 1.
    rule : Rule
        Whose bounds the budgets keep.
    """
    found = recall.mean(dim=0).to(budget)
    mean = found.clamp(min=0, max=1)
    odds = (1 - mean) / mean.clamp(min=torch.finfo(mean.dtype).tiny) * target / (1 - target)
    factor = odds.sqrt().clamp(min=_SLOWEST, max=_FASTEST)
    return (budget * factor).clamp(min=rule.lowest, max=rule.highest).where(found > NOT_MEASURED, budget)
