"""Attention over single keys chosen for each head (the verticals of MInference), gathered once a span."""

from __future__ import annotations

import torch

from qwen_longctx.ops.device import uses_triton

_LOGITS_AT_A_TIME = 1 << 24  # bounds the logits that exist at once


def columns(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, *, size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over gathered keys, without those that a tile attends to otherwise.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, queries, heads, head_dim).
    k, v : torch.Tensor
        Shape (batch, heads, columns, head_dim): each query head has columns of its own.
    keep : torch.Tensor
        Shape (batch, heads, tiles, columns), bool: which columns the tiles of queries meet.
    size : int
        Queries a tile.
    scale : float

    Returns
    -------
    out, lse
        As every kernel gives them; 0 and -inf where a tile keeps no column.
    """
    if uses_triton(q):
        from qwen_longctx.ops import gpu

        return gpu.columns(q, k, v, keep, size=size, scale=scale)
    tiles = max(1, _LOGITS_AT_A_TIME // max(1, q.shape[0] * q.shape[2] * size * k.shape[2]))
    parts = [
        _tiles(q[:, t * size : (t + tiles) * size], k, v, keep[:, :, t : t + tiles], size, scale)
        for t in range(0, keep.shape[2], tiles)
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=-1)


def _tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bthd,bhcd->bhtc", q.to(exact), k.to(exact)) * scale
    kept = keep.repeat_interleave(size, dim=2)[:, :, : q.shape[1]]
    logits = logits.masked_fill(~kept, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    probabilities = torch.exp(logits - lse.clamp(min=torch.finfo(exact).min)[..., None])
    return torch.einsum("bhtc,bhcd->bthd", probabilities, v.to(exact)).to(q.dtype), lse
