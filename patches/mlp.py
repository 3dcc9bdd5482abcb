"""Replaces the forward of MLPs: slices of tokens, so that no activation grows with the prompt."""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx.config import LongContextConfig
from qwen_longctx.ops import fp8, norm, thin
from qwen_longctx.ops.fp8 import Rows
from qwen_longctx.patches.linear import rows_for, takes_rows, thin_weights
from qwen_longctx.patches.method import PatchedMethod

_DEFAULT = LongContextConfig.mlp_chunk_size


def mlp_forward(
    patched: PatchedMethod, self: Any, x: torch.Tensor | Rows, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The stock MLP on `mlp_chunk_size` tokens at a time.

    `x` has shape (..., tokens, hidden), and is in 8 bits or not. What `layer_forward` gives as `residual`, of that
    shape, is added to the result in place.
    """
    size = patched.overrides.get("mlp_chunk_size", _DEFAULT)
    if (few := _few_rows(self, x)) is not None:
        return few if residual is None else residual.add_(few)
    if residual is not None:
        for start in range(0, residual.shape[-2], size):
            at = slice(start, start + size)
            residual[..., at, :].add_(_slice(patched, self, _tokens(x, at)))
        return residual
    assert isinstance(x, torch.Tensor)
    if x.shape[-2] <= size and not in_8_bits(self) or _needs_gradients(self, x):
        return patched.stock(self, x)
    if x.shape[-2] <= size:
        return _slice(patched, self, x)
    out: torch.Tensor | None = None
    for start in range(0, x.shape[-2], size):
        part = _slice(patched, self, x[..., start : start + size, :])
        if out is None:  # under autocast of another dtype than `x`
            out = part.new_empty(x.shape)
        out[..., start : start + size, :] = part
    assert out is not None
    return out


def _few_rows(self: Any, x: torch.Tensor | Rows) -> torch.Tensor | None:
    """The MLP of a decoded token, where it runs in two launches."""
    if self.config.hidden_act != "silu" or self.act_fn._forward_hooks or self.act_fn._forward_pre_hooks:
        return None
    held = thin_weights(x, self.gate_proj, self.up_proj, self.down_proj)
    return None if held is None else thin.linear(thin.silu_mul(x, *held[:2]), held[2])[0]


def in_8_bits(module: Any) -> bool:
    """Whether SwiGLU writes what goes into the last layer of an MLP in 8 bits."""
    return module.config.hidden_act == "silu" and takes_rows(module.down_proj)


def _needs_gradients(module: torch.nn.Module, x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def _tokens(x: torch.Tensor | Rows, at: slice) -> torch.Tensor | Rows:
    return Rows(*(one[..., at, :] for one in x)) if isinstance(x, Rows) else x[..., at, :]


def _slice(patched: PatchedMethod, self: Any, x: torch.Tensor | Rows) -> torch.Tensor:
    if in_8_bits(self):
        x = rows_for(x, self.gate_proj, self.up_proj)
        return self.down_proj(fp8.silu_mul_rows(self.gate_proj(x), self.up_proj(x)))
    assert isinstance(x, torch.Tensor)
    if norm.pays(x) and self.config.hidden_act == "silu":
        return self.down_proj(norm.silu_mul(self.gate_proj(x), self.up_proj(x)))
    return patched.stock(self, x)
