"""Dual-chunk geometry in whole numbers: which keys a query attends to, and at which rotary positions.

Source: Dual Chunk Attention (arXiv 2402.17463, equations 2 to 8) as Qwen2.5-1M runs it (clamped at ``chunk_size``).
The stride is ``s = chunk_size - local_size``. A key at position p rotates by ``p mod s``. A query at position
p attends to

=========== ======================= =========================== ========
segment     keys                    query rotates by            mask
=========== ======================= =========================== ========
intra       its own chunk           p mod s                     causal
successive  the previous chunk      min(p mod s + s, c)         none
inter       all earlier chunks      c                           none
=========== ======================= =========================== ========
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kind = Literal["intra", "successive", "inter"]


class Segment(NamedTuple):
    """Keys of positions ``[key_start, key_stop)``, towards which a span of queries rotates in one way."""

    kind: Kind
    key_start: int
    key_stop: int


class Span(NamedTuple):
    """Queries of positions ``[start, stop)``, all in one chunk, and the segments of keys they attend to."""

    start: int
    stop: int
    segments: tuple[Segment, ...]


def spans(start: int, stop: int, stride: int) -> tuple[Span, ...]:
    """Cut the queries ``[start, stop)`` at multiples of `stride` and list each part's segments.

    Parameters
    ----------
    start, stop : int
        Positions of the first query and of the one after the last.
    stride : int
        Length of a chunk, in tokens.

    Returns
    -------
    tuple of Span
        In order. Empty segments are left out; the intra segment is the first of each span.
    """
    cut = []
    while start < stop:
        chunk = start // stride * stride
        end = min(chunk + stride, stop)
        segments = (
            Segment("intra", chunk, end),
            Segment("successive", max(chunk - stride, 0), chunk),
            Segment("inter", 0, chunk - stride),
        )
        cut.append(Span(start, end, tuple(s for s in segments if s.key_start < s.key_stop)))
        start = end
    return tuple(cut)


def key_positions(positions: torch.Tensor, stride: int) -> torch.Tensor:
    """Rotary positions of keys: ``p mod s``. Integer tensor of any shape."""
    return positions % stride


def query_positions(kind: Kind, positions: torch.Tensor, stride: int, chunk_size: int) -> torch.Tensor:
    """Rotary positions of queries towards the keys of one segment. Integer tensor of any shape."""
    if kind == "intra":
        return positions % stride
    if kind == "successive":
        return (positions % stride + stride).clamp(max=chunk_size)
    return torch.full_like(positions, chunk_size)


def selection_positions(kind: Kind, positions: torch.Tensor, stride: int, chunk_size: int) -> torch.Tensor:
    """Rotary positions of queries that only select keys: not clamped, so that diagonals stay diagonals.

    Qwen2.5-1M report, section 5.2. Integer tensor of any shape.
    """
    return positions % stride + {"intra": 0, "successive": stride, "inter": chunk_size}[kind]
