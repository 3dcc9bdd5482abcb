"""Replaces the base model's forward: checks the request and plans the positions once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import StaticCache
from transformers.utils import logging as transformers_logging

from qwen_longctx import sparsity
from qwen_longctx.checkpoint import local_heads
from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.layout import Plan, RotarySource, make_plan
from qwen_longctx.patches.attention import IMPLEMENTATION
from qwen_longctx.patches.method import PatchedMethod
from qwen_longctx.sparsity.record import state_of
from qwen_longctx.sparsity.request import Request

logger = transformers_logging.get_logger(__name__)


def model_forward(
    patched: PatchedMethod,
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    *,
    prompt_length: int = 0,
    **kwargs: Any,
) -> Any:
    """Hand every layer one plan of the positions; the rest is the stock forward."""
    inputs = inputs_embeds if inputs_embeds is not None else input_ids
    if inputs is None:
        raise ValueError("give input_ids or inputs_embeds: the forward got neither")
    settings = patched.settings(self.config)
    attention_mask = padding_mask(attention_mask)
    check_cache_type(past_key_values)
    grown = cached_tokens(past_key_values) + inputs.shape[1]
    check_static_cache(past_key_values, grown, settings)
    keeps_graph = torch.is_grad_enabled() and _requires_grad(self, inputs_embeds)
    if keeps_graph:
        _check_training(grown, settings)
    if keeps_graph and past_key_values is None and grown > settings.stride:
        use_cache = False  # one chunk of its own: its keys could not be continued
    weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
    prompt_length = prompt_length or getattr(past_key_values, "prompt_length", 0)
    exact = keeps_graph or weights or inputs.shape[1] == 1
    sparse = None if exact else _sparse(settings, self, inputs.device, past_key_values, max(prompt_length, grown))
    plan = _plan(
        self,
        inputs,
        attention_mask,
        position_ids,
        past_key_values,
        settings,
        prompt_length=prompt_length,
        one_chunk=keeps_graph and past_key_values is None and grown > settings.stride,
        kernel="reference" if keeps_graph and grown > settings.stride else None,
        weights=weights,
        sparse=sparse,
    )
    with masks_left_2d(self.config):
        outputs = patched.call(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            dual_chunk=plan,
            **kwargs,
        )
    if sparse is not None:
        sparse.state.check()
    return outputs


def _sparse(settings: LongContextConfig, model: Any, device: torch.device, cache: Any, length: int) -> Request | None:
    """The request for sparse prefill, where the settings ask for it and the prompt is long enough."""
    return sparsity.plan_request(
        settings,
        model.config,
        heads=lambda: local_heads(model),
        device=device,
        dtype=model.dtype,
        state=state_of(cache),
        length=length,
        observer=getattr(cache, "observer", None),
    )


@torch.compiler.disable
def _plan(
    model: Any,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Any,
    settings: LongContextConfig,
    **options: Any,
) -> Plan:
    rotary = model.rotary_emb
    return make_plan(
        position_ids,
        attention_mask,
        batch=inputs.shape[0],
        tokens=inputs.shape[1],
        cached=cached_tokens(cache),
        settings=settings,
        rotary=RotarySource(rotary.inv_freq, rotary.attention_scaling),
        dtype=inputs.dtype if inputs.is_floating_point() else model.embed_tokens.weight.dtype,
        device=inputs.device,
        **options,
    )


def cached_tokens(cache: Any) -> int:
    """Tokens in any transformers cache, or 0."""
    return 0 if cache is None else int(cache.get_seq_length())


def padding_mask(mask: Any) -> torch.Tensor | None:
    """The 2D padding mask in what the caller or generate prepared."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask must have shape (batch, tokens), got {tuple(mask.shape)}: dual chunk attention is causal "
            "and takes no custom masks; give the 2D padding mask"
        )
    return mask


def check_cache_type(cache: Any) -> None:
    """Refuse what is no transformers cache of one run."""
    name = type(cache).__name__
    if cache is not None and (not hasattr(cache, "get_seq_length") or "Paged" in name):
        raise NotImplementedError(f"{name} is not supported: pass a DynamicCache or a LongContextCache, or no cache")


def check_static_cache(cache: Any, length: int, settings: LongContextConfig) -> None:
    """Refuse a static cache beyond one chunk."""
    if isinstance(cache, StaticCache) and length > settings.stride:
        raise NotImplementedError(
            f"a static cache holds one chunk of {settings.stride} tokens at most, this run has {length}: "
            "leave cache_implementation out and generate() takes a LongContextCache"
        )


def _check_training(length: int, settings: LongContextConfig) -> None:
    if length > settings.chunk_size:
        raise NotImplementedError(
            f"training on {length} tokens goes beyond chunk_size ({settings.chunk_size}): "
            "shorten the sequence, or run under torch.no_grad() if no gradient is wanted"
        )


def _requires_grad(model: Any, inputs_embeds: torch.Tensor | None) -> bool:
    if inputs_embeds is not None and inputs_embeds.requires_grad:
        return True
    return any(parameter.requires_grad for parameter in model.parameters())


@contextmanager
def masks_left_2d(config: Any) -> Iterator[None]:
    """Keep transformers from building masks of queries x keys while a stock method runs."""
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
