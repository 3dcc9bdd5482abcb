"""Memory of the host that CUDA devices read and write by themselves, while the host goes on.

PyTorch's own allocator of such memory rounds up to powers of 2. Here whole pages are taken from the system and
registered with CUDA, a part of a cache at a time: registering takes seconds for tens of gigabytes.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch

from qwen_longctx.errors import DoesNotFit

_PORTABLE = 1  # cudaHostRegisterPortable: for all devices


class Pages:
    """Pages of the host, given back when nobody refers to them any more.

    Parameters
    ----------
    size : int
        Bytes.
    device : torch.device
        Where they are registered, if it is a CUDA device. Where that fails they stay as they are, and transfers take
        longer.

    Attributes
    ----------
    memory : torch.Tensor
        Shape (size,), uint8, on the host, zero.
    pinned : bool
        Whether they are registered.

    Raises
    ------
    DoesNotFit
        The system has no such memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        whole = _fresh(max(1, size))
        whole.zero_()  # by all threads of PyTorch; the driver would touch one page after the other
        self.memory = whole[:size]
        self.pinned = device.type == "cuda" and _register(whole, device)
        if self.pinned:
            weakref.finalize(self, _unregister, whole, device).atexit = False


def _fresh(size: int) -> torch.Tensor:
    """Bytes in pages that hold nothing else, large ones where the system has them."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, **private)
    except (OSError, OverflowError) as error:
        raise DoesNotFit(
            f"the system has no {size:,} bytes of host memory for keys and values ({error}): shorten the prompt, or "
            'take kv_cache="int8"'
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _register(memory: torch.Tensor, device: torch.device) -> bool:
    with suppress(RuntimeError), torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)) == 0:
            return True
    with suppress(RuntimeError):  # the next launch reports what failed here, and clears it
        torch.ones(1, device=device).neg_()
    return False


def _unregister(memory: torch.Tensor, device: torch.device) -> None:
    with suppress(Exception):
        torch.cuda.synchronize(device)  # transfers may be under way
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
