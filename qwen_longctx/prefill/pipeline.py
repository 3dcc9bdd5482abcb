"""Chunks of one prefill on several devices: while a device works on a chunk, the one before it works on the next.

The host queues a chunk on all devices, one after another, and goes on with the next chunk: devices work at the same
time because nobody waits for them. One thread does it all, so that grad mode, autocast, interruptions and errors are
those of a plain loop. Two things would make a device wait for another without need, and are taken care of here:

- PyTorch copies from device to device on the computing streams of both. Here hidden states, tables and whatever else a
  layer is given cross on streams of their own, once a chunk; accelerate finds them where it would have moved them.
- A host that waits within a chunk queues nothing. What does wait is told in the report, see `waits`.

The host is at most one chunk more ahead than there are devices, which bounds the hidden states on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn

from qwen_longctx.geometry.layout import Layout
from qwen_longctx.ops.device import device_of
from qwen_longctx.prefill.schedule import Schedule

Moved = dict[int, tuple[Any, Any]]  # by identity: tensors and layouts as they were given, and where they are needed


class Stage(NamedTuple):
    """Layers `first` to `stop` - 1, which lie on one device and follow one another."""

    device: torch.device
    first: int
    stop: int


def stages_of(layers: Sequence[nn.Module]) -> tuple[Stage, ...]:
    """The layers of a model by device, in order."""
    stages: list[Stage] = []
    for number, layer in enumerate(layers):
        device = device_of(layer)
        if stages and stages[-1].device == device:
            stages[-1] = stages[-1]._replace(stop=number + 1)
        else:
            stages.append(Stage(device, number, number + 1))
    return tuple(stages)


def why_not(stages: Sequence[Stage], base: nn.Module) -> str:
    """Why devices cannot work on several chunks at once; empty if they can. Of one device nothing is to be said."""
    devices = [stage.device for stage in stages]
    others = [device for device in devices if device.type != "cuda"]
    if others:
        return f"layers lie on {others[0]}"
    if len(set(devices)) < len(devices):
        return f"layers of {next(d for d in devices if devices.count(d) > 1)} do not follow one another"
    if any(_offloaded(layer) for layer in base.layers):  # type: ignore[union-attr, arg-type]
        return "weights are offloaded, and the host waits for each layer's"
    norm = device_of(base.norm)  # type: ignore[arg-type]
    return "" if norm == devices[-1] else f"the last layer lies on {devices[-1]} and the norm behind it on {norm}"


def most_under_way(stages: Sequence[Any]) -> int:
    """Chunks that are queued and not done at most: one for each device, and one for which none has to wait."""
    return len(stages) + 1


def _offloaded(layer: nn.Module) -> bool:
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    return any(getattr(one, "offload", False) for hook in hooks for one in getattr(hook, "hooks", (hook,)))


class Streams:
    """Where nothing runs beside the host, on the CPU: every method does its work, and there is nothing to wait for.

    Parameters
    ----------
    stages : sequence of Stage
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages

    def mark(self, stage: int) -> Any:
        """A point in the work queued for a stage: all that is queued so far."""
        return None

    def wait(self, mark: Any) -> None:
        """Let the host wait for a point."""

    def seconds(self, first: Any, last: Any) -> float | None:
        """Seconds between two points that have passed; None where nobody knows."""
        return None

    def enter(self, stage: int) -> None:
        """What is queued from now on is work of a stage."""

    def carry(self, stage: int, move: Callable[[torch.device], list[torch.Tensor]]) -> Any:
        """Move tensors to a stage from the one before, as ``move(device)`` does, which returns them.

        Returns
        -------
        A point behind the copies, for `release`.
        """
        move(self.stages[stage].device)
        return None

    def release(self, stage: int, copied: Any) -> None:
        """What a stage does from now on may take the memory of tensors that were carried out of it."""

    def close(self) -> None:
        """What is queued from now on comes behind all stages, where that does not follow by itself."""


class CudaStreams(Streams):
    """Copies on streams of their own, beside the computing ones, which are those that the caller's thread works on.

    Stages on one device, as tests have them, compute on streams of their own.

    Parameters
    ----------
    stages : sequence of Stage
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__(stages)
        self._out = [_beside(stage.device, "out") for stage in stages]
        self._in = [_beside(stage.device, "in") for stage in stages]
        self._own: list[Any] = []
        if len({stage.device for stage in stages}) < len(stages):
            self._own = [torch.cuda.Stream(stage.device) for stage in stages]
            self._before = torch.cuda.current_stream(stages[0].device)
            for stream in self._own:
                stream.wait_stream(self._before)

    def _computing(self, stage: int) -> Any:
        return self._own[stage] if self._own else torch.cuda.current_stream(self.stages[stage].device)

    def mark(self, stage: int) -> Any:
        """See `Streams.mark`."""
        with torch.cuda.device(self.stages[stage].device):
            event = torch.cuda.Event(enable_timing=True, blocking=True)
            event.record(self._computing(stage))
        return event

    def wait(self, mark: Any) -> None:
        """See `Streams.wait`."""
        mark.synchronize()

    def seconds(self, first: Any, last: Any) -> float | None:
        """See `Streams.seconds`."""
        return first.elapsed_time(last) / 1000

    def enter(self, stage: int) -> None:
        """See `Streams.enter`."""
        if self._own:
            torch.cuda.set_stream(self._own[stage])

    def carry(self, stage: int, move: Callable[[torch.device], list[torch.Tensor]]) -> Any:
        """See `Streams.carry`. A copy between devices takes the current streams of both."""
        out, into, computing = self._out[stage - 1], self._in[stage], self._computing(stage)
        out.wait_stream(self._computing(stage - 1))
        with torch.cuda.stream(out), torch.cuda.stream(into):
            moved = move(self.stages[stage].device)
            into.wait_stream(out)
            copied = into.record_event()
        computing.wait_event(copied)
        for tensor in moved:
            tensor.record_stream(computing)  # its memory is that of another stream
        return copied

    def release(self, stage: int, copied: Any) -> None:
        """See `Streams.release`: the computing stream waits for copies that were made long before."""
        self._computing(stage).wait_event(copied)

    def close(self) -> None:
        """See `Streams.close`."""
        if self._own:
            torch.cuda.set_stream(self._before)
            torch.cuda.synchronize(self.stages[0].device)


@lru_cache
def _beside(device: torch.device, way: str) -> Any:
    """The stream for copies out of a device or into it. Memory that one stream has used is of little use to another."""
    return torch.cuda.Stream(device)


@dataclass
class _Chunk:
    """A chunk that is queued, and when each stage begins and ends it."""

    start: int
    stop: int
    begins: list[Any] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)


class Pipeline:
    """The devices of one prefill, and the chunks that are under way on them.

    Parameters
    ----------
    layers : sequence of Module
        Of the model. They are hooked while the run is `open`, and act for the thread that opened it alone.
    stages : sequence of Stage
    schedule : Schedule
    streams : Streams, optional

    Attributes
    ----------
    most : int
        Chunks that are queued and not done, at most.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        stages: Sequence[Stage],
        schedule: Schedule,
        streams: Streams | None = None,
    ) -> None:
        self.stages, self.schedule, self.most = tuple(stages), schedule, most_under_way(stages)
        cuda = all(stage.device.type == "cuda" for stage in stages)
        self._streams = streams or (CudaStreams(stages) if cuda else Streams(stages))
        self._layers = layers
        self._flying: deque[_Chunk] = deque()
        self._stage, self._thread = 0, get_ident()
        self._here: Moved = {}  # what the layers of the stage are given
        self._sources: dict[int, tuple[Any, Any]] = {}  # by stage: what was carried out of it, and the point behind it

    @contextmanager
    def open(self) -> Iterator[None]:
        """Layers of later devices are handed what they need by this pipeline while the block runs."""
        with ExitStack() as stack:
            stack.callback(self._close)
            for stage in range(len(self.stages)):
                for number in range(self.stages[stage].first, self.stages[stage].stop):
                    handle = self._layers[number].register_forward_pre_hook(self._hook(stage), with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The chunks of the schedule, each when the host may queue it."""
        for start, stop in self.schedule:
            while len(self._flying) >= self.most:
                self._land(self._flying.popleft())
            self._take_off(start, stop)
            yield start, stop
            self._flying[-1].ends.append(self._streams.mark(self._stage))

    def _take_off(self, start: int, stop: int) -> None:
        self._stage, self._here = 0, {}
        self._streams.enter(0)
        self._flying.append(_Chunk(start, stop, [self._streams.mark(0)]))

    def _land(self, chunk: _Chunk) -> None:
        """Wait until a chunk is done, and note how long the stages worked on it."""
        self._streams.wait(chunk.ends[-1])
        took = [self._streams.seconds(*marks) for marks in zip(chunk.begins, chunk.ends, strict=True)]
        if None not in took:
            self.schedule.measured(chunk.start, chunk.stop, sum(took))  # type: ignore[arg-type]

    def _close(self) -> None:
        """Nothing of the run is kept, and copies that are under way are not overtaken; also after an error."""
        for stage, (_, copied) in self._sources.items():
            self._streams.release(stage, copied)
        self._sources, self._here = {}, {}
        self._flying.clear()
        self._streams.close()

    def _hook(self, stage: int) -> Callable[..., Any]:
        def given(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            if get_ident() != self._thread or not self._flying:
                return None
            passing = self._cross(stage, args, kwargs) if stage != self._stage else {}
            if stage == 0:
                return None
            known = {**self._here, **passing}
            return _replaced(args, known), _replaced(kwargs, known)

        return given

    def _cross(self, stage: int, args: Any, kwargs: Any) -> Moved:
        """Hand a chunk on from the stage before: what its layers are given is moved there, once for all of them.

        Returns the hidden states, which the first of these layers alone is given.
        """
        streams, before, held = self._streams, stage - 1, self._here
        chunk = self._flying[-1]
        chunk.ends.append(streams.mark(before))
        if before in self._sources:
            streams.release(before, self._sources.pop(before)[1])
        hidden = args[0] if args else kwargs["hidden_states"]
        passing: Moved = {}

        def move(device: torch.device) -> list[torch.Tensor]:
            passing[id(hidden)] = hidden, _to(device, hidden)
            # those from the first stage on come along, from where they are now
            self._here = {key: (old, _to(device, now)) for key, (old, now) in held.items()}
            for one in _leaves((args, kwargs)):
                if one is not hidden and id(one) not in self._here:
                    self._here[id(one)] = one, _to(device, one)
            return [x for _, now in (*passing.values(), *self._here.values()) for x in _tensors(now)]

        copied = streams.carry(stage, move)
        self._sources[before] = (held, args, kwargs), copied
        self._stage = stage
        streams.enter(stage)
        chunk.begins.append(streams.mark(stage))
        return passing


def _leaves(given: Any) -> Iterator[Any]:
    """Tensors and layouts among arguments."""
    if isinstance(given, (torch.Tensor, Layout)):
        yield given
    elif type(given) in (dict, list, tuple):
        for value in given.values() if isinstance(given, dict) else given:
            yield from _leaves(value)


def _replaced(given: Any, known: Moved) -> Any:
    """The same arguments, with those in place of which others are known."""
    if isinstance(given, (torch.Tensor, Layout)):
        return known[id(given)][1] if id(given) in known else given
    if type(given) is dict:
        return {name: _replaced(value, known) for name, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(_replaced(value, known) for value in given)
    return given


def _to(device: torch.device, one: Any) -> Any:
    return one.to(device, non_blocking=True)


def _tensors(one: Any) -> list[torch.Tensor]:
    return [one] if isinstance(one, torch.Tensor) else one.tensors()


def running(pipeline: Pipeline | None) -> Any:
    """`Pipeline.open`, if there is one."""
    return nullcontext() if pipeline is None else pipeline.open()
