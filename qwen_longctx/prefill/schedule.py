"""How a prompt is cut into chunks: of equal length on one device, of equal time where devices work on several at once.

While one device works on a chunk, the device before it works on the next. They wait for each other's slowest chunk, so
every chunk should take as long as the others: later ones see more keys and are therefore shorter. This is the dynamic
chunked pipeline parallelism of the Qwen2.5-1M report (section 5.3).

To use it, make a `Schedule` a prefill and take its chunks one after the other::

    cost = cost_of(shape, settings, rule)
    schedule = Schedule(cached, end, size=settings.prefill_chunk_size, stages=2, cost=cost)
    for start, stop in schedule:
        ...                                       # run the tokens [start, stop), counted in the cache
        schedule.measured(start, stop, seconds)   # with `fitted=True` only; may come some chunks late, or never

Without a measurement the cuts follow from the arguments alone, so that all processes, and all runs, cut alike. With
``fitted=True`` one process has to decide for all. Nothing here knows of devices, and nothing waits for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import torch

from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidValue

# tokens: chunks end at multiples, so that few lengths occur, for each of which cuDNN plans anew; short ones at least
# where blocks of sparse prefill end
MULTIPLE, BLOCK = 512, 128
SHORTEST = 2048  # tokens: matrix products of fewer leave a large GPU partly idle
# An H100: operations a second, of matrix products and of attention alike (bench linear, bench attention); and seconds a
# layer and chunk of any length, of the device (measuring recall reads all keys) and of the host that queues the work
_RATE = 6e14
_DENSE, _SPARSE = (0.5e-3, 1e-3), (2e-3, 6e-3)
# share of the keys that sparse prefill keeps of texts (docs/quality.md, docs/performance.md)
_KEPT = {"fast": 0.03, "balanced": 0.28, "careful": 0.45}
_KEPT_OF_COLUMNS = 0.05
_CANDIDATES = 32
_BISECTIONS = 40
_MEASURED = 8  # chunks by which a cost is fitted; those after them change it no more
_TOWARDS_PRIOR = 1e-3  # weight of what was expected, where chunks measured do not tell one parameter from another


class Measured(NamedTuple):
    """What a chunk took: its first position, its tokens, and seconds."""

    start: int
    length: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Seconds of a chunk: ``token · length + pair · length · keys + chunk``, keys being those that a query sees.

    Dense and sparse prefill follow the same law, with other numbers. All devices together take this time, and share it.

    Parameters
    ----------
    token : float
        Seconds a token: linear layers, norms.
    pair : float
        Seconds a pair of a query and a key before it: attention.
    chunk : float
        Seconds a chunk, whatever its length.
    host : float
        Seconds in which the host queues a chunk on all devices. It is one for all, and no chunk passes faster.

    Raises
    ------
    ValueError
        A number is negative or not finite, or `token` and `pair` are both 0, so that tokens take no time.
    """

    token: float
    pair: float
    chunk: float = 0.0
    host: float = 0.0

    def __post_init__(self) -> None:
        values = self.token, self.pair, self.chunk, self.host
        if not all(0 <= value < float("inf") for value in values) or not self.token + self.pair:
            raise InvalidValue(f"the cost of a chunk must be finite, not negative, and grow with tokens, got {values}")

    def seconds(self, start: int, length: int) -> float:
        """What a chunk of `length` tokens takes that begins at position `start`."""
        return length * (self.token + self.pair * _keys(start, length)) + self.chunk

    def length(self, start: float, seconds: float) -> float:
        """Tokens from position `start` on that take so many seconds; 0 if none do. The inverse of `seconds`."""
        left = seconds - self.chunk
        if left <= 0:
            return 0.0
        slope = self.token + self.pair * start
        # the root of pair / 2 · x² + slope · x = left, written so that nothing cancels and `pair` may be 0
        root = (slope * slope + 2 * self.pair * left) ** 0.5
        return 2 * left / (slope + root)

    @classmethod
    def fit(cls, measured: Sequence[Measured], prior: Cost) -> Cost:
        """The cost closest to what chunks took, least squares of relative errors, no number negative.

        Chunks of one length, or few of them, do not tell all numbers apart: what they leave open stays in the
        proportions of `prior`. Without measurements that is the result. The host's part is not measured.
        """
        known = [one for one in measured if one.seconds > 0 and one.length > 0]
        if not known:
            return prior
        parts = [[one.length, one.length * _keys(one.start, one.length), 1.0] for one in known]
        total = sum(one.seconds for one in known)
        scale = total / sum(prior.seconds(one.start, one.length) for one in known)
        unit = [total / sum(column) for column in zip(*parts, strict=True)]  # as if it were all of the time
        rows = [
            [part * each / one.seconds for part, each in zip(row, unit, strict=True)]
            for row, one in zip(parts, known, strict=True)
        ]
        wanted = [1.0] * len(rows)
        for i, expected in enumerate((prior.token, prior.pair, prior.chunk)):
            rows.append([_TOWARDS_PRIOR * (i == j) for j in range(3)])
            wanted.append(_TOWARDS_PRIOR * scale * expected / unit[i])
        found = _least_squares(torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64))
        token, pair, chunk = (value * each for value, each in zip(found, unit, strict=True))
        return cls(token, pair, chunk, prior.host) if token + pair > 0 else prior


def _keys(start: int, length: int) -> float:
    """Keys that a query of a chunk sees, on average."""
    return start + (length + 1) / 2


def _least_squares(rows: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """What fits best among numbers that are not negative: of so few, every choice of those above 0 is tried."""
    count = rows.shape[1]
    best, least = [0.0] * count, float("inf")
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = rows[:, chosen]
            found = torch.linalg.lstsq(part, wanted[:, None]).solution[:, 0]
            error = float((part @ found - wanted).square().sum())
            if bool((found >= 0).all()) and error < least:
                best, least = [0.0] * count, error
                for number, value in zip(chosen, found.tolist(), strict=True):
                    best[number] = value
    return best


def cost_of(shape: Shape, settings: LongContextConfig, rule: str | None) -> Cost:
    """The cost of a chunk worked out from a model's shape, the same wherever it runs.

    Only its proportions matter for the cuts. They are those of bf16 on an H100, see ``docs/several-devices.md``.

    Parameters
    ----------
    shape : Shape
    settings : LongContextConfig
    rule : str, optional
        Of sparse prefill; None is dense.
    """
    token, pair = operations(shape)
    kept = 1.0 if rule is None else _kept(settings, rule)
    chunk, host = _DENSE if rule is None else _SPARSE
    return Cost(token / _RATE, pair * kept / _RATE, shape.layers * chunk, shape.layers * host)


def operations(shape: Shape) -> tuple[int, int]:
    """Operations of all layers: for a token in linear layers, and for a pair of a query and a key in attention."""
    heads = shape.heads * shape.head_dim
    projections = 2 * shape.hidden * (heads + shape.kv_heads * shape.head_dim)
    inner = 3 * shape.hidden * shape.intermediate  # which of all experts of a token together is as wide
    return 2 * (projections + inner) * shape.layers, 4 * heads * shape.layers


def planned(start: int, end: int, settings: LongContextConfig, shape: Shape, stages: int, rule: str | None) -> Schedule:
    """The chunks that the setting `pipeline` asks for. Arguments as of `Schedule` and `cost_of`."""
    kind = settings.pipeline
    cost = cost_of(shape, settings, rule) if kind in ("auto", "measured") else None
    return Schedule(start, end, settings.prefill_chunk_size, stages, cost, fitted=kind == "measured")


def _kept(settings: LongContextConfig, rule: str) -> float:
    if rule == "vertical_slash":
        return _KEPT_OF_COLUMNS
    return settings.density if settings.density is not None else _KEPT[settings.fidelity]


@dataclass
class Schedule:
    """The chunks of one prefill. Iterate once.

    Parameters
    ----------
    start, end : int
        Index in the cache of the first token, and of the one after the last.
    size : int
        Tokens of the longest chunk, ``prefill_chunk_size``. No chunk is longer: memory is planned with it.
    stages : int
        Devices that work at once. On one, all chunks but the last have `size` tokens.
    cost : Cost, optional
        Without one all chunks but the last have `size` tokens.
    fitted : bool
        Whether the cost is fitted to the first chunks that are `measured`.

    Attributes
    ----------
    chunks : list of tuple of int
        Those handed out so far, first index and the one after the last.
    """

    start: int
    end: int
    size: int
    stages: int = 1
    cost: Cost | None = None
    fitted: bool = False
    chunks: list[tuple[int, int]] = field(default_factory=list)
    _seen: list[Measured] = field(default_factory=list, repr=False)
    _fresh: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end or self.size < 1 or self.stages < 1:
            raise InvalidValue(
                "a schedule needs 0 <= start <= end, and a size and stages of at least 1, got "
                f"start={self.start}, end={self.end}, size={self.size}, stages={self.stages}"
            )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        at, ends = self.start, self._cut(self.start)
        while at < self.end:
            if self._fresh:
                self._fresh, ends = False, self._cut(at)
            stop = ends.pop(0)
            self.chunks.append((at, stop))
            yield at, stop
            at = stop

    def measured(self, start: int, stop: int, seconds: float) -> None:
        """Note what a chunk took, on the slowest stage or on all together; heeded where the cost is `fitted`.

        The first chunk of a prefill is not heeded: it compiles kernels and takes memory.
        """
        if self.fitted and start > self.start and len(self._seen) < _MEASURED:
            self._seen.append(Measured(start, stop - start, seconds))
            self._fresh = True

    def _cut(self, start: int) -> list[int]:
        if self.cost is None or self.stages == 1:
            return _equal(start, self.end, self.size)
        return ends(start, self.end, size=self.size, stages=self.stages, cost=Cost.fit(self._seen, self.cost))


def ends(start: int, end: int, *, size: int, stages: int, cost: Cost) -> list[int]:
    """Where chunks of equal time end, the last at `end`: as many of them as make the whole the shortest.

    Chunks that would take longer than `size` tokens do are cut there, and take less time. All but the last end at a
    multiple of `MULTIPLE`, as far as `size` allows. Arguments as of `Schedule`.

    On `stages` stages that share each chunk's time evenly, chunks of times ``t`` take ``(sum(t) + (stages - 1) ·
    max(t)) / stages``, and none passes faster than the host queues it: fewer chunks keep the devices waiting at the
    beginning and the end, more take time themselves.
    """
    if end - start <= min(size, SHORTEST):
        return _equal(start, end, size)
    cutter = _Cutter(start, end, size, cost)
    shortest, longest = cutter.times(min(size, SHORTEST))
    factor = (longest / shortest) ** (1 / (_CANDIDATES - 1))
    candidates = [cutter.at(shortest * factor**i) for i in range(_CANDIDATES)]
    best = min(candidates, key=lambda one: (cutter.total(one, stages), len(one)))
    # the least time for as many chunks: the last one is then as long as the others
    low, high = shortest / 2, longest
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if len(cutter.at(middle)) <= len(best) else (middle, high)
    evened = cutter.at(high)
    return min(evened, best, key=lambda one: cutter.total(one, stages))


class _Cutter(NamedTuple):
    """Cuts the tokens of a prefill by a time, see `ends`."""

    start: int
    end: int
    size: int
    cost: Cost

    def times(self, shortest: int) -> tuple[float, float]:
        """Seconds of the cheapest chunk of `shortest` tokens, and of the dearest one."""
        last = max(self.start, self.end - self.size)
        return self.cost.seconds(self.start, shortest), self.cost.seconds(last, min(self.size, self.end - last))

    def at(self, seconds: float) -> list[int]:
        """Ends of chunks that take so many seconds each. What rounding takes from one the next one gets."""
        multiple = next((one for one in (MULTIPLE, BLOCK) if self.size >= 2 * one), 1)
        most = self.size - self.size % multiple
        least = min(SHORTEST, most)
        found: list[int] = []
        at, exact = self.start, float(self.start)
        while self.end - at > self.size or exact + self.cost.length(exact, seconds) < self.end:
            exact += max(self.cost.length(exact, seconds), least)
            exact = min(exact, (at - at % multiple) + most)
            stop = int(exact) // multiple * multiple
            if stop <= at:  # a first position just before a multiple
                stop = at + multiple - at % multiple
                exact = max(exact, float(stop))
            if stop >= self.end:
                break
            found.append(stop)
            at = stop
        return self._evened([*found, self.end], multiple)

    def _evened(self, found: list[int], multiple: int) -> list[int]:
        """With a last chunk that is not tiny: it and the one before share their tokens."""
        before = [self.start, *found]
        if len(found) < 2 or 2 * (found[-1] - found[-2]) >= found[-2] - before[-3]:
            return found
        middle = (before[-3] + found[-1]) // 2
        return [*found[:-2], max(middle - middle % multiple, found[-1] - self.size), found[-1]]

    def total(self, found: list[int], stages: int) -> float:
        """Seconds until the last stage has done the last chunk, see `ends`."""
        starts = [self.start, *found[:-1]]
        seconds = [self.cost.seconds(first, stop - first) for first, stop in zip(starts, found, strict=True)]
        each = [max(one / stages, self.cost.host) for one in seconds]
        return sum(each) + (stages - 1) / stages * max(seconds)


def _equal(start: int, end: int, size: int) -> list[int]:
    return [*range(start + size, end, size), end] if end > start else []
