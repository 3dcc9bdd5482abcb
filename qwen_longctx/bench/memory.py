"""Peaks of memory of prefills under several settings, beside what the plan says of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from transformers import Qwen2ForCausalLM

from qwen_longctx import LongContextCache, memory, patched_qwen
from qwen_longctx.bench.shapes import NAMES, random_model
from qwen_longctx.bench.speed import check_lengths, sparse_settings
from qwen_longctx.bench.timing import timed
from qwen_longctx.patches.method import cache_argument

LENGTHS = (131072, 262144, 1_000_000)
_EVERY_RUN_UP_TO = 131072  # tokens; longer prompts run once or twice
_ONE_RUN_FROM = 524288
_DENSE = {"sparse": "off"}


class _Run(NamedTuple):
    """One prefill: `rows` prompts, which share the tokens of a length."""

    settings: dict[str, Any]
    rows: int = 1


@torch.no_grad()
def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    shape: str = NAMES[0],
    kv_cache: str | None = None,
    linear: str | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each prefill: what `qwen_longctx.memory.plan` says, the measured peak of allocated bytes, seconds.

    Prompts are random, and so are the weights. Sparse runs keep a fixed share of the blocks, see ``bench.speed``.
    Every run is made on one layer before, so that seconds hold no compilation. Peaks are counted on CUDA devices only.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
    tiny : bool
        A toy shape.
    shape : str
        Of the model, see ``bench.shapes.NAMES``.
    kv_cache, linear : str, optional
        Make one sparse run of each length, under these settings of those names; without both, several kinds of runs
        up to 131,072 tokens, two up to 524,288, and one beyond.

    Raises
    ------
    InvalidValue
        A length is too short for sparse prefill.
    """
    check_lengths("memory", lengths)
    model = random_model(device, tiny, shape=shape)
    asked = {name: value for name, value in (("kv_cache", kv_cache), ("linear", linear)) if value is not None}
    for length in lengths:
        for run in [_Run({**sparse_settings(length), **asked})] if asked else _runs(length, device):
            ids = torch.randint(1, model.config.vocab_size, (run.rows, length // run.rows), device=device)
            _prefill(random_model(device, tiny, layers=1, shape=shape), ids, run.settings, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the run finds its memory in one piece
            yield _row(model, ids, run.settings, device)


def _runs(length: int, device: torch.device) -> list[_Run]:
    """What is measured of a length; 8 bits of linear layers on devices that have them."""
    sparse = sparse_settings(length)
    fp8 = {"linear": "fp8"} if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) else {}
    eight_bit = _Run({**sparse, "kv_cache": "int8"})
    both = _Run({**sparse, "kv_cache": "int8", **fp8})
    if length >= _ONE_RUN_FROM:
        return [both]
    if length > _EVERY_RUN_UP_TO:
        return [eight_bit, both]
    return [
        _Run(sparse),
        _Run(_DENSE),
        eight_bit,
        _Run({**_DENSE, "kv_cache": "fp8", "prefill_chunk_size": 8192}),
        _Run({**sparse, "prefill_chunk_size": 65536, "mlp_chunk_size": 8192}),
        _Run({**_DENSE, "kv_cache": "int8"}, rows=2),
        _Run({**sparse, **fp8}),
    ]


def _row(model: Qwen2ForCausalLM, ids: torch.Tensor, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    rows, tokens = ids.shape
    planned = memory.plan(model.config, tokens + 1, batch=rows, **settings).memory
    shown = {name: value for name, value in settings.items() if name == "sparse" or name not in sparse_settings(tokens)}
    row: dict[str, Any] = {"tokens": tokens, "rows": rows, **shown, "plan_bytes": planned.total}
    seconds, peak, reserved = _prefill(model, ids, settings, device)
    if peak is None:
        row["peak"] = "counted on CUDA devices only"
    else:
        row |= {"peak_bytes": peak, "peak_over_plan": round(peak / planned.total, 4), "reserved_bytes": reserved}
    return {**row, "seconds": round(seconds, 3), "plan": asdict(planned), "settings": settings}


def _prefill(
    model: Qwen2ForCausalLM, ids: torch.Tensor, settings: dict[str, Any], device: torch.device
) -> tuple[float, int | None, int | None]:
    """Seconds of a prefill, and the most bytes that were allocated and reserved meanwhile."""
    cuda = device.type == "cuda"
    with patched_qwen(model, **settings):
        cache = LongContextCache(ids.shape[1] + 1, kv_cache=settings.get("kv_cache", "device"))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(lambda: model(ids, use_cache=True, logits_to_keep=1, **cache_argument(cache)), device)
        if not cuda:
            return seconds, None, None
        return seconds, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
