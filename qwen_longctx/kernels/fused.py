"""RMSNorm and SwiGLU in one pass over memory, by Liger-Kernel where it is installed (extra ``flash``)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from qwen_longctx.kernels.device import uses_triton

_FEWEST = 1 << 20  # numbers; for fewer, as in decode, the launch costs more than the passes saved


@lru_cache
def _liger() -> Any:
    try:
        from liger_kernel import ops
    except ImportError:
        return None
    return ops


def pays(x: torch.Tensor) -> bool:
    """Whether the functions here run for an activation like `x`, and are worth it."""
    return x.numel() >= _FEWEST and runs(x)


def runs(x: torch.Tensor) -> bool:
    """Whether the functions here run for an activation like `x`."""
    return uses_triton(x) and _liger() is not None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x²) + epsilon)`` over the last dimension, normalised in float32 and rounded as in Qwen2.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., hidden).
    weight : torch.Tensor
        Shape (hidden,), of the dtype of `x`.
    epsilon : float
    """
    return _liger().LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, tensors of one shape."""
    return _liger().LigerSiLUMulFunction.apply(gate, up)
