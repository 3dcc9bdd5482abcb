"""Attention as it is defined, for tests, for attention weights and for devices that no fast kernel knows."""

from __future__ import annotations

import torch

_LOGITS_AT_A_TIME = 1 << 26  # bounds the logits that exist at once


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float32 (float64 for float64 input), a slice of queries at a time. See `kernels`."""
    batch, queries, heads, head_dim = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] == 0:
        return torch.zeros_like(q), torch.full((batch, heads, queries), -torch.inf, dtype=exact, device=q.device)
    step = max(1, _LOGITS_AT_A_TIME // (batch * heads * k.shape[1]))
    parts = [_slice(q, k, v, t, min(t + step, queries), causal, scale, exact) for t in range(0, queries, step)]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=-1)


def weights(q: torch.Tensor, k: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """Attention weights of shape (batch, heads, queries, keys) in the dtype of `q`."""
    exact = torch.promote_types(q.dtype, torch.float32)
    logits = _logits(q, k, 0, q.shape[1], causal, scale, exact)
    return logits.softmax(dim=-1).flatten(1, 2).to(q.dtype)


def _logits(
    q: torch.Tensor, k: torch.Tensor, start: int, stop: int, causal: bool, scale: float, exact: torch.dtype
) -> torch.Tensor:
    """Logits of shape (batch, kv_heads, group, queries, keys)."""
    batch, queries, heads, head_dim = q.shape
    grouped = q[:, start:stop].reshape(batch, stop - start, k.shape[2], -1, head_dim).to(exact)
    logits = torch.einsum("btngd,bsnd->bngts", grouped, k.to(exact)) * scale
    if causal:
        last = torch.arange(start, stop, device=q.device) + k.shape[1] - queries
        hidden = torch.arange(k.shape[1], device=q.device) > last[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits


def _slice(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    stop: int,
    causal: bool,
    scale: float,
    exact: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _logits(q, k, start, stop, causal, scale, exact)
    lse = logits.logsumexp(dim=-1)
    probabilities = torch.exp(logits - lse.clamp(min=torch.finfo(exact).min)[..., None])
    out = torch.einsum("bngts,bsnd->btngd", probabilities, v.to(exact))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)
