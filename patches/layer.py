"""Replaces the forward of decoder layers on long activations: residuals, norms and casts to 8 bits in one pass each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_longctx.ops import norm, thin
from qwen_longctx.patches.attention import attention_forward
from qwen_longctx.patches.linear import Fp8Linear, takes_rows
from qwen_longctx.patches.method import PatchedMethod, runs_as
from qwen_longctx.patches.mlp import in_8_bits, mlp_forward
from qwen_longctx.patches.norm import norm_forward

_GLOBAL: Any = nn.modules.module  # where hooks of all modules are
_PARTS = {
    "input_layernorm": norm_forward,
    "self_attn": attention_forward,
    "post_attention_layernorm": norm_forward,
    "mlp": mlp_forward,
}


def layer_forward(patched: PatchedMethod, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The stock layer, rounded as it rounds, if all parts of it are ours and nobody looks at what goes between them."""
    layout = kwargs.get("dual_chunk")
    # checkpointing runs a layer without gradients first
    if len(args) != 1 or layout is None or layout.mode == "train" or not _suits(self, args[0]):
        return patched.stock(self, *args, **kwargs)
    hidden, attention, mlp = args[0], self.self_attn, self.mlp
    first, second = self.input_layernorm, self.post_attention_layernorm
    eight = takes_rows(attention.q_proj, attention.k_proj, attention.v_proj)
    normed = (norm.rms_norm_rows if eight else norm.rms_norm)(hidden, first.weight, first.variance_epsilon)
    attended, _ = attention(hidden_states=normed, **kwargs)
    del normed
    eight = in_8_bits(mlp) and takes_rows(mlp.gate_proj, mlp.up_proj)
    join = norm.add_rms_norm_rows if eight else norm.add_rms_norm
    hidden, normed = join(hidden, attended, second.weight, second.variance_epsilon)
    del attended
    return mlp(normed, residual=hidden)


def _suits(layer: Any, hidden: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not (norm.pays(hidden) or thin.pays(hidden)):
        return False
    if (
        torch.is_autocast_enabled(hidden.device.type)
        or _GLOBAL._global_forward_hooks
        or _GLOBAL._global_forward_pre_hooks
    ):
        return False
    parts = layer._modules
    if parts.keys() != _PARTS.keys() or not all(runs_as(parts[name], function) for name, function in _PARTS.items()):
        return False
    norms = parts["input_layernorm"], parts["post_attention_layernorm"]
    if any((one.weight.dtype, one.weight.device) != (hidden.dtype, hidden.device) for one in norms):
        return False
    return all(_returns(one, hidden.dtype) for one in (layer.self_attn.o_proj, layer.mlp.down_proj))


def _returns(linear: Any, dtype: torch.dtype) -> bool:
    """Whether what a layer returns is known to be of `dtype`, so that a residual takes it without a change of dtype."""
    if type(linear) is Fp8Linear:
        return linear._kept.weight.dtype == dtype
    return type(linear) is nn.Linear and linear.weight.dtype == dtype
