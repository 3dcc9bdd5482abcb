"""Keys and values of one layer: tokens in, segments of keys and values out. Knows no transformers.

Attention asks for `segment`, `room` and `key_means` only, so another kind of store needs no second attention.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

STEP = 16384  # tokens of free room that are added at most: a copy of a million tokens' keys for every so many tokens
_SMALLEST = 256
ALL_ROWS = slice(None)


class KeyValues(Protocol):
    """What attention reads."""

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values number `start` to `stop` of some rows, each (rows, tokens, kv_heads, head_dim)."""

    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows from number 0 on, with the free room behind them, which may hold anything."""

    def key_means(self, size: int) -> torch.Tensor:
        """Means of every `size` keys of all rows, shape (batch, keys // size, kv_heads, head_dim)."""


class Tensors(NamedTuple):
    """Keys and values as two tensors of shape (batch, tokens, kv_heads, head_dim), as other caches hand them out."""

    k: torch.Tensor
    v: torch.Tensor

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`."""
        return _part(self.k, start, stop, rows), _part(self.v, start, stop, rows)

    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`."""
        return self.k, self.v

    def key_means(self, size: int) -> torch.Tensor:
        """See `KeyValues`."""
        return mean_keys(self.k, size)


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
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._means: torch.Tensor | None = None
        self._mean_size = 0

    def allocate(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take the room: `k`, `v` of shape (batch, tokens, kv_heads, head_dim) give batch, heads, dtype and device."""
        room = max(self.capacity, k.shape[1])
        self.buffers = (_room(k, room), _room(v, room))
        self.length, self._means = 0, None

    def adopt(self, which: int, taken: torch.Tensor | None) -> None:
        """Take `taken`, shape (batch, tokens, kv_heads, head_dim), as the full buffer of keys (0) or values (1)."""
        self._means = None
        if taken is None:
            self.buffers, self.length = None, 0
            return
        other = taken if self.buffers is None else self.buffers[1 - which]
        self.buffers = (taken, other) if which == 0 else (other, taken)
        self.length = taken.shape[1]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens: `k` and `v` of shape (batch, tokens, kv_heads, head_dim)."""
        stop = self.length + k.shape[1]
        if torch.is_grad_enabled() and self._in_a_graph(k, v):
            self._join(k, v)
        else:
            if self.buffers is None or (self.length == 0 and not self._suits(k, v)):
                self.allocate(k, v)
            self._make_writable()
            assert self.buffers is not None
            if stop > self.buffers[0].shape[1]:
                self._grow(stop)
            for buffer, new in zip(self.buffers, (k, v), strict=True):
                buffer[:, self.length : stop] = new
        self.length = stop

    def _suits(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether the buffers can take other tokens such as these: of the same batch, heads, dtype and device."""
        return all(
            (x.shape[0], x.shape[2:], x.dtype, x.device) == (held.shape[0], held.shape[2:], held.dtype, held.device)
            for held, x in zip(self.buffers or (), (k, v), strict=True)
        )

    def _in_a_graph(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        held = self.buffers or ()
        return any(x.requires_grad for x in (k, v, *held))

    def _join(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append by copying: a graph of gradients keeps the tensors it has seen, so nothing is written in place."""
        held = self.segment(0, self.length) if self.buffers is not None else (k[:, :0], v[:, :0])
        self.buffers = (torch.cat((held[0], k), 1), torch.cat((held[1], v), 1))
        self._means = None

    def _make_writable(self) -> None:
        """Copy buffers made under `torch.inference_mode`, which cannot be written to outside of it."""
        assert self.buffers is not None
        if self.buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            self.buffers = (self.buffers[0].clone(), self.buffers[1].clone())
            self._means = None

    def _grow(self, least: int) -> None:
        assert self.buffers is not None
        room = least + max(_SMALLEST, min(least // 2, STEP))
        grown = []
        for old in self.buffers:
            try:
                new = old.new_empty(old.shape[0], room, *old.shape[2:])
            except torch.cuda.OutOfMemoryError:
                new = old.new_empty(old.shape[0], least, *old.shape[2:])
            new[:, : self.length] = old[:, : self.length]
            grown.append(new)
        self.buffers = (grown[0], grown[1])

    def segment(self, start: int, stop: int, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. Views of the buffers."""
        assert self.buffers is not None
        return _part(self.buffers[0], start, stop, rows), _part(self.buffers[1], start, stop, rows)

    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KeyValues`. The buffers."""
        assert self.buffers is not None
        return self.buffers

    def key_means(self, size: int) -> torch.Tensor:
        """See `KeyValues`. Each mean is worked out once."""
        assert self.buffers is not None
        if self._means is None or self._mean_size != size:
            self._means, self._mean_size = self.buffers[0][:, :0], size
        known = self._means.shape[1]
        if known < self.length // size:
            fresh = mean_keys(self.buffers[0][:, known * size : self.length], size)
            self._means = torch.cat((self._means, fresh), dim=1)
        return self._means

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; nothing is copied."""
        self.length = max(0, min(length, self.length))
        if self._means is not None:
            self._means = self._means[:, : self.length // self._mean_size]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep rows number `rows` of the batch, integers of shape (rows,), in that order."""
        if self.buffers is None:
            return
        selected = []
        for old in self.buffers:
            chosen = rows.to(old.device)
            new = old.new_empty(len(chosen), *old.shape[1:])
            new[:, : self.length] = old[:, : self.length].index_select(0, chosen)
            selected.append(new)
        self.buffers = selected[0], selected[1]
        if self._means is not None:  # beams are reordered at every token
            self._means = self._means.index_select(0, rows.to(self._means.device))


def mean_keys(k: torch.Tensor, size: int) -> torch.Tensor:
    """Means of every `size` keys of (batch, keys, kv_heads, head_dim): (batch, keys // size, kv_heads, head_dim)."""
    return k[:, : k.shape[1] // size * size].unflatten(1, (-1, size)).mean(dim=2)


def _part(x: torch.Tensor, start: int, stop: int, rows: slice) -> torch.Tensor:
    """``x[rows, start:stop]``, without the cost of a view where that is all: decoding counts microseconds."""
    if rows != ALL_ROWS:
        x = x[rows]
    return x if start == 0 and stop == x.shape[1] else x[:, start:stop]


def _room(like: torch.Tensor, room: int) -> torch.Tensor:
    batch, _, heads, head_dim = like.shape
    return like.new_empty(batch, room, heads, head_dim)
