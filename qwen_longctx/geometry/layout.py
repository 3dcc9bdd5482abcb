"""What one forward has to attend to, worked out once and shared by all layers.

Rows of a batch keep their own positions: with left padding, row b's key number j stands at position j - offset[b].
Neighbouring rows of equal geometry run together; without padding that is the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.positions import Kind, Span, spans
from qwen_longctx.geometry.rotary import RotaryTables

if TYPE_CHECKING:
    from qwen_longctx.sparsity.request import Request


class Row(NamedTuple):
    """Geometry of one row: its real queries, where its keys begin, and its positions."""

    queries: tuple[int, int]  # of the tokens of this forward
    first_key: int  # index in the cache of the row's oldest real key
    offset: int  # index in the cache minus position


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring rows of one geometry.

    `temperature` is ``f²``: one number, or a tensor of shape (queries, 1, 1) where it differs between queries.
    Queries from position `dense_from` on are the end of the prompt, which is never prefilled sparsely.
    """

    rows: slice
    queries: slice
    offset: int
    spans: tuple[Span, ...]
    temperature: float | torch.Tensor
    dense_from: int


@dataclass
class Plan:
    """Everything that attention needs besides q, k and v.

    Attributes
    ----------
    groups : tuple of RowGroup
    covers_all : bool
        One group holds every row and query, so there is nothing to scatter.
    tables : RotaryTables
    kernel : str
    length : int
        Keys after this forward, as counted in the cache.
    weights : bool
        Attention weights are asked for.
    sparse : Request, optional
        Sparse prefill of this forward.
    """

    groups: tuple[RowGroup, ...]
    covers_all: bool
    tables: RotaryTables
    kernel: str
    length: int
    weights: bool = False
    sparse: Request | None = None
    _moved: dict[torch.device, Plan] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Plan:
        """This plan with its tables on `device`; accelerate calls it before each layer of another device."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.tables.keys.cos.device == device:
            return self
        if device not in self._moved:
            groups = tuple(_group_to(group, device) for group in self.groups)
            self._moved[device] = replace(self, groups=groups, tables=self.tables.to(device), _moved={})
        return self._moved[device]


def _group_to(group: RowGroup, device: torch.device) -> RowGroup:
    if not isinstance(group.temperature, torch.Tensor):
        return group
    return replace(group, temperature=group.temperature.to(device))


class RotarySource(NamedTuple):
    """The module's own rotary parameters, trusted over any config."""

    inv_freq: torch.Tensor
    attention_scaling: float


def make_plan(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    *,
    batch: int,
    tokens: int,
    cached: int,
    settings: LongContextConfig,
    rotary: RotarySource,
    dtype: torch.dtype,
    device: torch.device,
    prompt_length: int = 0,
    one_chunk: bool = False,
    kernel: str | None = None,
    weights: bool = False,
    sparse: Request | None = None,
) -> Plan:
    """Plan one forward.

    Parameters
    ----------
    position_ids : torch.Tensor, optional
        Shape (1 or batch, tokens), integer; by default the tokens follow the cached ones.
    attention_mask : torch.Tensor, optional
        Shape (batch, at least cached + tokens), 0 at padding.
    batch, tokens, cached : int
        Rows, tokens of this forward, tokens already in the cache.
    settings : LongContextConfig
    rotary : RotarySource
    dtype, device
        Of the activations.
    prompt_length : int
        Length of the whole prompt, padding included: the attention temperature is the prompt's until it is passed.
    one_chunk : bool
        Run as one chunk of ``chunk_size`` (plain rotary attention; for training).
    kernel : str, optional
        Instead of the settings' kernel.
    weights : bool
        Attention weights are asked for.
    sparse : Request, optional
        Sparse prefill, if the forward asks for it.

    Raises
    ------
    ValueError
        Positions that do not grow by one, or padding between tokens.
    """
    if position_ids is None:
        position_ids = (torch.arange(tokens, device=device) + cached)[None]
    mask = None if attention_mask is None else attention_mask[:, : cached + tokens]
    rows = _rows(position_ids, mask, batch, tokens, cached)
    stride = settings.chunk_size if one_chunk else settings.stride
    full_length = max(prompt_length, cached + tokens)
    dense_from = full_length - (sparse.dense_end if sparse is not None else 0)
    groups = _groups(rows, cached, stride, settings, full_length, prompt_length, dense_from, device)
    kinds: set[Kind] = {s.kind for g in groups for span in g.spans for s in span.segments}
    tables = RotaryTables(
        position_ids.to(device),
        kinds,
        stride,
        settings.chunk_size,
        rotary.inv_freq,
        rotary.attention_scaling,
        dtype,
    )
    covers_all = len(groups) == 1 and (groups[0].rows, groups[0].queries) == (
        slice(0, batch),
        slice(0, tokens),
    )
    return Plan(groups, covers_all, tables, kernel or settings.kernel, cached + tokens, weights, sparse)


def _rows(position_ids: torch.Tensor, mask: torch.Tensor | None, batch: int, tokens: int, cached: int) -> list[Row]:
    """Geometry of every row. One transfer to the host where nothing is padded."""
    index = torch.arange(cached, cached + tokens, device=position_ids.device)
    low, high = torch.aminmax(index - position_ids)
    full = torch.ones_like(low) if mask is None else mask.all().to(low)
    offset, highest, unpadded = torch.stack((low, high, full)).tolist()
    if unpadded and offset == highest:
        return [Row((0, tokens), 0, offset)] * batch
    offsets = (index - position_ids).expand(batch, tokens).cpu()
    if mask is None:
        return [_padded_row(offsets[b], torch.ones(cached + tokens, dtype=torch.bool), cached) for b in range(batch)]
    visible = mask.bool().cpu()
    return [_padded_row(offsets[b], visible[b], cached) for b in range(batch)]


def _padded_row(offsets: torch.Tensor, visible: torch.Tensor, cached: int) -> Row:
    kept = visible.nonzero()[:, 0]
    if len(kept) == 0:
        return Row((0, 0), 0, 0)
    first, last = int(kept[0]), int(kept[-1]) + 1
    if last - first != len(kept):
        raise ValueError(
            f"attention_mask hides tokens between tokens {first} and {last}: "
            "dual chunk attention takes padding at the ends of a row only. If the text itself holds the pad token, "
            "pass attention_mask=torch.ones_like(input_ids)"
        )
    queries = (min(max(first - cached, 0), len(offsets)), max(last - cached, 0))
    own = offsets[slice(*queries)]
    if len(own) == 0:
        return Row((0, 0), first, 0)
    if bool((own != own[0]).any()):
        raise ValueError(
            "position_ids must grow by one from token to token (packed or reordered sequences are not supported): "
            "run each sequence as a row of its own, or leave position_ids out"
        )
    return Row(queries, first, int(own[0]))


def _groups(
    rows: list[Row],
    cached: int,
    stride: int,
    settings: LongContextConfig,
    full_length: int,
    prompt_length: int,
    dense_from: int,
    device: torch.device,
) -> tuple[RowGroup, ...]:
    groups = []
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop < len(rows) and rows[stop] == rows[start]:
            continue
        row = rows[start]
        first, last = row.queries
        if first < last:
            begin, end = cached - row.offset + first, cached - row.offset + last
            border = dense_from - row.offset
            cut = min(max(begin, border), end)
            oldest = row.first_key - row.offset
            found = spans(begin, cut, stride, oldest) + spans(cut, end, stride, oldest)
            heat = _temperature(row, cached, settings, full_length, prompt_length, device)
            groups.append(RowGroup(slice(start, stop), slice(first, last), row.offset, found, heat, border))
        start = stop
    return tuple(groups)


def _temperature(
    row: Row,
    cached: int,
    settings: LongContextConfig,
    full_length: int,
    prompt_length: int,
    device: torch.device,
) -> float | torch.Tensor:
    """``f²`` of a row: the prompt's for the prompt, each token's own beyond it."""
    if prompt_length == 0 or cached + row.queries[1] <= prompt_length or row.queries[1] - row.queries[0] == 1:
        return settings.temperature(full_length - row.offset)
    lengths = [max(prompt_length, cached + t + 1) - row.offset for t in range(*row.queries)]
    values = [settings.temperature(n) for n in lengths]
    if values[0] == values[-1]:
        return values[0]
    return torch.tensor(values, device=device)[:, None, None]
