"""Sparse attention of one span: to the blocks of keys, and the single keys, that a rule keeps."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from qwen_longctx import ops
from qwen_longctx.geometry.layout import Layout, RowGroup
from qwen_longctx.geometry.positions import Kind, Segment, Span
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import KeyValues, mean_keys
from qwen_longctx.ops.columns import columns
from qwen_longctx.ops.compact import compact
from qwen_longctx.ops.merge import merge
from qwen_longctx.sparsity.record import NOT_MEASURED, SpanRecord
from qwen_longctx.sparsity.request import Request
from qwen_longctx.sparsity.steering import steer
from qwen_longctx.sparsity.view import ALL_OWNERS, Piece, Selection, SpanView

_TRIALS = 3  # of a first budget; each moves it by at most a factor of four up, or by a third down


class Place(Protocol):
    """What is known of a span of queries, see `dense.SpanPlace`."""

    @property
    def layout(self) -> Layout: ...
    @property
    def group(self) -> RowGroup: ...
    @property
    def span(self) -> Span: ...
    @property
    def done(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def layer(self) -> int: ...
    def rotated(self, q: torch.Tensor, kind: Kind) -> torch.Tensor: ...
    def segment(self, kv: KeyValues, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]: ...


@torch.compiler.disable  # lists differ from span to span: nothing to gain, and a variant to compile for each
def attend_span(q: torch.Tensor, kv: KeyValues, place: Place, request: Request) -> torch.Tensor:
    """Attend from a span to the keys that the rule keeps, record their recall and steer the budgets by it.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, queries, heads, head_dim), the queries of the span, not rotated.
    kv : KeyValues
    place : Place
    request : Request

    Returns
    -------
    torch.Tensor
        Shape (batch, queries, heads, head_dim).
    """
    layout, group, span = place.layout, place.group, place.span
    keys, values = place.segment(kv, 0, span.stop)

    def means(size: int) -> torch.Tensor:
        if group.offset or not layout.covers_all:
            return mean_keys(keys, size)
        return kv.key_means(size)[:, : span.stop // size]

    def selection_q(kind: Kind, rows: int) -> torch.Tensor:
        positions = torch.arange(span.stop - rows, span.stop, device=q.device)
        last = group.queries.start + place.done + q.shape[1]
        table = layout.tables.selection(kind, positions[None], group.rows, slice(last - rows, last))
        return rotate(q[:, -rows:], table).to(q.dtype)

    pieces = tuple(Piece(segment, place.rotated(q, segment.kind)) for segment in span.segments)
    tiles = request.tiles(span, q.device)
    view = SpanView(place.layer, span, tiles, pieces, keys, place.scale, means, selection_q)
    return _attend_view(view, values, request)


def _attend_view(view: SpanView, v: torch.Tensor, request: Request) -> torch.Tensor:
    budget = request.budget(view.layer)
    if budget is None:
        budget = _first_budget(view, v, request)
    owners = request.measured(view.layer, view.span.stop, view.k.shape[2])
    result = _attend_once(view, v, request, budget.to(view.k.device), _dense_lse(view, request, owners), owners)
    request.observe(result.record, budget)
    request.observer.span(view, result.selection, result.record)
    return result.out


class _Result(NamedTuple):
    out: torch.Tensor
    selection: Selection
    record: SpanRecord


def _first_budget(view: SpanView, v: torch.Tensor, request: Request) -> torch.Tensor:
    """Budgets for the first span of a layer: tried on its last tile alone until that recalls what it should.

    Looking at them waits for the device, which takes less than a trial that changes nothing: a small model's are bound
    by launches. A host that is ahead of several devices does not look: further trials change nothing either.
    """
    rule, target = request.rule, request.recall_target
    budget = torch.full((view.heads,), rule.start, dtype=torch.float32, device=view.k.device)
    if target is None:
        return budget
    last = view.last_tile()
    lse = _dense_lse(last, request)
    for _ in range(_TRIALS):
        before, budget = budget, steer(budget, _attend_once(last, v, request, budget, lse).record.recall, target, rule)
        if not request.ahead and torch.equal(budget, before):
            break
    return budget


def _dense_lse(view: SpanView, request: Request, owners: slice = ALL_OWNERS) -> torch.Tensor:
    """Log-sum-exp over all keys of the queries by which the recall of some KV heads is measured, the last of a span."""
    with request.observer.stage("recall"):
        return view.full_lse(min(request.settings.last_q, view.span.stop - view.span.start), owners)


def _attend_once(
    view: SpanView,
    v: torch.Tensor,
    request: Request,
    budget: torch.Tensor,
    dense_lse: torch.Tensor,
    owners: slice = ALL_OWNERS,
) -> _Result:
    """Attention to what the rule keeps, and its recall: ``exp(lse - dense_lse)``, mean over the last queries.

    `dense_lse` is that of the heads of some KV heads, `owners`.
    """
    stage, tiles = request.observer.stage, view.tiles
    q = view.pieces[0].q
    name = ops.list_kernel(request.settings.kernel, q.device, q.dtype, q.shape[-1], tiles.size)
    with stage("selection"):
        selection = request.rule.select(view, budget, request.prompt)
        kept = selection.mask.sum()
    parts = []
    for segment, q in view.pieces:
        keys, values = view.keys(segment), v[:, segment.key_start : segment.key_stop]
        blocks = slice(segment.key_start // tiles.size, -(-segment.key_stop // tiles.size))
        with stage("selection"):
            lists = compact(selection.mask[..., blocks], tiles.size)
        causal = segment.kind == "intra"
        with stage("attention"):
            parts.append(ops.on_lists(name)(q, keys, values, blocks=lists, causal=causal, scale=view.scale))
        if selection.columns is not None:
            with stage("attention"):
                at, keep = _single_keys(selection.columns, selection.mask, view, segment)
                k_at, v_at = (_gather(x, at, view.heads) for x in (keys, values))
                parts.append(columns(q, k_at, v_at, keep, size=tiles.size, scale=view.scale))
            kept = kept + keep.sum() / tiles.size
    with stage("merge"):
        out, lse = merge(parts)
    with stage("recall"):
        recall = _recall(lse, dense_lse, view.heads_of(owners))
    pairs = tiles.pairs * out.shape[0] * view.heads
    return _Result(out, selection, SpanRecord(view.layer, view.span.start, view.span.stop, name, recall, kept, pairs))


def _recall(lse: torch.Tensor, dense_lse: torch.Tensor, heads: slice) -> torch.Tensor:
    """Recall of some heads, shape (batch, heads), `NOT_MEASURED` of the others."""
    some = torch.exp(lse[:, heads, -dense_lse.shape[-1] :] - dense_lse).mean(dim=-1)
    if some.shape[1] == lse.shape[1]:
        return some
    recall = torch.full(lse.shape[:2], NOT_MEASURED, dtype=some.dtype, device=some.device)
    recall[:, heads] = some
    return recall


def _single_keys(
    positions: torch.Tensor, mask: torch.Tensor, view: SpanView, segment: Segment
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of a segment, counted from its start, and which tiles attend to them: those whose blocks lack them."""
    tiles = view.tiles
    inside = (positions >= segment.key_start) & (positions < segment.key_stop)
    block = (positions.clamp(min=0) // tiles.size)[:, :, None]
    held = mask.gather(3, block.expand(-1, -1, len(tiles.starts), -1))
    keep = inside[:, :, None] & ~held & (block < tiles.whole[:, None])
    return (positions - segment.key_start).where(inside, 0), keep


def _gather(x: torch.Tensor, at: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values at positions (batch, heads, columns), as (batch, heads, columns, head_dim)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    owners = (torch.arange(heads, device=x.device) // (heads // x.shape[2]))[:, None]
    return x[rows, at, owners]
