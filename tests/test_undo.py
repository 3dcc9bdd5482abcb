"""What others keep of a model comes back as it was: hooks, forwards of other libraries, wrappers, derived classes."""

from __future__ import annotations

import functools
import inspect
import logging
from types import MethodType

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from helpers import FAMILIES, tiny_model
from qwen_longctx import patch_qwen, patched_qwen, patches, unpatch_qwen
from qwen_longctx.patches.family import REPLACEMENTS
from qwen_longctx.patches.method import BoundMethod, patched_method

hooks = pytest.importorskip("accelerate.hooks")
HOME = [(getattr(qwen2, f"Qwen2{r.suffix}"), r.method) for r in REPLACEMENTS]


@pytest.fixture(autouse=True)
def _classes_come_back():
    before = [vars(owner).get(name) for owner, name in HOME]
    yield
    unpatch_qwen()
    assert [vars(owner).get(name) for owner, name in HOME] == before


@torch.no_grad()
def logits(model):
    torch.manual_seed(3)
    return model(torch.randint(0, 90, (1, 200))).logits


def attributes(model):
    """Every attribute that each module itself holds and that can be called."""
    return [{name: value for name, value in vars(m).items() if callable(value)} for m in model.modules()]


def holds_ours(model):
    return any(patched_method(value) is not None for held in attributes(model) for value in held.values())


def count(calls):
    """A hook of accelerate that counts."""

    class Counts(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    return Counts()


def hook_all(model, calls):
    for module in model.modules():
        hooks.add_hook_to_module(module, count(calls))


def patch_classes(model):
    patch_qwen()


def patch_model(model):
    patch_qwen(model)


def unpatch_both(model):
    unpatch_qwen(model)
    unpatch_qwen()


@pytest.mark.parametrize(
    "steps",
    [
        "patch hook unpatch",
        "hook patch unpatch",
        "classes hook unclass",
        "hook classes unclass",
        "hook classes patch unpatch unclass",
        "hook classes patch unclass unpatch",
        "classes patch hook unclass unpatch",
        "classes hook patch unpatch unclass",
        "patch hook classes unpatch unclass",
        "patch hook patch unpatch",
        "hook patch hook unpatch",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_stay_and_nothing_of_ours_does(family, steps):
    model, calls = tiny_model(family), []
    stock = logits(model)
    does = {
        "patch": lambda: patch_qwen(model),
        "unpatch": lambda: unpatch_qwen(model),
        "classes": patch_qwen,
        "unclass": unpatch_qwen,
        "hook": lambda: hook_all(model, calls),
    }
    patched = False
    for step in steps.split():
        does[step]()
        patched = patched or step in ("patch", "classes")
    calls.clear()
    torch.testing.assert_close(logits(model), stock, rtol=0, atol=0)
    # as many calls as modules are called in a forward: some are lists, and experts may have no tokens
    plain, wanted = tiny_model(family), []
    hook_all(plain, wanted)
    logits(plain)
    assert patched and len(calls) == len(wanted) > 10
    assert not holds_ours(model)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(model), stock, rtol=0, atol=0)
    assert not any("_old_forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_cpu_offload(scope, when):
    from accelerate import cpu_offload

    model = tiny_model()
    stock, target = logits(model), model if scope == "instance" else None
    if when == "before":
        cpu_offload(model, torch.device("cpu"))
    patch_qwen(target)
    if when == "after":
        cpu_offload(model, torch.device("cpu"))
    assert not torch.equal(logits(model), stock)
    unpatch_qwen(target)
    assert torch.equal(logits(model), stock) and not holds_ours(model)
    assert all(hasattr(m, "_hf_hook") for m in model.modules() if list(m.parameters(recurse=False)))


def forward_of_a_library(self, *args, **kwargs):
    """Stands for what Liger or kernels of the hub bind to an instance."""
    return type(self).forward(self, *args, **kwargs)


@pytest.mark.parametrize("form", ["method", "partial", "function"])
@pytest.mark.parametrize("scope", ["class", "instance", "both"])
@pytest.mark.parametrize("kind", ["Attention", "MLP", "RMSNorm", "Model", "ForCausalLM"])
def test_forwards_of_other_libraries_come_back(kind, scope, form):
    model = tiny_model()
    stock = logits(model)
    wanted = logits(patch_qwen(model))
    unpatch_qwen(model)
    for module in model.modules():
        if isinstance(module, getattr(qwen2, f"Qwen2{kind}")):
            bound = MethodType(forward_of_a_library, module)
            theirs = functools.partial(forward_of_a_library, module)
            module.forward = {"method": bound, "partial": theirs, "function": lambda *a, f=bound, **k: f(*a, **k)}[form]
    before = attributes(model)
    if scope != "instance":
        patch_qwen()
    if scope != "class":
        patch_qwen(model)
    torch.testing.assert_close(logits(model), wanted)
    if scope != "class":
        unpatch_qwen(model)
    if scope != "instance":
        unpatch_qwen()
    for was, now in zip(before, attributes(model), strict=True):
        assert was.keys() == now.keys() and all(was[name] is now[name] for name in was)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("scope", ["class", "instance"])
def test_wrappers_that_came_later_wrap_the_stock_forward_again(scope):
    """A wrapper that copies our names and attributes is not ours; what it holds of ours does nothing any more."""
    model = tiny_model()
    stock, target, calls = logits(model), model if scope == "instance" else None, []
    patch_qwen(target)
    inner = model.model.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    functools.update_wrapper(wrapper, inner)
    model.model.forward = wrapper
    wanted = logits(model)
    assert patched_method(wrapper) is None and not torch.equal(wanted, stock)
    unpatch_qwen(target)
    assert vars(model.model)["forward"] is wrapper
    calls.clear()
    assert torch.equal(logits(model), stock) and calls == [1]
    patch_qwen(target)
    torch.testing.assert_close(logits(model), wanted)
    unpatch_qwen(target)
    assert torch.equal(logits(model), stock)


def test_mixed_precision_of_accelerate(monkeypatch):
    """`Accelerator.prepare` binds its own forward around ours; unpatched, it is around the stock one."""
    from accelerate import Accelerator

    model, plain = tiny_model(), tiny_model()
    ids = torch.randint(0, 90, (1, 200))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    patch_qwen(model)
    model, plain = accelerator.prepare(model), accelerator.prepare(plain)
    with torch.no_grad():
        stock = plain(ids).logits
        patched = model(ids).logits
        assert patched.dtype == stock.dtype == torch.float32 and not torch.allclose(patched, stock, atol=1e-2)
        unpatch_qwen(model)
        torch.testing.assert_close(model(ids).logits, stock, rtol=0, atol=0)
    assert not holds_ours(accelerator.unwrap_model(model))


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("kind", ["MLP", "RMSNorm"])
def test_classes_of_other_libraries_are_left_alone(kind, scope, monkeypatch):
    """Liger puts classes of its own into transformers' module, which other models share."""
    theirs = type(f"Liger{kind}", (getattr(qwen2, f"Qwen2{kind}"),), {"forward": forward_of_a_library})
    theirs.forward = getattr(qwen2, f"Qwen2{kind}").forward
    theirs.__module__ = "liger_kernel.transformers"
    before = dict(vars(theirs))
    monkeypatch.setattr(qwen2, f"Qwen2{kind}", theirs)
    model = tiny_model()
    with patched_qwen(model if scope == "instance" else None):
        assert dict(vars(theirs)) == before
        modules = [m for m in model.modules() if type(m) is theirs]
        assert modules and not any(isinstance(vars(m).get("forward"), BoundMethod) for m in modules)
        logits(model)
    monkeypatch.undo()


@pytest.mark.parametrize("scope", ["class", "instance"])
def test_a_vital_class_of_another_library_is_refused(scope, monkeypatch):
    model = tiny_model()
    theirs = type("FastAttention", (nn.Module,), {"__module__": "fast_attention"})
    monkeypatch.setattr(qwen2, "Qwen2Attention", theirs)
    with pytest.raises(RuntimeError, match=r"Qwen2Attention of .* was replaced by fast_attention.FastAttention"):
        patch_qwen(model if scope == "instance" else None)
    assert patches.current_overrides(None) is None and not holds_ours(model)


class OwnAttention(qwen2.Qwen2Attention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnMLP(qwen2.Qwen2MLP):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnHead(qwen2.Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    def generate(self, *args, **kwargs):
        return 1 + super().generate(*args, **kwargs)


def test_derived_classes_keep_their_methods():
    """Those that are not vital run as they are; a vital one cannot be patched by instance, but by its class."""
    model = tiny_model()
    wanted = logits(patch_qwen(model))
    unpatch_qwen(model)
    head = OwnHead(model.config).eval()
    head.load_state_dict(model.state_dict())
    for target in (head, None):
        with patched_qwen(target):
            torch.testing.assert_close(logits(head), 2 * wanted)
            assert "forward" not in vars(head) and "generate" not in vars(head)
    for layer in model.model.layers:
        layer.mlp.__class__ = OwnMLP
    stock = logits(model)
    for target in (model, None):
        with patched_qwen(target):
            assert not torch.equal(logits(model), stock)
            assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)
            doubled = logits(model)
        assert torch.equal(logits(model), stock)
    assert not torch.allclose(doubled, wanted)
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    with pytest.raises(RuntimeError, match="OwnAttention overrides forward of Qwen2Attention"):
        patch_qwen(model)
    assert not holds_ours(model)
    with patched_qwen():
        torch.testing.assert_close(logits(model), doubled)


SIGNATURES = [
    ("Attention", "forward", "self, hidden_states, position_embeddings, attention_mask, {cache}, window=0, **kwargs"),
    ("Attention", "forward", "self, hidden_states, position_embeddings, attention_mask, {cache}=None"),
    ("Attention", "forward", "self, hidden_states, position_embeddings, attention_mask, *{cache}, **kwargs"),
    ("MLP", "forward", "self, x, scale=1"),
    ("RMSNorm", "forward", "self, hidden_states, residual=None"),
    ("RMSNorm", "forward", "self, x"),
    (
        "Model",
        "forward",
        "self, input_ids, attention_mask, position_ids, {cache}, inputs_embeds, use_cache, n, **kwargs",
    ),
    ("Model", "forward", "self, input_ids, attention_mask, {cache}, inputs_embeds, use_cache, **kwargs"),
    ("ForCausalLM", "forward", "self, input_ids, attention_mask, position_ids, {cache}, inputs_embeds, use_cache, "
     "labels, **kwargs"),
    ("ForCausalLM", "generate", "self, inputs, generation_config, draft=None, **kwargs"),
]  # fmt: skip


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("kind, method, signature", SIGNATURES)
def test_the_whole_signature_is_checked(kind, method, signature, scope, monkeypatch):
    model, owner = tiny_model(), getattr(qwen2, f"Qwen2{kind}")
    cache = next(
        name for name in ("cache", "past_key_values") if name in inspect.signature(qwen2.Qwen2Model.forward).parameters
    )
    space: dict = {}
    exec(f"def stands_for_tomorrow({signature.format(cache=cache)}): ...", space)
    monkeypatch.setattr(owner, method, space["stands_for_tomorrow"])
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__} changed Qwen2{kind}.{method}: "):
        patch_qwen(model if scope == "instance" else None)
    assert patches.current_overrides(None) is None and not holds_ours(model)
    monkeypatch.undo()


@pytest.mark.parametrize("at", [1, 5, 9])
@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("change", ["patch", "patch again", "unpatch"])
def test_a_change_that_is_interrupted_changes_nothing(change, scope, at, monkeypatch):
    model, calls = tiny_model(), []
    hook_all(model, calls)
    target = model if scope == "instance" else None
    if change != "patch":
        patch_qwen(target, prefill_chunk_size=50)
    wanted, before = logits(model), attributes(model)
    of_classes = [vars(owner).get(name) for owner, name in HOME]
    left = [at]

    def interrupted(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return plain(*args)

    name = "_put_back" if change == "unpatch" else "BoundMethod"
    plain = getattr(patches, name)
    monkeypatch.setattr(patches, name, interrupted if change == "unpatch" else _interrupted_class(left))
    with pytest.raises(KeyboardInterrupt):
        unpatch_qwen(target) if change == "unpatch" else patch_qwen(target, prefill_chunk_size=70)
    monkeypatch.undo()
    for was, now in zip(before, attributes(model), strict=True):
        assert was.keys() == now.keys() and all(was[slot] is now[slot] for slot in was)
    assert [vars(owner).get(name) for owner, name in HOME] == of_classes
    assert patches.current_overrides(target) == (None if change == "patch" else {"prefill_chunk_size": 50})
    assert torch.equal(logits(model), wanted)
    unpatch_qwen(target)
    assert not holds_ours(model)


def _interrupted_class(left):
    class Interrupted(BoundMethod):
        __slots__ = ()

        def __new__(cls, *args):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return super().__new__(cls, *args)

    return Interrupted


def test_attention_that_is_replaced_after_the_patch_is_noticed():
    """Its keys would be rotated by plain positions, and nobody would see it."""
    model = patch_qwen(tiny_model())
    layer = model.model.layers[1].self_attn
    cache = DynamicCache()
    layer.forward = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)
    with pytest.raises(RuntimeError, match="1 of 2 attention layers"), torch.no_grad():
        model(torch.randint(0, 90, (1, 20)), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("scope", ["class", "instance"])
@pytest.mark.parametrize("method", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_by_name(method, scope):
    model = tiny_model()
    with patched_qwen(model if scope == "instance" else None):
        call = getattr(model, method)
        with pytest.raises(NotImplementedError, match=rf"{method} \(continuous batching\) packs requests"):
            call([[1, 2, 3]]) if method == "generate_batch" else call()
    assert method not in vars(model)


def test_a_warning_names_what_was_replaced_later(caplog):
    patch_qwen()
    ours = qwen2.Qwen2MLP.forward
    stock = patched_method(ours).stock

    def wrapper(self, x):
        return ours(self, x)

    qwen2.Qwen2MLP.forward = wrapper
    model = tiny_model()
    try:
        with caplog.at_level(logging.WARNING):
            unpatch_qwen()
        assert "Qwen2MLP.forward was replaced after patch_qwen(): left as it is" in caplog.text
        assert qwen2.Qwen2MLP.forward is wrapper
        found = logits(model)
    finally:
        qwen2.Qwen2MLP.forward = stock
    assert torch.equal(found, logits(model))
