"""The log-sum-exp alone: what a few queries would see of all keys, without the values."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qwen_longctx.ops.device import uses_triton

_LOGITS_AT_A_TIME = 1 << 24  # bounds the logits that exist at once


def row_lse(q: torch.Tensor, k: torch.Tensor, limits: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Natural log of the softmax's denominator of every query.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, queries, heads, head_dim).
    k : torch.Tensor
        Shape (batch, keys, kv_heads, head_dim).
    limits : torch.Tensor
        Shape (queries,), integer: each query meets this many of the first keys.
    scale : float

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, queries), float32 (float64 for float64 input); -inf where the limit is 0.
    """
    if uses_triton(q):
        from qwen_longctx.ops import gpu

        return gpu.row_lse(q, k, limits, scale=scale)
    batch, queries, heads, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    total = torch.full((batch, heads, queries), -torch.inf, dtype=exact, device=q.device)
    step = max(1, _LOGITS_AT_A_TIME // max(1, batch * heads * queries))
    for start in range(0, k.shape[1], step):
        logits = row_logits(q, k[:, start : start + step], limits - start, scale=scale)
        total = torch.logaddexp(total, logits.logsumexp(dim=-1))
    return total


def joint_lse(parts: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], *, scale: float) -> torch.Tensor:
    """`row_lse` of one set of queries over several sets of keys: `parts` are ``(q, k, limits)``, q rotated for each."""
    return torch.logsumexp(torch.stack([row_lse(*part, scale=scale) for part in parts]), dim=0)


def row_logits(q: torch.Tensor, k: torch.Tensor, limits: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Logits of shape (batch, heads, queries, keys), -inf from each query's limit on. Arguments as in `row_lse`."""
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(2, (k.shape[2], -1)).to(exact)
    logits = torch.einsum("btngd,bsnd->bngts", grouped, k.to(exact)).flatten(1, 2) * scale
    return logits.masked_fill(torch.arange(k.shape[1], device=k.device) >= limits[:, None], -torch.inf)
