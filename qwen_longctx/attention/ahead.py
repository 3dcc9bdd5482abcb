"""Compiles the kernels of a sparse prefill side by side, where a first prompt would compile one after another."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from qwen_longctx import ops
from qwen_longctx.geometry.positions import Span
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops import fp8, norm, triton_runtime
from qwen_longctx.ops.block_shares import block_shares
from qwen_longctx.ops.compact import compact
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.rotate import rotate_triton
from qwen_longctx.ops.row_lse import row_lse
from qwen_longctx.sparsity.request import Request
from qwen_longctx.sparsity.rules import block_scores
from qwen_longctx.sparsity.view import Prompt, SpanView

logger = logging.getLogger(__name__)

_MOST_THREADS = 8
_SAFE = (3, 4)  # Triton's compiler runs in several threads at once from here on
_NARROWEST = 1024  # blocks: prompts of fewer share a variant of choosing


class Shapes(NamedTuple):
    """What kernels are compiled for, beside the rule.

    Attributes
    ----------
    device : torch.device
    dtype : torch.dtype
    heads, kv_heads, head_dim : int
    hidden, inner : int
        Widths of hidden states and of MLPs.
    normed_heads : bool
        Queries and keys have norms, as in Qwen3.
    eight_bits : bool
        The linear layers are in 8 bits.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    normed_heads: bool
    eight_bits: bool


def compile_ahead(request: Request, shapes: Shapes, length: int) -> None:
    """Compile what a prompt of `length` tokens will need, unless that was done in this process; waits until it is done.

    Does nothing for other rules than block scores, and where Triton cannot. What fails here fails again, with its own
    message, when it is needed.
    """
    if request.name == "block_scores" and _in_threads():
        settings = request.settings
        blocks = max(_NARROWEST, 1 << (-(-length // settings.tile) - 1).bit_length())
        beyond = length > settings.stride
        _compile(shapes, request.prompt.options, settings.tile, settings.kernel, settings.last_q, blocks, beyond)


def _in_threads() -> bool:
    if not triton_runtime.AVAILABLE:
        return False
    major, minor = triton_runtime.triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= _SAFE


@lru_cache(maxsize=64)
def _compile(shapes: Shapes, options: Any, tile: int, kernel: str, last_q: int, blocks: int, beyond: bool) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = kernels(shapes, options, tile, last_q, blocks, beyond).values()
    with ThreadPoolExecutor(min(_MOST_THREADS, cores, len(groups)), "compile") as pool:
        running = [pool.submit(_quietly, group) for group in groups]
        _quietly([partial(attention_on_lists, shapes, tile, kernel, beyond)])  # whose compiler is not made for threads
    for one in running:
        one.result()


@torch.no_grad()
def _quietly(jobs: Iterable[Callable[[], Any]]) -> None:
    for job in jobs:
        try:
            job()
        except Exception as error:
            logger.debug("compiling ahead: %s", error)


def kernels(
    shapes: Shapes, options: block_scores.Options, tile: int, last_q: int, blocks: int, beyond: bool
) -> dict[str, list[Callable[[], Any]]]:
    """Calls on a few numbers, one for each variant of each Triton kernel, by its name.

    Calls of one kernel belong in one thread: Triton makes the dictionary of its variants at the first. `blocks` is the
    least power of two that is no less than the blocks of keys of the prompt. `beyond` its first chunk attention
    comes in more parts to merge.
    """
    device, dtype, heads, kv_heads, head_dim, hidden, inner, normed_heads, eight_bits = shapes
    new = partial(torch.zeros, device=device, dtype=dtype)
    exact = partial(torch.zeros, device=device, dtype=torch.float32)
    tokens, rows, means = 2 * tile, block_scores.POOLED_ROWS, block_scores.MEANS_A_BLOCK
    q, k, wide = new(1, tokens, heads, head_dim), new(1, tokens, kv_heads, head_dim), new(1, 16, hidden)
    lse, limits = exact(1, heads, tokens), torch.zeros(tokens, dtype=torch.int64, device=device)
    table, weight, gate = new(1, tokens, 1, head_dim), new(hidden), new(1, 16, inner)
    pooled = slice(0, 2 * rows)
    scored = q[:, pooled], k, lse[..., pooled], limits[pooled], exact(1, heads, 2, tokens // means)
    widths = [_NARROWEST << i for i in range((blocks // _NARROWEST).bit_length())]
    calls: dict[str, list[Callable[[], Any]]] = {
        "_block_shares": [partial(block_shares, *scored, rows=rows, per_block=means, scale=1.0)],
        "_keep": [partial(_choose, shapes, options, tile, width) for width in widths],
        "_row_lse": [partial(row_lse, q[:, :last_q], k, limits[:last_q], scale=1.0)],
        "_merge": [partial(merge, [(q, lse)] * parts) for parts in ((2, 3) if beyond else (2,))],
        "_compact": [partial(compact, torch.zeros(1, heads, 2, 2, dtype=torch.bool, device=device), tile)],
        "_rotate": [partial(rotate_triton, q, table, table)],
        "_norm": [partial(norm.rms_norm, wide, weight, 1e-6)],  # of the last hidden states
    }
    if not options.fixed and block_scores.MISSED[options.fidelity] is not None:
        every = q, k, lse, limits, exact(1, heads, 2, 2)
        calls["_block_shares"].append(partial(block_shares, *every, rows=tile, per_block=tile, scale=1.0))
    if normed_heads:
        calls["_norm"].append(partial(norm.rms_norm, q, new(head_dim), 1e-6))
    if eight_bits:
        calls["_norm"] += [
            partial(norm.add_rms_norm_rows, wide, wide, weight, 1e-6),
            partial(norm.rms_norm_rows, wide, weight, 1e-6),
        ]
        calls["_rows"] = [
            partial(fp8.silu_mul_rows, gate, gate),
            partial(fp8.cast_rows, new(1, 16, heads * head_dim)),
        ]
    else:
        calls["_norm"].append(partial(norm.add_rms_norm, wide, wide, weight, 1e-6))
        calls["_silu_mul"] = [partial(norm.silu_mul, gate, gate)]
    return calls


def _choose(shapes: Shapes, options: block_scores.Options, tile: int, blocks: int) -> None:
    span = Span((blocks - 1) * tile, blocks * tile, ())
    tiles = Tiles.of(span, tile, shapes.device)

    def nothing(*_: Any) -> torch.Tensor:
        raise AssertionError("choosing looks at scores and tiles only")

    view = SpanView(0, span, tiles, (), torch.empty(0), 1.0, nothing, nothing)
    estimates = torch.zeros(1, shapes.heads, 1, blocks, device=shapes.device)
    block_scores.best_blocks(view, estimates, torch.ones(shapes.heads, device=shapes.device), Prompt(options, 1.0, 1))


def attention_on_lists(shapes: Shapes, tile: int, kernel: str, beyond: bool) -> None:
    """A call of flash-attn-4 where it takes the lists: other engines compile for each length anew.

    A causal one, and one that is not for the keys of earlier chunks, of prompts that go `beyond` the first.
    """
    device, dtype = shapes.device, shapes.dtype
    name = ops.list_kernel(kernel, device, dtype, shapes.head_dim, tile)
    if name != "fa4":
        return
    q = torch.zeros(1, 3 * tile, shapes.heads, shapes.head_dim, device=device, dtype=dtype)  # more than a few
    k = torch.zeros(1, 3 * tile, shapes.kv_heads, shapes.head_dim, device=device, dtype=dtype)
    seen = torch.ones(3, 3, dtype=torch.bool, device=device).tril().expand(1, shapes.heads, 3, 3)
    for causal in (True, False) if beyond else (True,):
        ops.on_lists(name)(q, k, k, blocks=compact(seen, tile), causal=causal, scale=1.0)
