"""PyTorch's FlexAttention (Triton) on block lists: any CUDA device from compute capability 8.0 on."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from qwen_longctx.ops import triton_runtime
from qwen_longctx.ops.compact import BlockLists
from qwen_longctx.ops.device import HALF, older_than

_LARGEST_TILE = 128  # queries or keys
_VARIANTS = 64  # to compile: causal or not, one tile or many, whole tiles or not, models of other shapes


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float, blocks: BlockLists
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over listed blocks. See `ops`.

    The mask is built from the lists as they are: ``BlockMask.from_kv_blocks`` would also transpose them for a backward
    pass, through a dense matrix of tiles x blocks for every head.
    """
    with _room_for_variants():
        out, lse = _compiled()(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=_mask(blocks, q.shape[1], k.shape[1], causal),
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
            return_lse=True,
            kernel_options=_options(q.dtype, blocks.size),
        )
    return out.transpose(1, 2), lse


def _options(dtype: torch.dtype, size: int) -> dict[str, Any] | None:
    """Tiles of PyTorch's kernel for blocks of fewer tokens than its own tiles, which it refuses by itself."""
    if size >= _LARGEST_TILE:
        return None
    keys = size if dtype in HALF else size // 2  # what shared memory holds
    # its other kernel, for few queries, has tiles that follow the heads
    return {"BLOCK_M": size, "BLOCK_N": keys, "FORCE_USE_FLEX_ATTENTION": True}


def _room_for_variants() -> Any:
    """PyTorch compiles 8 variants of a function by itself."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    return config.patch({name: _VARIANTS})


@lru_cache
def _compiled() -> Any:
    # fullgraph: beyond the limit it must fail, because uncompiled it ignores the lists
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _mask(blocks: BlockLists, queries: int, keys: int, causal: bool) -> BlockMask:
    """Under a causal mask every listed block counts as seen in part, else as seen whole."""
    # a tensor: a number would compile anew each time; filled on the device, for a copy would wait for it
    past = torch.full((), keys - queries, dtype=torch.int64, device=blocks.counts.device)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= query + past

    # the kernel walks both lists with the strides of the first, so that an empty one must have the other's shape
    none = (torch.zeros_like(blocks.counts), blocks.indices)
    listed = (blocks.counts, blocks.indices)
    in_part, whole = (listed, (None, None)) if causal else (none, listed)
    return BlockMask(
        (queries, keys),
        in_part[0],
        in_part[1],
        whole[0],
        whole[1],
        None,
        None,
        None,
        None,
        (blocks.size, blocks.size),
        sees if causal else noop_mask,
    )


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why this engine cannot take such lists; empty if it can."""
    if lack := older_than(device, (8, 0)):
        return lack
    if not triton_runtime.AVAILABLE:
        return "needs the package triton"
    if dtype == torch.float64:
        return "takes no float64"
    fits = size >= 64 and size & (size - 1) == 0
    return "" if fits else f"takes blocks of 64, 128, 256, … tokens, not {size}"
