"""What a selection rule is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qwen_longctx.sparsity.view import Prompt, Selection, SpanView


class Rule(NamedTuple):
    """One way to choose keys.

    A head's budget is a positive number, and more of it keeps more keys. What it counts is the rule's own affair.

    Attributes
    ----------
    select : callable
        ``select(view, budget, prompt) -> Selection`` with `budget` of shape (heads,), float32.
    start, lowest, highest : float
        Budget of a head that has not been seen yet, and the bounds of steering.
    recall_target : float, optional
        Recall to steer towards where the user names none; None leaves the budgets alone.
    needs_budgets : bool
        Whether the rule reads the checkpoint's vertical and slash budgets, `Prompt.head_budgets`.
    """

    select: Callable[[SpanView, torch.Tensor, Prompt], Selection]
    start: float
    lowest: float
    highest: float
    recall_target: float | None
    needs_budgets: bool = False


class NoOptions:
    """The settings of a rule that has none."""

    fixed = False
