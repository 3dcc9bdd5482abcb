"""The schedule of a prefill: which tokens pass at a time, with a progress bar and a record of the cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging

from qwen_longctx.kv.hf_cache import LongContextCache


def chunks(tokens: int, size: int, cache: object, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of every chunk of a prompt, in order.

    Parameters
    ----------
    tokens : int
        Tokens of the prompt that are not cached yet.
    size : int
        Tokens a chunk.
    cache : transformers Cache
        Gets the record if it is a `LongContextCache`.
    device : torch.device
        Waited for before the clock is read.
    """
    begin = time.perf_counter()
    visible = tokens > size and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    bar = transformers_logging.tqdm(total=tokens, desc="Prefill", unit="tok", leave=False, disable=not visible)
    with bar:
        for start in range(0, tokens, size):
            stop = min(start + size, tokens)
            yield start, stop
            bar.update(stop - start)
    if isinstance(cache, LongContextCache):
        _record(cache, tokens, begin, device)


def _record(cache: LongContextCache, tokens: int, begin: float, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        cache.peak_memory_bytes = torch.cuda.max_memory_allocated(device)
    cache.prefill_tokens += tokens
    cache.prefill_seconds += time.perf_counter() - begin
