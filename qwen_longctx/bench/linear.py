"""Linear layers of one decoder layer in bf16 and in 8 bits, with the casts and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear, silu

from qwen_longctx.bench.shapes import model_config
from qwen_longctx.bench.timing import interleaved
from qwen_longctx.ops import fp8, norm

LENGTHS = (1, 2, 16, 2048, 32768)
_OF_RESULT = 1_000_000  # tokens for which seconds of all layers are given
_REPEATS = 10


@torch.no_grad()
def measure(lengths: list[int], device: torch.device, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Milliseconds of the seven products of a decoder layer on so many tokens, and what a million take in all layers.

    "bare" has its inputs cast before; "fp8" casts them as a patched model does, with SwiGLU in the last cast. The MLP
    gets its slices of 2,048 tokens.
    """
    config = model_config(tiny)
    hidden, inner, slices = config.hidden_size, config.intermediate_size, 2048
    head_dim = hidden // config.num_attention_heads
    queries, keys = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    shapes = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    weights = {name: 0.02 * torch.randn(size, device=device).to(torch.bfloat16) for name, size in shapes.items()}
    cast = {name: fp8.cast_rows(weight) for name, weight in weights.items()}
    for length in lengths:
        x = torch.randn(length, hidden, device=device, dtype=torch.bfloat16)
        times = interleaved(_ways(x, weights, cast, slices), device, _REPEATS)
        row: dict[str, Any] = {"tokens": length, "layers": config.num_hidden_layers}
        for name, taken in times.items():
            seconds = median(taken)
            row[f"{name}_ms_a_layer"] = round(1000 * seconds, 4)
            row[f"{name}_seconds_a_million"] = round(seconds * config.num_hidden_layers * _OF_RESULT / length, 2)
        yield row


def _ways(
    x: torch.Tensor, weights: dict[str, torch.Tensor], cast: dict[str, fp8.Rows], size: int
) -> dict[str, Callable[[], None]]:
    rows, wide = fp8.cast_rows(x), fp8.cast_rows(x.new_ones(min(size, len(x)), weights["down"].shape[1]))
    attended = fp8.cast_rows(x.new_ones(len(x), weights["o"].shape[1]))

    def plain() -> None:
        for name in ("q", "k", "v"):
            linear(x, weights[name])
        linear(x.new_empty(len(x), weights["o"].shape[1]), weights["o"])
        for part in x.split(size):
            gate, up = linear(part, weights["gate"]), linear(part, weights["up"])
            linear(norm.silu_mul(gate, up) if norm.pays(gate) else silu(gate) * up, weights["down"])

    def eight() -> None:
        shared = fp8.cast_rows(x)
        for name in ("q", "k", "v"):
            fp8.product(shared, cast[name], None)
        fp8.product(fp8.cast_rows(x.new_empty(len(x), weights["o"].shape[1])), cast["o"], None)
        for part in x.split(size):
            own = fp8.cast_rows(part)
            gate, up = fp8.product(own, cast["gate"], None), fp8.product(own, cast["up"], None)
            fp8.product(fp8.silu_mul_rows(gate, up), cast["down"], None)

    def bare() -> None:
        for name in ("q", "k", "v"):
            fp8.product(rows, cast[name], None)
        fp8.product(attended, cast["o"], None)
        for values, scales in zip(rows.values.split(size), rows.scales.split(size), strict=True):
            part = fp8.Rows(values, scales)
            fp8.product(part, cast["gate"], None)
            fp8.product(part, cast["up"], None)
            fp8.product(fp8.Rows(*(one[: len(values)] for one in wide)), cast["down"], None)

    return {"bf16": plain, "fp8": eight, "bare": bare}
