"""The rotations: one for keys, one for queries towards each kind of segment.

Positions never exceed ``chunk_size``, and angles are computed in float64, so tables stay exact at any length.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import NamedTuple

import torch

from qwen_longctx.geometry.positions import Kind, key_positions, query_positions, selection_positions
from qwen_longctx.ops import rotate as ops_rotate


class Rotation(NamedTuple):
    """Cosines and signed sines, each of shape (rows, tokens, 1, head_dim) in the working dtype.

    Rows is 1 or the batch; the first half of `sin` is negated, as the rotation wants it.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def rows(self, rows: slice, tokens: slice) -> Rotation:
        """The part for some rows of the batch and some tokens."""
        if tokens.stop - tokens.start == self.cos.shape[1] and self.cos.shape[0] == 1:
            return self
        rows = rows if self.cos.shape[0] > 1 else slice(None)
        tokens = tokens if self.cos.shape[1] > 1 else slice(None)
        return Rotation(self.cos[rows, tokens], self.sin[rows, tokens])


def rotation(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    dtype: torch.dtype,
    factor: torch.Tensor | None = None,
) -> Rotation:
    """Table for integer `positions`.

    Parameters
    ----------
    positions : torch.Tensor
        Shape (rows, tokens), integer.
    inv_freq : torch.Tensor
        Shape (head_dim / 2,): the module's own, so that YaRN and linear scaling hold.
    attention_scaling : float
        The module's own factor (1 but for YaRN).
    dtype : torch.dtype
        Of the table.
    factor : torch.Tensor, optional
        Shape (rows, tokens): what is rotated is multiplied by it too.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = positions[..., None, None].to(exact) * inv_freq.to(positions.device)
    angles = torch.cat((-angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if attention_scaling != 1:
        cos, sin = cos * attention_scaling, sin * attention_scaling
    if factor is not None:
        cos, sin = cos * factor[..., None, None], sin * factor[..., None, None]
    return Rotation(cos.to(dtype), sin.to(dtype))


def temperature(lengths: torch.Tensor, original_max_position_embeddings: int) -> torch.Tensor:
    """Factor ``f²`` on the logits of sequences of so many tokens: `config.Geometry.temperature` of a float tensor."""
    return (0.1 * (lengths / original_max_position_embeddings).log() + 1.0).clamp(min=1.0) ** 2


def rotate(x: torch.Tensor, table: Rotation) -> torch.Tensor:
    """Rotate `x`, shape (batch, tokens, heads, head_dim), by halves (the NeoX layout that Qwen uses)."""
    return ops_rotate.rotate(x, table.cos, table.sin)


class RotaryTables:
    """Rotations of one forward: `keys`, and those of queries by segment kind.

    `spots`, shape (1 or rows, tokens), are the positions by which keys are rotated, `source` frequencies and scaling.

    Parameters
    ----------
    positions : torch.Tensor
        Shape (rows, tokens), integer positions in the sequence.
    kinds : set of str
        Segment kinds that occur.
    stride, chunk_size : int
        Geometry, in tokens.
    inv_freq, attention_scaling, dtype
        As in `rotation`.
    factors : torch.Tensor, optional
        Shape (1 or rows, tokens), float64: factor on the logits of every query, which its rotations take in, so that
        neither keys nor the softmax scale know of it.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        kinds: set[Kind],
        stride: int,
        chunk_size: int,
        inv_freq: torch.Tensor,
        attention_scaling: float,
        dtype: torch.dtype,
        factors: torch.Tensor | None = None,
    ) -> None:
        table = partial(rotation, inv_freq=inv_freq, attention_scaling=attention_scaling, dtype=dtype)
        self._table: partial[Rotation] | None = table
        self._geometry = stride, chunk_size
        self._factors = factors
        self.spots = key_positions(positions, stride)
        self.source = inv_freq, attention_scaling
        self.keys = table(self.spots)
        self.queries: dict[Kind, Rotation] = {"intra": self.keys}
        if factors is not None:
            self.queries["intra"] = table(key_positions(positions, stride), factor=factors)
        if "successive" in kinds:
            self.queries["successive"] = table(
                query_positions("successive", positions, stride, chunk_size), factor=factors
            )
        if "inter" in kinds:
            every = positions[:1, :1] if factors is None else positions
            self.queries["inter"] = table(query_positions("inter", every, stride, chunk_size), factor=factors)

    @classmethod
    def of_keys(
        cls, keys: Rotation, spots: torch.Tensor, inv_freq: torch.Tensor, attention_scaling: float
    ) -> RotaryTables:
        """The rotation of keys alone, of a forward whose queries have theirs in a `Reach`."""
        tables = object.__new__(cls)
        tables.spots, tables.source = spots, (inv_freq, attention_scaling)
        tables.keys, tables.queries, tables._factors, tables._table = keys, {}, None, None
        return tables

    def selection(self, kind: Kind, positions: torch.Tensor, rows: slice, tokens: slice) -> Rotation:
        """Rotation of queries that only select keys of one kind of segment.

        Parameters
        ----------
        kind : str
        positions : torch.Tensor
            Shape (1, tokens), integer positions of the queries.
        rows, tokens : slice
            Where the queries stand in this forward.
        """
        factors = self._factors
        if factors is not None:
            factors = factors[rows if factors.shape[0] > 1 else slice(None), tokens]
        assert self._table is not None
        return self._table(selection_positions(kind, positions, *self._geometry), factor=factors)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of these tables."""
        tables = [part for table in (self.keys, *self.queries.values()) for part in table]
        return [*tables, self.spots, self.source[0], *([] if self._factors is None else [self._factors])]

    def to(self, device: torch.device) -> RotaryTables:
        """The same tables on another device."""
        moved = copy(self)
        moved._factors = None if self._factors is None else self._factors.to(device, non_blocking=True)
        moved.spots = self.spots.to(device, non_blocking=True)
        moved.source = self.source[0].to(device, non_blocking=True), self.source[1]
        if self._table is not None:
            moved._table = partial(self._table.func, **{**self._table.keywords, "inv_freq": moved.source[0]})
        moved.keys = Rotation(*(t.to(device, non_blocking=True) for t in self.keys))
        moved.queries = {
            kind: moved.keys if table is self.keys else Rotation(*(t.to(device, non_blocking=True) for t in table))
            for kind, table in self.queries.items()
        }
        return moved
