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
    shape = {"max_position_embeddings": 1024, "dual_chunk_attention_config": None}
    exact, model = (tiny_model(family, d, **shape).cuda() for d in (torch.float64, dtype))
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(1, 97, (1, 600), device="cuda")
    wanted, stock = exact(ids).logits, model(ids).logits
    used = []
    for name in ("rms_norm", "silu_mul"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=function, n=name: used.append(n) or f(*a))
    monkeypatch.setattr(fused, "_FEWEST", 1)
    with patched_qwen(model, mlp_chunk_size=256):
        found = model(ids).logits
    assert (found - wanted).norm() <= 1.5 * (stock - wanted).norm()
    assert set(used) == {"rms_norm", "silu_mul"}
