"""Stands in for CUDA's streams and events, runs nothing, and knows of any two pieces of work which must come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Machine:
    """Devices with streams. Work happens on the current stream of a device; the host gives all of it out in order.

    Each stream counts its work. The clock of a piece of work says how much of every stream must be done before it.
    """

    def __init__(self) -> None:
        self.current: dict[torch.device, Stream] = {}
        self.host: dict[int, int] = {}
        self.done: dict[Any, tuple[int, dict[int, int]]] = {}  # by name: stream, and clock

    def work(self, device: torch.device, name: Any) -> None:
        """Give out a piece of work, on the current stream of a device."""
        stream = self.stream_of(device)
        stream.join(self.host)
        stream.clock[id(stream)] = stream.clock.get(id(stream), 0) + 1
        self.done[name] = id(stream), dict(stream.clock)

    def must_precede(self, first: Any, second: Any) -> bool:
        """Whether `second` cannot begin before `first` has ended."""
        stream, clock = self.done[first]
        return self.done[second][1].get(stream, 0) >= clock[stream]

    def copy(self, source: torch.device, target: torch.device, name: Any) -> None:
        """What PyTorch does to copy between devices: the current streams of both wait for each other."""
        out, into = self.stream_of(source), self.stream_of(target)
        out.join(into.clock)
        self.work(source, name)
        into.join(out.clock)

    def stream_of(self, device: torch.device) -> Stream:
        return self.current.setdefault(device, Stream(device, self))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """``torch.cuda.stream``."""
        before = self.stream_of(stream.device)
        self.current[stream.device] = stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    def install(self, monkeypatch: Any) -> None:
        """Stand in for torch.cuda until the end of the test."""
        kept: list[Any] = []  # their ids are names

        def stream(device: torch.device) -> Stream:
            kept.append(Stream(device, self))
            return kept[-1]

        @contextmanager
        def device(one: torch.device) -> Iterator[None]:
            yield

        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(self))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", self.stream_of)
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


class Stream:
    def __init__(self, device: torch.device, machine: Machine) -> None:
        self.device, self.machine = device, machine
        self.clock: dict[int, int] = {}

    def join(self, clock: dict[int, int]) -> None:
        for stream, count in clock.items():
            self.clock[stream] = max(count, self.clock.get(stream, 0))

    def wait_stream(self, other: Stream) -> None:
        self.join(other.clock)

    def wait_event(self, event: Event) -> None:
        self.join(event.clock)

    def record_event(self) -> Event:
        event = Event(self.machine)
        event.record(self)
        return event


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.clock = machine, {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        for stream, count in self.clock.items():
            self.machine.host[stream] = max(count, self.machine.host.get(stream, 0))

    def elapsed_time(self, other: Event) -> float:
        return 1000.0
