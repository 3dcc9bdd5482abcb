"""Dense dual chunk attention of one layer against the raw cuDNN kernel."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from qwen_longctx import LongContextConfig
from qwen_longctx.attention.dense import attend
from qwen_longctx.bench.shapes import ROPE_THETA, model_config
from qwen_longctx.bench.timing import interleaved
from qwen_longctx.geometry.layout import Call, RotarySource, make_layout
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import Tensors

LENGTHS = (131072, 524288)


def measure(lengths: list[int], device: torch.device, tiny: bool = False, repeats: int = 2) -> Iterator[dict[str, Any]]:
    """Dense dual chunk attention of one layer over a chunked prefill, against the raw cuDNN kernel.

    Ours: planning, rotating queries and keys, all segments, merging. Raw: the bare kernel over the same chunks as plain
    causal attention (a causal square and one rectangle a chunk), nothing merged. Both do the same multiplications.
    """
    for length in lengths:
        yield _row(length, device, tiny, repeats)


@torch.no_grad()
def _row(length: int, device: torch.device, tiny: bool, repeats: int) -> dict[str, Any]:
    config = model_config(tiny)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    settings = LongContextConfig.from_model_config(config)
    rotary = RotarySource(ROPE_THETA ** -(torch.arange(0, head_dim, 2, device=device) / head_dim), 1.0)
    q = torch.randn(1, length, heads, head_dim, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, length, kv_heads, head_dim, device=device, dtype=torch.bfloat16)
    kept = torch.empty_like(k)
    step = settings.prefill_chunk_size
    chunks = [(start, min(start + step, length)) for start in range(0, length, step)]

    def ours() -> None:
        for start, stop in chunks:
            layout = make_layout(
                Call.whole(1, length), start, stop, settings=settings, rotary=rotary, dtype=q.dtype, device=device
            )
            kept[:, start:stop] = rotate(k[:, start:stop], layout.tables.keys)
            attend(q[:, start:stop], Tensors(kept[:, :stop], v[:, :stop]), layout, head_dim**-0.5)

    def raw() -> None:
        for start, stop in chunks:
            queries = q[:, start:stop]
            _raw_kernel(queries, k[:, start:stop], v[:, start:stop], True)
            if start:
                _raw_kernel(queries, k[:, :start], v[:, :start], False)

    times = interleaved({"ours": ours, "raw": raw}, device, repeats)
    flop = 4 * (length * (length + 1) // 2) * heads * head_dim
    rates = {name: flop / statistics.median(values) / 1e12 for name, values in times.items()}
    return {
        "tokens": length,
        "seconds": times,
        "ours_tflops": round(rates["ours"], 1),
        "raw_cudnn_tflops": round(rates["raw"], 1),
        "share_of_raw": round(rates["ours"] / rates["raw"], 4),
    }


def _raw_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cuda":
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    else:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
