"""A decoding step: a few new tokens of every row, and where they look, worked out in whole numbers on the host.

All of it goes to the device in two small transfers that nobody waits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.positions import Kind, spans
from qwen_longctx.geometry.rotary import Rotation, rotation
from qwen_longctx.ops.decode import SEGMENTS, Reach

if TYPE_CHECKING:
    from qwen_longctx.geometry.layout import Call, Extent, RotarySource

_KINDS: tuple[Kind, ...] = ("intra", "successive", "inter")
_NOWHERE = [0] * (3 * SEGMENTS)  # of padding: rotary positions, then the borders of the segments


class Numbers(NamedTuple):
    """Where the tokens of a decoding step look, in whole numbers.

    Rows is 1 where all rows of the call are alike, so that tables are worked out once.

    Attributes
    ----------
    table : torch.Tensor
        Shape (rows, tokens, 9), int32: rotary positions towards the three segments, then where each of them begins and
        ends in the cache.
    heat : torch.Tensor
        Shape (rows, tokens), float32: ``f²`` of each token.
    """

    table: torch.Tensor
    heat: torch.Tensor


def lay_out(
    call: Call,
    start: int,
    stop: int,
    *,
    settings: LongContextConfig,
    rotary: RotarySource,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Rotation, Reach, torch.Tensor]:
    """Rotation of the keys of a decoding step, reach of its queries, spots of its keys; see `make_layout`."""
    given = Numbers(*(_to(device, part) for part in numbers(call, start, stop, settings, device)))
    return tables(given, len(call.rows), settings.stride, rotary=rotary, dtype=dtype)


def numbers(call: Call, start: int, stop: int, settings: LongContextConfig, device: torch.device) -> Numbers:
    """The numbers of the tokens ``[start, stop)`` of the cache, on the host, ready to be moved to `device`."""
    rows = call.rows if len(set(call.rows)) > 1 else call.rows[:1]
    table = [[_numbers(row, index, settings) for index in range(start, stop)] for row in rows]
    heat = [[_heat(call, row, index, settings) for index in range(start, stop)] for row in rows]
    # from other memory than pinned, the host would wait for the device
    how: dict[str, Any] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return Numbers(torch.tensor(table, dtype=torch.int32, **how), torch.tensor(heat, dtype=torch.float32, **how))


def tables(
    given: Numbers, batch: int, stride: int, *, rotary: RotarySource, dtype: torch.dtype
) -> tuple[Rotation, Reach, torch.Tensor]:
    """`lay_out` from numbers on the device, for `batch` rows; all of it is work of the device."""
    table, heat = given
    positions = table[..., :SEGMENTS].permute(2, 0, 1)
    borders = table[..., SEGMENTS:].unflatten(-1, (SEGMENTS, 2))
    cos, sin = rotation(positions.flatten(0, 1), rotary.inv_freq, rotary.attention_scaling, dtype)
    cos, sin = (x.unflatten(0, (SEGMENTS, -1)) for x in (cos, sin))
    if heat.shape[0] < batch:
        borders, heat = (x.repeat(batch, *[1] * (x.ndim - 1)) for x in (borders, heat))
    return Rotation(cos[0], sin[0]), Reach(cos, sin, borders.contiguous(), heat, stride), positions[0]


def _numbers(row: Extent, index: int, settings: LongContextConfig) -> list[int]:
    """Rotary positions of a token towards the segments, the first of which is that of its key, and their borders."""
    if not row.first <= index < row.last:
        return _NOWHERE
    position = index - row.first
    within, stride = position % settings.stride, settings.stride
    rotary = [within, min(within + stride, settings.chunk_size), settings.chunk_size]
    segments = {kind: (first, last) for kind, first, last in spans(position, position + 1, stride)[0].segments}
    return rotary + [row.first + border for kind in _KINDS for border in segments.get(kind, (0, 0))]


def _heat(call: Call, row: Extent, index: int, settings: LongContextConfig) -> float:
    """``f²`` of a token; 1 at padding."""
    return call.temperature(row, index - row.first, settings) if row.first <= index < row.last else 1.0


def _to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """Numbers on a device, which nobody waits for."""
    return values if device.type == "cpu" else values.to(device, non_blocking=True)
