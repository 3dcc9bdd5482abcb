"""Activations that wait for the backward, in the host's memory.

A layer's input is needed again when the layer is recomputed. Until then it lies in pinned memory of the host; both
copies run on a stream of their own beside the computation, and what is needed next is brought back ahead of time.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

_AHEAD = 4  # tensors that are on their way back: those of a layer
_LEAVING = 3  # tensors that are on their way to the host
_LEAST = 1 << 20  # bytes: smaller tensors stay


class _Waiting:
    """One tensor on the host, and on its way back; `whole` is it on the device."""

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        self.host: torch.Tensor | None = host
        self.device = device
        self.whole: torch.Tensor | None = None
        self.arrived: Any = None


class Offload:
    """Exchanges tensors for handles, and back in the reverse order.

    Parameters
    ----------
    device : torch.device
        Where the tensors live. On a CPU the copies are made too, one after the other.
    least : int
        Bytes from which on a tensor leaves the device.
    """

    def __init__(self, device: torch.device, least: int = _LEAST) -> None:
        self._on_gpu, self._least = device.type == "cuda", least
        self._stream: Any = torch.cuda.Stream(device) if self._on_gpu else None
        self._order: list[_Waiting] = []
        self._leaving: deque[tuple[torch.Tensor, Any]] = deque()

    def hooks(self) -> Any:
        """A context within which everything that autograd keeps is exchanged."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, self.bring)

    def keep(self, x: torch.Tensor) -> torch.Tensor | _Waiting:
        """A handle in place of `x`, or `x` itself if it is small or no activation."""
        if x.nbytes < self._least or isinstance(x, torch.nn.Parameter) or not x.is_contiguous():
            return x
        x = x.detach()
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._on_gpu)
        if self._on_gpu:
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self._stream):
                host.copy_(x, non_blocking=True)
                self._leaving.append((x, self._stream.record_event()))
            self._let_go(_LEAVING)
        else:
            host.copy_(x)
        waiting = _Waiting(host, x.device)
        self._order.append(waiting)
        return waiting

    def bring(self, handle: torch.Tensor | _Waiting) -> torch.Tensor:
        """What `keep` took; the tensors that were kept before it follow on their own."""
        if isinstance(handle, torch.Tensor):
            return handle
        self._let_go(0)
        if handle.whole is None:
            self._fetch(handle)
        if handle in self._order:
            del self._order[self._order.index(handle) :]
        for waiting in self._order[-_AHEAD:][::-1]:
            if waiting.whole is None:
                self._fetch(waiting)
        if handle.arrived is not None:
            torch.cuda.current_stream(handle.device).wait_event(handle.arrived)
        assert handle.whole is not None
        whole, handle.whole, handle.arrived = handle.whole, None, None
        return whole

    def _let_go(self, most: int) -> None:
        """Free what has left, up to the last few.

        The computation waits for their copies: it must not write where they still read. `record_stream` would do
        without waiting, and keep memory from being used again for as long as the host runs ahead.
        """
        while len(self._leaving) > most:
            x, left = self._leaving.popleft()
            torch.cuda.current_stream(x.device).wait_event(left)

    def _fetch(self, waiting: _Waiting) -> None:
        """Start bringing one tensor back."""
        assert waiting.host is not None
        whole = torch.empty(waiting.host.shape, dtype=waiting.host.dtype, device=waiting.device)
        if self._on_gpu:
            self._stream.wait_stream(torch.cuda.current_stream(waiting.device))
            with torch.cuda.stream(self._stream):
                whole.copy_(waiting.host, non_blocking=True)
                waiting.arrived = self._stream.record_event()
        else:
            whole.copy_(waiting.host)
        waiting.whole = whole
