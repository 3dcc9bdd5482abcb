"""Numbers in 8 bits: whole numbers or floats of 3 bits behind the point, with one scale for each vector."""

from __future__ import annotations

import torch

from qwen_longctx.ops.device import cast

_LARGEST = {"int8": 127.0, "fp8": 448.0}
KINDS = tuple(_LARGEST)


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
