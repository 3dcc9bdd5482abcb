"""Gradients of patched models, against autograd through the definition in float64, within a chunk and beyond."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from definition import dense_model
from helpers import FAMILIES, GEOMETRY, OLD_TRANSFORMERS, tiny_model
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.errors import PatchConflict
from qwen_longctx.patches.method import cache_of

CHUNK, LOCAL = GEOMETRY["chunk_size"], GEOMETRY["local_size"]


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(1, 97, (batch, tokens))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all parameters that have one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], most: float = 1e-6) -> None:
    """Relative to the largest value of each: transformers works norms and losses out in float32."""
    assert found.keys() == wanted.keys()
    for name, true in wanted.items():
        assert (found[name] - true).abs().max() <= most * true.abs().max(), name


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [40, 48, 49, 64, 65, 150])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_gradients_are_those_of_the_definition(family, tokens, kernel):
    """Below the stride, at it, up to the chunk size, and beyond."""
    model = tiny_model(family, dtype=torch.float64).train()
    ids = prompt(tokens)
    wanted = gradients(model, next_token_loss(dense_model(model, ids, CHUNK, LOCAL, 1.0), ids))
    patch_qwen(model, prefill_chunk_size=7, kernel=kernel, attention_temperature=False)
    found = gradients(model, next_token_loss(model(ids).logits, ids))
    assert_same(found, wanted)


@pytest.mark.parametrize("temperature", [True, "position"])
def test_with_an_attention_temperature(temperature):
    model = tiny_model(dtype=torch.float64).train()
    patch_qwen(model, attention_temperature=temperature, original_max_position_embeddings=20)
    ids = prompt(150)
    lengths = torch.full((150,), 150.0) if temperature is True else torch.arange(1, 151).double()
    heat = (0.1 * (lengths.double() / 20).log() + 1).clamp(min=1)[:, None] ** 2
    wanted = gradients(model, next_token_loss(dense_model(model, ids, CHUNK, LOCAL, heat), ids))
    assert_same(gradients(model, next_token_loss(model(ids).logits, ids)), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(side):
    model = tiny_model(dtype=torch.float64).train()
    rows = [prompt(150), prompt(90)]
    losses = [next_token_loss(dense_model(model, row, CHUNK, LOCAL, 1.0), row) for row in rows]
    wanted = gradients(model, losses[0] + losses[1])
    patch_qwen(model, attention_temperature=False)
    mask = torch.ones(2, 150, dtype=torch.long)
    at = slice(0, 90) if side == "right" else slice(60, 150)
    mask[1] = 0
    mask[1, at] = 1
    ids = torch.zeros(2, 150, dtype=torch.long)
    ids[0], ids[1, at] = rows[0], rows[1]
    logits = model(ids, attention_mask=mask).logits
    loss = next_token_loss(logits[:1], rows[0]) + next_token_loss(logits[1:, at], rows[1])
    assert_same(gradients(model, loss), wanted)


@pytest.mark.parametrize("tokens", [64, 150])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tokens, reentrant):
    model = patch_qwen(tiny_model(dtype=torch.float64).train())
    ids = prompt(tokens, batch=2)
    wanted = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(gradients(model, model(ids, labels=ids).loss), wanted)


@pytest.mark.parametrize("tokens", [30, 60, 150])
@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
def test_prefix_tuning(tokens, make):
    """Keys and values of a learned prefix get their gradients: those of one softmax over prefix and text."""
    model = tiny_model(dtype=torch.float64)
    patch_qwen(model, attention_temperature=False)
    model.requires_grad_(False)
    torch.manual_seed(1)
    prefix = torch.randn(2, 2, 1, 2, 10, 8, dtype=torch.float64)
    ids = prompt(tokens)

    def loss_of(prefix: torch.Tensor) -> torch.Tensor:
        cache = make()
        for layer in range(2):
            cache.update(prefix[layer, 0], prefix[layer, 1], layer)
        return next_token_loss(model(ids, past_key_values=cache).logits, ids)

    leaf = prefix.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss_of(leaf), leaf)
    step = 3e-3  # transformers works norms out in float32, whose noise a smaller step would show
    for seed in range(6):
        torch.manual_seed(seed)
        direction = torch.randn_like(prefix)
        with torch.no_grad():
            slope = (loss_of(prefix + step * direction) - loss_of(prefix - step * direction)) / (2 * step)
        torch.testing.assert_close((found * direction).sum(), slope, rtol=3e-3, atol=1e-5)


def test_peft_prefix_tuning():
    """The learned virtual tokens of peft move by the same gradients as on the stock model, within a chunk."""
    peft = pytest.importorskip("peft")
    found = []
    for patched in (False, True):
        model = tiny_model(dtype=torch.float64)
        torch.manual_seed(3)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12)
        wrapped = peft.get_peft_model(model, config).double()
        if patched:
            patch_qwen(wrapped)
        ids = prompt(45)
        found.append(gradients(wrapped, wrapped(input_ids=ids, labels=ids).loss))
    assert_same(found[1], found[0], most=1e-5)


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
def test_gradients_flow_through_a_cache(make):
    """A text passed in two calls on one cache, as truncated backpropagation does, has the gradients of one call."""
    model = tiny_model(dtype=torch.float64).train()
    patch_qwen(model, attention_temperature=False)
    ids = prompt(150)
    wanted = gradients(model, next_token_loss(model(ids).logits, ids))
    cache = make()
    first = model(ids[:, :70], past_key_values=cache).logits
    second = model(ids[:, 70:], past_key_values=cache).logits
    assert_same(gradients(model, next_token_loss(torch.cat((first, second), 1), ids)), wanted)


def test_embeddings_that_require_gradients():
    """Soft prompts: the model is frozen, its input is not."""
    model = tiny_model(dtype=torch.float64)
    ids = prompt(150)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    patch_qwen(model, attention_temperature=False, prefill_chunk_size=30)
    model.requires_grad_(False)
    (found,) = torch.autograd.grad(next_token_loss(model(inputs_embeds=embeddings).logits, ids), embeddings)
    model.requires_grad_(True)
    whole = model(inputs_embeds=embeddings).logits
    (wanted,) = torch.autograd.grad(next_token_loss(whole, ids), embeddings)
    torch.testing.assert_close(found, wanted)
    assert bool(found[:, :-1].any(-1).all())


def test_training_never_takes_the_float32_reference(monkeypatch):
    """Between stride and chunk size too: fused kernels, whose memory does not grow with the square of the tokens."""

    def refuse(*args, **kwargs):
        raise AssertionError("the reference was called")

    model = patch_qwen(tiny_model().train())
    ids = prompt(150)
    for module in [m for name, m in sys.modules.items() if name.startswith("qwen_longctx")]:
        for name in ("reference", "reference_backward"):
            if callable(vars(module).get(name)):
                monkeypatch.setattr(module, name, refuse)
    for tokens in (60, 64, 150):
        model(ids[:, :tokens], labels=ids[:, :tokens]).loss.backward()


@pytest.mark.parametrize("tokens", [60, 150])
def test_training_under_autocast(tokens):
    """float32 weights, bfloat16 work, as Trainer(bf16=True) runs it: near the float32 gradients."""
    model = patch_qwen(tiny_model().train())
    ids = prompt(tokens, batch=2)
    wanted = gradients(model, model(ids, labels=ids).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    found = gradients(model, loss)
    for name, true in wanted.items():
        assert (found[name] - true).norm() <= 0.1 * true.norm(), name


def test_a_cache_under_reentrant_checkpointing_is_refused():
    """Its second pass would append every token again: told, and not answered wrongly."""
    model = patch_qwen(tiny_model().train())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = prompt(60)
    cache = LongContextCache()
    try:
        loss = model(ids, labels=ids, past_key_values=cache).loss
        found = gradients(model, loss)
    except PatchConflict as refusal:
        assert "gradient checkpointing" in str(refusal)
    else:
        assert_same(found, gradients(model, model(ids, labels=ids).loss), most=1e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_frozen_models_outside_no_grad_are_chunked_and_sliced(mode):
    """Nothing requires gradients, so nothing is kept for a backward: chunks of prefill and slices in the MLP."""
    model = tiny_model(dtype=torch.float64)
    model.train(mode == "train").requires_grad_(False)
    patch_qwen(model, prefill_chunk_size=50, mlp_chunk_size=16)
    ids = prompt(170)
    chunks: list[int] = []
    slices: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, given: chunks.append(given[0].shape[1]))
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(
        lambda module, given: slices.append(given[0].shape[1])
    )
    out = model(ids)
    assert chunks == [50, 50, 50, 20] and max(slices) == 16 and sum(slices) == 170
    assert cache_of(out).get_seq_length() == 170 and not out.logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, out.logits)


@pytest.mark.skipif(OLD_TRANSFORMERS, reason="transformers 4.57 drops every cache there, which is refused")
@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_models_under_gradient_checkpointing(reentrant):
    """Checkpointing drops caches where gradients are on; with nothing to train, chunks need theirs."""
    model = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=50)
    ids, cache = prompt(170), LongContextCache()
    wanted = model(ids).logits
    model.train().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(model(ids).logits, wanted)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 90), (90, 91), (91, 170))]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_a_head_alone_is_trained_on_a_frozen_base():
    """The base prefills in chunks and keeps nothing; the head has its gradients."""
    model = tiny_model(dtype=torch.float64).train()
    model.model.requires_grad_(False)
    ids, found = prompt(170), []
    for size in (1000, 50):
        patch_qwen(model, prefill_chunk_size=size)
        found.append(gradients(model, model(ids, labels=ids).loss))
    assert list(found[0]) == ["lm_head.weight"]
    assert_same(found[1], found[0])


def test_trainer_bf16(tmp_path):
    """transformers' own Trainer, float32 weights under autocast, texts beyond the chunk size, loss goes down."""
    transformers = pytest.importorskip("transformers")
    model = patch_qwen(tiny_model().train())
    ids = prompt(150)[0]
    data = [{"input_ids": ids, "labels": ids}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=3e-3,
        bf16=True,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
