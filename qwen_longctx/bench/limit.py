"""A card as if it were smaller."""

from __future__ import annotations

import torch

from qwen_longctx.errors import InvalidValue, Unsupported
from qwen_longctx.prefill.memory import GIB


def limit_memory(limit: int, device: torch.device) -> None:
    """Let this process take no more than `limit` bytes of a CUDA device through PyTorch.

    CUDA's context, some hundred megabytes, does not count.

    Raises
    ------
    InvalidValue
        The device has less.
    NotImplementedError
        It is no CUDA device.
    """
    if device.type != "cuda":
        raise Unsupported("a limit of memory is kept by CUDA devices only: leave --memory-limit out here")
    index = torch.cuda.current_device() if device.index is None else device.index
    _, total = torch.cuda.mem_get_info(index)
    if limit > total:
        raise InvalidValue(
            f"--memory-limit is {limit / GIB:.1f} GiB and the device has {total / GIB:.1f} GiB: give a smaller limit"
        )
    torch.cuda.set_per_process_memory_fraction(limit / total, index)
