"""What a device offers, and which inputs the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from qwen_longctx.errors import InvalidType
from qwen_longctx.ops import triton_runtime

HALF = (torch.float16, torch.bfloat16)


@lru_cache  # asked for each operation of each layer
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def older_than(device: torch.device, needed: tuple[int, int]) -> str:
    """What `device` lacks if it is no CUDA device of a compute capability; empty if it is one."""
    if device.type != "cuda":
        return "needs a CUDA device"
    major, minor = capability(device)
    wanted = ".".join(map(str, needed))
    return "" if (major, minor) >= needed else f"needs compute capability {wanted}, this device has {major}.{minor}"


def device_of(layer: torch.nn.Module) -> torch.device:
    """Where a layer computes: where accelerate takes its inputs and weights to, or else where its weights lie."""
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next((parameter.device for parameter in layer.parameters()), torch.device("meta"))


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def uses_triton(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether `x` lies where a Triton kernel can run; elsewhere, and for gradients, PyTorch does the same, slowly.

    A kernel knows no gradient, so `others` are all other inputs that may ask for one. Triton knows devices of compute
    capability 7.0 and newer, and bfloat16 on 8.0 and newer.
    """
    if not x.is_cuda or x.dtype == torch.float64 or not triton_runtime.AVAILABLE or needs_gradient(x, *others):
        return False
    here = capability(x.device)
    if here >= (8, 0):  # dtypes are looked at on older devices only: decoding asks for each layer
        return True
    return here >= (7, 0) and not any(one.dtype == torch.bfloat16 for one in (x, *others))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as `dtype`; even a `to` that does nothing costs time, and decoding counts microseconds."""
    return x if x.dtype == dtype else x.to(dtype)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor on a device, for which nobody waits: it is copied from pinned memory."""
    here = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse tensors of different dtypes, which some fused kernels would misread."""
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidType(
            f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}: attention takes one dtype, cast them first"
        )
