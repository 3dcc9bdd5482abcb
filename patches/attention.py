"""Replaces ``Attention.forward`` of every family; and the attention functions registered as "qwen_dca"."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_longctx.attention import dense
from qwen_longctx.errors import PatchConflict, Unsupported
from qwen_longctx.geometry.layout import Layout
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.eight_bit import Turning
from qwen_longctx.kv.hf_cache import append, write
from qwen_longctx.kv.store import Store, Tensors
from qwen_longctx.ops import thin
from qwen_longctx.ops.device import cast
from qwen_longctx.ops.fp8 import Rows
from qwen_longctx.patches.linear import rows_for, thin_weights
from qwen_longctx.patches.method import OLD_NAME, PatchedMethod
from qwen_longctx.patches.runs import stock_forward
from qwen_longctx.stage import own_layers

IMPLEMENTATION = "qwen_dca"


def attention_forward(
    patched: PatchedMethod,
    self: Any,
    hidden_states: torch.Tensor | Rows,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    dual_chunk: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Project, rotate keys by ``position mod stride``, cache, attend by segments, project back.

    Hidden states come in 8 bits from `layer_forward`, if all projections take them so.
    """
    if dual_chunk is None:
        if stock_forward(type(self).__module__):
            arguments = {"hidden_states": hidden_states, "position_embeddings": position_embeddings}
            arguments |= {"attention_mask": attention_mask, OLD_NAME: past_key_values}
            return patched.call(self, **arguments, **kwargs)
        raise PatchConflict(
            f"{type(self).__name__} of a patched model was called without its model's forward, which plans the "
            "positions: call the whole model, or unpatch_qwen() first"
        )
    dual_chunk.attended.append(self.layer_idx)
    if self.training and self.attention_dropout:
        raise Unsupported(
            f"attention_dropout={self.attention_dropout} is not supported by dual chunk attention: set it to 0"
        )
    given = hidden_states.values if isinstance(hidden_states, Rows) else hidden_states
    shape = (*given.shape[:-1], -1, self.head_dim)
    q, k, v = (x.view(shape) for x in _projected(hidden_states, self.q_proj, self.k_proj, self.v_proj))
    if "q_norm" in self._modules:  # hasattr raises and catches where there is none
        q, k = self.q_norm(q), self.k_norm(k)
    tables, place = dual_chunk.tables, self.layer_idx - dual_chunk.first_layer
    kv: Store | Tensors
    if dual_chunk.slot is not None:
        kv = write(past_key_values, k, v, place, dual_chunk.slot, tables)
    else:
        k = cast(rotate(k, tables.keys), v.dtype)  # under autocast norms and tables are float32
        kv = Tensors(k, v)
        if past_key_values is not None:
            # a norm leaves no bias to take out, and layers that quantise weights may name none
            bias = None if "q_norm" in self._modules else _local(getattr(self.k_proj, "bias", None))
            turning = Turning(tables.spots, *tables.source)
            kv = append(past_key_values, k, v, place, kwargs.get("cache_position"), bias, turning)
    tokens, dtype = kv.size()
    if tokens < dual_chunk.length:
        raise PatchConflict(
            f"attention was given {tokens} of {dual_chunk.length} keys: the cache was dropped on the way, as "
            "gradient checkpointing does. Train without past_key_values, or without gradient checkpointing"
        )
    q = cast(q, dtype)
    in_graph = dual_chunk.reach is None or not torch.compiler.is_compiling()
    attend = dense.attend if in_graph else _attend_outside_of_graphs
    out = cast(attend(q, kv, dual_chunk, self.scaling, self.layer_idx).flatten(2), v.dtype)
    weights = dense.weights(q, kv, dual_chunk, self.scaling) if dual_chunk.weights else None
    return _projected(out, self.o_proj)[0], weights


def _local(bias: Any) -> torch.Tensor | None:
    """What this process holds of a bias, which under tensor parallelism is a distributed tensor."""
    return bias.to_local() if hasattr(bias, "to_local") else bias


def _projected(x: torch.Tensor | Rows, *layers: nn.Module) -> list[torch.Tensor]:
    """What linear layers make of `x`, of shape (batch, tokens, inputs)."""
    held = thin_weights(x, *layers)
    if held is not None:
        return thin.linear(x, *held)
    rows = rows_for(x, *layers)
    return [layer(rows) for layer in layers]


# the launch of a decoding step is cut for the device by the host, which a graph has no use for
@torch.compiler.disable
def _attend_outside_of_graphs(*arguments: Any) -> torch.Tensor:
    return dense.attend(*arguments)


def check_attended(model: Any, layout: Layout) -> None:
    """Refuse results to which an attention that knows nothing of the layout has contributed."""
    here = own_layers(model)
    if len(layout.attended) >= min(model.config.num_hidden_layers, len(here)):
        return
    layers = zip(range(model.config.num_hidden_layers), here, strict=False)
    wanted = sum(hasattr(layer, "self_attn") for _, layer in layers)
    if len(layout.attended) < wanted:
        raise PatchConflict(
            f"{wanted - len(layout.attended)} of {wanted} attention layers did not use dual chunk attention: their "
            "forward was replaced after patch_qwen(), or a layer in between drops keyword arguments. Patch the model "
            "last, or without the other library"
        )


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
    raise PatchConflict(
        f'attn_implementation="{IMPLEMENTATION}" needs the patch, which maps the positions: call patch_qwen() before '
        "loading, or patch_qwen(model)"
    )


def registered_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Hand the 2D padding mask on as it is: never a mask of queries x keys."""
    return attention_mask
