"""Tensor parallelism beside one card: the first token, further ones, and whether they are the same.

Weights, random or those of a checkpoint, are read from a folder, as transformers divides them while it loads. One
process on one device comes first, then one for each device; every row is one plain ``generate`` under the patch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.bench.processes import count_ranks, own_place, rows_of, say
from qwen_longctx.bench.shapes import NAMES, model_config, random_model, random_prompt
from qwen_longctx.bench.speed import DENSE, sparse_settings
from qwen_longctx.bench.timing import Clock
from qwen_longctx.checkpoint import Shape
from qwen_longctx.cli.checkpoint import load_config
from qwen_longctx.patches.method import cache_argument

LENGTHS = (262144, 1_000_000)
_DENSE_UP_TO = 262144
_DENSITY = 0.02
_WARM_UP = 65536  # tokens of the first prompts, which are not measured
_NEW_TOKENS = 16


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
    ranks = count_ranks("tensor-parallel", device)
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
            yield from rows_of(__name__, spec, count)


# --- a rank -------------------------------------------------------------------------------------------------------


def _rank(spec: dict[str, Any], folder: Path) -> None:
    rank, ranks, device = own_place(spec["device"])
    model = _load(spec["model"], ranks, device)
    kinds = DENSE, sparse_settings(max(spec["lengths"]), spec["density"])
    for settings in kinds:
        _run(model, min(*spec["lengths"], _WARM_UP), device, settings)
    for length, settings in product(spec["lengths"], kinds):
        if settings is DENSE and length > spec["whole_up_to"]:
            continue
        row, answer = _run(model, length, device, settings)
        if rank > 0:
            continue
        path = Path(spec["results"], f"{length}.{settings['sparse']}.pt")
        if ranks == 1:
            torch.save({**answer, "row": row}, path)
        else:
            row |= _compared(row, answer, torch.load(path, weights_only=True))
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


def _run(
    model: Any, length: int, device: torch.device, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a prompt, and what was answered: new tokens, and logits of the first."""
    ids = random_prompt(length, model.config.vocab_size).to(device)
    cache, clock = LongContextCache(length + _NEW_TOKENS), Clock()
    with patched_qwen(model, **settings), torch.no_grad():
        if dist.is_initialized():
            dist.barrier()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
            **cache_argument(cache),
        )
    report = cache.report()
    row = {
        "tokens": length,
        "attention": settings["sparse"],
        "density": round(report["density"], 4),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "seconds": round(clock.first(), 3),
        "decode_seconds_per_token": round(median(clock.seconds()), 5),
        "peak_bytes_of_rank_0": report["peak_memory_bytes"],
    }
    return row, {"tokens": out.sequences[0, length:].tolist(), "logits": out.logits[0][0].float().cpu()}


def _compared(row: dict[str, Any], answer: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """What several processes answer beside what one does."""
    equal = [a == b for a, b in zip(answer["tokens"], one["tokens"], strict=True)]
    names = {"times_as_fast": "seconds", "times_as_fast_decode": "decode_seconds_per_token"}
    return {
        **{name: round(one["row"][of] / row[of], 2) for name, of in names.items()},
        "same_tokens": [*equal, False].index(False),
        "difference": float((answer["logits"] - one["logits"]).abs().max()),
    }


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
