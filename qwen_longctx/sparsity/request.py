"""Whether a forward is prefilled sparsely, and what is asked of it then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import torch

from qwen_longctx import ops
from qwen_longctx.checkpoint import Heads, head_dim
from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.positions import Span
from qwen_longctx.geometry.tiles import Tiles, pairs_of
from qwen_longctx.sparsity import budgets
from qwen_longctx.sparsity.observer import NOBODY, Observer
from qwen_longctx.sparsity.record import DenseRecord, SpanRecord, SparseState
from qwen_longctx.sparsity.rules import RULES
from qwen_longctx.sparsity.rules.rule import Rule
from qwen_longctx.sparsity.steering import steer
from qwen_longctx.sparsity.view import Prompt

logger = logging.getLogger(__name__)

_DENSE_TILES = 2
# Tokens up to which measuring the recall of all heads takes less than a hundredth of the prefill, and the number of
# spans beyond them that measure each head once
_MEASURED_WHOLE, _TURNS = 1 << 18, 4
# Operations of dense attention in a layer for one span, from which on choosing keys takes less time than it saves. On
# an H100 choosing costs the host some 6 ms a span and layer: too much for a 0.5B at 65,536 tokens (2.9e12), and worth
# it for the same at 131,072 (5.8e12) and for a 7B at 32,768 (7.7e12)
_WORTH_IT = 4e12


@dataclass(frozen=True)
class Request:
    """What is asked of the sparse prefill of one forward.

    Parameters
    ----------
    name : str
        Of the rule.
    rule : Rule
    settings : LongContextConfig
    prompt : Prompt
        What the rule may know of the prompt.
    state : SparseState
        Of the sequence.
    observer : Observer
        Is told what the forward does.
    ahead : bool
        The host is ahead of the devices, and is not to wait for them.
    """

    name: str
    rule: Rule
    settings: LongContextConfig
    prompt: Prompt
    state: SparseState
    observer: Observer = NOBODY
    ahead: bool = False
    _tiles: dict[tuple[Span, torch.device], Tiles] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def dense_end(self) -> int:
        """Tokens at the end of a prompt, where the question stands, that attend to everything."""
        return _DENSE_TILES * self.settings.tile

    def takes(self, span: Span, dense_from: int) -> bool:
        """Whether a span is prefilled sparsely: a tile or more, not the prompt's end, with keys from position 0 on."""
        long = span.stop - span.start >= self.settings.tile
        return long and span.start < dense_from and span.segments[-1].key_start == 0

    def tiles(self, span: Span, device: torch.device) -> Tiles:
        """The tiles of a span, worked out once for all layers of a device."""
        key = span, device
        if key not in self._tiles:
            self._tiles[key] = Tiles.of(span, self.settings.tile, device)
        return self._tiles[key]

    @property
    def recall_target(self) -> float | None:
        """Recall to steer towards; None where budgets are fixed."""
        own = None if self.prompt.options.fixed else self.rule.recall_target
        return self.settings.recall_target or own

    def budget(self, layer: int) -> torch.Tensor | None:
        """Budgets of a layer's heads for the next span, shape (heads,), float32; None where there are none yet."""
        # budgets that an earlier prompt steered do not hold where nothing is steered
        return None if self.recall_target is None else self.state.budgets.get((self.name, layer))

    def measured(self, layer: int, stop: int, kv_heads: int) -> slice:
        """KV heads whose queries a span that ends at `stop` measures recall for: all, or on long prompts some in turn.

        Measuring reads all keys before the span. Any `_TURNS` spans of a layer in a row that begin with a multiple of
        it measure every head, and so do the spans of one row where rows of a batch take turns.
        """
        turns = min(_TURNS, kv_heads)
        count = self.state.turns.get(layer, 0)
        if stop <= _MEASURED_WHOLE or count == 0 or turns == 1:
            return slice(0, kv_heads)
        turn = (count + count // turns + layer) % turns
        return slice(kv_heads * turn // turns, kv_heads * (turn + 1) // turns)

    def observe(self, record: SpanRecord, budget: torch.Tensor) -> None:
        """Note what a span kept and recalled, and steer the layer's budgets by it."""
        self.state.records.append(record)
        self.state.turns[record.layer] = self.state.turns.get(record.layer, 0) + 1
        if self.recall_target is not None:
            budget = steer(budget, record.recall, self.recall_target, self.rule)
        self.state.budgets[self.name, record.layer] = budget

    def observe_dense(self, layer: int, span: Span, lists: int) -> None:
        """Note a span that was prefilled densely, of so many rows times heads."""
        pairs = pairs_of(span, self.settings.tile) * lists
        self.state.dense.append(DenseRecord(layer, span.start, span.stop, pairs))


def plan_request(
    settings: LongContextConfig,
    model_config: Any,
    *,
    heads: Callable[[], Heads],
    device: torch.device,
    dtype: torch.dtype,
    state: SparseState,
    length: int,
    observer: Observer | None = None,
) -> Request | None:
    """The sparse prefill of one forward; None where it is dense. Says once that sparse prefill is on.

    Parameters
    ----------
    settings : LongContextConfig
    model_config : transformers.PretrainedConfig
    heads : callable
        ``heads()``: those of this process; asked only where the answer matters.
    device, dtype
        Of the queries.
    state : SparseState
        Of the sequence.
    length : int
        Length of the whole prompt in tokens, what is cached included.
    observer : Observer, optional

    Raises
    ------
    ValueError
        The kernel asked for does not run here, or the budgets of vertical-slash do not fit the model.
    FileNotFoundError
        There are no such budgets.
    """
    heads = cache(heads)
    name = rule_for(settings, model_config, heads=heads, device=device, dtype=dtype, length=length)
    if name is None:
        return None
    request = make_request(name, settings, model_config, heads(), state, length, observer)
    _warn_once(
        f"Sparse prefill ({name}) is on for prompts of more than {settings.sparse_attention_threshold} tokens: "
        'attention is approximate there, and cache.report() tells how much of it was kept. sparse="off" is exact.'
    )
    return request


def rule_for(
    settings: LongContextConfig,
    model_config: Any,
    *,
    heads: Callable[[], Heads],
    device: torch.device,
    dtype: torch.dtype,
    length: int,
) -> str | None:
    """The rule by which a prompt of `length` tokens is prefilled; None is dense.

    "auto" is dense, too, where attention is so little work that choosing keys would take longer. Arguments and errors
    as in `plan_request`.
    """
    if settings.sparse == "off" or length <= settings.sparse_attention_threshold:
        return None
    width = head_dim(model_config)
    name = rule_name(settings, device, dtype, width)
    if name is not None and settings.sparse == "auto" and not pays(settings, length, heads().query * width):
        return None
    return name


def rule_name(settings: LongContextConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The rule that `settings` ask for on queries of this kind; None is dense.

    "auto" is block scores where a fast kernel takes block lists, else dense: it gives way, and never fails.

    Raises
    ------
    ValueError
        A rule is asked for, and the kernel that is asked for too does not run here.
    """
    if settings.sparse == "off":
        return None
    kind = device, dtype, head_dim, settings.tile
    if settings.sparse != "auto":
        ops.list_kernel(settings.kernel, *kind)
        return settings.sparse
    if settings.kernel == "sdpa" or not settings.tile_fits:
        return None
    try:
        kernel = ops.list_kernel(settings.kernel, *kind)
    except ValueError:
        return None
    return None if kernel == "reference" else "block_scores"


def pays(settings: LongContextConfig, length: int, width: int) -> bool:
    """Whether choosing keys saves time on a prompt of `length` tokens; queries have `width` numbers in all heads."""
    span = min(length, settings.stride, settings.prefill_chunk_size)
    return 2 * length * span * width >= _WORTH_IT


def check_budgets(settings: LongContextConfig, model_config: Any) -> None:
    """Find out before a model is loaded whether the rule that `settings` name has the budgets that it needs.

    Raises
    ------
    FileNotFoundError, ValueError
        It has not, see `budgets.of_checkpoint`.
    """
    if settings.sparse in RULES and RULES[settings.sparse].needs_budgets:
        budgets.of_checkpoint(model_config, settings.sparse_attention_config)


def make_request(
    name: str,
    settings: LongContextConfig,
    model_config: Any,
    heads: Heads,
    state: SparseState,
    length: int,
    observer: Observer | None = None,
) -> Request:
    """The request of the rule called `name`. Arguments and errors as in `plan_request`."""
    rule = RULES[name]
    head_budgets = _head_budgets(settings, model_config, heads, state) if rule.needs_budgets else None
    times = length / settings.original_max_position_embeddings
    prompt = Prompt(settings.options(name), times, settings.last_q, head_budgets)
    request = Request(name, rule, settings, prompt, state, observer or NOBODY)
    return request if request.recall_target is not None else replace(request, prompt=prompt._replace(steered=False))


def _head_budgets(
    settings: LongContextConfig, model_config: Any, heads: Heads, state: SparseState
) -> budgets.HeadBudgets:
    """The checkpoint's budgets of this process's heads, read once a sequence."""
    asked = settings.sparse_attention_config, heads
    if state.head_budgets is None or state.budgets_asked != asked:
        every = budgets.of_checkpoint(model_config, settings.sparse_attention_config)
        state.head_budgets, state.budgets_asked = every.part(heads.first, heads.query), asked
    return state.head_budgets


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)
