"""Runs in progress, and the changes of a patch that wait for them.

A run must not lose half of its methods while it is under way. So a change waits until no other thread is in a run of
the modules that it is about, and runs that begin meanwhile wait for the change. A stock ``generate`` that was in
progress while its model was patched is noticed by the frames of its own thread, once it calls a patched forward, and
counts as a run from then on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FrameType

from torch import nn

from qwen_longctx.errors import PatchConflict

_A_LOOK = 0.01  # seconds between looks at a stock generate, which does not say when it ends


class _Change:
    """A change of the patch of some modules, or of the classes, which is about all modules."""

    def __init__(self, modules: Iterable[nn.Module] | None) -> None:
        self.modules = None if modules is None else {id(module) for module in modules}
        self.active = False

    def concerns(self, root: nn.Module) -> bool:
        """Whether it is about a module that a run of `root` calls."""
        if self.modules is None:
            return True
        return id(root) in self.modules or any(id(module) in self.modules for module in root.modules())

    def overlaps(self, other: _Change) -> bool:
        """Whether two changes are about the same modules."""
        if self.modules is None or other.modules is None:
            return True
        return not self.modules.isdisjoint(other.modules)


class _Traffic:
    """Who runs and who waits, guarded by one condition."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.roots: dict[int, list[nn.Module]] = {}  # by thread: the modules whose runs it is in, outermost first
        self.guests: dict[
            int, tuple[nn.Module, FrameType]
        ] = {}  # by thread: a stock generate that calls patched forwards
        self.changes: list[_Change] = []  # that wait or are being made

    def runs_of(self, thread: int) -> list[nn.Module]:
        """Modules whose runs a thread is in."""
        guest = self.guests.get(thread)
        if guest is not None and not _is_executing(guest[1]):
            del self.guests[thread]
            guest = None
        return self.roots.get(thread, []) + ([] if guest is None else [guest[0]])

    def is_free(self, change: _Change) -> bool:
        """Whether a change can be made now: no thread runs what it is about, and no other change is."""
        runs = [root for thread in {*self.roots, *self.guests} for root in self.runs_of(thread)]
        others = (other for other in self.changes if other.active and other is not change)
        return not any(map(change.concerns, runs)) and not any(map(change.overlaps, others))


_traffic = _Traffic()


def _forget() -> None:
    """Start anew in a forked process, which has one thread only."""
    global _traffic
    _traffic = _Traffic()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def running(root: nn.Module) -> Iterator[None]:
    """A run of a patched model; a thread's outermost run waits for changes that were asked for before it.

    Parameters
    ----------
    root : Module
        The module that was called.
    """
    traffic, thread = _traffic, get_ident()
    with traffic.condition:
        if thread not in traffic.roots and not traffic.runs_of(thread):
            traffic.condition.wait_for(lambda: not any(change.concerns(root) for change in traffic.changes))
            outer = _stock_generate(root)
            if outer is not None:
                traffic.guests[thread] = root, outer
        traffic.roots.setdefault(thread, []).append(root)
    try:
        yield
    finally:
        with traffic.condition:
            stack = traffic.roots[thread]
            stack.pop()
            if not stack:
                del traffic.roots[thread]
                if traffic.changes:
                    traffic.condition.notify_all()


@contextmanager
def changing(modules: Iterable[nn.Module] | None) -> Iterator[None]:
    """A change of the patch of `modules`, or with None of the classes: waits for runs of other threads.

    Raises
    ------
    PatchConflict
        The thread itself is in such a run.
    """
    traffic, change = _traffic, _Change(modules)
    with traffic.condition:
        _refuse_inside(traffic, change)
        traffic.changes.append(change)
        try:
            while not traffic.is_free(change):
                traffic.condition.wait(_A_LOOK if traffic.guests else None)
            change.active = True
        except BaseException:
            _end(traffic, change)
            raise
    try:
        yield
    finally:
        with traffic.condition:
            _end(traffic, change)


def _end(traffic: _Traffic, change: _Change) -> None:
    traffic.changes.remove(change)
    traffic.condition.notify_all()


def check_outside(modules: Iterable[nn.Module] | None) -> None:
    """Raise what `changing` would raise inside a run of the modules."""
    with _traffic.condition:
        _refuse_inside(_traffic, _Change(modules))


def _refuse_inside(traffic: _Traffic, change: _Change) -> None:
    if any(map(change.concerns, traffic.runs_of(get_ident()))):
        raise PatchConflict(
            "the patch of a model cannot be changed from inside a run of that model, by a hook or a callback: "
            "patch or unpatch it before the run or after it"
        )


def in_stock_generate() -> bool:
    """Whether the caller is part of a stock generate, which was in progress while its model was patched."""
    with _traffic.condition:
        _traffic.runs_of(get_ident())  # forgets one that has ended
        return get_ident() in _traffic.guests


def outermost() -> nn.Module | None:
    """The module whose run the caller's thread began with, if it is in one."""
    with _traffic.condition:
        return next(iter(_traffic.runs_of(get_ident())), None)


def alone() -> bool:
    """Whether no thread but the caller's is in a run."""
    with _traffic.condition:
        return not any(_traffic.runs_of(thread) for thread in {*_traffic.roots, *_traffic.guests} - {get_ident()})


def stock_forward(home: str) -> bool:
    """Whether the caller is part of a forward of a stock base model, which was in progress while it was patched.

    Parameters
    ----------
    home : str
        Name of transformers' module that defines the model.
    """
    for frame in _callers():
        of_model = frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == home
        if of_model and hasattr(frame.f_locals.get("self"), "rotary_emb"):
            return "dual_chunk" not in frame.f_locals.get("kwargs", {})
    return False


def _stock_generate(root: nn.Module) -> FrameType | None:
    """The frame in which the caller's thread generates with a model of which `root` is a part, unless it is patched."""
    for frame in _callers():
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            model = frame.f_locals.get("self")
            if model is root or getattr(model, "model", None) is root:
                return frame
    return None


def _callers() -> Iterator[FrameType]:
    """The frames of the caller's thread, innermost first. Those of other threads must not be walked: they change."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_executing(frame: FrameType) -> bool:
    try:
        frame.clear()  # lets go what an ended frame holds
    except RuntimeError:
        return True
    return False
