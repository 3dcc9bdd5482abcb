"""Numbers in 8 bits: whole numbers or floats of 3 bits behind the point, with one scale for each vector."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from qwen_longctx.ops.device import cast, uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

_LARGEST = {"int8": 127.0, "fp8": 448.0}
KINDS = tuple(_LARGEST)
CODES = {"int8": torch.int8, "fp8": torch.uint8}
AT_A_TIME = 16384  # tokens that PyTorch has in float32 at once
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

    def chosen(self, index: torch.Tensor) -> EightBit:
        """The tokens of some numbers, shape (count,)."""
        codes, scales = (x.index_select(1, index) for x in (self.codes, self.scales))
        return EightBit(codes, scales, None if self.spots is None else self.spots.index_select(1, index), self.bias)

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
    scales = exact.abs().amax(-1, keepdim=True) * (1 / most)  # as CUDA divides by a number
    shrunk = (exact / scales.where(scales != 0, 1.0)).clamp(-most, most)
    if kind == "int8":
        return shrunk.round().nan_to_num().to(torch.int8), scales
    return shrunk.to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What `quantise` stands for, in float32 or rounded to `dtype`."""
    numbers = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    return cast(numbers.float() * scales, dtype or torch.float32)


def write(
    buffers: tuple[torch.Tensor, ...],
    k: torch.Tensor,
    v: torch.Tensor,
    spots: torch.Tensor,
    bias: KeyBias | None,
    *,
    start: int = 0,
    slot: torch.Tensor | None = None,
) -> None:
    """Quantise tokens and write them to where a store holds them, from number `start` on, or where the device says.

    Parameters
    ----------
    buffers : tuple of torch.Tensor
        Codes and scales of keys, the same of values, and the spots of keys, contiguous; shapes as in `EightBit`, with
        room for other tokens.
    k, v : torch.Tensor
        Shape (batch, tokens, kv_heads, head_dim); `k` is rotated, its bias along with it.
    spots : torch.Tensor
        Shape (1 or batch, tokens), integer: where `k` was rotated to.
    bias : KeyBias, optional
        Taken out of `k`.
    start : int
    slot : torch.Tensor, optional
        Shape (1,), int64, on the device: where a single token of each row is written, in place of `start`.
    """
    if uses_triton(k, v):
        write_triton(buffers, k, v, spots, bias, start=start, slot=slot)
        return
    kind = "int8" if buffers[0].dtype == torch.int8 else "fp8"
    for at in range(0, k.shape[1], AT_A_TIME):
        keys, values = (x[:, at : at + AT_A_TIME] for x in (k, v))
        here = spots[:, at : at + AT_A_TIME].to(torch.int32).expand(len(k), -1)
        free = keys.float() if bias is None else keys.float() - bias.at(here)
        first = start + at
        for buffer, new in zip(buffers, (*quantise(free, kind), *quantise(values, kind), here), strict=True):
            if slot is None:
                buffer[:, first : first + here.shape[1]] = new
            else:
                buffer.index_copy_(1, slot, new)


@on_its_device
def write_triton(
    buffers: tuple[torch.Tensor, ...],
    k: torch.Tensor,
    v: torch.Tensor,
    spots: torch.Tensor,
    bias: KeyBias | None,
    *,
    start: int = 0,
    slot: torch.Tensor | None = None,
) -> None:
    """See `write`; the same bits, in one launch."""
    batch, tokens, kv_heads, head_dim = k.shape
    if k.numel() == 0:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    _write[(batch * tokens, kv_heads)](
        k,
        v,
        spots,
        slot,
        None if bias is None else bias.vector,
        None if bias is None else bias.turns,
        *buffers,
        *k.stride()[:3],
        *v.stride()[:3],
        spots.stride(0) if spots.shape[0] > 1 else 0,
        spots.stride(1),
        start,
        tokens,
        buffers[0].shape[1],
        kv_heads,
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        SCALING=1.0 if bias is None else bias.scaling,
        num_warps=1,
        enable_fp_fusion=False,  # the bias is to be what PyTorch works out
    )


@triton.jit(
    do_not_specialize=("spots", "s_batch", "s_token", "start", "tokens", "room", "kv_heads")
)  # `spots` is a view that lies at any address
def _write(  # type: ignore[no-untyped-def]
    k, v, spots, slot, vector, turns, k_codes, k_scales, v_codes, v_scales, held_spots,
    k_batch, k_token, k_head, v_batch, v_token, v_head, s_batch, s_token, start, tokens, room, kv_heads,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    batch, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, DIM)
    real = dim < HEAD_DIM
    at = batch * room + start + token
    if slot is not None:
        at += tl.load(slot)
    spot = tl.load(spots + batch * s_batch + token * s_token)
    key = tl.load(k + batch * k_batch + token * k_token + head * k_head + dim, mask=real, other=0.0).to(tl.float32)
    if vector is not None:
        key -= rotated_bias(vector + head * HEAD_DIM, turns, spot, dim, HEAD_DIM, SCALING)
        key = tl.where(real, key, 0.0)
    value = tl.load(v + batch * v_batch + token * v_token + head * v_head + dim, mask=real, other=0.0).to(tl.float32)
    place = at * kv_heads + head
    codes, scale = _quantised(key, k_codes.dtype.element_ty)
    tl.store(k_codes + place * HEAD_DIM + dim, codes, mask=real)
    tl.store(k_scales + place, scale)
    codes, scale = _quantised(value, v_codes.dtype.element_ty)
    tl.store(v_codes + place * HEAD_DIM + dim, codes, mask=real)
    tl.store(v_scales + place, scale)
    if head == 0:
        tl.store(held_spots + at, spot.to(tl.int32))


@triton.jit
def _quantised(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `quantise`. By bits: not every device converts to floats of 8 bits, and the interpreter does not round."""
    most: tl.constexpr = 448.0 if dtype == tl.uint8 else 127.0
    number = x == x
    scale = tl.max(tl.where(number, tl.abs(x), 0.0), 0) * (1.0 / most)
    # a vector that holds what is no number has a scale that is none
    scale = tl.where(tl.min(number.to(tl.int32), 0) == 1, scale, float("nan"))
    shrunk = tl.math.div_rn(x, tl.where(scale != 0, scale, 1.0) + tl.zeros_like(x))
    number = shrunk == shrunk
    shrunk = tl.minimum(tl.maximum(tl.where(number, shrunk, 0.0), -most), most)
    # added to a number of so many bits, what is behind the point is rounded away, halves to the even side
    if dtype == tl.int8:
        code = ((shrunk + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        bits = tl.abs(shrunk).to(tl.int32, bitcast=True)
        large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = ((tl.abs(shrunk) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)  # below 1/64 steps are of 1/512
        code = tl.where(bits < (121 << 23), small, large) | tl.where(shrunk.to(tl.int32, bitcast=True) < 0, 128, 0)
        code = tl.where(number, code, 127)
    return code.to(dtype), scale


@triton.jit
def rotated_bias(  # type: ignore[no-untyped-def]
    vector, turns, spot, dim, HEAD_DIM: tl.constexpr, SCALING: tl.constexpr
):
    """The numbers `dim` of a vector as a key at `spot` holds it; see `KeyBias.at`."""
    real = dim < HEAD_DIM
    angle = spot.to(tl.float64) * tl.load(turns + dim % (HEAD_DIM // 2), mask=real, other=0.0)
    angle = (angle - tl.floor(angle)) * tl.full([1], 6.283185307179586, tl.float64)
    scaling = tl.full([1], SCALING, tl.float64)
    cos, sin = (tl.cos(angle) * scaling).to(tl.float32), (tl.sin(angle) * scaling).to(tl.float32)
    own = tl.load(vector + dim, mask=real, other=0.0)
    other = tl.load(vector + (dim + HEAD_DIM // 2) % HEAD_DIM, mask=real, other=0.0)
    return own * cos + tl.where(dim < HEAD_DIM // 2, -other, other) * sin


@triton.jit
def code_numbers(codes):  # type: ignore[no-untyped-def]
    """Codes as float32, exactly."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        numbers = half.to(tl.float32) * 256.0
    else:
        numbers = codes.to(tl.float32)
    return numbers
