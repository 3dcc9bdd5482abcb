"""Attention as it is defined, for tests, for attention weights and for devices that no fast kernel knows."""

from __future__ import annotations

import torch
from torch.nn import functional

from qwen_longctx.ops.compact import BlockLists

_LOGITS_AT_A_TIME = 1 << 26  # bounds the logits that exist at once


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float, blocks: BlockLists | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float32 (float64 for float64 input), a slice of queries at a time. See `ops`."""
    batch, queries, heads, head_dim = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    if queries == 0 or k.shape[1] == 0:
        return empty(q)
    if blocks is not None:
        parts = _listed(q, k, v, causal, scale, exact, blocks)
    else:
        step = max(1, _LOGITS_AT_A_TIME // (batch * heads * k.shape[1]))
        parts = [_slice(q, k, v, t, min(t + step, queries), causal, scale, exact) for t in range(0, queries, step)]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=-1)


def empty(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `q` to no keys: zeros, and -inf for the log-sum-exp."""
    exact = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=exact, device=q.device)
    return torch.zeros_like(q), lse


def reference_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one call whose keys are some of those of a softmax, as `engines.backward`, a slice at a time."""
    batch, queries, heads, head_dim = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
    step = max(1, _LOGITS_AT_A_TIME // max(1, batch * heads * k.shape[1]))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        grouped_q, grouped_grad, grouped_out = (
            x[:, start:stop].unflatten(2, (k.shape[2], -1)).to(exact) for x in (q, grad, out)
        )
        logits = _logits(q, k, start, stop, causal, scale, exact)
        probabilities = torch.exp(logits - lse[..., start:stop, None].unflatten(1, (k.shape[2], -1)))
        dv += torch.einsum("bngts,btngd->bsnd", probabilities, grouped_grad)
        # gradient of the logits: probability * (gradient of the probability - its mean under the softmax)
        mean = (grouped_grad * grouped_out).sum(dim=-1).permute(0, 2, 3, 1)
        dlogits = torch.einsum("btngd,bsnd->bngts", grouped_grad, v.to(exact)) - mean[..., None]
        dlogits = dlogits.mul_(probabilities).mul_(scale)
        dq[:, start:stop] = torch.einsum("bngts,bsnd->btngd", dlogits, k.to(exact)).flatten(2, 3)
        dk += torch.einsum("bngts,btngd->bsnd", dlogits, grouped_q)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


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


def _listed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    exact: torch.dtype,
    blocks: BlockLists,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One part for each tile of queries: the keys of its blocks gathered, for each query head."""
    key_blocks, value_blocks = (_by_block(x, blocks.size, exact) for x in (k, v))
    parts = []
    for tile, room in enumerate(blocks.counts.amax(dim=(0, 1)).tolist()):
        tokens = slice(tile * blocks.size, min((tile + 1) * blocks.size, q.shape[1]))
        last = torch.arange(tokens.start, tokens.stop, device=q.device) + k.shape[1] - q.shape[1]
        at, hidden = _positions(blocks, tile, room, k.shape[1])
        hidden = hidden[:, :, None]
        if causal:
            hidden = hidden | (at[:, :, None] > last[:, None])
        gathered = [_gather(x, blocks.indices[:, :, tile, :room], q.shape[2]) for x in (key_blocks, value_blocks)]
        logits = torch.einsum("bthd,bhsd->bhts", q[:, tokens].to(exact), gathered[0]) * scale
        logits = logits.masked_fill(hidden, -torch.inf)
        lse = logits.logsumexp(dim=-1)
        probabilities = torch.exp(logits - lse.clamp(min=torch.finfo(exact).min)[..., None])
        parts.append((torch.einsum("bhts,bhsd->bthd", probabilities, gathered[1]).to(q.dtype), lse))
    return parts


def _by_block(x: torch.Tensor, size: int, exact: torch.dtype) -> torch.Tensor:
    """Keys or values as (batch, kv_heads, blocks, size, head_dim), zeros after the last."""
    padded = functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return padded.to(exact).unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def _positions(blocks: BlockLists, tile: int, room: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key numbers under the first `room` entries of a tile's lists, and which of them do not count."""
    inside = torch.arange(blocks.size, device=blocks.counts.device)
    at = (blocks.indices[:, :, tile, :room, None] * blocks.size + inside).flatten(2)
    listed = torch.arange(room, device=at.device).repeat_interleave(blocks.size)
    return at, (listed >= blocks.counts[:, :, tile, None]) | (at >= keys)


def _gather(x: torch.Tensor, indices: torch.Tensor, heads: int) -> torch.Tensor:
    """Blocks `indices`, (batch, heads, room), as (batch, heads, room * size, head_dim)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    owners = (torch.arange(heads, device=x.device) // (heads // x.shape[1]))[:, None]
    return x[rows, owners, indices.long()].flatten(2, 3)
