"""Where the seconds of a sparse prefill go."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from qwen_longctx.ops import fp8, norm, rotate
from qwen_longctx.sparsity.observer import Observer

# functions outside of the stages that a cache reports, by the part they count for. They are replaced, and no layer is
# hooked: a layer that somebody looks at gets its input as it is, not in 8 bits
_FUNCTIONS: tuple[tuple[str, Any, str], ...] = (
    ("linear", nn.functional, "linear"),
    ("linear", fp8, "product"),
    ("cast", fp8, "cast_rows"),
    ("swiglu", fp8, "silu_mul_rows"),
    ("swiglu", norm, "silu_mul"),
    *(("norm", norm, f"{kind}rms_norm") for kind in ("", "add_", "short_")),
    *(("norm", norm, f"{kind}rms_norm_rows") for kind in ("", "add_")),
    ("rotation", rotate, "rotate"),
)


class Breakdown(Observer):
    """Seconds of a sparse prefill by part, by events: the stages that its cache reports, and `_FUNCTIONS`.

    Give it to the cache of the run as its observer, and run inside its context. "linear" are the products alone, "norm"
    holds the residuals and casts of one pass with it, "cast" what is cast by itself. The events wait for nothing.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kernel = ""  # that ran on the lists of the newest span
        self.marks: dict[str, list[tuple[Any, Any]]] = {}
        self._stack = ExitStack()
        self._open = False  # what runs inside a part counts for it

    def __enter__(self) -> Breakdown:
        for part, module, name in _FUNCTIONS:
            self._stack.enter_context(mock.patch.object(module, name, self._timed(part, getattr(module, name))))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(part):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one piece of the work called `name`."""
        if self._open:
            yield
            return
        self._open = True
        start = self._mark()
        try:
            yield
        finally:
            self._open = False
        self._note(name, start)

    def span(self, view: Any, selection: Any, record: Any) -> None:
        """Note which kernel a span ran on."""
        self.kernel = record.kernel

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
