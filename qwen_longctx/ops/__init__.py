"""Attention engines behind one signature, and the other operations of long context.

A file holds one operation: the PyTorch function, its Triton kernel and the choice between them. `engines` is the
registry of the ways to compute attention, each ``function(q, k, v, *, causal, scale, blocks=None) -> (out, lse)``:

- `q` of shape (batch, queries, heads, head_dim); `k`, `v` of shape (batch, keys, kv_heads, head_dim), all of one float
  dtype;
- `causal` is aligned at the bottom right: the last query attends to every key;
- `blocks` are `compact.BlockLists`: the keys that each tile of queries attends to, for every query head;
- `out` like `q`; `lse` the natural log of the softmax's denominator, float32 (float64 for float64 input), of shape
  (batch, heads, queries), -inf where a query attends to no key.

Grouped-query attention is native: keys and values are never repeated.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwen_longctx.config import KERNELS
from qwen_longctx.errors import InvalidValue
from qwen_longctx.ops.engines import ENGINES, list_kernel, on_lists, why_not
from qwen_longctx.ops.reference import reference
from qwen_longctx.ops.sdpa import sdpa

__all__ = ["ENGINES", "Kernel", "get", "list_kernel", "on_lists", "reference", "sdpa", "why_not"]


class Kernel(Protocol):
    """Dense attention."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def get(setting: str) -> Kernel:
    """Dense attention under the setting `kernel`: `sdpa`, the fastest engine, unless the reference is asked for.

    Raises
    ------
    InvalidValue
        There is no such setting.
    """
    if setting not in KERNELS:
        raise InvalidValue(f"kernel must be one of {', '.join(KERNELS)}, got {setting!r}")
    return reference if setting == "reference" else sdpa
