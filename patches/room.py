"""Whether a call fits into the memory that is free, asked before its first chunk."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from qwen_longctx.checkpoint import local_shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.kv.host import HostStore
from qwen_longctx.kv.sequence import held_tokens, sequence_of
from qwen_longctx.ops.device import device_of
from qwen_longctx.prefill import memory
from qwen_longctx.prefill.memory import Device, Need
from qwen_longctx.prefill.run import Run
from qwen_longctx.sparsity.request import rule_name

_FEWEST = 1024  # tokens of a call that are worth asking a device for its free memory
_GROWN, _JOINED = 1.0, 0.5  # caches of one layer that are alive twice: a buffer that grows, tensors that are joined
_REORDERED = 1.5  # as beams take other rows


def check_room(base: Any, need: Need, settings: LongContextConfig) -> None:
    """Refuse what cannot fit beside the weights, device by device. Nothing is known of CPUs and of meta tensors.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The base model, with its `layers`.
    need : Need
    settings : LongContextConfig

    Raises
    ------
    DoesNotFit
        See `memory.check_fits`.
    """
    layers = _layers_of(base)
    known = {device: free for device in layers if (free := memory.free_bytes(device)) is not None}
    if not known:
        return
    shape = local_shape(base)
    if all(rule_name(settings, device, need.dtype, shape.head_dim) is None for device in known):
        settings = replace(settings, sparse="off")  # "auto" gives way where no fast kernel takes block lists
    devices = [Device(str(device), layers[device], free) for device, free in known.items()]
    memory.check_fits(shape, devices, need, settings)
    memory.check_host_fits(replace(shape, layers=sum(layers[device] for device in known)), need, settings)


def check_run(base: Any, run: Run, cut: bool, *, beside: int, at_the_end: int) -> None:
    """`check_room` for a call of the model itself; `generate` has asked for the calls that it makes.

    Parameters
    ----------
    base : transformers.PreTrainedModel
    run : Run
    cut : bool
        Whether the prompt passes in chunks.
    beside, at_the_end : int
        Bytes of what the call returns that are alive beside the last chunk, and all that is after it.
    """
    if run.mode != "prefill" or run.tokens < _FEWEST or torch.compiler.is_compiling():
        return
    if run.cache is not None and sequence_of(run.cache).settings is not None:
        return
    row = run.call.rows[0]
    padded = any(other != row for other in run.call.rows) or (row.first, row.last) != (0, run.call.end)
    need = need_of(base, run.cache, run.call.end, len(run.call.rows), padded=padded)
    settings = run.settings if cut else replace(run.settings, prefill_chunk_size=run.tokens)
    settings = replace(with_kind_of(run.cache, settings), cuda_graphs=False)  # which generate alone captures
    check_room(base, need._replace(outputs=beside, at_the_end=at_the_end), settings)


def with_kind_of(cache: Any, settings: LongContextConfig) -> LongContextConfig:
    """The settings with the kind of the cache that the caller brings, if there is one."""
    return settings if cache is None else replace(settings, kv_cache=getattr(cache, "kv_cache", "device"))


def need_of(base: Any, cache: Any, tokens: int, rows: int, *, padded: bool, beams: bool = False) -> Need:
    """What a run of `rows` rows up to `tokens` tokens needs beside what its cache, if there is one, holds already."""
    held, room, host_room, copied = held_tokens(cache), 0, 0, 0.0
    if isinstance(cache, LongContextCache):
        stores = [layer.store for layer in cache.layers]
        room = min((store.room_for(rows) for store in stores), default=0)
        if any(isinstance(store, HostStore) for store in stores):
            staged = [store.staged_for(rows) for store in stores if isinstance(store, HostStore)]
            room, host_room = min(staged), room
        copied = _GROWN if held and tokens > room else 0.0
    elif type(cache) is DynamicCache and not getattr(cache, "offloading", False):
        room, copied = held, _JOINED
    elif cache is not None:
        room = tokens  # a cache of another kind lies elsewhere, or takes less
    return Need(tokens, rows, base.dtype, held, room, host_room, padded=padded, copied=_REORDERED if beams else copied)


def _layers_of(base: Any) -> Counter[torch.device]:
    """How many layers run on each device, in the order of the layers."""
    return Counter(device_of(layer) for layer in base.layers)
