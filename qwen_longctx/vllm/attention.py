"""Dual chunk attention of a step of the engine: the queries rotate here, a segment at a time."""

from __future__ import annotations

from copy import copy
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeAlias

import torch

from qwen_longctx import ops
from qwen_longctx.attention import dense
from qwen_longctx.config import Geometry
from qwen_longctx.geometry.layout import RotarySource
from qwen_longctx.geometry.positions import Kind, query_positions
from qwen_longctx.geometry.rotary import rotate, rotation, temperature
from qwen_longctx.geometry.step import Numbers, tables
from qwen_longctx.kv.store import Tensors
from qwen_longctx.ops.decode import Reach, decode
from qwen_longctx.ops.device import cast
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.pages import gathered
from qwen_longctx.vllm.pages import KINDS, Pieces, cut, positions, segment_table
from qwen_longctx.vllm.sparse import Part, Plan


class Segment(NamedTuple):
    """One call of a kernel: the queries of all pieces towards their keys of one kind of segment.

    Attributes
    ----------
    rows : torch.Tensor
        Shape (pieces + 1,), int32: the first row of each piece, and the row after the last.
    keys : torch.Tensor
        Shape (pieces,), int32: keys that each piece looks at, 0 and up.
    table : torch.Tensor
        Shape (pieces, pages), int32: the pages of these keys.
    most_queries, most_keys : int
        The most queries and keys of a piece.
    causal : bool
        Aligned at the bottom right of each piece.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    table: torch.Tensor
    most_queries: int
    most_keys: int
    causal: bool


class Layer(NamedTuple):
    """What a layer brings beside its queries.

    Attributes
    ----------
    pages : torch.Tensor
        Shape (pages, kv_heads, page_size, 2 * head_dim): keys, and values after them.
    scale : float
        Softmax scale.
    number : int
    """

    pages: torch.Tensor
    scale: float
    number: int


class PagedKernel(Protocol):
    """Attention of one segment: `q` of shape (rows, heads, head_dim) gives `out` of that shape, and `lse`.

    `lse` is the natural logarithm of the softmax's denominator in float32, shape (heads, rows), -inf in rows without
    keys, in which `out` is 0.
    """

    def __call__(self, q: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]: ...


class Step:
    """What all layers share in one step of the engine in which all requests attend to everything.

    `kinds` are the segments that occur, and `rotations` those of the queries towards each, of shape (rows, 1,
    head_dim). Where all sequences end within the first chunk there is one kind, and attention is causal over
    everything, as in other models.

    Parameters
    ----------
    geometry : Geometry
    inv_freq : torch.Tensor
        Shape (head_dim / 2,): rotary frequencies.
    starts, starts_host, lengths : torch.Tensor
        As in `pages.cut`.
    rows : int
        Rows of the queries, padding included.
    longest : int
        Tokens of the longest request, or an upper bound.
    most_queries : int
        Queries of the request that has most, or an upper bound.
    dtype : torch.dtype
        Of the queries.
    """

    def __init__(
        self,
        geometry: Geometry,
        inv_freq: torch.Tensor,
        starts: torch.Tensor,
        starts_host: torch.Tensor,
        lengths: torch.Tensor,
        *,
        rows: int,
        longest: int,
        most_queries: int,
        dtype: torch.dtype,
    ) -> None:
        stride = geometry.stride
        self._stride, self._most_queries = stride, most_queries
        last = max(longest - 1, 0) // stride  # the last chunk that a query may lie in
        self._most_keys = {"intra": min(longest, stride), "successive": stride, "inter": (last - 1) * stride}
        self.kinds: tuple[Kind, ...] = KINDS[: min(last, 2) + 1]
        self._pieces: Pieces | None = cut(starts, starts_host, lengths, stride) if last else None
        self._requests = starts, lengths
        where = positions(starts, lengths, rows)
        factor = None
        if geometry.attention_temperature and longest > geometry.original_max_position_embeddings:
            factor = temperature((where + 1).double(), geometry.original_max_position_embeddings)[None]
        self.rotations = [
            rotation(query_positions(kind, where, stride, geometry.chunk_size)[None], inv_freq, 1.0, dtype, factor)
            for kind in self.kinds
        ]
        self.segments: dict[Kind, Segment] = {}

    @property
    def in_one_chunk(self) -> bool:
        """Whether attention is that of other models."""
        return len(self.kinds) == 1

    def on(self, table: torch.Tensor, page_size: int) -> Step:
        """The same step with its `segments` in the pages of a block table, of shape (requests, pages), int32."""
        here = copy(self)
        pieces, most_queries = self._pieces, self._most_queries
        if pieces is None:
            starts, lengths = self._requests
            here.segments = {"intra": Segment(starts, lengths, table, most_queries, self._most_keys["intra"], True)}
            return here
        here.segments = {}
        for kind in self.kinds:
            most = self._most_keys[kind]
            pages = segment_table(table, pieces, kind, stride=self._stride, page_size=page_size, longest=most)
            here.segments[kind] = Segment(pieces.rows, pieces.keys[kind], pages, most_queries, most, kind == "intra")
        return here

    def rotated(self, q: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Queries of shape (rows, heads, head_dim), rotated towards one kind of segment."""
        return cast(rotate(q[None], self.rotations[self.kinds.index(kind)]), q.dtype)[0]


class Mixed:
    """A step with `parts` of prompts that are prefilled sparsely.

    Parameters
    ----------
    parts : tuple of Part
    rows : torch.Tensor
        Shape (rows,), int64: the rows of all other queries.
    rest : Step
        Of these queries.
    """

    in_one_chunk = False

    def __init__(self, parts: tuple[Part, ...], rows: torch.Tensor, rest: Step) -> None:
        self.parts, self.rows, self.rest = parts, rows, rest
        self.tables: list[torch.Tensor] = []

    def on(self, table: torch.Tensor, page_size: int) -> Mixed:
        """See `Step.on`. The `tables` of the parts are their rows of the table."""
        here = Mixed(self.parts, self.rows, self.rest.on(table, page_size))
        here.tables = [table[part.number] for part in self.parts]
        return here


class Decoding(NamedTuple):
    """A step in which every request decodes one token, which reads all segments of a layer in one pass.

    Attributes
    ----------
    reach : Reach
        Of one token of each request, which are its rows.
    table : torch.Tensor
        Shape (requests, pages), int32: the block table.
    """

    reach: Reach
    table: torch.Tensor

    @property
    def in_one_chunk(self) -> bool:
        """Whether attention is that of other models: also within a chunk it goes the one way that a graph holds."""
        return False

    def on(self, table: torch.Tensor, page_size: int) -> Decoding:
        """The same step in the pages of another block table."""
        return self._replace(table=table)


class Reaches:
    """Where decoded tokens look, in memory that stays where it is: a CUDA graph of a step reads it there.

    Parameters
    ----------
    geometry : Geometry
    inv_freq : torch.Tensor
        Shape (head_dim / 2,): rotary frequencies.
    most : int
        Requests of a step.
    dtype : torch.dtype
        Of the queries.
    """

    def __init__(self, geometry: Geometry, inv_freq: torch.Tensor, most: int, dtype: torch.dtype) -> None:
        self._geometry, self._rotary, self._dtype, self.most = geometry, RotarySource(inv_freq, 1.0), dtype, most
        self._all = self._worked_out(torch.zeros(most, dtype=torch.int64, device=inv_freq.device))

    def of(self, lengths: torch.Tensor) -> Reach:
        """Of the last token of each request, whose `lengths`, shape (requests,), are integers on the device.

        Requests of 0 tokens, which fill up a graph, look nowhere. Valid until the next call.
        """
        cos, sin, ranges, heat, stride = self._all
        count = len(lengths)
        here = Reach(cos[:, :count], sin[:, :count], ranges[:count], heat[:count], stride)
        for held, new in zip(here[:-1], self._worked_out(lengths.long())[:-1], strict=True):
            held.copy_(new)
        return here

    def _worked_out(self, lengths: torch.Tensor) -> Reach:
        stride, where = self._geometry.stride, (lengths - 1).clamp(min=0)
        chunk = where - where % stride
        before, nothing = (chunk - stride).clamp(min=0), torch.zeros_like(chunk)
        spots = [query_positions(kind, where, stride, self._geometry.chunk_size) for kind in KINDS]
        table = torch.stack((*spots, chunk, lengths, before, chunk, nothing, before), -1)[:, None].int()
        heat = torch.ones(len(lengths), 1, dtype=torch.float32, device=lengths.device)
        if self._geometry.attention_temperature:
            heat = temperature((where + 1).double(), self._geometry.original_max_position_embeddings)[:, None].float()
        return tables(Numbers(table, heat), len(lengths), stride, rotary=self._rotary, dtype=self._dtype)[1]


AnyStep: TypeAlias = Step | Mixed | Decoding


def lay_out(
    plan: Plan | None,
    geometry: Geometry,
    inv_freq: torch.Tensor,
    starts: torch.Tensor,
    starts_host: torch.Tensor,
    lengths: torch.Tensor,
    *,
    rows: int,
    longest: int,
    most_queries: int,
    dtype: torch.dtype,
) -> AnyStep:
    """A step, of which `plan` says what is prefilled sparsely. Other arguments as for `Step`."""
    step = partial(Step, geometry, inv_freq, dtype=dtype)
    if plan is None:
        return step(starts, starts_host, lengths, rows=rows, longest=longest, most_queries=most_queries)
    beside = torch.ones(rows, dtype=torch.bool)
    for part in plan.parts:
        beside[part.rows] = False
    where = beside.nonzero().squeeze(1).to(lengths.device)
    first_rows = torch.tensor([0, *accumulate(plan.queries)], dtype=starts.dtype)
    rest = step(
        first_rows.to(starts.device),
        first_rows,
        lengths,
        rows=len(where),
        longest=plan.longest,
        most_queries=max(plan.queries),
    )
    return Mixed(plan.parts, where, rest)


def attend(q: torch.Tensor, step: AnyStep, kernel: PagedKernel, layer: Layer) -> torch.Tensor:
    """Attend from all queries of a step to what is in their pages, one softmax over all segments of each.

    Parameters
    ----------
    q : torch.Tensor
        Shape (rows, heads, head_dim), not rotated.
    step : Step, Mixed or Decoding
        In its pages (`Step.on`).
    kernel : PagedKernel
        Of the same pages.
    layer : Layer
        For what does not go by `kernel`: decoded tokens, and parts that are prefilled sparsely.

    Returns
    -------
    torch.Tensor
        Like `q`.
    """
    if isinstance(step, Decoding):
        keys, values = layer.pages.transpose(1, 2).split(q.shape[2], dim=-1)
        return decode(q[:, None], keys, values, step.reach, scale=layer.scale, table=step.table)[:, 0]
    if isinstance(step, Step):
        parts = [kernel(step.rotated(q, kind), segment) for kind, segment in step.segments.items()]
        return merge([(out[None], lse[None]) for out, lse in parts])[0][0]
    out = torch.zeros_like(q)
    for part, table in zip(step.parts, step.tables, strict=True):
        kv = Tensors(*gathered(layer.pages, table, part.layout.length))
        out[part.rows] = dense.attend(q[part.rows][None], kv, part.layout, layer.scale, layer.number)[0]
        for span in part.end:
            part.layout.sparse.observe_dense(layer.number, span, q.shape[1])
        del kv  # of a long prompt gigabytes, and the next part's are as large
    out[step.rows] = attend(q[step.rows], step.rest, kernel, layer)
    return out


def paged_attention(
    q: torch.Tensor, pages: torch.Tensor, segment: Segment, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `PagedKernel` in PyTorch, piece by piece.

    Parameters
    ----------
    q : torch.Tensor
        Shape (rows, heads, head_dim), rotated towards the segment.
    pages : torch.Tensor
        Shape (pages, kv_heads, page_size, 2 * head_dim): keys, and values after them.
    segment : Segment
    scale : float
    """
    rows, heads, head_dim = q.shape
    page_size = pages.shape[2]
    out = torch.zeros_like(q)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((heads, rows), -torch.inf, dtype=exact, device=q.device)
    starts = segment.rows.tolist()
    for piece, keys in enumerate(segment.keys.tolist()):
        here = slice(starts[piece], starts[piece + 1])
        if keys == 0 or here.start == here.stop:
            continue
        own = pages[segment.table[piece, : -(-keys // page_size)]]
        k, v = own.transpose(1, 2).flatten(0, 1)[None, :keys].split(head_dim, dim=-1)
        part, part_lse = ops.sdpa(q[None, here], k, v, causal=segment.causal, scale=scale)
        out[here], lse[:, here] = part[0], part_lse[0]
    return out, lse
