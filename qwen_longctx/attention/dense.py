"""Dual chunk attention of one forward: every span, all its segments, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qwen_longctx import ops
from qwen_longctx.attention import sparse
from qwen_longctx.geometry.layout import Plan, RowGroup
from qwen_longctx.geometry.positions import Kind, Span
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.reference import weights as attention_weights

KeyMeans = Callable[[int], torch.Tensor]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    scale: float,
    layer: int = 0,
    key_means: KeyMeans | None = None,
) -> torch.Tensor:
    """Attend from the tokens of this forward to all keys so far (Qwen2.5-1M report, section 5.1).

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tokens, heads, head_dim), not rotated.
    k, v : torch.Tensor
        Shape (batch, keys, kv_heads, head_dim), keys rotated by ``plan.tables.keys``. Keys beyond ``plan.length``
        (the free room of a static cache) are ignored.
    plan : Plan
    scale : float
        Softmax scale without the attention temperature.
    layer : int
        Number of the layer, for the budgets of sparse prefill.
    key_means : callable, optional
        ``key_means(size)``: means of every `size` keys of `k`, if the cache keeps them.

    Returns
    -------
    torch.Tensor
        Shape and dtype of `q`; zero at padding.
    """
    call = _Call(plan, scale, layer, key_means if plan.covers_all else None)
    if plan.covers_all:
        return _attend_rows(q, k, v, call, plan.groups[0])
    out = torch.zeros_like(q)
    for group in plan.groups:
        mine = q[group.rows, group.queries]
        out[group.rows, group.queries] = _attend_rows(mine, k[group.rows], v[group.rows], call, group)
    return out


class _Call(NamedTuple):
    """What all spans of one call of `attend` share."""

    plan: Plan
    scale: float
    layer: int
    key_means: KeyMeans | None


def _attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call, group: RowGroup) -> torch.Tensor:
    if isinstance(group.temperature, torch.Tensor):
        q = (q * group.temperature).to(q.dtype)
    else:
        call = call._replace(scale=call.scale * group.temperature)
    if len(group.spans) == 1:
        return _attend_span(q, k, v, call, group, group.spans[0], 0)
    first = group.spans[0].start
    outs = []
    for span in group.spans:
        mine = q[:, span.start - first : span.stop - first]
        outs.append(_attend_span(mine, k, v, call, group, span, span.start - first))
    return torch.cat(outs, dim=1)


def _attend_span(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call, group: RowGroup, span: Span, done: int
) -> torch.Tensor:
    plan = call.plan
    start = group.queries.start + done
    tokens = slice(start, start + q.shape[1])

    def turned(kind: Kind) -> torch.Tensor:
        return rotate(q, plan.tables.queries[kind].rows(group.rows, tokens))

    request = plan.sparse
    if request is not None and not request.takes(span, group.dense_from):
        request.observe_dense(call.layer, span, q.shape[0] * q.shape[2])
    elif request is not None:
        about = {"layer": call.layer, "scale": call.scale, "offset": group.offset, "key_means": call.key_means}
        return sparse.attend(q, k, v, span, request, rotated=turned, tables=plan.tables, **about)
    kernel = ops.get(plan.kernel)
    parts = []
    for kind, key_start, key_stop in span.segments:
        mine = [_tokens(x, key_start + group.offset, key_stop + group.offset) for x in (k, v)]
        parts.append(kernel(turned(kind), *mine, causal=kind == "intra", scale=call.scale))
    return merge(parts)[0]


def _tokens(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """``x[:, start:stop]``, without the cost of a view where that is all: decode counts microseconds."""
    return x if start == 0 and stop == x.shape[1] else x[:, start:stop]


def weights(q: torch.Tensor, k: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor:
    """Attention weights of a forward whose rows lie within one chunk.

    Shapes as in `attend`; returns (batch, heads, tokens, ``plan.length``), zero at padding.

    Raises
    ------
    NotImplementedError
        A row crosses into a second chunk.
    """
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], plan.length)
    for group in plan.groups:
        (segment, *others), *more = [span.segments for span in group.spans]
        if others or more:
            raise NotImplementedError(
                f"output_attentions reaches {group.spans[-1].stop} tokens, beyond the first chunk: "
                "leave output_attentions out for prompts of more than chunk_size - local_size tokens"
            )
        turned = rotate(q[group.rows, group.queries], plan.tables.queries["intra"].rows(group.rows, group.queries))
        keys = slice(segment.key_start + group.offset, segment.key_stop + group.offset)
        found = attention_weights(turned, k[group.rows, keys], causal=True, scale=scale)
        out[group.rows, :, group.queries, keys] = found
    return out
