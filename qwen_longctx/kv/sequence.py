"""The state of one sequence beside its keys and values: what is committed, under which geometry, and what it cost.

It lives on the cache of the sequence, whatever kind of cache that is, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import nn

from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import PatchConflict
from qwen_longctx.geometry.layout import Origin
from qwen_longctx.sparsity.record import SparseState

_ATTRIBUTE = "qwen_longctx"


class ModelRef:
    """Refers to a model without keeping it; a pickled one refers to none.

    Parameters
    ----------
    model : torch.nn.Module, optional
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._ref = None if model is None else ref(model)

    def __call__(self) -> Any:
        """The model, or None if it is gone."""
        return None if self._ref is None else self._ref()

    def __deepcopy__(self, memo: Any) -> ModelRef:
        return self

    def __reduce__(self) -> Any:
        return ModelRef, ()


class Written(NamedTuple):
    """Who wrote the tokens of a sequence from number `start` on, up to the next entry.

    Attributes
    ----------
    start : int
    settings : LongContextConfig
    model : ModelRef
        To the base model.
    """

    start: int
    settings: LongContextConfig
    model: ModelRef


@dataclass
class Sequence:
    """What is known of a sequence beside its keys and values.

    Attributes
    ----------
    length : int
        Tokens that every layer holds since the last call that came to its end: the committed length.
    announced : int
        Length of the prompt that `generate` is about to pass, which may bring drafts along in its first call; 0 if
        nothing is announced.
    settings : LongContextConfig, optional
        Settings of the `generate` in progress, which reads them once.
    prompt_end : int, optional
        Tokens held when the prompt of the `generate` in progress has passed; None outside of one.
    followed : int, optional
        Tokens held after the last decoded token of the `generate` in progress, if every row ends with it: the mask of
        the next token is known then. Else 0; None outside of one, and in a loop of the caller's own.
    sparse : SparseState
        Budgets and records of sparse prefill.
    broken : str
        Why the cache cannot be continued; empty if it can.
    written : list of Written
        Who wrote which tokens, in order; what was cropped since may be among them.
    graphs : object, optional
        Captured decoding of the `generate` in progress, see ``patches.graphs``; None where nothing is captured.
    running : bool
        A call is under way that appends to the cache.
    pipeline : dict, optional
        How several devices shared the newest prefill, for the report; None on one device.
    prefill_tokens, prefill_seconds, peak_memory_bytes
        Cost of the prefills of the sequence, also of tokens that were cropped since.
    """

    length: int = 0
    announced: int = 0
    settings: Any = None
    prompt_end: int | None = None
    followed: int | None = None
    sparse: SparseState = field(default_factory=SparseState)
    broken: str = ""
    written: list[Written] = field(default_factory=list)
    graphs: Any = None
    running: bool = False
    pipeline: dict[str, Any] | None = None
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def geometry(self) -> tuple[int, int] | None:
        """Chunk size and local size under which the keys were rotated; None while the cache is empty."""
        last = self.written[-1].settings if self.written else None
        return None if last is None else (last.chunk_size, last.local_size)

    def note_writer(self, start: int, settings: LongContextConfig, model: nn.Module | None) -> None:
        """Note who wrote the tokens from number `start` on."""
        last = self.written[-1] if self.written else None
        if last is not None and start > last.start and last.model() is model and last.settings == settings:
            return
        self.written = [entry for entry in self.written if entry.start < start]
        self.written.append(Written(start, settings, ModelRef(model)))


def sequence_of(cache: Any) -> Sequence:
    """The state of the sequence in any cache; one is put there if there is none yet."""
    state = getattr(cache, _ATTRIBUTE, None)
    if state is None:
        state = Sequence()
        setattr(cache, _ATTRIBUTE, state)
    return state


def origins_of(cache: Any) -> tuple[Origin, ...]:
    """Where each row of a cache begins; empty if unknown.

    It is kept on the first layer, because rows are reordered, repeated and selected a layer at a time.
    """
    return getattr(next(iter(getattr(cache, "layers", ())), None), "origins", ())


def follow_rows(layer: Any, rows: torch.Tensor) -> None:
    """Note that a layer now holds rows number `rows` of those it held, integers of shape (rows,)."""
    origins = getattr(layer, "origins", ())
    if origins:
        alike = len(set(origins)) == 1  # nothing to look up then, and so no transfer from the device
        layer.origins = origins[:1] * len(rows) if alike else tuple(origins[row] for row in rows.tolist())


def held_tokens(cache: Any) -> int:
    """Tokens in any transformers cache, or 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def open_cache(cache: Any, geometry: tuple[int, int], layers: int) -> Sequence:
    """Make sure that a cache can be continued, and return the state of its sequence.

    Layers of unequal length are what an interrupted call left: they are rolled back to the committed length. A cache
    that was cropped is taken as it is.

    Parameters
    ----------
    cache : transformers Cache
    geometry : tuple of int
        Chunk size and local size of the run that is about to start.
    layers : int
        Of the model that is about to run.

    Raises
    ------
    PatchConflict
        The cache is of another geometry or of a model with other layers, holds keys that this patch did not rotate, or
        cannot be rolled back.
    """
    state = sequence_of(cache)
    lengths = _lengths(cache)
    held = lengths[0] if lengths else 0
    if any(length != held for length in lengths):
        roll_back(cache, min(state.length, *lengths))
        held = held_tokens(cache)
    if held == 0:
        forget(cache)
        return state
    if state.broken:
        raise PatchConflict(f"the cache cannot be continued: {state.broken}. Start again with a new cache")
    if len(lengths) != layers and hasattr(cache, "layers"):
        raise PatchConflict(
            f"the cache holds {len(lengths)} layers and the model has {layers}: it is the cache of another model. "
            "Start with a new cache"
        )
    if state.length and not origins_of(cache):  # emptied, and filled by an unpatched model
        state.length, state.written = 0, []
    state.length = min(state.length, held)
    stride = geometry[0] - geometry[1]
    if held > state.length and held > stride:
        raise PatchConflict(
            f"the cache holds {held} tokens, {held - state.length} of which this patch did not write: beyond the first "
            f"chunk of {stride} tokens their keys are rotated otherwise. Prefill the prompt again with a new cache"
        )
    if state.length and state.geometry is not None and state.geometry != geometry:
        raise PatchConflict(
            f"the cache was filled with chunk_size={state.geometry[0]}, local_size={state.geometry[1]}, this run has "
            f"chunk_size={geometry[0]}, local_size={geometry[1]}: patch with the same values, or start with a new cache"
        )
    return state


def forget(cache: Any) -> None:
    """Note that a cache is empty; what a generate in progress has put there stays."""
    state = sequence_of(cache)
    if state.length or state.written or state.broken:
        state.length, state.broken, state.written = 0, "", []
        state.sparse, state.pipeline = SparseState(), None
        state.prefill_tokens, state.prefill_seconds, state.peak_memory_bytes = 0, 0.0, 0
    for layer in getattr(cache, "layers", ())[:1]:
        vars(layer).pop("origins", None)


@contextmanager
def transaction(
    cache: Any, settings: LongContextConfig, origins: tuple[Origin, ...], model: nn.Module | None = None
) -> Iterator[None]:
    """Commit what the block appends to `cache`; roll everything back if it fails or is interrupted.

    Parameters
    ----------
    cache : transformers Cache
    settings : LongContextConfig
        Of the run.
    origins : tuple of Origin
        Where each row begins.
    model : torch.nn.Module, optional
        The base model that writes.
    """
    state, before = sequence_of(cache), held_tokens(cache)
    sparse = state.sparse.snapshot()
    state.running = True
    try:
        yield
    except BaseException:
        state.sparse.restore(sparse)
        roll_back(cache, before)
        raise
    finally:
        state.running = False
    state.length = held_tokens(cache)
    if state.length:
        state.announced = 0
        state.note_writer(before, settings, model)
        if getattr(cache, "layers", None):
            cache.layers[0].origins = origins


def roll_back(cache: Any, length: int) -> None:
    """Cut every layer of `cache` to `length` tokens; where that cannot be done, note that the cache is broken."""
    state = sequence_of(cache)
    for layer in getattr(cache, "layers", ()):
        if _length(layer) == length:
            continue
        if hasattr(layer, "truncate"):
            layer.truncate(length)
        elif _is_plain(layer) and getattr(layer, "keys", None) is not None:
            _roll_back_plain(layer, length)
        elif type(layer).__name__.endswith("StaticLayer"):
            _roll_back_static(layer, length)
        elif length == 0:
            layer.reset()
        if _length(layer) != length:
            state.broken = f"a call was interrupted, and {type(layer).__name__} cannot give its tokens back"
    state.length = min(state.length, length)


def _roll_back_plain(layer: Any, length: int) -> None:
    """Cut the tensors of a layer; an empty one is as new, and takes another batch."""
    for name in ("keys", "values"):
        held = getattr(layer, name)
        setattr(layer, name, held[..., :length, :] if length else held.new_empty(0))


def _roll_back_static(layer: Any, length: int) -> None:
    """Give back the tokens of a layer that writes in place and counts in a tensor, or by what is not 0."""
    if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
        layer.cumulative_length.fill_(length)
    else:
        layer.keys[..., length:, :] = 0
        layer.values[..., length:, :] = 0


def _is_plain(layer: Any) -> bool:
    """Whether a layer holds nothing but the tensors `keys` and `values`, also where it is guarded."""
    from transformers.cache_utils import DynamicLayer

    return getattr(layer, "guarded", type(layer)).update is DynamicLayer.update


def _lengths(cache: Any) -> list[int]:
    """Tokens of every layer that has been filled or could be."""
    layers = getattr(cache, "layers", None)
    return [held_tokens(cache)] if layers is None else [_length(layer) for layer in layers]


def _length(layer: Any) -> int:
    return int(layer.get_seq_length())
