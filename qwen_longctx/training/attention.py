"""Attention within the documents of a packed sequence, with exact gradients, by the fastest kernel that runs.

Queries, keys and values have shape (tokens, heads, head_dim). A result's log-sum-exp has shape (heads, tokens).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qwen_longctx.errors import InvalidValue
from qwen_longctx.ops import aten, engines, fa4
from qwen_longctx.ops.aten import Gradients, Result

_CUDNN_LEAST = 8192  # tokens of a document: cuDNN plans anew for each length, which shorter ones do not pay for
_TRIED = (384, 129)  # tokens of the documents on which a kernel is compared with the definition
_TIMED = 16384  # tokens of the document on which kernels are timed, at most
_aten = torch.ops.aten


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed sequence begin.

    Attributes
    ----------
    starts : torch.Tensor
        Shape (documents + 1,), int32, on the device of the model; the last is the number of tokens.
    """

    starts: torch.Tensor

    @cached_property
    def slices(self) -> list[slice]:
        """The tokens of each document that has any."""
        at = self.starts.tolist()
        return [slice(a, b) for a, b in zip(at[:-1], at[1:], strict=True) if b > a]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(part.stop - part.start for part in self.slices)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Shape (tokens,), int64: of each token within its document."""
        begins, lengths = self.starts[:-1].long(), self.starts.diff().long()
        tokens = int(self.starts[-1])
        return torch.arange(tokens, device=self.starts.device) - begins.repeat_interleave(lengths, output_size=tokens)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it attends to, in one head."""
        lengths = self.starts.diff().long()
        return int((lengths * (lengths + 1) // 2).sum())


class Kernel(NamedTuple):
    """One way to compute attention within documents.

    Attributes
    ----------
    name : str
    forward : callable
        ``forward(q, k, v, documents, scale) -> (out, lse)``.
    backward : callable
        ``backward(grad, q, k, v, out, lse, documents, scale) -> (dq, dk, dv)``.
    why_not : callable
        ``why_not(device, dtype, head_dim) -> str``: why it cannot take such queries, empty if it can.
    """

    name: str
    forward: Callable[..., Result]
    backward: Callable[..., Gradients]
    why_not: Callable[[torch.device, torch.dtype, int], str]


# --- a document at a time, by PyTorch's kernels -------------------------------------------------------------------


def _one_by_one(
    run: Callable[..., Result], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float
) -> Result:
    results = [run(q[None, at], k[None, at], v[None, at], causal=True, scale=scale) for at in documents.slices]
    if len(results) == 1:
        return results[0][0][0], results[0][1][0]
    outs, lses = zip(*results, strict=True)
    return torch.cat([out[0] for out in outs]), torch.cat([lse[0] for lse in lses], dim=-1)


def _one_by_one_backward(
    run: Callable[..., Gradients],
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    documents: Documents,
    scale: float,
) -> Gradients:
    found = []
    for at in documents.slices:
        row = [x[None, at] for x in (grad, q, k, v, out)]
        found.append(run(*row, lse[None, :, at], causal=True, scale=scale))
    if len(found) == 1:
        dq, dk, dv = found[0]
        return dq[0], dk[0], dv[0]
    dq, dk, dv = (torch.cat([one[0] for one in ones]) for ones in zip(*found, strict=True))
    return dq, dk, dv


def _cudnn_backward(
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
    """cuDNN's own backward, for the log-sum-exp of its own forward: here a document is the whole softmax."""
    queries, keys, nothing = q.shape[1], k.shape[1], torch.zeros((), dtype=torch.int64, device=q.device)
    grad, q, k, v, out = (aten.roomless(x).transpose(1, 2) for x in (grad.contiguous(), q, k, v, out.contiguous()))
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.contiguous()[..., None], nothing, nothing, None, None, None, queries, keys, 0.0, causal,
        scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _cudnn_where_long(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> Result:
    run = aten.cudnn if q.shape[1] >= _CUDNN_LEAST else aten.flash
    return run(q, k, v, causal=causal, scale=scale)


def _cudnn_where_long_backward(grad: torch.Tensor, q: torch.Tensor, *rest: torch.Tensor, **how: Any) -> Gradients:
    run = _cudnn_backward if q.shape[1] >= _CUDNN_LEAST else aten.flash_backward
    return run(grad, q, *rest, **how)


def _why_not_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return "runs on CUDA devices"
    return aten.why_not_cudnn(device, dtype, head_dim, _CUDNN_LEAST)


def _engine(name: str) -> Kernel:
    """One of the engines of `ops`, a document at a time."""
    row = engines.ENGINES[name]
    assert row.backward is not None

    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        if name in ("flash", "efficient") and device.type != "cuda":
            return "runs on CUDA devices"
        return row.why_not(device, dtype, head_dim, 1)

    return Kernel(name, partial(_one_by_one, row.function), partial(_one_by_one_backward, row.backward), why_not)


# --- all documents at once, by flash-attn-4 -----------------------------------------------------------------------


def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float) -> Result:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        *(x.contiguous() for x in (q, k, v)), **_varlen(documents), softmax_scale=scale, causal=True, return_lse=True
    )
    return out, lse


def _fa4_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    documents: Documents,
    scale: float,
) -> Gradients:
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, out, grad, lse = (x.contiguous() for x in (q, k, v, out, grad, lse))
    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad, lse, softmax_scale=scale, causal=True, **_varlen(documents))
    return dq, dk, dv


def _varlen(documents: Documents) -> dict[str, Any]:
    """Where documents begin, for queries and keys alike."""
    return {
        "cu_seqlens_q": documents.starts,
        "cu_seqlens_k": documents.starts,
        "max_seqlen_q": documents.longest,
        "max_seqlen_k": documents.longest,
    }


def _why_not_fa4(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return fa4.why_not(device, dtype, head_dim, fa4.BLOCK)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("fa4", _fa4, _fa4_backward, _why_not_fa4),
        Kernel(
            "cudnn",
            partial(_one_by_one, _cudnn_where_long),
            partial(_one_by_one_backward, _cudnn_where_long_backward),
            _why_not_cudnn,
        ),
        _engine("flash"),
        _engine("efficient"),
        _engine("cpu"),
        _engine("reference"),
    )
}


# --- the choice ---------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The kernel of a run, and what was found out about each: milliseconds of both directions, or why not."""

    kernel: Kernel
    found: dict[str, Any]


def choose(
    setting: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, longest: int
) -> Choice:
    """The kernel that `setting` names; for "auto" the fastest of those that compute what the definition does.

    On a CUDA device every kernel is tried on two short documents, and those that are right are timed on a long one.

    Parameters
    ----------
    setting : str
        Name of a kernel, or "auto".
    device, dtype, heads, kv_heads, head_dim
        Of the queries and keys.
    longest : int
        Tokens of the longest document of the run.

    Raises
    ------
    InvalidValue
        The named kernel does not run here, or computes something else.
    """
    if setting != "auto" and setting not in KERNELS:
        raise InvalidValue(f"kernel must be auto or one of {', '.join(KERNELS)}, got {setting!r}")
    names = [setting] if setting != "auto" else [name for name in KERNELS if name != "reference"]
    found: dict[str, Any] = {}
    for name in names:
        kernel = KERNELS[name]
        lack = kernel.why_not(device, dtype, head_dim) or _wrong(kernel, device, dtype, heads, kv_heads, head_dim)
        if lack:
            found[name] = lack
        elif device.type != "cuda":
            return Choice(kernel, found)
        else:
            found[name] = _milliseconds(kernel, device, dtype, heads, kv_heads, head_dim, min(longest, _TIMED))
    timed = {name: value for name, value in found.items() if not isinstance(value, str)}
    if timed:
        return Choice(KERNELS[min(timed, key=timed.__getitem__)], found)
    if setting != "auto":
        raise InvalidValue(f"kernel {setting!r} cannot be taken: it {found[setting]}. Leave kernel at 'auto'")
    return Choice(KERNELS["reference"], found)


def _drawn(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, lengths: tuple[int, ...]
) -> tuple[list[torch.Tensor], Documents]:
    """Gradient, queries, keys and values of random documents; the random state of the run is left as it is."""
    source = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    shapes = [(tokens, n, head_dim) for n in (heads, heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=source).to(device, dtype) for shape in shapes]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return tensors, Documents(starts)


def _wrong(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str:
    """How a kernel fails on two documents, empty if it does not: it need be there, run, and compute the definition."""
    if kernel.name in ("reference", "cpu"):
        return ""
    (grad, *three), documents = _drawn(device, dtype, heads, kv_heads, head_dim, _TRIED)
    scale = head_dim**-0.5
    try:
        out, lse = kernel.forward(*three, documents, scale)
        got = [out, *kernel.backward(grad, *three, out, lse, documents, scale)]
        if kernel.name == "cudnn":  # whose documents are long
            (grad, *three), documents = _drawn(device, dtype, heads, kv_heads, head_dim, (_CUDNN_LEAST,))
            out, lse = kernel.forward(*three, documents, scale)
            got = [out, *kernel.backward(grad, *three, out, lse, documents, scale)]
            beside = KERNELS["flash"]
        else:
            beside = KERNELS["reference"]
        # the definition works in float32 on the rounded numbers
        exact = [grad, *three] if beside.name == "flash" else [x.float() for x in (grad, *three)]
        out, lse = beside.forward(*exact[1:], documents, scale)
        wanted = [out, *beside.backward(*exact, out, lse, documents, scale)]
    except Exception as error:  # whatever a package of others raises: another kernel does the work
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    step = torch.finfo(dtype).eps
    for mine, true in zip(got, wanted, strict=True):
        error_of = (mine.float() - true.float()).norm() / true.float().norm()
        if not error_of <= 4 * step:
            return f"computes something else: relative error {float(error_of):.2g} on documents of {_TRIED} tokens"
    return ""


def _milliseconds(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, tokens: int
) -> float:
    """Of forward and backward of one document, the faster of two."""
    (grad, *three), documents = _drawn(device, dtype, heads, kv_heads, head_dim, (tokens,))
    scale, times = head_dim**-0.5, []
    for _ in range(3):  # the first warms up
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        out, lse = kernel.forward(*three, documents, scale)
        kernel.backward(grad, *three, out, lse, documents, scale)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return round(1000 * min(times[1:]), 3)


# --- under autograd -----------------------------------------------------------------------------------------------


class Kept:
    """The result of one layer's attention: kept when it is first computed, and taken when the layer is recomputed.

    Parameters
    ----------
    keep, bring : callable
        What a tensor is exchanged for while it waits, and back: it may leave the device.
    """

    def __init__(self, keep: Callable[[torch.Tensor], Any], bring: Callable[[Any], torch.Tensor]) -> None:
        self._keep, self._bring = keep, bring
        self._held: tuple[Any, torch.Tensor] | None = None

    def put(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep a result; the log-sum-exp is small and stays where it is."""
        self._held = self._keep(out), lse

    def take(self) -> Result | None:
        """The result, once; None if there is none."""
        if self._held is None:
            return None
        (handle, lse), self._held = self._held, None
        return self._bring(handle), lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    kernel: Kernel,
    scale: float,
    kept: Kept | None = None,
) -> torch.Tensor:
    """Causal attention within each document, differentiable once in `q`, `k` and `v`.

    Parameters
    ----------
    q : torch.Tensor
        Shape (tokens, heads, head_dim), of a dtype that `kernel` takes.
    k, v : torch.Tensor
        Shape (tokens, kv_heads, head_dim), of the same dtype.
    documents : Documents
    kernel : Kernel
    scale : float
        Factor of the logits.
    kept : Kept, optional
        Where the layer is computed again for the backward: the forward of attention is not.

    Returns
    -------
    torch.Tensor
        Shape and dtype of `q`.
    """
    return _Attention.apply(q, k, v, documents, kernel, scale, kept)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: Documents,
        kernel: Kernel,
        scale: float,
        kept: Kept | None,
    ) -> torch.Tensor:
        result = None if kept is None else kept.take()
        if result is None:
            result = kernel.forward(q, k, v, documents, scale)
            if kept is not None:
                kept.put(*result)
        out, lse = result
        ctx.documents, ctx.kernel, ctx.scale = documents, kernel, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = ctx.kernel.backward(grad, q, k, v, out, lse, ctx.documents, ctx.scale)
        return (*gradients, None, None, None, None)
