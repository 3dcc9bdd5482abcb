"""The engines of attention: one row each, the choice among them, and the calls that go through it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch.nn import functional

from qwen_longctx.errors import InvalidValue, Unsupported
from qwen_longctx.ops import aten, fa4, flex
from qwen_longctx.ops.aten import Gradients, Result
from qwen_longctx.ops.compact import BlockLists
from qwen_longctx.ops.device import check_dtypes, needs_gradient
from qwen_longctx.ops.reference import empty, reference, reference_backward


class Engine(NamedTuple):
    """One way to compute attention.

    Attributes
    ----------
    name : str
    function : callable
        ``function(q, k, v, *, causal, scale) -> (out, lse)``, see `ops`; with the further argument `blocks` where it
        takes lists. A causal call without lists has as many keys as queries, as `pieces` cuts it.
    takes_lists : bool
        Whether it computes attention over block lists.
    backward : callable or None
        ``backward(grad, q, k, v, out, lse, *, causal, scale) -> (dq, dk, dv)``, see `backward`.
    why_not : callable
        ``why_not(device, dtype, head_dim, size) -> str``: why it cannot take such queries, empty if it can. `size` is
        the number of queries in a tile; without lists the whole call is one tile.
    """

    name: str
    function: Callable[..., Result]
    takes_lists: bool
    backward: Callable[..., Gradients] | None
    why_not: Callable[[torch.device, torch.dtype, int, int], str]

    @property
    def differentiable(self) -> bool:
        """Whether it has a backward. Dense attention takes such engines only: one choice for both directions."""
        return self.backward is not None


def _never(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    return ""


ENGINES = {
    engine.name: engine
    for engine in (  # the fastest first
        Engine("fa4", fa4.fa4, True, None, fa4.why_not),
        Engine("flex", flex.flex, True, None, flex.why_not),
        Engine("cpu", aten.cpu, False, aten.cpu_backward, aten.why_not_cpu),
        Engine("cudnn", aten.cudnn, False, aten.flash_backward, aten.why_not_cudnn),
        Engine("flash", aten.flash, False, aten.flash_backward, aten.why_not_flash),
        Engine("efficient", aten.efficient, False, aten.efficient_backward, aten.why_not_efficient),
        Engine("reference", reference, True, reference_backward, _never),
    )
}


# --- dense attention ----------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of one call that all engines agree on: the queries from `start` to the last, and some keys."""

    start: int
    keys: slice
    causal: bool


def pieces(queries: int, keys: int, causal: bool) -> list[Piece]:
    """Cut a call into pieces; a query that attends to no key is in none of them.

    The last query attends to every key, so that a causal call is a causal square and the keys before it, which need
    no mask.
    """
    if queries == 0 or keys == 0:
        return []
    if not causal or queries == 1:
        return [Piece(0, slice(0, keys), False)]
    past = keys - queries
    square = Piece(max(0, -past), slice(max(0, past), keys), True)
    return [square, Piece(0, slice(0, past), False)] if past > 0 else [square]


def dense(q: torch.Tensor) -> Engine:
    """The fastest engine for dense attention of queries like `q`, of shape (batch, queries, heads, head_dim)."""
    return _dense(q.device, q.dtype, q.shape[-1], q.shape[1])


@lru_cache  # decode asks once for each segment of each layer
def _dense(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> Engine:
    rows = (row for row in ENGINES.values() if row.differentiable)
    return next(row for row in rows if not row.why_not(device, dtype, head_dim, size))


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> list[Result]:
    """Results of the pieces of one call by the fastest engine, each for all queries; there is at least one."""
    check_dtypes(q, k, v)
    run = dense(q).function
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    if q.shape[1] == 1 and k.shape[1]:  # decode, which counts microseconds
        return [run(q, k, v, causal=False, scale=scale)]
    cuts = pieces(q.shape[1], k.shape[1], causal)
    if not cuts:
        return [empty(q)]
    if len(cuts) == 1 and cuts[0].start == 0:
        return [run(q, k, v, causal=cuts[0].causal, scale=scale)]
    return [
        _from_row(start, run(q[:, start:], k[:, keys], v[:, keys], causal=masked, scale=scale))
        for start, keys, masked in cuts
    ]


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> Gradients:
    """Gradients of one call whose keys are some of those of a softmax.

    Parameters
    ----------
    grad, out : torch.Tensor
        Of the shape of `q`: the gradient of the softmax's result, and the result.
    q, k, v : torch.Tensor
        As for the forward.
    lse : torch.Tensor
        Shape (batch, heads, queries): log-sum-exp over all keys of the softmax, inf where there are none.
    causal, scale
        As for the forward.
    """
    run = dense(q).backward
    assert run is not None
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    for start, keys, masked in pieces(q.shape[1], k.shape[1], causal):
        grad_some, q_some, out_some = (x[:, start:] for x in (grad, q, out))
        dq_some, dk[:, keys], dv[:, keys] = run(
            grad_some, q_some, k[:, keys], v[:, keys], out_some, lse[..., start:], causal=masked, scale=scale
        )
        dq[:, start:] += dq_some
    return dq, dk, dv


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with the numbers of a head side by side, as every fused kernel wants them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _from_row(start: int, result: Result) -> Result:
    """A result for the queries from `start` on as one for all queries: those before attend to no key."""
    if start == 0:
        return result
    out, lse = result
    return functional.pad(out, (0, 0, 0, 0, start, 0)), functional.pad(lse, (start, 0), value=-torch.inf)


# --- attention over block lists -----------------------------------------------------------------------------------


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> dict[str, str]:
    """For every fast engine that takes block lists, fastest first: why it cannot run, empty if it can."""
    rows = (row for row in ENGINES.values() if row.takes_lists and row.name != "reference")
    return {row.name: row.why_not(device, dtype, head_dim, size) for row in rows}


def list_kernel(setting: str, device: torch.device, dtype: torch.dtype, head_dim: int, size: int) -> str:
    """Name of the engine that takes block lists for queries of this kind.

    Parameters
    ----------
    setting : str
        The setting `kernel`; "auto" is the fastest that runs there.
    device, dtype, head_dim
        Of the queries.
    size : int
        Tokens per block.

    Raises
    ------
    InvalidValue
        There is no such engine for block lists, or it does not run here.
    """
    rows = [row for row in ENGINES.values() if row.takes_lists]
    if setting == "auto":
        return next(row.name for row in rows if not row.why_not(device, dtype, head_dim, size))
    named = next((row for row in rows if row.name == setting), None)
    reason = named.why_not(device, dtype, head_dim, size) if named else "takes no block lists"
    if reason:
        raise InvalidValue(f'kernel="{setting}" {reason}: choose another, or leave it at "auto"')
    return setting


def on_lists(name: str) -> Callable[..., Result]:
    """Attention by the engine called `name`, as ``run(q, k, v, *, causal, scale, blocks) -> (out, lse)``."""
    return partial(_on_lists, ENGINES[name])


def _on_lists(
    engine: Engine,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    blocks: BlockLists,
) -> Result:
    check_dtypes(q, k, v)
    if needs_gradient(q, k, v) and not engine.differentiable:
        raise Unsupported(
            f"{engine.name} has no gradient on block lists: run sparse prefill under torch.no_grad(), "
            'or set sparse="off"'
        )
    if q.shape[1] == 0 or k.shape[1] == 0:
        return empty(q)
    return engine.function(q, k, v, causal=causal, scale=scale, blocks=blocks)
