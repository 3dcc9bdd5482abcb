"""Numbers in 8 bits: whole numbers or floats of 3 bits behind the point, with one scale for each vector."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from qwen_longctx.ops.device import cast

_LARGEST = {"int8": 127.0, "fp8": 448.0}
KINDS = tuple(_LARGEST)
CODES = {"int8": torch.int8, "fp8": torch.uint8}
TILE = 64  # positions by which a `KeyBias` is rotated beforehand


class KeyBias(NamedTuple):
    """What all keys of a layer have in common, and how it was rotated along with them.

    Attributes
    ----------
    vector : torch.Tensor
        Shape (kv_heads, head_dim), float32, not rotated.
    tile : torch.Tensor
        Shape (kv_heads, TILE, head_dim), of the dtype of the queries: the vector at the spots from 0 on.
    turns : torch.Tensor
        Shape (head_dim / 2,), float64: the frequencies, in full turns a position.
    scaling : float
        Factor on all rotated vectors, 1 but for YaRN.
    """

    vector: torch.Tensor
    tile: torch.Tensor
    turns: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, vector: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype) -> KeyBias:
        """Of a vector as it stands in a layer, for queries of `dtype`."""
        bias = cls(vector.float(), vector, inv_freq.double() / (2 * math.pi), scaling)
        tile = bias.at(torch.arange(TILE, device=vector.device)).transpose(0, 1)
        return bias._replace(tile=tile.to(dtype).contiguous())

    def to(self, device: torch.device) -> KeyBias:
        """The same on another device."""
        return KeyBias(self.vector.to(device), self.tile.to(device), self.turns.to(device), self.scaling)

    def at(self, spots: torch.Tensor) -> torch.Tensor:
        """The vector as keys at integer `spots` hold it, shape (*spots, kv_heads, head_dim), float32."""
        angles = (spots[..., None, None].double() * self.turns).frac() * (2 * math.pi)
        cos, sin = ((x * self.scaling).float() for x in (angles.cos(), angles.sin()))
        first, second = self.vector.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class EightBit(NamedTuple):
    """Keys or values in 8 bits, as `quantise` makes them, with the bias that was taken out of keys before.

    Attributes
    ----------
    codes : torch.Tensor
        Shape (batch, tokens, kv_heads, head_dim), contiguous: int8, or uint8 for "fp8".
    scales : torch.Tensor
        Shape (batch, tokens, kv_heads, 1), float32, contiguous.
    spots : torch.Tensor, optional
        Shape (batch, tokens), int32: positions modulo the stride by which the bias was rotated.
    bias : KeyBias, optional
        None where nothing was taken out.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    spots: torch.Tensor | None = None
    bias: KeyBias | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the numbers."""
        return self.codes.shape

    def part(self, tokens: slice) -> EightBit:
        """Some of the tokens."""
        spots = None if self.spots is None else self.spots[:, tokens]
        return EightBit(self.codes[:, tokens], self.scales[:, tokens], spots, self.bias)

    def numbers(self) -> torch.Tensor:
        """What all of it stands for, in float32."""
        exact = dequantise(self.codes, self.scales)
        return exact if self.bias is None or self.spots is None else exact + self.bias.at(self.spots)


def quantise(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors in 8 bits, each with the scale that puts its largest number at the end of the range.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., head_dim), any float dtype.
    kind : {"int8", "fp8"}
        "fp8" are numbers of 4 bits of exponent and 3 of fraction (e4m3).

    Returns
    -------
    codes : torch.Tensor
        Shape of `x`: int8, or for "fp8" the bits of the numbers as uint8.
    scales : torch.Tensor
        Shape (..., 1), float32. A vector that holds what is no number has a scale that is none.
    """
    exact, most = x.float(), _LARGEST[kind]
    scales = exact.abs().amax(-1, keepdim=True) / most
    shrunk = (exact / scales.where(scales != 0, 1.0)).clamp(-most, most)
    if kind == "int8":
        return shrunk.round().nan_to_num().to(torch.int8), scales
    return shrunk.to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What `quantise` stands for, in float32 or rounded to `dtype`."""
    numbers = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    return cast(numbers.float() * scales, dtype or torch.float32)
