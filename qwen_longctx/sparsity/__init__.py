"""Sparse prefill: which keys the queries of a long prompt attend to, and what that costs in recall.

A rule (`rule.Rule`) looks at a span of queries (`view.SpanView`) and keeps blocks of keys, and single keys if it wants.
To add one, write a file with a ``select`` and a ``RULE`` and name it in `RULES` and in `config.SPARSE`.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx import ops
from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.positions import Segment
from qwen_longctx.ops.columns import columns
from qwen_longctx.ops.compact import compact
from qwen_longctx.ops.merge import merge
from qwen_longctx.sparsity import budgets
from qwen_longctx.sparsity.rules import block_scores, vertical_slash
from qwen_longctx.sparsity.rules.rule import Rule, steer
from qwen_longctx.sparsity.state import Request, SpanRecord, SparseState
from qwen_longctx.sparsity.view import Selection, SpanView

RULES: dict[str, Rule] = {"block_scores": block_scores.RULE, "vertical_slash": vertical_slash.RULE}

_TRIALS = 3  # of a first budget; each moves it by at most a factor of four up, or by a third down


def rule_name(settings: LongContextConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The rule that `settings` ask for on activations of this kind; None is dense.

    "auto" is block scores where a fast kernel takes their lists, else dense: it gives way, and never fails.
    """
    if settings.sparse != "auto":
        return None if settings.sparse == "off" else settings.sparse
    if settings.kernel == "sdpa" or not settings.tile_fits:
        return None
    if settings.kernel == "auto" and ops.list_kernel("auto", device, dtype, head_dim, settings.tile) == "reference":
        return None
    return "block_scores"


def request(name: str, settings: LongContextConfig, config: Any, state: SparseState, length: int) -> Request:
    """What a rule is asked for on a model of this transformers config, for a prompt of `length` tokens.

    Raises
    ------
    FileNotFoundError, ValueError
        The budgets of vertical-slash cannot be read.
    """
    if name == "vertical_slash" and state.head_budgets is None:
        source = settings.sparse_attention_config or budgets.beside_checkpoint(config.name_or_path)
        shape = config.num_hidden_layers, config.num_attention_heads
        if source is None:
            state.head_budgets = budgets.uniform(*shape)
        else:
            state.head_budgets = budgets.load(source, *shape, config.name_or_path)
    return Request(name, RULES[name], settings, state.head_budgets, state, length)


@torch.compiler.disable  # lists differ from span to span: nothing to gain, and a variant to compile for each
def attend(view: SpanView, v: torch.Tensor, request: Request) -> torch.Tensor:
    """Attend from a span to the keys that the rule keeps, record their recall and steer the budgets by it.

    Parameters
    ----------
    view : SpanView
    v : torch.Tensor
        Values of the keys in the view, of the same shape.
    request : Request

    Returns
    -------
    torch.Tensor
        Shape (batch, queries, heads, head_dim).
    """
    budget = request.budget(view.layer)
    if budget is None:
        budget = _first_budget(view, v, request)
    truth = view.full_lse(_judged(view, request))
    out, record = _attend(view, v, request, budget.to(view.k.device), truth)
    request.observe(record, budget)
    return out


def _first_budget(view: SpanView, v: torch.Tensor, request: Request) -> torch.Tensor:
    """Budgets for the first span of a layer: tried on its last tile alone until that recalls what it should."""
    rule, target = request.rule, request.recall_target
    budget = torch.full((view.heads,), rule.start, dtype=torch.float32, device=view.k.device)
    if target is None:
        return budget
    last = view.last_tile()
    truth = last.full_lse(_judged(last, request))
    for _ in range(_TRIALS):
        budget = steer(budget, _attend(last, v, request, budget, truth)[1].recall, target, rule)
    return budget


def _judged(view: SpanView, request: Request) -> int:
    """Queries at the end of a span on which recall is measured."""
    return min(request.settings.last_q, view.span.stop - view.span.start)


def _attend(
    view: SpanView, v: torch.Tensor, request: Request, budget: torch.Tensor, truth: torch.Tensor
) -> tuple[torch.Tensor, SpanRecord]:
    """Attention to what the rule keeps, and its recall against `truth`, the log-sum-exp of the last queries."""
    settings, tiles = request.settings, view.tiles
    q = view.pieces[0].q
    name = ops.list_kernel(settings.kernel, q.device, q.dtype, q.shape[-1], tiles.size)
    selection = request.rule.select(view, budget, request)
    kept = selection.mask.sum()
    parts = []
    for segment, q in view.pieces:
        values = v[:, segment.key_start : segment.key_stop]
        blocks = slice(segment.key_start // tiles.size, -(-segment.key_stop // tiles.size))
        lists = compact(selection.mask[..., blocks], tiles.size)
        how = {"causal": segment.kind == "intra", "scale": view.scale}
        parts.append(ops.on_lists(name)(q, view.keys(segment), values, blocks=lists, **how))
        if selection.columns is not None:
            at, keep = _single_keys(selection, view, segment)
            k_at, v_at = (_gather(x, at, view.heads) for x in (view.keys(segment), values))
            parts.append(columns(q, k_at, v_at, keep, size=tiles.size, scale=view.scale))
            kept = kept + keep.sum() / tiles.size
    out, lse = merge(parts)
    recall = torch.exp(lse[..., -truth.shape[-1] :] - truth).mean(dim=-1)
    pairs = tiles.pairs * out.shape[0] * view.heads
    return out, SpanRecord(view.layer, view.span.start, view.span.stop, name, recall, kept, pairs)


def _single_keys(selection: Selection, view: SpanView, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of a segment, counted from its start, and which tiles meet them: those whose blocks lack them."""
    assert selection.columns is not None
    tiles = view.tiles
    inside = (selection.columns >= segment.key_start) & (selection.columns < segment.key_stop)
    block = (selection.columns.clamp(min=0) // tiles.size)[:, :, None]
    held = selection.mask.gather(3, block.expand(-1, -1, len(tiles.starts), -1))
    keep = inside[:, :, None] & ~held & (block < tiles.whole[:, None])
    return (selection.columns - segment.key_start).where(inside, 0), keep


def _gather(x: torch.Tensor, at: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values at positions (batch, heads, columns), as (batch, heads, columns, head_dim)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    owners = (torch.arange(heads, device=x.device) // (heads // x.shape[2]))[:, None]
    return x[rows, at, owners]
