"""Keys and values of one layer: tokens in, segments of keys and values out. Knows no transformers.

Attention asks for `segment`, `room`, `key_means` and `means_room` only, so another kind of store needs no second
attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from qwen_longctx.ops.eight_bit import EightBit
from qwen_longctx.ops.means import mean_keys, write_mean
from qwen_longctx.ops.rotate import place

STEP = 16384  # tokens of free room that are added at most: a copy of a million tokens' keys for every so many tokens
_SMALLEST = 256
_IN_PLACE = 128 << 20  # bytes of a buffer up to which copying rows twice takes less than capturing a graph anew saves
ALL_ROWS = slice(None)


class KeyValues(Protocol):
    """What attention reads."""

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values number `start` to `stop` of some rows, each (rows, tokens, kv_heads, head_dim)."""

    def room(self, blocks: torch.Tensor | None = None) -> tuple[torch.Tensor | EightBit, torch.Tensor | EightBit]:
        """Keys and values of all rows from number 0 on, with the free room behind them, which may hold anything.

        With `blocks`, a list as `ops.decode.decode` takes it, so may whatever is not listed.
        """

    def size(self) -> tuple[int, torch.dtype]:
        """Tokens for which there are keys or room, and the dtype in which keys and values are handed out."""

    def key_means(self, size: int) -> torch.Tensor:
        """Means of every `size` keys of all rows, shape (batch, keys // size, kv_heads, head_dim)."""

    def means_room(self, size: int, slot: torch.Tensor | None = None) -> torch.Tensor:
        """`key_means` with the free room behind them, which may hold anything.

        `slot`, shape (1,), int64, on the device, is where `Store.write` has put a key that the host does not count
        yet: the mean that it completes is among them.
        """


class Tensors(NamedTuple):
    """Keys and values as two tensors of shape (batch, tokens, kv_heads, head_dim), as other caches hand them out."""

    k: torch.Tensor
    v: torch.Tensor

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`."""
        return _part(self.k, start, stop, rows), _part(self.v, start, stop, rows)

    def room(self, blocks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`."""
        return self.k, self.v

    def size(self) -> tuple[int, torch.dtype]:
        """See `KeyValues`."""
        return self.k.shape[1], self.k.dtype

    def key_means(self, size: int) -> torch.Tensor:
        """See `KeyValues`."""
        return mean_keys(self.k, size)

    def means_room(self, size: int, slot: torch.Tensor | None = None) -> torch.Tensor:
        """See `KeyValues`. Every key is counted."""
        return mean_keys(self.k, size)


@dataclass
class _Means:
    """Means of every `size` keys: a buffer with room for those of the whole cache, and how many of them are known."""

    size: int
    buffer: torch.Tensor
    known: int = 0


class Form(NamedTuple):
    """Dtype and shape of what a buffer holds for one token of one row."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Store:
    """Keys and values in two buffers of shape (batch, room, kv_heads, head_dim), taken once where the length is known.

    The buffers lie on the device of the first keys, and have their dtype.

    Parameters
    ----------
    capacity : int
        Tokens to make room for at once; 0 if unknown. A full buffer grows by half, and by `STEP` tokens at most, so
        that free room never counts beside a long sequence.

    Attributes
    ----------
    length : int
        Tokens held.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self.buffers: tuple[torch.Tensor, ...] | None = None
        self._own = False  # nobody else has the buffers
        self._means: _Means | None = None

    def allocate(self, *like: torch.Tensor) -> None:
        """Take the room for tensors such as `like`, of shape (batch, tokens, kv_heads, head_dim): keys, and values."""
        room = max(self.capacity, like[0].shape[1])
        self.buffers, self._own = tuple(_room(x, room) for x in like), True
        self.length, self._means = 0, None

    def adopt(self, which: int, taken: torch.Tensor | None) -> None:
        """Take `taken`, shape (batch, tokens, kv_heads, head_dim), as the full buffer of keys (0) or values (1)."""
        self._means, self._own = None, False
        if taken is None:
            self.buffers, self.length = None, 0
            return
        other = taken if self.buffers is None else self.buffers[1 - which]
        self.buffers = (taken, other) if which == 0 else (other, taken)
        self.length = taken.shape[1]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens: `k` and `v` of shape (batch, tokens, kv_heads, head_dim)."""
        if torch.is_grad_enabled() and self._in_a_graph(k, v):
            self._join(k, v)
            self.length += k.shape[1]
        else:
            self._write(k, v)

    def _write(self, *new: torch.Tensor) -> None:
        """Put tokens behind those held, a tensor for each buffer."""
        stop = self.length + new[0].shape[1]
        for buffer, part in zip(self._room_for(*new), new, strict=True):
            buffer[:, self.length : stop] = part
        self.length = stop

    def _room_for(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The buffers, with room behind the tokens held for others such as `new`, a tensor for each buffer."""
        stop = self.length + new[0].shape[1]
        if self.buffers is None or (self.length == 0 and not self._suits(*new)):
            self.allocate(*new)
        self._make_writable()
        assert self.buffers is not None
        if stop > self.buffers[0].shape[1]:
            self._grow(stop)
        return self.buffers

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        slot: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        spots: torch.Tensor,
    ) -> None:
        """Put a token of every row where the device says, so that a captured graph can repeat it; `count` counts it.

        Parameters
        ----------
        k, v : torch.Tensor
            Shape (batch, 1, kv_heads, head_dim), of the dtype in which keys are handed out, on their device; `k` is not
            rotated.
        slot : torch.Tensor
            Shape (1,), int64, on that device: a number within the room.
        table : tuple of torch.Tensor
            By which to rotate `k`, as `ops.rotate.rotate` takes it.
        spots : torch.Tensor
            Shape (1 or batch, 1), integer, on that device: where that is, for stores that ask.
        """
        assert self.buffers is not None
        keys, values = self.buffers
        place(k, v, *table, (keys, values), slot)

    def count(self, length: int, means: bool = False) -> None:
        """Hold the first `length` tokens, all of which have been written.

        `means` says that `means_room` was asked for after each of them, and knows the means that they complete.
        """
        self.length = length
        if means and self._means is not None:
            self._means.known = length // self._means.size

    def held(self) -> tuple[torch.Tensor, ...]:
        """All tensors that `write` and attention read or write."""
        means = () if self._means is None else (self._means.buffer,)
        return (*(self.buffers or ()), *means)

    def _suits(self, *new: torch.Tensor) -> bool:
        """Whether the buffers can take other tokens such as these: of the same batch, heads, dtype and device."""
        return all(
            (x.shape[0], x.shape[2:], x.dtype, x.device) == (held.shape[0], held.shape[2:], held.dtype, held.device)
            for held, x in zip(self.buffers or (), new, strict=True)
        )

    def _in_a_graph(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        held = self.buffers or ()
        return any(x.requires_grad for x in (k, v, *held))

    def _join(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append by copying: a graph of gradients keeps the tensors it has seen, so nothing is written in place."""
        held = self.segment(0, self.length) if self.buffers is not None else (k[:, :0], v[:, :0])
        self.buffers = (torch.cat((held[0], k), 1), torch.cat((held[1], v), 1))
        self._means, self._own = None, False

    def _make_writable(self) -> None:
        """Copy buffers made under `torch.inference_mode`, which cannot be written to outside of it."""
        assert self.buffers is not None
        if self.buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            self.buffers = tuple(buffer.clone() for buffer in self.buffers)
            self._means, self._own = None, True

    def _grow(self, least: int) -> None:
        assert self.buffers is not None
        room = room_beyond(least)
        grown = []
        for old in self.buffers:
            try:
                new = old.new_empty(old.shape[0], room, *old.shape[2:])
            except torch.cuda.OutOfMemoryError:
                new = old.new_empty(old.shape[0], least, *old.shape[2:])
            new[:, : self.length] = old[:, : self.length]
            grown.append(new)
        self.buffers, self._own = tuple(grown), True

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. Views of the buffers."""
        assert self.buffers is not None
        return _part(self.buffers[0], start, stop, rows), _part(self.buffers[1], start, stop, rows)

    def room(self, blocks: torch.Tensor | None = None) -> tuple[torch.Tensor | EightBit, torch.Tensor | EightBit]:
        """See `KeyValues`. The buffers."""
        assert self.buffers is not None
        return self.buffers[0], self.buffers[1]

    def size(self) -> tuple[int, torch.dtype]:
        """See `KeyValues`."""
        assert self.buffers is not None
        return self.buffers[0].shape[1], self.buffers[0].dtype

    def key_means(self, size: int) -> torch.Tensor:
        """See `KeyValues`. Each mean is worked out once."""
        return self.means_room(size)[:, : self.length // size]

    def means_room(self, size: int, slot: torch.Tensor | None = None) -> torch.Tensor:
        """See `KeyValues`. The buffer of means, which stays where it is as long as those of keys and values do."""
        means = self._means
        if means is None or not self._fits(means, size):
            means = self._means = self._new_means(size)
        complete = self.length // size
        if means.known < complete:
            fresh = mean_keys(self._keys(means.known * size, complete * size), size)
            means.buffer[:, means.known : complete] = fresh
            means.known = complete
        if slot is not None:
            write_mean(self.room()[0], means.buffer, slot, size)
        return means.buffer

    def _fits(self, means: _Means, size: int) -> bool:
        """Whether there is room for the means of all keys for which there is room, and they can be written."""
        room = -(-self.size()[0] // size)
        writable = torch.is_inference_mode_enabled() or not means.buffer.is_inference()
        return means.size == size and means.buffer.shape[1] == room and writable

    def _new_means(self, size: int) -> _Means:
        """A buffer for the means of all keys for which there is room, with those that are known already."""
        empty, old = self._keys(0, 0), self._means
        buffer = empty.new_empty(empty.shape[0], -(-self.size()[0] // size), *empty.shape[2:])
        if old is None or old.size != size:
            return _Means(size, buffer)
        buffer[:, : old.known] = old.buffer[:, : old.known]
        return _Means(size, buffer, old.known)

    def _keys(self, start: int, stop: int) -> torch.Tensor:
        """Keys number `start` to `stop` of all rows."""
        return self.segment(start, stop)[0]

    def whole(self) -> tuple[torch.Tensor, ...] | None:
        """Keys and values of all tokens held, as tensors that last; None if there is no memory for any yet."""
        return None if self.buffers is None else self.segment(0, self.length)

    def forms(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Form]:
        """What the buffers hold for each token, by name, where keys and values are handed out in `dtype`."""
        return dict.fromkeys(("keys", "values"), Form(dtype, (kv_heads, head_dim)))

    def parts(self, length: int) -> list[list[torch.Tensor]]:
        """The first `length` tokens of each buffer where they lie, in parts that follow one another."""
        return [[x[:, :length]] for x in self.buffers or ()]

    def room_for(self, rows: int) -> int:
        """Tokens of `rows` rows for which there is memory."""
        return self.size()[0] if self.buffers is not None and self.buffers[0].shape[0] == rows else 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; nothing is copied."""
        self.length = max(0, min(length, self.length))
        if self._means is not None:
            self._means.known = min(self._means.known, self.length // self._means.size)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep rows number `rows` of the batch, integers of shape (rows,), in that order."""
        if self.buffers is None:
            return
        stays, means = self._stays(rows), self._means
        self.buffers = tuple(_selected(x, rows, self.length, stays) for x in self.buffers)
        self._own = True
        if means is not None:  # beams are reordered at every token
            means.buffer = _selected(means.buffer, rows, means.known, stays and self._fits(means, means.size))

    def _stays(self, rows: torch.Tensor) -> bool:
        """Whether rows are reordered within the buffers, whose addresses captured graphs know."""
        assert self.buffers is not None
        size = max(x[:, : self.length].numel() * x.element_size() for x in self.buffers)
        writable = torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()
        return self._own and len(rows) == self.buffers[0].shape[0] and size <= _IN_PLACE and writable


def _selected(x: torch.Tensor, rows: torch.Tensor, held: int, stays: bool) -> torch.Tensor:
    """Rows number `rows` of a buffer that holds so many tokens, in its own place if it `stays` there."""
    chosen = x[:, :held].index_select(0, rows.to(x.device))
    new = x if stays else x.new_empty(len(chosen), *x.shape[1:])
    new[:, :held] = chosen
    return new


def room_beyond(least: int) -> int:
    """Tokens to make room for where `least` must find it and do not."""
    return least + max(_SMALLEST, min(least // 2, STEP))


def _part(x: torch.Tensor, start: int, stop: int, rows: slice) -> torch.Tensor:
    """``x[rows, start:stop]``, without the cost of a view where that is all: decoding counts microseconds."""
    if rows != ALL_ROWS:
        x = x[rows]
    return x if start == 0 and stop == x.shape[1] else x[:, start:stop]


def _room(like: torch.Tensor, room: int) -> torch.Tensor:
    return like.new_empty(like.shape[0], room, *like.shape[2:])
