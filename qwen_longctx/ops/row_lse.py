"""The log-sum-exp alone: attention of a few queries to all keys, without the values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from qwen_longctx.ops.device import capability, uses_triton
from qwen_longctx.ops.triton_runtime import KEYS_AT_A_TIME, LN2, ROWS_AT_A_TIME, on_its_device, tl, triton

_LOGITS_AT_A_TIME = 1 << 24  # bounds the logits that exist at once
_PROGRAMS_WANTED = 2048  # splits of long key ranges fill the device with at least so many programs


def row_lse(q: torch.Tensor, k: torch.Tensor, limits: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Natural log of the softmax's denominator of every query.

    Parameters
    ----------
    q : torch.Tensor
        Shape (batch, queries, heads, head_dim).
    k : torch.Tensor
        Shape (batch, keys, kv_heads, head_dim).
    limits : torch.Tensor
        Shape (queries,), integer: each query attends to this many of the first keys.
    scale : float

    Returns
    -------
    torch.Tensor
        Shape (batch, heads, queries), float32 (float64 for float64 input); -inf where the limit is 0.
    """
    if uses_triton(q, k):
        return row_lse_triton(q, k, limits, scale=scale)
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


def rows_at_a_time(q: torch.Tensor, dim: int) -> int:
    """Rows of `dim` numbers that a program takes: the more there are, the less often keys are read."""
    narrow = q.is_cuda and capability(q.device) < (8, 0)  # with less shared memory
    return ROWS_AT_A_TIME if narrow or q.element_size() * dim > 256 else 2 * ROWS_AT_A_TIME


@on_its_device
def row_lse_triton(q: torch.Tensor, k: torch.Tensor, limits: torch.Tensor, *, scale: float) -> torch.Tensor:
    """See `row_lse`. Long key ranges are split, so that a few rows fill the device too."""
    batch, queries, heads, head_dim = q.shape
    keys, owners = k.shape[1], k.shape[2]
    dim = triton.next_power_of_2(head_dim)
    rows = rows_at_a_time(q, dim)
    tiles = triton.cdiv(queries * (heads // owners), rows)
    splits = max(1, min(triton.cdiv(keys, 4096), _PROGRAMS_WANTED // max(1, tiles * batch * owners)))
    part = triton.cdiv(triton.cdiv(keys, splits), KEYS_AT_A_TIME) * KEYS_AT_A_TIME
    partial = torch.full((splits, batch, heads, queries), -torch.inf, dtype=torch.float32, device=q.device)
    if keys == 0:
        return partial[0]
    _row_lse[(tiles, batch * owners, splits)](
        q,
        k,
        limits.to(torch.int32),
        partial,
        *q.stride()[:3],
        *k.stride()[:3],
        batch * heads * queries,
        queries,
        keys,
        owners,
        heads // owners,
        part,
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=rows,
        KEYS=KEYS_AT_A_TIME,
        num_warps=rows // 16,
    )
    return partial[0] if splits == 1 else torch.logsumexp(partial, dim=0)


@triton.jit(do_not_specialize=("split_stride", "queries", "keys", "owners", "group", "part"))
def _row_lse(  # type: ignore[no-untyped-def]
    q,
    k,
    limits,
    lse,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    split_stride,
    queries,
    keys,
    owners,
    group,
    part,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # rows are the queries of all heads that share keys, head by head, so that keys are read for as many as possible
    tile, place, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, owner = (place // owners).to(tl.int64), place % owners
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row % queries, owner * group + row // queries
    real = row < queries * group
    dim = tl.arange(0, DIM)
    q_rows = tl.load(
        q + batch * q_batch + token[:, None].to(tl.int64) * q_token + head[:, None] * q_head + dim[None, :],
        mask=real[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    limit = tl.load(limits + token, mask=real, other=0)
    start = split * part
    stop = tl.minimum(tl.minimum(start + part, keys), tl.max(limit, 0))
    k += batch * k_batch + owner * k_head
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, KEYS):
        at = first + tl.arange(0, KEYS)
        some_keys = tl.load(
            k + at[None, :].to(tl.int64) * k_token + dim[:, None],
            mask=(at < keys)[None, :] & (dim < HEAD_DIM)[:, None],
            other=0.0,
        )
        logits = tl.dot(q_rows, some_keys, input_precision="ieee") * scale
        logits = tl.where((at[None, :] < limit[:, None]) & (at < stop)[None, :], logits, -float("inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        most = higher
    result = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    place = place.to(tl.int64) * queries * group + row
    tl.store(lse + split * split_stride + place, result * LN2, mask=real)
