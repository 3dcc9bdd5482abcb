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
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import StoppingCriteriaList

from helpers import DEVICES, INTERPRETED, tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, memory, patch_qwen, patched_qwen, settings_of
from qwen_longctx.attention import choice
from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import KV_CACHES
from qwen_longctx.errors import DoesNotFit, Unsupported
from qwen_longctx.geometry.layout import Call, Origin
from qwen_longctx.kv import hf_cache, host, pinned, saved
from qwen_longctx.kv.hf_cache import LongContextLayer
from qwen_longctx.kv.host import HostStore, Lane, Staging
from qwen_longctx.kv.pinned import Pages
from qwen_longctx.kv.sequence import ModelRef, transaction
from qwen_longctx.kv.store import Store, mean_keys
from qwen_longctx.ops.decode import BLOCK
from qwen_longctx.ops.fetch import fetch, fetch_triton, places_of
from qwen_longctx.patches import graphs, room
from qwen_longctx.patches.method import cache_argument, cache_of
from qwen_longctx.prefill import memory as estimates
from qwen_longctx.prefill.memory import Need
from qwen_longctx.prefill.peak import Prefill
from qwen_longctx.shapes import known_config

GREEDY = {"max_new_tokens": 8, "do_sample": False}
LONG = {"dual_chunk_attention_config": {"chunk_size": 256, "local_size": 64}, "max_position_embeddings": 256}
SPARSE = {"sparse": "block_scores", "sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """Devices have memory of their own, and sequences of the tests are of many pieces."""
    monkeypatch.setattr(hf_cache, "is_apart", lambda device: True)
    monkeypatch.setattr(host, "UNIT", 64)
    monkeypatch.setattr(host, "_PIECE", 1)
    monkeypatch.setattr(host, "_FEW", 70)


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
    ids = prompt(210, 2, device)
    mask = torch.ones_like(ids)
    mask[1, : 50 * padded] = 0
    cuts = [100, 101, 103, 104, 200, *range(201, 210)]
    ours, theirs = LongContextCache(kv_cache="host"), LongContextCache()
    found, wanted = (logits(model, ids, cuts, mask, cache) for cache in (ours, theirs))
    assert torch.equal(found, wanted) and same(ours, theirs)
    assert all(type(layer.store) is HostStore and not layer.store.buffers[0].numel() for layer in ours.layers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", [SPARSE, {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": None}])
def test_sparse_prefill_bit_for_bit(device, rule):
    if rule["sparse"] == "vertical_slash":
        rule = {
            **rule,
            "sparse_attention_config": [{str(head): ["vertical_and_slash", 64, 96, 1.0] for head in range(4)}] * 2,
        }
    model = tiny_model(**LONG, head_dim=16).to(device)  # the fewest that the kernels of a GPU take
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
@torch.no_grad()
def test_sparse_decode_bit_for_bit(device, monkeypatch):
    """Blocks alone come up; on the CPU as if that read host memory by itself."""
    for name, value in (("LEAST", 128), ("NEWEST", 64), ("_STEP", 64)):
        monkeypatch.setattr(choice, name, value)
    monkeypatch.setattr(HostStore, "_is_read_by", lambda self, blocks: True)
    fetched = []
    monkeypatch.setattr(host, "fetch", lambda *args: fetched.append(args[-2].shape[2]) or fetch(*args))
    model = tiny_model(head_dim=16, num_hidden_layers=3, **LONG).to(device)  # more layers than are there at once
    ids, more = prompt(1000, 2, device), prompt(40, 2, device, seed=2)
    cuts = [1, 4, 5, 13, 14, 15, 23, 31, 32, 33, 34, 38]
    with patched_qwen(model, sparse="off", sparse_decode=0.1, sparse_decode_threshold=1, prefill_chunk_size=300):
        ours, theirs = LongContextCache(1100, kv_cache="host"), LongContextCache(1100)
        for cache in (ours, theirs):
            logits(model, ids, [], None, cache)
        first = [logits(model, more[:, :1], [], None, cache) for cache in (ours, theirs)]
        with monkeypatch.context() as patch:  # means are known now: whole layers do not come up any more
            patch.setattr(Lane, "present", lambda *_: pytest.fail("a whole layer came up"))
            found = logits(model, more[:, 1:], cuts, None, ours)
        wanted = logits(model, more[:, 1:], cuts, None, theirs)
    assert torch.equal(*first) and torch.equal(found, wanted) and same(ours, theirs)
    assert len(fetched) >= 2 * 2 * len(cuts) and max(fetched) < 5  # of 16 blocks


# --- against a plain list of tensors ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return {kind: patch_qwen(tiny_model(num_hidden_layers=3), kv_cache=kind) for kind in KV_CACHES}


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("seed", range(50))
def test_random_sequences_against_plain_tensors(kind, seed, models, tmp_path):
    """Four times fifty: three layers of one cache; for 8 bits, what they stand for when each token came."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    cache = LongContextCache(dice.choice([0, 100]), kv_cache=kind)
    model = models[kind]
    settings, origins = settings_of(model), None
    rows = dice.randint(1, 3)
    plain = [[torch.empty(rows, 0, 2, 8), torch.empty(rows, 0, 2, 8)] for _ in range(3)]
    for _ in range(dice.randint(4, 12)):
        action = dice.choice(["append", "append", "append", "crop", "rows", "save", "copy", "look"])
        length = plain[0][0].shape[1]
        if action == "append":
            tokens = dice.choice([1, 2, 30, 130])
            origins = tuple(Origin(0) for _ in range(rows))
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
        elif action == "save" and length:
            cache.save(tmp_path / "prefix")
            cache = LongContextCache.load(tmp_path / "prefix", model)
            assert cache.kv_cache == kind
        elif action == "copy" and length:
            cache = copy.deepcopy(cache) if dice.random() < 0.5 else pickle.loads(pickle.dumps(cache))
            cache.qwen_longctx.written = [
                one._replace(model=ModelRef(model.model)) for one in cache.qwen_longctx.written
            ]
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


# --- what may go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_no_memory_in_mid_prefill_leaves_model_and_cache_usable(device, first, monkeypatch):
    """On the host or on the device, before it is taken or right after."""
    model = patch_qwen(tiny_model(num_hidden_layers=3).to(device), prefill_chunk_size=40, kv_cache="host")
    ids, more = prompt(400, 1, device), prompt(90, 1, device, seed=2)
    cache, calm = LongContextCache(kv_cache="host"), LongContextCache()
    for one in (cache, calm):
        logits(model, ids[:, :50], [], None, one)
    for owner, name, error, at in (
        (pinned, "_fresh", OSError("no memory"), 3),
        (pinned, "_fresh", KeyboardInterrupt(), 2),
        (host._Slot, "give", torch.OutOfMemoryError("no memory"), 7),
        (host._Slot, "give", KeyboardInterrupt(), 16),
    ):
        calls, original = [], getattr(owner, name)

        def fails(*arguments, original=original, error=error, calls=calls, at=at):
            calls.append(arguments)
            if first and len(calls) == at:
                raise error
            result = original(*arguments)
            if len(calls) == at:
                raise error
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(type(error)):
                logits(model, ids[:, 50:], [], None, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [50] * 3
    assert torch.equal(logits(model, more, [60], None, cache), logits(model, more, [60], None, calm))
    assert same(cache, calm)


def test_memory_that_the_system_does_not_have(monkeypatch):
    def mmap(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pinned.mmap, "mmap", mmap)
    with pytest.raises(DoesNotFit, match="no 1,000 bytes of host memory.*Cannot allocate"):
        Pages(1000, torch.device("cpu"))


def test_every_piece_is_taken_once_and_given_back(monkeypatch):
    """Growing copies nothing, and a cache that is gone leaves nothing behind, without waiting for Python to look."""
    taken = []
    monkeypatch.setattr(host, "Pages", lambda *args: taken.append(Pages(*args)) or taken[-1])
    cache = LongContextCache(kv_cache="host")
    for tokens in (10, 300, 1, 1, 700):
        for number in range(2):
            cache.append(*torch.randn(2, 1, tokens, 2, 8), number)
    places = [[x.data_ptr() for x in piece.tensors] for piece in cache.layers[0].store._pieces]
    for _ in range(3):
        for number in range(2):
            cache.append(*torch.randn(2, 1, 500, 2, 8), number)
    pieces = cache.layers[0].store._pieces
    assert [[x.data_ptr() for x in piece.tensors] for piece in pieces][: len(places)] == places
    assert pieces[-1].stop >= cache.get_seq_length() and sum(piece.pages.memory.numel() for piece in pieces) == (
        pieces[-1].stop * 2 * 2 * 8 * 4
    )
    known = [weakref.ref(one) for one in taken]
    store = weakref.ref(cache.layers[0].store)
    cache.layers[0].store._staging._pool.shutdown()
    taken.clear()
    gc.disable()
    try:
        del cache, pieces
        assert store() is None and not any(one() for one in known)
    finally:
        gc.enable()


@torch.no_grad()
def test_caches_that_are_alive_together_do_not_mix():
    model = patch_qwen(tiny_model(), prefill_chunk_size=40)
    prompts = [prompt(200, 1, seed=seed) for seed in (3, 4)]
    caches = [LongContextCache(kv_cache="host") for _ in prompts]
    found = [[], []]
    for start in range(0, 200, 20):
        for number, (ids, cache) in enumerate(zip(prompts, caches, strict=True)):
            found[number].append(logits(model, ids[:, start : start + 20], [], None, cache))
            if start == 100:
                caches[number] = copy.deepcopy(cache)
    for ids, some in zip(prompts, found, strict=True):
        wanted = logits(model, ids, range(20, 200, 20), None, LongContextCache())
        assert torch.equal(torch.cat(some, 1), wanted)


@torch.no_grad()
def test_inference_mode_and_plain_mode_take_turns():
    model = patch_qwen(tiny_model().requires_grad_(False), prefill_chunk_size=40)
    ids, found = prompt(200, 2), []
    for cache in (LongContextCache(kv_cache="host"), LongContextCache()):
        with torch.inference_mode():
            first = model(ids[:, :90], **cache_argument(cache)).logits
        with torch.enable_grad():
            second = model(ids[:, 90:150], **cache_argument(cache)).logits
            cache.reorder_cache(torch.tensor([1, 0]))
        with torch.inference_mode():
            third = model(ids[:, 150:], **cache_argument(cache)).logits
            cache.reorder_cache(torch.tensor([1, 1, 0]))
        with torch.no_grad():
            fourth = model(ids[[1, 1, 0], :9], **cache_argument(cache)).logits
        found.append([first, second, third, fourth])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_what_is_refused():
    ids = prompt(20)
    model = patch_qwen(tiny_model())
    with pytest.raises(Unsupported, match='"host" has no gradients'):
        model(ids, **cache_argument(LongContextCache(kv_cache="host")))
    layer = LongContextLayer(kind="host")
    with pytest.raises(Unsupported, match="has no gradients"):
        layer.update(*torch.randn(2, 1, 2, 3, 8, requires_grad=True))
    layer.update(*torch.randn(2, 1, 2, 3, 8))
    with pytest.raises(Unsupported, match="takes no tensors"):
        layer.keys = torch.zeros(1, 2, 3, 8)
    assert layer.get_seq_length() == 3


def test_on_the_cpu_it_is_a_plain_cache(monkeypatch):
    monkeypatch.undo()
    layer = LongContextLayer(kind="host")
    k, v = torch.randn(2, 1, 2, 3, 8)
    assert torch.equal(layer.update(k, v)[0], k) and type(layer.store) is Store
    model = patch_qwen(tiny_model(), kv_cache="host")
    out = model.generate(prompt(90), **GREEDY, return_dict_in_generate=True)
    with patched_qwen(model, kv_cache="device"):
        assert torch.equal(out.sequences, model.generate(prompt(90), **GREEDY))
    assert {type(one.store) for one in out.past_key_values.layers} == {Store}
    assert out.past_key_values.kv_cache == "host"


@torch.no_grad()
def test_its_tokens_are_not_captured():
    model, found = patch_qwen(tiny_model().requires_grad_(False)), {}
    for kind in ("device", "host"):
        cache = LongContextCache(100, kv_cache=kind)
        model(prompt(60), **cache_argument(cache))
        run = SimpleNamespace(cache=cache, call=Call.whole(1, 1, 60), device=torch.device("cpu"))
        found[kind] = graphs._has_room(run, torch.float32)
    assert found == {"device": True, "host": False}


@pytest.mark.gpu
@torch.no_grad()
def test_layers_on_two_devices(monkeypatch):
    monkeypatch.undo()
    accelerate = pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layers = {f"model.layers.{number}": number // 3 for number in range(6)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    model = accelerate.dispatch_model(tiny_model(num_hidden_layers=6), {**layers, **ends}, main_device=0)
    patch_qwen(model, prefill_chunk_size=40)
    ids, found = prompt(210, 1, "cuda:0"), []
    for kind in ("host", "device"):
        cache = LongContextCache(220, kv_cache=kind)
        found.append(logits(model, ids, [100, 101, 103, 200, *range(201, 210)], None, cache))
    assert torch.equal(*found)


def test_an_unpatched_model_may_fill_it():
    model, ids = tiny_model(), prompt(60)
    with torch.no_grad():
        found = [model(ids, **cache_argument(LongContextCache(kv_cache=kind))).logits for kind in ("host", "device")]
    assert torch.equal(*found)


@torch.no_grad()
def test_a_prefix_moves_between_kinds(tmp_path):
    ids, more = prompt(300, 2), prompt(9, 2, seed=2)
    found = []
    for fill, load in (("host", "device"), ("device", "host"), ("host", "host")):
        with patched_qwen(model := tiny_model(), kv_cache=fill, prefill_chunk_size=70):
            cache = LongContextCache(kv_cache=fill)
            logits(model, ids, [], None, cache)
            cache.save(tmp_path / fill)
            with patched_qwen(model, kv_cache=load, prefill_chunk_size=70):
                loaded = LongContextCache.load(tmp_path / fill, model)
                assert loaded.kv_cache == load and same(loaded, cache)
                found += [logits(model, more, [4], None, one) for one in (loaded, cache)]
    assert all(torch.equal(found[0], one) for one in found[1:])


@pytest.mark.parametrize("capacity", [0, 40_000])
@torch.no_grad()
def test_a_prefix_asks_the_host_for_room_before_it_takes_any(tmp_path, monkeypatch, capacity):
    """As much as loading takes, that ahead of the next tokens included, and not a byte more."""
    model, ids = patch_qwen(tiny_model(), kv_cache="host", prefill_chunk_size=300), prompt(900, 2)
    cache, taken = LongContextCache(kv_cache="host"), []
    logits(model, ids, [], None, cache)
    cache.save(tmp_path / "prefix")
    real = host.new_piece
    monkeypatch.setattr(host, "new_piece", lambda *args: taken.append(piece := real(*args)) or piece)
    loaded = LongContextCache.load(tmp_path / "prefix", model, capacity)
    for layer in loaded.layers:
        for _, future in layer.store._coming:
            future.result()
    needed = sum(tensor.nbytes for piece in taken for tensor in piece.tensors)
    assert needed >= 2 * cache.layers[0].keys.nbytes * len(cache.layers)
    del taken[:]
    monkeypatch.setattr(saved, "free_host_bytes", lambda: needed - 1)
    message = f"needs {needed:,} bytes of host memory for keys and values of 2 x 900 tokens, and {needed - 1:,} are"
    with pytest.raises(DoesNotFit, match=message):
        LongContextCache.load(tmp_path / "prefix", model, capacity)
    assert not taken
    for free in (needed, None):
        monkeypatch.setattr(saved, "free_host_bytes", lambda free=free: free)
        assert same(LongContextCache.load(tmp_path / "prefix", model, capacity), cache)
    monkeypatch.setattr(saved, "free_host_bytes", lambda: 0)
    with patched_qwen(model, kv_cache="device", prefill_chunk_size=300):
        assert same(LongContextCache.load(tmp_path / "prefix", model, capacity), cache)


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_the_plan_of_the_7b():
    found = memory.plan("qwen2.5-7b-1m", "1M", "24GB", kv_cache="host", prefill_chunk_size=16384)
    device = memory.plan("qwen2.5-7b-1m", "1M", "24GB", prefill_chunk_size=16384)
    assert found.fits and not device.fits
    assert found.memory.host == device.memory.kv_cache == 57_344 * 10**6
    assert found.memory.kv_cache == 2 * 2048 * 10**6 and found.memory.activations == device.memory.activations
    assert f"{found.memory.host / 2**30:.2f} GiB, keys and values of all layers" in str(found)
    assert "kv_cache='host'" in device.suggestions[0].line
    two = memory.plan("qwen2.5-7b-1m", "1M", "24GB", gpus=28, kv_cache="host")
    assert two.memory.kv_cache == 2048 * 10**6 and two.memory.host == found.memory.host


def test_means_of_sparse_decode_are_counted():
    dense = memory.plan("qwen2.5-7b-1m", "1M", kv_cache="host", sparse="off").memory
    decode = memory.plan("qwen2.5-7b-1m", "1M", kv_cache="host", sparse="off", sparse_decode=0.05).memory
    assert decode.selection - dense.selection == 28 * 4 * 128 * 2 * 10**6 // 32


def test_host_memory_is_looked_at_before_the_first_chunk(monkeypatch):
    config = Shape.of(known_config("qwen2.5-7b-1m"))
    settings = LongContextConfig.from_model_config(known_config("qwen2.5-7b-1m"), kv_cache="host")
    need = Need(1_000_000, 1, torch.bfloat16)
    monkeypatch.setattr(estimates, "free_host_bytes", lambda: 50 * 10**9)
    with pytest.raises(DoesNotFit, match=r"53.4 GiB of host memory.*46.6 GiB are free: 871,930 tokens would fit"):
        estimates.check_host_fits(config, need, settings)
    estimates.check_host_fits(config, need._replace(host_room=200_000), settings)
    estimates.check_host_fits(config, need, replace(settings, kv_cache="device"))
    monkeypatch.setattr(estimates, "free_host_bytes", lambda: None)
    estimates.check_host_fits(config, need, settings)


@torch.no_grad()
def test_a_run_counts_what_is_there_already(monkeypatch):
    model = patch_qwen(tiny_model(), kv_cache="host")
    cache = LongContextCache(400, kv_cache="host")
    base, looked = model.model, {}
    monkeypatch.setattr(room, "_layers_of", lambda base: {torch.device("cuda"): 2})
    monkeypatch.setattr(estimates, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(estimates, "check_host_fits", lambda shape, need, settings: looked.update(vars_of(shape, need)))
    model.generate(prompt(300), past_key_values=cache, **GREEDY)
    assert looked == {"layers": 2, "host_room": 0, "tokens": 308, "room": 0}
    stop = StoppingCriteriaList([lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)])
    model.generate(prompt(320), past_key_values=cache, max_new_tokens=200, stopping_criteria=stop)
    assert looked == {"layers": 2, "host_room": 320, "tokens": 520, "room": 400}
    assert base is model.model


@torch.no_grad()
def test_auto_takes_the_host_where_nothing_else_fits(monkeypatch):
    model = patch_qwen(tiny_model(num_hidden_layers=12), kv_cache="auto", sparse="off", cuda_graphs=False)
    ids, tokens = prompt(1500), 1508
    settings = replace(settings_of(model), kv_cache="host")
    shape = Shape.of(model.config)
    needed = {
        kind: estimates.kv_bytes(shape, torch.float32, kind) * tokens
        + Prefill(shape, tokens, 1, torch.float32, replace(settings, kv_cache=kind)).peak().total
        for kind in ("device", "int8", "host")
    }
    assert needed["host"] < needed["int8"] < needed["device"]
    host_needs = estimates.kv_bytes(shape, torch.float32) * tokens
    monkeypatch.setattr(estimates, "free_host_bytes", lambda: host_needs)
    found = {}
    for kind, size in needed.items():
        monkeypatch.setattr(estimates, "free_bytes", lambda device, size=size: size)
        out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        assert cache_of(out).kv_cache == kind
        found[kind] = out.sequences
    assert torch.equal(found["host"], found["device"])
    monkeypatch.setattr(estimates, "free_host_bytes", lambda: host_needs - 1)
    cache = LongContextCache(kv_cache="auto")
    with pytest.raises(DoesNotFit, match="of host memory for keys and values"):
        model.generate(ids, past_key_values=cache, **GREEDY)
    assert cache.kv_cache == "auto" and not cache.layers
    monkeypatch.setattr(estimates, "free_bytes", lambda device: needed["host"] - 1)
    with pytest.raises(DoesNotFit, match="of KV cache"):
        model.generate(ids, **GREEDY)


def vars_of(shape, need):
    return {"layers": shape.layers, "host_room": need.host_room, "tokens": need.tokens, "room": need.room}


@torch.no_grad()
def test_the_host_is_advised_only_where_it_has_room(monkeypatch):
    model, tokens = tiny_model(num_hidden_layers=12), 1508
    shape = Shape.of(model.config)
    on_host = estimates.kv_bytes(shape, torch.float32) * tokens
    with patched_qwen(model, sparse="off", prefill_chunk_size=512, mlp_chunk_size=512, cuda_graphs=False):
        settings = replace(settings_of(model), kv_cache="host")
        size = estimates.kv_bytes(shape, torch.float32, "host") * tokens
        size += Prefill(shape, tokens, 1, torch.float32, settings).peak().total
        monkeypatch.setattr(estimates, "free_bytes", lambda device: size)
        for free, advised in ((on_host, True), (on_host - 1, False)):
            monkeypatch.setattr(estimates, "free_host_bytes", lambda free=free: free)
            with pytest.raises(DoesNotFit) as told:
                model.generate(prompt(1500), **GREEDY)
            assert ("kv_cache='host'" in str(told.value)) == advised


@torch.no_grad()
def test_room_is_taken_on_the_device_before_drafts_look():
    model, cache = patch_qwen(tiny_model(num_hidden_layers=3)), LongContextCache(300, kv_cache="auto")
    cache.settle("host")
    room.take_room(model.model, cache, 2)
    assert len({id(layer.store._staging) for layer in cache.layers}) == 1
    assert all(layer.store.staged_for(2) == 300 and not layer.store.room_for(2) for layer in cache.layers)


def test_free_host_memory_is_that_of_the_container(tmp_path, monkeypatch):
    machine = estimates.free_host_bytes()
    assert machine is None or 0 < machine < 1 << 50
    for name, text in (
        ("memory.max", "5000000"),
        ("memory.current", "4000000"),
        ("memory.stat", "anon 3000000\ninactive_file 700000\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(pinned, "_CONTAINERS", ((str(tmp_path), "memory.max", "memory.current", "inactive_file"),))
    assert estimates.free_host_bytes() == 1_700_000
    (tmp_path / "memory.max").write_text("max")
    assert estimates.free_host_bytes() != 1_700_000


# --- blocks that the device reads by itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["twin", pytest.param("kernel", marks=INTERPRETED)])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_fetched_blocks(way, head_dim, tokens):
    sources, start = [], 0
    for length in (256, 128, 192):
        sources.append((start, torch.randn(2, length, 3, head_dim)))
        start += length
    whole = torch.cat([x for _, x in sources], 1)[:, :tokens]
    count = -(-tokens // BLOCK)
    blocks = torch.stack([torch.randperm(count)[: max(1, count // 2)].sort().values for _ in range(6)])
    blocks = blocks.unflatten(0, (2, 3)).to(torch.int32)
    target = torch.full((2, 320, 3, head_dim), 7.0)[:, :tokens]
    places = places_of(sources, 64, torch.device("cpu"))
    (fetch if way == "twin" else lambda _, *rest: fetch_triton(*rest))(sources, places, 64, blocks, target)
    listed = (torch.arange(tokens) // BLOCK == blocks[..., None]).any(2).transpose(1, 2)[..., None]
    assert torch.equal(target, whole.where(listed, torch.tensor(7.0)))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def gpu_model(layers=6):
    """Wide enough that transfers count: 8,192 bytes of keys and values a token and layer."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}
    shape |= {"head_dim": 128, "num_hidden_layers": layers, "initializer_range": 0.02}
    geometry = {"chunk_size": 32768, "local_size": 8192, "original_max_position_embeddings": 32768}
    with torch.device("cuda"):
        return tiny_model(dtype=torch.bfloat16, dual_chunk_attention_config=geometry, **shape)


@pytest.mark.gpu
@torch.no_grad()
def test_a_long_prompt_on_the_gpu_bit_for_bit_in_less_memory(monkeypatch):
    monkeypatch.undo()
    model = gpu_model()
    ids, more = prompt(70_000, 1, "cuda"), prompt(24, 1, "cuda", seed=2)
    found, peaks = {}, {}
    for kind in ("device", "host"):
        with patched_qwen(model, prefill_chunk_size=8192, kv_cache=kind, sparse="off"):
            cache = LongContextCache(70_100, kv_cache=kind)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            some = [model(ids, logits_to_keep=4, **cache_argument(cache)).logits]
            some.append(logits(model, more, [1, 2, 6, *range(7, 24)], None, cache))
            peaks[kind] = torch.cuda.max_memory_allocated() - before
        found[kind] = torch.cat(some, 1)
        if kind == "host":
            assert all(piece.pages.pinned for layer in cache.layers for piece in layer.store._pieces)
            assert all(piece.tensors[0].is_pinned() for piece in cache.layers[0].store._pieces)
        del cache
    assert torch.equal(found["host"], found["device"])
    saved = 4 * 70_100 * 8192  # of six layers two are there
    assert peaks["host"] < peaks["device"] - 0.9 * saved


@pytest.mark.gpu
@torch.no_grad()
def test_sparse_prefill_and_sparse_decode_on_the_gpu_bit_for_bit(monkeypatch):
    monkeypatch.undo()
    model = gpu_model(3)
    ids, more = prompt(70_000, 1, "cuda"), prompt(24, 1, "cuda", seed=2)
    found = {}
    how = {"sparse": "block_scores", "density": 0.2, "sparse_decode": 0.1, "prefill_chunk_size": 8192}
    for kind in ("device", "host"):
        with patched_qwen(model, kv_cache=kind, **how):
            cache = LongContextCache(70_100, kv_cache=kind)
            some = [model(ids, logits_to_keep=4, **cache_argument(cache)).logits]
            found[kind] = torch.cat([*some, logits(model, more, [1, 2, 6, *range(7, 24)], None, cache)], 1)
    assert torch.equal(found["host"], found["device"])


@pytest.mark.gpu
@torch.no_grad()
def test_layers_come_up_while_others_compute(monkeypatch):
    """Between begin and end of a layer's transfer the device computes: together they take less than one by one."""
    monkeypatch.undo()
    staging, tokens = Staging(), 65_536
    stores = [HostStore(staging, tokens) for _ in range(4)]
    for store in stores:
        store.append(*torch.randn(2, 1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def computed():
        for _ in range(6):
            a @ a

    def timed(work):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def both():
        for store in stores:
            store.segment(0, tokens)
            computed()

    def transfers():
        for store in stores:
            store.segment(0, tokens)

    def overlap():
        work = (lambda: [computed() for _ in stores]), transfers, both
        alone, moved, together = (timed(one) for one in work)
        return together < 0.7 * (alone + moved) or together < 1.15 * max(alone, moved)

    both()
    assert any(overlap() for _ in range(5))  # what else the device does makes it longer, and never shorter


@pytest.mark.gpu
@torch.no_grad()
def test_pages_that_cannot_be_registered_are_used_all_the_same(monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setattr(pinned, "_PORTABLE", 1 << 20)  # no flag of CUDA
    model = patch_qwen(tiny_model(head_dim=16).to("cuda"), kv_cache="host")
    with caplog.at_level(logging.WARNING, logger="qwen_longctx.kv.host"):
        found = model.generate(prompt(200, 1, "cuda"), **GREEDY)
    assert len([one for one in caplog.records if "could not be registered" in one.message]) == 1
    with patched_qwen(model, kv_cache="device"):
        assert torch.equal(found, model.generate(prompt(200, 1, "cuda"), **GREEDY))
