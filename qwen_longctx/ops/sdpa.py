"""PyTorch's own fused attention, with its log-sum-exp."""

from __future__ import annotations

import torch

from qwen_longctx.ops import engines
from qwen_longctx.ops.device import needs_gradient
from qwen_longctx.ops.gradients import Part, attention_with_lse
from qwen_longctx.ops.merge import merge


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention with log-sum-exp; nothing of size queries x keys exists. See `ops`.

    Differentiable in the result. The log-sum-exp has no gradient: asking for it raises `Unsupported`, so that results
    merged by hand fail instead of giving wrong gradients. `gradients.merged_attention` merges with exact ones.
    """
    if needs_gradient(q, k, v):
        return attention_with_lse([Part(q, k, v, causal)], scale=scale)
    return merge(engines.forward(q, k, v, causal=causal, scale=scale))
