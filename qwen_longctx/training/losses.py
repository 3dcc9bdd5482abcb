"""Cross-entropy of hidden states, some tokens at a time: the logits of a whole sequence never exist."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qwen_longctx.training.packing import IGNORED

CHUNK = 2048  # tokens: their logits over 152,000 words take 1.2 GB in float32


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T``, differentiable once in both.

    Liger-Kernel's fused kernel does the work where it is installed and runs. Otherwise gradients are worked out
    together with the loss, `chunk` tokens at a time, as no logits are kept for a backward.

    Parameters
    ----------
    hidden : torch.Tensor
        Shape (tokens, width), any float dtype.
    weight : torch.Tensor
        Shape (words, width), of that dtype.
    labels : torch.Tensor
        Shape (tokens,), int64; `IGNORED` where the loss does not count.
    chunk : int
        Tokens at a time.

    Returns
    -------
    torch.Tensor
        A number, in float32 or of the dtype of `hidden` if that is wider.
    """
    fused = liger() if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) else None
    if fused is not None:
        return fused.loss(hidden, weight, labels)
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk)


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Shape (tokens,): the cross-entropy of each token, without gradients; 0 where `labels` is `IGNORED`."""
    with torch.no_grad():
        parts = [
            functional.cross_entropy(logits, labels[at], reduction="none", ignore_index=IGNORED)
            for at, logits in _logits(hidden, weight, chunk)
        ]
    return torch.cat(parts)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits of some tokens after others, in float32 at least."""
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        logits = hidden[at] @ weight.T
        yield at, logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if for_weight else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for at, logits in _logits(hidden, weight, chunk):
            counts = labels[at] != IGNORED
            label = labels[at].masked_fill(~counts, 0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, label)).squeeze(1) * counts).sum()
            if d_hidden is None and d_weight is None:
                continue
            # the gradient of a logit: its probability, less 1 for the right word
            slope = logits.sub_(lse).exp_()
            slope.scatter_add_(1, label, torch.full_like(lse, -1.0))
            slope = slope.mul_(counts[:, None]).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[at] = slope @ weight
            if d_weight is not None:
                d_weight += (slope.T @ hidden[at]).to(exact)
        ctx.save_for_backward(*(x for x in (d_hidden, d_weight) if x is not None))
        ctx.wanted, ctx.dtype = (for_hidden, for_weight), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        d_hidden, d_weight = (saved.pop(0) if wanted else None for wanted in ctx.wanted)
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        return d_hidden, None if d_weight is None else (d_weight * grad).to(ctx.dtype), None, None


# --- kernels of Liger-Kernel --------------------------------------------------------------------------------------


class Liger:
    """What is taken from Liger-Kernel on CUDA devices, in half precision."""

    def __init__(self) -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

        self._loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
        self._rms_norm = liger_rms_norm
        self.silu_mul = liger_swiglu

    def loss(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `linear_cross_entropy`."""
        return self._loss(weight, hidden, labels)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """As `ops.norm.rms_norm`, with gradients, which do not overwrite those that come in."""
        return self._rms_norm(x, weight, epsilon, in_place=False)


@lru_cache
def liger() -> Liger | None:
    """The kernels, if the package is installed and can be imported."""
    try:
        return Liger()
    except Exception:  # an older or a broken installation: the work is done without it
        return None
