"""One call of a model as a transaction: cut into chunks, shown, timed, and committed to the cache or rolled back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from qwen_longctx.config import LongContextConfig
from qwen_longctx.geometry.layout import Call, Mode
from qwen_longctx.kv.sequence import Sequence, sequence_of, transaction
from qwen_longctx.prefill.pipeline import Pipeline, running
from qwen_longctx.prefill.schedule import Schedule


@dataclass(frozen=True)
class Run:
    """What all forwards of one call share.

    Attributes
    ----------
    call : Call
    settings : LongContextConfig
        Read once, before the first chunk.
    mode : {"train", "prefill", "decode"}
    cache : transformers Cache, optional
    device : torch.device
        Of the inputs.
    weights : bool
        Attention weights are asked for.
    sparse : sparsity.Request, optional
    model : torch.nn.Module, optional
        The base model.
    trusted : bool
        The call is a token of a `generate` in progress, behind others of it.
    new_cache : bool
        The cache was made for the call.
    pipeline : Pipeline, optional
        Several devices work on the chunks at once.
    """

    call: Call
    settings: LongContextConfig
    mode: Mode
    cache: Any
    device: torch.device
    weights: bool = False
    sparse: Any = None
    model: Any = None
    trusted: bool = False
    new_cache: bool = False
    pipeline: Pipeline | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the call adds."""
        return self.call.end - self.call.cached

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the first index and the one after the last, in the cache, of every chunk of the prefill, in order.

        A progress bar shows where the terminal or notebook is watched and there is more than one chunk.
        """
        size = self.settings.prefill_chunk_size
        chunks = Schedule(self.call.cached, self.call.end, size) if self.pipeline is None else self.pipeline.chunks()
        with bar(self.tokens, hidden=self.tokens <= size) as shown:
            for start, stop in chunks:
                yield start, stop
                shown.update(stop - start)

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Commit what the block appends to the cache and record its cost; roll back if it fails or is interrupted."""
        if self.cache is None:
            yield
            return
        with transaction(self.cache, self.settings, self.call.origins, self.model):
            state = sequence_of(self.cache)
            tokens = self._tokens_of_prompt(state.prompt_end)
            with _recorded(state, tokens, self.device) if tokens else nullcontext():
                with running(self.pipeline):
                    yield
                if self.sparse is not None:
                    self.sparse.state.check()

    def _tokens_of_prompt(self, end: int | None) -> int:
        """Tokens of this call that are of a prompt, not new ones or drafts; `end` is that of the sequence's prompt."""
        if end is not None:
            return max(0, min(end, self.call.end) - self.call.cached)
        return 0 if self.mode == "decode" and self.call.cached else self.tokens


def bar(tokens: int, hidden: bool) -> Any:
    """A progress bar over the tokens of a prefill, where the terminal or notebook is watched."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return _tqdm()(total=tokens, desc="Prefill", unit="tok", leave=False, disable=hidden or not watched)


def _tqdm() -> Any:
    """The tqdm of transformers where that is loaded: it honours ``disable_progress_bar()``."""
    logging = sys.modules.get("transformers.utils.logging")
    return tqdm if logging is None else logging.tqdm


@contextmanager
def _recorded(state: Sequence, tokens: int, device: torch.device) -> Iterator[None]:
    """Add tokens, seconds and peak memory of the block to the record of a sequence. Resets CUDA's peak statistics."""
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    for one in cuda:
        torch.cuda.reset_peak_memory_stats(one)
    begin = time.perf_counter()
    yield
    for one in cuda:
        torch.cuda.synchronize(one)
    state.prefill_tokens += tokens
    state.prefill_seconds += time.perf_counter() - begin
    if cuda:
        state.peak_memory_bytes = max(state.peak_memory_bytes, *(torch.cuda.max_memory_allocated(one) for one in cuda))
