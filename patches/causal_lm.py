"""Replaces ``ForCausalLM.forward``: the place where a prompt is really cut into chunks."""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.patches.method import PatchedMethod, set_cache
from qwen_longctx.patches.model import cached_tokens, check_cache_type, padding_mask
from qwen_longctx.prefill import schedule as prefill

_WHOLE_ONLY = ("output_attentions", "output_hidden_states", "output_router_logits")


def causal_lm_forward(
    patched: PatchedMethod,
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs: Any,
) -> Any:
    """Prefill chunk by chunk where the prompt is longer than `prefill_chunk_size`; else the stock forward."""
    inputs = inputs_embeds if inputs_embeds is not None else input_ids
    tokens = 1 if inputs is None else inputs.shape[1]
    size = 1 if tokens == 1 else patched.settings(self.config).prefill_chunk_size
    if (
        tokens <= size
        or torch.is_grad_enabled()
        or any(kwargs.get(name) or getattr(self.config, name, False) for name in _WHOLE_ONLY)
    ):
        return patched.call(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
    assert inputs is not None
    check_cache_type(past_key_values)
    cached = cached_tokens(past_key_values)
    total = cached + inputs.shape[1]
    cache = past_key_values if past_key_values is not None else LongContextCache(total)
    return_dict = kwargs.pop("return_dict", None)
    outputs = _in_chunks(
        patched,
        self,
        inputs=inputs,
        name="input_ids" if inputs_embeds is None else "inputs_embeds",
        attention_mask=padding_mask(attention_mask),
        position_ids=position_ids,
        cache=cache,
        size=size,
        keep=_kept(0 if labels is not None else logits_to_keep, inputs.shape[1]),
        prompt_length=getattr(cache, "prompt_length", 0) or total,
        **kwargs,
    )
    if labels is not None:
        outputs.loss = self.loss_function(
            logits=outputs.logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )
        outputs.logits = outputs.logits[:, _kept(logits_to_keep, inputs.shape[1])]
    if use_cache is False or (use_cache is None and not self.config.use_cache):
        set_cache(outputs, None)
    wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
    return outputs if wants_dict else outputs.to_tuple()


def _kept(logits_to_keep: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """Indices of the tokens whose logits are wanted, in the order they are wanted."""
    if isinstance(logits_to_keep, int):
        return torch.arange(tokens)[slice(-logits_to_keep, None)]
    return torch.arange(tokens)[logits_to_keep.cpu()]


def _in_chunks(
    patched: PatchedMethod,
    model: Any,
    *,
    inputs: torch.Tensor,
    name: str,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Any,
    size: int,
    keep: torch.Tensor,
    cache_position: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    cached = cached_tokens(cache)
    logits, slots = [], []
    outputs = None
    for start, stop in prefill.chunks(inputs.shape[1], size, cache, inputs.device):
        wanted = ((keep >= start) & (keep < stop)).nonzero()[:, 0]
        part = dict(kwargs)
        if cache_position is not None:
            part["cache_position"] = cache_position[start:stop]
        outputs = patched.call(
            model,
            **{name: inputs[:, start:stop]},
            attention_mask=None if attention_mask is None else attention_mask[:, : cached + stop],
            position_ids=None if position_ids is None else position_ids[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            # one row is computed and dropped where none is wanted: the stock forward has no "none"
            logits_to_keep=(keep[wanted] - start).to(inputs.device) if len(wanted) else 1,
            return_dict=True,
            **part,
        )
        if len(wanted):
            logits.append(outputs.logits)
            slots.append(wanted)
    assert outputs is not None
    order = torch.cat(slots).argsort().to(logits[0].device)
    in_order = len(logits) == 1 or bool((order == torch.arange(len(order), device=order.device)).all())
    joined = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
    outputs.logits = joined if in_order else joined[:, order]
    return outputs
