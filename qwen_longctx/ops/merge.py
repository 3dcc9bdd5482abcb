"""Exact merge of attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_longctx.ops.device import uses_triton

MOST_FUSED = 4  # parts that the Triton kernel merges in one pass
TOKENS_AT_A_TIME = 8192  # bounds the float32 partial sums elsewhere


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial results by their log-sum-exp into that of one softmax over all keys.

    Parameters
    ----------
    parts : sequence of (out, lse)
        `out` of shape (batch, queries, heads, head_dim), `lse` of shape (batch, heads, queries), -inf where empty.

    Returns
    -------
    out, lse
        Of the same shapes and dtypes. Sums run in float32 at least. A query empty in all parts gives 0 and -inf.
    """
    if len(parts) == 1:
        return parts[0]
    if len(parts) <= MOST_FUSED and uses_triton(parts[0][0]):
        from qwen_longctx.ops import gpu

        return gpu.merge(parts)
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.clamp(min=torch.finfo(lse.dtype).min)).transpose(2, 3).unsqueeze(-1)
    slices = [_weighted(parts, weights, t) for t in range(0, lse.shape[-1], TOKENS_AT_A_TIME)]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=1), lse


def _weighted(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: torch.Tensor, start: int) -> torch.Tensor:
    tokens = slice(start, start + TOKENS_AT_A_TIME)
    total = parts[0][0][:, tokens] * weights[0, :, tokens]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total = total + out[:, tokens] * weight[:, tokens]
    return total.to(parts[0][0].dtype)
