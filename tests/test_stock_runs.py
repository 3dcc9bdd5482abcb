"""What works with the stock model works with the patched one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.kv.store import STEP
from qwen_longctx.patches.method import cache_of


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(1, 97, (batch, tokens))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [30, 60, 170])
@pytest.mark.parametrize("size", [1000, 25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_float32_weights_under_autocast(family, tokens, size, dtype):
    model = patch_qwen(tiny_model(family), prefill_chunk_size=size, mlp_chunk_size=9)
    ids = prompt(tokens, batch=2)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=dtype):
        logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        beams = model.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False)
    assert (logits.float() - exact).norm() < 0.1 * exact.norm()
    assert generated.shape == (2, tokens + 5) and beams.shape[0] == 2


@pytest.mark.parametrize("tokens", [30, 170])
@torch.no_grad()
def test_autocast_gives_the_dtype_of_the_stock_model(tokens):
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model.model(prompt(tokens)).last_hidden_state.dtype, model(prompt(tokens)).logits.dtype
        patch_qwen(model, prefill_chunk_size=25)
        assert (model.model(prompt(tokens)).last_hidden_state.dtype, model(prompt(tokens)).logits.dtype) == wanted


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_a_cache_filled_under_autocast_and_continued_without(first):
    model = patch_qwen(tiny_model())
    cache = LongContextCache()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        model(prompt(100), past_key_values=cache)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
        found = model(prompt(5), past_key_values=cache).logits
    exact = model(torch.cat((prompt(100), prompt(5)), 1)).logits[:, 100:]
    assert (found.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("assistant_patched", [True, False])
@torch.no_grad()
def test_assisted_decoding_with_the_pad_token_in_drafts(assistant_patched):
    """The pad token is a token like others within a text; here the assistant drafts little else."""
    model, assistant = tiny_model(), tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        assistant.lm_head.weight[0] = assistant.lm_head.weight.abs().sum(0) * 3
        model.lm_head.weight[0] *= 3
    patch_qwen(model)
    if assistant_patched:
        patch_qwen(assistant)
    ids = prompt(80)
    ids[0, 40] = 0
    everything = torch.ones_like(ids)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=everything, **settings)
    assisted = model.generate(ids, attention_mask=everything, assistant_model=assistant, **settings)
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("limit", [{"max_length": 10**30}, {"max_new_tokens": 10**9}])
@torch.no_grad()
def test_limits_that_nobody_means(limit):
    """Room is taken for the prompt and one step of growth; generation ends at the stop token."""
    model = patch_qwen(tiny_model(dtype=torch.float64))
    ids = prompt(100)
    stop = int(model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    rooms: list[int] = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, kwargs, out: rooms.append(cache_of_call(kwargs).layers[0].store.buffers[0].shape[1]),
        with_kwargs=True,
    )
    out = model.generate(ids, do_sample=False, eos_token_id=stop, pad_token_id=0, **limit)
    assert out.shape[1] <= 200 and max(rooms) <= 100 + STEP


def cache_of_call(arguments):
    """The cache among the keyword arguments of a layer."""
    return arguments.get("past_key_values", arguments.get("cache"))


@torch.no_grad()
def test_generate_without_a_limit_takes_room_for_its_default_length():
    """No half of the prompt's length on top: the default is 20 tokens, and room is for as many."""
    model = patch_qwen(tiny_model(max_position_embeddings=4096))
    cache = cache_of(model.generate(prompt(170), return_dict_in_generate=True))
    assert cache.layers[0].store.buffers[0].shape[1] <= 170 + 256 + 20


@torch.no_grad()
def test_positional_logits_processors():
    class Only(LogitsProcessor):
        """Allows token 5 alone."""

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5]), 0.0)

    model = patch_qwen(tiny_model())
    out = model.generate(prompt(70), GenerationConfig(max_new_tokens=4, do_sample=False), LogitsProcessorList([Only()]))
    assert out[0, 70:].tolist() == [5] * 4


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache, lambda: LongContextCache(300)])
@pytest.mark.parametrize("then", ["generate", "forward", "train"])
def test_inference_mode_then_something_else(make, then):
    """Tensors made in inference mode cannot be written to outside of it: copied, once."""
    model = patch_qwen(tiny_model(dtype=torch.float64), attention_temperature=False)
    ids, cache = prompt(170), make()
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.inference_mode():
        model(ids[:, :100], past_key_values=cache)
    if then == "generate":
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False), wanted)
    elif then == "forward":
        with torch.no_grad():
            logits = model(ids[:, 100:], past_key_values=cache).logits
            torch.testing.assert_close(logits, model(ids).logits[:, 100:])
    else:
        model.train()
        logits = model(ids[:, 100:], past_key_values=cache).logits
        logits.sum().backward()
        torch.testing.assert_close(logits, model(ids).logits[:, 100:])


@pytest.mark.parametrize("where", ["keyword", "config", "model"])
@torch.no_grad()
def test_cache_implementation_dynamic(where):
    model = patch_qwen(tiny_model())
    ids = prompt(170)
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    given = {}
    if where == "keyword":
        given["cache_implementation"] = "dynamic"
    elif where == "config":
        config.cache_implementation = "dynamic"
    else:
        model.generation_config.cache_implementation = "dynamic"
    before = copy.deepcopy(model.generation_config.to_dict())
    assert torch.equal(model.generate(ids, generation_config=config, **given), wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **given), wanted)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("kernel", ["auto", "flex", "reference"])
@torch.no_grad()
def test_every_kernel_setting_with_automatic_sparsity(kernel):
    """Where a kernel that takes block lists does not run, automatic sparsity is dense; it is no error."""
    model = tiny_model(dtype=torch.float64)
    with patched_qwen(model, sparse="off"):
        wanted = model(prompt(170)).logits
    with patched_qwen(model, sparse="auto", kernel=kernel, sparse_attention_threshold=32):
        cache = LongContextCache()
        torch.testing.assert_close(model(prompt(170), past_key_values=cache).logits, wanted)
        assert cache.report()["density"] == 1.0
