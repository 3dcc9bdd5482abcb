"""What a run will need, before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import DoesNotFit, InvalidValue
from qwen_longctx.kv.host import STAGED
from qwen_longctx.ops import eight_bit
from qwen_longctx.prefill.peak import Peak, Prefill
from qwen_longctx.prefill.weights import Weights, weights_of

GIB = 1 << 30
_CONTAINERS = (  # of both versions of control groups: folder, limit, what is used, and what of it is idle
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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

    def shortened(self, tokens: int) -> Need:
        """The need of a run of fewer tokens."""
        outputs, at_the_end = (size * tokens // self.tokens for size in (self.outputs, self.at_the_end))
        return self._replace(tokens=tokens, outputs=outputs, at_the_end=at_the_end)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken on a device; None where that is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_bytes() -> int | None:
    """Bytes that this process can take of the host's memory; None where the system does not tell, as outside of Linux.

    A container may have less than the machine.
    """
    free = [_of_meminfo(), *(_of_container(*names) for names in _CONTAINERS)]
    return min((size for size in free if size is not None), default=None)


def _of_meminfo() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _of_container(folder: str, limit: str, used: str, idle: str) -> int | None:
    """What a control group leaves: files that it has read and does not need count as free."""
    try:
        most = int((Path(folder) / limit).read_text())
        idle_bytes = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())[idle]
        return max(0, most - int((Path(folder) / used).read_text()) + int(idle_bytes))
    except (OSError, KeyError, ValueError):  # no limit is called "max"
        return None


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
    each = host_bytes(shape, need.dtype, settings.kv_cache) * need.batch
    needed, free = each * max(0, need.tokens - need.host_room), free_host_bytes()
    if not needed or free is None or needed <= free:
        return
    raise DoesNotFit(
        f"{need.batch} x {need.tokens:,} tokens need {needed / GIB:.1f} GiB {'more ' if need.host_room else ''}of host "
        f"memory for keys and values, {free / GIB:.1f} GiB are free: {need.host_room + free // each:,} tokens would "
        "fit. Shorten the prompt or max_new_tokens, or lower the number of beams"
    )


def check_fits(shape: Shape, devices: Sequence[Device], need: Need, settings: LongContextConfig) -> None:
    """Raise before a run whose cache and activations cannot fit beside weights that are loaded already.

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
        With the bytes needed, the bytes free and the tokens that would fit, for the device on which fewest do.
    """
    short = [device for device in devices if sum(_needed(shape, device, need, settings)) > device.free]
    if not short:
        return

    def fit(device: Device) -> int:
        return most(
            lambda n: sum(_needed(shape, device, need.shortened(n), settings)) <= device.free, 0, need.tokens - 1
        )

    tokens, device = min(((fit(one), one) for one in short), key=lambda found: found[0])
    cache, others = _needed(shape, device, need, settings)
    where = f" on {device.name}" if len(devices) > 1 else ""
    more = "more " if need.room else ""
    what = "activations and outputs" if need.at_the_end else "activations"
    raise DoesNotFit(
        f"{need.batch} x {need.tokens:,} tokens need {cache / GIB:.1f} GiB {more}of KV cache and about "
        f"{others / GIB:.1f} GiB of {what}{where}, {device.free / GIB:.1f} GiB are free: {tokens:,} tokens would "
        "fit. Shorten the prompt or max_new_tokens, lower prefill_chunk_size, the number of beams or logits_to_keep, "
        "or spread the model with device_map"
    )


def _needed(shape: Shape, device: Device, need: Need, settings: LongContextConfig) -> tuple[int, int]:
    """Bytes of the cache that are not taken yet, and of everything else."""
    part = replace(shape, layers=device.layers)
    each = kv_bytes(part, need.dtype, settings.kv_cache) * need.batch
    peak = Prefill(part, need.tokens, need.batch, need.dtype, settings, need.held, need.padded).peak()
    copied = int(need.copied * need.tokens * each / device.layers) if settings.kv_cache != "host" else 0
    return each * max(0, need.tokens - need.room), max(peak.total + need.outputs, need.at_the_end, copied)
