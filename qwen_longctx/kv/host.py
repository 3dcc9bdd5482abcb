"""Keys and values in the memory of the host, from where they come up to the device a layer at a time.

They are written once: only new tokens travel down. A layer that attends finds its keys and values in one of two buffers
that all layers of a device share, and while it computes those of the next layer come up to the other one.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from qwen_longctx.errors import Unsupported
from qwen_longctx.kv.pinned import Pages
from qwen_longctx.kv.store import ALL_ROWS, Store, room_beyond
from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.fetch import Stretches, fetch, places_of

logger = logging.getLogger(__name__)

STAGED = 2  # layers of a device that are there at once
UNIT = 256  # tokens; every piece of host memory holds a multiple of it
_PIECE = 1 << 28  # bytes of a piece at most: registering a smaller one takes as long as it
_WORKERS = 2  # threads that take host memory ahead of its use
_AT_A_TIME = 1 << 24  # bytes of rows that are reordered at a time
_FEW = 256  # keys that come up alone, where the rest of their layer has not

Kinds = list[tuple[torch.Size, torch.dtype]]  # of keys and of values; how many tokens does not matter


def is_apart(device: torch.device) -> bool:
    """Whether a device has memory of its own. If not, what is on the host lies where it is used."""
    return device.type not in ("cpu", "meta")


class Piece(NamedTuple):
    """Host memory for the tokens from number `start` on; keys and values of shape (batch, tokens, kv_heads, head_dim).

    `pages` is what the tensors lie in.
    """

    start: int
    tensors: tuple[torch.Tensor, ...]
    pages: Pages

    @property
    def stop(self) -> int:
        """The number after that of the last token."""
        return self.start + self.tensors[0].shape[1]


def new_piece(start: int, tokens: int, kinds: Kinds, device: torch.device) -> Piece:
    """Memory for `tokens` tokens of keys and values that are used on `device`."""
    shapes = [torch.Size((shape[0], tokens, *shape[2:])) for shape, _ in kinds]
    sizes = [shape.numel() * dtype.itemsize for shape, (_, dtype) in zip(shapes, kinds, strict=True)]
    with torch.inference_mode(False):  # else they could not be written to outside of it
        pages = Pages(sum(sizes), device)
        parts = zip(pages.memory.split(sizes), shapes, kinds, strict=True)
        return Piece(start, tuple(part.view(dtype).view(shape) for part, shape, (_, dtype) in parts), pages)


class HostStore(Store):
    """A `Store` that keeps its tokens on the host, in pieces: it grows without a copy.

    `buffers` hold no tokens. They tell rows, heads, dtype and device.

    Parameters
    ----------
    staging : Staging
        That of the cache.
    capacity : int
        Tokens to have room for in buffers on the device, as of `Store`. Host memory is taken as it is needed.
    """

    def __init__(self, staging: Staging, capacity: int = 0) -> None:
        super().__init__(capacity)
        self._staging = staging
        self._room = 0
        self._clear()

    def _clear(self) -> None:
        """Have nothing on the host, and know of no device."""
        self._lane: Lane | None = None
        self._pieces: list[Piece] = []
        self._coming: deque[tuple[int, Future[Piece]]] = deque()  # each with the tokens that there are with it
        self._places: torch.Tensor | None = None
        self.length, self._means = 0, None

    # --- tokens in ------------------------------------------------------------------------------------------------

    def allocate(self, *like: torch.Tensor) -> None:
        """Be empty, and ready for tensors such as `like`, of shape (batch, tokens, kv_heads, head_dim)."""
        self._forget_device()
        self._clear()
        with torch.inference_mode(False):
            self.buffers = tuple(x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in like)
        self._room = max(self.capacity, like[0].shape[1])

    def adopt(self, which: int, taken: torch.Tensor | None) -> None:
        """Refuse tensors of others, which lie elsewhere; None empties the store."""
        if taken is not None:
            raise Unsupported('a cache in host memory takes no tensors of keys and values: use kv_cache="device"')
        self._forget_device()
        self._clear()
        self.buffers = None

    @torch.compiler.disable
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens: `k` and `v` of shape (batch, tokens, kv_heads, head_dim), on the device.

        Raises
        ------
        NotImplementedError
            A graph of gradients is wanted.
        DoesNotFit
            There is no host memory left.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise Unsupported('a cache in host memory has no gradients: train with kv_cache="device"')
        stop = self.length + k.shape[1]
        if self.buffers is None or (self.length == 0 and not self._suits(k, v)):
            self.allocate(k, v)
        if stop > self._room:
            self._room = room_beyond(stop)
        self._reserve(stop)
        if stop > self.length:
            self._on_device().put(self, (k, v))
        self.length = stop

    def _reserve(self, stop: int) -> None:
        """Have host memory for `stop` tokens, and let other threads take it for as many more as are new."""
        self._order(stop)
        try:
            while self._taken < stop:
                self._pieces.append(self._coming[0][1].result())
                self._coming.popleft()
                self._staging.note(self._pieces[-1].pages, self._device)
        except BaseException:
            self._coming.clear()  # those behind it would leave a gap
            raise
        self._order(self._ahead(stop))

    def _ahead(self, stop: int) -> int:
        """Tokens for which memory is taken, at the end by other threads, where `stop` tokens want it."""
        return max(stop, min(self._room, stop + max(0, stop - self.length)))

    def _order(self, stop: int) -> None:
        """Let other threads take the memory that is missing for `stop` tokens."""
        for start, tokens in self._missing(stop):
            future = self._staging.order(new_piece, start, tokens, self._kinds, self._device)
            self._coming.append((start + tokens, future))

    def _missing(self, stop: int) -> list[tuple[int, int]]:
        """Where the pieces begin that are missing for `stop` tokens, and their tokens."""
        have = self._coming[-1][0] if self._coming else self._taken
        most, missing = max(UNIT, _PIECE // self._width // UNIT * UNIT), []
        while have < stop:
            tokens = min(most, -(-(max(self._room, stop) - have) // UNIT) * UNIT)
            missing.append((have, tokens))
            have += tokens
        return missing

    def missing_bytes(self, tokens: int) -> int:
        """Bytes of host memory that will be taken when so many tokens want it, ahead of the next ones too."""
        return self._width * sum(size for _, size in self._missing(self._ahead(tokens)))

    @property
    def _kinds(self) -> Kinds:
        return [(x.shape, x.dtype) for x in self.buffers or ()]

    @property
    def _width(self) -> int:
        """Bytes of a token of all rows."""
        return max(1, sum(shape[0] * math.prod(shape[2:]) * dtype.itemsize for shape, dtype in self._kinds))

    @property
    def _device(self) -> torch.device:
        assert self.buffers is not None
        return self.buffers[0].device

    @property
    def _taken(self) -> int:
        """Tokens for which there is host memory."""
        return self._pieces[-1].stop if self._pieces else 0

    def room_for(self, rows: int) -> int:
        """See `Store.room_for`: of memory on the host."""
        return self._taken if self.buffers is not None and self.buffers[0].shape[0] == rows else 0

    def staged_for(self, rows: int) -> int:
        """Tokens of `rows` rows for which the buffers have room to which this layer comes up."""
        return 0 if self._lane is None else self._lane.room_for(rows)

    # --- keys and values out --------------------------------------------------------------------------------------

    @torch.compiler.disable
    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. Views of buffers that the layer after the next one writes to."""
        k, v = self._on_device().present(self)
        return k[rows, start:stop], v[rows, start:stop]

    @torch.compiler.disable
    def room(self, blocks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. Views as of `segment`.

        Of the blocks of a list these alone come up, where the device reads the host's memory by itself.
        """
        if blocks is None or not self._is_read_by(blocks):
            return self._on_device().present(self)
        return self._on_device().present_blocks(self, blocks)

    def _is_read_by(self, blocks: torch.Tensor) -> bool:
        return uses_triton(blocks) and all(piece.pages.pinned for piece in self._pieces)

    def size(self) -> tuple[int, torch.dtype]:
        """See `KeyValues`: of buffers on the device."""
        assert self.buffers is not None
        return self._room, self.buffers[0].dtype

    def _keys(self, start: int, stop: int) -> torch.Tensor:
        if stop - start > _FEW:
            return self.segment(start, stop)[0]
        return self._on_device().keys(self, start, stop)

    def whole(self) -> tuple[torch.Tensor, ...] | None:
        """See `Store.whole`. On the host; copies if there are several pieces."""
        if self.buffers is None:
            return None
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in self.parts(self.length))

    def parts(self, length: int) -> list[list[torch.Tensor]]:
        """See `Store.parts`. On the host, of each piece."""
        if self.buffers is None:
            return []
        self._on_device().settle()
        self._reserve(max(1, length))
        pieces = [piece for piece in self._pieces if piece.start < max(1, length)]
        return [[piece.tensors[which][:, : length - piece.start] for piece in pieces] for which in (0, 1)]

    # --- what is done with tokens ---------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; nothing is copied."""
        super().truncate(length)
        if self._lane is not None:
            self._lane.cut(self, self.length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep rows number `rows` of the batch, integers of shape (rows,), in that order. The host copies them."""
        if self.buffers is None:
            return
        chosen, batch = rows.cpu(), self.buffers[0].shape[0]
        if torch.equal(chosen, torch.arange(batch, device="cpu", dtype=chosen.dtype)):
            return
        self._on_device().settle()
        self._forget_device()
        if len(chosen) == batch:
            self._copy_rows(self._pieces, chosen)
        else:
            kinds = [(torch.Size((len(chosen), *shape[1:])), dtype) for shape, dtype in self._kinds]
            pieces = [new_piece(old.start, old.stop - old.start, kinds, self._device) for old in self._pieces]
            self._copy_rows(pieces, chosen)
            with torch.inference_mode(False):
                self.buffers = tuple(x.new_empty(len(chosen), *x.shape[1:]) for x in self.buffers)
            self._pieces, self._places = pieces, None
            self._coming.clear()
        if self._means is not None:
            self._means.buffer = self._means.buffer.index_select(0, rows.to(self._device))

    def _copy_rows(self, pieces: list[Piece], rows: torch.Tensor) -> None:
        """Copy rows to `pieces`, which may be those that are there."""
        for old, new in zip(self._pieces, pieces, strict=True):
            for source, target in zip(old.tensors, new.tensors, strict=True):
                step = max(1, _AT_A_TIME // source[:, :1].nbytes)
                for start in range(0, min(old.stop, self.length) - old.start, step):
                    target[:, start : start + step] = source[:, start : start + step].index_select(0, rows)

    def _forget_device(self) -> None:
        """Note that what has come up is of no use any more."""
        if self._lane is not None:
            self._lane.cut(self, 0)

    # --- for the lane ---------------------------------------------------------------------------------------------

    def _on_device(self) -> Lane:
        if self._lane is None:
            self._lane = self._staging.lane(self._device)
            self._lane.join(self)
        return self._lane

    def is_in(self, lane: Lane) -> bool:
        """Whether this layer passes there."""
        return self._lane is lane

    def pairs(
        self, buffers: tuple[torch.Tensor, ...], start: int, stop: int, first: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield stretches of `buffers` on the device and of the host, for the same tokens from `start` to `stop`.

        `buffers` are for keys, or for keys and values, and begin with token number `first`.
        """
        for piece in self._pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                for there, here in zip(buffers, piece.tensors, strict=False):
                    for row in range(here.shape[0]):  # each lies in one stretch
                        yield there[row, low - first : high - first], here[row, low - piece.start : high - piece.start]

    def fetch(self, blocks: torch.Tensor, buffers: tuple[torch.Tensor, ...]) -> None:
        """Copy the blocks of a list from the host to their places in `buffers`."""
        sources: list[Stretches] = [[(piece.start, piece.tensors[which]) for piece in self._pieces] for which in (0, 1)]
        if self._places is None or self._places.shape[2] != self._taken // UNIT:
            self._places = torch.stack([places_of(some, UNIT, self._device) for some in sources])
        for some, places, buffer in zip(sources, self._places, buffers, strict=True):
            fetch(some, places, UNIT, blocks, buffer[:, : self.length])

    # --- copies ---------------------------------------------------------------------------------------------------

    def _bare(self) -> dict[str, Any]:
        """What can be copied: nothing of a device's streams or of threads, and no tokens."""
        gone: dict[str, Any] = {"_lane": None, "_pieces": [], "_coming": deque(), "_places": None}
        return {**vars(self), **gone}

    def _refill(self, content: list[list[torch.Tensor]]) -> None:
        """Take as many tokens as `length` says, of shape (batch, some tokens, kv_heads, head_dim) in each part."""
        length, self.length = self.length, 0
        if length:
            self._reserve(length)
        for which, parts in enumerate(content):
            start = 0
            for part in parts:
                for piece in self._pieces:
                    low, high = max(start, piece.start), min(start + part.shape[1], piece.stop)
                    if low < high:
                        here = piece.tensors[which][:, low - piece.start : high - piece.start]
                        here.copy_(part[:, low - start : high - start])
                start += part.shape[1]
        self.length = length

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        other = object.__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(self._bare(), memo))
        other._refill(self.parts(self.length))
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self._bare(), "content": [[x.clone() for x in parts] for parts in self.parts(self.length)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        content = state.pop("content")
        vars(self).update(state)
        self._refill(content)


class _Slot:
    """Buffers on a device to which layers come up in turn.

    Attributes
    ----------
    buffers : tuple of torch.Tensor
        Keys and values, shape (batch, room, kv_heads, head_dim); none at first.
    held : int
        The tokens before this number of the layer that has the slot are there when `ready` has passed.
    ready : torch.cuda.Event, optional
        Passes when the stream beside the computing one has done what it was last asked to do with the buffers.
    """

    def __init__(self) -> None:
        self.buffers: tuple[torch.Tensor, ...] = ()
        self.held = 0
        self.ready: Any = None
        self._owner: Any = None

    def is_of(self, store: HostStore) -> bool:
        """Whether a layer has the slot."""
        return self._owner is not None and self._owner() is store

    def give(self, store: HostStore, room: int) -> bool:
        """Let a layer have the slot, with room for so many tokens; returns whether the buffers are new."""
        if not self.is_of(store):
            self._owner, self.held = weakref.ref(store), 0
        like = store.buffers or ()
        fits = bool(self.buffers) and all(
            x.shape[1] >= room and (x.shape[0], x.shape[2:], x.dtype) == (y.shape[0], y.shape[2:], y.dtype)
            for x, y in zip(self.buffers, like, strict=True)
        )
        if not fits:
            self.buffers, self.held = (), 0  # the old ones go before the new ones come
            with torch.inference_mode(False):
                self.buffers = tuple(x.new_empty(x.shape[0], room, *x.shape[2:]) for x in like)
        return not fits


class Lane:
    """The two slots of a device, and the stream on which tokens travel while the device computes.

    Whatever one of the two streams does to a slot waits for what the other was asked to do before. So layers may be
    asked for in any order; in the order in which they joined, each finds its tokens there.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = tuple(_Slot() for _ in range(STAGED))
        self._last = 1
        self._stores: list[weakref.ref[HostStore]] = []  # a cycle would keep the memory of a cache that is gone

    def join(self, store: HostStore) -> None:
        """Let a layer pass here, behind those that have joined."""
        self._stores = [one for one in self._stores if one() not in (None, store)]
        self._stores.append(weakref.ref(store))

    def put(self, store: HostStore, new: tuple[torch.Tensor, ...]) -> None:
        """Write tokens behind those that a layer holds, on the device and on the host."""
        start, stop = store.length, store.length + new[0].shape[1]
        slot = self._slot_of(store)
        self._wait(slot)
        for buffer, part in zip(slot.buffers, new, strict=True):
            buffer[:, start:stop] = part
        with self._aside(slot):
            for there, here in store.pairs(slot.buffers, start, stop):
                here.copy_(there, non_blocking=True)
        if slot.held >= start:
            slot.held = stop

    def present(self, store: HostStore) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer with the room behind them, while those of the next layer come up."""
        slot = self._slot_of(store)
        self._load(slot, store)
        self._wait(slot)
        following = self._after(store)
        if following is not None:
            other = self._slots[1 - self._last]
            self._give(other, following, max(store.size()[0], following.size()[0]))
            self._load(other, following)
        return self._views(slot, store)

    def present_blocks(self, store: HostStore, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`present` where nothing but the blocks of a list need be there; no other layer comes up."""
        slot = self._slot_of(store)
        self._wait(slot)
        if slot.held < store.length:
            store.fetch(blocks, slot.buffers)
        return self._views(slot, store)

    def keys(self, store: HostStore, start: int, stop: int) -> torch.Tensor:
        """Some keys of a layer, which does not come up for them."""
        slot = self._slot_of(store)
        self._wait(slot)
        if slot.held >= stop:
            return slot.buffers[0][:, start:stop]
        like = slot.buffers[0]
        some = like.new_empty(like.shape[0], stop - start, *like.shape[2:])
        for there, here in store.pairs((some,), start, stop, first=start):
            there.copy_(here, non_blocking=True)
        return some

    def cut(self, store: HostStore, length: int) -> None:
        """Note that the tokens of a layer from number `length` on are others now."""
        for slot in self._slots:
            if slot.is_of(store):
                slot.held = min(slot.held, length)

    def room_for(self, rows: int) -> int:
        """Tokens of `rows` rows for which all slots that are needed have room."""
        needed = self._slots[: len(self._stores)]
        rooms = (slot.buffers[0].shape if slot.buffers else (rows, 0) for slot in needed)
        return min(room if batch == rows else 0 for batch, room, *_ in rooms)

    def settle(self) -> None:
        """Wait until no token is under way and none is read."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def _slot_of(self, store: HostStore) -> _Slot:
        """The slot that a layer has, or from now on."""
        mine = [number for number, slot in enumerate(self._slots) if slot.is_of(store)]
        self._last = mine[0] if mine else 1 - self._last
        slot = self._slots[self._last]
        self._give(slot, store, store.size()[0])
        return slot

    def _give(self, slot: _Slot, store: HostStore, room: int) -> None:
        if slot.give(store, room) and self._stream is not None:
            for buffer in slot.buffers:
                buffer.record_stream(self._stream)  # else its memory would be taken by others while tokens arrive

    def _load(self, slot: _Slot, store: HostStore) -> None:
        """Let those tokens of a layer come up that are not there."""
        if slot.held < store.length:
            with self._aside(slot):
                for there, here in store.pairs(slot.buffers, slot.held, store.length):
                    there.copy_(here, non_blocking=True)
            slot.held = store.length

    def _after(self, store: HostStore) -> HostStore | None:
        """The layer that is asked for next, if it is another one and holds tokens: behind the last comes the first."""
        stores = [one for ref in self._stores if (one := ref()) is not None]
        following = stores[(stores.index(store) + 1) % len(stores)]
        return following if following is not store and following.length and following.is_in(self) else None

    @contextmanager
    def _aside(self, slot: _Slot) -> Iterator[None]:
        """The block's work on a slot runs beside the computing stream, behind all that this was asked to do."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            slot.ready = self._stream.record_event()

    def _wait(self, slot: _Slot) -> None:
        """What the device computes from now on finds the slot ready."""
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def _views(self, slot: _Slot, store: HostStore) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (buffer[:, : store.size()[0]] for buffer in slot.buffers)
        return k, v


class Staging:
    """What the layers of one cache share: a lane for each device, and threads that take host memory.

    A copy or a pickle of it is a new one.
    """

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._warned = False

    def __reduce__(self) -> Any:
        return Staging, ()

    def lane(self, device: torch.device) -> Lane:
        """The lane of a device."""
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]

    def order(self, make: Callable[..., Piece], *arguments: Any) -> Future[Piece]:
        """``make(*arguments)`` in another thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS, "host-memory")
        return self._pool.submit(make, *arguments)

    def note(self, pages: Pages, device: torch.device) -> None:
        """Warn once of pages that are not registered with their device."""
        if device.type == "cuda" and not pages.pinned and not self._warned:
            self._warned = True
            logger.warning(
                "host memory of the cache could not be registered with %s: keys and values travel slowly, and "
                "computing waits for them",
                device,
            )
