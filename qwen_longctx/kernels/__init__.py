"""Attention kernels behind one signature, and the merge of their partial results.

Every kernel is ``kernel(q, k, v, *, causal, scale) -> (out, lse)``:

- `q` of shape (batch, queries, heads, head_dim); `k`, `v` of shape (batch, keys, kv_heads, head_dim), any float dtype;
- `causal` is aligned at the bottom right: the last query meets every key;
- `out` like `q`; `lse` the natural log of the softmax's denominator, float32 (float64 for float64 input), of shape
  (batch, heads, queries), -inf where a query meets no key.

Grouped-query attention is native: keys and values are never repeated.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwen_longctx.kernels.reference import reference
from qwen_longctx.kernels.sdpa import sdpa


class Kernel(Protocol):
    """The signature that all kernels share."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


_KERNELS: dict[str, Kernel] = {"auto": sdpa, "sdpa": sdpa, "reference": reference}


def get(name: str) -> Kernel:
    """The kernel called `name`; "auto" is the fastest that runs everywhere."""
    if name not in _KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}, got {name!r}")
    return _KERNELS[name]
