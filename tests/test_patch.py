"""Patching and undoing: before and after loading, nested, dispatched, exact."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from helpers import tiny_model
from qwen_longctx import patch_qwen, patched_qwen, unpatch_qwen

METHODS = [
    (qwen2.Qwen2Attention, "forward"),
    (qwen2.Qwen2MLP, "forward"),
    (qwen2.Qwen2Model, "forward"),
    (qwen2.Qwen2ForCausalLM, "forward"),
]


@pytest.fixture(autouse=True)
def _clean():
    before = [vars(owner)[name] for owner, name in METHODS]
    yield
    unpatch_qwen()
    assert [vars(owner)[name] for owner, name in METHODS] == before
    assert "generate" not in vars(qwen2.Qwen2ForCausalLM)


@torch.no_grad()
def logits(model):
    torch.manual_seed(3)
    return model(torch.randint(0, 90, (1, 200))).logits


def instance_attributes(model):
    return [{k for k in vars(m) if k in ("forward", "_old_forward", "generate")} for m in model.modules()]


@pytest.mark.parametrize("scope", ["class", "instance"])
def test_undone_exactly(scope):
    model = tiny_model("qwen2")
    stock, attributes = logits(model), instance_attributes(model)
    target = model if scope == "instance" else None
    assert patch_qwen(target) is target
    assert not torch.equal(logits(model), stock)
    unpatch_qwen(target)
    assert torch.equal(logits(model), stock)
    assert instance_attributes(model) == attributes
    assert model.config._attn_implementation == "sdpa"


def test_before_and_after_loading_agree(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    wanted = logits(patch_qwen(model))
    patch_qwen()
    torch.testing.assert_close(logits(qwen2.Qwen2ForCausalLM.from_pretrained(tmp_path)), wanted)
    unpatch_qwen()
    loaded = qwen2.Qwen2ForCausalLM.from_pretrained(tmp_path)
    patch_qwen()
    torch.testing.assert_close(logits(loaded), wanted)


def test_one_instance_only():
    model, other = tiny_model("qwen2"), tiny_model("qwen2")
    stock = logits(other)
    patch_qwen(model)
    assert torch.equal(logits(other), stock)


def test_idempotent():
    model = tiny_model("qwen2")
    stock = logits(model)
    once = logits(patch_qwen(model))
    assert torch.equal(logits(patch_qwen(patch_qwen(model))), once)
    unpatch_qwen(model)
    assert torch.equal(logits(model), stock)
    unpatch_qwen(model)
    for _ in range(2):
        patch_qwen()
    unpatch_qwen()
    assert torch.equal(logits(model), stock)


def test_patching_again_replaces_the_settings():
    model = tiny_model("qwen2")
    hot = logits(patch_qwen(model))
    cold = logits(patch_qwen(model, attention_temperature=False))
    assert not torch.equal(hot, cold)
    assert torch.equal(logits(patch_qwen(model)), hot)


@pytest.mark.parametrize("scope", ["class", "instance"])
def test_nested_context_managers(scope):
    model = tiny_model("qwen2")
    target = model if scope == "instance" else None
    stock = logits(model)
    with patched_qwen(target):
        hot = logits(model)
        with patched_qwen(target, attention_temperature=False):
            assert not torch.equal(logits(model), hot)
        assert torch.equal(logits(model), hot)
    assert torch.equal(logits(model), stock)


def test_an_instance_inside_patched_classes_keeps_its_own_settings():
    model, other = tiny_model("qwen2"), tiny_model("qwen2")
    cold = logits(patch_qwen(model, attention_temperature=False))
    hot = logits(patch_qwen(other))
    unpatch_qwen(other)
    patch_qwen()
    assert torch.equal(logits(model), cold) and torch.equal(logits(other), hot)
    unpatch_qwen()
    assert torch.equal(logits(model), cold)
    patch_qwen()
    unpatch_qwen(model)
    assert torch.equal(logits(model), hot)


def test_restored_after_an_error_inside_the_block():
    model = tiny_model("qwen2")
    stock = logits(model)
    with pytest.raises(KeyError), patched_qwen(model):
        raise KeyError
    assert torch.equal(logits(model), stock)


def test_the_config_is_never_written_to():
    model = tiny_model("qwen2")
    before, seen = copy.deepcopy(vars(model.config)), []
    patch_qwen(model)
    model.model.layers[1].register_forward_pre_hook(lambda *args: seen.append(copy.deepcopy(vars(model.config))))
    logits(model)
    model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert seen == [before] * 2 and vars(model.config) == before


def test_deepcopy_is_patched_and_can_be_undone():
    model = tiny_model("qwen2")
    stock = logits(model)
    patch_qwen(model)
    twin = copy.deepcopy(model)
    for m in twin.modules():
        for slot in ("forward", "generate"):
            if slot in vars(m):
                assert vars(m)[slot].__self__ is m
    assert torch.equal(logits(twin), logits(model))
    unpatch_qwen(twin)
    assert torch.equal(logits(twin), stock) and not torch.equal(logits(model), stock)


def test_signatures_are_kept():
    model = tiny_model("qwen2")
    before = [inspect.signature(getattr(owner, name)) for owner, name in METHODS]
    patch_qwen()
    assert [inspect.signature(getattr(owner, name)) for owner, name in METHODS] == before
    patch_qwen(model)
    assert "logits_to_keep" in inspect.signature(model.forward).parameters


def test_no_state_on_modules():
    model = patch_qwen(tiny_model("qwen2"), prefill_chunk_size=50)
    before = [set(vars(m)) for m in model.modules()]
    logits(model)
    assert [set(vars(m)) for m in model.modules()] == before


@pytest.mark.parametrize("first", ["patch", "dispatch"])
@pytest.mark.parametrize("scope", ["class", "instance"])
def test_hooks_of_accelerate(first, scope):
    """accelerate keeps the bound forward that it was given; it must be ours, and the stock one again afterwards."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("qwen2")
    target = model if scope == "instance" else None
    stock = logits(model)
    wanted = logits(patch_qwen(model))
    unpatch_qwen(model)

    def dispatch():
        for module in model.modules():
            if module is model or list(module.parameters(recurse=False)) or hasattr(module, "layer_idx"):
                hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))

    if first == "patch":
        patch_qwen(target)
        dispatch()
    else:
        dispatch()
        patch_qwen(target)
    assert torch.equal(logits(model), wanted)
    assert "_old_forward" in vars(model)
    unpatch_qwen(target)
    assert torch.equal(logits(model), stock)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), stock)


def test_dispatch_over_devices():
    """Layers on another device: tables follow, once a forward (the meta device stands for the second card)."""
    from qwen_longctx import LongContextConfig
    from qwen_longctx.geometry.layout import Call, RotarySource, make_layout

    layout = make_layout(
        Call.whole(1, 200),
        0,
        200,
        settings=LongContextConfig(64, 16, 64),
        rotary=RotarySource(torch.ones(4), 1.0),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    moved = layout.to("meta")
    assert moved.tables.queries["successive"].cos.device.type == "meta"
    assert layout.to("meta") is moved and layout.to("cpu") is layout
