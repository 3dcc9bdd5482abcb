"""The attention temperature depends on what is in the cache and in the call, not on the way there.

`True` goes by the prompt: a call that fills an empty cache has the length of the row after it, every later query its
own position + 1. `"position"` goes by position + 1 always, so any cut of a text into calls gives the same logits.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from definition import dense_model
from helpers import FAMILIES, GEOMETRY, OLD_TRANSFORMERS, tiny_model
from qwen_longctx import LongContextCache, patch_qwen

CHUNK, LOCAL = GEOMETRY["chunk_size"], GEOMETRY["local_size"]
ORIGINAL = 20
PROMPT_RULE = {"attention_temperature": True, "original_max_position_embeddings": ORIGINAL}
CACHES = [DynamicCache, LongContextCache]


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(1, 97, (batch, tokens))


def heat(length: int) -> float:
    """f² of a sequence of `length` tokens."""
    return max(1.0, 0.1 * math.log(length / ORIGINAL) + 1.0) ** 2


def definition(model: torch.nn.Module, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits of one row whose queries have the temperatures of these lengths."""
    assert len(lengths) == ids.shape[1]
    return dense_model(model, ids, CHUNK, LOCAL, torch.tensor([[heat(n)] for n in lengths], dtype=torch.float64))


@pytest.fixture
def model():
    return patch_qwen(tiny_model(dtype=torch.float64), prefill_chunk_size=50, **PROMPT_RULE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [7, 64, 1000])
@torch.no_grad()
def test_a_prompt_and_what_follows(family, size):
    model = patch_qwen(tiny_model(family, dtype=torch.float64), prefill_chunk_size=size, **PROMPT_RULE)
    ids, cache = prompt(135), LongContextCache()
    logits = [model(ids[:, a:b], past_key_values=cache).logits for a, b in [(0, 100), (100, 101), (101, 135)]]
    wanted = definition(model, ids, [100] * 100 + list(range(101, 136)))
    torch.testing.assert_close(torch.cat(logits, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[], [100], [1, 2, 3, 60], [64, 128], [134]])
@pytest.mark.parametrize("size", [7, 1000])
@torch.no_grad()
def test_by_position_any_cut_gives_the_same(cuts, size):
    model = tiny_model(dtype=torch.float64)
    patch_qwen(model, original_max_position_embeddings=ORIGINAL, prefill_chunk_size=size)  # "position" is the default
    ids, cache = prompt(135), LongContextCache()
    borders = [0, *cuts, 135]
    logits = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(borders[:-1], borders[1:], strict=True)]
    wanted = definition(model, ids, list(range(1, 136)))
    torch.testing.assert_close(torch.cat(logits, 1), wanted, atol=1e-5, rtol=1e-5)


def by_forward(model, ids, cache):
    model(ids, past_key_values=cache)


def by_generate(model, ids, cache):
    model.generate(ids, past_key_values=cache, max_new_tokens=1)


def by_generate_and_crop(model, ids, cache):
    model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
    cache.crop(-(cache.get_seq_length() - ids.shape[1]))


def by_an_emptied_cache(model, ids, cache):
    """Another, longer prompt has been in the cache and was cropped away to the last token."""
    model(prompt(180), past_key_values=cache)
    cache.crop(-180)
    model(ids, past_key_values=cache)


def by_embeddings_of_none(model, ids, cache):
    model.generate(ids, inputs_embeds=None, past_key_values=cache, max_new_tokens=1)


def by_the_base_model(model, ids, cache):
    model.model(ids, past_key_values=cache)


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize(
    "fill",
    [by_forward, by_generate, by_generate_and_crop, by_an_emptied_cache, by_embeddings_of_none, by_the_base_model],
)
@torch.no_grad()
def test_the_same_tokens_in_the_cache_give_the_same(model, fill, make):
    ids, cache = prompt(135), make()
    fill(model, ids[:, :100], cache)
    assert cache.get_seq_length() == 100
    logits = model(ids[:, 100:], past_key_values=cache).logits
    wanted = definition(model, ids, [100] * 100 + list(range(101, 136)))[:, 100:]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_generate_on_a_filled_cache(model, make, whole):
    """With the whole text or with its new tokens alone: the answer is that of greedy decoding by hand."""
    if not whole and OLD_TRANSFORMERS:
        pytest.skip("generate of transformers 4.57 takes the whole text only, patched or not")
    ids, cache, by_hand = prompt(135), make(), make()
    for one in (cache, by_hand):
        model(ids[:, :100], past_key_values=one)
    token, wanted = model(ids[:, 100:], past_key_values=by_hand).logits[:, -1:].argmax(-1), []
    for _ in range(6):
        wanted.append(int(token))
        token = model(token, past_key_values=by_hand).logits[:, -1:].argmax(-1)
    given = ids if whole else ids[:, 100:]
    found = model.generate(given, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert found[0, given.shape[1] :].tolist() == wanted


@torch.no_grad()
def test_drafts_of_the_first_call_do_not_count_to_the_prompt(model):
    """Assisted decoding passes drafts along with the prompt: their temperature is their own, the prompt's its own."""
    ids = prompt(100)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 96}  # transformers 4.57 wants one for drafts
    plain = model.generate(ids, **options)
    drafted = model.generate(ids, **options, prompt_lookup_num_tokens=7)
    assert torch.equal(plain, drafted)


@torch.no_grad()
def test_right_padded_and_left_padded_rows_have_their_own_length(model):
    ids = prompt(100)
    for mask in (torch.arange(130) < 100, torch.arange(130) >= 30):
        padded = torch.zeros(1, 130, dtype=torch.long)
        padded[:, mask] = ids
        logits = model(padded, attention_mask=mask[None].long()).logits[:, mask]
        torch.testing.assert_close(logits, definition(model, ids, [100] * 100), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_settings_are_read_once_a_generate(model):
    """A config that changes while tokens are decoded, by a streamer or another thread, changes the next run only."""
    ids = prompt(100)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)

    class Changing:
        """Changes the geometry at the third token."""

        def __init__(self) -> None:
            self.seen = 0

        def put(self, value: torch.Tensor) -> None:
            self.seen += 1
            if self.seen == 3:
                model.config.dual_chunk_attention_config["local_size"] = 30

        def end(self) -> None:
            pass

    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, generation_config=config, streamer=Changing()), wanted)
    assert not torch.equal(model.generate(ids, generation_config=config), wanted)
