"""RMSNorm and SwiGLU in one pass over memory, by Liger-Kernel where it is installed (extra ``flash``); short norms."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from qwen_longctx.ops.device import cast, uses_triton

_FEWEST = 1 << 20  # numbers; for fewer, as in decode, the launch costs more than the passes saved


@lru_cache
def _liger() -> Any:
    try:
        from liger_kernel import ops
    except ImportError:
        return None
    return ops


def pays(x: torch.Tensor) -> bool:
    """Whether Liger-Kernel runs for an activation like `x`, and is worth it."""
    return x.numel() >= _FEWEST and runs(x)


def runs(x: torch.Tensor) -> bool:
    """Whether Liger-Kernel runs for an activation like `x`."""
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


def short_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`rms_norm` by PyTorch's kernel and a product, on any device and for a weight of any dtype.

    Where Liger-Kernel does not pay, as in decode: fewer launches than the stock norm, rounded alike.
    """
    normed = torch.rms_norm(x, x.shape[-1:], None, epsilon)
    return weight * cast(normed, x.dtype)  # autocast leaves float32


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, tensors of one shape."""
    return _liger().LigerSiLUMulFunction.apply(gate, up)
