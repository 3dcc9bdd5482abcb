"""Runs in progress, and the changes of a patch that wait for them.

A run must not lose half of its methods while it is under way. So a change waits until no other thread is in a patched
run of the modules that it is about, and patched runs that begin meanwhile wait for the change. Runs of the stock model
know nothing of this: they are recognised by their frames, and end as they began.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FrameType

from torch import nn

from qwen_longctx.errors import PatchConflict

_LOOKS = 20  # at a thread, until it is not just in between two frames


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
        self.changes: list[_Change] = []  # that wait or are being made


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
        if thread not in traffic.roots and traffic.changes:
            traffic.condition.wait_for(lambda: not any(change.concerns(root) for change in traffic.changes))
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
            traffic.condition.wait_for(lambda: _is_free(traffic, change))
            change.active = True
        except BaseException:
            _end(traffic, change)
            raise
    try:
        yield
    finally:
        with traffic.condition:
            _end(traffic, change)


def check_outside(modules: Iterable[nn.Module] | None) -> None:
    """Raise what `changing` would raise inside a run of the modules."""
    with _traffic.condition:
        _refuse_inside(_traffic, _Change(modules))


def _refuse_inside(traffic: _Traffic, change: _Change) -> None:
    if any(change.concerns(root) for root in traffic.roots.get(get_ident(), ())):
        raise PatchConflict(
            "the patch of a model cannot be changed from inside a run of that model, by a hook or a callback: "
            "patch or unpatch it before the run or after it"
        )


def stock_runs(modules: Iterable[nn.Module]) -> list[FrameType]:
    """Frames of transformers in which any thread runs one of `modules` or generates with it."""
    roots = {id(module) for module in modules}
    return [frame for frame in _frames() if _is_stock_run(frame, roots)]


def _is_stock_run(frame: FrameType, roots: set[int]) -> bool:
    """Whether a frame is a stock ``forward`` or ``generate`` of one of `roots`, or a decorator around it."""
    names = frame.f_locals
    called = names.get("func")  # as the decorators of torch and transformers name what they wrap
    name = frame.f_code.co_name if called is None else getattr(called, "__name__", "")
    home = frame.f_globals.get("__name__") if called is None else getattr(called, "__module__", "")
    if name not in ("forward", "generate") or str(home).partition(".")[0] != "transformers":
        return False
    return id(names.get("self", next(iter(names.get("args", ())), None))) in roots


def stock_forward(home: str) -> bool:
    """Whether the caller is part of a forward of a stock base model, which was in progress while it was patched.

    Parameters
    ----------
    home : str
        Name of transformers' module that defines the model.
    """
    for frame in _callers(sys._getframe()):
        of_model = frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == home
        if of_model and hasattr(frame.f_locals.get("self"), "rotary_emb"):
            return "dual_chunk" not in frame.f_locals.get("kwargs", {})
    return False


def still_running(frames: list[FrameType]) -> list[FrameType]:
    """Those of `frames` that have not ended. What the others hold is let go."""
    return [frame for frame in frames if _is_running(frame)]


def _is_running(frame: FrameType) -> bool:
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return True
    return False


def is_within(frames: list[FrameType]) -> bool:
    """Whether the caller is called, directly or not, from one of `frames`."""
    known = set(map(id, frames))
    return any(id(frame) in known for frame in _callers(sys._getframe()))


def _frames() -> list[FrameType]:
    """The frames of all threads."""
    return [frame for thread in sys._current_frames() for frame in _stack(thread)]


def _stack(thread: int) -> list[FrameType]:
    """The frames of a thread, innermost first; it runs on meanwhile, and a generator that yields has no caller."""
    found: list[FrameType] = []
    for _ in range(_LOOKS):
        found = list(_callers(sys._current_frames().get(thread)))
        if not found or not found[-1].f_code.co_flags & inspect.CO_GENERATOR:
            break
    return found


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_free(traffic: _Traffic, change: _Change) -> bool:
    roots = [root for stack in traffic.roots.values() for root in stack]
    others = (other for other in traffic.changes if other.active and other is not change)
    return not any(map(change.concerns, roots)) and not any(map(change.overlaps, others))


def _end(traffic: _Traffic, change: _Change) -> None:
    traffic.changes.remove(change)
    traffic.condition.notify_all()
