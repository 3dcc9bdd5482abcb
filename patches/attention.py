"""Replaces ``Attention.forward`` of every family; and the attention functions registered as "qwen_dca"."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_longctx.attention import dense as attention
from qwen_longctx.geometry.layout import Plan
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.patches.method import PatchedMethod

IMPLEMENTATION = "qwen_dca"


def attention_forward(
    patched: PatchedMethod,
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    dual_chunk: Plan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Project, rotate keys by ``position mod stride``, cache, attend by segments, project back."""
    if dual_chunk is None:
        raise RuntimeError(
            f"{type(self).__name__} of a patched model was called without its model's forward, which plans the "
            "positions: call the whole model, or unpatch_qwen() first"
        )
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q = self.q_proj(hidden_states).view(shape)
    k = self.k_proj(hidden_states).view(shape)
    v = self.v_proj(hidden_states).view(shape)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    k = rotate(k, dual_chunk.tables.keys)
    key_means = None
    if past_key_values is not None:
        k, v = _cache(past_key_values, k, v, self.layer_idx, kwargs)
        if isinstance(past_key_values, LongContextCache):
            key_means = past_key_values.layers[self.layer_idx].key_means
    if self.training and self.attention_dropout:
        raise NotImplementedError(
            f"attention_dropout={self.attention_dropout} is not supported by dual chunk attention: set it to 0"
        )
    out = attention.attend(q, k, v, dual_chunk, self.scaling, self.layer_idx, key_means).flatten(2)
    weights = attention.weights(q, k, dual_chunk, self.scaling) if dual_chunk.weights else None
    return self.o_proj(out), weights


def _cache(
    cache: Any, k: torch.Tensor, v: torch.Tensor, layer: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append to any transformers cache; tensors of shape (batch, tokens, kv_heads, head_dim) in and out."""
    if isinstance(cache, LongContextCache):
        return cache.append(k, v, layer)
    extra = {"cache_position": kwargs["cache_position"]} if kwargs.get("cache_position") is not None else None
    keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer, *([extra] if extra else []))
    return keys.transpose(1, 2), values.transpose(1, 2)


def registered_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What ``attn_implementation="qwen_dca"`` runs where the model is not patched: always an error.

    The patch replaces the caller; without it positions are those of plain rotary attention.
    """
    raise RuntimeError(
        f'attn_implementation="{IMPLEMENTATION}" needs the patch, which maps the positions: call patch_qwen() before '
        "loading, or patch_qwen(model)"
    )


def registered_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Hand the 2D padding mask on as it is: never a mask of queries x keys."""
    return attention_mask
