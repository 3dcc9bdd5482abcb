"""FlashAttention-4 (``flash_attn.cute``) on block lists: the fastest such engine on Hopper and newer."""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qwen_longctx.ops.compact import BlockLists
from qwen_longctx.ops.device import HALF, older_than

BLOCK = 128  # its tile of queries and of keys at the head dims of Qwen
_FEW = 2 * BLOCK  # causal queries up to which the package compiles kernels of their own, for seconds each
# of flash-attn-4: "1" keeps compiled kernels on disk, and in which folder
_SWITCH, _PLACE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@contextmanager
def _kept_on_disk() -> Iterator[None]:
    """Lets the package keep what it compiles for later processes, if it is imported inside the block.

    By itself it does so only if it is told, in a folder below /tmp that others may have made before. The user's own
    variables are left as they are, and so is the environment after the block.
    """
    folder = None if _SWITCH in os.environ else _folder()
    if folder is None:
        yield
        return
    added = {_SWITCH: "1", **({} if _PLACE in os.environ else {_PLACE: str(folder)})}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _folder() -> Path | None:
    """A folder of the user's own for compiled kernels; None where files cannot be written and locked there.

    The package would fail on such a folder in the middle of a prefill.
    """
    try:
        import fcntl

        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root).absolute() / "qwen_longctx" / "flash_attn_4"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError, RuntimeError):  # no such module, no room or rights, no home
        return None
    return folder


class _Muted:
    """Drops the warnings of the threads inside its ``with`` block, and passes on those of all others.

    The compiler beneath flash-attn-4 deprecates calls of its own, and sets the filters to "always" for each warning: no
    filter hides it. So this stands in place of ``warnings.showwarning`` while a thread is inside; filters stay as they
    are, because changing them would show old warnings of other modules again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        self._shown: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside.add(threading.get_ident())
            if warnings.showwarning is not self:
                self._shown, warnings.showwarning = warnings.showwarning, self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside.discard(threading.get_ident())
            if not self._inside and warnings.showwarning is self:
                warnings.showwarning = self._shown

    def __call__(self, *warning: Any, **where: Any) -> None:
        if threading.get_ident() not in self._inside:
            self._shown(*warning, **where)


_muted = _Muted()


def fa4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float, blocks: BlockLists
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over listed blocks. See `ops`.

    The end of the keys is masked in the last block of a list only, hence the ascending lists. With ``causal=True``
    and no mask function every listed block is masked, aligned at the bottom right.
    """
    rows = q.shape[1]
    if causal and rows <= _FEW and k.shape[1] >= rows + _FEW + BLOCK:
        q, blocks = _lengthened(q, blocks)
    with _muted:
        flash_attn_func, block_sparse_tensors = _functions()
        # it wants both lists, of blocks that a mask function masks and of others: there is no mask function
        lists = block_sparse_tensors(
            mask_block_cnt=torch.zeros_like(blocks.counts),
            mask_block_idx=blocks.indices,
            full_block_cnt=blocks.counts,
            full_block_idx=blocks.indices,
            block_size=(blocks.size, blocks.size),
        )
        out, lse, *_ = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=causal,
            pack_gqa=False,  # lists differ between the heads of a group
            block_sparse_tensors=lists,
            return_lse=True,
        )
    return out[:, -rows:], lse[..., -rows:]


def _lengthened(q: torch.Tensor, blocks: BlockLists) -> tuple[torch.Tensor, BlockLists]:
    """Tiles of no meaning before a few queries, each of which attends to the first block, so that the kernel of many
    queries runs: trials of a budget and ends of chunks would compile another."""
    tiles = _FEW // BLOCK
    counts = functional.pad(blocks.counts, (tiles, 0), value=1)
    indices = functional.pad(blocks.indices, (0, 0, tiles, 0))
    return functional.pad(q, (0, 0, 0, 0, _FEW, 0)), BlockLists(counts, indices, blocks.size)


@lru_cache
def _functions() -> tuple[Any, Any]:
    with _kept_on_disk():
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return flash_attn_func, BlockSparseTensorsTorch


@lru_cache
def _missing() -> str:
    """What is wrong with the package, empty if it can be imported: one built for another PyTorch, say, cannot."""
    try:
        with _muted:
            _functions()
    except ModuleNotFoundError as error:
        known = error.name in ("flash_attn", "flash_attn.cute")
        return "needs the package flash-attn-4" if known else f"cannot be imported: {error}"
    except Exception as error:  # whatever its own packages raise; other engines do the work
        return f"cannot be imported: {error}"
    return ""


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Why this engine cannot take such lists; empty if it can."""
    # on 8.0 it ignores the lists without a word (flash-attention issue 2897)
    if lack := older_than(device, (9, 0)):
        return lack
    if lack := _missing():
        return lack
    if dtype not in HALF:
        return f"takes half precision only, not {dtype}"
    if head_dim not in (64, 128):
        return f"takes lists at head dim 64 and 128 only, not {head_dim}"
    return "" if size == BLOCK else f"takes blocks of {BLOCK} tokens only, not {size}"
