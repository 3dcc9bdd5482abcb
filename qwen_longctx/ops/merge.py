"""Exact merge of attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.triton_runtime import on_its_device, tl, triton

MOST_FUSED = 4  # parts that the Triton kernel merges in one pass
TOKENS_AT_A_TIME = 8192  # bounds the float32 partial sums elsewhere
_MERGED_ROWS = 16


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
    if len(parts) <= MOST_FUSED and uses_triton(*(x for part in parts for x in part)):
        return merge_triton(parts)
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


@on_its_device
def merge_triton(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """See `merge`, for two to four parts."""
    first = parts[0][0]
    batch, queries, heads, head_dim = first.shape
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=first.device)
    four = [(o, s.contiguous()) for o, s in parts] + [parts[0]] * (4 - len(parts))
    strides = [stride for o, _ in four for stride in o.stride()[:3]]
    _merge[(triton.cdiv(queries, _MERGED_ROWS), batch * heads)](
        *[tensor for part in four for tensor in part],
        out,
        lse,
        *strides,
        *out.stride()[:3],
        queries,
        heads,
        PARTS=len(parts),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        ROWS=_MERGED_ROWS,
        num_warps=4,
    )
    return out, lse


@triton.jit(do_not_specialize=("queries", "heads"))
def _merge(  # type: ignore[no-untyped-def]
    o0, s0, o1, s1, o2, s2, o3, s3, out, lse,
    b0, t0, h0, b1, t1, h1, b2, t2, h2, b3, t3, h3, bo, to, ho,
    queries, heads,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(1).to(tl.int64)
    batch, head = owner // heads, owner % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    within = row < queries
    inside = within[:, None] & (dim < HEAD_DIM)[None, :]
    at = owner * queries + row
    none = -float("inf")
    l0 = tl.load(s0 + at, mask=within, other=none)
    l1 = tl.load(s1 + at, mask=within, other=none)
    most = tl.maximum(l0, l1)
    if PARTS > 2:
        l2 = tl.load(s2 + at, mask=within, other=none)
        most = tl.maximum(most, l2)
    if PARTS > 3:
        l3 = tl.load(s3 + at, mask=within, other=none)
        most = tl.maximum(most, l3)
    safe = tl.where(most == none, 0.0, most)
    token = row[:, None].to(tl.int64)
    w0 = tl.exp(l0 - safe)
    w1 = tl.exp(l1 - safe)
    total = w0 + w1
    spot = o0 + batch * b0 + token * t0 + head * h0 + dim[None, :]
    sums = tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w0[:, None]
    spot = o1 + batch * b1 + token * t1 + head * h1 + dim[None, :]
    sums += tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w1[:, None]
    if PARTS > 2:
        w2 = tl.exp(l2 - safe)
        total += w2
        spot = o2 + batch * b2 + token * t2 + head * h2 + dim[None, :]
        sums += tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w2[:, None]
    if PARTS > 3:
        w3 = tl.exp(l3 - safe)
        total += w3
        spot = o3 + batch * b3 + token * t3 + head * h3 + dim[None, :]
        sums += tl.load(spot, mask=inside, other=0.0).to(tl.float32) * w3[:, None]
    divisor = tl.where(total > 0, total, 1.0)
    spot = out + batch * bo + token * to + head * ho + dim[None, :]
    tl.store(spot, (sums / divisor[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + at, tl.where(total > 0, most + tl.log(divisor), none), mask=within)
