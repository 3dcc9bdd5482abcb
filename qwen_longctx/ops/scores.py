"""Share of attention that each block of keys gets from a tile of queries, judged by means of keys."""

from __future__ import annotations

import torch
from torch.nn import functional

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.lse import row_logits

_LOGITS_AT_A_TIME = 1 << 24  # bounds the logits that exist at once


def block_shares(
    q: torch.Tensor,
    means: torch.Tensor,
    lse: torch.Tensor,
    limits: torch.Tensor,
    *,
    rows: int,
    per_block: int,
    scale: float,
) -> torch.Tensor:
    """Softmax shares of mean keys, summed by block: the largest that any row of a tile gives it.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, tiles * rows, heads, head_dim): the rows that speak for each tile.
    means : torch.Tensor
        Shape (batch, means, kv_heads, head_dim).
    lse : torch.Tensor
        Shape (batch, heads, tiles * rows): each row's log-sum-exp over all the means it is judged by.
    limits : torch.Tensor
        Shape (tiles * rows,), integer: each row meets this many of the first means.
    rows : int
        Rows a tile.
    per_block : int
        Means a block.
    scale : float

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, tiles, ceil(means / per_block)), float32 (float64 for float64 input).
    """
    if uses_triton(q):
        from qwen_longctx.ops import gpu

        return gpu.block_shares(q, means, lse, limits, rows=rows, per_block=per_block, scale=scale)
    step = rows * max(1, _LOGITS_AT_A_TIME // max(1, q.shape[0] * q.shape[2] * rows * means.shape[1]))
    floor = torch.finfo(lse.dtype).min
    parts = []
    for start in range(0, q.shape[1], step):
        some = slice(start, start + step)
        logits = row_logits(q[:, some], means, limits[some], scale=scale)
        shares = torch.exp(logits - lse[:, :, some].clamp(min=floor)[..., None])
        shares = functional.pad(shares, (0, -means.shape[1] % per_block)).unflatten(3, (-1, per_block)).sum(dim=4)
        parts.append(shares.unflatten(2, (-1, rows)).amax(dim=3))
    return torch.cat(parts, dim=2)
