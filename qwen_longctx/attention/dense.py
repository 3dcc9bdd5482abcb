"""Dual chunk attention of one forward: every span, all its segments, merged by log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen_longctx import ops
from qwen_longctx.attention import sparse
from qwen_longctx.attention.choice import chosen_blocks
from qwen_longctx.errors import Unsupported
from qwen_longctx.geometry.layout import Layout, RowGroup
from qwen_longctx.geometry.positions import Kind, Span
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import ALL_ROWS, KeyValues
from qwen_longctx.ops.decode import decode
from qwen_longctx.ops.device import cast
from qwen_longctx.ops.gradients import Part, merged_attention
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.reference import weights as attention_weights


def attend(
    q: torch.Tensor,
    kv: KeyValues,
    layout: Layout,
    scale: float,
    layer: int = 0,
) -> torch.Tensor:
    """Attend from the tokens of this forward to all keys so far (Qwen2.5-1M report, section 5.1).

    Gradients are exact in training mode, over any number of segments.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tokens, heads, head_dim), not rotated.
    kv : KeyValues
        Keys, rotated by ``layout.tables.keys``, and values. Those beyond ``layout.length`` (the free room of a static
        cache) are ignored.
    layout : Layout
    scale : float
        Softmax scale without the attention temperature.
    layer : int
        Number of the layer, for the budgets of sparse prefill.

    Returns
    -------
    torch.Tensor
        Shape and dtype of `q`; zero at padding.
    """
    if layout.reach is not None:
        blocks = chosen_blocks(q, kv, layout.reach, layout.length, layout.keep, scale=scale, slot=layout.slot)
        return decode(q, *kv.room(blocks), layout.reach, scale=scale, blocks=blocks)
    if layout.covers_all:
        return _attend_rows(q, kv, layout, layout.groups[0], scale, layer)
    out = torch.zeros_like(q)
    for group in layout.groups:
        part = _attend_rows(q[group.rows, group.queries], kv, layout, group, scale, layer)
        out[group.rows, group.queries] = part
    return out


def _attend_rows(
    q: torch.Tensor, kv: KeyValues, layout: Layout, group: RowGroup, scale: float, layer: int
) -> torch.Tensor:
    first = group.spans[0].start
    outs = []
    for span in group.spans:
        queries = q if len(group.spans) == 1 else q[:, span.start - first : span.stop - first]
        place = SpanPlace(layout, group, span, span.start - first, scale * group.temperature, layer)
        outs.append(_attend_span(queries, kv, place))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class SpanPlace(NamedTuple):
    """Where a span of queries stands: `done` queries of its group come before it; `scale` holds the temperature."""

    layout: Layout
    group: RowGroup
    span: Span
    done: int
    scale: float
    layer: int

    def rotated(self, q: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Queries `q` of the whole span, rotated towards one kind of segment."""
        start = self.group.queries.start + self.done
        table = self.layout.tables.queries[kind].rows(self.group.rows, slice(start, start + q.shape[1]))
        return cast(rotate(q, table), q.dtype)

    def segment(self, kv: KeyValues, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the group's rows at positions `start` to `stop`."""
        offset = self.group.offset
        return kv.segment(start + offset, stop + offset, ALL_ROWS if self.layout.covers_all else self.group.rows)


def _attend_span(q: torch.Tensor, kv: KeyValues, place: SpanPlace) -> torch.Tensor:
    layout, span = place.layout, place.span
    request = layout.sparse
    if request is not None and not request.takes(span, place.group.dense_from):
        request.observe_dense(place.layer, span, q.shape[0] * q.shape[2])
    elif request is not None:
        return sparse.attend_span(q, kv, place, request)
    if layout.mode == "train":
        parts = [
            Part(place.rotated(q, kind), *place.segment(kv, start, stop), kind == "intra")
            for kind, start, stop in span.segments
        ]
        return merged_attention(parts, scale=place.scale)
    kernel = ops.get(layout.kernel)

    def part(kind: Kind, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One segment's: queries that are rotated, and keys that are read out, are gone before the next one's."""
        keys, values = place.segment(kv, start, stop)
        return kernel(place.rotated(q, kind), keys, values, causal=kind == "intra", scale=place.scale)

    return merge([part(*segment) for segment in span.segments])[0]


def weights(q: torch.Tensor, kv: KeyValues, layout: Layout, scale: float) -> torch.Tensor:
    """Attention weights of a forward whose rows lie within one chunk.

    Shapes as in `attend`; returns (batch, heads, tokens, ``layout.length``), zero at padding.

    Raises
    ------
    NotImplementedError
        A row crosses into a second chunk.
    """
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], layout.length)
    for group in layout.groups:
        (segment, *others), *more = [span.segments for span in group.spans]
        if others or more:
            raise Unsupported(
                f"output_attentions reaches {group.spans[-1].stop} tokens, beyond the first chunk: "
                "leave output_attentions out for prompts of more than chunk_size - local_size tokens"
            )
        place = SpanPlace(layout, group, group.spans[0], 0, scale * group.temperature, 0)
        keys, _ = place.segment(kv, segment.key_start, segment.key_stop)
        queries = place.rotated(q[group.rows, group.queries], "intra")
        columns = slice(segment.key_start + group.offset, segment.key_stop + group.offset)
        out[group.rows, :, group.queries, columns] = attention_weights(queries, keys, causal=True, scale=place.scale)
    return out
