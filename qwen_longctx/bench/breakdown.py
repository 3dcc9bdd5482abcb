"""Where the seconds of a sparse prefill go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qwen_longctx.sparsity.observer import Observer


class Breakdown(Observer):
    """Seconds of a sparse prefill in its linear layers and in the stages that its cache reports, by events.

    Give it to the cache of the run as its observer. Linear layers are timed by forward hooks while the context is
    open. The events wait for nothing.

    Parameters
    ----------
    model : torch.nn.Module
    device : torch.device
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.kernel = ""  # that ran on the lists of the newest span
        self.marks: dict[str, list[tuple[Any, Any]]] = {}
        self._hooks: list[Any] = []
        self._start: Any = None

    def __enter__(self) -> Breakdown:
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._before_linear))
                self._hooks.append(module.register_forward_hook(self._after_linear))
        return self

    def __exit__(self, *error: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one piece of the work called `name`."""
        start = self._mark()
        yield
        self._note(name, start)

    def span(self, view: Any, selection: Any, record: Any) -> None:
        """Note which kernel a span ran on."""
        self.kernel = record.kernel

    def _before_linear(self, *call: Any) -> None:
        self._start = self._mark()  # one suffices: linear layers hold no linear layers

    def _after_linear(self, *call: Any) -> None:
        self._note("linear", self._start)

    def _note(self, part: str, start: Any) -> None:
        self.marks.setdefault(part, []).append((start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds by part, and the rest of `total`."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        parts = {
            part: sum(a.elapsed_time(b) / 1000 if cuda else b - a for a, b in marks)
            for part, marks in self.marks.items()
        }
        parts["rest"] = total - sum(parts.values())
        return {part: round(value, 4) for part, value in {**parts, "total": total}.items()}
