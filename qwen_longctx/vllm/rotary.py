"""The rotary embedding of dual chunk attention: keys only, because queries rotate differently towards each segment."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.rotary_embedding.dual_chunk_rope import DualChunkRotaryEmbedding
from vllm.v1.attention.selector import get_attn_backend

from qwen_longctx.errors import PatchConflict, Unsupported
from qwen_longctx.vllm.settings import DualChunk, refuse_engine, settings_of

_REPLACED = "DualChunkRotaryEmbedding"


def register() -> None:
    """Make vLLM construct `KeyRotary` where a model asks for the class that it replaces.

    Raises
    ------
    RuntimeError
        Another plugin has replaced it.
    """
    found = op_registry_oot.get(_REPLACED)
    if found is None:
        CustomOp.register_oot(KeyRotary, name=_REPLACED)
    elif found is not KeyRotary:
        raise PatchConflict(
            f"{found.__module__} has replaced {_REPLACED} of vLLM already: set VLLM_PLUGINS to the plugins that you "
            "want"
        )


class KeyRotary(DualChunkRotaryEmbedding):
    """Rotates keys by ``position mod s`` and passes queries on as they are; the backend rotates them.

    It is the first part of a model that knows of dual chunk attention, so it also refuses what cannot be done.
    """

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position_embeddings: int,
        base: float,
        is_neox_style: bool,
        dtype: torch.dtype,
        **geometry: Any,  # read from the config, where all of it is
    ) -> None:
        CustomOp.__init__(self)
        engine = get_current_vllm_config()
        settings = settings_of(engine.model_config.hf_text_config)
        refuse_engine(engine)
        if not is_neox_style or rotary_dim != head_size or (base, head_size) != (settings.base, settings.head_dim):
            raise Unsupported(
                f"the model rotates {rotary_dim} of {head_size} numbers a head by the base {base}, and its config says "
                f"all of {settings.head_dim} by {settings.base}: correct config.json or --hf-overrides"
            )
        _refuse_backend(head_size, dtype, engine.cache_config.cache_dtype)
        self.head_size = head_size
        self.stride = settings.geometry.stride
        self.register_buffer("table", _key_table(settings, dtype), persistent=False)

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, offsets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`query`, and `key` of shape (tokens, kv_heads * head_size) rotated for the `positions`, shape (tokens,)."""
        if offsets is not None:
            positions = positions + offsets
        cos, sin = self.table[positions % self.stride].unsqueeze(-2).float().chunk(2, dim=-1)
        first, second = key.unflatten(-1, (-1, self.head_size)).float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return query, rotated.to(key.dtype).flatten(-2)

    forward_cuda = forward_native
    forward_cpu = forward_native
    forward_oot = forward_native

    def extra_repr(self) -> str:
        return f"head_size={self.head_size}, stride={self.stride}"


def _key_table(settings: DualChunk, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines of the positions of a chunk, shape (stride, head_dim)."""
    device = torch.get_default_device()
    places = torch.arange(settings.geometry.stride, dtype=torch.float64, device=device)
    angles = places[:, None] * settings.inv_freq(device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def _refuse_backend(head_size: int, dtype: torch.dtype, cache_dtype: str) -> None:
    from qwen_longctx.vllm.backend import DualChunkBackend

    chosen = get_attn_backend(head_size, dtype, cache_dtype)
    if not issubclass(chosen, DualChunkBackend):
        raise Unsupported(
            f"vLLM chose the attention backend {chosen.get_name()}, which knows no dual chunk attention: start it with "
            "--attention-backend FLASH_ATTN"
        )
