"""The attention backend for NVIDIA devices: vLLM's FlashAttention, once for each kind of segment."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from qwen_longctx.vllm.attention import Segment, attend
from qwen_longctx.vllm.backend import DualChunkBackend, DualChunkBuilder, DualChunkImpl, check_signature

check_signature(
    FlashAttentionImpl.forward,
    *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
)
check_signature(FlashAttentionMetadataBuilder.build, "self", "common_prefix_len", "common_attn_metadata", "fast_build")


class DualChunkFlashAttentionBuilder(DualChunkBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """See `DualChunkBuilder`."""


class DualChunkFlashAttentionImpl(DualChunkImpl, FlashAttentionImpl):  # type: ignore[misc]
    """vLLM's own attention while all sequences of a step end within the first chunk, and a call a segment beyond."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *arguments: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        if attn_metadata is None:
            self.reserve(query.device)
        if self.dual_chunk is None or attn_metadata is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *arguments, **keywords)
        rows, step = attn_metadata.num_actual_tokens, attn_metadata.dual_chunk
        query = query[:rows]
        if step.in_one_chunk:
            rotated = step.rotated(query, "intra")
            return super().forward(layer, rotated, key, value, kv_cache, attn_metadata, output, *arguments, **keywords)
        keys, values = (
            canonicalize_singleton_dim_strides(part)  # as vLLM does: kernels of Hopper ask for it
            for part in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )

        def kernel(q: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = fa_utils.flash_attn_varlen_func(
                q=q,
                k=keys,
                v=values,
                cu_seqlens_q=segment.rows,
                max_seqlen_q=segment.most_queries,
                seqused_k=segment.keys,
                max_seqlen_k=segment.most_keys,
                softmax_scale=self.scale,
                causal=segment.causal,
                block_table=segment.table,
                return_softmax_lse=True,
                fa_version=self.vllm_flash_attn_version,
                num_splits=attn_metadata.max_num_splits,
            )
            # in rows without keys version 2 says +inf, where others say -inf
            return out, lse.masked_fill(lse == torch.inf, -torch.inf) if self.vllm_flash_attn_version == 2 else lse

        output[:rows] = attend(query, step, kernel, self.layer(kv_cache))
        return output


class DualChunkFlashAttentionBackend(DualChunkBackend, FlashAttentionBackend):  # type: ignore[misc]
    """vLLM's FlashAttention backend with dual chunk attention."""

    @staticmethod
    def get_impl_cls() -> type[DualChunkFlashAttentionImpl]:
        return DualChunkFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DualChunkFlashAttentionBuilder]:
        return DualChunkFlashAttentionBuilder
