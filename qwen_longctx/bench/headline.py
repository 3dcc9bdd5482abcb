"""One prompt of a million tokens on one card, dense."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from qwen_longctx import patched_qwen
from qwen_longctx.bench.shapes import random_model
from qwen_longctx.patches.method import cache_of

LENGTHS = (1_000_000,)


@torch.no_grad()
def measure(
    lengths: list[int], device: torch.device, tiny: bool = False, new_tokens: int = 32, linear: str = "auto"
) -> Iterator[dict[str, Any]]:
    """One prompt of each length and `new_tokens` decoded, through the patched model's plain generate."""
    model = random_model(device, tiny)
    for length in lengths:
        yield _row(model, length, device, new_tokens, linear)


def _row(model: Qwen2ForCausalLM, length: int, device: torch.device, new_tokens: int, linear: str) -> dict[str, Any]:
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    with patched_qwen(model, sparse="off", linear=linear):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        _ = out.sequences.tolist()
    seconds = time.perf_counter() - begin
    cache = cache_of(out)
    prefill = cache.report()["prefill_seconds"]
    kept = [x.untyped_storage() for layer in cache.layers for x in (layer.keys, layer.values)]
    return {
        "tokens": length,
        "new_tokens": out.sequences.shape[1] - length,
        "layers": model.config.num_hidden_layers,
        "attention": "dense, every layer",
        "linear": linear,
        "seconds": round(seconds, 2),
        "prefill_seconds": round(prefill, 2),
        "decode_seconds_per_token": round((seconds - prefill) / new_tokens, 4),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else 0,
        "kv_cache_bytes": sum({room.data_ptr(): room.nbytes() for room in kept}.values()),
    }
