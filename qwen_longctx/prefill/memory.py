"""What a run will need, before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import AUTO_KV_CACHES, LongContextConfig
from qwen_longctx.errors import DoesNotFit, InvalidValue
from qwen_longctx.kv.host import STAGED
from qwen_longctx.kv.pinned import free_host_bytes
from qwen_longctx.ops import eight_bit
from qwen_longctx.prefill.peak import Peak, Prefill
from qwen_longctx.prefill.weights import Weights, weights_of

GIB = 1 << 30
_SMALLEST_CHUNK = 1024  # tokens; smaller chunks save nothing that counts beside the KV cache
_KINDS_IN_WORDS = {"int8": "keys and values in 8 bits", "host": "keys and values on the host"}


@dataclass(frozen=True)
class Memory:
    """Bytes of one run on one device.

    Attributes
    ----------
    weights, kv_cache : int
        Of a cache on the host, `kv_cache` are the buffers to which layers come up.
    activations : int
        Their peak within a prefill chunk.
    selection : int
        What choosing keys takes beside them in sparse prefill.
    host : int
        Keys and values of all layers in the host's memory, those of other devices included.
    """

    weights: int
    kv_cache: int
    activations: int
    selection: int
    host: int = 0

    @property
    def total(self) -> int:
        """Everything on the device together."""
        return self.weights + self.kv_cache + self.activations + self.selection


def estimate(config: Any, tokens: int, batch: int, dtype: torch.dtype, settings: LongContextConfig) -> Memory:
    """Estimate a run of `batch` rows of `tokens` tokens, prompt and new ones together, on one device.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    tokens, batch : int
    dtype : torch.dtype
        Of weights, cache and activations.
    settings : LongContextConfig

    Raises
    ------
    ValueError
        `tokens` or `batch` is below 1, or no model can be built of the config.
    NotImplementedError
        The checkpoint is quantised by a method whose bytes are not known.
    """
    shape = Shape.of(config)
    weights = weights_of(config, dtype, settings.linear)
    return on_fullest_card(shape, weights, 1, tokens, batch, dtype, settings)


def on_fullest_card(
    shape: Shape,
    weights: Weights,
    cards: int,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    settings: LongContextConfig,
) -> Memory:
    """`estimate` for the card that holds most, where the layers are dealt out among `cards`."""
    if tokens < 1 or batch < 1 or cards < 1:
        raise InvalidValue(f"tokens, batch and cards must be at least 1, got {tokens}, {batch} and {cards}")
    peaks: dict[int, Peak] = {}
    found = []
    for layers, size in weights.on_cards(cards):
        part = replace(shape, layers=layers)
        if layers not in peaks:
            peaks[layers] = Prefill(part, tokens, batch, dtype, settings).peak()
        cache, host = (
            count(one, dtype, settings.kv_cache) * tokens * batch
            for count, one in ((kv_bytes, part), (host_bytes, shape))
        )
        found.append(Memory(size, cache, *peaks[layers], host))
    return max(found, key=lambda memory: memory.total)


def kv_bytes(shape: Shape, dtype: torch.dtype, kv_cache: str = "device") -> int:
    """Bytes on the device for keys and values of one token of one row, in a cache of a kind (`LongContextConfig`)."""
    if kv_cache == "host":
        shape = replace(shape, layers=min(STAGED, shape.layers))
    if kv_cache in eight_bit.KINDS:  # with a scale for each head, and where the token stands
        return shape.layers * (2 * shape.kv_heads * (shape.head_dim + 4) + 4)
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


def host_bytes(shape: Shape, dtype: torch.dtype, kv_cache: str) -> int:
    """Bytes on the host for keys and values of one token of one row, in a cache of a kind."""
    return kv_bytes(shape, dtype) if kv_cache == "host" else 0


def most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number above `low` and up to `high` that fits, or `low` if none does; more never fits where less
    does not."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


class Device(NamedTuple):
    """A device that holds layers of a live model: its name, how many layers, and its free bytes."""

    name: str
    layers: int
    free: int


class Need(NamedTuple):
    """What a run asks for.

    Attributes
    ----------
    tokens : int
        Of a row, from its first token to the last one for which there must be room.
    batch : int
        Rows, beams included.
    dtype : torch.dtype
    held, room, host_room : int
        Tokens that the cache holds already, those for which it has taken memory on the device, and on the host.
    outputs, at_the_end : int
        Bytes of what the call returns that are alive beside the last chunk, and all that is after it.
    padded : bool
        Whether rows begin or end at different places.
    copied : float
        Caches of one layer that exist beside the whole cache for a moment, where rows are reordered or tensors grow. On
        the host neither takes memory of the device.
    own : bool
        Whether the settings say of what kind the cache is, or the caller has brought one.
    whole : bool
        Whether the prompt passes in one piece, whatever the settings say.
    """

    tokens: int
    batch: int
    dtype: torch.dtype
    held: int = 0
    room: int = 0
    host_room: int = 0
    outputs: int = 0
    at_the_end: int = 0
    padded: bool = False
    copied: float = 0.0
    own: bool = False
    whole: bool = False

    def shortened(self, tokens: int) -> Need:
        """The need of a run of fewer tokens."""
        outputs, at_the_end = (size * tokens // self.tokens for size in (self.outputs, self.at_the_end))
        return self._replace(tokens=tokens, outputs=outputs, at_the_end=at_the_end)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken on a device; None where that is not known, as on CPUs.

    No more than ``torch.cuda.set_per_process_memory_fraction`` leaves.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(index)


def check_host_fits(shape: Shape, need: Need, settings: LongContextConfig) -> None:
    """Raise before a run whose keys and values cannot fit into the host's memory.

    Parameters
    ----------
    shape : Shape
        `layers` are those whose keys and values lie on the host.
    need : Need
    settings : LongContextConfig

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes free and the tokens that would fit.
    """
    needed, free = _needed_on_host(shape, need, settings)
    if needed <= free:
        return
    fitting = need.host_room + free // (host_bytes(shape, need.dtype, settings.kv_cache) * need.batch)
    raise DoesNotFit(
        f"{need.batch} x {need.tokens:,} tokens need {needed / GIB:.1f} GiB {'more ' if need.host_room else ''}of host "
        f"memory for keys and values, {free / GIB:.1f} GiB are free: {fitting:,} tokens would fit. Shorten the prompt "
        "or max_new_tokens, or lower the number of beams"
    )


def _needed_on_host(shape: Shape, need: Need, settings: LongContextConfig) -> tuple[int, int]:
    """Bytes of the host that are not taken yet, and those that are free: as many where the system does not tell."""
    each = host_bytes(shape, need.dtype, settings.kv_cache) * need.batch
    needed = each * max(0, need.tokens - need.host_room)
    free = free_host_bytes() if needed else None
    return needed, needed if free is None else free


def _on_all(shape: Shape, devices: Sequence[Device]) -> Shape:
    """The layers of all devices together, which share the host."""
    return replace(shape, layers=sum(device.layers for device in devices))


def check_fits(shape: Shape, devices: Sequence[Device], need: Need, settings: LongContextConfig) -> None:
    """Raise before a run whose cache and activations cannot fit beside weights that are loaded already.

    Where all devices have room, `check_host_fits` has the last word.

    Parameters
    ----------
    shape : Shape
        Of what one process holds, see `checkpoint.local_shape`.
    devices : sequence of Device
        In the order of the layers.
    need : Need
    settings : LongContextConfig

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes free and the tokens that would fit, for the device on which fewest do, and the
        first change of settings with which all of them do.
    """
    short = [device for device in devices if _needed(shape, device, need, settings).total > device.free]
    if not short:
        check_host_fits(_on_all(shape, devices), need, settings)
        return

    def fit(device: Device) -> int:
        return most(
            lambda n: _needed(shape, device, need.shortened(n), settings).total <= device.free, 0, need.tokens - 1
        )

    tokens, device = min(((fit(one), one) for one in short), key=lambda found: found[0])
    cache, others = _needed(shape, device, need, settings)
    where = f" on {device.name}" if len(devices) > 1 else ""
    more = "more " if need.room else ""
    what = "activations and outputs" if need.at_the_end else "activations"
    raise DoesNotFit(
        f"{need.batch} x {need.tokens:,} tokens need {cache / GIB:.1f} GiB {more}of KV cache and about "
        f"{others / GIB:.1f} GiB of {what}{where}, {device.free / GIB:.1f} GiB are free: {tokens:,} tokens would "
        f"fit.{_advice(shape, devices, need, settings)} Shorten the prompt or max_new_tokens, lower "
        "prefill_chunk_size, the number of beams or logits_to_keep, or spread the model with device_map"
    )


def fits(shape: Shape, devices: Sequence[Device], need: Need, settings: LongContextConfig) -> bool:
    """Whether `check_fits` lets a run pass."""
    if any(_needed(shape, device, need, settings).total > device.free for device in devices):
        return False
    needed, free = _needed_on_host(_on_all(shape, devices), need, settings)
    return needed <= free


def fullest(shape: Shape, devices: Sequence[Device], need: Need, settings: LongContextConfig) -> tuple[int, Device]:
    """Bytes needed, and the device where they exceed what is free by most or come nearest to it."""
    needed = [(_needed(shape, device, need, settings).total, device) for device in devices]
    return max(needed, key=lambda found: found[0] - found[1].free)


def _advice(shape: Shape, devices: Sequence[Device], need: Need, settings: LongContextConfig) -> str:
    """The first change of settings with which a run fits."""
    selection = any(_peak(shape, device, need, settings).selection for device in devices)
    for meaning, changed in changes(settings, need.tokens, selection=selection, kinds=need.own, cuts=not need.whole):
        if fits(shape, devices, need, replace(settings, **changed)):
            values = ", ".join(f"{name}={value!r}" for name, value in changed.items())
            return f" All would with patch_qwen(model, {values}): {meaning}."
    return ""


def changes(
    settings: LongContextConfig,
    tokens: int,
    *,
    selection: bool,
    kinds: bool,
    cuts: bool = True,
    linear: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of settings with which a run takes less, in words and by name, in the order in which they are preferred.

    Smaller prefill chunks cost a little time, dense prefill costs more; then come 8 bits for keys and values, for
    linear layers, and for both, and then what is slower than these. Each is tried with smaller chunks too.

    Parameters
    ----------
    settings : LongContextConfig
    tokens : int
        Of a row.
    selection : bool
        Whether sparse prefill takes memory.
    kinds, cuts, linear : bool
        Whether the cache may be of another kind, the prompt be cut, and linear layers be of another dtype.
    """
    chunks = _smaller(min(settings.prefill_chunk_size, tokens)) if cuts else []
    more = [*({"prefill_chunk_size": size} for size in chunks)]
    yield from (("smaller prefill chunks", smaller) for smaller in more)
    if selection:
        yield "dense prefill", {"sparse": "off"}
        yield from (("dense prefill in smaller chunks", {"sparse": "off", **smaller}) for smaller in more)
    after = AUTO_KV_CACHES.index(settings.kv_cache) + 1 if settings.kv_cache in AUTO_KV_CACHES else len(AUTO_KV_CACHES)
    others = AUTO_KV_CACHES[after:] if kinds else ()
    eight_bit: list[tuple[str, dict[str, Any]]] = []
    if "int8" in others:
        eight_bit.append((_KINDS_IN_WORDS["int8"], {"kv_cache": "int8"}))
    if linear:
        eight_bit.append(("linear layers in 8 bits", {"linear": "fp8"}))
    if len(eight_bit) == 2:
        eight_bit.append(("keys, values and linear layers in 8 bits", {"kv_cache": "int8", "linear": "fp8"}))
    slower = [(_KINDS_IN_WORDS[kind], {"kv_cache": kind}) for kind in others if kind != "int8"]
    for meaning, changed in eight_bit + slower:
        yield meaning, changed
        yield from ((f"{meaning}, smaller prefill chunks", {**changed, **smaller}) for smaller in more)


def _smaller(size: int) -> list[int]:
    """Chunks of fewer tokens than `size`, powers of 2 from the largest on."""
    largest = 1 << (size - 1).bit_length() - 1 if size > 1 else 0
    return [largest >> step for step in range(largest.bit_length()) if largest >> step >= _SMALLEST_CHUNK]


class _Needed(NamedTuple):
    """Bytes of the cache that are not taken yet, and of everything else."""

    cache: int
    others: int

    @property
    def total(self) -> int:
        return self.cache + self.others


def _needed(shape: Shape, device: Device, need: Need, settings: LongContextConfig) -> _Needed:
    part = replace(shape, layers=device.layers)
    each = kv_bytes(part, need.dtype, settings.kv_cache) * need.batch
    peak = _peak(shape, device, need, settings)
    copied = int(need.copied * need.tokens * each / device.layers) if settings.kv_cache != "host" else 0
    return _Needed(each * max(0, need.tokens - need.room), max(peak.total + need.outputs, need.at_the_end, copied))


def _peak(shape: Shape, device: Device, need: Need, settings: LongContextConfig) -> Peak:
    part = replace(shape, layers=device.layers)
    return Prefill(part, need.tokens, need.batch, need.dtype, settings, need.held, need.padded).peak()
