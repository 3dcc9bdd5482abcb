"""Sparse attention of one span."""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx import sparsity
from qwen_longctx.geometry.positions import Kind
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import KeyValues, mean_keys
from qwen_longctx.sparsity.view import Piece, SpanView


def attend_span(q: torch.Tensor, kv: KeyValues, place: Any, request: Any) -> torch.Tensor:
    """Attend from one span to the keys that a selection rule keeps."""
    layout, group, span = place.layout, place.group, place.span
    tiles = request.tiles(span, q.device)
    pieces = tuple(Piece(segment, place.rotated(q, segment.kind)) for segment in span.segments)
    keys, values = place.segment(kv, 0, span.stop)

    def key_means(size: int) -> torch.Tensor:
        if group.offset or not layout.covers_all:
            return mean_keys(keys, size)
        return kv.key_means(size)[:, : span.stop // size]

    def selection_q(kind: Kind, rows: int) -> torch.Tensor:
        positions = torch.arange(span.stop - rows, span.stop, device=q.device)
        last = group.queries.start + place.done + q.shape[1]
        table = layout.tables.selection(kind, positions[None], group.rows, slice(last - rows, last))
        return rotate(q[:, -rows:], table)

    view = SpanView(place.layer, span, tiles, pieces, keys, place.scale, key_means, selection_q)
    return sparsity.attend(view, values, request)
