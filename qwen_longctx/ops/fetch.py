"""Blocks of keys and values from host memory to their places in buffers on the device, read by the device itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_longctx.ops.decode import BLOCK
from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

Stretches = Sequence[tuple[int, torch.Tensor]]  # number of the first token, and (batch, tokens, kv_heads, head_dim)


def fetch(sources: Stretches, places: torch.Tensor, unit: int, blocks: torch.Tensor, target: torch.Tensor) -> None:
    """Copy listed blocks of `ops.decode.BLOCK` tokens; the rest of `target` stays as it is.

    Parameters
    ----------
    sources : sequence of (int, torch.Tensor)
        Tensors on the host that follow one another, each contiguous and with the number of its first token; for CUDA
        devices in memory that is registered.
    places : torch.Tensor
        Of them, see `places_of`; on the device.
    unit : int
        As of `places_of`.
    blocks : torch.Tensor
        Shape (batch, kv_heads, count), int32: as of `ops.decode.decode`. What lies beyond `target` is left out.
    target : torch.Tensor
        Shape (batch, tokens, kv_heads, head_dim), of the dtype of the sources.
    """
    if uses_triton(target):
        return fetch_triton(places, unit, blocks, target)
    for start, source in sources:
        stop = max(start, min(start + source.shape[1], target.shape[1]))
        block = torch.arange(start, stop, device=blocks.device) // BLOCK
        listed = (blocks[:, :, None] == block[:, None]).any(-1).transpose(1, 2)[..., None]  # (batch, tokens, kv_heads)
        part = target[:, start:stop]
        part.copy_(source[:, : stop - start].to(part.device).where(listed.to(part.device), part))
    return None


def places_of(sources: Stretches, unit: int, device: torch.device) -> torch.Tensor:
    """Addresses of every `unit` tokens of every row, int64 of shape (batch, units), on `device`.

    Each source holds a multiple of `unit` tokens, and a block of `ops.decode.BLOCK` tokens lies within a unit.
    """
    rows = []
    for row in range(sources[0][1].shape[0]):
        starts = [
            torch.arange(source.shape[1] // unit, device="cpu") * source[row, :unit].nbytes + source[row].data_ptr()
            for _, source in sources
        ]
        rows.append(torch.cat(starts))
    return torch.stack(rows).to(device, non_blocking=True)


@on_its_device
def fetch_triton(places: torch.Tensor, unit: int, blocks: torch.Tensor, target: torch.Tensor) -> None:
    """See `fetch`: a launch in which every program copies a block of a head."""
    batch, tokens, kv_heads, head_dim = target.shape
    count = blocks.shape[2]
    if count == 0 or target.numel() == 0:
        return
    _fetch[(count, batch * kv_heads)](
        places,
        blocks.contiguous(),
        target,
        *target.stride()[:3],
        tokens,
        kv_heads,
        places.shape[1],
        count,
        UNIT=unit,
        BLOCK=BLOCK,
        HEAD_DIM=head_dim,
        DIM=max(16, triton.next_power_of_2(head_dim)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=("tokens", "kv_heads", "units", "count"))
def _fetch(  # type: ignore[no-untyped-def]
    places, blocks, target, batch_stride, token_stride, head_stride, tokens, kv_heads, units, count,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(1)
    batch, head = (owner // kv_heads).to(tl.int64), owner % kv_heads
    first = tl.load(blocks + owner.to(tl.int64) * count + tl.program_id(0)) * BLOCK
    token = first + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM)
    inside = (token < tokens)[:, None] & (dim < HEAD_DIM)[None, :]
    address = tl.load(places + batch * units + first // UNIT, mask=first < tokens, other=0)
    source = tl.multiple_of(address.to(tl.pointer_type(target.dtype.element_ty)), 16)  # read 16 bytes at a time
    spots = (token - first // UNIT * UNIT)[:, None] * (kv_heads * HEAD_DIM) + head * HEAD_DIM + dim[None, :]
    x = tl.load(source + spots, mask=inside, other=0)
    spots = batch * batch_stride + token[:, None].to(tl.int64) * token_stride + head * head_stride + dim[None, :]
    tl.store(target + spots, x, mask=inside)
