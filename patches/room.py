"""Whether a call fits into the memory that is free, asked before its first chunk."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from qwen_longctx.checkpoint import Shape, local_shape
from qwen_longctx.config import AUTO_KV_CACHES, LongContextConfig
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.kv.host import HostStore
from qwen_longctx.kv.saved import allocated
from qwen_longctx.kv.sequence import held_tokens, sequence_of
from qwen_longctx.ops.device import device_of
from qwen_longctx.patches.pipelined import chunks_ahead
from qwen_longctx.prefill import memory
from qwen_longctx.prefill.memory import GIB, Device, Need
from qwen_longctx.prefill.peak import Prefill
from qwen_longctx.prefill.run import Run
from qwen_longctx.sparsity.request import rule_name
from qwen_longctx.stage import own_layers

logger = logging.getLogger(__name__)

Others = Callable[[str], Counter[torch.device]]
_FEWEST = 1024  # tokens of a call that are worth asking a device for its free memory
_GROWN, _JOINED = 1.0, 0.5  # caches of one layer that are alive twice: a buffer that grows, tensors that are joined
_REORDERED = 1.5  # as beams take other rows


def check_room(
    base: Any,
    need: Need,
    settings: LongContextConfig,
    cache: Any = None,
    others: Others | None = None,
    before: int = 0,
) -> None:
    """Refuse what cannot fit beside the weights, device by device, and decide the kind of a cache of kind "auto".

    Nothing is known of CPUs and of meta tensors, and nothing is decided there.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The base model, with its `layers`.
    need : Need
    settings : LongContextConfig
        `kv_cache` is the kind of the cache.
    cache : transformers Cache, optional
    others : callable, optional
        ``others(kind)``: bytes by device that are still to be taken beside the run, if its cache is of a kind.
    before : int
        Bytes that something else takes for a time while the cache is there, and the run itself is not under way. Both
        count where the kind is decided, and refuse nothing.

    Raises
    ------
    DoesNotFit
        See `memory.check_fits`. The cache is as it was then.
    """
    layers = _layers_of(base)
    known = {device: free for device in layers if (free := memory.free_bytes(device)) is not None}
    if not known:
        return
    shape, need = local_shape(base), need._replace(ahead=chunks_ahead(base, need.tokens - need.held, settings))
    if all(rule_name(settings, device, need.dtype, shape.head_dim) is None for device in known):
        settings = replace(settings, sparse="off")  # "auto" gives way where no fast kernel takes block lists
    devices = [Device(str(device), layers[device], free) for device, free in known.items()]
    if settings.kv_cache != "auto":
        memory.check_fits(shape, devices, need, settings)
        return

    def left(kind: str) -> list[Device]:
        taken = Counter() if others is None else others(kind)
        return [one._replace(free=one.free - taken[torch.device(one.name)]) for one in devices]

    tried = [Tried(replace(settings, kv_cache=kind), left(kind)) for kind in AUTO_KV_CACHES]

    wanted = need._replace(at_the_end=max(need.at_the_end, before))

    def lacks(one: Tried) -> int:
        size, device = memory.fullest(shape, one.devices, wanted, one.settings)
        return size - device.free

    chosen = next((one for one in tried if lacks(one) <= 0), min(tried, key=lacks))
    memory.check_fits(shape, devices, need, chosen.settings)
    cache.settle(chosen.settings.kv_cache)
    _tell(shape, wanted, tried[0], chosen)


class Tried(NamedTuple):
    """Settings with a kind of cache, and what the devices have free for it."""

    settings: LongContextConfig
    devices: list[Device]


def _tell(shape: Shape, need: Need, first: Tried, chosen: Tried) -> None:
    """Log which kind was chosen, and why."""
    needed, device = memory.fullest(shape, first.devices, need, first.settings)
    where = f" on {device.name}" if len(first.devices) > 1 else ""
    why = f"{need.batch} x {need.tokens:,} tokens need {needed / GIB:.1f} GiB{where} beside the weights as they are, "
    why += f"and {max(0, device.free) / GIB:.1f} GiB are free"
    if chosen is first:
        logger.info('kv_cache="auto" is "device" in this run: %s', why)
        return
    kind = chosen.settings.kv_cache
    needed, _ = memory.fullest(shape, chosen.devices, need, chosen.settings)
    logger.warning('kv_cache="auto" is "%s" in this run: %s; of this kind %.1f', kind, why, needed / GIB)


def bytes_of_cache(base: Any, tokens: int, rows: int, kind: str) -> Counter[torch.device]:
    """Bytes by device of a cache of another model that is not filled yet."""
    return Counter(
        {
            device: tokens * rows * memory.kv_bytes(replace(local_shape(base), layers=layers), base.dtype, kind)
            for device, layers in _layers_of(base).items()
        }
    )


def bytes_beside_cache(base: Any, tokens: int, rows: int, settings: LongContextConfig) -> int:
    """Bytes that a prefill of another model takes beside its cache, the most of all devices and kinds that may be."""
    kinds = AUTO_KV_CACHES if settings.kv_cache == "auto" else (settings.kv_cache,)
    shapes = [replace(local_shape(base), layers=layers) for layers in _layers_of(base).values()]
    cases = ((shape, replace(settings, kv_cache=kind)) for shape in shapes for kind in kinds)
    return max(Prefill(shape, tokens, rows, base.dtype, one).peak().total for shape, one in cases)


def take_room(base: Any, cache: LongContextCache, rows: int) -> None:
    """Take at once the memory that an empty cache has been given a capacity for."""
    shape = local_shape(base)
    for number, layer in enumerate(own_layers(base)):
        store = allocated(cache, number, shape, base.dtype, rows, device_of(layer))
        store.room()  # takes a host cache's buffers on the device


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
    whole = not cut and run.tokens > run.settings.prefill_chunk_size
    need = need_of(base, run.cache, run.call.end, len(run.call.rows), padded=padded)
    need = need._replace(outputs=beside, at_the_end=at_the_end, own=run.new_cache, whole=whole)
    settings = run.settings if cut else replace(run.settings, prefill_chunk_size=run.tokens)
    # which generate alone captures
    settings = replace(with_kind_of(run.cache, settings), cuda_graphs=False)
    check_room(base, need, settings, run.cache)


def with_kind_of(cache: Any, settings: LongContextConfig) -> LongContextConfig:
    """The settings with the kind of the cache of a run; "auto" is for caches alone, whose kind can be decided."""
    if cache is not None:
        return replace(settings, kv_cache=getattr(cache, "kv_cache", "device"))
    return replace(settings, kv_cache="device") if settings.kv_cache == "auto" else settings


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
    return Counter(device_of(layer) for layer in own_layers(base))
