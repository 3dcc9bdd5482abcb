"""One of the ranks that `test_pipeline_ranks` starts: runs the scenes that it is given, and writes down what came out."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from qwen_longctx import LongContextCache, load_stage, patch_qwen, patched_qwen, pipeline_parallel, unpatch_qwen

RANK = int(os.environ["RANK"])


@torch.no_grad()
def logits_of(model: Any, run: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """Logits of a prompt and of a few tokens behind it, and what sparse prefill kept in the layers of this rank."""
    cache = LongContextCache(kv_cache=run.get("kind", "device"))
    with patched_qwen(model, **run["settings"]):
        first = model(ids[:, :-3], attention_mask=None if mask is None else mask[:, :-3], past_key_values=cache)
        rest = model(ids[:, -3:], attention_mask=mask, past_key_values=cache, logits_to_keep=2)
    report = cache.report()
    return {
        "first": first.logits,
        "rest": rest.logits,
        "layers": len(cache.layers),
        "length": cache.get_seq_length(),
        "recall": {record.layer: record.recall for record in cache.sparse_state.records},
        "kept": {record.layer: float(record.kept) for record in cache.sparse_state.records},
        "report": report,
    }


def tokens_of(model: Any, run: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What generate says; ranks have seeds of their own."""
    torch.manual_seed(run.get("seed", 0) + RANK * run.get("apart", 0))
    with patched_qwen(model, **run["settings"]):
        return model.generate(ids, attention_mask=mask, pad_token_id=0, **run["generate"])


def scenes(folder: Path) -> dict[str, Any]:
    """All results of a model that every rank loads its part of."""
    said = json.loads((folder / "scenes.json").read_text())
    inputs = torch.load(folder / "inputs.pt")
    model = load_stage(folder, dtype=torch.float64, layers=said["layers"], timeout=60)
    held = [name for name, one in model.named_parameters() if not one.is_meta and one.stride() != (0, 0)]
    results: dict[str, Any] = {"held": held, "device": str(model.device), "logits": [], "tokens": []}
    for run in said["logits"]:
        results["logits"].append(logits_of(model, run, *inputs[run["inputs"]]))
    for run in said["tokens"]:
        results["tokens"].append(tokens_of(model, run, *inputs[run["inputs"]]))
    unpatch_qwen(model)
    return results


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save(scenes(folder), folder / f"results.{RANK}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
