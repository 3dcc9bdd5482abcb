"""The attention backend for CPUs: slow, for tests and for trying things out."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from qwen_longctx.vllm.attention import Segment, attend, paged_attention
from qwen_longctx.vllm.backend import DualChunkBackend, DualChunkBuilder, DualChunkImpl, check_signature

check_signature(
    CPUAttentionBackendImpl.forward,
    *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
)
check_signature(CPUAttentionBackendImpl.do_kv_cache_update, "self", "layer", "key", "value", "kv_cache", "slot_mapping")
check_signature(CPUAttentionMetadataBuilder.build, "self", "common_prefix_len", "common_attn_metadata", "fast_build")


class DualChunkCPUAttentionBuilder(DualChunkBuilder, CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """See `DualChunkBuilder`."""


class DualChunkCPUAttentionImpl(DualChunkImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """vLLM's kernel tells no log-sum-exp, so dual chunk attention runs in PyTorch, at any length.

    Its pages are laid out as their shape says, (pages, kv_heads, page_size, 2 * head_dim), keys before values; vLLM's
    kernel keeps them in an order of its own.
    """

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.dual_chunk is None:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        rows = (slot_mapping >= 0).nonzero().squeeze(1)
        slots = slot_mapping[rows]
        page_size = kv_cache.shape[2]
        kv_cache[slots // page_size, :, slots % page_size] = torch.cat((key[rows], value[rows]), dim=-1)

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
        rows = attn_metadata.num_actual_tokens

        def kernel(q: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
            return paged_attention(q, kv_cache, segment, self.scale)

        output[:rows] = attend(query[:rows], attn_metadata.dual_chunk, kernel, self.layer(kv_cache))
        return output


class DualChunkCPUAttentionBackend(DualChunkBackend, CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's backend for CPUs with dual chunk attention."""

    @staticmethod
    def get_impl_cls() -> type[DualChunkCPUAttentionImpl]:
        return DualChunkCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DualChunkCPUAttentionBuilder]:
        return DualChunkCPUAttentionBuilder
