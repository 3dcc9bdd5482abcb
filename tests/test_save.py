"""Saved prefixes: what is loaded is what was saved, other models and damage are refused, no earlier prefix is lost."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from helpers import FAMILIES, kill_when_written, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen, settings_of, unpatch_qwen
from qwen_longctx.errors import DoesNotFit, InvalidType, InvalidValue, MissingFile, PatchConflict, Unsupported
from qwen_longctx.geometry.layout import Origin
from qwen_longctx.kv import saved, store
from qwen_longctx.kv.fingerprint import base_of
from qwen_longctx.kv.sequence import transaction
from qwen_longctx.patches.method import cache_argument

HERE = Path(__file__).parent
ON = {"sparse": "block_scores", "sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(1, 97, (batch, tokens))


@torch.no_grad()
def filled(model, tokens=150, batch=1, kv_cache="device", **arguments) -> LongContextCache:
    cache = LongContextCache(kv_cache=kv_cache)
    model(prompt(tokens, batch), **cache_argument(cache), **arguments)
    return cache


@torch.no_grad()
def following(model, cache, tokens=7, **arguments) -> torch.Tensor:
    """Logits of some tokens behind a cache, which is left as it was."""
    held = cache.get_seq_length()
    keys = cache.layers[0].store.buffers[0]
    ids = prompt(tokens, len(keys), seed=2).to(keys.device)  # an offloaded model says "meta" of itself
    found = model(ids, **cache_argument(cache), **arguments).logits
    cache.crop(held)
    return found


def same(first: LongContextCache, second: LongContextCache) -> bool:
    return len(first.layers) == len(second.layers) and all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
        for x, y in zip(first.layers, second.layers, strict=True)
    )


@pytest.fixture(scope="module")
def model():
    return patch_qwen(tiny_model(), prefill_chunk_size=40)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prefix"


# --- what is loaded is what was saved -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_many_questions_get_the_tokens_of_one_shot(family, dtype, folder, monkeypatch):
    """Without a copy of the prefix: no buffer is taken, grown or moved while questions are asked."""
    ours = patch_qwen(tiny_model(family, dtype), prefill_chunk_size=40)
    cache = filled(ours)
    cache.save(folder)
    loaded = LongContextCache.load(folder, ours)
    assert same(cache, loaded) and loaded.layers[0].keys.dtype == dtype
    places = [b.data_ptr() for layer in loaded.layers for b in layer.store.buffers]
    with monkeypatch.context() as patch:
        for name in ("_grow", "allocate"):
            patch.setattr(store.Store, name, lambda *_: pytest.fail("the prefix was copied"))
        answers = []
        for question in range(3):
            ids = torch.cat((prompt(150), prompt(9 + question, seed=question + 5)), 1)
            answers.append((ids, ours.generate(ids, **cache_argument(loaded), **GREEDY)))
            loaded.crop(150)
    assert places == [b.data_ptr() for layer in loaded.layers for b in layer.store.buffers] and same(cache, loaded)
    for ids, answer in answers:
        expected = ours.generate(ids, **cache_argument(copy.deepcopy(cache)), **GREEDY)
        assert torch.equal(answer, expected)
        if dtype == torch.float32:
            assert torch.equal(answer, ours.generate(ids, **GREEDY))


@torch.no_grad()
def test_rows_of_different_lengths(model, folder):
    ids, mask = prompt(150, 3), torch.ones(3, 150, dtype=torch.long)
    mask[0, :70], mask[2, :149] = 0, 0
    cache = LongContextCache()
    model(ids, attention_mask=mask, **cache_argument(cache))
    cache.reorder_cache(torch.tensor([1, 0, 2, 2]))
    cache.save(folder)
    loaded = LongContextCache.load(folder, model)
    longer = torch.cat((mask[[1, 0, 2, 2]], torch.ones(4, 7, dtype=torch.long)), 1)
    found = following(model, loaded, attention_mask=longer)
    assert torch.equal(found, following(model, cache, attention_mask=longer))
    alone = model(torch.cat((ids[:1, 70:], prompt(7, 4, seed=2)[1:2]), 1)).logits[:, -7:]
    torch.testing.assert_close(found[1:2], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidValue, match="attention_mask"):
        following(model, loaded, attention_mask=torch.ones_like(longer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_after_sparse_prefill_the_record_is_kept(dtype, folder):
    long = {"dual_chunk_attention_config": {"chunk_size": 256, "local_size": 64}, "max_position_embeddings": 256}
    ours = patch_qwen(tiny_model(dtype=dtype, **long), **ON, density=0.4)
    cache = filled(ours, 700, 2)
    assert cache.report()["density"] < 1 and cache.report()["layers"]
    cache.save(folder)
    loaded = LongContextCache.load(folder, ours)
    assert loaded.report() == cache.report() and same(loaded, cache)
    budgets = [one.sparse_state.budgets for one in (cache, loaded)]
    assert budgets[0].keys() == budgets[1].keys() and budgets[0]
    assert all(torch.equal(budgets[0][key], budgets[1][key]) for key in budgets[0])
    assert torch.equal(following(ours, loaded, 300), following(ours, cache, 300))
    assert [line["density"] for line in loaded.report()["layers"]] == [
        line["density"] for line in cache.report()["layers"]
    ]
    for other in ({**ON, "density": 0.5}, {**ON, "density": 0.4, "prefill_chunk_size": 160}):
        name = next(name for name in other if {**ON, "density": 0.4}[name] != other[name])
        with patched_qwen(ours, **other), pytest.raises(PatchConflict, match=f"{name} is {other[name]} and was"):
            LongContextCache.load(folder, ours)
    filled(ours, 180, 2).save(folder)  # dense: what sparse prefill would have kept does not matter
    with patched_qwen(ours, sparse="off", prefill_chunk_size=160):
        assert LongContextCache.load(folder, ours).get_seq_length() == 180


@torch.no_grad()
def test_offloaded_and_dispatched_models(folder):
    """Weights that accelerate has put aside are those that the prefix was saved by, or are not."""
    accelerate = pytest.importorskip("accelerate")
    plain = tiny_model()
    wanted = filled(patch_qwen(copy.deepcopy(plain)))
    wanted.save(folder)
    offloaded = copy.deepcopy(plain)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    on_disk = copy.deepcopy(plain)
    accelerate.disk_offload(on_disk, folder.with_name("weights"), torch.device("cpu"), offload_buffers=True)
    assert next(on_disk.parameters()).is_meta
    blocks = {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")}
    device_map = {**blocks, "lm_head": "cpu"}
    mapped = accelerate.dispatch_model(copy.deepcopy(plain), device_map, main_device="cpu", force_hooks=True)
    for other in (offloaded, on_disk, mapped):
        patch_qwen(other)
        loaded = LongContextCache.load(folder, other)
        assert loaded.layers[0].keys.device.type == "cpu" and same(loaded, wanted)
        torch.testing.assert_close(following(other, loaded), following(patch_qwen(copy.deepcopy(plain)), wanted))
        filled(other).save(folder.with_name("again"))
        assert same(LongContextCache.load(folder.with_name("again"), patch_qwen(copy.deepcopy(plain))), wanted)
    changed = copy.deepcopy(plain)
    changed.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    accelerate.cpu_offload(changed, execution_device=torch.device("cpu"))
    with pytest.raises(PatchConflict, match=r"its weights are others \(layers.1.mlp.down_proj.weight\)"):
        LongContextCache.load(folder, patch_qwen(changed))


@pytest.mark.gpu
@torch.no_grad()
def test_from_the_cpu_to_a_gpu_and_back(model, folder):
    wanted = filled(model)
    wanted.save(folder)
    there = patch_qwen(tiny_model().cuda(), prefill_chunk_size=40)
    loaded = LongContextCache.load(folder, there)
    assert all(layer.keys.is_cuda and layer.values.is_cuda for layer in loaded.layers)
    loaded.save(folder)
    assert same(LongContextCache.load(folder, model), wanted)


def test_the_models_of_one_base_share_a_prefix(model, folder):
    """The head makes no keys."""
    filled(model.model).save(folder)
    assert same(LongContextCache.load(folder, model), filled(model))


@torch.no_grad()
def test_a_loaded_cache_is_a_cache(model, folder):
    cache = filled(model)
    cache.save(folder)
    loaded = LongContextCache.load(folder, model, capacity=20_000)
    assert isinstance(loaded, LongContextCache) and loaded.layers[0].store.buffers[0].shape[1] == 20_000
    assert LongContextCache.load(folder, model).layers[1].store.buffers[1].shape[1] == 150 + store.STEP
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(loaded),
        pickle.loads(pickle.dumps(loaded)),
        torch.load(file, weights_only=False),
    ):
        assert same(twin, cache) and torch.equal(following(model, twin), following(model, cache))
    copied, pickled = folder.with_name("copied"), pickle.loads(pickle.dumps(loaded))
    copy.deepcopy(loaded).save(copied)
    assert same(LongContextCache.load(copied, model), cache)
    with pytest.raises(PatchConflict, match="the model that filled this cache is gone"):
        pickled.save(copied)
    loaded.crop(-30)
    assert loaded.get_seq_length() == 120
    loaded.save(folder)
    shorter = LongContextCache.load(folder, model)
    wanted = model(torch.cat((prompt(120), prompt(7, seed=2)), 1)).logits[:, 120:]
    torch.testing.assert_close(following(model, shorter), wanted, atol=1e-4, rtol=1e-4)
    shorter.reset()
    with pytest.raises(InvalidValue, match="the cache is empty"):
        shorter.save(folder)


@torch.no_grad()
def test_under_other_modes_of_torch(model, folder):
    """Loaded in inference mode it is written to outside of it, in its own buffers; the default device is no matter."""
    cache = filled(model)
    with torch.inference_mode(), torch.device("meta"):
        cache.save(folder)
        loaded = LongContextCache.load(folder, model)
    places = [b.data_ptr() for layer in loaded.layers for b in layer.store.buffers]
    assert torch.equal(following(model, loaded), following(model, cache))
    assert places == [b.data_ptr() for layer in loaded.layers for b in layer.store.buffers]
    with torch.enable_grad():
        trained = LongContextCache()
        model(prompt(60), **cache_argument(trained))
        assert trained.layers[0].keys.requires_grad
        trained.save(folder)
        assert not LongContextCache.load(folder, model).layers[0].keys.requires_grad


def test_the_file_is_plain_safetensors(model, folder):
    cache = filled(model)
    cache.save(folder)
    assert os.listdir(folder) == ["prefix.safetensors"]
    with safe_open(folder / "prefix.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("layers.1.values").transpose(1, 2), cache.layers[1].values)


# --- sequences of operations against lists of tensors -------------------------------------------------------------


class Plain:
    """Keys and values of every layer as plain tensors (batch, tokens, heads, head_dim), and a number for every row."""

    def __init__(self, batch: int) -> None:
        self.held = [[torch.empty(batch, 0, 2, 8) for _ in range(2)] for _ in range(2)]
        self.origins = tuple(Origin(row) for row in range(batch))

    def change(self, function) -> None:
        self.held = [[function(tensor) for tensor in layer] for layer in self.held]

    @property
    def length(self) -> int:
        return self.held[0][0].shape[1]


def append(cache: LongContextCache, plain: Plain, source: random.Random, ours) -> None:
    tokens = source.choice([1, 1, 5, 40])
    fresh = [torch.randn(2, len(plain.origins), tokens, 2, 8) for _ in range(2)]
    with transaction(cache, settings_of(ours), plain.origins, base_of(ours)):
        for number, (k, v) in enumerate(fresh):
            cache.append(k, v, number)
    plain.held = [
        [torch.cat((x, n), 1) for x, n in zip(*pair, strict=True)] for pair in zip(plain.held, fresh, strict=True)
    ]


def crop(cache: LongContextCache, plain: Plain, source: random.Random, ours) -> None:
    left = source.randint(0, plain.length)
    if left:
        cache.crop(left)
    else:
        cache.crop(-plain.length)
    plain.change(lambda x: x[:, :left])


def reorder(cache: LongContextCache, plain: Plain, source: random.Random, ours) -> None:
    if not plain.length:  # an emptied cache takes other rows
        return
    batch = len(plain.origins)
    rows = [source.randrange(batch) for _ in range(source.randint(1, 4))]
    cache.reorder_cache(torch.tensor(rows))
    plain.change(lambda x: x[rows])
    plain.origins = tuple(plain.origins[row] for row in rows)


@pytest.mark.parametrize("seed", range(200))
@torch.no_grad()
def test_random_sequences_against_plain_tensors(seed, model, folder):
    """Appended, cropped, reordered, saved and loaded in any order, a cache holds what a list of tensors does."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    cache, plain = LongContextCache(source.choice([0, 30])), Plain(source.randint(1, 3))
    on_disk: Plain | None = None
    for _ in range(12):
        step = source.choice([append, append, append, crop, reorder, "save", "save", "load"])
        if callable(step):
            step(cache, plain, source, model)
        elif step == "save" and plain.length:
            cache.save(folder)
            on_disk = copy.deepcopy(plain)
        elif step == "save":
            with pytest.raises(InvalidValue, match="the cache is empty"):
                cache.save(folder)
        elif on_disk is None:
            with pytest.raises(MissingFile):
                LongContextCache.load(folder, model)
        else:
            cache, plain = LongContextCache.load(folder, model, source.choice([0, 500])), copy.deepcopy(on_disk)
        assert cache.get_seq_length() == plain.length
        if plain.length:
            assert cache.layers[0].origins == plain.origins
            for layer, (k, v) in zip(cache.layers, plain.held, strict=True):
                assert torch.equal(layer.keys, k.transpose(1, 2)) and torch.equal(layer.values, v.transpose(1, 2))


# --- what is not saved --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_not_saved(model, folder):
    with pytest.raises(InvalidValue, match="the cache is empty"):
        LongContextCache().save(folder)
    cut = filled(model)
    cut.layers[1].truncate(100)
    with pytest.raises(PatchConflict, match="interrupted and cannot be saved .its layers hold from 100 to 150 tokens"):
        cut.save(folder)
    mixed = LongContextCache()
    stock = tiny_model()
    stock(prompt(20), **cache_argument(mixed))
    with pytest.raises(PatchConflict, match="holds 20 tokens, of which a patched model wrote 0"):
        mixed.save(folder)
    patch_qwen(stock)(prompt(5), **cache_argument(mixed))
    with pytest.raises(PatchConflict, match="did not write the first 20 tokens"):
        mixed.save(folder)
    foreign = LongContextCache()
    foreign.layers.append(DynamicLayer())
    with pytest.raises(Unsupported, match="only layers of LongContextCache"):
        foreign.save(folder)
    gone = patch_qwen(tiny_model())
    cache = filled(gone)
    del gone
    gc.collect()
    with pytest.raises(PatchConflict, match="the model that filled this cache is gone"):
        cache.save(folder)
    assert not hasattr(DynamicCache(), "save")
    assert not folder.exists()


@torch.no_grad()
def test_a_call_in_progress_is_not_saved(model, folder):
    """From a hook within a forward, and between the steps of beam search."""
    cache, told = LongContextCache(), []

    def save(*_):
        with pytest.raises(PatchConflict, match="a call is filling this cache") as error:
            cache.save(folder)
        told.append(error)

    hook = model.model.layers[1].register_forward_hook(save)
    model(prompt(30), **cache_argument(cache))
    hook.remove()
    assert len(told) == 1

    class Beams:
        def __call__(self, ids, scores):
            save()
            return scores

    cache.reset()
    model.generate(prompt(40), num_beams=3, **cache_argument(cache), **GREEDY, logits_processor=[Beams()])
    assert len(told) > 5 and not folder.exists()
    rows = LongContextCache()
    model.generate(prompt(40, 2), num_beams=3, **cache_argument(rows), **GREEDY)
    rows.save(folder)  # the beams of a search that has ended are rows like others
    assert same(LongContextCache.load(folder, model), rows)


@torch.no_grad()
def test_tokens_of_two_settings_or_models_are_not_saved_together(folder):
    ours = tiny_model()
    cache = LongContextCache()
    with patched_qwen(ours):
        model_cache = filled(ours, 60)
        ours(prompt(60), **cache_argument(cache))
    with patched_qwen(ours, attention_temperature=False):
        ours(prompt(9), **cache_argument(cache))
        with pytest.raises(PatchConflict, match="number 60 on do not .*temperature is False and was 'pos"):
            cache.save(folder)
        cache.crop(60)
        cache.save(folder)  # under the settings that filled it, not those of now
        with pytest.raises(PatchConflict, match="attention_temperature is False and was 'position'"):
            LongContextCache.load(folder, ours)
    with patched_qwen(ours, kernel="reference", mlp_chunk_size=7, prefill_chunk_size=9):
        assert same(LongContextCache.load(folder, ours), model_cache)
    other = patch_qwen(tiny_model())
    other(prompt(5), **cache_argument(cache))
    with pytest.raises(PatchConflict, match="another model wrote them"):
        cache.save(folder)


# --- what is not loaded -------------------------------------------------------------------------------------------

ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
OTHER_MODELS = [
    (dict(dtype=torch.bfloat16), "its dtype is torch.bfloat16 and was torch.float32"),
    (dict(family="qwen3"), "model_type is 'qwen3' and was 'qwen2'"),
    (dict(num_hidden_layers=3), "num_hidden_layers is 3 and was 2"),
    (dict(num_key_value_heads=4), "num_key_value_heads is 4 and was 2"),
    (dict(intermediate_size=48), "intermediate_size is 48 and was 64"),
    (dict(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05 and was 1e-06"),
    (dict(rope=ROPE), "rope_type is 'linear' and was 'default'"),
    (dict(rope={"rope_type": "default", "rope_theta": 500000.0}), "its rotary frequencies are others"),
    (dict(rope=ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 32}), "rope_type is 'yarn'"),
    (dict(initializer_range=0.1), r"its weights are others \(embed_tokens.weight and \d+ more\)"),
]


@pytest.mark.parametrize("other, said", OTHER_MODELS, ids=[said for _, said in OTHER_MODELS])
def test_another_model_is_refused(other, said, model, folder):
    filled(model).save(folder)
    with pytest.raises(PatchConflict, match=f"saved by another model than this one: .*{said}"):
        LongContextCache.load(folder, patch_qwen(tiny_model(**other)))


@torch.no_grad()
def test_other_weights_of_the_same_shape_are_refused(model, folder):
    """Every weight counts, one at a time."""
    filled(model).save(folder)
    for name, parameter in model.model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.01)
        with pytest.raises(PatchConflict, match=rf"its weights are others \({name}\)"):
            LongContextCache.load(folder, model)
        parameter.copy_(before)
    assert LongContextCache.load(folder, model)


@torch.no_grad()
def test_quantised_weights_and_compiled_layers(folder):
    """Quantised weights may be buffers; a layer in a wrapper of torch.compile is the same layer."""
    ours = patch_qwen(tiny_model())
    ours.model.layers[1].mlp.register_buffer("qweight", torch.arange(100, dtype=torch.int32))
    cache = filled(ours)
    cache.save(folder)
    ours.model.layers[0].mlp = torch.compile(ours.model.layers[0].mlp)
    assert same(LongContextCache.load(folder, ours), cache)
    ours.model.layers[1].mlp.qweight += 1
    with pytest.raises(PatchConflict, match=r"its weights are others \(layers.1.mlp.qweight\)"):
        LongContextCache.load(folder, ours)


def test_quantised_models_of_torchao(folder):
    torchao = pytest.importorskip("torchao.quantization")
    make = getattr(torchao, "Int8WeightOnlyConfig", None) or torchao.int8_weight_only

    def quantised(**config):
        ours = tiny_model(**config)
        torchao.quantize_(ours, make())
        return patch_qwen(ours)

    first = quantised()
    cache = filled(first)
    cache.save(folder)
    assert same(LongContextCache.load(folder, quantised()), cache)
    for other in (patch_qwen(tiny_model()), quantised(initializer_range=0.1)):
        with pytest.raises(PatchConflict, match="its weights are others"):
            LongContextCache.load(folder, other)


def test_adapters_are_told_apart(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = patch_qwen(peft.get_peft_model(tiny_model(), config).eval())
    cache = filled(wrapped)
    cache.save(folder)
    assert same(LongContextCache.load(folder, wrapped), cache)
    with wrapped.disable_adapter(), pytest.raises(PatchConflict, match="what its adapters do is"):
        LongContextCache.load(folder, wrapped)
    with pytest.raises(PatchConflict, match="saved by another model"):
        LongContextCache.load(folder, patch_qwen(tiny_model()))


SETTINGS = [
    ({"chunk_size": 72, "local_size": 24}, "chunk_size is 72 and was 64; local_size is 24 and was 16"),
    ({"local_size": 8}, "local_size is 8 and was 16"),
    ({"original_max_position_embeddings": 32}, "original_max_position_embeddings is 32 and was 64"),
    ({"attention_temperature": True}, "attention_temperature is True and was 'position'"),
]


@pytest.mark.parametrize("other, said", SETTINGS, ids=[said for _, said in SETTINGS])
def test_other_settings_are_refused(other, said, folder):
    ours = tiny_model()
    with patched_qwen(ours):
        filled(ours).save(folder)
    with patched_qwen(ours, **other), pytest.raises(PatchConflict, match=said):
        LongContextCache.load(folder, ours)


def test_settings_of_a_model():
    ours = tiny_model()
    assert settings_of(ours) is None
    with patched_qwen(ours, prefill_chunk_size=9):
        assert settings_of(ours).prefill_chunk_size == settings_of(ours.model).prefill_chunk_size == 9
    assert settings_of(ours) is None
    with patched_qwen(prefill_chunk_size=8):
        assert settings_of(ours).prefill_chunk_size == 8
        with patched_qwen(ours, prefill_chunk_size=7):
            assert settings_of(ours).prefill_chunk_size == 7
    for wrong in (torch.nn.Linear(2, 2), None, "model"):
        with pytest.raises(InvalidType):
            settings_of(wrong)


def test_what_no_prefix_is_loaded_into(model, folder):
    filled(model).save(folder)
    with pytest.raises(PatchConflict, match="the model is not patched"):
        LongContextCache.load(folder, tiny_model())
    for wrong in (torch.nn.Linear(2, 2), None):
        with pytest.raises(InvalidType):
            LongContextCache.load(folder, wrong)
    for capacity, error in ((-1, InvalidValue), ("9", InvalidType), (1 << 50, InvalidValue)):
        with pytest.raises(error, match="capacity must"):
            LongContextCache.load(folder, model, capacity)


def test_tensor_parallel_models_are_refused(folder):
    ours = patch_qwen(tiny_model())
    cache = filled(ours)
    for layer in ours.model.layers:
        layer.self_attn.q_proj.out_features //= 2
    for call in (lambda: cache.save(folder), lambda: LongContextCache.load(folder, ours)):
        filled(patch_qwen(tiny_model())).save(folder) if not folder.exists() else None
        with pytest.raises(Unsupported, match="tensor parallelism"):
            call()


def test_memory_that_is_not_there(model, folder, monkeypatch):
    filled(model).save(folder)

    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(store.Store, "allocate", full)
    with pytest.raises(DoesNotFit, match=r"does not fit on cpu: keys and values of a layer take 19,200 bytes"):
        LongContextCache.load(folder, model)


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_cut_file_is_refused(model, folder):
    filled(model).save(folder)
    path = folder / "prefix.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 9, 100, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidValue, match="is damaged or no safetensors file"):
            LongContextCache.load(folder, model)
    path.write_bytes(whole + b"x")
    with pytest.raises(InvalidValue, match="is damaged"):
        LongContextCache.load(folder, model)


def test_a_wrong_bit_anywhere_is_refused(model, folder):
    filled(model).save(folder)
    path, source = folder / "prefix.safetensors", random.Random(0)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    text = len(whole[: 8 + size].rstrip())  # what follows is blank
    places = [*range(0, 8), *(source.randrange(8, text) for _ in range(150))]
    places += [source.randrange(8 + size, len(whole)) for _ in range(60)] + [8 + size, len(whole) - 1]
    for place in places:
        wrong = bytearray(whole)
        wrong[place] ^= 1 << source.randrange(8)
        path.write_bytes(wrong)
        with pytest.raises((InvalidValue, MissingFile)):
            LongContextCache.load(folder, model)
    path.write_bytes(whole)
    assert LongContextCache.load(folder, model)


def test_every_tensor_has_its_checksum(model, folder):
    cache = filled(model)
    cache.save(folder)
    path = folder / "prefix.safetensors"
    whole = path.read_bytes()
    for number in range(2):
        for name in ("keys", "values"):
            content = getattr(cache.layers[number], name).transpose(1, 2).contiguous().numpy().tobytes()
            path.write_bytes(whole.replace(content, content[4:] + content[:4]))
            with pytest.raises(InvalidValue, match=rf"layers.{number}.{name} has the checksum [0-9a-f]{{8}} and was"):
                LongContextCache.load(folder, model)


def test_files_of_other_origin_are_refused(model, folder):
    filled(model).save(folder)
    path = folder / "prefix.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def rewrite(metadata):
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    about = json.dumps({**json.loads(header["__metadata__"]["qwen_longctx_prefix"]), "version": 9})
    checked = {"qwen_longctx_prefix": about, "qwen_longctx_prefix_crc32": f"{zlib.crc32(about.encode()):08x}"}
    rewrite(checked)
    with pytest.raises(InvalidValue, match="has version 9 of the format, this release knows 1 and 2:"):
        LongContextCache.load(folder, model)
    rewrite({**checked, "qwen_longctx_prefix_crc32": "00000000"})
    with pytest.raises(InvalidValue, match="its metadata do not have their checksum"):
        LongContextCache.load(folder, model)
    rewrite({"format": "pt"})
    with pytest.raises(InvalidValue, match="holds no saved prefix"):
        LongContextCache.load(folder, model)
    with pytest.raises(InvalidValue, match="it holds 'prefix.safetensors' and no saved prefix"):
        filled(model).save(folder)


# --- folders ------------------------------------------------------------------------------------------------------


def test_folders_by_any_name(model, tmp_path, monkeypatch):
    cache = filled(model)
    monkeypatch.chdir(tmp_path)
    cache.save("a/b")
    (tmp_path / "link").symlink_to("a/b")
    shorter = filled(model, 99)
    shorter.save(tmp_path / "link")
    assert same(LongContextCache.load("a/b", model), shorter) and (tmp_path / "link").is_symlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    cache.save(str(empty))
    assert same(LongContextCache.load(empty, model), cache)
    (empty / "notes.txt").write_text("of the user")  # beside a prefix of ours
    shorter.save(empty)
    assert same(LongContextCache.load(empty, model), shorter) and (empty / "notes.txt").exists()


def test_folders_that_are_none(model, tmp_path):
    cache = filled(model)
    (tmp_path / "file").write_text("of the user")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("of the user")
    (tmp_path / "round").symlink_to("round")
    wrong = [
        (tmp_path / "file", InvalidValue, "it is a file"),
        (tmp_path / "file" / "below", InvalidValue, "cannot"),
        (tmp_path / "work", InvalidValue, "it holds 'thesis.tex' and no saved prefix"),
        (tmp_path / "round", InvalidValue, "cannot|loop"),
        ("", InvalidValue, "is empty"),
        ("a\0b", InvalidValue, "null"),
        ("x" * 300, InvalidValue, "too long"),
        (b"bytes", InvalidType, "must be a path"),
        (None, InvalidType, "must be a path"),
        (7, InvalidType, "must be a path"),
    ]
    for place, error, said in wrong:
        with pytest.raises(error, match=said):
            cache.save(place)
        with pytest.raises((InvalidValue, InvalidType, MissingFile)):
            LongContextCache.load(place, model)
    assert sorted(os.listdir(tmp_path)) == ["file", "round", "work"]
    assert os.listdir(tmp_path / "work") == ["thesis.tex"] and (tmp_path / "file").read_text() == "of the user"
    with pytest.raises(MissingFile, match="there is no saved prefix in"):
        LongContextCache.load(tmp_path / "none", model)
    with pytest.raises(InvalidValue, match="is a file: name the folder"):
        LongContextCache.load(tmp_path / "file", model)


def test_a_file_replaced_while_it_is_read(model, folder, monkeypatch):
    """Whoever has opened the earlier prefix reads that to its end."""
    first, second = filled(model), filled(model, 99)
    first.save(folder)
    check = saved._check

    def replaced(*arguments):
        check(*arguments)
        second.save(folder)

    monkeypatch.setattr(saved, "_check", replaced)
    assert same(LongContextCache.load(folder, model), first)
    monkeypatch.undo()
    kept = LongContextCache.load(folder, model)
    first.save(folder)
    assert same(kept, second) and same(LongContextCache.load(folder, model), first)
    shutil.rmtree(folder)
    assert torch.equal(following(model, kept), following(model, second))


def test_threads_save_and_load_at_once(model, folder):
    caches = [filled(model, 90 + n) for n in range(4)]
    caches[0].save(folder)
    errors = []

    def work(cache):
        try:
            for _ in range(5):
                cache.save(folder)
                loaded = LongContextCache.load(folder, model)
                assert same(loaded, caches[loaded.get_seq_length() - 90])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(folder) == ["prefix.safetensors"]


# --- no earlier prefix is lost ------------------------------------------------------------------------------------


def test_no_room_on_the_disk(model, folder, monkeypatch):
    before = filled(model, 99)
    before.save(folder)
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(saved.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(InvalidValue, match=r"takes [\d,]+ bytes and 1,000 are free"):
            filled(model).save(folder)
    # what the system says in the middle of the file is told, too
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 9000, 30000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InvalidValue, match="cannot write to .*: File too large. Free space there"):
                filled(model).save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(folder) == ["prefix.safetensors"]
    assert same(LongContextCache.load(folder, model), before)


def test_an_error_in_the_middle_of_a_save(model, folder, monkeypatch):
    before = filled(model, 99)
    before.save(folder)
    for error in (KeyboardInterrupt, RuntimeError):
        calls = []

        def pieces(parts, calls=calls, error=error, original=saved._pieces):
            calls.append(parts)
            if len(calls) == 4:
                raise error("stop")
            yield from original(parts)

        with monkeypatch.context() as patch:
            patch.setattr(saved, "_pieces", pieces)
            with pytest.raises(error, match="stop"):
                filled(model).save(folder)
    assert os.listdir(folder) == ["prefix.safetensors"] and same(LongContextCache.load(folder, model), before)


def test_leftovers_of_killed_processes_are_removed(model, folder):
    """Unless they are young or somebody holds them."""
    import fcntl

    filled(model).save(folder)
    names = [f".{digit * 32}.safetensors" for digit in "abc"] + [".notes.safetensors"]
    for name in names:
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - 3600,) * 2)
    os.utime(folder / names[1])
    with (folder / names[2]).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        filled(model).save(folder)
    assert sorted(os.listdir(folder)) == sorted([*names[1:], "prefix.safetensors"])


CHILDREN = """
import os, signal, sys, tempfile, torch
sys.path.insert(0, sys.argv[2])
from helpers import tiny_model
from test_save import filled, same
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.errors import InvalidValue
from qwen_longctx import files
from qwen_longctx.kv import saved

OURS = {saved.__file__, files.__file__}
folder, model = sys.argv[1], patch_qwen(tiny_model())
caches = {99: filled(model, 99), 150: filled(model, 150, kv_cache="int8")}
caches[99].save(folder)

def child(work):
    number = os.fork()
    if not number:
        try:
            work()
        finally:
            os._exit(7)
    return os.waitpid(number, 0)[1]

def traced(length, left):
    # saves, and is killed after so many lines of ours
    def look(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in OURS:
            return None
        left -= event == "line"
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return look
    sys.settrace(look)
    caches[length].save(folder)
    sys.settrace(None)
    return left

lines = {length: 10**9 - traced(length, 10**9) for length in caches}
fewest = min(lines.values())
ends = sorted({*range(1, fewest + 1, fewest // 50), *range(1, 26)}, reverse=True)  # lines before the last
before, new = 150, 0
for end in ends:
    after = 249 - before
    point = lines[after] - end
    status = child(lambda: traced(after, point))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
    loaded = LongContextCache.load(folder, model)
    length = loaded.get_seq_length()
    assert length in (before, after) and same(loaded, caches[length]), (point, length)
    assert loaded.kv_cache == caches[length].kv_cache
    new, before = new + (length == after), length
    for name in os.listdir(folder):
        assert name == "prefix.safetensors" or files.is_leftover(name, ".safetensors"), name
        if name[0] == ".":
            os.unlink(os.path.join(folder, name))
print("kills", len(ends), "new", new)

def without_rights():
    if not os.geteuid():
        os.setuid(65534)
    for target in (place, place + "/below", folder):
        try:
            caches[150].save(target)
        except InvalidValue as error:
            assert "Permission denied" in str(error), error
        else:
            os._exit(3)
    os._exit(0)

with tempfile.TemporaryDirectory() as place:  # which others may read
    caches[99].save(place)
    os.chmod(place, 0o555)
    os.chmod(folder, 0o500)
    assert child(without_rights) == 0
    os.chmod(place, 0o755)
    os.chmod(folder, 0o755)
    assert same(LongContextCache.load(place, model), caches[99])
"""


def test_a_save_that_is_killed_anywhere_leaves_a_whole_prefix(folder):
    """Killed without notice before any line of the save, and refused where nothing may be written."""
    command = [sys.executable, "-c", CHILDREN, str(folder), str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    _, kills, _, new = done.stdout.split()
    assert int(kills) > 60 and 0 < int(new) < int(kills)


SAVE_ALL_THE_TIME = """
import sys
sys.path.insert(0, sys.argv[2])
from helpers import tiny_model
from test_save import filled
from qwen_longctx import patch_qwen
model = patch_qwen(tiny_model())
caches = [filled(model, 99, 40), filled(model, 150, 40)]
while True:
    for cache in caches:
        cache.save(sys.argv[1])
"""


@pytest.mark.parametrize("after", [0.0, 0.13, 0.31])
def test_a_process_that_is_killed_while_it_saves(after, folder):
    process = subprocess.Popen([sys.executable, "-c", SAVE_ALL_THE_TIME, str(folder), str(HERE)])
    kill_when_written(process, folder / "prefix.safetensors", after=after)
    ours = patch_qwen(tiny_model())
    loaded = LongContextCache.load(folder, ours)
    assert same(loaded, filled(ours, loaded.get_seq_length(), 40))


def test_an_unpatched_model_gets_no_prefix_back(folder):
    ours = patch_qwen(tiny_model())
    filled(ours).save(folder)
    loaded = LongContextCache.load(folder, ours)
    unpatch_qwen(ours)
    with pytest.raises(PatchConflict, match="not patched"):
        following(ours, loaded)
