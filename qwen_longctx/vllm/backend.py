"""What the backends for CPUs and for GPUs share: each is vLLM's own, with these classes in front of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType

from qwen_longctx.checkpoint import Heads
from qwen_longctx.errors import MissingPackage, Unsupported
from qwen_longctx.ops.decode import why_not
from qwen_longctx.vllm.attention import AnyStep, Decoding, Layer, Reaches, lay_out
from qwen_longctx.vllm.settings import DualChunk, refuse_cache, settings_of, uses_dual_chunk
from qwen_longctx.vllm.sparse import RecallLog, SparsePrefill


class DualChunkBackend:
    """A backend that knows dual chunk attention."""


class DualChunkImpl:
    """The attention of a layer. `dual_chunk` is None in models without dual chunk attention."""

    def __init__(
        self,
        *arguments: Any,
        layer_idx: int | None = None,
        dual_chunk_attention_config: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.dual_chunk: DualChunk | None = None
        if dual_chunk_attention_config is None:
            return
        if self.attn_type != AttentionType.DECODER:  # type: ignore[attr-defined]
            raise Unsupported(
                "dual chunk attention is causal, and this model attends in both directions: remove "
                "dual_chunk_attention_config from config.json or --hf-overrides"
            )
        refuse_cache(self.kv_cache_dtype)  # type: ignore[attr-defined]  # which a quantised checkpoint can choose
        engine = get_current_vllm_config()
        model = engine.model_config
        settings = settings_of(model.hf_text_config)
        self.dual_chunk = settings.in_steps_of(engine.scheduler_config.max_num_batched_tokens)
        self.number, self._longest = layer_idx or 0, model.max_model_len
        heads: int = self.num_heads  # type: ignore[attr-defined]
        self.sparse = SparsePrefill(
            self.dual_chunk,
            model.hf_text_config,
            Heads(heads, self.num_kv_heads, heads * get_tensor_model_parallel_rank()),  # type: ignore[attr-defined]
            torch.get_default_device(),
            model.dtype,
        )

    def layer(self, pages: torch.Tensor) -> Layer:
        """This layer on its pages."""
        return Layer(pages, self.scale, self.number)  # type: ignore[attr-defined]

    def reserve(self, device: torch.device) -> None:
        """Take for a moment what a layer needs beside its pages for the longest prompt.

        vLLM calls an attention without metadata where it measures how much memory a step takes.
        """
        if self.dual_chunk is not None:
            torch.empty(self.sparse.room(self._longest), dtype=torch.uint8, device=device)


class DualChunkBuilder:
    """Prepares the step of the engine for all layers of one kind."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        found = [layer.impl for layer in layers.values() if getattr(layer.impl, "dual_chunk", None) is not None]
        self._settings: DualChunk | None = None
        self._reaches: Reaches | None = None
        self._page_size = kv_cache_spec.block_size
        self._dtype = vllm_config.model_config.dtype
        if found:
            first = found[0]  # all layers have the same settings
            self._settings, self._sparse = first.dual_chunk, first.sparse
            self._settings.check_page_size(self._page_size)
            self._inv_freq = self._settings.inv_freq(device)
            if decodes_in_one_pass(vllm_config, kv_cache_spec):
                captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
                most = max(vllm_config.scheduler_config.max_num_seqs, captured)
                self._reaches = Reaches(self._settings.geometry, self._inv_freq, most, self._dtype)
            self._log = RecallLog(self._sparse.name)
            self._sparse.announce(vllm_config.model_config.max_model_len)
            self.supports_draft_decode_metadata_update = False  # it would leave our part of the metadata behind

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Of steps in which every request decodes a token; others hold the segments of their own lengths."""
        if uses_dual_chunk(vllm_config.model_config.hf_text_config):
            once = decodes_in_one_pass(vllm_config, kv_cache_spec)
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if once else AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The metadata of vLLM's own backend, with a step as its attribute `dual_chunk` where the model wants it."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self._settings is not None:
            metadata.dual_chunk = self._step(common_attn_metadata, self._settings)
        return metadata

    def _step(self, common: Any, settings: DualChunk) -> AnyStep:
        table, most_queries = common.block_table_tensor, common.max_query_len
        one_each = most_queries == 1 and common.num_actual_tokens == len(common.seq_lens)
        if self._reaches is not None and one_each and len(common.seq_lens) <= self._reaches.most:
            self._log.step(None)
            return Decoding(self._reaches.of(common.seq_lens), table)
        size = {"longest": common.max_seq_len, "most_queries": most_queries}
        plan = self._sparse.plan(common.query_start_loc, common.seq_lens, **size)
        self._log.step(plan)
        step = lay_out(
            plan,
            settings.geometry,
            self._inv_freq,
            common.query_start_loc,
            common.query_start_loc_cpu,
            common.seq_lens,
            rows=common.num_actual_tokens,
            dtype=self._dtype,
            **size,
        )
        return step.on(table, self._page_size)

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """The same step on other pages."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)  # type: ignore[misc]
        if self._settings is not None:
            updated.dual_chunk = metadata.dual_chunk.on(blk_table, self._page_size)
        return updated


def decodes_in_one_pass(vllm_config: Any, kv_cache_spec: Any) -> bool:
    """Whether a model with dual chunk attention decodes by `qwen_longctx.ops.decode` on its pages."""
    model = vllm_config.model_config
    kernel = settings_of(model.hf_text_config).settings.kernel
    return not why_not(kernel, vllm_config.device_config.device, model.dtype, kv_cache_spec.head_size, 1)


def check_signature(function: Callable[..., Any], *expected: str) -> None:
    """Refuse a vLLM in which a method that is overridden here takes other arguments than this was written for.

    Raises
    ------
    ImportError
    """
    found = tuple(inspect.signature(function).parameters)
    if found[: len(expected)] != expected:
        import vllm

        raise MissingPackage(
            f"{function.__qualname__} of vLLM {vllm.__version__} takes ({', '.join(found)}), and qwen-longctx was "
            f"written for ({', '.join(expected)}): install a version of vLLM that docs/serving.md names"
        )
