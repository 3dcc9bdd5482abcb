"""FlashAttention-4 (``flash_attn.cute``) on block lists: the fastest such kernel on Hopper and newer."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from qwen_longctx.ops.compact import BlockLists
from qwen_longctx.ops.device import older_than
from qwen_longctx.ops.sdpa import sdpa

BLOCK = 128  # its tile of queries and of keys at the head dims of Qwen


def fa4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float, blocks: BlockLists | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over listed blocks; without lists `sdpa`, whose cuDNN is as fast. See `kernels`.

    The end of the keys is masked in the last block of a list only, hence the ascending lists. With ``causal=True``
    and no mask function every listed block is masked, aligned at the bottom right.
    """
    if blocks is None or k.shape[1] == 0:
        return sdpa(q, k, v, causal=causal, scale=scale)
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    # it wants both lists, of blocks that a mask function masks and of others: there is no mask function
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(blocks.counts),
        mask_block_idx=blocks.indices,
        full_block_cnt=blocks.counts,
        full_block_idx=blocks.indices,
        block_size=(blocks.size, blocks.size),
    )
    out, lse, *_ = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=causal,
        pack_gqa=False,  # lists differ between the heads of a group
        block_sparse_tensors=lists,
        return_lse=True,
    )
    return out, lse


@lru_cache
def _installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why this kernel cannot take such lists; empty if it can."""
    # on 8.0 it ignores the lists without a word (flash-attention issue 2897)
    if lack := older_than(device, (9, 0)):
        return lack
    if not _installed():
        return "needs the package flash-attn-4"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes half precision only, not {dtype}"
    if head_dim not in (64, 128):
        return f"takes lists at head dim 64 and 128 only, not {head_dim}"
    return "" if size == BLOCK else f"takes blocks of {BLOCK} tokens only, not {size}"
