"""Finds, on the CPU, what would make the host wait for a device.

Tensors that stand for those of a device are marked, and what is computed from them is marked too. Reading a marked one
on the host is an error; so is moving numbers of the host to the device from memory that is not pinned, which waits for
all that the device has to do. Tensors of the host that never meet a marked one may be read. Here the device is the CPU
too: what is made with `device="cpu"`, spelled out, is the host's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_READS = {  # operations whose result, or the shape of it, the host has to know
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}
_TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item}
_FROM_HOST = {torch.tensor, torch.as_tensor}


class Waits(AssertionError):
    """The host would wait for a device."""


class _Marks:
    """Storages of tensors that stand for those of a device. They are kept, so that none has the place of another."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._kept: dict[int, Any] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage

    def __contains__(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._kept


class _Operations(TorchDispatchMode):
    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        marked = any(leaf in self._marks for leaf in leaves)
        if marked and function in _READS:
            raise Waits(f"{function} reads a tensor of the device")
        by_index = function in (_aten.index.Tensor, _aten.index_put_.default)
        if marked and by_index and any(getattr(leaf, "dtype", None) == torch.bool for leaf in tree_leaves(args[1])):
            raise Waits("a tensor of the device is indexed by a mask")
        result = function(*args, **kwargs)
        if marked:
            for one in (*tree_leaves(result), *leaves[:1]):  # an operation in place writes to its first argument
                if isinstance(one, torch.Tensor):
                    self._marks.add(one)
        return result


class _Calls(TorchFunctionMode):
    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _TO_HOST and args and args[0] in self._marks:
            raise Waits(f"{function.__name__} takes a tensor of the device to the host")
        if function in _FROM_HOST and kwargs.get("device", "cpu") != "cpu" and args[0] != []:
            raise Waits(f"{function.__name__} takes numbers of the host to the device, which waits for it")
        return function(*args, **kwargs)


@contextmanager
def no_waits(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Raise `Waits` in the block where the host would wait for a device on which `tensors` lie."""
    marks = _Marks(tensors)
    with _Calls(marks), _Operations(marks):
        yield
