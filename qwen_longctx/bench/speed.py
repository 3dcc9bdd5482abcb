"""Time to the first token of stock, dense and sparse prefill, and where sparse spends it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.bench.breakdown import Breakdown
from qwen_longctx.bench.shapes import NAMES, random_model
from qwen_longctx.bench.timing import timed
from qwen_longctx.errors import InvalidValue

# with the dense spans of a run, no less than fidelity="fast" keeps of real text (results/quality*.json)
DENSITIES = {32768: 0.29, 65536: 0.085, 131072: 0.042, 262144: 0.026, 524288: 0.018, 1_000_000: 0.02}
LENGTHS = tuple(DENSITIES)
SHORTEST = 384  # one tile of 128 that is sparse, and the two at the end of a prompt that never are
DENSE = {"sparse": "off"}
_ANY_RECALL = 1e-4  # far below what the least share of evenly spread attention holds


@torch.no_grad()
def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    density: float | None = None,
    dense_layers: int = 0,
    whole_up_to: int = 131072,
    linear: str = "auto",
    shape: str = NAMES[0],
    kv_cache: str = "device",
    prefill_chunk_size: int | None = None,
    sparse_only: bool = False,
) -> Iterator[dict[str, Any]]:
    """Time to the first token: stock transformers with SDPA, dense and sparse prefill, and where sparse spends it.

    Random weights attend evenly, so sparse runs block scores at a fixed density, steered towards a recall that every
    head has: the work of a run by default that keeps as much, trials of first budgets included. The breakdown is of
    the same run, by events that wait for nothing. Every length is warmed up on one layer before.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
    tiny : bool
        A toy shape.
    density : float, optional
        Share of the blocks; by default one for each length (`DENSITIES`, of the nearest length).
    dense_layers : int
        Project dense of longer prompts from two models of this many and twice as many layers, run at full length; 0
        runs it whole.
    whole_up_to : int
        Longest prompt for stock transformers, whose cache copies itself, and for dense as it is.
    linear : {"auto", "fp8"}
        The setting of that name, of sparse and of dense runs.
    shape : str
        Of the model, see ``bench.shapes.NAMES``.
    kv_cache : {"device", "fp8", "int8", "host"}
        How our cache holds keys and values. Of kinds other than "device" the sparse run alone is measured.
    prefill_chunk_size : int, optional
        The setting of that name, of sparse and of dense runs.
    sparse_only : bool
        Measure the sparse run alone.

    Raises
    ------
    InvalidValue
        A length is below `SHORTEST`.
    """
    check_lengths("speed", lengths)
    model = random_model(device, tiny, shape=shape)
    for length in lengths:
        ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
        given: dict[str, Any] = {"linear": linear, "kv_cache": kv_cache}
        given |= {} if prefill_chunk_size is None else {"prefill_chunk_size": prefill_chunk_size}
        dense, sparse = {**DENSE, **given}, {**sparse_settings(length, density), **given}
        row: dict[str, Any] = {"tokens": length, "density_asked": sparse["density"], **given}
        alone = sparse_only or kv_cache != "device"
        others = [] if alone else [dense, *([None] if length <= whole_up_to else [])]
        _warm_up(ids, [sparse, *others], device, tiny, shape)
        row.update(_sparse(model, ids, sparse, device))
        row["selection_share"] = row["sparse_breakdown_seconds"].get("selection", 0) / row["sparse_seconds"]
        if not others:
            yield _rounded(row)
            continue
        if dense_layers and length > whole_up_to:
            row["dense_seconds"] = _projected(
                ids, dense, device, tiny, shape, dense_layers, model.config.num_hidden_layers
            )
            row["dense_is"] = f"projected from {dense_layers} and {2 * dense_layers} layers at full length"
        else:
            row["dense_seconds"], row["dense_is"] = _first_token(model, ids, dense, device)[0], "run whole"
        if length <= whole_up_to:
            row["stock_seconds"] = _first_token(model, ids, None, device)[0]
        row["dense_over_sparse"] = round(row["dense_seconds"] / row["sparse_seconds"], 3)
        yield _rounded(row)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def check_lengths(bench: str, lengths: list[int]) -> None:
    """Refuse prompts of which nothing is prefilled sparsely, with `InvalidValue`."""
    for length in lengths:
        if length < SHORTEST:
            raise InvalidValue(
                f"bench {bench} measures prompts of at least {SHORTEST} tokens, got {length}: shorter ones have no "
                "part that is prefilled sparsely"
            )


def sparse_settings(length: int, density: float | None = None) -> dict[str, Any]:
    """Settings under which a random model keeps a fixed share of the blocks, by default that of the nearest length."""
    return {
        "sparse": "block_scores",
        "density": density or DENSITIES[min(DENSITIES, key=lambda known: abs(known - length))],
        "recall_target": _ANY_RECALL,
        "sparse_attention_threshold": min(length - 1, 32767),
    }


def _sparse(
    model: Qwen2ForCausalLM, ids: torch.Tensor, overrides: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The part of a row that is about the sparse run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Breakdown(device) as clock:
        seconds, report = _first_token(model, ids, overrides, device, clock)
    row = {
        "sparse_seconds": seconds,
        "density": round(report["density"], 5),
        "list_kernel": clock.kernel,
        "sparse_breakdown_seconds": clock.seconds(seconds),
    }
    if device.type == "cuda":
        row["sparse_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def _warm_up(
    ids: torch.Tensor, runs: list[dict[str, Any] | None], device: torch.device, tiny: bool, shape: str
) -> None:
    """Every run of a length on one layer: kernels are compiled, and cuDNN plans, once a process for every shape."""
    model = random_model(device, tiny, layers=1, shape=shape)
    for overrides in runs:
        _first_token(model, ids, overrides, device)
    del model
    gc.collect()  # patched modules and their methods refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the long run finds its memory in one piece


def _first_token(
    model: Qwen2ForCausalLM,
    ids: torch.Tensor,
    overrides: dict[str, Any] | None,
    device: torch.device,
    observer: Breakdown | None = None,
) -> tuple[float, dict[str, Any]]:
    """Seconds from the prompt to the first token's logits, and the cache's report.

    Stock transformers run if `overrides` is None, and report nothing.
    """
    if overrides is None:
        return timed(lambda: model(ids, use_cache=True, logits_to_keep=1), device), {}
    cache = LongContextCache(ids.shape[1] + 1, observer=observer, kv_cache=overrides["kv_cache"])
    with patched_qwen(model, **overrides):
        seconds = timed(lambda: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1), device)
    return seconds, cache.report()


def _projected(
    ids: torch.Tensor, dense: dict[str, Any], device: torch.device, tiny: bool, shape: str, layers: int, of: int
) -> float:
    """Seconds of `of` layers from the slope between `layers` and twice as many, after `_warm_up`.

    Were planning in the first time only, the slope would lose it once for every layer.
    """
    times = []
    for count in (layers, 2 * layers):
        model = random_model(device, tiny, layers=count, shape=shape)
        times.append(_first_token(model, ids, dense, device)[0])
        del model
    return times[0] + (of - layers) * (times[1] - times[0]) / layers
