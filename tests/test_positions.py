"""Geometry against the definition, by property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from definition import relative_rotations, rotated
from qwen_longctx.geometry.positions import key_positions, query_positions, spans
from qwen_longctx.geometry.rotary import RotaryTables, rotate, rotation


@st.composite
def geometries(draw):
    chunk_size = draw(st.integers(4, 40))
    return chunk_size, draw(st.integers(1, chunk_size // 2))


@given(geometries(), st.integers(0, 120), st.integers(1, 90))
def test_every_pair_is_in_one_segment_of_the_right_kind(geometry, start, length):
    chunk_size, local_size = geometry
    stride = chunk_size - local_size
    kinds = {}
    for span in spans(start, start + length, stride):
        assert span.start // stride == (span.stop - 1) // stride
        for segment in span.segments:
            for i in range(span.start, span.stop):
                stop = min(segment.key_stop, i + 1) if segment.kind == "intra" else segment.key_stop
                for j in range(segment.key_start, stop):
                    assert (i, j) not in kinds
                    kinds[i, j] = segment.kind
    assert set(kinds) == {(i, j) for i in range(start, start + length) for j in range(i + 1)}
    for (i, j), kind in kinds.items():
        at = torch.tensor([i])
        found = (
            int(query_positions(kind, at, stride, chunk_size)),
            int(key_positions(torch.tensor([j]), stride)),
        )
        assert found == relative_rotations(i, j, chunk_size, local_size)


@given(geometries(), st.integers(0, 300), st.integers(0, 300))
def test_no_distance_exceeds_the_chunk_size(geometry, i, j):
    chunk_size, local_size = geometry
    at_q, at_k = relative_rotations(max(i, j), min(i, j), chunk_size, local_size)
    assert 0 <= at_q - at_k <= chunk_size


@given(geometries(), st.data())
def test_up_to_the_chunk_size_distances_are_true(geometry, data):
    chunk_size, local_size = geometry
    i = data.draw(st.integers(0, chunk_size - 1))
    j = data.draw(st.integers(0, i))
    at_q, at_k = relative_rotations(i, j, chunk_size, local_size)
    assert at_q - at_k == i - j


def test_the_figure_of_the_report():
    """Figure 2 of the Qwen2.5-1M report: trained length 8, chunk 5, local window 3 (clamped at 8, not 7)."""
    rows = [[a - b for a, b in (relative_rotations(i, j, 8, 3) for j in range(i + 1))] for i in range(12)]
    assert rows[4] == [4, 3, 2, 1, 0]
    assert rows[7] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert rows[9] == [8, 7, 6, 5, 4, 4, 3, 2, 1, 0]
    assert rows[11] == [8, 7, 6, 5, 4, 6, 5, 4, 3, 2, 1, 0]


def test_spans_at_the_size_of_the_1m_models():
    (first, second, third, fourth) = spans(0, 1_010_000, 253_952)
    assert [len(s.segments) for s in (first, second, third, fourth)] == [1, 2, 3, 3]
    assert fourth.segments[2] == ("inter", 0, 2 * 253_952)


@pytest.mark.parametrize("scaling", [1.0, 1.2])
def test_rotation_matches_the_definition(scaling):
    inv_freq = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    x = torch.randn(1, 5, 2, 16, dtype=torch.float64)
    positions = torch.tensor([[0, 3, 261_000, 7, 262_144]])
    values = rotate(x, rotation(positions, inv_freq, scaling, torch.float64))
    for t, position in enumerate(positions[0].tolist()):
        for h in range(2):
            torch.testing.assert_close(values[0, t, h], rotated(x[0, t, h], position, inv_freq) * scaling)


def test_tables_hold_only_the_segments_that_occur():
    inv_freq = torch.ones(4)
    tables = RotaryTables(torch.arange(9)[None], {"intra"}, 6, 8, inv_freq, 1.0, torch.float32)
    assert set(tables.queries) == {"intra"}
    both = RotaryTables(torch.arange(9)[None], {"intra", "successive", "inter"}, 6, 8, inv_freq, 1.0, torch.float32)
    assert both.queries["successive"].cos.shape == (1, 9, 1, 8)
    assert both.queries["inter"].cos.shape == (1, 1, 1, 8)
    assert both.to(torch.device("cpu")).queries["intra"] is not None
