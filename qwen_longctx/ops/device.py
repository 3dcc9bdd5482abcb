"""Where the Triton kernels run."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed. Importing it is left to the first kernel."""
    return find_spec("triton") is not None


def older_than(device: torch.device, capability: tuple[int, int]) -> str:
    """What `device` lacks if it is no CUDA device of a compute capability; empty if it is one."""
    if device.type != "cuda":
        return "needs a CUDA device"
    found = torch.cuda.get_device_capability(device)
    wanted = ".".join(map(str, capability))
    return "" if found >= capability else f"needs compute capability {wanted}, this device has {found[0]}.{found[1]}"


def uses_triton(x: torch.Tensor) -> bool:
    """Whether `x` lies where a Triton kernel can run; elsewhere, and for gradients, PyTorch does the same, slowly."""
    return x.is_cuda and x.dtype != torch.float64 and not x.requires_grad and has_triton()
