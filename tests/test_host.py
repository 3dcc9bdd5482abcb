"""Caches in host memory: the same numbers as on the device, whatever is done with them and in whatever order.

Where there is no CUDA device the host plays it: layers come up to other buffers of the host.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import weakref

import pytest
import torch

from helpers import DEVICES, INTERPRETED, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.errors import DoesNotFit, PatchConflict, Unsupported
from qwen_longctx.kv import hf_cache, host, pinned
from qwen_longctx.kv.eight_bit import EightBitStore
from qwen_longctx.kv.hf_cache import LongContextLayer
from qwen_longctx.kv.host import HostStore, Staging
from qwen_longctx.kv.sequence import transaction
from qwen_longctx.kv.store import Store, mean_keys
from qwen_longctx.ops import fetch as fetching
from qwen_longctx.ops.decode import BLOCK
from qwen_longctx.patches.method import cache_argument

GREEDY = {"max_new_tokens": 8, "do_sample": False}
LONG = {"dual_chunk_attention_config": {"chunk_size": 256, "local_size": 64}, "max_position_embeddings": 256}
SPARSE = {"sparse": "block_scores", "sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """Devices have memory of their own, and sequences of the tests are of many pieces."""
    monkeypatch.setattr(hf_cache, "is_apart", lambda device: True)
    monkeypatch.setattr(host, "UNIT", 64)
    monkeypatch.setattr(host, "_PIECE", 64)
    monkeypatch.setattr(host, "_FEW", 9)


def prompt(tokens, batch=1, device="cpu", seed=1):
    torch.manual_seed(seed)
    return torch.randint(1, 97, (batch, tokens)).to(device)


@torch.no_grad()
def logits(model, ids, cuts=(), mask=None, cache=None):
    """Of all tokens, given in pieces, and the cache behind them."""
    found = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        found.append(model(ids[:, start:stop], attention_mask=seen, **cache_argument(cache)).logits)
    return torch.cat(found, 1)


def same(first, second):
    pairs = list(zip(first.layers, second.layers, strict=True))
    return bool(pairs) and all(
        torch.equal(x.keys.cpu(), y.keys.cpu()) and torch.equal(x.values.cpu(), y.values.cpu()) for x, y in pairs
    )


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_prefill_and_decoding_bit_for_bit(device, layers, padded):
    model = patch_qwen(tiny_model(num_hidden_layers=layers).to(device), prefill_chunk_size=40)
    ids = prompt(230, 2, device)
    mask = torch.ones_like(ids)
    mask[1, : 50 * padded] = 0
    cuts = [100, 101, 103, 104, 200, *range(201, 230)]
    ours, theirs = LongContextCache(kv_cache="host"), LongContextCache()
    found, wanted = (logits(model, ids, cuts, mask, cache) for cache in (ours, theirs))
    assert torch.equal(found, wanted) and same(ours, theirs)
    assert all(type(layer.store) is HostStore and not layer.store.buffers[0].numel() for layer in ours.layers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [SPARSE, {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": None}])
def test_sparse_prefill_bit_for_bit(device, rule):
    if rule["sparse"] == "vertical_slash":
        rule = {**rule, "sparse_attention_config": [{str(head): ["vertical_and_slash", 64, 96, 1.0] for head in range(4)}] * 2}
    model = tiny_model(**LONG).to(device)
    ids = prompt(700, 2, device)
    with patched_qwen(model, **rule):
        ours, theirs = LongContextCache(720, kv_cache="host"), LongContextCache(720)
        found, wanted = (logits(model, ids, [650], None, cache) for cache in (ours, theirs))
    assert torch.equal(found, wanted) and same(ours, theirs)
    assert ours.report()["density"] == theirs.report()["density"] < 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"draft": True}])
def test_generate_gives_the_same_tokens(device, family, how):
    model = tiny_model(family).to(device)
    ids = prompt(90, 1 if "draft" in how else 2, device)
    mask = torch.ones_like(ids)
    mask[0, : 20 * (len(ids) - 1)] = 0
    options = {**GREEDY, **{k: v for k, v in how.items() if k != "draft"}}
    if "draft" in how:
        options["assistant_model"] = patch_qwen(tiny_model(family, initializer_range=0.3).to(device))
    found = {}
    for kind in ("host", "device"):
        with patched_qwen(model, kv_cache=kind, prefill_chunk_size=40):
            out = model.generate(ids, attention_mask=mask, **options, return_dict_in_generate=True)
        found[kind] = out.sequences
        kinds = {type(layer.store) for layer in out.past_key_values.layers}
        assert kinds == {HostStore if kind == "host" else Store}
    assert torch.equal(found["host"], found["device"])


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_decode_bit_for_bit(device, monkeypatch):
    """Blocks alone come up; on the CPU as if it read host memory by itself."""
    monkeypatch.setattr(HostStore, "_is_read_by", lambda self, blocks: True)
    brought = []
    original = host.fetch
    monkeypatch.setattr(host, "fetch", lambda *args: brought.append(args[-1].shape) or original(*args))
    model = tiny_model(**LONG).to(device)
    ids, more = prompt(5000, 2, device), prompt(40, 2, device, seed=2)
    with patched_qwen(model, sparse="off", sparse_decode=0.01):
        ours, theirs = LongContextCache(5100, kv_cache="host"), LongContextCache(5100)
        for cache in (ours, theirs):
            logits(model, ids, [], None, cache)
        cuts = [1, 2, 5, *range(6, 40)]
        found, wanted = (logits(model, more, cuts, None, cache) for cache in (ours, theirs))
    assert torch.equal(found, wanted) and same(ours, theirs)
    assert len(brought) >= 2 * 2 * (len(cuts) - 1)


# --- against a plain list of tensors ----------------------------------------------------------------------------------


def make_store(kind):
    if kind in ("int8", "fp8"):
        return [EightBitStore(kind), EightBitStore(kind), EightBitStore(kind)]
    if kind == "device":
        return [Store(), Store(), Store()]
    staging = Staging()
    return [HostStore(staging), HostStore(staging), HostStore(staging)]


@pytest.mark.parametrize("kind", ["device", "host", "int8", "fp8"])
@pytest.mark.parametrize("seed", range(50))
def test_random_sequences_against_plain_tensors(kind, seed, tmp_path, monkeypatch):
    """Four times fifty: three layers of one cache; for 8 bits, what they stand for when each token came."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    cache = LongContextCache(dice.choice([0, 100]), kv_cache=kind)
    model = tiny_model(num_hidden_layers=3)
    patch_qwen(model, kv_cache=kind)
    settings, origins = _settings(model), None
    rows = dice.randint(1, 3)
    plain = [[torch.empty(rows, 0, 2, 8), torch.empty(rows, 0, 2, 8)] for _ in range(3)]
    for _ in range(dice.randint(4, 12)):
        action = dice.choice(["append", "append", "append", "crop", "rows", "save", "copy", "look"])
        length = plain[0][0].shape[1]
        if action == "append":
            tokens = dice.choice([1, 2, 30, 130])
            origins = tuple(_origin() for _ in range(rows))
            with transaction(cache, settings, origins, model.model):
                for number in range(3):
                    k, v = torch.randn(2, rows, tokens, 2, 8)
                    store = cache.append(k, v, number)
                    seen = store.segment(length, length + tokens) if kind in ("int8", "fp8") else (k, v)
                    plain[number] = [torch.cat(both, 1) for both in zip(plain[number], seen, strict=True)]
                    check(store, plain[number], dice)
        elif action == "crop" and length:
            keep = dice.randint(1, length)
            cache.crop(keep)
            plain = [[x[:, :keep] for x in both] for both in plain]
        elif action == "rows" and length:
            chosen = torch.randint(0, rows, (dice.randint(1, 3),))
            cache.reorder_cache(chosen)
            rows, plain = len(chosen), [[x[chosen] for x in both] for both in plain]
        elif action == "save" and length and kind not in ("int8", "fp8"):
            cache.save(tmp_path / "prefix")
            cache = LongContextCache.load(tmp_path / "prefix", model)
            assert cache.kv_cache == kind
        elif action == "copy" and length:
            cache = copy.deepcopy(cache) if dice.random() < 0.5 else pickle.loads(pickle.dumps(cache))
            cache.qwen_longctx.written = [one._replace(model=host_ref(model)) for one in cache.qwen_longctx.written]
        elif length:
            for number in dice.sample(range(3), 3):
                check(cache.layers[number].store, plain[number], dice)
    for layer, both in zip(cache.layers, plain, strict=False):
        assert layer.get_seq_length() == both[0].shape[1]
        assert torch.equal(layer.keys.transpose(1, 2), both[0]) and torch.equal(layer.values.transpose(1, 2), both[1])


def check(store, both, dice):
    length = both[0].shape[1]
    start = dice.randint(0, length)
    rows = dice.choice([slice(None), slice(0, 1)])
    for found, wanted in zip(store.segment(start, length, rows), both, strict=True):
        assert torch.equal(found, wanted[rows, start:])
    assert torch.equal(store.key_means(4), mean_keys(both[0], 4))
    if isinstance(store.room()[0], torch.Tensor):
        assert all(torch.equal(x[:, :length], y) for x, y in zip(store.room(), both, strict=True))


def _settings(model):
    from qwen_longctx import settings_of

    return settings_of(model)


def _origin():
    from qwen_longctx.geometry.layout import Origin

    return Origin(0)


def host_ref(model):
    from qwen_longctx.kv.sequence import ModelRef

    return ModelRef(model.model)
