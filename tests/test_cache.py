"""The cache: one allocation, views out, and every operation generate uses."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.kv.hf_cache import LongContextLayer


def states(tokens, batch=2):
    return torch.randn(2, batch, 3, tokens, 4)


def filled(capacity=0, pieces=(5, 1, 3)):
    layer, plain = LongContextLayer(capacity), []
    for tokens in pieces:
        k, v = states(tokens)
        layer.update(k, v)
        plain.append((k, v))
    return layer, torch.cat([k for k, _ in plain], 2), torch.cat([v for _, v in plain], 2)


def addresses(layer):
    return [b.data_ptr() for b in layer.store.buffers]


def test_layout_and_views():
    layer, k, v = filled(20)
    assert layer.keys.shape == (2, 3, 9, 4) and layer.get_seq_length() == 9
    assert [tuple(b.shape) for b in layer.store.buffers] == [(2, 20, 3, 4)] * 2
    assert layer.keys.data_ptr() == addresses(layer)[0]
    assert torch.equal(layer.keys, k) and torch.equal(layer.values, v)


def test_known_length_allocates_once():
    layer = LongContextLayer(64)
    layer.update(*states(30))
    before = addresses(layer)
    for _ in range(34):
        layer.update(*states(1))
    assert addresses(layer) == before and layer.get_seq_length() == 64


def test_unknown_length_grows_by_half():
    layer, places = LongContextLayer(), set()
    for _ in range(3000):
        layer.update(*states(1, batch=1))
        places.add(layer.store.buffers[0].shape[1])
    assert len(places) <= 10 and layer.get_seq_length() == 3000
    layer, k, v = filled(0, (5, 300, 2))
    assert torch.equal(layer.keys, k) and torch.equal(layer.values, v)


@pytest.mark.parametrize("argument, left", [(4, 4), (-2, 7), (100, 9), (-100, 0), (9, 9), (0, 9)])
def test_crop_keeps_or_removes(argument, left):
    layer, k, _ = filled(20)
    before = addresses(layer)
    layer.crop(argument)
    assert layer.get_seq_length() == left and torch.equal(layer.keys, k[:, :, :left])
    new_k, new_v = states(2)
    keys, _ = layer.update(new_k, new_v)
    assert torch.equal(keys, torch.cat((k[:, :, :left], new_k), 2)) and addresses(layer) == before


def test_rows_are_reordered_repeated_and_selected():
    layer, k, v = filled(20)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, k[[1, 1]]) and torch.equal(layer.values, v[[1, 1]])
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.keys, k[[1] * 6])
    layer.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(layer.values, v[[1, 1]])
    new_k, new_v = states(1)
    assert torch.equal(layer.update(new_k, new_v)[0][:, :, -1:], new_k)
    assert layer.store.buffers[0].shape[1] == 20


def test_values_may_differ_in_width():
    layer = LongContextLayer()
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 6))
    assert layer.values.shape == (1, 2, 3, 6)


def test_assigned_tensors_are_adopted():
    """Offloading assigns keys and values; updates go on from them."""
    layer, k, v = filled(20)
    layer.keys, layer.values = k.clone(), v.clone()
    new_k, new_v = states(2)
    keys, values = layer.update(new_k, new_v)
    assert torch.equal(keys, torch.cat((k, new_k), 2)) and torch.equal(values, torch.cat((v, new_v), 2))


def test_reset_and_deepcopy():
    layer, k, _ = filled(20)
    other = copy.deepcopy(layer)
    layer.reset()
    assert layer.get_seq_length() == 0 and torch.equal(other.keys, k)
    layer.update(*states(2))
    assert layer.get_seq_length() == 2


def test_an_emptied_layer_takes_another_batch_and_dtype():
    layer, *_ = filled(20)
    layer.reset()
    k, v = (x.double() for x in states(4, batch=1))
    keys, values = layer.update(k, v)
    assert torch.equal(keys, k) and torch.equal(values, v) and keys.dtype == torch.float64
    assert layer.store.buffers[0].shape[:2] == (1, 20)


def test_empty_cache():
    cache = LongContextCache(10)
    assert cache.get_seq_length() == 0 and isinstance(cache, DynamicCache)
    layer = LongContextLayer()
    layer.crop(3)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([0]))
    assert layer.keys is None


@torch.no_grad()
def test_no_reallocation_in_a_run(monkeypatch):
    """generate makes room once: as many allocations as layers, whatever the chunks and new tokens."""
    from qwen_longctx.kv import store

    taken = []
    original = store._room
    monkeypatch.setattr(store, "_room", lambda *args: taken.append(args[1]) or original(*args))
    monkeypatch.setattr(store.Store, "_grow", lambda *_: pytest.fail("the cache was reallocated"))
    model = patch_qwen(tiny_model("qwen2"), prefill_chunk_size=23)
    out = model.generate(
        torch.randint(1, 90, (1, 150)), max_new_tokens=9, do_sample=False, return_dict_in_generate=True
    )
    assert taken == [159] * 4  # keys and values of two layers
    report = out.past_key_values.report()
    assert report["tokens"] == 150 and report["tokens_per_second"] > 0


@torch.no_grad()
def test_layers_lie_where_their_keys_are():
    layer = LongContextLayer(8)
    layer.update(torch.ones(1, 2, 3, 4, device="meta"), torch.ones(1, 2, 3, 4, device="meta"))
    assert {b.device.type for b in layer.store.buffers} == {"meta"}
