"""A Qwen model of transformers as it is trained: packed documents in, a loss out, little memory in between.

The layers are the model's own modules, adapters of PEFT included, in another order of execution. A layer has two parts.
The first, norm and attention, is computed again for the backward, but for attention itself, whose result is kept. The
second, norm and MLP, passes some tokens at a time, forward and backward. What must wait for the backward are three
tensors of the width of the hidden states, which may wait on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from qwen_longctx.checkpoint import refuse_unsupported, rope_parameters
from qwen_longctx.errors import InvalidType, Unsupported
from qwen_longctx.training.attention import Documents, Kept, Kernel, attend
from qwen_longctx.training.losses import liger, linear_cross_entropy, token_losses
from qwen_longctx.training.offload import Offload
from qwen_longctx.training.packing import Packed

FAMILIES = ("qwen2", "qwen3")
SLICE = 4096  # tokens of an MLP at a time


@dataclass(frozen=True)
class Work:
    """How a model is run in training.

    Parameters
    ----------
    kernel : Kernel
        Of attention.
    slice_tokens : int
        Tokens that pass through an MLP at a time.
    offload : bool
        Whether activations wait on the host.
    recompute : bool
        Whether layers are computed again for the backward. Without it everything is kept, as plain autograd does.
    """

    kernel: Kernel
    slice_tokens: int = SLICE
    offload: bool = False
    recompute: bool = True


class Trained(nn.Module):
    """A causal language model whose forward is a loss over packed documents.

    Parameters
    ----------
    model : torch.nn.Module
        A Qwen2 or Qwen3 model of transformers for causal language modelling, or a PEFT model around one.
    work : Work

    Raises
    ------
    InvalidType, Unsupported
        It is no such model, or has what cannot be trained here.
    """

    def __init__(self, model: nn.Module, work: Work) -> None:
        super().__init__()
        self.model, self.work = model, work
        check_model(causal_lm(model).config)

    def forward(self, packed: Packed, each: bool = False) -> torch.Tensor:
        """The loss of the tokens that count, in float32 at least.

        Returns
        -------
        torch.Tensor
            The sum, a number; with `each` shape (tokens,), 0 where none counts and without gradients.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not each):
            hidden, labels = self._hidden(packed)
            loss = token_losses if each else linear_cross_entropy
            return loss(hidden, causal_lm(self.model).lm_head.weight, labels)

    def _hidden(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head takes, shape (tokens, width), and the labels, on the device of the model."""
        base = causal_lm(self.model).model
        device = base.embed_tokens.weight.device
        ids, labels, starts = (x.to(device) for x in (packed.ids, packed.labels, packed.starts))
        documents = Documents(starts)
        hidden = base.embed_tokens(ids[None])
        learning = torch.is_grad_enabled()
        if learning and not hidden.requires_grad:
            hidden.requires_grad_()  # the first layer has something to learn even if the embedding has not
        rope = base.rotary_emb(hidden, documents.positions[None])
        offload = Offload(device) if learning and self.work.offload and self.work.recompute else None
        context = offload.hooks() if offload is not None else nullcontext()
        with context:
            for layer in base.layers:
                hidden = layer(hidden, rope=rope, documents=documents, work=self.work, offload=offload)
        return _norm(base.norm, hidden)[0], labels


def causal_lm(model: Any) -> Any:
    """The model of transformers in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_model(config: Any) -> None:
    """Refuse what is no Qwen, or cannot be trained by `Trained`.

    Raises
    ------
    InvalidType, InvalidValue, Unsupported
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise Unsupported(f"a model of type {kind!r} cannot be trained here: name one of {', '.join(FAMILIES)}")
    refuse_unsupported(config)
    rope = rope_parameters(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise Unsupported(
            f"the checkpoint stretches its positions (rope_type {rope_type!r}), and training raises the rotary base "
            "instead: start from the checkpoint without it, rope_type 'default'"
        )
    if getattr(config, "attention_dropout", 0):
        raise Unsupported(f"attention_dropout={config.attention_dropout} cannot be trained here: set it to 0")


def set_rope_theta(model: nn.Module, theta: float) -> None:
    """Set the rotary base: in the config, and in the frequencies that the model uses."""
    inner = causal_lm(model)
    config, base = inner.config, inner.model
    if getattr(config, "rope_parameters", None):
        config.rope_parameters["rope_theta"] = theta
    else:
        config.rope_theta = theta
    old = base.rotary_emb
    base.rotary_emb = type(old)(config).to(old.inv_freq.device)


@contextmanager
def trainable_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, layers of `model` run as `Trained` calls them; then as they did before."""
    layers = list(causal_lm(model).model.layers)
    for layer in layers:
        layer.forward = partial(_layer, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


# --- a layer ------------------------------------------------------------------------------------------------------


def _layer(
    layer: Any,
    hidden: torch.Tensor,
    *,
    rope: tuple[torch.Tensor, torch.Tensor],
    documents: Documents,
    work: Work,
    offload: Offload | None,
) -> torch.Tensor:
    """The layer on hidden states of shape (1, tokens, width)."""
    attention = partial(_attention, layer, rope=rope, documents=documents, kernel=work.kernel)
    if not torch.is_grad_enabled():
        return _Sliced.apply(partial(_mlp, layer), work.slice_tokens, attention(hidden))
    if not work.recompute:
        return _mlp(layer, attention(hidden))
    same: Callable[[Any], Any] = _unchanged
    kept = Kept(*((offload.keep, offload.bring) if offload is not None else (same, same)))
    between = checkpoint(partial(attention, kept=kept), hidden, use_reentrant=False)
    return _Sliced.apply(partial(_mlp, layer), work.slice_tokens, between)


def _unchanged(x: Any) -> Any:
    return x


def _attention(
    layer: Any,
    hidden: torch.Tensor,
    *,
    rope: tuple[torch.Tensor, torch.Tensor],
    documents: Documents,
    kernel: Kernel,
    kept: Kept | None = None,
) -> torch.Tensor:
    """Residual, norm and attention."""
    module, normed = layer.self_attn, _norm(layer.input_layernorm, hidden)
    shape = (*hidden.shape[:-1], -1, module.head_dim)
    q, k, v = (project(normed).view(shape) for project in (module.q_proj, module.k_proj, module.v_proj))
    if "q_norm" in module._modules:
        q, k = _norm(module.q_norm, q), _norm(module.k_norm, k)
    q, k = apply_rotary_pos_emb(q, k, *rope, unsqueeze_dim=2)
    out = attend(q[0], k[0], v[0], documents, kernel, module.scaling, kept)
    return hidden + module.o_proj(out.flatten(1)[None])


def _mlp(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Residual, norm and MLP."""
    module, normed = layer.mlp, _norm(layer.post_attention_layernorm, hidden)
    kernels = _liger_for(normed)
    if kernels is None or module.config.hidden_act != "silu":
        return hidden + module(normed)
    return hidden + module.down_proj(kernels.silu_mul(module.gate_proj(normed), module.up_proj(normed)))


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm, by Liger-Kernel where it runs."""
    kernels = _liger_for(x)
    if kernels is None:
        return norm(x)
    return kernels.rms_norm(x, norm.weight, norm.variance_epsilon)


def _liger_for(x: torch.Tensor) -> Any:
    return liger() if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else None


class _Sliced(torch.autograd.Function):
    """A function of single tokens, on some at a time; for the backward each slice is computed again.

    Gradients of the parameters are added to their ``grad``, as ``backward()`` does: `torch.autograd.grad` finds none.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[torch.Tensor], torch.Tensor], size: int, x: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.size = run, size
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        with torch.no_grad():
            for start in range(0, x.shape[1], size):
                at = slice(start, start + size)
                out[:, at] = run(x[:, at])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], ctx.size):
            at = slice(start, start + ctx.size)
            leaf = x[:, at].detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.run(leaf), grad[:, at])
            out[:, at] = leaf.grad
        return None, None, out


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; one that is shared appears once.

    Raises
    ------
    InvalidType
        There are none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InvalidType("the model has no parameter that learns: all are frozen")
    return found
