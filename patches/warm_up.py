"""Compiles what a first long prompt would wait for: a short one that takes the same ways through the model."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qwen_longctx import sparsity
from qwen_longctx.attention.ahead import compile_ahead
from qwen_longctx.checkpoint import local_heads
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidValue
from qwen_longctx.geometry.layout import Call
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.kv.sequence import open_cache, sequence_of
from qwen_longctx.ops.device import device_of
from qwen_longctx.patches import base_of, runs, settings_of
from qwen_longctx.patches.model import Forward, shapes_of
from qwen_longctx.prefill.run import Run

logger = logging.getLogger(__name__)

_LONG = 1 << 20  # tokens of the prompt whose rule of sparse prefill is made ready
_STRIDE = 2048  # tokens of a chunk: enough that norms and dense attention take the kernels of long prompts
_TILES = 8  # at least, of a chunk
_ROOM = 1 << 14  # tokens: from here on decoding is cut as for any longer cache


def check(model: nn.Module) -> None:
    """Refuse a model that cannot run yet.

    Raises
    ------
    TypeError
        It is no model that can be patched.
    ValueError
        Its weights are not loaded.
    """
    if any(device.type == "meta" for device in _devices(base_of("warm_up", model))):
        raise InvalidValue("warm_up got a model whose weights lie on the meta device: load them first")


def warm_up(model: nn.Module) -> None:
    """See `qwen_longctx.warm_up`."""
    check(model)
    settings = settings_of(model)
    if settings is None:
        raise InvalidValue(f"warm_up got a {type(model).__name__} that is not patched: call patch_qwen(model) first")
    base = base_of("warm_up", model)
    devices = [device for device in _devices(base) if device.type == "cuda"]
    if devices:
        run_short_prompt(base, settings)
        for device in devices:
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # a long prompt finds its memory in one piece
    elif torch.cuda.is_available():
        logger.warning(
            "warm_up does nothing for a model on the CPU: call it once the model lies on the GPU that it will run on"
        )


def _devices(base: Any) -> list[torch.device]:
    """Where the layers of a base model compute, each device once."""
    return list(dict.fromkeys(device_of(layer) for layer in base.layers))


@torch.no_grad()
def run_short_prompt(base: Any, settings: LongContextConfig) -> None:
    """Prefill a short prompt as a long one is prefilled, and decode tokens in every way that a run may take.

    Chunks are short here, so that the prompt has segments of every kind and an end that stays dense. The kernels are
    those of the settings' own chunks: none is compiled for a length.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        A patched base model.
    settings : LongContextConfig
        In force for it.
    """
    device = device_of(base.embed_tokens)
    name = sparsity.rule_for(
        settings, base.config, heads=lambda: local_heads(base), device=device, dtype=base.dtype, length=_LONG
    )
    short = _shortened(settings, name)
    tokens = 2 * short.stride + short.stride // 2 + 1
    ids = torch.arange(tokens, device=device)[None] % base.config.vocab_size
    cache = LongContextCache(max(tokens, _ROOM) + 1, kv_cache=settings.kv_cache)
    state = sequence_of(cache)
    state.settings = short
    request = None
    if name is not None:
        request = sparsity.make_request(name, short, base.config, local_heads(base), state.sparse, tokens)
        if device.type == "cuda":
            compile_ahead(request, shapes_of(base, device), _LONG)
    open_cache(cache, (short.chunk_size, short.local_size), base.config.num_hidden_layers)
    run = Run(Call.whole(1, tokens), short, "prefill", cache, device, sparse=request, model=base)
    with run.committed():
        for start in range(0, tokens, short.prefill_chunk_size):
            stop = min(start + short.prefill_chunk_size, tokens)
            forward = Forward(run, start, stop)
            base(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, dual_chunk_forward=forward)
    for shares in (short, replace(short, sparse_decode=None)) if short.sparse_decode is not None else (short,):
        state.settings = shares
        for way in (nullcontext, runs.repeated) if settings.cuda_graphs else (nullcontext,):
            with way():
                base(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


def _shortened(settings: LongContextConfig, rule: str | None) -> LongContextConfig:
    """`settings` under which a prompt of a few thousand tokens is prefilled as a long one, by a rule or densely."""
    stride = max(_STRIDE, _TILES * settings.tile) if settings.tile_fits else _STRIDE
    return replace(
        settings,
        chunk_size=stride + stride // 4,
        local_size=stride // 4,
        original_max_position_embeddings=stride,
        prefill_chunk_size=stride,
        block_size=settings.tile if settings.tile_fits else None,
        sparse="off" if rule is None else rule,
        sparse_attention_threshold=1,
        sparse_decode_threshold=1,
    )
