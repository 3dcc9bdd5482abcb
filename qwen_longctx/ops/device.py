"""Where the Triton kernels run."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed. Importing it is left to the first kernel."""
    return find_spec("triton") is not None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def older_than(device: torch.device, needed: tuple[int, int]) -> str:
    """What `device` lacks if it is no CUDA device of a compute capability; empty if it is one."""
    if device.type != "cuda":
        return "needs a CUDA device"
    found = capability(device)
    wanted = ".".join(map(str, needed))
    return "" if found >= needed else f"needs compute capability {wanted}, this device has {found[0]}.{found[1]}"


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def uses_triton(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether `x` lies where a Triton kernel can run; elsewhere, and for gradients, PyTorch does the same, slowly.

    A kernel knows no gradient, so `others` are all other inputs that may ask for one.
    """
    return x.is_cuda and x.dtype != torch.float64 and has_triton() and not needs_gradient(x, *others)
