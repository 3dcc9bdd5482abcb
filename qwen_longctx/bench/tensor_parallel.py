"""Tensor parallelism beside one card: the first token, further ones, and whether they are the same.

Weights, random or those of a checkpoint, are read from a folder, as transformers divides them while it loads. One
process on one device comes first, then one for each device; every row is one plain ``generate`` under the patch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import distributed as dist
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.bench.processes import say, started
from qwen_longctx.bench.shapes import NAMES, model_config, random_model
from qwen_longctx.checkpoint import Shape
from qwen_longctx.cli.checkpoint import load_config
from qwen_longctx.errors import InvalidValue, RankFailed

LENGTHS = (262144, 1_000_000)
_DENSE_UP_TO = 262144
_DENSITY = 0.02
_WARM_UP = 65536  # tokens of the first prompts, which are not measured
_NEW_TOKENS = 16
_ANY_RECALL = 1e-4  # far below what the least share of evenly spread attention holds


def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    shape: str = NAMES[0],
    model: Path | None = None,
    density: float = _DENSITY,
    whole_up_to: int = _DENSE_UP_TO,
) -> Iterator[dict[str, Any]]:
    """Rows of one process for all lengths, dense and sparse, then those of a process for each device.

    Tokens of prompts are random. `same_tokens` counts how many new tokens, from the first on, are those of the one
    process, and `difference` is the largest one between the logits of the first.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
        Of which kind those of the ranks are; on the CPU there are two.
    tiny : bool
        A toy shape.
    shape : str
        See ``bench.shapes.NAMES``.
    model : Path, optional
        Folder of a checkpoint, in place of random weights of `shape`.
    density : float
        Share of the blocks that sparse prefill keeps.
    whole_up_to : int
        Tokens of the longest dense prompt.
    """
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks < 2:
        raise InvalidValue(
            "bench tensor-parallel needs two CUDA devices, a process for each, and found 1: add --tiny on a CPU"
        )
    config = model_config(tiny, shape=shape) if model is None else load_config(str(model))
    Shape.of(config, ranks)  # refuses heads that cannot be divided
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            random_model(device, tiny, shape=shape).save_pretrained(folder)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        spec = {
            "device": device.type,
            "model": str(folder if model is None else model),
            "lengths": lengths,
            "density": density,
            "whole_up_to": whole_up_to,
            "results": folder,
        }
        for count in (1, ranks):
            with started(__name__, spec, count) as processes:
                yield from processes.rows()
                codes = processes.wait()
            if any(codes):
                raise RankFailed(f"{count} processes ended with {codes}: see what they printed")


# --- a rank -------------------------------------------------------------------------------------------------------


class _Clock(BaseStreamer):
    """When the prompt was handed on, and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the token is on the host by now

    def end(self) -> None:
        pass


def _rank(spec: dict[str, Any], folder: Path) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = spec["device"] == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    model = _load(spec["model"], ranks, device)
    for density in (None, spec["density"]):
        _row(model, min(*spec["lengths"], _WARM_UP), device, density, {})
    for length in spec["lengths"]:
        for density in (None, spec["density"]):
            if density is None and length > spec["whole_up_to"]:
                continue
            row = _row(model, length, device, density, _reference(spec, length, density, ranks))
            if rank == 0:
                say(folder, row)
    if ranks > 1:
        dist.destroy_process_group()


def _load(folder: str, ranks: int, device: torch.device) -> Any:
    how: dict[str, Any] = {"device_map": device}
    if ranks > 1 and Version(transformers.__version__) < Version("5"):
        how = {"tp_plan": "auto"}
    elif ranks > 1:
        from transformers.distributed import DistributedConfig

        how = {"distributed_config": DistributedConfig(tp_size=ranks)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).eval()


def _reference(spec: dict[str, Any], length: int, density: float | None, ranks: int) -> dict[str, Any]:
    """The file with what one process answers: to be written by it, and to be compared with by others."""
    kind = "dense" if density is None else "sparse"
    return {"path": Path(spec["results"], f"{length}.{kind}.pt"), "known": ranks > 1}


def _row(
    model: Any, length: int, device: torch.device, density: float | None, reference: dict[str, Any]
) -> dict[str, Any]:
    settings: dict[str, Any] = {"sparse": "off"}
    if density is not None:
        settings = {"sparse": "block_scores", "density": density, "recall_target": _ANY_RECALL}
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, model.config.vocab_size, (1, length), generator=generator).to(device)
    cache, clock = LongContextCache(length + _NEW_TOKENS), _Clock()
    with patched_qwen(model, **settings), torch.no_grad():
        if dist.is_initialized():
            dist.barrier()
        begin = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
        )
    report, times = cache.report(), clock.times[1:]  # behind the prompt
    row = {
        "tokens": length,
        "attention": settings["sparse"],
        "density": round(report["density"], 4),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "seconds": round(times[0] - begin, 3),
        "decode_seconds_per_token": round(median(b - a for a, b in zip(times, times[1:], strict=False)), 5),
        "peak_bytes_of_rank_0": report["peak_memory_bytes"],
    }
    answer = {"tokens": out.sequences[0, length:].tolist(), "logits": out.logits[0][0].float().cpu(), "row": row}
    return {**row, **_compared(answer, reference)} if reference else row


def _compared(answer: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """What several processes answer beside what one does; that one's answer is written."""
    if not reference["known"]:
        torch.save(answer, reference["path"])
        return {}
    one = torch.load(reference["path"], weights_only=True)
    equal = [a == b for a, b in zip(answer["tokens"], one["tokens"], strict=True)]
    return {
        "times_as_fast": round(one["row"]["seconds"] / answer["row"]["seconds"], 2),
        "times_as_fast_decode": round(
            one["row"]["decode_seconds_per_token"] / answer["row"]["decode_seconds_per_token"], 2
        ),
        "same_tokens": (equal + [False]).index(False),
        "difference": float((answer["logits"] - one["logits"]).abs().max()),
    }


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
