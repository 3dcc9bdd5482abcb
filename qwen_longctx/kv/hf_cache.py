"""A KV cache that never copies itself: room for the whole run is taken once, and layers hand out views."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qwen_longctx.sparsity.record import SparseState

_GROWTH = 1.5  # amortised, where the length is not known beforehand
_SMALLEST = 256


class LongContextLayer(DynamicLayer):
    """Keys and values of one layer in buffers of shape (batch, room, kv_heads, head_dim).

    `keys` and `values` are views of shape (batch, kv_heads, tokens, head_dim), as transformers expects them.
    The buffers lie on the device of the first keys they are given.

    Parameters
    ----------
    capacity : int
        Tokens to make room for at once; 0 if unknown.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._length = 0
        self._means: torch.Tensor | None = None
        self._mean_size = 0
        self.capacity = capacity
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._view(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._adopt(0, value)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._view(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._adopt(1, value)

    def _view(self, which: int) -> torch.Tensor | None:
        return None if self._buffers is None else self._buffers[which][:, : self._length].transpose(1, 2)

    def _adopt(self, which: int, value: torch.Tensor | None) -> None:
        """Take what transformers assigns (offloaded tensors, say) as a full buffer."""
        if value is None:
            self._buffers, self._length, self._means = None, 0, None
            return
        taken = value.transpose(1, 2)
        other = taken if self._buffers is None else self._buffers[1 - which]
        self._buffers = (taken, other) if which == 0 else (other, taken)
        self._length, self._means = taken.shape[1], None

    def lazy_initialization(self, key_states: torch.Tensor, *args: Any) -> None:
        """Take the room: `key_states` of shape (batch, kv_heads, tokens, head_dim) gives batch, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        values = args[0] if args else key_states
        room = max(self.capacity, key_states.shape[2])
        self._buffers = (_empty(key_states, room), _empty(values, room))
        self._length = 0
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; both of shape (batch, kv_heads, tokens, head_dim). Returns views of all tokens so far."""
        keys, values = self.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` in the layout of the buffers, shape (batch, tokens, kv_heads, head_dim), in and out."""
        if self._buffers is None:
            self.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        assert self._buffers is not None
        start, stop = self._length, self._length + k.shape[1]
        if stop > self._buffers[0].shape[1]:
            self._grow(max(stop, int(stop * _GROWTH), _SMALLEST))
        keys, values = self._buffers
        keys[:, start:stop] = k
        values[:, start:stop] = v
        self._length = stop
        return keys[:, :stop], values[:, :stop]

    def _grow(self, room: int) -> None:
        assert self._buffers is not None
        grown = []
        for old in self._buffers:
            new = old.new_empty(old.shape[0], room, *old.shape[2:])
            new[:, : self._length] = old[:, : self._length]
            grown.append(new)
        self._buffers = (grown[0], grown[1])

    def key_means(self, size: int) -> torch.Tensor:
        """`mean_keys` of all keys so far, worked out once a key."""
        assert self._buffers is not None
        if self._means is None or self._mean_size != size:
            self._means, self._mean_size = self._buffers[0][:, :0], size
        known = self._means.shape[1]
        if known < self._length // size:
            fresh = mean_keys(self._buffers[0][:, known * size : self._length], size)
            self._means = torch.cat((self._means, fresh), dim=1)
        return self._means

    def get_seq_length(self, *args: Any) -> int:
        """Tokens held."""
        return self._length

    def crop(self, tokens: int) -> None:
        """Keep `tokens` tokens, or drop ``-tokens`` if negative, as transformers of different ages ask for.

        0 drops nothing, as in assisted decoding when every candidate is taken. Nothing is copied.
        """
        keep = tokens if tokens > 0 else self._length + tokens
        self._length = max(0, min(keep, self._length))
        if self._means is not None:
            self._means = self._means[:, : self._length // self._mean_size]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows `beam_idx`, as beam search does each step."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self._buffers is not None:
            rows = torch.arange(self._buffers[0].shape[0]).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices`, integers of shape (rows,)."""
        if self._buffers is None:
            return
        selected = []
        for old in self._buffers:
            rows = indices.to(old.device)
            new = old.new_empty(len(rows), *old.shape[1:])
            torch.index_select(old[:, : self._length], 0, rows, out=new[:, : self._length])
            selected.append(new)
        self._buffers, self._means = (selected[0], selected[1]), None

    def reset(self) -> None:
        """Forget all tokens and keep the room."""
        self._length, self._means = 0, None


class LongContextCache(DynamicCache):
    """Cache for one run of any length; a drop-in for transformers' `DynamicCache`.

    Parameters
    ----------
    capacity : int
        Tokens (prompt and new ones) to make room for when a layer first sees keys. With 0 the room grows by half
        whenever it is full.

    Attributes
    ----------
    prompt_length : int
        Length of the prompt whose attention temperature holds until it is passed; 0 if none was announced.
    sparse_state : SparseState
        Budgets and record of sparse prefill.
    """

    def __init__(self, capacity: int = 0) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity must be a whole number of tokens, got {capacity!r}")
        if capacity < 0:
            raise ValueError(f"capacity must not be negative, got {capacity}")
        Cache.__init__(self, layer_class_to_replicate=partial(LongContextLayer, capacity))
        self.capacity = capacity
        self._forget()

    def _forget(self) -> None:
        self.prompt_length = 0
        self.sparse_state = SparseState()
        self.prefill_tokens = 0
        self.prefill_seconds = 0.0
        self.peak_memory_bytes = 0

    def reset(self) -> None:
        """Forget the sequence and keep the room."""
        super().reset()
        self._forget()

    def append(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to one layer in the layout of its buffers: spares decode the transpositions of `update`."""
        while len(self.layers) <= layer:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[layer].append(k, v)

    def report(self) -> dict[str, Any]:
        """What the prefill cost and what it kept.

        Tokens, seconds, tokens per second, peak memory in bytes (0 without CUDA), the density of sparse prefill (1 if
        it was dense) and, for every layer that was sparse, its density, mean recall and the recall of its worst head.
        """
        seconds = self.prefill_seconds
        return {
            "density": self.sparse_state.density(),
            "layers": self.sparse_state.by_layer(),
            "tokens": self.prefill_tokens,
            "prefill_seconds": seconds,
            "tokens_per_second": self.prefill_tokens / seconds if seconds else 0.0,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def mean_keys(k: torch.Tensor, size: int) -> torch.Tensor:
    """Means of every `size` keys of (batch, keys, kv_heads, head_dim): (batch, keys // size, kv_heads, head_dim)."""
    return k[:, : k.shape[1] // size * size].unflatten(1, (-1, size)).mean(dim=2)


def _empty(states: torch.Tensor, room: int) -> torch.Tensor:
    batch, heads, _, head_dim = states.shape
    return states.new_empty(batch, room, heads, head_dim)
