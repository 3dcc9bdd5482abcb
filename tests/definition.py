"""Dual chunk attention a token at a time, straight from the table of the paper, in float64.

Nothing here is shared with the package: positions, masks, rotation and softmax are written out once more.
"""

from __future__ import annotations

import torch


def relative_rotations(i: int, j: int, chunk_size: int, local_size: int) -> tuple[int, int]:
    """Rotary positions of query i and key j."""
    stride = chunk_size - local_size
    apart = i // stride - j // stride
    if apart == 0:
        return i % stride, j % stride
    if apart == 1:
        return min(i % stride + stride, chunk_size), j % stride
    return chunk_size, j % stride


def all_rotations(tokens: int, chunk_size: int, local_size: int) -> torch.Tensor:
    """`relative_rotations` of all pairs, shape (tokens, tokens, 2)."""
    stride = chunk_size - local_size
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    apart = i // stride - j // stride
    query = torch.where(
        apart == 0, i % stride, torch.where(apart == 1, (i % stride + stride).clamp(max=chunk_size), chunk_size)
    )
    return torch.stack((query, (j % stride).expand(tokens, tokens)), -1)


def rotated(x: torch.Tensor, position: int, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotate one head vector by halves."""
    angle = position * inv_freq.double()
    first, second = x.double().chunk(2)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))


def dual_chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inv_freq: torch.Tensor,
    chunk_size: int,
    local_size: int,
    scale: float,
    first_key: int = 0,
) -> torch.Tensor:
    """One sequence: q (tokens, heads, dim); k, v (tokens, kv_heads, dim); keys before `first_key` are padding."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q, dtype=torch.float64)
    for i in range(first_key, tokens):
        for h in range(heads):
            logits = []
            for j in range(first_key, i + 1):
                at_q, at_k = relative_rotations(i - first_key, j - first_key, chunk_size, local_size)
                query, key = rotated(q[i, h], at_q, inv_freq), rotated(k[j, h // group], at_k, inv_freq)
                logits.append(query @ key * scale)
            share = torch.stack(logits).softmax(0)
            out[i, h] = share @ v[first_key : i + 1, h // group].double()
    return out


def dense_model(
    model: torch.nn.Module, ids: torch.Tensor, chunk_size: int, local_size: int, heat: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Logits of a Qwen model run densely in float64 on one sequence.

    `heat` multiplies the attention logits: one number, or one for each query, of shape (tokens, 1).
    """
    base, tokens = model.model, ids.shape[1]
    inv_freq = base.rotary_emb.inv_freq.double()
    at = all_rotations(tokens, chunk_size, local_size)
    x = base.embed_tokens(ids)
    for layer in base.layers:
        own = layer.self_attn
        h = layer.input_layernorm(x)
        shape = (tokens, -1, own.head_dim)
        q, k, v = (p(h).view(shape) for p in (own.q_proj, own.k_proj, own.v_proj))
        if hasattr(own, "q_norm"):
            q, k = own.q_norm(q), own.k_norm(k)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = _pair_logits(q, k, at, inv_freq * 1.0) * own.scaling * heat * base.rotary_emb.attention_scaling**2
        logits = logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
        out = torch.einsum("hts,shd->thd", logits.softmax(-1), v)
        x = x + own.o_proj(out.reshape(1, tokens, -1))
        y = layer.mlp(layer.post_attention_layernorm(x))
        x = x + (y[0] if isinstance(y, tuple) else y)
    return model.lm_head(base.norm(x))


def _pair_logits(q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotated products of all pairs: only the difference of the two rotations matters."""
    angle = (at[..., 0] - at[..., 1])[..., None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    q1, q2 = q.double().chunk(2, -1)
    k1, k2 = k.double().chunk(2, -1)
    even = torch.einsum("thd,shd->htsd", q1, k1) + torch.einsum("thd,shd->htsd", q2, k2)
    odd = torch.einsum("thd,shd->htsd", q1, k2) - torch.einsum("thd,shd->htsd", q2, k1)
    return (even * cos + odd * sin).sum(-1)
