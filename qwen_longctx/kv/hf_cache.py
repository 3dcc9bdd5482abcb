"""A transformers cache that never copies itself, and the guard on caches of others."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qwen_longctx import settings_of
from qwen_longctx.config import KV_CACHES
from qwen_longctx.errors import InvalidType, InvalidValue, PatchConflict, Unsupported
from qwen_longctx.geometry.rotary import RotaryTables
from qwen_longctx.kv import saved
from qwen_longctx.kv.eight_bit import EightBitStore, Turning
from qwen_longctx.kv.host import HostStore, Staging, is_apart
from qwen_longctx.kv.sequence import Sequence, follow_rows, forget
from qwen_longctx.kv.store import Store, Tensors
from qwen_longctx.ops import eight_bit

_MOST = 1 << 40  # tokens: no machine holds more, and sizes in bytes stay within 64 bits
_OURS = "dual_chunk"  # in what an update is given beside keys and values: the patched attention calls


class LongContextLayer(DynamicLayer):
    """One layer of a `LongContextCache`: a `Store` as transformers wants to see it.

    `keys` and `values` are views of shape (batch, kv_heads, tokens, head_dim).

    Parameters
    ----------
    capacity : int
        Tokens to make room for at once; 0 if unknown.
    kind : {"device", "fp8", "int8", "host"}
        As of `LongContextCache`.
    staging : Staging, optional
        For layers on the host: what the layers of the cache share.
    """

    def __init__(self, capacity: int = 0, kind: str = "device", staging: Staging | None = None) -> None:
        self.store = EightBitStore(kind, capacity) if kind in eight_bit.KINDS else Store(capacity)
        self._staging = (staging or Staging()) if kind == "host" else None
        super().__init__()

    def _place(self, device: torch.device) -> None:
        """An empty layer that is to be on the host gets the store for tokens of a device: on the CPU, any other one."""
        if self._staging is None or self.store.length:
            return
        apart = is_apart(device)
        if apart != isinstance(self.store, HostStore):
            self.store = HostStore(self._staging, self.store.capacity) if apart else Store(self.store.capacity)

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
        held = self.store.whole()
        return None if held is None else held[which].transpose(1, 2)

    def _adopt(self, which: int, value: torch.Tensor | None) -> None:
        """Take what transformers assigns, offloaded tensors for example, as a full buffer."""
        self.store.adopt(which, None if value is None else value.transpose(1, 2))

    def lazy_initialization(self, key_states: torch.Tensor, *args: Any) -> None:
        """Take the room: `key_states` of shape (batch, kv_heads, tokens, head_dim) gives batch, dtype and device."""
        self._refuse_eight_bit()
        self._place(key_states.device)
        values = args[0] if args else key_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store.allocate(key_states.transpose(1, 2), values.transpose(1, 2))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; both of shape (batch, kv_heads, tokens, head_dim). Returns views of all tokens so far."""
        self._refuse_eight_bit()
        self.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        keys, values = self.store.segment(0, self.store.length)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _refuse_eight_bit(self) -> None:
        """An unpatched attention does not say what bias is in its keys."""
        if isinstance(self.store, EightBitStore):
            raise Unsupported(
                f'a cache of kind "{self.store.kind}" is filled by patched models only: call patch_qwen(model), or '
                'make the cache with kv_cache="device"'
            )

    def append(
        self, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, turning: Turning | None = None
    ) -> Store:
        """`update` in the layout of the store, shape (batch, tokens, kv_heads, head_dim).

        `bias` and `turning` are for stores in 8 bits, see `EightBitStore.append`.
        """
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
        self._place(k.device)
        if isinstance(self.store, EightBitStore):
            self.store.append(k, v, bias, turning)
        else:
            self.store.append(k, v)
        return self.store

    def get_seq_length(self, *args: Any) -> int:
        """Tokens held."""
        return self.store.length

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; nothing is copied."""
        self.store.truncate(tokens)

    def crop(self, tokens: int) -> None:
        """Keep `tokens` tokens, or drop ``-tokens`` if negative, as transformers of different ages ask for.

        0 drops nothing, as in assisted decoding when every candidate is taken. Nothing is copied.
        """
        self.store.truncate(tokens if tokens > 0 else self.store.length + tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows `beam_idx`, as beam search does each step."""
        self.store.select_rows(beam_idx)
        follow_rows(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.store.buffers is not None:
            rows = torch.arange(self.store.buffers[0].shape[0])
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows `indices`, integers of shape (rows,)."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget all tokens and keep the room."""
        self.store.truncate(0)


class LongContextCache(DynamicCache):
    """Cache for one run of any length; a drop-in for transformers' `DynamicCache`.

    A call of a patched model that fails or is interrupted leaves the cache as it was before the call.

    Parameters
    ----------
    capacity : int
        Tokens (prompt and new ones) to make room for when a layer first sees keys. Full buffers grow by half, and by
        at most 16,384 tokens.
    observer : sparsity.observer.Observer, optional
        Is told of the stages and spans of a prefill, for measurements.
    kv_cache : {"device", "auto", "fp8", "int8", "host"}
        How keys and values are held: as they are, in 8 bits, or in the memory of the host, from where they come up to
        the device a layer at a time; `keys` and `values` of layers are then on the host. "auto" is decided by the first
        call of a patched model that fills the cache, see ``docs/memory.md``, and is "device" where nothing is known of
        the memory.

    Attributes
    ----------
    kv_cache : str
        As above; "auto" only until the kind is decided.
    qwen_longctx : Sequence
        What is known of the sequence beside its keys and values.

    Raises
    ------
    TypeError, ValueError
        `capacity` is no whole number, negative, or more than any machine holds; or there is no such `kv_cache`.
    """

    def __init__(self, capacity: int = 0, observer: Any = None, kv_cache: str = "device") -> None:
        _check_capacity(capacity)
        if not isinstance(kv_cache, str) or kv_cache not in ("auto", *KV_CACHES):
            raise InvalidValue(f"kv_cache must be one of auto, {', '.join(KV_CACHES)}, got {kv_cache!r}")
        self._staging = Staging()
        Cache.__init__(self, layer_class_to_replicate=partial(LongContextLayer, capacity, kv_cache, self._staging))
        self.kv_cache = kv_cache
        self.capacity = capacity
        self.qwen_longctx = Sequence()
        self.observer = observer

    def settle(self, kind: str) -> None:
        """Decide the kind of a cache of kind "auto"; of others nothing changes."""
        if self.kv_cache == "auto":
            self.layer_class_to_replicate = partial(LongContextLayer, self.capacity, kind, self._staging)
            self.kv_cache = kind

    @property
    def sparse_state(self) -> Any:
        """Budgets and records of sparse prefill."""
        return self.qwen_longctx.sparse

    def reset(self) -> None:
        """Forget the sequence and keep the room."""
        super().reset()
        self.qwen_longctx = Sequence()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]  # noqa: E501
        """Append to one layer, as the attention of an unpatched model does.

        Raises
        ------
        PatchConflict
            The cache holds keys of a patched model.
        """
        self.settle("device")
        if layer_idx == 0 and self.get_seq_length() == 0:
            forget(self)
        _refuse_stock(min(self.qwen_longctx.length, self.get_seq_length()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        bias: torch.Tensor | None = None,
        turning: Turning | None = None,
    ) -> Store:
        """Append to one layer in the layout of its store, as the patched attention does; see `EightBitStore.append`."""
        self.settle("device")
        while len(self.layers) <= layer:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[layer].append(k, v, bias, turning)

    def report(self) -> dict[str, Any]:
        """What the prefill cost and what it kept.

        Tokens, seconds, tokens per second and peak memory in bytes (0 without CUDA) of the prefills of this cache, the
        density of sparse prefill (1 if it was dense) and, for every layer that was sparse, its density, mean recall,
        the recall of its worst head, and the share of spans and heads on which recall was measured. All of it counts
        what was done: every turn since the cache was empty, also tokens that were cropped since, but neither tokens
        that were generated nor drafts.
        """
        state = self.qwen_longctx
        seconds = state.prefill_seconds
        return {
            "density": state.sparse.density(),
            "layers": state.sparse.by_layer(),
            "tokens": state.prefill_tokens,
            "prefill_seconds": seconds,
            "tokens_per_second": state.prefill_tokens / seconds if seconds else 0.0,
            "peak_memory_bytes": state.peak_memory_bytes,
        }

    def save(self, folder: str | Path) -> None:
        """Save the sequence as a prefix, for `load`: keys, values, and what is known beside them.

        Parameters
        ----------
        folder : str or path
            A new or empty folder, or one that holds a saved prefix, which stays whole until the new one takes its
            place. On any error, and if the process is killed, it stays as it was.

        Raises
        ------
        TypeError, ValueError
            The cache is empty, the folder is a file, holds something else, cannot be written to or has no room.
        PatchConflict
            A call is filling the cache or was interrupted, a patched model did not write all of it, several models or
            settings did, or the model is gone: its fingerprint is saved along.
        NotImplementedError
            The model is tensor parallel, layers are of another kind, or keys of a dtype that floats do not have.
        """
        if not all(isinstance(layer, LongContextLayer) for layer in self.layers):
            raise Unsupported("only layers of LongContextCache can be saved: fill a new LongContextCache")
        saved.write(self, folder)

    @classmethod
    def load(cls, folder: str | Path, model: Any, capacity: int = 0) -> LongContextCache:
        """A new cache that holds the prefix saved in a folder, of the kind (`kv_cache`) that was saved.

        Keys and values, or their 8 bits, are copied once, from the mapped file to where they are held, and checked on
        the way. Keys and values as they are lie on the host if the setting `kv_cache` of the model says "host", and
        else on the devices, wherever they were saved from.

        Parameters
        ----------
        folder : str or path
        model : transformers.PreTrainedModel
            The model that the prefix was saved by, patched with the same settings.
        capacity : int
            Tokens to make room for at once, prefix included; 16,384 more than the prefix at least.

        Raises
        ------
        FileNotFoundError
            There is no saved prefix.
        PatchConflict
            The model is not patched, or is not the one that the prefix was saved by, or its settings are others; the
            message says what differs.
        TypeError, ValueError
            A wrong argument, or the file is damaged.
        DoesNotFit
            A device, or the host, has no room for it.
        """
        _check_capacity(capacity)
        settings = settings_of(model)
        if settings is None:
            raise PatchConflict("the model is not patched, and saved prefixes are: call patch_qwen(model) first")
        with torch.inference_mode(False), torch.no_grad():  # else the cache could not be written to later
            return saved.read(cls, folder, model, settings, capacity)


def _check_capacity(capacity: Any) -> None:
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise InvalidType(f"capacity must be a whole number of tokens, got {capacity!r}")
    if not 0 <= capacity <= _MOST:
        raise InvalidValue(f"capacity must not be negative and at most {_MOST}, got {capacity}: leave it out")


def _guarded_update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The update of a layer that a patched model has filled: refuses the attention of an unpatched one.

    A layer that was emptied since then is no longer guarded, and an unpatched model may fill it.
    """
    guarded = self.guarded
    if not any(isinstance(extra, dict) and extra.get(_OURS) for extra in (*args, kwargs.get("cache_kwargs"))):
        _refuse_stock(self.get_seq_length())
        self.__class__ = guarded
        vars(self).pop("origins", None)
    return guarded.update(self, key_states, value_states, *args, **kwargs)


def _guarded_reorder(self: Any, beam_idx: torch.Tensor) -> None:
    self.guarded.reorder_cache(self, beam_idx)
    follow_rows(self, beam_idx)


def _guarded_repeat(self: Any, repeats: int) -> None:
    self.guarded.batch_repeat_interleave(self, repeats)
    follow_rows(self, torch.arange(len(getattr(self, "origins", ()))).repeat_interleave(repeats))


def _guarded_select(self: Any, indices: torch.Tensor) -> None:
    self.guarded.batch_select_indices(self, indices)
    follow_rows(self, indices)


def _guarded_reduce(self: Any) -> tuple[Any, ...]:
    return _new_guarded, (self.guarded,), dict(vars(self))


def _new_guarded(kind: Any) -> Any:
    """An empty guarded layer, for copies and pickles: they know the class that is guarded, and not the guard's."""
    return object.__new__(_guard_of(kind))


_GUARD = {
    "update": _guarded_update,
    "reorder_cache": _guarded_reorder,
    "batch_repeat_interleave": _guarded_repeat,
    "batch_select_indices": _guarded_select,
    "__reduce__": _guarded_reduce,
}


@lru_cache
def _guard_of(kind: Any) -> type:
    """The class of layers of a kind that a patched model has filled."""
    members = {name: value for name, value in _GUARD.items() if hasattr(kind, name)}
    return type(f"Guarded{kind.__name__}", (kind,), {**members, "guarded": kind, "__module__": __name__})


def guard(cache: Any) -> None:
    """Let the layers of a cache that a patched model has filled refuse the attention of an unpatched one."""
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, LongContextLayer) and not hasattr(layer, "guarded"):
            kind: Any = type(layer)
            layer.__class__ = _guard_of(kind)


def append(
    cache: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    cache_position: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    turning: Turning | None = None,
) -> Store | Tensors:
    """Append to one layer of any cache: `k`, `v` of shape (batch, tokens, kv_heads, head_dim), keys rotated.

    `bias` is in all keys, and `turning` says how it was rotated.
    """
    if torch.compiler.is_compiling():
        return _append_outside_of_graphs(cache, k, v, layer, cache_position, bias, turning)
    return _append(cache, k, v, layer, cache_position, bias, turning)


def write(
    cache: LongContextCache, k: torch.Tensor, v: torch.Tensor, layer: int, slot: torch.Tensor, tables: RotaryTables
) -> Store:
    """Rotate the key of a token of every row and put it into one layer where the device says, see `Store.write`."""
    store = cache.layers[layer].store
    store.write(k, v, slot, tables.keys, tables.spots)
    return store


# torch 2.6 loses buffers that a graph takes, and later ones get more graphs where they trace it
@torch.compiler.disable
def _append_outside_of_graphs(*arguments: Any) -> Store | Tensors:
    return _append(*arguments)


def _append(
    cache: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    cache_position: torch.Tensor | None,
    bias: torch.Tensor | None,
    turning: Turning | None,
) -> Store | Tensors:
    if isinstance(cache, LongContextCache):
        return cache.append(k, v, layer, bias, turning)
    extra: dict[str, Any] = {_OURS: True}
    if cache_position is not None:
        extra["cache_position"] = cache_position
    keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer, extra)
    return Tensors(keys.transpose(1, 2), values.transpose(1, 2))


def _refuse_stock(held: int) -> None:
    if held:
        raise PatchConflict(
            f"the cache holds {held} tokens of a model patched by qwen_longctx, and the model that continues it is not "
            "patched: patch it again with the same settings, or start with a new cache"
        )
