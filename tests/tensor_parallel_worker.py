"""One of the processes that `test_tensor_parallel` starts: logits of a sharded model, and what sparse prefill kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.checkpoint import local_heads, local_shape
from qwen_longctx.prefill.memory import kv_bytes


def load(folder: str) -> torch.nn.Module:
    if Version(transformers.__version__) < Version("5.0"):
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float64
    )


@torch.no_grad()
def run(model: torch.nn.Module, ids: torch.Tensor, runs: list[dict]) -> list[dict]:
    results = []
    for settings in runs:
        cache = LongContextCache()
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
            }
        )
    return results


def main(folder: str, output: str) -> None:
    torch.distributed.init_process_group("gloo")
    model = load(folder).eval()
    ids, runs = torch.load(f"{folder}/ids.pt"), json.loads(Path(folder, "runs.json").read_text())
    planned = kv_bytes(local_shape(model), torch.float64)
    results = {"heads": tuple(local_heads(model)), "planned": planned, "runs": run(model, ids, runs)}
    torch.save(results, f"{output}.{torch.distributed.get_rank()}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
