"""Linear layers in 8 bits: casts against their definition in float64, and models that get their weights back."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn

from helpers import DEVICES as PLAIN_DEVICES
from helpers import FAMILIES, INTERPRETED, tiny_model
from qwen_longctx import patch_qwen, patched_qwen, settings_of, unpatch_qwen
from qwen_longctx.cli import main
from qwen_longctx.errors import InvalidValue, PatchConflict, Unsupported
from qwen_longctx.memory import plan
from qwen_longctx.ops import fp8
from qwen_longctx.patches.linear import Fp8Linear
from qwen_longctx.prefill.weights import weights_of

DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
BF16 = torch.bfloat16
HALF_STEP = 2.0**-4  # of e4m3, which has 3 bits of mantissa, as a part of the number
SMALLEST = 2.0**-10  # half of its smallest number


@pytest.fixture
def anywhere(monkeypatch):
    """Models of the CPU are cast too; PyTorch's functions stand for the kernels."""
    monkeypatch.setattr(fp8, "why_not", lambda device: "")


def model_of(family="qwen2", **config):
    """One whose layers are multiples of 16, with biases that are not zero."""
    model = tiny_model(family, BF16, **{"head_dim": 16, "hidden_size": 64, "intermediate_size": 96, **config})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@torch.no_grad()
def logits(model, tokens=150):
    torch.manual_seed(3)
    device = next(model.parameters()).device
    device = "cpu" if device.type == "meta" else device
    return model(torch.randint(0, 90, (1, tokens)).to(device)).logits


def casts(of, device):
    """PyTorch's function, and the Triton kernel of the device."""
    launch = {"rows": fp8.cast_rows_triton, "silu": fp8.silu_mul_rows_triton}[of]

    def kernel(*x):
        if device == "cuda":
            return launch(*x)
        with pytest.MonkeyPatch.context() as patch:  # the interpreter cuts numbers off where hardware rounds them
            patch.setattr(fp8, "E4M3", torch.float32)
            rows = launch(*x)
        return rows._replace(values=rows.values.to(torch.float8_e4m3fn))

    plain = {"rows": fp8.cast_rows, "silu": fp8.silu_mul_rows}[of]
    return [kernel, lambda *x: plain(*(one.cpu() for one in x))]


def within(rows, exact, slack=0.0):
    """Whether rows in 8 bits are `exact`, in float64, rounded once; `slack` is what their dtype loses before."""
    scales = rows.scales.double().cpu()
    wanted = (exact.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)
    torch.testing.assert_close(scales, wanted, rtol=slack + 1e-6, atol=0)
    error = (rows.values.double().cpu() * scales - exact).abs()
    assert (error <= exact.abs() * (HALF_STEP + slack + 1e-6) + SMALLEST * scales * (1 + slack)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 112), (1, 4097), (4, 1)])
def test_a_cast_is_its_definition(device, dtype, shape):
    x = torch.randn(shape).to(device, dtype)
    x.view(-1, shape[-1])[0, 0] = 6e4  # an outlier
    x.view(-1, shape[-1])[-1] = 0
    for cast in casts("rows", device):
        within(cast(x), x.double().cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 96), (2, 1, 4100)])
def test_swiglu_is_its_definition(device, dtype, shape):
    gate, up = (3 * torch.randn(2, *shape)).to(device, dtype)
    exact = nn.functional.silu(gate.double().cpu()) * up.double().cpu()
    for cast in casts("silu", device):
        within(cast(gate, up), exact, slack=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_beyond_what_8_bits_hold(device):
    x = torch.randn(5, 64, dtype=torch.float32)
    x[0], x[1, 3], x[2, 3], x[3] = 0, float("inf"), float("nan"), 1e-38
    weight = fp8.cast_rows(torch.randn(32, 64))
    for cast in casts("rows", device):
        rows = fp8.Rows(*(one.cpu() for one in cast(x.to(device))))
        out = fp8.product(rows, weight, None)
        assert (out[0] == 0).all() and not out[1:3].isfinite().any()
        assert out[3:].isfinite().all() and out[3].abs().max() < 1e-28


@pytest.mark.parametrize("device", DEVICES)
def test_views_and_empty_batches(device):
    x = torch.randn(64, 12, device=device).t()[::2]
    for cast in casts("rows", device):
        within(cast(x), x.double().cpu())
        assert cast(x[:0]).values.shape == (0, 64) and cast(x[:0]).scales.shape == (0, 1)
    for cast in casts("silu", device):
        within(cast(x, x), (nn.functional.silu(x.double()) * x.double()).cpu(), slack=1e-6)
    rows = fp8.cast_rows(x[:0])
    assert fp8.product(rows, fp8.cast_rows(torch.randn(32, 64, device=device)), None).shape == (0, 32)


@pytest.mark.parametrize("device", PLAIN_DEVICES)
@pytest.mark.parametrize("rows", [1, 2, 3, 15, 17, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_cast_numbers(device, rows, biased):
    x = fp8.cast_rows(torch.randn(1, rows, 512, device=device).to(BF16))
    weight = fp8.cast_rows(torch.randn(96, 512, device=device).to(BF16))
    bias = torch.randn(96, device=device).to(BF16) if biased else None
    exact, sizes = x.values.double() * x.scales, weight.values.double() * weight.scales
    wanted = exact @ sizes.T + (bias.double() if biased else 0)
    # fast accumulation keeps 14 bits of a partial sum; the result is rounded to bf16
    allowed = (exact.abs() @ sizes.abs().T) * 2**-10 + wanted.abs() * 2**-8
    out = fp8.product(x, weight, bias)
    assert out.shape == (1, rows, 96) and out.dtype == BF16
    assert ((out.double() - wanted).abs() <= allowed).all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_models_on_a_gpu_are_those_of_the_cpu(family, monkeypatch):
    model = model_of(family).cuda()
    if missing := fp8.why_not(torch.device("cuda:0")):
        pytest.skip(missing)
    with patched_qwen(model, linear="fp8"):
        result = logits(model).cpu()
        model.cpu()
        monkeypatch.setattr(fp8, "why_not", lambda device: "")
        wanted = logits(model)
        model.cuda()
    assert (result - wanted).float().norm() < 0.1 * wanted.float().norm()


@pytest.mark.gpu
def test_memory_of_the_card_falls_and_the_probe_runs():
    model = model_of(hidden_size=1024, intermediate_size=4096).cuda()
    if missing := fp8.why_not(torch.device("cuda:0")):
        pytest.skip(missing)
    numbers = sum(p.numel() for n, p in model.named_parameters() if "_proj.weight" in n)
    before = torch.cuda.memory_allocated()
    patch_qwen(model, linear="fp8")
    assert before - torch.cuda.memory_allocated() > 0.95 * numbers
    unpatch_qwen(model)
    assert abs(torch.cuda.memory_allocated() - before) < 0.05 * numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_for_bit(family, anywhere):
    model = model_of(family)
    before, held = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    stock = logits(model)
    patch_qwen(model)
    plain = logits(model)
    patch_qwen(model, linear="fp8")
    assert settings_of(model).linear == "fp8"
    cast = {name for name, one in model.named_modules() if type(one) is Fp8Linear}
    assert len(cast) == (14 if "moe" not in family else 8)
    assert all(dict(model.named_parameters())[f"{name}.weight"].dtype == torch.float8_e4m3fn for name in cast)
    result = logits(model)
    assert 0 < (result - plain).float().norm() < 0.3 * plain.float().norm()
    patch_qwen(model)  # settings replace those before
    assert not any(type(one) is Fp8Linear for one in model.modules()) and torch.equal(logits(model), plain)
    with patched_qwen(model, linear="fp8"):
        torch.testing.assert_close(logits(model), result, rtol=0, atol=0)
    assert torch.equal(logits(model), plain)
    unpatch_qwen(model)
    assert torch.equal(logits(model), stock)
    assert all(one is held[name] and one.requires_grad for name, one in model.named_parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not any("_kept" in vars(one) or "weight_scales" in one._buffers for one in model.modules())


def test_a_layer_is_the_product_with_its_bias(anywhere):
    model = patch_qwen(model_of(), linear="fp8")
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 64).to(BF16)
    kept = layer._kept.weight.double()
    with torch.no_grad():
        out = layer(x).double()
        wanted = x.double() @ kept.T + layer.bias.double()
    assert (out - wanted).norm() < 0.05 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("size", [16, 2048])
def test_slices_and_hooks_give_the_same(hooked, size, anywhere):
    model = patch_qwen(model_of(), linear="fp8", mlp_chunk_size=size)
    wanted, seen = logits(model), []
    if hooked:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.testing.assert_close(logits(model), wanted, rtol=0.05, atol=0.5)
    assert all(type(x) is torch.Tensor and x.dtype == BF16 for x in seen) and bool(seen) == hooked


def test_checkpoints_are_those_of_the_original(tmp_path, anywhere):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    patch_qwen(model, linear="fp8")
    result = logits(model)
    saved = model.state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=BF16)
    assert all(torch.equal(one, before[name]) for name, one in again.state_dict().items())
    other = model_of(initializer_range=0.1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(patch_qwen(other, linear="fp8")), rtol=0, atol=0)
    assert not torch.equal(logits(model), result)
    model.load_state_dict(before)
    assert torch.equal(logits(model), result)
    unpatch_qwen(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_copies_and_pickles_carry_everything(anywhere):
    model = model_of()
    stock = logits(model)
    patch_qwen(model, linear="fp8")
    wanted, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), wanted)
        unpatch_qwen(other)
        assert torch.equal(logits(other), stock)
    assert torch.equal(logits(model), wanted)


def test_another_dtype_goes_to_the_kept_weights(anywhere):
    model, plain = model_of(), model_of()
    patch_qwen(model, linear="fp8")
    wanted = logits(model)
    model.float()
    assert all(one.weight.dtype == torch.float8_e4m3fn for one in model.modules() if type(one) is Fp8Linear)
    assert (logits(model) - wanted).norm() < 0.2 * wanted.float().norm() and logits(model).dtype == torch.float32
    unpatch_qwen(model)
    assert torch.equal(logits(model), logits(plain.float()))


@pytest.mark.parametrize("family", ["qwen2"])
def test_hooks_of_accelerate_stay(family, anywhere):
    hooks = pytest.importorskip("accelerate.hooks")
    model, calls = model_of(family), []
    stock = logits(model)

    class Counts(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module))
            return args, kwargs

    for module in model.modules():
        hooks.add_hook_to_module(module, Counts())
    patch_qwen(model, linear="fp8")
    wanted = logits(model)
    assert calls.count(Fp8Linear) == 14
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), wanted)
    for module in model.modules():
        hooks.add_hook_to_module(module, Counts())
    unpatch_qwen(model)
    assert torch.equal(logits(model), stock)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), stock)


def test_offloaded_weights_are_refused(anywhere):
    accelerate = pytest.importorskip("accelerate")
    model = model_of()
    stock = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(Unsupported, match="meta or offloaded"):
        patch_qwen(model, linear="fp8")
    assert torch.equal(logits(model), stock)


def test_refusals_change_nothing():
    model = model_of()
    stock = logits(model)
    with pytest.raises(Unsupported, match="on cpu, where layers.0.self_attn.q_proj is, needs a CUDA device"):
        patch_qwen(model, linear="fp8")
    with pytest.raises(InvalidValue, match="linear must be one of auto, fp8, got 'int8'"):
        patch_qwen(model, linear="int8")
    with pytest.raises(InvalidValue, match="weights of one model"):
        patch_qwen(linear="fp8")
    assert settings_of(model) is None and torch.equal(logits(model), stock)


@pytest.mark.parametrize(("dtype", "said"), [(torch.float32, "torch.float32"), (torch.float16, "torch.float16")])
def test_other_dtypes_are_refused(dtype, said, anywhere):
    with pytest.raises(Unsupported, match=said):
        patch_qwen(model_of().to(dtype), linear="fp8")


def test_gradients_and_foreign_weights_are_refused(anywhere):
    model = patch_qwen(model_of(), linear="fp8")
    with pytest.raises(Unsupported, match="no gradients"):
        model(torch.ones(1, 5, dtype=torch.long))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.to(BF16)
    with pytest.raises(PatchConflict, match="from outside"):
        logits(model)


def test_odd_widths_and_shared_weights_stay(caplog, anywhere):
    model = model_of(intermediate_size=100)
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight
    with caplog.at_level(logging.WARNING):
        patch_qwen(model, linear="fp8")
    assert "leaves 8 of 14" in caplog.text and "no multiples of 16" in caplog.text and "shares" in caplog.text
    assert logits(model).isfinite().all()
    with pytest.raises(Unsupported, match="no linear layer to cast"):
        patch_qwen(tiny_model(dtype=BF16, hidden_size=36, intermediate_size=100, head_dim=6), linear="fp8")


def test_adapters_stay(caplog, anywhere):
    peft = pytest.importorskip("peft")
    model = model_of()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with caplog.at_level(logging.WARNING):
        patch_qwen(wrapped, linear="fp8")
    assert "leaves 2 of 14" in caplog.text and "peft's" in caplog.text
    assert logits(wrapped).isfinite().all()
    unpatch_qwen(wrapped)
    assert not any(type(one) is Fp8Linear for one in wrapped.modules())


def test_weights_of_torchao_stay(anywhere):
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of()
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())
    wanted = logits(patch_qwen(model))
    with pytest.raises(Unsupported, match="no linear layer to cast"):
        patch_qwen(model, linear="fp8")
    assert torch.equal(logits(model), wanted)


@pytest.mark.gpu
def test_models_that_torchao_has_cast(anywhere):
    """Quantised by the user beforehand, row by row: the patch runs on them as they are."""
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of().cuda()
    plain = logits(patch_qwen(model))
    unpatch_qwen(model)
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantization.quantize_(model.model.layers, config)
    result = logits(patch_qwen(model))
    assert 0 < (result - plain).float().norm() < 0.3 * plain.float().norm()


def test_a_failure_in_the_middle_changes_nothing(monkeypatch, anywhere):
    model = model_of()
    stock, cast, calls = logits(model), fp8.cast_rows, []

    def failing(x):
        calls.append(x)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no room")
        return cast(x)

    monkeypatch.setattr(fp8, "cast_rows", failing)
    with pytest.raises(torch.OutOfMemoryError):
        patch_qwen(model, linear="fp8")
    assert settings_of(model) is None and torch.equal(logits(model), stock)
    assert all(type(one) is nn.Linear for one in model.modules() if isinstance(one, nn.Linear))


@torch.no_grad()
def test_prefixes_of_8_bits_are_told_from_others(tmp_path, anywhere):
    from qwen_longctx.kv.fingerprint import differences, fingerprint

    model = model_of()
    plain = fingerprint(model.model)
    patch_qwen(model, linear="fp8")
    assert "its weights are others" in differences(plain, fingerprint(model.model))[0]
    unpatch_qwen(model)
    assert not differences(plain, fingerprint(model.model))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inner", [96, 100])
def test_the_planner_counts_what_a_patched_model_holds(family, inner, anywhere):
    model = model_of(family, intermediate_size=inner)
    patch_qwen(model, linear="fp8")
    held = [*model.parameters(), *(one for name, one in model.named_buffers() if name.endswith("weight_scales"))]
    found = weights_of(model.config, BF16, "fp8")
    assert found.total == sum(one.numel() * one.element_size() for one in held)
    assert found.total < weights_of(model.config, BF16).total


def test_a_plan_of_the_7b_in_8_bits():
    plain, cast = (plan("qwen2.5-7b-1m", "1M", linear=linear).memory for linear in ("auto", "fp8"))
    assert cast.weights < 0.6 * plain.weights and cast.kv_cache == plain.kv_cache


@pytest.mark.parametrize("what", ["linear", "speed --linear auto", "headline --linear auto"])
def test_the_bench_runs(what, capsys):
    main(["bench", *what.split(), "--tiny", "--lengths", "512"])
    printed = capsys.readouterr().out
    assert "tokens 512" in printed and ("bare_ms_a_layer" in printed) == (what == "linear")
