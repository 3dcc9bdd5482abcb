"""Activation memory of one MLP, in slices against stock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from qwen_longctx import LongContextConfig, patched_qwen
from qwen_longctx.bench.shapes import model_config

LENGTHS = (131072,)


@torch.no_grad()
def measure(lengths: list[int], device: torch.device, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Peak activation memory of one MLP on a whole prompt, sliced by the patch against stock.

    Intermediate activations are what lies between the hidden states that go in and those that come out (Qwen's 71 GB
    at 1M tokens are two of them). In chunked prefill an MLP gets one chunk at a time; that peak counts its output too.
    """
    with torch.device("meta"):
        config = model_config(tiny)
        config.num_hidden_layers, config.vocab_size = 1, 97
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for length in lengths:
        yield _row(model, length, device)


def _row(model: Qwen2ForCausalLM, length: int, device: torch.device) -> dict[str, Any]:
    module = model.model.layers[0].mlp
    settings = LongContextConfig.from_model_config(model.config)
    x = torch.randn(1, length, model.config.hidden_size, device=device, dtype=torch.bfloat16)

    def peak(tokens: int) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        module(x[:, :tokens])
        return torch.cuda.max_memory_allocated(device) - before

    whole = peak(length)
    with patched_qwen(model):
        sliced = peak(length)
        chunked = peak(min(length, settings.prefill_chunk_size))
    out = x.numel() * x.element_size()
    return {
        "tokens": length,
        "mlp_chunk_size": settings.mlp_chunk_size,
        "prefill_chunk_size": settings.prefill_chunk_size,
        "stock_peak_bytes": whole,
        "sliced_peak_bytes": sliced,
        "chunked_and_sliced_peak_bytes": chunked,
        "output_bytes": out,
        "cut_of_intermediate_activations": round(1 - (sliced - out) / (whole - out), 5),
        "cut_in_chunked_prefill": round(1 - chunked / whole, 5),
    }
