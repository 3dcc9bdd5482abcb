"""Sparse prefill of long prompts: the library's own attention, on keys and values gathered from their pages.

An engine reads a prompt in parts, one a step, and tells a backend neither how long the prompt is nor whether this is
its last part. Nothing is kept between steps but the pages. So each part is treated as a call of its own on what is
cached (`geometry.layout.Call`): what counts is the length so far, the end of every part attends to everything as the
end of a prompt does, and budgets are not steered. These ends are a few hundred queries over all keys, and every part
has one: the engine's own kernel attends from them, which divides keys over the device, together with the other requests
of the step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from qwen_longctx.attention.ahead import Shapes, compile_ahead
from qwen_longctx.checkpoint import Heads, Shape
from qwen_longctx.geometry.layout import Call, Layout, RotarySource, make_layout
from qwen_longctx.geometry.positions import Span, spans
from qwen_longctx.prefill.memory import kv_bytes
from qwen_longctx.prefill.peak import Prefill
from qwen_longctx.sparsity import Request, SparseState, make_request, rule_for, rule_name
from qwen_longctx.vllm.settings import DualChunk

# vLLM has a handler for loggers below its own name only
logger = logging.getLogger("vllm.qwen_longctx")

_PAUSE, _OVERDUE = 10, 60  # seconds


class Part(NamedTuple):
    """A part of a prompt that is prefilled sparsely in this step, but for its end.

    Attributes
    ----------
    number : int
        Of the request in the step.
    rows : slice
        Rows of its queries without the end.
    layout : Layout
        Of these as a forward of one row; ``layout.length`` of the keys in the pages of the request come into it.
    end : tuple of Span
        The last tokens, which attend to everything.
    """

    number: int
    rows: slice
    layout: Layout
    end: tuple[Span, ...]


class Plan(NamedTuple):
    """A step in two: the parts that are prefilled sparsely, and all queries that attend to everything.

    Attributes
    ----------
    parts : tuple of Part
    queries : tuple of int
        How many of the last queries of every request attend to everything.
    longest : int
        The most tokens of a request.
    """

    parts: tuple[Part, ...]
    queries: tuple[int, ...]
    longest: int


class SparsePrefill:
    """What all steps share.

    Parameters
    ----------
    model : DualChunk
        Its settings with ``prefill_chunk_size`` tokens of a step.
    config : transformers.PretrainedConfig
    heads : Heads
        Of this process.
    device : torch.device
    dtype : torch.dtype
        Of the queries.

    Raises
    ------
    ValueError
        The kernel asked for does not run here, or the budgets of vertical-slash do not fit the model.
    FileNotFoundError
        There are no such budgets.
    """

    def __init__(self, model: DualChunk, config: Any, heads: Heads, device: torch.device, dtype: torch.dtype) -> None:
        self.settings, self._config, self._heads = model.settings, config, heads
        self._device, self._dtype, self._head_dim = device, dtype, model.head_dim
        self._rotary = RotarySource(model.inv_freq(device), 1.0)
        self._base: Request | None = None
        name = rule_name(self.settings, device, dtype, model.head_dim)
        if name is None:
            return
        trained = self.settings.original_max_position_embeddings
        request = make_request(name, self.settings, config, heads, SparseState(), trained)
        # a state to steer by would have to outlive the step
        self._base = replace(request, rule=request.rule._replace(recall_target=None))

    @property
    def name(self) -> str | None:
        """The rule by which prompts that are long enough are prefilled; None is dense."""
        return None if self._base is None else self._base.name

    def announce(self, longest: int) -> None:
        """Say that sparse prefill is on, and compile its kernels for prompts of up to so many tokens."""
        if self._base is None or longest <= self.settings.sparse_attention_threshold:
            return
        logger.info(
            "Sparse prefill (%s) is on for prompts of more than %d tokens: attention is approximate there, and recall "
            'is logged. "sparse": "off" in dual_chunk_attention_config is exact.',
            self._base.name,
            self.settings.sparse_attention_threshold,
        )
        if self._device.type == "cuda":
            compile_ahead(self._base, self._shapes(), longest)

    def _shapes(self) -> Shapes:
        config, heads = self._config, self._heads
        sizes = config.hidden_size, config.intermediate_size
        return Shapes(self._device, self._dtype, heads.query, heads.key, self._head_dim, *sizes, False, False)

    def plan(self, starts: torch.Tensor, lengths: torch.Tensor, *, longest: int, most_queries: int) -> Plan | None:
        """What of a step is prefilled sparsely; None where nothing is.

        Waits for the device in steps that hold a part of a long prompt, once.

        Parameters
        ----------
        starts, lengths : torch.Tensor
            As in `pages.cut`.
        longest, most_queries : int
            The most tokens and queries of a request, or upper bounds.
        """
        if self._base is None or not self._takes(most_queries, longest):
            return None
        both = torch.cat((starts.long(), lengths.long())).tolist()
        begins, ends = both[: len(starts)], both[len(starts) :]
        queries = [stop - start for start, stop in pairwise(begins)]
        parts = []
        for number, length in enumerate(ends):
            if self._takes(queries[number], length):
                parts.append(self._part(number, begins[number], length - queries[number], length))
                queries[number] = self._base.dense_end
        return Plan(tuple(parts), tuple(queries), max(ends)) if parts else None

    def _part(self, number: int, row: int, start: int, stop: int) -> Part:
        """The part at positions `start` to `stop`, whose queries begin at a row."""
        assert self._base is not None
        end = stop - self._base.dense_end
        layout = make_layout(
            Call.whole(1, stop - start, start),
            start,
            end,
            settings=self.settings,
            rotary=self._rotary,
            dtype=self._dtype,
            device=self._device,
            sparse=self._request(start, stop),
        )
        return Part(number, slice(row, row + end - start), layout, spans(end, stop, self.settings.stride))

    def _takes(self, queries: int, length: int) -> bool:
        """Whether so many queries at the end of so many tokens are more than an end that attends to everything."""
        assert self._base is not None
        if queries < self.settings.tile + self._base.dense_end:
            return False
        name = rule_for(
            self.settings,
            self._config,
            heads=lambda: self._heads,
            device=self._device,
            dtype=self._dtype,
            length=length,
        )
        return name is not None

    def _request(self, start: int, stop: int) -> Request:
        assert self._base is not None
        state = SparseState()
        # which heads measure their recall goes by the position, where a sequence with a state counts its spans
        turn = start // self.settings.prefill_chunk_size
        state.turns = dict.fromkeys(range(self._config.num_hidden_layers), turn)
        prompt = self._base.prompt._replace(times_trained=stop / self.settings.original_max_position_embeddings)
        return replace(self._base, prompt=prompt, state=state)

    def room(self, tokens: int) -> int:
        """Bytes that a part of a prompt of so many `tokens` takes while a layer attends, its gathered keys included."""
        if self._base is None or tokens <= self.settings.sparse_attention_threshold:
            return 0
        shape = Shape(1, self._heads.query, self._heads.key, self._head_dim, hidden=0, intermediate=0)
        peak = Prefill(shape, tokens, 1, self._dtype, self.settings).peak()
        return peak.total + kv_bytes(shape, self._dtype) * tokens


class RecallLog:
    """Tells at INFO what sparse prefill kept: after a prompt, at most every 10 seconds, and every minute of a long one.

    Parameters
    ----------
    name : str
        Of the rule.
    clock : callable
        ``clock()``: seconds that only grow.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._told = self._since = -float("inf")
        self._pending: list[SparseState] = []

    def step(self, plan: Plan | None) -> None:
        """Tell what earlier steps have found, if it is time, and note the parts of this one."""
        now = self._clock()
        due = now - self._told >= _PAUSE if plan is None else now - self._since >= _OVERDUE
        if self._pending and due:
            self._tell(on_host(self._pending))
            self._pending, self._told = [], now
        if plan is not None:
            self._since = self._since if self._pending else now
            self._pending += [part.layout.sparse.state for part in plan.parts]

    def _tell(self, found: SparseState) -> None:
        layers = found.by_layer()
        if not layers:  # a step that failed before its first layer
            return
        try:
            found.check()
        except RuntimeError as error:  # of one prompt: an engine goes on for the others
            logger.error("%s", error)
            return
        recall = sum(layer["recall"] for layer in layers) / len(layers)
        logger.info(
            "Sparse prefill (%s) kept %.1f %% of the blocks of its prompts, which hold a recall of %.3f of the dense "
            "attention, and of %.3f in the worst head",
            self._name,
            100 * found.density(),
            recall,
            min(layer["lowest_recall"] for layer in layers),
        )


def on_host(states: Sequence[SparseState]) -> SparseState:
    """The records of some states as those of one, on the host. One transfer for all of them."""
    joined = SparseState()
    records = [record for state in states for record in state.records]
    joined.dense = [record for state in states for record in state.dense]
    if not records:
        return joined
    sizes = [record.recall.numel() + 1 for record in records]
    parts = [torch.cat((record.recall.double().flatten(), record.kept.double().flatten())) for record in records]
    for record, values in zip(records, torch.cat(parts).cpu().split(sizes), strict=True):
        recall = values[:-1].unflatten(0, record.recall.shape)
        joined.records.append(replace(record, recall=recall, kept=values[-1]))
    return joined
