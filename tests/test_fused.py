"""Norms and MLPs of long prompts by Liger-Kernel: the stock functions to rounding."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny_model
from qwen_longctx import patched_qwen
from qwen_longctx.kernels import fused


def test_nothing_is_fused_without_cuda():
    assert not fused.pays(torch.empty(1 << 21))


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_fused_model_is_the_stock_one(family, dtype, monkeypatch):
    pytest.importorskip("liger_kernel")
    model = tiny_model(family, dtype, max_position_embeddings=1024, dual_chunk_attention_config=None).cuda()
    ids = torch.randint(1, 97, (1, 600), device="cuda")
    wanted = model(ids).logits
    used = []
    for name in ("rms_norm", "silu_mul"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=function, n=name: used.append(n) or f(*a))
    monkeypatch.setattr(fused, "_FEWEST", 1)
    with patched_qwen(model, mlp_chunk_size=256):
        found = model(ids).logits
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert set(used) == {"rms_norm", "silu_mul"}
