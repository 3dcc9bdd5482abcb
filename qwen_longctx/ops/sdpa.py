"""PyTorch's own fused attention, with its log-sum-exp: cuDNN or FlashAttention on CUDA, the flash kernel on the CPU."""

from __future__ import annotations

from functools import lru_cache

import torch

from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.reference import reference

# cuDNN builds a plan for each new shape, which pays for long spans only; decode would build one a token
_CUDNN_MIN_QUERIES = 256
_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention with log-sum-exp; nothing of size queries x keys exists. See `kernels`.

    The fused kernels disagree on how a causal mask is aligned when queries and keys differ in number, so such a
    call is cut into the keys before the queries (no mask) and a causal square.
    """
    engine_name = engine(q)
    past = k.shape[1] - q.shape[1]
    if engine_name == "reference" or k.shape[1] == 0 or (causal and past < 0):
        return reference(q, k, v, causal=causal, scale=scale)
    run = _ENGINES[engine_name]
    if not causal or q.shape[1] == 1:
        return run(q, k, v, False, scale)
    square = run(q, k[:, past:], v[:, past:], True, scale)
    if past == 0:
        return square
    return merge([square, run(q, k[:, :past], v[:, :past], False, scale)])


def engine(q: torch.Tensor) -> str:
    """Which fused kernel takes queries like `q`, of shape (batch, queries, heads, head_dim)."""
    if q.device.type == "cpu" and q.dtype in (*_HALF, torch.float32, torch.float64):
        return "cpu"
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return "reference"
    if q.dtype not in _HALF:
        return "efficient"
    if q.shape[1] >= _CUDNN_MIN_QUERIES and q.shape[-1] in (64, 128) and _has_fast_cudnn(q.device.index or 0):
        return "cudnn"
    return "flash"


@lru_cache
def _has_fast_cudnn(device: int) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        *(roomless(x).transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.view(lse.shape[:3])


def roomless(x: torch.Tensor) -> torch.Tensor:
    """`x`, where it is one row with strides that tell nothing of the room of the cache it is a view of.

    cuDNN plans for strides, also that of a single row, which nothing reads: caches of other room would plan anew.
    """
    return x[0][None] if x.shape[0] == 1 else x


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """This kernel wants as many query heads as key heads: one call for each member of the groups."""
    group = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for member in range(group):
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q[:, :, member::group].transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            True,
            0.0,
            causal,
            scale=scale,
        )
        outs.append(out.transpose(1, 2))
        lses.append(lse[..., : q.shape[1]])
    return torch.stack(outs, dim=3).flatten(2, 3), torch.stack(lses, dim=2).flatten(1, 2)


_ENGINES = {"cpu": _cpu, "flash": _flash, "cudnn": _cudnn, "efficient": _efficient}
