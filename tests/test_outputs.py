"""Chunked prefill hands out what the stock forward does: fields, order, types, and losses."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.patches.method import cache_of

TOKENS = 60  # within one chunk of the geometry, where the patch is the stock model, and two chunks of prefill


def prompt(tokens: int = TOKENS, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(1, 97, (batch, tokens))


def shape(value):
    """The structure of an output: names and shapes, caches by their length."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if hasattr(value, "get_seq_length"):
        return int(value.get_seq_length())
    if hasattr(value, "items"):
        return {name: shape(one) for name, one in value.items()}
    return tuple(shape(one) for one in value) if isinstance(value, tuple) else value


def assert_same(found, wanted):
    """Tensors of two outputs are equal, in the same order."""
    assert shape(found) == shape(wanted)
    values = (
        zip(found, wanted, strict=True)
        if isinstance(found, tuple)
        else zip(found.values(), wanted.values(), strict=True)
    )
    for a, b in values:
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


CALLS = [
    {},
    {"labels": True},
    {"labels": True, "return_dict": False},
    {"labels": True, "use_cache": False, "return_dict": False},
    {"return_dict": False},
    {"use_cache": False},
    {"use_cache": True},
    {"use_cache": False, "return_dict": False},
    {"logits_to_keep": 1},
    {"logits_to_keep": torch.tensor([3, 50])},
    {"labels": True, "num_items_in_batch": 10},
    {"output_hidden_states": True},
    {"output_hidden_states": True, "return_dict": False},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("size", [17, 1000])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_are_those_of_the_stock_model(family, size, call):
    model = tiny_model(family, dtype=torch.float64)
    ids = prompt()
    call = {**call, **({"labels": ids} if call.get("labels") else {})}
    wanted = model(ids, **call)
    with patched_qwen(model, prefill_chunk_size=size):
        found = model(ids, **call)
    assert type(found) is type(wanted)
    assert_same(found, wanted)
    if "labels" in call:
        torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.parametrize("call", [c for c in CALLS if "labels" not in c and "logits_to_keep" not in c], ids=str)
@pytest.mark.parametrize("size", [17, 1000])
@torch.no_grad()
def test_outputs_of_the_base_model(size, call):
    model = tiny_model(dtype=torch.float64).model
    wanted = model(prompt(), **call)
    with patched_qwen(model, prefill_chunk_size=size):
        assert_same(model(prompt(), **call), wanted)


@torch.no_grad()
def test_a_config_without_cache():
    model = tiny_model(dtype=torch.float64)
    model.config.use_cache = False
    wanted = model(prompt())
    with patched_qwen(model, prefill_chunk_size=17):
        assert_same(model(prompt()), wanted)


@torch.no_grad()
def test_ids_and_embeddings_together_are_refused():
    model = patch_qwen(tiny_model(), prefill_chunk_size=17)
    embeddings = model.get_input_embeddings()(prompt())
    for module in (model, model.model):
        with pytest.raises(InvalidValue, match="got both"):
            module(prompt(), inputs_embeds=embeddings)


@pytest.mark.parametrize("size", [17, 1000])
@torch.no_grad()
def test_a_loss_where_labels_are_shifted_by_the_caller(size):
    """Trainer's context parallelism passes `shift_labels` beside `labels`."""
    model = tiny_model(dtype=torch.float64)
    ids = prompt()
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    wanted = model(ids, labels=ids, shift_labels=shifted).loss
    with patched_qwen(model, prefill_chunk_size=size):
        torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, wanted)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (prompt()[:, :-1], InvalidValue, r"labels must have the shape of the tokens, \(2, 60\), got \(2, 59\)"),
        (prompt()[:1], InvalidValue, "shape of the tokens"),
        (prompt().float(), InvalidType, "tensor of token ids, got torch.float32"),
        (prompt().tolist(), InvalidType, "tensor of token ids, got list"),
        (prompt() + 97, InvalidValue, "the model knows 0 to 96: mark tokens without a label by -100"),
        (-prompt(), InvalidValue, "labels hold -"),
    ],
)
def test_labels_are_checked_before_the_first_chunk(labels, error, message):
    model = patch_qwen(tiny_model(), prefill_chunk_size=17)
    ran: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: ran.append(1))
    with pytest.raises(error, match=message):
        model(prompt(), labels=labels)
    assert not ran


@torch.no_grad()
def test_the_cache_handed_in_is_the_cache_handed_out():
    model = patch_qwen(tiny_model(), prefill_chunk_size=17)
    cache = LongContextCache()
    out = model.model(prompt(), past_key_values=cache)
    assert isinstance(out, BaseModelOutputWithPast) and cache_of(out) is cache
    assert cache_of(model(prompt(5), past_key_values=cache)) is cache and cache.get_seq_length() == 65
