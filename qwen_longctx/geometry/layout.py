"""What one forward has to attend to, worked out once and shared by all layers.

A call is what the user makes: a prompt, a turn of a chat, one decoded token. A long call is cut into chunks of
prefill, each of which is a forward with a layout of its own. Which tokens of a padded row are real comes from the
attention mask: the row's oldest real token stands at position 0, so that a row's positions, chunk borders and attention
temperature are those of the row alone. Neighbouring rows of equal geometry run together; without padding that is the
whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.geometry import step
from qwen_longctx.geometry.positions import Kind, Span, spans
from qwen_longctx.geometry.rotary import RotaryTables, temperature
from qwen_longctx.ops.decode import MOST_TOKENS, Reach, why_not

Mode = Literal["train", "prefill", "decode"]


class Extent(NamedTuple):
    """Real tokens of one row, as indices in the cache: the oldest, and the one after the newest."""

    first: int
    last: int


class Origin(NamedTuple):
    """Where a row begins behind its padding, -1 for padding alone; and what its position ids count beyond its tokens.

    Rotary attention knows distances only, so a constant shift of the position ids changes nothing.
    """

    first: int
    shift: int = 0


@dataclass(frozen=True)
class Call:
    """One call of the user: where the tokens of every row lie.

    Attributes
    ----------
    rows : tuple of Extent
        Cached tokens included. ``Extent(0, 0)`` is a row of padding alone.
    cached : int
        Tokens in the cache before the call.
    end : int
        Tokens in the cache after it, padding included.
    prompt : int
        The attention temperature of tokens before this index is that of a sequence that ends there; 0 on a cache that
        held tokens before the call. See `Call.temperature_length`.
    origins : tuple of Origin
        Of every row, for the calls that continue it.
    """

    rows: tuple[Extent, ...]
    cached: int
    end: int
    prompt: int
    origins: tuple[Origin, ...]

    @classmethod
    def whole(cls, batch: int, tokens: int, cached: int = 0) -> Call:
        """A call without padding."""
        end = cached + tokens
        return cls((Extent(0, end),) * batch, cached, end, 0 if cached else end, (Origin(0),) * batch)

    @property
    def goes_on(self) -> bool:
        """Whether every row ends with a real token, so that a generate can only go on with others."""
        return all(row.last == self.end for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(row.last - row.first for row in self.rows)

    def temperature_length(self, row: Extent, position: int) -> int:
        """Length n that the attention temperature of a query goes by, where it goes by the prompt's length.

        A call that fills an empty cache is a prompt, and n is the prompt's length for every query of it. In every later
        call (decoding, a further turn, drafts that are checked) n is the query's position + 1.
        """
        return max(position + 1, min(row.last, self.prompt) - row.first)

    def temperature(self, row: Extent, position: int, settings: LongContextConfig) -> float:
        """``f²`` of a query of a row."""
        by_position = settings.attention_temperature == "position"
        return settings.temperature(position + 1 if by_position else self.temperature_length(row, position))


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring rows of one geometry.

    `offset` is an index in the cache minus the position there. `temperature` is the factor f² on the logits of all
    queries; where it differs between queries it is in the rotations of the queries, and 1 here. Queries from position
    `dense_from` on are the end of the call, which is never prefilled sparsely.
    """

    rows: slice
    queries: slice
    offset: int
    spans: tuple[Span, ...]
    temperature: float
    dense_from: int


@dataclass
class Layout:
    """Everything that attention needs besides queries, keys and values.

    Attributes
    ----------
    groups : tuple of RowGroup
    covers_all : bool
        One group holds every row and query, so there is nothing to scatter.
    tables : RotaryTables
    kernel : str
    length : int
        Keys after this forward, as counted in the cache.
    mode : {"train", "prefill", "decode"}
        Whether gradients are wanted; else whether several tokens are added to a row, or one.
    weights : bool
        Attention weights are asked for.
    sparse : sparsity.Request, optional
        Sparse prefill of this forward.
    reach : Reach, optional
        Of a forward that runs `ops.decode` over all rows and segments at once; it has no groups.
    slot : torch.Tensor, optional
        Shape (1,), int64, on the device: where the one token of every row is written in the cache, for a forward that
        is captured and repeated. Else it is written behind those that the cache holds.
    keep : float, optional
        Share of the keys that the queries of such a forward attend to; None is all.
    attended : list of int
        Numbers of the layers whose attention has used this layout, in order.
    """

    groups: tuple[RowGroup, ...]
    covers_all: bool
    tables: RotaryTables
    kernel: str
    length: int
    mode: Mode = "prefill"
    weights: bool = False
    sparse: Any = None
    reach: Reach | None = None
    slot: torch.Tensor | None = None
    keep: float | None = None
    attended: list[int] = field(default_factory=list, repr=False)
    _moved: dict[torch.device, Layout] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Layout:
        """This layout with its tables on `device`; accelerate calls it before each layer of another device."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.tables.keys.cos.device == device:
            return self
        if device not in self._moved:
            reach = None if self.reach is None else self.reach.to(device)
            self._moved[device] = replace(self, tables=self.tables.to(device), reach=reach, _moved={})
        return self._moved[device]


class RotarySource(NamedTuple):
    """The module's own rotary parameters, trusted over any config."""

    inv_freq: torch.Tensor
    attention_scaling: float


def read_call(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    batch: int,
    tokens: int,
    cached: int,
    known: tuple[Origin, ...] = (),
    announced: int = 0,
    trusted: bool = False,
) -> Call:
    """Read which tokens are real from what the caller gives, and check it. One transfer to the host, or none.

    Parameters
    ----------
    attention_mask : torch.Tensor, optional
        Shape (batch, at least cached + tokens), 0 at padding. Without one every token is real.
    position_ids : torch.Tensor, optional
        Shape (1 or batch, tokens), integer. They must grow by one from each real token to the next; where a row starts
        comes from the mask.
    batch, tokens, cached : int
        Rows, tokens of this call, tokens in the cache before it.
    known : tuple of Origin
        Of the rows of the cache; empty if unknown.
    announced : int
        Length of the prompt, where the call that fills the cache brings more tokens than the prompt; else 0.
    trusted : bool
        All rows of the cache go on with real tokens, as those of a generate do: only the shapes of mask and positions
        are looked at, and nothing is waited for.

    Raises
    ------
    TypeError, ValueError
        A mask or positions of the wrong type or shape, padding between tokens, or positions that do not grow by one or
        do not continue the cache.
    """
    end = cached + tokens
    prompt = 0 if cached else min(announced or end, end)
    mask = _checked_mask(attention_mask, batch, end)
    if trusted and len(known) == batch:
        if position_ids is not None:
            _check_positions(position_ids, batch, tokens)
        return Call(tuple(Extent(origin.first, end) for origin in known), cached, end, 0, known)
    if mask is None and position_ids is None:
        call = replace(Call.whole(batch, tokens, cached), prompt=prompt)
    else:
        rows, shifts = _read_rows(mask, position_ids, batch, tokens, cached)
        origins = tuple(Origin(row.first if row.last else -1, shift) for row, shift in zip(rows, shifts, strict=True))
        call = Call(rows, cached, end, prompt, origins)
    return _continued(call, known) if cached else call


def _read_rows(
    mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, tokens: int, cached: int
) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """Extents and shifts of all rows, from a mask or positions or both."""
    end = cached + tokens
    if position_ids is not None:
        _check_positions(position_ids, batch, tokens)
    shift = _unpadded_shift(mask, position_ids, cached)
    if shift is not None:
        return (Extent(0, end),) * batch, (shift,) * batch
    mask = torch.ones(batch, end, dtype=torch.bool) if mask is None else mask
    return _read_mask(mask, position_ids, cached)


def _continued(call: Call, known: tuple[Origin, ...]) -> Call:
    """The call with the shifts that the cache knows; refuses rows or positions that do not continue those of the cache.

    A row of which the cache holds padding alone begins with this call, wherever its position ids do.
    """
    known = known or tuple(Origin(origin.first) for origin in call.origins)
    if known == call.origins:
        return call
    if len(known) != len(call.rows):
        raise InvalidValue(f"the call has {len(call.rows)} rows and the cache {len(known)}: give it as many")
    origins = []
    for number, (old, new) in enumerate(zip(known, call.origins, strict=True)):
        if not 0 <= old.first < call.cached:
            origins.append(new)
            continue
        if new.first != old.first:
            raise InvalidValue(
                f"row {number} of the cache begins at token {old.first}, behind its padding, and the attention_mask of "
                f"this call says {new.first} (no mask says 0): give the mask of all tokens, cached ones included"
            )
        if new.shift not in (0, old.shift):
            again = new.shift == old.first - call.cached  # positions from 0 on
            raise InvalidValue(
                f"position_ids do not continue the cache: the first new token of row {number} stands "
                f"{new.shift - old.shift:+d} tokens from where the cached tokens of the row end"
                + (", as if the text began again (assisted decoding does so beside a filled cache)" if again else "")
                + ". Leave position_ids out, or start with a new cache"
            )
        origins.append(old)
    return replace(call, origins=tuple(origins))


def _checked_mask(mask: Any, batch: int, end: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise InvalidType(f"attention_mask must be a tensor of shape (batch, tokens), got {type(mask).__name__}")
    if mask.ndim != 2:
        raise InvalidValue(
            f"attention_mask must have shape (batch, tokens), got {tuple(mask.shape)}: dual chunk attention is causal "
            "and takes no custom masks; give the 2D padding mask"
        )
    if mask.shape[0] != batch or mask.shape[1] < end:
        raise InvalidValue(
            f"attention_mask of shape {tuple(mask.shape)} does not cover {batch} rows of {end} tokens, cached ones "
            "included: give one value for every token, 1 where it is real"
        )
    return mask[:, :end]


def _check_positions(position_ids: Any, batch: int, tokens: int) -> None:
    if not isinstance(position_ids, torch.Tensor):
        raise InvalidType(f"position_ids must be a tensor of integers, got {type(position_ids).__name__}")
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise InvalidType(f"position_ids must be integers, got {position_ids.dtype}")
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise InvalidValue(
            f"position_ids must have shape (1 or {batch}, {tokens}), one for each token, "
            f"got {tuple(position_ids.shape)}"
        )


def _unpadded_shift(mask: torch.Tensor | None, position_ids: torch.Tensor | None, cached: int) -> int | None:
    """What all position ids count more than the tokens, if nothing is padded and it is one number; else None."""
    device = position_ids.device if position_ids is not None else mask.device  # type: ignore[union-attr]
    full = torch.ones((), dtype=torch.long, device=device) if mask is None else (mask == 1).all().to(device, torch.long)
    if position_ids is None:
        return 0 if full.item() else None
    low, high = torch.aminmax(position_ids - torch.arange(cached, cached + position_ids.shape[1], device=device))
    unpadded, least, most = torch.stack((full, low.long(), high.long())).tolist()
    return least if unpadded and least == most else None


def _shifts(position_ids: torch.Tensor | None, first: torch.Tensor, real: torch.Tensor, cached: int) -> tuple[int, ...]:
    """Position ids minus positions, one number a row; `first` of shape (batch,), `real` (batch, tokens)."""
    if position_ids is None:
        return (0,) * len(first)
    index = torch.arange(cached, cached + position_ids.shape[1], device=position_ids.device)
    apart = position_ids.long() - index + first.to(position_ids.device)[:, None]
    real = real.to(apart.device)
    low = apart.masked_fill(~real, torch.iinfo(apart.dtype).max)
    high = apart.masked_fill(~real, torch.iinfo(apart.dtype).min)
    bounds = torch.stack((low.amin(1), high.amax(1)), 1).tolist()
    if any(least < most for least, most in bounds):  # a row without real tokens has its bounds the other way round
        raise InvalidValue(
            "position_ids must grow by one from token to token (packed or reordered sequences are not supported): "
            "run each sequence as a row of its own, or leave position_ids out"
        )
    return tuple(least if least == most else 0 for least, most in bounds)


def _read_mask(
    mask: torch.Tensor, position_ids: torch.Tensor | None, cached: int
) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """Extents and shifts of all rows."""
    end = mask.shape[1]
    real = mask != 0
    first = real.to(torch.uint8).argmax(1)  # the first of the largest: 0 in a row of padding
    last = end - real.flip(1).to(torch.uint8).argmax(1)
    odd = ((mask != 0) & (mask != 1)).any(1)
    bounds = torch.stack((first, last, real.sum(1), odd.to(first)), 1).tolist()
    if any(values[3] for values in bounds):
        raise InvalidValue(
            "attention_mask must be 1 at tokens and 0 at padding, it holds other values: "
            "an additive mask is not supported"
        )
    rows = []
    for begin, stop, count, _ in bounds:
        if count and stop - begin != count:
            raise InvalidValue(
                f"attention_mask hides tokens between tokens {begin} and {stop}: "
                "dual chunk attention takes padding at the ends of a row only. If the text itself holds the pad token, "
                "pass attention_mask=torch.ones_like(input_ids)"
            )
        rows.append(Extent(begin, stop) if count else Extent(0, 0))
    return tuple(rows), _shifts(position_ids, first, real[:, cached:], cached)


def make_layout(
    call: Call,
    start: int,
    stop: int,
    *,
    settings: LongContextConfig,
    rotary: RotarySource,
    dtype: torch.dtype,
    device: torch.device,
    mode: Mode = "prefill",
    weights: bool = False,
    sparse: Any = None,
) -> Layout:
    """Lay out one forward.

    Parameters
    ----------
    call : Call
    start, stop : int
        Indices in the cache of the first token of this forward and of the one after the last.
    settings : LongContextConfig
    rotary : RotarySource
    dtype, device
        Of the activations.
    mode : {"train", "prefill", "decode"}
    weights : bool
        Attention weights are asked for.
    sparse : sparsity.Request, optional
        Sparse prefill, if the forward asks for it.
    """
    keep = settings.share_decoded(stop)
    one_pass = takes_one_pass(settings, rotary, dtype, device, stop - start)
    if call.cached and mode != "train" and not weights and sparse is None and one_pass:
        keys, reach, spots = step.lay_out(
            call, start, stop, settings=settings, rotary=rotary, dtype=dtype, device=device
        )
        tables = RotaryTables.of_keys(keys, spots, rotary.inv_freq, rotary.attention_scaling)
        return Layout((), False, tables, settings.kernel, stop, mode, reach=reach, keep=keep)
    groups, varying = _groups(call, start, stop, settings, sparse.dense_end if sparse is not None else 0)
    kinds: set[Kind] = {s.kind for g in groups for span in g.spans for s in span.segments}
    positions = _positions(call, start, stop, device)
    factors = _query_factors(call, positions, varying, settings, device) if varying else None
    tables = RotaryTables(
        positions,
        kinds,
        settings.stride,
        settings.chunk_size,
        rotary.inv_freq,
        rotary.attention_scaling,
        dtype,
        factors,
    )
    everything = slice(0, len(call.rows)), slice(0, stop - start)
    covers_all = len(groups) == 1 and (groups[0].rows, groups[0].queries) == everything
    return Layout(tuple(groups), covers_all, tables, settings.kernel, stop, mode, weights, sparse)


def takes_one_pass(
    settings: LongContextConfig, rotary: RotarySource, dtype: torch.dtype, device: torch.device, tokens: int
) -> bool:
    """Whether `ops.decode` takes so many tokens after a cache. Arguments as in `make_layout`."""
    if settings.sparse_decode is not None and tokens <= MOST_TOKENS:
        return True  # of all devices, since no engine that takes a segment at a time knows lists of blocks
    return not why_not(settings.kernel, device, dtype, 2 * len(rotary.inv_freq), tokens)


def _positions(call: Call, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Positions of the tokens of a forward, shape (1 or batch, tokens); 0 at padding before a row."""
    index = torch.arange(start, stop, device=device)
    firsts = [row.first for row in call.rows]
    if len(set(firsts)) == 1:
        return (index - firsts[0]).clamp(min=0)[None] if firsts[0] else index[None]
    return (index - torch.tensor(firsts, device=device)[:, None]).clamp(min=0)


def _groups(
    call: Call, start: int, stop: int, settings: LongContextConfig, dense_end: int
) -> tuple[list[RowGroup], list[bool]]:
    """Groups of equal rows with tokens in ``[start, stop)``, and whether each row's temperature differs by query."""
    groups: list[RowGroup] = []
    varying: list[bool] = []
    rows = call.rows
    begin = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end] == rows[begin]:
            continue
        row = rows[begin]
        first, last = max(row.first, start), min(row.last, stop)
        ends = [1.0, 1.0]
        if first < last:
            at, to = first - row.first, last - row.first
            border = row.last - row.first - dense_end
            cut = min(max(at, border), to)
            parts = spans(at, cut, settings.stride) + spans(cut, to, settings.stride)
            # it never falls with the position, so equal ends say that it is constant
            ends = [call.temperature(row, position, settings) for position in (at, to - 1)]
            one = ends[0] if ends[0] == ends[1] else 1.0
            queries = slice(first - start, last - start)
            groups.append(RowGroup(slice(begin, end), queries, row.first, parts, one, border))
        varying += [ends[0] != ends[1]] * (end - begin)
        begin = end
    return groups, varying if any(varying) else []


def _query_factors(
    call: Call, positions: torch.Tensor, varying: list[bool], settings: LongContextConfig, device: torch.device
) -> torch.Tensor:
    """``f²`` of every query of the rows in which it is `varying`, shape (rows, tokens), float64; 1 in the others."""
    by_position = settings.attention_temperature == "position"
    prompts = [0 if by_position else min(row.last, call.prompt) - row.first for row in call.rows]
    if positions.shape[0] == 1 and len(set(zip(prompts, varying, strict=True))) == 1:
        prompts, varying = prompts[:1], varying[:1]
    exact = torch.float32 if device.type == "mps" else torch.float64
    lengths = torch.maximum(positions + 1, torch.tensor(prompts, device=device)[:, None]).to(exact)
    factor = temperature(lengths, settings.original_max_position_embeddings)
    return factor.where(torch.tensor(varying, device=device)[:, None], 1.0)
