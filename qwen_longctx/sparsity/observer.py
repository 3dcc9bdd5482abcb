"""For whoever wants to watch sparse prefill: to time its stages, or to see what is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from qwen_longctx.sparsity.record import SpanRecord
from qwen_longctx.sparsity.view import Selection, SpanView

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Observer:
    """Is told what sparse prefill does. All methods do nothing: override those that you want.

    Give one to a cache, ``LongContextCache(observer=...)``, and run a patched model on that cache.
    """

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """A context manager that is open while one stage of the work runs. Stages are never open in each other.

        Parameters
        ----------
        name : {"selection", "attention", "recall", "merge"}
            Choosing blocks and making lists of them; attention over the lists and over single keys; the log-sum-exp of
            the last queries over all keys; joining the results of the segments.
        """
        return _NOTHING

    def span(self, view: SpanView, selection: Selection, record: SpanRecord) -> None:
        """Called after each sparse span of each layer, but not after the trials of a first budget.

        `view` and `selection` are those of the span; they hold tensors of the run, so keep only what you need.
        """


NOBODY = Observer()
