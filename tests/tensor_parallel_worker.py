"""One of the processes that `test_tensor_parallel` starts: what a sharded model says, and what sparse prefill kept."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from qwen_longctx import LongContextCache, patch_qwen, patched_qwen, unpatch_qwen
from qwen_longctx.checkpoint import local_heads, local_shape
from qwen_longctx.prefill.memory import kv_bytes


def load(folder: Path) -> torch.nn.Module:
    if Version(transformers.__version__) < Version("5.0"):
        how: dict[str, Any] = {"tp_plan": "auto"}
    else:
        from transformers.distributed import DistributedConfig

        how = {"distributed_config": DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how).eval()


@torch.no_grad()
def run(model: torch.nn.Module, ids: torch.Tensor, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for settings in runs:
        cache = LongContextCache(kv_cache=settings.get("kv_cache", "device"))
        with patched_qwen(model, **settings):
            logits = model(ids, past_key_values=cache, use_cache=True).logits
        state = cache.sparse_state
        results.append(
            {
                "logits": logits,
                "recall": [record.recall for record in state.records],
                "kept": [float(record.kept) for record in state.records],
                "budgets": state.head_budgets and state.head_budgets.verticals,
                "report": cache.report(),
                "bytes_a_token": sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
                / ids.numel(),
                "bytes": sum(x.nbytes for layer in cache.layers for x in layer.store.held()),
            }
        )
    return results


def generate(model: torch.nn.Module, scenes: dict[str, Any]) -> list[torch.Tensor]:
    """Under the patch in force; as with any tensor parallel model, every process has the same seed."""
    torch.manual_seed(1)
    return [
        model.generate(ids, attention_mask=mask, pad_token_id=0, **options) for ids, mask, options in scenes["generate"]
    ]


def refused(call: Any) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@torch.no_grad()
def too_few_heads(folder: Path) -> dict[str, tuple[str, str]]:
    """More processes than key heads: transformers loads such a model, and cannot run it."""
    model, ids = load(folder / "few"), torch.ones((1, 9), dtype=torch.long)
    said = {"after loading": refused(lambda: patch_qwen(model)), "stock": refused(lambda: model(ids))}
    patch_qwen()
    said["before loading"] = refused(lambda: model(ids))
    said["generate"] = refused(lambda: model.generate(ids, max_new_tokens=2))
    unpatch_qwen()
    return said


def filled(model: torch.nn.Module, ids: torch.Tensor) -> LongContextCache:
    cache = LongContextCache()
    with patched_qwen(model, sparse="off"), torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def failing(model: torch.nn.Module, ids: torch.Tensor) -> tuple[str, str, float]:
    """Process 1 fails in a layer and ends: the others wait for it in the sum over processes."""

    def fail(module: Any, given: Any) -> None:
        raise MemoryError("of one process")

    handle = model.model.layers[1].register_forward_pre_hook(fail) if dist.get_rank() == 1 else None
    begun = time.monotonic()
    with patched_qwen(model, sparse="off"), torch.no_grad():
        if handle is not None:
            model(ids)
        return *refused(lambda: model(ids)), time.monotonic() - begun


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    scenes = torch.load(folder / "scenes.pt", weights_only=False)
    patch_qwen(**scenes["settings"])  # for models that are loaded from now on
    model = load(folder / "model")
    early = generate(model, scenes)
    unpatch_qwen()
    patch_qwen(model, **scenes["settings"])
    results = {
        "heads": tuple(local_heads(model)),
        "planned": kv_bytes(local_shape(model), torch.float64),
        "early": early,
        "late": generate(model, scenes),
    }
    unpatch_qwen(model)
    results["runs"] = run(model, scenes["ids"], scenes["runs"])
    results["save"] = refused(lambda: filled(model, scenes["ids"]).save("never"))
    if (folder / "few").exists():
        results["few"] = too_few_heads(folder)
    torch.save(results, folder / f"results.{dist.get_rank()}")
    torch.save(failing(model, scenes["ids"]), folder / f"failing.{dist.get_rank()}")
