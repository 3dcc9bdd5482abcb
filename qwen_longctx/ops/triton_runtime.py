"""Triton for the kernels of the operations, or stand-ins that let their modules be imported where it is absent.

A kernel stands in the file of its operation, below the PyTorch function that does the same. Softmaxes run in base 2
inside a kernel, and results are natural logarithms again.

Triton compiles a kernel anew where a number is 1 or divisible by 16 and was not before, unless ``do_not_specialize``
names it. So every kernel names its counts, which vary by the length of a prompt and gain nothing by it. Strides stay
out of the list: loads of several numbers at once need to know what divides them, and they are alike at every length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """What the modules read of Triton while they are imported: kernels stay plain functions that nobody calls."""

        @staticmethod
        def jit(kernel: Any = None, **options: Any) -> Any:
            return (lambda given: given) if kernel is None else kernel

        constexpr = float

    triton = tl = _Absent

AVAILABLE = triton is not tl

KEYS_AT_A_TIME = 64
ROWS_AT_A_TIME = 64
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make that the device of the first argument."""

    @functools.wraps(launch)
    def launched(first: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, torch.Tensor) else first[0][0]):
            return launch(first, *args, **kwargs)

    return launched
