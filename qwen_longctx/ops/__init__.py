"""Attention kernels behind one signature, and the merge of their partial results.

Every kernel is ``kernel(q, k, v, *, causal, scale, blocks=None) -> (out, lse)``:

- `q` of shape (batch, queries, heads, head_dim); `k`, `v` of shape (batch, keys, kv_heads, head_dim), any float dtype;
- `causal` is aligned at the bottom right: the last query meets every key;
- `blocks` are `lists.BlockLists`: the keys that each tile of queries meets, for every query head;
- `out` like `q`; `lse` the natural log of the softmax's denominator, float32 (float64 for float64 input), of shape
  (batch, heads, queries), -inf where a query meets no key.

Grouped-query attention is native: keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from qwen_longctx.config import KERNELS
from qwen_longctx.ops import fa4, flex
from qwen_longctx.ops.compact import BlockLists
from qwen_longctx.ops.reference import reference
from qwen_longctx.ops.sdpa import sdpa


class Kernel(Protocol):
    """The signature that all kernels share."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class ListKernel(Protocol):
    """The signature of those that take block lists."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        scale: float,
        blocks: BlockLists | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


NAMES = KERNELS
_LIST_KERNELS: dict[str, ListKernel] = {"fa4": fa4.fa4, "flex": flex.flex, "reference": reference}
_WHY_NOT: dict[str, Callable[..., str]] = {"fa4": fa4.why_not, "flex": flex.why_not}


def get(name: str) -> Kernel:
    """The dense kernel under the setting `name`: `sdpa`, unless the reference is asked for."""
    if name not in NAMES:
        raise ValueError(f"kernel must be one of {', '.join(NAMES)}, got {name!r}")
    return reference if name == "reference" else sdpa


def list_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Name of the kernel that takes block lists for queries of this kind; "auto" is the fastest that runs there.

    Parameters
    ----------
    name : str
        Of the setting.
    device, dtype, head_dim
        Of the queries.
    size : int
        Tokens a block.

    Raises
    ------
    ValueError
        The kernel asked for does not run here.
    """
    reasons = why_not(device, dtype, head_dim, size)
    if name == "auto":
        return next((found for found, reason in reasons.items() if not reason), "reference")
    if reasons.get(name):
        raise ValueError(f'kernel="{name}" {reasons[name]}: choose another, or leave it at "auto"')
    return name


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> dict[str, str]:
    """For every fast kernel that takes block lists, fastest first: why it cannot run, empty if it can."""
    return {name: reason(device, dtype, head_dim, size) for name, reason in _WHY_NOT.items()}


def on_lists(name: str) -> Any:
    """The kernel called `name` that takes block lists."""
    return _LIST_KERNELS[name]
