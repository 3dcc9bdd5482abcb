"""An error or Ctrl-C in the middle of a call leaves the cache as it was before the call."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.config import KV_CACHES
from qwen_longctx.errors import PatchConflict
from qwen_longctx.patches.method import cache_of

CACHES = [DynamicCache, LongContextCache, lambda: LongContextCache(200)]


def prompt(tokens: int) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(1, 97, (1, tokens))


class Break:
    """Raises in the layer's attention, or before it, at the given call."""

    def __init__(self, module: torch.nn.Module, call: int, error: type[BaseException]) -> None:
        self.left, self.error = call, error
        self.hook = module.register_forward_hook(self)

    def __call__(self, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.hook.remove()
            raise self.error("stop")


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("held", [0, 70])
@pytest.mark.parametrize("call", [1, 2, 4])
@torch.no_grad()
def test_a_retry_on_the_same_cache_is_as_if_nothing_had_happened(make, error, held, call):
    model = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=30, original_max_position_embeddings=20)
    ids = prompt(170)
    cache, calm = make(), make()
    for one in (cache, calm):
        if held:
            model(ids[:, :held], past_key_values=one)
    wanted = model(ids[:, held:], past_key_values=calm).logits
    Break(model.model.layers[0].self_attn, call, error)  # layer 0 has appended, layer 1 has not
    with pytest.raises(error, match="stop"):
        model(ids[:, held:], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [held] * len(cache.layers)
    torch.testing.assert_close(model(ids[:, held:], past_key_values=cache).logits, wanted)
    more = prompt(5)
    torch.testing.assert_close(model(more, past_key_values=cache).logits, model(more, past_key_values=calm).logits)


class Full(TorchDispatchMode):
    """The operation number `left` finds no memory, or none of them."""

    def __init__(self, left: int = 0) -> None:
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("full")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind in KV_CACHES if kind != "fp8"])  # whose code is that of int8
@torch.no_grad()
def test_out_of_memory_at_any_operation_of_a_prefill(kind, tmp_path):
    """Cache and model are as before, and the retry gets the same logits; what it leaves can be saved."""
    long = {"dual_chunk_attention_config": {"chunk_size": 128, "local_size": 32}, "max_position_embeddings": 128}
    model = patch_qwen(
        tiny_model(**long), sparse="block_scores", sparse_attention_threshold=150, prefill_chunk_size=96, block_size=32
    )
    ids, prefix = prompt(270), LongContextCache(kv_cache=kind)
    model(ids[:, :70], past_key_values=prefix)

    def keys_and_values(cache):
        return [x for layer in cache.layers for x in layer.store.segment(0, 270)]

    cache, counted = copy.deepcopy(prefix), Full()
    with counted:
        wanted = model(ids[:, 70:], past_key_values=cache).logits
    held, dice = keys_and_values(cache), random.Random(kind)
    for left in sorted({1, 2, *(dice.randrange(1, -counted.left) for _ in range(10)), -counted.left}):
        cache = copy.deepcopy(prefix)  # whose buffers have no room, and grow
        with pytest.raises(torch.OutOfMemoryError, match="full"), Full(left):
            model(ids[:, 70:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [70, 70]
        assert torch.equal(model(ids[:, 70:], past_key_values=cache).logits, wanted), left
        assert all(map(torch.equal, keys_and_values(cache), held))
    cache.save(tmp_path)
    loaded = LongContextCache.load(tmp_path, model)
    assert all(map(torch.equal, keys_and_values(loaded), held))


@pytest.mark.parametrize("make", CACHES)
@torch.no_grad()
def test_generate_after_an_interrupted_generate(make):
    """A chat whose answer was stopped in the prefill of a turn goes on with that turn."""
    model = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=30)
    ids, cache, calm = prompt(170), make(), make()
    for one in (cache, calm):
        model(ids[:, :50], past_key_values=one)
    wanted = model.generate(ids, past_key_values=calm, max_new_tokens=8, do_sample=False)
    Break(model.model.layers[1].mlp, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, max_new_tokens=8)
    assert cache.get_seq_length() == 50
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False), wanted)


@torch.no_grad()
def test_a_decoding_step_is_rolled_back_too():
    model = patch_qwen(tiny_model(dtype=torch.float64))
    ids, cache, calm = prompt(100), LongContextCache(), LongContextCache()
    for one in (cache, calm):
        model(ids[:, :99], past_key_values=one)
    wanted = model(ids[:, 99:], past_key_values=calm).logits[:, -1]
    Break(model.model.layers[0], 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 99:], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 99:], past_key_values=cache).logits[:, -1], wanted)


@torch.no_grad()
def test_the_first_call_of_a_cache_made_by_the_model():
    model = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=30)
    Break(model.model.layers[0], 2, RuntimeError)
    with pytest.raises(RuntimeError, match="stop"):
        model(prompt(100))
    torch.testing.assert_close(cache_of(model(prompt(100))).get_seq_length(), 100)


@torch.no_grad()
def test_layers_left_unequal_by_others_are_rolled_back_or_refused():
    """An interruption that nobody could catch, such as a signal between two layers."""
    model = patch_qwen(tiny_model(dtype=torch.float64), attention_temperature=False)
    ids, cache = prompt(100), DynamicCache()
    model(ids[:, :60], past_key_values=cache)
    cache.layers[0].keys = torch.cat((cache.layers[0].keys, cache.layers[0].keys[..., :7, :]), -2)
    cache.layers[0].values = torch.cat((cache.layers[0].values, cache.layers[0].values[..., :7, :]), -2)
    torch.testing.assert_close(model(ids[:, 60:], past_key_values=cache).logits, model(ids).logits[:, 60:])


@torch.no_grad()
def test_a_static_cache_gives_its_tokens_back():
    model = patch_qwen(tiny_model(dtype=torch.float64))
    ids, cache = prompt(40), StaticCache(config=model.config, max_cache_len=48)
    model(ids[:, :20], past_key_values=cache)
    Break(model.model.layers[0].self_attn, 1, RuntimeError)
    with pytest.raises(RuntimeError, match="stop"):
        model(ids[:, 20:], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits, model(ids).logits[:, 20:])


@torch.no_grad()
def test_a_cache_that_cannot_give_tokens_back_is_refused_afterwards():
    class Quantized(DynamicLayer):
        """Holds more than the two tensors, as quantized layers do."""

        def update(self, *args, **kwargs):
            return super().update(*args, **kwargs)

    model = patch_qwen(tiny_model(dtype=torch.float64))
    ids, cache = prompt(40), DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [Quantized(), Quantized()], None
    model(ids[:, :20], past_key_values=cache)
    Break(model.model.layers[0].self_attn, 1, RuntimeError)
    with pytest.raises(RuntimeError, match="stop"):
        model(ids[:, 20:], past_key_values=cache)
    with pytest.raises(PatchConflict, match="a call was interrupted"):
        model(ids[:, 20:], past_key_values=cache)


@pytest.mark.parametrize("make", CACHES)
@torch.no_grad()
def test_an_interrupted_first_call_leaves_a_new_cache(make):
    """The next call may have another batch."""
    model, cache = patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=30), make()
    ids = prompt(170)
    Break(model.model.layers[1], 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids.expand(3, -1), past_key_values=cache)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert cache.layers[0].keys.shape[0] == 1
