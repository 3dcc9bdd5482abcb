"""What a selection rule is, and how its budget is steered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwen_longctx.sparsity.view import Selection, SpanView

if TYPE_CHECKING:
    from qwen_longctx.sparsity.state import Request


class Rule(NamedTuple):
    """One way to choose keys.

    A head's budget is a positive number, and more of it keeps more keys. What it counts is the rule's own affair.

    Attributes
    ----------
    select : callable
        ``select(view, budget, request) -> Selection`` with `budget` of shape (heads,), float32.
    start, lowest, highest : float
        Budget of a head that has not been seen yet, and the bounds of steering.
    recall_target : float, optional
        Recall to steer towards where the user names none; None leaves the budgets alone.
    """

    select: Callable[[SpanView, torch.Tensor, Request], Selection]
    start: float
    lowest: float
    highest: float
    recall_target: float | None


def steer(budget: torch.Tensor, recall: torch.Tensor, target: float, rule: Rule) -> torch.Tensor:
    """Budgets for the next span: times the odds of the target against those of the recall, to the power of one half.

    Parameters
    ----------
    budget : torch.Tensor
        Shape (heads,), float32.
    recall : torch.Tensor
        Shape (batch, heads): rows share a head's budget.
    target : float
        Recall wanted, below 1.
    rule : Rule
    """
    found = recall.mean(dim=0).clamp(min=0, max=1).to(budget)
    odds = (1 - found) / found.clamp(min=torch.finfo(found.dtype).tiny) * target / (1 - target)
    factor = odds.sqrt().clamp(min=_SLOWEST, max=_FASTEST)
    return (budget * factor).clamp(min=rule.lowest, max=rule.highest)


_SLOWEST, _FASTEST = 0.7, 4.0  # one easy span must not starve a head; a head that turns global is served at once
