"""Sparse prefill: which keys the queries of a long prompt attend to, and what that costs in recall.

A rule (`Rule`) looks at a span of queries (`SpanView`) and keeps blocks of keys, and single keys if it wants
(`Selection`). `plan_request` says whether a forward is sparse, `attention.sparse` attends to what is kept, and
`SparseState` keeps the record. An `Observer` can watch. To add a rule, see `rules`.
"""

from __future__ import annotations

from qwen_longctx.sparsity.observer import Observer
from qwen_longctx.sparsity.record import SpanRecord, SparseState
from qwen_longctx.sparsity.request import Request, check_budgets, make_request, plan_request, rule_for, rule_name
from qwen_longctx.sparsity.rules import RULES
from qwen_longctx.sparsity.rules.rule import Rule
from qwen_longctx.sparsity.view import Prompt, Selection, SpanView

__all__ = [
    "RULES",
    "Observer",
    "Prompt",
    "Request",
    "Rule",
    "Selection",
    "SpanRecord",
    "SpanView",
    "SparseState",
    "check_budgets",
    "make_request",
    "plan_request",
    "rule_for",
    "rule_name",
]
