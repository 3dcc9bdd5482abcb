"""Seconds of calls, by CUDA events where there is CUDA, and of the tokens of a generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, by CUDA events where there is CUDA."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000


def interleaved(functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every function, taken in turns after one warm-up of each, so that drift hits all alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return times


class Clock(BaseStreamer):
    """A streamer that times the tokens of a generate, each of which is on the host when it counts."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by generate with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate at the end."""

    def first(self) -> float:
        """Seconds from the beginning of generate to the first token."""
        return self.times[1] - self.times[0]

    def seconds(self) -> list[float]:
        """Of all tokens but the first."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]
