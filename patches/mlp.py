"""Replaces the forward of MLPs: slices of tokens, so that no activation grows with the prompt."""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx.config import LongContextConfig
from qwen_longctx.ops import norm as fused
from qwen_longctx.patches.method import PatchedMethod

_DEFAULT = LongContextConfig.mlp_chunk_size


def mlp_forward(patched: PatchedMethod, self: Any, x: torch.Tensor) -> torch.Tensor:
    """The stock MLP on `mlp_chunk_size` tokens at a time; `x` of shape (..., tokens, hidden)."""
    size = patched.overrides.get("mlp_chunk_size", _DEFAULT)
    if x.shape[-2] <= size or torch.is_grad_enabled():
        return patched.stock(self, x)
    out = torch.empty_like(x)
    for part, target in zip(x.split(size, dim=-2), out.split(size, dim=-2), strict=True):
        target.copy_(_slice(patched, self, part))
    return out


def _slice(patched: PatchedMethod, self: Any, x: torch.Tensor) -> torch.Tensor:
    if fused.pays(x) and self.config.hidden_act == "silu":
        return self.down_proj(fused.silu_mul(self.gate_proj(x), self.up_proj(x)))
    return patched.stock(self, x)
