"""Memory of the host: what is free, and such as CUDA devices read and write by themselves, while the host goes on.

PyTorch's own allocator of such memory rounds up to powers of 2. Here whole pages are taken from the system and
registered with CUDA, a part of a cache at a time: registering takes seconds for tens of gigabytes.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from qwen_longctx.errors import DoesNotFit

_PORTABLE = 1  # cudaHostRegisterPortable: for all devices
_CONTAINERS = (  # of both versions of control groups: folder, limit, what is used, and what of it is idle
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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


def free_host_bytes() -> int | None:
    """Bytes that this process can take of the host's memory; None where the system does not tell, as outside of Linux.

    A container may have less than the machine.
    """
    free = [_of_meminfo(), *(_of_container(*names) for names in _CONTAINERS)]
    return min((size for size in free if size is not None), default=None)


def _of_meminfo() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _of_container(folder: str, limit: str, used: str, idle: str) -> int | None:
    """What a control group leaves: files that it has read and does not need count as free."""
    try:
        most = int((Path(folder) / limit).read_text())
        idle_bytes = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())[idle]
        return max(0, most - int((Path(folder) / used).read_text()) + int(idle_bytes))
    except (OSError, KeyError, ValueError):  # no limit is called "max"
        return None
