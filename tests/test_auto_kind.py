"""kv_cache="auto": the first kind that fits is taken and told, from what is free before the first chunk."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch

from helpers import tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, memory, patch_qwen, patched_qwen, settings_of
from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import AUTO_KV_CACHES, KV_CACHES
from qwen_longctx.errors import DoesNotFit, InvalidValue
from qwen_longctx.patches import room
from qwen_longctx.patches.method import cache_argument, cache_of
from qwen_longctx.prefill import memory as rooms
from qwen_longctx.prefill import peak
from qwen_longctx.prefill.peak import Prefill

# bytes of a token in two layers with two heads of eight numbers, for keys and values
A_TOKEN = {"device": 2 * 2 * 2 * 8 * 4, "int8": 2 * (2 * 2 * (8 + 4) + 4)}
SETTINGS = {"chunk_size": 256, "local_size": 64, "prefill_chunk_size": 512, "sparse": "off", "cuda_graphs": False}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
LOGGER = "qwen_longctx.patches.room"


@pytest.fixture
def model():
    """A patched model, and how often its first layer ran."""
    return counted(patch_qwen(tiny_model(), **SETTINGS, kv_cache="auto"))


def counted(model):
    model.ran = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: model.ran.append(1))
    return model


def prompt(tokens, batch=1):
    torch.manual_seed(5)
    return torch.randint(1, 97, (batch, tokens))


def beside(model, kind, tokens, rows=1, **more):
    settings = replace(settings_of(model), kv_cache=kind)
    return Prefill(Shape.of(model.config), tokens, rows, torch.float32, settings, **more).peak().total


def needed(model, kind, tokens, rows=1, **more):
    """Bytes of a run of a kind, from its definition."""
    return A_TOKEN[kind] * tokens * rows + beside(model, kind, tokens, rows, **more)


def free(monkeypatch, size):
    monkeypatch.setattr(rooms, "free_bytes", lambda device: size)


def takes(monkeypatch, model, amounts, call):
    """`call`, which returns the kind of its cache, by what is free: device, one byte less int8, and then none."""
    for left, kind in ((amounts["device"], "device"), (amounts["device"] - 1, "int8"), (amounts["int8"], "int8")):
        free(monkeypatch, left)
        assert call() == kind
    del model.ran[:]
    free(monkeypatch, amounts["int8"] - 1)
    with pytest.raises(DoesNotFit, match="tokens would fit"):
        call()
    assert not model.ran


@torch.no_grad()
def generated(model, ids, **options):
    out = model.generate(ids, **{**GREEDY, "return_dict_in_generate": True, **options})
    return cache_of(out).kv_cache


@torch.no_grad()
def called(model, ids, **options):
    return cache_of(model(ids, **{"logits_to_keep": 1, **options})).kv_cache


def test_the_order_is_that_of_the_kinds_there_are():
    assert AUTO_KV_CACHES[:2] == ("device", "int8") and set(AUTO_KV_CACHES) <= set(KV_CACHES) - {"fp8"}


def test_generate_and_calls(monkeypatch, model):
    ids = prompt(1100)
    takes(monkeypatch, model, {k: needed(model, k, 1103) for k in A_TOKEN}, lambda: generated(model, ids))
    takes(monkeypatch, model, {k: needed(model, k, 1100) for k in A_TOKEN}, lambda: called(model, ids))
    logits = 1024 * 97 * 4  # of the earlier chunks, beside the last one
    amounts = {k: needed(model, k, 1100) + logits for k in A_TOKEN}
    takes(monkeypatch, model, amounts, lambda: called(model, ids, logits_to_keep=0))


def test_rows_beams_and_padding(monkeypatch, model):
    ids = prompt(1100, 2)
    amounts = {k: needed(model, k, 1103, 6) for k in A_TOKEN}
    takes(monkeypatch, model, amounts, lambda: generated(model, ids, num_beams=3))
    mask = torch.ones_like(ids)
    mask[0, :300] = 0
    amounts = {k: needed(model, k, 1103, 2, padded=True) for k in A_TOKEN}
    takes(monkeypatch, model, amounts, lambda: generated(model, ids, attention_mask=mask))


def test_the_tightest_device_decides(monkeypatch, model):
    one, two = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr(room, "_layers_of", lambda base: Counter({one: 1, two: 1}))
    monkeypatch.setattr(room, "rule_name", lambda *args: None)
    half = {k: A_TOKEN[k] * 1103 // 2 + beside(model, k, 1103) for k in A_TOKEN}
    for left, kind in (((half["device"], half["device"]), "device"), ((1 << 40, half["int8"]), "int8")):
        monkeypatch.setattr(rooms, "free_bytes", lambda device, left=left: left[device.index])
        assert generated(model, prompt(1100)) == kind
    monkeypatch.setattr(rooms, "free_bytes", lambda device: half["int8"] - 1 if device == two else 1 << 40)
    with pytest.raises(DoesNotFit, match="on cuda:1"):
        generated(model, prompt(1100))


def test_what_is_told(monkeypatch, model, caplog):
    ids = prompt(1100)
    amounts = {kind: needed(model, kind, 1103) for kind in A_TOKEN}
    gib = {kind: f"{size / rooms.GIB:.1f}" for kind, size in amounts.items()}
    for left, level, kind in ((1 << 40, logging.INFO, "device"), (amounts["int8"], logging.WARNING, "int8")):
        caplog.clear()
        free(monkeypatch, left)
        with caplog.at_level(logging.INFO, logger=LOGGER):
            generated(model, ids)
        (record,) = [one for one in caplog.records if one.name == LOGGER]
        said = record.getMessage()
        assert record.levelno == level and said.startswith(f'kv_cache="auto" is "{kind}" in this run: 1 x 1,103 tokens')
        assert f"need {gib['device']} GiB" in said and f"{left / rooms.GIB:.1f} GiB are free" in said
        assert said.endswith(f"of this kind {gib['int8']}") == (kind == "int8")


def test_tokens_are_those_of_the_kind(monkeypatch, model):
    ids = prompt(1100)
    free(monkeypatch, needed(model, "int8", 1150))
    found = model.generate(ids, **{**GREEDY, "max_new_tokens": 50})
    monkeypatch.undo()
    for kind in ("int8", "device"):
        with patched_qwen(model, **{**SETTINGS, "kv_cache": kind}):
            wanted = model.generate(ids, **{**GREEDY, "max_new_tokens": 50})
        assert torch.equal(found, wanted) == (kind == "int8")


# --- caches that are given ----------------------------------------------------------------------------------------


def test_a_cache_that_is_given_is_never_changed(monkeypatch, model):
    ids = prompt(1100)
    for kind in KV_CACHES:
        cache = LongContextCache(kv_cache=kind)
        assert generated(model, ids, **cache_argument(cache)) == kind == cache.kv_cache
    given = LongContextCache()
    free(monkeypatch, needed(model, "int8", 1103))
    with pytest.raises(DoesNotFit) as told:
        generated(model, ids, **cache_argument(given))
    assert "kv_cache=" not in str(told.value) and given.kv_cache == "device" and given.get_seq_length() == 0


def test_a_cache_of_kind_auto_is_decided_by_the_first_call(monkeypatch, model):
    """Whatever the settings say; it stays open where the call is refused, and is settled for good then."""
    ids = prompt(1100)
    with patched_qwen(model, **SETTINGS, kv_cache="device"):
        for call in (generated, called):
            cache = LongContextCache(1200, kv_cache="auto")
            free(monkeypatch, 1000)
            with pytest.raises(DoesNotFit):
                call(model, ids, **cache_argument(cache))
            assert cache.kv_cache == "auto"
            free(monkeypatch, needed(model, "int8", 1103))
            assert call(model, ids, **cache_argument(cache)) == "int8" == cache.kv_cache
            free(monkeypatch, 1 << 40)
            cache.reset()
            assert call(model, ids, **cache_argument(cache)) == "int8"
            assert cache.layers[0].store.buffers[0].shape[1] == 1200


def test_where_nothing_is_known_it_is_device(model):
    """On CPUs, in short calls, with gradients, and of a model that is not patched; copies and pickles stay open."""
    ids = prompt(1100)
    assert generated(model, ids) == called(model, ids) == "device"
    for make in (lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        cache = make(LongContextCache(kv_cache="auto"))
        assert cache.kv_cache == "auto"
        assert called(model, ids[:, :9], **cache_argument(cache)) == "device" == cache.kv_cache
    cache = LongContextCache(kv_cache="auto")
    model(ids[:, :9], **cache_argument(cache))  # with gradients
    assert cache.kv_cache == "device" and cache.layers[0].keys.requires_grad
    cache = LongContextCache(kv_cache="auto")
    with torch.no_grad():
        tiny_model()(ids[:, :9], **cache_argument(cache))
    assert cache.kv_cache == "device" and cache.get_seq_length() == 9


def test_without_a_cache(monkeypatch, model):
    with torch.no_grad(), patched_qwen(model, **{**SETTINGS, "prefill_chunk_size": 4096}, kv_cache="auto"):
        free(monkeypatch, needed(model, "device", 1024))
        assert model(prompt(1100)[:, :1024], use_cache=False, logits_to_keep=1).logits.shape == (1, 1, 97)


def test_saved_prefixes(monkeypatch, model, tmp_path):
    with pytest.raises(InvalidValue, match="empty"):
        LongContextCache(kv_cache="auto").save(tmp_path)
    free(monkeypatch, needed(model, "int8", 1100))
    with torch.no_grad():
        cache_of(model(prompt(1100), logits_to_keep=1)).save(tmp_path)
    assert LongContextCache.load(tmp_path, model).kv_cache == "int8"


# --- assisted decoding --------------------------------------------------------------------------------------------


def allocated(*caches):
    stores = [layer.store for cache in caches for layer in cache.layers]
    return sum(x.nbytes for store in stores for x in store.buffers or ())


def test_drafts_have_a_cache_too(monkeypatch):
    """Both caches and the larger of both peaks fit; what is free shrinks as caches take it."""
    monkeypatch.setattr(peak, "_WORKSPACE", 0)  # so that caches count beside the rest
    tokens, settings = 3008, {**SETTINGS, "prefill_chunk_size": 16, "kv_cache": "auto"}
    model = patch_qwen(tiny_model(), **settings)
    drafts = patch_qwen(tiny_model(initializer_range=0.3, num_hidden_layers=1), **settings)

    def stop(*arguments):
        raise InterruptedError

    drafts.model.layers[0].register_forward_pre_hook(stop)  # by then both kinds are decided
    caches: list[LongContextCache] = []
    begin = LongContextCache.__init__

    def noted(self, *arguments, **more):
        begin(self, *arguments, **more)
        caches.append(self)

    monkeypatch.setattr(LongContextCache, "__init__", noted)
    both = {kind: A_TOKEN[kind] * tokens * 3 // 2 for kind in A_TOKEN}
    for left, kinds in (
        (both["device"] + beside(model, "int8", tokens), ["device", "device"]),
        (both["device"] + beside(model, "device", tokens) - 1, ["int8", None]),
        (both["int8"] + beside(model, "int8", tokens), ["int8", "int8"]),
    ):
        del caches[:]
        monkeypatch.setattr(rooms, "free_bytes", lambda device, left=left: left - allocated(*caches))
        with pytest.raises(InterruptedError):
            model.generate(prompt(tokens - 8), assistant_model=drafts, **{**GREEDY, "max_new_tokens": 8})
        taken = [cache.kv_cache for cache in caches]
        assert all(kind in (None, found) for found, kind in zip(taken, kinds, strict=True))
        assert caches[0].capacity == tokens and allocated(caches[0]) == A_TOKEN[taken[0]] * tokens
        assert (A_TOKEN[taken[0]] + A_TOKEN[taken[1]] // 2) * tokens + beside(model, taken[0], tokens) <= left


def test_drafts_in_8_bits(monkeypatch, model):
    drafts = patch_qwen(tiny_model(initializer_range=0.3, num_hidden_layers=1), **SETTINGS, kv_cache="auto")
    ids = prompt(1100)
    with patched_qwen(model, **SETTINGS, kv_cache="int8"):
        wanted = model.generate(ids, **GREEDY)
    free(monkeypatch, needed(model, "int8", 1103) + A_TOKEN["int8"] * 1103 // 2)
    assert torch.equal(model.generate(ids, assistant_model=drafts, **GREEDY), wanted)


# --- refusals and plans -------------------------------------------------------------------------------------------


def test_a_refusal_names_the_first_setting_that_would_fit(monkeypatch):
    model = counted(patch_qwen(tiny_model(), **{**SETTINGS, "prefill_chunk_size": 32768}))
    ids = prompt(2200)

    def refused(left, **options):
        del model.ran[:]
        free(monkeypatch, left)
        with pytest.raises(DoesNotFit) as told:
            generated(model, ids, **options)
        said = str(told.value)
        assert not model.ran
        return said.split("All would with ")[1].split(". Shorten")[0] if "All would with" in said else None

    def amount(kind, **changed):
        settings = replace(settings_of(model), kv_cache=kind, **changed)
        return A_TOKEN[kind] * 2203 + Prefill(Shape.of(model.config), 2203, 1, torch.float32, settings).peak().total

    said = refused(amount("device") - 1)
    assert said == "patch_qwen(model, prefill_chunk_size=2048): smaller prefill chunks"
    said = refused(amount("device", prefill_chunk_size=1024) - 1)
    size = 2048
    while amount("int8", prefill_chunk_size=size) > amount("device", prefill_chunk_size=1024) - 1:
        size //= 2
    assert said.startswith(f"patch_qwen(model, kv_cache='int8', prefill_chunk_size={size}): keys and values in 8 bits")
    assert refused(1000) is None
    settings = eval(f"dict({said.split('(model, ')[1].split(')')[0]})")
    with patched_qwen(model, **{**SETTINGS, "prefill_chunk_size": 32768, **settings}):
        free(monkeypatch, amount("device", prefill_chunk_size=1024) - 1)
        assert generated(model, ids) == "int8"
    assert refused(amount("device", prefill_chunk_size=1024) - 1, **cache_argument(LongContextCache())) is None


def test_no_chunks_are_advised_where_the_prompt_passes_whole(monkeypatch):
    model = patch_qwen(tiny_model(), **SETTINGS)
    free(monkeypatch, needed(model, "int8", 1100))
    with torch.no_grad(), pytest.raises(DoesNotFit) as told:
        model(prompt(1100), output_hidden_states=True)
    assert "prefill_chunk_size=" not in str(told.value)


def test_plans():
    for gpu, kind in (("80GB", "device"), ("60GB", "int8"), ("24GB", AUTO_KV_CACHES[-1]), (None, "device")):
        found = memory.plan("qwen2.5-7b-1m", "1M", gpu, kv_cache="auto")
        assert found.settings == {"kv_cache": kind}
        assert found.memory == memory.plan("qwen2.5-7b-1m", "1M", kv_cache=kind).memory
        told = f"keys and values {'on the host' if kind == 'host' else f'in {kind}'}"
        assert (told in str(found)) == (kind != "device")


def test_plans_suggest_8_bits_of_both():
    """Keys and values, then linear layers, then both; quantised and other dtypes of weights have no linear layers."""
    found = memory.plan("qwen2.5-7b-1m", "1M", "48GB")
    assert found.suggestions[0].line == "patch_qwen(model, kv_cache='int8', linear='fp8')"
    assert memory.plan("qwen2.5-7b-1m", "1M", "48GB", kv_cache="int8", linear="fp8").fits
    only = memory.plan("qwen2.5-7b", 20_000, "13GB").suggestions[0]
    assert only.line == "patch_qwen(model, linear='fp8')" and only.meaning == "linear layers in 8 bits"
    for other in ({"dtype": torch.float16}, {"linear": "fp8"}):
        assert all(one.line[:2] == "--" for one in memory.plan("qwen2.5-7b", 20_000, "8GB", **other).suggestions)


def test_the_setting():
    assert LongContextConfig(64, 16, 64, kv_cache="auto").kv_cache == "auto"
    for wrong in ("int4", None, 8):
        with pytest.raises(InvalidValue, match="kv_cache must be one of auto, device, fp8, int8"):
            LongContextConfig(64, 16, 64, kv_cache=wrong)
        with pytest.raises(InvalidValue, match="kv_cache must be one of auto, device, fp8, int8"):
            LongContextCache(kv_cache=wrong)
