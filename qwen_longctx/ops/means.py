"""Means of every few keys: of many keys at once, and of those that a decoded token completes, found by the device."""

from __future__ import annotations

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.eight_bit import EightBit, code_numbers, rotated_bias
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton


def mean_keys(k: torch.Tensor, size: int) -> torch.Tensor:
    """Means of every `size` keys of (batch, keys, kv_heads, head_dim): (batch, keys // size, kv_heads, head_dim)."""
    return k[:, : k.shape[1] // size * size].unflatten(1, (-1, size)).mean(dim=2)


def write_mean(keys: torch.Tensor | EightBit, means: torch.Tensor, slot: torch.Tensor, size: int) -> None:
    """Write the mean of the `size` keys among which a new one lies, if it is the last of them.

    If it is not, what is written may be anything, or nothing. All of it is work of the device.

    Parameters
    ----------
    keys : torch.Tensor or EightBit
        Shape (batch, room, kv_heads, head_dim).
    means : torch.Tensor
        Shape (batch, at least room / size, kv_heads, head_dim), of the dtype in which keys are handed out.
    slot : torch.Tensor
        Shape (1,), int64: the number of the new key, which is there already.
    size : int
        A power of 2.
    """
    held = keys if isinstance(keys, torch.Tensor) else keys.codes
    if uses_triton(held, means):
        write_mean_triton(keys, means, slot, size)
        return
    first = slot // size
    index = (first * size + torch.arange(size, device=slot.device)).clamp(max=held.shape[1] - 1)
    some = keys.index_select(1, index) if isinstance(keys, torch.Tensor) else keys.chosen(index).numbers()
    means.index_copy_(1, first, mean_keys(some.to(means.dtype), size))


@on_its_device
def write_mean_triton(keys: torch.Tensor | EightBit, means: torch.Tensor, slot: torch.Tensor, size: int) -> None:
    """See `write_mean`. Nothing is written before the last key."""
    batch, _, kv_heads, head_dim = keys.shape
    plain = isinstance(keys, torch.Tensor)
    k, scales, spots, bias = (keys, None, None, None) if isinstance(keys, torch.Tensor) else keys
    if k.stride(3) != 1 or means.stride(3) != 1 or not (plain or k.is_contiguous()):
        raise ValueError("keys and means must be contiguous in their last dimension, and codes in all of them")
    if batch * kv_heads == 0:
        return
    _write_mean[(batch, kv_heads)](
        k,
        scales,
        None if bias is None else spots,
        None if bias is None else bias.vector,
        None if bias is None else bias.turns,
        means,
        slot,
        *k.stride()[:3],
        *means.stride()[:3],
        kv_heads,
        SIZE=size,
        KEYS=size if bias is None else 1,  # many cosines at once would take much of the stack
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        SCALING=1.0 if bias is None else bias.scaling,
        num_warps=4,
        enable_fp_fusion=False,  # the bias is to be what PyTorch works out
    )


@triton.jit(do_not_specialize=("kv_heads",))
def _write_mean(  # type: ignore[no-untyped-def]
    k, scales, spots, vector, turns, means, slot,
    k_batch, k_token, k_head, m_batch, m_mean, m_head, kv_heads,
    SIZE: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(slot)
    if (last + 1) % SIZE == 0:
        dim = tl.arange(0, DIM)
        real = dim < HEAD_DIM
        place = k + batch * k_batch + head * k_head + dim[None, :]
        total = tl.zeros((DIM,), tl.float32)
        for first in range(0, SIZE, KEYS):
            at = last + 1 - SIZE + first + tl.arange(0, KEYS)
            codes = tl.load(place + at[:, None] * k_token, mask=real[None, :], other=0)
            if scales is None:
                numbers = codes.to(tl.float32)
            else:
                token = batch * (k_batch // k_token) + at
                numbers = code_numbers(codes) * tl.load(scales + token * kv_heads + head)[:, None]
                if vector is not None:
                    spot = tl.load(spots + token)[:, None]
                    numbers += rotated_bias(vector + head * HEAD_DIM, turns, spot, dim[None, :], HEAD_DIM, SCALING)
                numbers = numbers.to(means.dtype.element_ty).to(tl.float32)
            total += tl.sum(numbers, 0)
        place = means + batch * m_batch + (last // SIZE) * m_mean + head * m_head + dim
        tl.store(place, (total * (1.0 / SIZE)).to(means.dtype.element_ty), mask=real)
