"""Norms and MLPs in fewer passes: the stock functions to rounding."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from helpers import DEVICES, tiny_model
from qwen_longctx import patched_qwen
from qwen_longctx.ops import norm


def test_no_kernel_runs_without_cuda():
    assert not norm.pays(torch.empty(1 << 21))


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_short_norms_round_as_the_stock_norm_does(device, dtype, weight_dtype):
    stock = Qwen2RMSNorm(512, 1e-6).to(device, weight_dtype or dtype)
    stock.weight.copy_(torch.randn(512))
    x = (3 * torch.randn(2, 9, 512, device=device)).to(dtype)
    result, wanted = norm.short_rms_norm(x, stock.weight, 1e-6), stock(x)
    assert result.dtype == wanted.dtype
    # sums of another order may round otherwise, by one place in the last bit
    torch.testing.assert_close(result, wanted, atol=0, rtol=2 * torch.finfo(dtype).eps)
    if dtype != torch.float32:
        assert (result != wanted).float().mean() <= 0.01


def test_a_norm_under_autocast_keeps_its_dtype():
    stock, x = Qwen2RMSNorm(64).bfloat16(), torch.randn(3, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.short_rms_norm(x, stock.weight, 1e-6).dtype == stock(x).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 400, 3584), (1, 9000, 8, 128), (2, 70, 300)])
def test_fused_functions(shape):
    x, y = torch.randn(2, *shape, device="cuda")
    weight = torch.rand(shape[-1], device="cuda")
    wanted = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6).double(), wanted, atol=1e-5, rtol=1e-5)
    wanted = torch.nn.functional.silu(x.double()) * y.double()
    torch.testing.assert_close(norm.silu_mul(x, y).double(), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_fused_model_is_the_stock_one(family, dtype, monkeypatch):
    shape = {"max_position_embeddings": 1024, "dual_chunk_attention_config": None}
    exact, model = (tiny_model(family, d, **shape).cuda() for d in (torch.float64, dtype))
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(1, 97, (1, 600), device="cuda")
    wanted, stock = exact(ids).logits, model(ids).logits
    used = []
    for name in ("rms_norm", "silu_mul"):
        function = getattr(norm, name)
        monkeypatch.setattr(norm, name, lambda *a, f=function, n=name: used.append(n) or f(*a))
    monkeypatch.setattr(norm, "_FEWEST", 1)
    with patched_qwen(model, mlp_chunk_size=256):
        result = model(ids).logits
    assert (result - wanted).norm() <= 1.5 * (stock - wanted).norm()
    assert set(used) == {"rms_norm", "silu_mul"}
