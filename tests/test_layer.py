"""Decoder layers in fewer passes: the kernels against PyTorch, and models that answer bit for bit as without."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from helpers import INTERPRETED, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen, unpatch_qwen
from qwen_longctx.ops import fp8, norm
from qwen_longctx.patches import layer as layers

DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
BF16 = torch.bfloat16
HOW = {"prefill_chunk_size": 50, "mlp_chunk_size": 16}


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_cast(monkeypatch):
    """The interpreter cuts numbers off where hardware rounds them: what is to be cast is looked at before that."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(fp8, "E4M3", torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(1, 7, 4, 16), (2, 3, 300), (1, 1, 4096), (2, 1, 5000), (0, 3, 64)])
def test_norms_are_those_of_pytorch(device, added, shape, exact_cast):
    x, y = 3 * torch.randn(2, *shape, device=device)
    weight = torch.randn(shape[-1], device=device)
    total, normed = norm.rms_norm_triton(x, y if added else None, weight, 1e-6)
    again, rows = norm.rms_norm_triton(x, y if added else None, weight, 1e-6, to_8_bits=True)
    wanted = x + y if added else x
    assert torch.equal(total, wanted) and torch.equal(again, wanted)
    torch.testing.assert_close(normed, norm.short_rms_norm(wanted, weight, 1e-6), atol=2e-6, rtol=2e-6)
    scales = (normed.abs().amax(-1, keepdim=True) / 448).clamp_min(fp8.LEAST_SCALE)
    torch.testing.assert_close(rows.scales, scales)
    found, wanted = rows.values.float(), (normed / scales).to(fp8.E4M3).float()
    # a GPU divides to two places in the last bit, which takes one in ten thousand to the next number of 8 bits
    atol, rtol = (1e-4, 1e-5) if device == "cpu" else (2e-3, 0.13)
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)
    assert x.numel() < 1000 or ((found - wanted).abs() > 1e-3 * wanted.abs() + 1e-4).float().mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_norms_of_views(device):
    x, y = torch.randn(2, 40, 3, 24, device=device).transpose(1, 2)
    weight = torch.randn(24, device=device)
    total, normed = norm.rms_norm_triton(x, y, weight, 1e-5)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, norm.short_rms_norm(x + y, weight, 1e-5), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 3, 700), (2, 2, 2048), (0, 5)])
def test_swiglu_is_that_of_pytorch(device, shape):
    gate, up = 3 * torch.randn(2, *shape, device=device)
    wanted = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(norm.silu_mul_triton(gate, up), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("width", [128, 896, 3584, 5120])
def test_rounding_on_a_gpu(rows, width):
    """Sums of another order may round otherwise by one place, in one number of a hundred; all else is bit for bit."""
    x, y = 3 * torch.randn(2, rows, width, device="cuda").to(BF16)
    weight = torch.randn(width, device="cuda").to(BF16)
    total, normed = norm.add_rms_norm(x, y, weight, 1e-6)
    wanted = norm.short_rms_norm(x + y, weight, 1e-6)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, wanted, atol=0, rtol=2 * torch.finfo(BF16).eps)
    assert (normed != wanted).float().mean() <= 0.01
    again, rows_of = norm.add_rms_norm_rows(x, y, weight, 1e-6)
    cast = fp8.cast_rows(normed)
    assert torch.equal(again, total)
    assert (rows_of.values.float() != cast.values.float()).float().mean() <= 0.01
    torch.testing.assert_close(rows_of.scales, cast.scales, rtol=0.01, atol=0)
    gate, up = torch.randn(2, rows, width, device="cuda").to(BF16)
    out, wanted = norm.silu_mul(gate, up), torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out, wanted, atol=0, rtol=2 * torch.finfo(BF16).eps)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch):
    """Layers of the CPU take the way of long prompts too, by PyTorch's functions; notes what they run."""
    ran = []
    for name in ("rms_norm", "rms_norm_rows", "add_rms_norm", "add_rms_norm_rows"):
        work = getattr(norm, name)
        monkeypatch.setattr(norm, name, lambda *a, work=work, name=name: ran.append(name) or work(*a))
    monkeypatch.setattr(norm, "pays", lambda x: x.numel() > 1000 and x.shape[-1] > 16)
    monkeypatch.setattr(fp8, "why_not", lambda device: "")
    return ran


def model_of(family="qwen2", dtype=BF16, **config):
    return tiny_model(family, dtype, **{"head_dim": 16, "hidden_size": 64, "intermediate_size": 96, **config})


@torch.no_grad()
def logits(model, tokens=150, batch=1, **how):
    torch.manual_seed(3)
    return model(torch.randint(0, 90, (batch, tokens)), **how).logits


def plainly(model, **how):
    """Logits of the same model when no layer takes the way of long prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_suits", lambda *_: False)
        return logits(model, **how)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("linear", ["auto", "fp8"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_are_the_same_bit_for_bit(family, linear, dtype, batch, fused):
    if linear == "fp8" and dtype != BF16:
        pytest.skip("takes bf16")
    model = patch_qwen(model_of(family, dtype), linear=linear, **HOW)
    wanted = plainly(model, batch=batch)
    assert "add_rms_norm" not in fused
    fused.clear()
    assert torch.equal(logits(model, batch=batch), wanted)
    suffix = "_rows" if linear == "fp8" else ""
    assert {"rms_norm" + suffix, "add_rms_norm" + suffix} <= set(fused)
    assert fused.count("add_rms_norm" + suffix) == 2 * 3  # layers, chunks


@pytest.mark.parametrize("dispatched", ["", "before", "after"])
def test_layers_of_patched_classes(dispatched, fused):
    """Also where accelerate's hooks keep the layer's forward, and the class shows the stock one all the while."""
    stock = qwen2.Qwen2DecoderLayer.forward
    model, ids = model_of(), torch.randint(0, 90, (1, 60))
    with torch.no_grad():
        wanted = model(ids).logits
    if dispatched == "before":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with patched_qwen(**HOW):
        if dispatched == "after":
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert qwen2.Qwen2DecoderLayer.forward is stock
        assert torch.equal(logits(model), plainly(model))
        assert fused.count("add_rms_norm") == (0 if dispatched else 2 * 3)  # hooks of accelerate sit between the parts
        with patched_qwen(prefill_chunk_size=40):
            fused.clear()
            logits(model)
            assert fused.count("add_rms_norm") == (0 if dispatched else 2 * 4)
    assert qwen2.Qwen2DecoderLayer.forward is stock and type(vars(qwen2.Qwen2DecoderLayer)["forward"]) is type(logits)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
        fused.clear()
        logits(model)
        assert not fused


def test_a_compiled_layer_of_patched_classes(fused):
    model = model_of(dtype=torch.float32)
    with patched_qwen(**HOW):
        wanted = logits(model)
        for layer in model.model.layers:
            layer.compile(backend="eager", dynamic=False)
        torch.testing.assert_close(logits(model), wanted)


def test_decoding_and_mixtures_take_the_stock_layer(fused):
    model = patch_qwen(model_of("qwen3_moe"), **HOW)
    logits(model)
    assert not [name for name in fused if name.startswith("add")]
    model = patch_qwen(model_of(), **HOW)
    cache = LongContextCache(200)
    logits(model, past_key_values=cache)
    fused.clear()
    logits(model, tokens=1, past_key_values=cache)
    assert not [name for name in fused if name.startswith("add")]


@pytest.mark.parametrize("where", ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"])
@pytest.mark.parametrize("how", ["hook", "pre_hook", "own forward"])
def test_whoever_looks_in_between_sees_what_the_stock_layer_hands_on(where, how, fused):
    model = patch_qwen(model_of(), linear="fp8", **HOW)
    wanted, seen = plainly(model), []
    part = getattr(model.model.layers[1], where)
    if how == "hook":
        part.register_forward_hook(lambda module, given, out: seen.append(out))
    elif how == "pre_hook":
        part.register_forward_pre_hook(lambda module, given, named: seen.append(given or named), with_kwargs=True)
    else:
        ours = part.forward
        part.forward = lambda *a, **k: seen.append(a or k) or ours(*a, **k)
    assert torch.equal(logits(model), wanted)
    assert len(seen) == 3
    assert fused.count("add_rms_norm_rows") == 3  # of the other layer


def test_projections_that_are_watched_get_what_they_got(fused):
    model = patch_qwen(model_of(), linear="fp8", **HOW)
    wanted, seen = plainly(model), []
    first = model.model.layers[0]
    for part in (first.self_attn.k_proj, first.mlp.up_proj):
        part.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert torch.equal(logits(model), wanted)
    assert seen and all(type(x) is torch.Tensor and x.dtype == BF16 for x in seen)
    assert fused.count("add_rms_norm") == 3 and fused.count("add_rms_norm_rows") == 3


def test_hidden_states_and_attentions_are_the_same(fused):
    model = patch_qwen(model_of(), chunk_size=512, local_size=64, original_max_position_embeddings=512)
    ids = torch.randint(0, 90, (1, 70))
    for name in ("output_hidden_states", "output_attentions"):
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "_suits", lambda *_: False)
            wanted = model(ids, **{name: True})
        with torch.no_grad():
            result = model(ids, **{name: True})
        field = name.partition("_")[2]
        assert len(result[field]) == len(wanted[field])
        assert all(torch.equal(a, b) for a, b in zip(result[field], wanted[field], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of_classes", [False, True])
def test_training_with_gradient_checkpointing_is_the_stock_one(of_classes, reentrant, fused):
    """Each layer runs twice, and gradients are those without checkpointing."""
    model = model_of(dtype=torch.float32).train()
    ids = torch.randint(0, 90, (1, 60))
    with patched_qwen(None if of_classes else model):
        model(ids, labels=ids, use_cache=False).loss.backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert not [name for name in fused if name.startswith("add")]


def test_layers_of_others_stay(fused):
    """A derived layer with its own forward, one with another part, autocast."""

    class Scaled(qwen2.Qwen2DecoderLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return 0.5 * super().forward(hidden_states, *args, **kwargs)

    model = model_of(dtype=torch.float32, num_hidden_layers=3)
    model.model.layers[0].__class__ = Scaled
    model.model.layers[1].dropout = torch.nn.Dropout(0.0)
    patch_qwen(model, **HOW)
    wanted = plainly(model)
    assert torch.equal(logits(model), wanted)
    assert fused.count("add_rms_norm") == 3  # of the last
    fused.clear()

    class Linear(torch.nn.Linear):
        """Of which nobody knows what dtype it returns."""

    model = model_of(num_hidden_layers=3)
    model.model.layers[0].mlp.down_proj.__class__ = model.model.layers[1].self_attn.o_proj.__class__ = Linear
    patch_qwen(model, **HOW)
    assert torch.equal(logits(model), plainly(model))
    assert fused.count("add_rms_norm") == 3  # of the last
    fused.clear()
    model = patch_qwen(model_of(dtype=torch.float32), **HOW)
    with torch.autocast("cpu", BF16):
        assert torch.equal(logits(model), plainly(model))
    assert "add_rms_norm" not in fused


def test_hooks_of_all_modules_see_every_norm(fused):
    model = patch_qwen(model_of(), **HOW)
    wanted, seen = plainly(model), []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, given: seen.append(module))
    try:
        assert torch.equal(logits(model), wanted)
    finally:
        handle.remove()
    assert model.model.layers[0].input_layernorm in seen and "add_rms_norm" not in fused


def test_undone_and_copied(fused):
    model = model_of()
    stock = logits(model, tokens=60)
    patch_qwen(model, **HOW)
    wanted = logits(model)
    twin = copy.deepcopy(model)
    unpatch_qwen(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(logits(model, tokens=60), stock)
    fused.clear()
    assert torch.equal(logits(twin), wanted) and "add_rms_norm" in fused
