"""Plans: what a run will take on cards of a given size, and what to change where it does not fit.

>>> from qwen_longctx import memory
>>> print(memory.plan("qwen2.5-7b-1m", "1M", "24GB"))  # doctest: +SKIP
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from qwen_longctx import patches
from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import AUTO_KV_CACHES, LongContextConfig
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.prefill.memory import GIB, Memory, changes, most, on_fullest_card
from qwen_longctx.prefill.weights import Weights, weights_of, without_weights
from qwen_longctx.shapes import known_config
from qwen_longctx.sizes import parse_bytes, parse_tokens

__all__ = ["SPARE", "Plan", "Suggestion", "plan"]

SPARE = 10**9  # bytes of a card that are left to CUDA's context and to what its allocator cannot use
_MOST_CARDS = 1 << 12
_MOST_ROWS = 1 << 20
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Suggestion:
    """One change with which a run fits.

    Attributes
    ----------
    line : str
        What to write: a call of `patch_qwen`, or options of ``qwen-longctx plan``.
    meaning : str
        The same in words.
    total : int
        Bytes on the fullest card then.
    """

    line: str
    meaning: str
    total: int


@dataclass(frozen=True)
class Plan:
    """What a run takes on its fullest card. As text, the table that ``qwen-longctx plan`` prints.

    Attributes
    ----------
    tokens, batch : int
        Tokens of a row, prompt and new ones together, and rows.
    dtype : str
        Of the cache, the activations and the weights that are not quantised.
    settings : dict
        Settings of the patch that were given; "auto" as the kind of the cache is the kind that was taken.
    gpu : int or None
        Bytes of one card; None if none was given.
    gpus : int
        Cards among which the layers are dealt out, in order and as evenly as they go.
    memory : Memory
        Bytes of weights, KV cache, activations and selection on the card that holds most, and of the host's memory.
    suggestions : tuple of Suggestion
        Where the run does not fit: changes with which it does, the mildest first.
    """

    tokens: int
    batch: int
    dtype: str
    settings: dict[str, Any]
    gpu: int | None
    gpus: int
    memory: Memory
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether everything and `SPARE` bytes fit on every card; None if no card was given."""
        return None if self.gpu is None else _fits(self.memory, self.gpu)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        data = asdict(self)
        data["memory"]["total"] = self.memory.total
        return {**data, "spare": SPARE, "fits": self.fits}

    def __str__(self) -> str:
        rows = [
            ("weights", self.memory.weights),
            ("KV of two layers" if self.memory.host else "KV cache", self.memory.kv_cache),
            ("activations", self.memory.activations),
            ("selection scratch", self.memory.selection),
            ("total", self.memory.total),
        ]
        title = f"{self.batch} x {self.tokens:,} tokens, {self.dtype}"
        kind = self.settings.get("kv_cache", "device")
        title += f", keys and values {'on the' if kind == 'host' else 'in'} {kind}" if kind != "device" else ""
        title += f", on the fullest of {self.gpus} cards" if self.gpus > 1 else ""
        lines = [title, *(f"  {name:<18}{size / GIB:>10,.2f} GiB" for name, size in rows)]
        if self.memory.host:
            lines.append(f"  {'on the host':<18}{self.memory.host / GIB:>10,.2f} GiB, keys and values of all layers")
        if self.gpu is not None:
            lines.append(f"  {'card':<18}{self.gpu / GIB:>10,.2f} GiB, of which {SPARE / GIB:.2f} are left to CUDA")
            lines.append(self._verdict())
        return "\n".join([*lines, *(f"  {one.line}  # {one.meaning}, {_gib(one.total)}" for one in self.suggestions)])

    def _verdict(self) -> str:
        assert self.gpu is not None
        if self.fits:
            return f"It fits, {_gib(self.gpu - SPARE - self.memory.total)} to spare."
        short = f"It does not fit, {_gib(self.memory.total + SPARE - self.gpu)} too much."
        return f"{short} {'It would with:' if self.suggestions else 'No single change makes it fit.'}"


def plan(
    model: Any,
    tokens: int | str,
    gpu: int | str | None = None,
    *,
    gpus: int = 1,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> Plan:
    """What a run takes, whether it fits, and what to change where it does not. Nothing is loaded or run.

    The figures are those of a device where a fast kernel takes block lists, as sparse prefill needs (see
    ``qwen-longctx doctor``).

    Parameters
    ----------
    model : str or transformers.PretrainedConfig
        Name of a well-known shape, such as ``"qwen2.5-7b-1m"`` (`shapes.SHAPES`), or the config of a checkpoint, such
        as ``AutoConfig.from_pretrained(…)`` or ``model.config``. Weights count by their bits if the config says that
        they are quantised, and all experts are held.
    tokens : int or str
        Tokens of a row, prompt and new ones together: 1000000, "1M" or "512K" (thousands).
    gpu : int or str, optional
        Memory of one card: bytes, "24GB" or "80GiB". Without it there is no verdict.
    gpus : int
        Cards among which the layers are dealt out, as ``device_map="auto"`` does.
    batch : int
        Rows, beams included.
    dtype : torch.dtype
        torch.bfloat16, torch.float16 or torch.float32: of cache, activations and weights.
    **settings
        Fields of `LongContextConfig`, as for `patch_qwen`.

    Returns
    -------
    Plan

    Raises
    ------
    TypeError, ValueError
        An argument or a setting has the wrong type or is out of range, or the config describes no model.
    NotImplementedError
        The model is of another family, or quantised in a way whose bytes are not known.
    """
    tokens = parse_tokens(tokens)
    size = None if gpu is None else parse_bytes(gpu)
    batch = _count("batch", batch, _MOST_ROWS)
    gpus = _count("gpus", gpus, _MOST_CARDS)
    if dtype not in _DTYPES:
        raise InvalidValue(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype!r:.60}")
    planner = _Planner.of(model, size, dtype)
    run = _Run(tokens, batch, gpus, settings)
    memory = planner.memory(run)
    suggestions = () if size is None or _fits(memory, size) else tuple(planner.suggestions(run))
    if settings.get("kv_cache") == "auto":
        settings = {**settings, "kv_cache": planner.settings(run).kv_cache}
    return Plan(tokens, batch, str(dtype).removeprefix("torch."), settings, size, gpus, memory, suggestions)


def _count(name: str, value: Any, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidType(f"{name} must be a whole number, got {value!r:.40}")
    if not 1 <= (count := int(value)) <= largest:
        raise InvalidValue(f"{name} must be from 1 to {largest:,}, got {value}")
    return count


@dataclass(frozen=True)
class _Run:
    tokens: int
    batch: int
    gpus: int
    settings: dict[str, Any]

    def but(self, **changed: Any) -> _Run:
        """The same run with other settings."""
        return replace(self, settings={**self.settings, **changed})


@dataclass(frozen=True)
class _Planner:
    """What is the same for all runs that are tried."""

    config: Any
    shape: Shape
    weights: dict[str, Weights]  # by what linear layers compute in
    model: Any
    gpu: int | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, gpu: int | None, dtype: torch.dtype) -> _Planner:
        config = known_config(model) if isinstance(model, str) else model
        known = [family.module for family in patches.FAMILIES]
        kind = getattr(config, "model_type", None)
        if kind is None:
            raise InvalidType(f"model must be the name of a shape or the config of a checkpoint, got {model!r:.60}")
        if kind not in known:
            raise Unsupported(f"the config is of a model of type {kind!r}: give one of those known, {', '.join(known)}")
        shape = Shape.of(config)
        return cls(config, shape, {}, without_weights(config), gpu, dtype)

    def settings(self, run: _Run) -> LongContextConfig:
        """Those of a run; "auto" as the kind of its cache is the first that fits, and the last where none does."""
        settings = LongContextConfig.from_model_config(self.config, **run.settings)
        if settings.kv_cache != "auto":
            return settings
        fitting = (kind for kind in AUTO_KV_CACHES if self.gpu is None or self.fits(run.but(kv_cache=kind)))
        return replace(settings, kv_cache=next(fitting, AUTO_KV_CACHES[-1]))

    def memory(self, run: _Run) -> Memory:
        settings = self.settings(run)
        weights = self.weights.get(settings.linear)
        if weights is None:
            weights = weights_of(self.config, self.dtype, settings.linear, self.model)
            self.weights[settings.linear] = weights
        return on_fullest_card(self.shape, weights, run.gpus, run.tokens, run.batch, self.dtype, settings)

    def fits(self, run: _Run) -> bool:
        assert self.gpu is not None
        return _fits(self.memory(run), self.gpu)

    def suggestions(self, run: _Run) -> Iterator[Suggestion]:
        """Changes with which a run fits, from those that cost only time to those that change what is asked for."""
        settings, linear = self.settings(run), self.dtype == torch.bfloat16
        tried = (
            (meaning, run.but(**changed))
            for meaning, changed in changes(
                settings,
                run.tokens,
                selection=bool(self.memory(run).selection),
                kinds=True,
                linear=linear and settings.linear == "auto",
            )
        )
        for meaning, changed in islice((one for one in tried if self.fits(one[1])), 1):
            values = ", ".join(f"{name}={value!r}" for name, value in changed.settings.items())
            yield Suggestion(f"patch_qwen(model, {values})", meaning, self.memory(changed).total)
        rows = most(lambda n: self.fits(replace(run, batch=n)), 0, run.batch - 1)
        if rows:
            fewer = replace(run, batch=rows)
            yield Suggestion(f"--batch {rows}", "the most rows that fit", self.memory(fewer).total)
        tokens = most(lambda n: self.fits(replace(run, tokens=n)), 0, run.tokens - 1)
        if tokens:
            shorter = replace(run, tokens=tokens)
            yield Suggestion(f"--tokens {tokens}", "the most tokens that fit", self.memory(shorter).total)
        yield from self._more_cards(run)

    def _more_cards(self, run: _Run) -> Iterator[Suggestion]:
        """The fewest cards that hold the run; more of them than layers change nothing."""
        cards = self.shape.layers
        for count in range(run.gpus + 1, min(cards, _MOST_CARDS) + 1):
            spread = replace(run, gpus=count)
            if self.fits(spread):
                yield Suggestion(f"--gpus {count}", 'cards, with device_map="auto"', self.memory(spread).total)
                return


def _fits(memory: Memory, gpu: int) -> bool:
    return memory.total + SPARE <= gpu


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
