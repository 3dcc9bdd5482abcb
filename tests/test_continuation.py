"""A cache is continued only by what continues it: the same geometry, a patched model, positions that go on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen, unpatch_qwen
from qwen_longctx.errors import InvalidValue, PatchConflict

CACHES = [DynamicCache, LongContextCache]


def prompt(tokens: int, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(tokens)
    return torch.randint(1, 97, (batch, tokens))


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("other", [{"chunk_size": 32}, {"local_size": 8}, {"chunk_size": 72, "local_size": 24}])
@torch.no_grad()
def test_another_geometry_is_refused(make, other):
    """Also where both have the same stride: successive queries rotate by the chunk size."""
    model, cache = tiny_model(), make()
    with patched_qwen(model):
        model(prompt(100), past_key_values=cache)
    with patched_qwen(model, **other):
        for call in (
            lambda: model(prompt(5), past_key_values=cache),
            lambda: model.generate(prompt(105), past_key_values=cache),
        ):
            with pytest.raises(PatchConflict, match="the cache was filled with chunk_size=64, local_size=16"):
                call()
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("make", CACHES)
@torch.no_grad()
def test_an_unpatched_model_is_refused(make):
    """Within the first chunk too, where keys are alike: what follows would pass the border unnoticed."""
    model, cache = tiny_model(), make()
    patch_qwen(model)
    model(prompt(30), past_key_values=cache)
    unpatch_qwen(model)
    for call in (
        lambda: model(prompt(5), past_key_values=cache),
        lambda: model.generate(prompt(35), past_key_values=cache),
    ):
        with pytest.raises(PatchConflict, match="not patched: patch it again"):
            call()
    patch_qwen(model)
    assert model(prompt(5), past_key_values=cache).logits.shape == (1, 5, 97)


@torch.no_grad()
def test_a_cache_of_a_stock_model_is_continued_within_the_first_chunk_only():
    model, short, long = tiny_model(dtype=torch.float64), DynamicCache(), DynamicCache()
    model(prompt(40), past_key_values=short)
    model(prompt(60), past_key_values=long)
    wanted = model(torch.cat((prompt(40), prompt(8)), 1)).logits[:, 40:]
    patch_qwen(model)
    torch.testing.assert_close(model(prompt(8), past_key_values=short).logits, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(PatchConflict, match="this patch did not write"):
        model(prompt(8), past_key_values=long)


@pytest.mark.parametrize("make", CACHES)
@torch.no_grad()
def test_positions_that_do_not_continue_are_refused(make):
    model, cache = patch_qwen(tiny_model()), make()
    model(prompt(50), past_key_values=cache)
    for first in (0, 49, 51):
        with pytest.raises(InvalidValue, match="do not continue the cache"):
            model(prompt(10), past_key_values=cache, position_ids=torch.arange(first, first + 10)[None])
    model(prompt(10), past_key_values=cache, position_ids=torch.arange(50, 60)[None])
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("border", [16, 25, 32, 48])
@pytest.mark.parametrize("size", [16, 1000])
@pytest.mark.parametrize("base", [False, True])
@torch.no_grad()
def test_packed_sequences_are_refused_wherever_their_border_falls(border, size, base):
    """On a border of prefill chunks every chunk by itself looks right."""
    model = patch_qwen(tiny_model(), prefill_chunk_size=size)
    ran: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: ran.append(1))
    positions = torch.cat((torch.arange(border), torch.arange(64 - border)))[None]
    with pytest.raises(InvalidValue, match="packed"):
        (model.model if base else model)(prompt(64), position_ids=positions)
    assert not ran


@torch.no_grad()
def test_positions_that_start_elsewhere_are_continued_from_there():
    """Rotary attention knows distances only: a constant shift is the same text."""
    model = patch_qwen(tiny_model(dtype=torch.float64), attention_temperature=False)
    whole, cache = model(prompt(100)).logits, LongContextCache()
    first = model(prompt(100)[:, :60], position_ids=torch.arange(7, 67)[None], past_key_values=cache).logits
    second = model(prompt(100)[:, 60:], position_ids=torch.arange(67, 107)[None], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, second), 1), whole)


@pytest.mark.parametrize("make", CACHES)
@torch.no_grad()
def test_an_emptied_cache_takes_another_geometry(make):
    model, cache = tiny_model(dtype=torch.float64), make()
    with patched_qwen(model):
        model(prompt(100), past_key_values=cache)
    if isinstance(cache, LongContextCache):
        cache.reset()
    else:
        cache.crop(-100)
    with patched_qwen(model, chunk_size=32):
        torch.testing.assert_close(model(prompt(90), past_key_values=cache).logits, model(prompt(90)).logits)


@torch.no_grad()
def test_a_filled_cache_under_another_temperature_is_continued():
    """The temperature is in the softmax and never in cached keys, so it may change from call to call."""
    model, cache = tiny_model(dtype=torch.float64), LongContextCache()
    with patched_qwen(model, original_max_position_embeddings=20):
        model(prompt(100), past_key_values=cache)
    with patched_qwen(model, original_max_position_embeddings=20, attention_temperature=False):
        assert model(prompt(5), past_key_values=cache).logits.shape == (1, 5, 97)


@pytest.mark.parametrize("make", [*CACHES, lambda: StaticCache(config=tiny_model().config, max_cache_len=48)])
@torch.no_grad()
def test_a_filled_cache_is_saved_and_loaded(make, tmp_path):
    """A prompt cache written to disk goes on where it stopped, and still refuses another geometry."""
    model, cache = tiny_model(dtype=torch.float64), make()
    with patched_qwen(model):
        model(prompt(30), past_key_values=cache)
        torch.save(cache, tmp_path / "cache.pt")
        wanted = model(prompt(5), past_key_values=cache).logits
        loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
        torch.testing.assert_close(model(prompt(5), past_key_values=loaded).logits, wanted)
    with patched_qwen(model, local_size=8), pytest.raises(PatchConflict, match="the cache was filled with"):
        model(prompt(5), past_key_values=loaded)


@pytest.mark.parametrize("make", CACHES)
@torch.no_grad()
def test_every_row_is_continued_at_its_own_positions(make):
    """One row of position ids for a padded batch counts each row otherwise; no row may go on as another one does."""
    model, cache = patch_qwen(tiny_model(dtype=torch.float64)), make()
    ids, mask = prompt(90, 2), torch.ones(2, 90, dtype=torch.long)
    mask[0, :50] = 0
    model(ids, attention_mask=mask, position_ids=torch.arange(90)[None], past_key_values=cache)
    longer = torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), 1)
    for rows in ([0, 1], [1, 0]):
        cache.reorder_cache(torch.tensor(rows))
        longer = longer[rows]
        shift = torch.tensor([50, 0])[rows if rows == [1, 0] else [0, 1]]
        wrong = longer.cumsum(1)[:, 90:] - 1 + shift.flip(0)[:, None]
        with pytest.raises(InvalidValue, match="do not continue the cache: the first new token of row"):
            model(prompt(3, 2), attention_mask=longer, position_ids=wrong, past_key_values=cache)
    for positions in (torch.arange(90, 93)[None], (longer.cumsum(1) - 1)[:, 90:], None):
        found = model(prompt(3, 2), attention_mask=longer, position_ids=positions, past_key_values=cache).logits
        cache.crop(-3)
        torch.testing.assert_close(found[1], model(torch.cat((ids[:1, 50:], prompt(3, 2)[1:]), 1)).logits[0, -3:])


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("layers", [(2, 3), (3, 2)])
@torch.no_grad()
def test_the_cache_of_a_model_with_other_layers_is_refused(make, layers):
    """Some layers would grow and others not, and the next call would take that for an interruption."""
    first, second = (patch_qwen(tiny_model(num_hidden_layers=count)) for count in layers)
    cache = make()
    first(prompt(60), past_key_values=cache)
    for call in (
        lambda: second(prompt(5), past_key_values=cache),
        lambda: second.generate(prompt(65), past_key_values=cache),
    ):
        with pytest.raises(PatchConflict, match=f"holds {layers[0]} layers and the model has {layers[1]}"):
            call()
    assert cache.get_seq_length() == 60


class OwnLayer(DynamicLayer):
    """A layer of somebody else's."""


@torch.no_grad()
def test_layers_of_any_kind_are_copied_and_pickled():
    model, cache = patch_qwen(tiny_model(dtype=torch.float64)), DynamicCache()
    cache.layer_class_to_replicate = OwnLayer
    model(prompt(60), past_key_values=cache)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.deepcopy(copy.deepcopy(cache))):
        assert [type(layer).guarded for layer in copied.layers] == [OwnLayer] * 2
        found = model(prompt(5), past_key_values=copied).logits
        torch.testing.assert_close(found, model(torch.cat((prompt(60), prompt(5)), 1)).logits[:, 60:])


@pytest.mark.parametrize("make", CACHES)
@pytest.mark.parametrize("tokens", [40, 60])
@torch.no_grad()
def test_an_emptied_cache_serves_a_stock_model(make, tokens):
    """What the patch knew of it is forgotten: no padding, no geometry, and no keys beyond the first chunk."""
    model, cache = tiny_model(dtype=torch.float64), make()
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = 0
    with patched_qwen(model):
        model(prompt(90, 2), attention_mask=mask, past_key_values=cache)
    cache.crop(-90)
    parts = [model(prompt(tokens, 2)[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, tokens))]
    torch.testing.assert_close(torch.cat(parts, 1), model(prompt(tokens, 2)).logits, atol=1e-5, rtol=1e-5)
    with patched_qwen(model):
        if tokens == 60:
            with pytest.raises(PatchConflict, match="the cache holds 60 tokens, 60 of which this patch did not write"):
                model(prompt(5, 2), past_key_values=cache)
        else:
            found = model(prompt(5, 2), past_key_values=cache).logits
            whole = torch.cat((prompt(40, 2), prompt(5, 2)), 1)
            torch.testing.assert_close(found, model(whole).logits[:, 40:], atol=1e-5, rtol=1e-5)
