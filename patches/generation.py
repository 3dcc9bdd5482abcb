"""Replaces ``generate``: checks the request and brings a cache with room for the whole run."""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.patches.method import PatchedMethod
from qwen_longctx.patches.model import cached_tokens, check_cache_type, check_static_cache, masks_left_2d, padding_mask
from qwen_longctx.prefill import memory


def generate(
    patched: PatchedMethod,
    self: Any,
    inputs: torch.Tensor | None = None,
    generation_config: Any = None,
    **kwargs: Any,
) -> Any:
    """The stock generate on a `LongContextCache`, unless the caller brings or asks for another cache."""
    settings = patched.settings(self.config)
    config = generation_config if generation_config is not None else self.generation_config
    prompt = _prompt(inputs, kwargs)
    padding_mask(kwargs.get("attention_mask"))
    cache = kwargs.get("past_key_values")
    check_cache_type(cache)
    length = _final_length(prompt, cache, config, kwargs)
    implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    if implementation in ("static", "offloaded_static", "paged") and length > settings.stride:
        raise NotImplementedError(
            f"cache_implementation={implementation!r} holds one chunk of {settings.stride} tokens at most, this run "
            f"has {length}: leave it out and generate() takes a LongContextCache"
        )
    check_static_cache(cache, length, settings)
    uses_cache = kwargs.get("use_cache", getattr(config, "use_cache", True))
    if cache is None and implementation in (None, "dynamic") and uses_cache is not False and prompt is not None:
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        returned = kwargs.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
        _check_memory(self, prompt, length, prompt.shape[0] * max(beams, returned), settings)
        cache = LongContextCache(length)
        kwargs["past_key_values"] = cache
        kwargs.pop("cache_implementation", None)
    if isinstance(cache, LongContextCache) and prompt is not None:
        cache.prompt_length = prompt.shape[1] + (cached_tokens(cache) if "inputs_embeds" in kwargs else 0)
    with masks_left_2d(self.config):
        return patched.call(self, inputs=inputs, generation_config=generation_config, **kwargs)


def _prompt(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
    for found in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")):
        if found is not None:
            return found
    return None


def _final_length(prompt: torch.Tensor | None, cache: Any, config: Any, kwargs: dict[str, Any]) -> int:
    """Tokens in the cache at the end, as far as the request tells."""
    tokens = prompt.shape[1] if prompt is not None else 0
    new = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
    if new is not None:
        return max(tokens, cached_tokens(cache)) + new
    most = kwargs.get("max_length", getattr(config, "max_length", None)) or 0
    return max(tokens, cached_tokens(cache), most)


def _check_memory(model: Any, prompt: torch.Tensor, length: int, rows: int, settings: Any) -> None:
    """Say before the start that a run cannot fit. Several devices share the work in ways only a run can tell."""
    if prompt.device.type != "cuda" or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return
    free, _ = torch.cuda.mem_get_info(prompt.device)
    reusable = torch.cuda.memory_reserved(prompt.device) - torch.cuda.memory_allocated(prompt.device)
    memory.check_fits(model.config, length, rows, model.dtype, free + reusable, settings)
