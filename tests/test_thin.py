"""Linear layers of a few rows in one launch: the kernel against PyTorch, and where layers have to run themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import INTERPRETED, tiny_model
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.ops import fp8, thin
from qwen_longctx.ops.thin import Weight, linear, linear_triton, silu_mul, silu_mul_triton

pytest.importorskip("triton", reason="needs Triton")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(*shape, dtype, device, by=1.0):
    return (by * torch.randn(shape)).to(dtype).to(device)


def close(got, exact):
    """Within a rounding of the exact result, and the error of float32 sums."""
    assert got.shape == exact.shape
    torch.testing.assert_close(got.double().cpu(), exact, rtol=2 * torch.finfo(got.dtype).eps, atol=2e-3)


def exactly(x, one):
    bias = 0 if one.bias is None else one.bias.double().cpu()
    return x.double().cpu() @ one.values.double().cpu().T + bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(1,), (1, 3), (2, 4), (16,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(80, (50, 16, 7)), (300, (33, 1)), (256, (16,))])
@pytest.mark.parametrize("biased", [False, True])
def test_layers_of_one_launch(device, rows, inputs, outputs, biased):
    torch.manual_seed(1)
    how = {"dtype": torch.float16, "device": device}
    x = draw(*rows, inputs, **how)
    weights = [Weight(draw(n, inputs, **how), draw(n, **how) if biased else None) for n in outputs]
    for got, one in zip(linear_triton(x, *weights), weights, strict=True):
        close(got, exactly(x, one))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(1,), (3, 1), (1, 16)])
@pytest.mark.parametrize(("inputs", "outputs"), [(80, 50), (300, 16)])
def test_swiglu_rounds_as_its_steps_do(device, rows, inputs, outputs):
    torch.manual_seed(2)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    how = {"dtype": dtype, "device": device, "by": inputs**-0.25}
    x = draw(*rows, inputs, **how)
    gate, up = (Weight(draw(outputs, inputs, **how), None) for _ in range(2))
    first, second = ((exactly(x, one)).to(dtype) for one in (gate, up))
    wanted = nn.functional.silu(first.float()).to(dtype) * second
    got = silu_mul_triton(x, gate, up).cpu()
    # a sum in another order rounds the odd gate to its neighbour
    torch.testing.assert_close(got, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_weights_in_8_bits(device, rows, gated, monkeypatch):
    torch.manual_seed(5)
    if device == "cpu":  # the interpreter cuts numbers off where hardware rounds them
        monkeypatch.setattr(fp8, "cast_rows_triton", fp8.cast_rows)
    how = {"dtype": torch.bfloat16 if device == "cuda" else torch.float16, "device": device}
    x = draw(rows, 144, **how)
    weights = []
    for outputs in (40, 40) if gated else (50, 16, 7):
        cast = fp8.cast_rows(draw(outputs, 144, **how))
        weights.append(Weight(cast.values, None if gated else draw(outputs, **how), cast.scales))
    in_8_bits = fp8.cast_rows(x)
    x_exact, *exact = (
        r.values.double().cpu() * r.scales.cpu() for r in (in_8_bits, *(fp8.Rows(w.values, w.scales) for w in weights))
    )
    wanted = [
        x_exact @ one.T + (0 if w.bias is None else w.bias.double().cpu())
        for one, w in zip(exact, weights, strict=True)
    ]
    if gated:
        wanted = [nn.functional.silu(wanted[0]) * wanted[1]]
        got = [silu_mul_triton(x, *weights)]
    else:
        got = linear_triton(x, *weights)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=4 * torch.finfo(x.dtype).eps, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_do_not_lie_together(device):
    how = {"dtype": torch.float16, "device": device}
    x = draw(2, 3, 64, **how)[:, ::2]
    weight = Weight(draw(20, 64, **how), None)
    close(linear_triton(x, weight)[0], exactly(x, weight))


def numbers(x):
    return x.values if isinstance(x, fp8.Rows) else x


@pytest.fixture
def launches(monkeypatch):
    """Inputs of the operations, which run wherever they may."""
    seen = []

    def noted(operation):
        def run(x, *weights):
            seen.append(tuple(numbers(x).shape))
            return operation(x, *weights)

        return run

    monkeypatch.setattr(thin, "pays", lambda x: numbers(x).numel() <= thin.MOST_ROWS * numbers(x).shape[-1])
    monkeypatch.setattr(thin, "linear", noted(linear))
    monkeypatch.setattr(thin, "silu_mul", noted(silu_mul))
    return seen


def step(model, batch=1, tokens=1):
    """Logits of new tokens after a cache of 20."""
    cache = LongContextCache(40)
    ids = torch.randint(1, 90, (batch, 20 + tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        return model(ids[:, 20:], past_key_values=cache).logits


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (4, 2)])
def test_same_logits(launches, monkeypatch, family, batch, tokens):
    model = patch_qwen(tiny_model(family))
    got = step(model, batch, tokens)
    layers = 2 if family == "qwen3_moe" else 4  # of attention, and of MLPs
    assert launches.count((batch, tokens, 32)) >= layers
    del launches[:]
    monkeypatch.setattr(thin, "pays", lambda x: False)
    torch.testing.assert_close(got, step(model, batch, tokens))
    assert not launches


def test_a_model_in_8_bits(launches, monkeypatch):
    monkeypatch.setattr(fp8, "why_not", lambda device: "")
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, intermediate_size=64), linear="fp8")
    got = step(model)
    assert len(launches) == 10  # the twin of SwiGLU calls that of its layers
    monkeypatch.setattr(thin, "pays", lambda x: False)
    assert torch.equal(got, step(model))


def test_more_rows_run_layer_by_layer(launches):
    step(patch_qwen(tiny_model()), batch=3, tokens=6)
    assert not launches


def _hooked(model):
    for layer in model.model.layers:
        for part in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda *given: 2 * given[2])


def _own_forward(model):
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
            part.forward = lambda x, part=part: nn.functional.linear(x, part.weight) * 3


class Other(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _another_class(model):
    for layer in model.model.layers:
        for part in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.gate_proj):
            part.__class__ = Other


@pytest.mark.parametrize("change", [_hooked, _own_forward, _another_class])
def test_layers_that_are_watched_or_replaced_run_themselves(launches, monkeypatch, change):
    model = tiny_model()
    change(model)
    got = step(patch_qwen(model))
    assert not launches
    monkeypatch.setattr(thin, "pays", lambda x: False)
    assert torch.equal(got, step(model))


def test_a_hook_on_the_activation_is_called(launches):
    model = patch_qwen(tiny_model())
    calls = []
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *given: calls.append(1))
    step(model)
    assert calls == [1, 1]  # the prompt and the step


def test_gradients_autocast_and_other_activations_run_layer_by_layer(launches):
    model = patch_qwen(tiny_model())
    ids = torch.arange(1, 5)[None]
    model(ids, use_cache=False).logits.sum().backward()
    assert not launches and model.model.layers[0].mlp.gate_proj.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    assert not launches
    step(patch_qwen(tiny_model(hidden_act="gelu")))
    assert (1, 1, 64) not in launches and (1, 1, 32) in launches  # of attention only


def test_layers_unlike_each_other_run_themselves(launches):
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = None
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.T.contiguous().T
    step(patch_qwen(model))
    assert set(launches) == {(1, 1, 32)} and len(launches) == 2  # o_proj


def test_where_it_pays():
    x = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    assert not thin.pays(x) and not thin.pays(x[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_shapes_of_a_7b(dtype, rows):
    torch.manual_seed(4)
    assert thin.pays(torch.zeros(rows, 64, dtype=dtype, device="cuda"))
    assert not thin.pays(torch.zeros(thin.MOST_ROWS + 1, 64, dtype=dtype, device="cuda"))
    how = {"dtype": dtype, "device": "cuda", "by": 0.1}
    x = draw(rows, 3584, **how)
    for outputs, biased in (((3584, 512, 512), True), ((18944,), False)):
        weights = [Weight(draw(n, 3584, **how), draw(n, **how) if biased else None) for n in outputs]
        for got, one in zip(linear(x, *weights), weights, strict=True):
            close(got, exactly(x, one))
    x = draw(rows, 18944, **how)
    weight = Weight(draw(3584, 18944, **how), None)
    close(linear(x, weight)[0], exactly(x, weight))
