"""Saved prefixes in 8 bits: bit for bit what was saved, whatever the model's settings say; nothing else is loaded."""

from __future__ import annotations

import copy
import json
import zlib

import pytest
import torch

from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.errors import DoesNotFit, InvalidValue
from qwen_longctx.kv import store
from qwen_longctx.ops.eight_bit import KINDS
from qwen_longctx.patches.method import cache_argument
from test_save import GREEDY, filled, following, prompt, same

ROPE = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def biased(family="qwen2", dtype=torch.float32, **config):
    """A model whose keys have biases far larger than what else is in them, where its family has any."""
    ours = tiny_model(family, dtype, **config)
    with torch.no_grad():
        for layer in ours.model.layers:
            if layer.self_attn.k_proj.bias is not None:
                layer.self_attn.k_proj.bias.copy_(20 * torch.randn(layer.self_attn.k_proj.bias.shape))
    return ours


def bits(cache):
    """All that the stores of a cache hold, as bytes."""
    biases = [x for layer in cache.layers for x in (layer.store.bias or ())[:-1]]
    held = [x for layer in cache.layers for (x,) in layer.store.parts(layer.get_seq_length())] + biases
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in held]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prefix"


@pytest.fixture(scope="module")
def model():
    return patch_qwen(biased(), prefill_chunk_size=40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "dtype", "rope"),
    [("qwen2", torch.float32, None), ("qwen2", torch.bfloat16, ROPE), ("qwen3", torch.float16, None)],
)
@torch.no_grad()
def test_many_questions_get_the_tokens_of_one_shot(kind, family, dtype, rope, folder, monkeypatch):
    """Bit for bit, without a copy of the prefix, also after it was saved and loaded once more."""
    ours = patch_qwen(biased(family, dtype, rope=rope), prefill_chunk_size=40)
    cache = filled(ours, 150, 2, kv_cache=kind)
    cache.save(folder)
    loaded = LongContextCache.load(folder, ours)
    assert loaded.kv_cache == kind and bits(loaded) == bits(cache) and same(loaded, cache)
    assert loaded.layers[0].keys.dtype == dtype
    assert (loaded.layers[0].store.bias is None) == (family == "qwen3")
    places = [b.data_ptr() for layer in loaded.layers for b in layer.store.buffers]
    with monkeypatch.context() as patch:
        for name in ("_grow", "allocate"):
            patch.setattr(store.Store, name, lambda *_: pytest.fail("the prefix was copied"))
        for question in range(2):
            ids = torch.cat((prompt(150, 2), prompt(9 + question, 2, seed=question + 5)), 1)
            answer = ours.generate(ids, **cache_argument(loaded), **GREEDY)
            loaded.crop(150)
            assert torch.equal(answer, ours.generate(ids, **cache_argument(copy.deepcopy(cache)), **GREEDY))
    assert places == [b.data_ptr() for layer in loaded.layers for b in layer.store.buffers]
    loaded.reorder_cache(torch.tensor([1]))
    assert following(ours, loaded).isfinite().all()
    loaded.save(folder)
    again = LongContextCache.load(folder, ours)
    assert bits(again) == bits(loaded) and torch.equal(following(ours, again), following(ours, loaded))


@torch.no_grad()
def test_the_file_says_the_kind(model, folder):
    """The setting is about caches that are made; each file is loaded as what it is."""
    caches = {kind: filled(model, kv_cache=kind) for kind in ("device", *KINDS)}
    for kind, cache in caches.items():
        cache.save(folder)
        for asked in caches:
            with patched_qwen(model, kv_cache=asked):
                loaded = LongContextCache.load(folder, model)
                assert loaded.kv_cache == kind and same(loaded, cache)
                assert torch.equal(following(model, loaded), following(model, cache))


@torch.no_grad()
def test_rows_that_are_padded_and_sparse_prefill(folder):
    long = {"dual_chunk_attention_config": {"chunk_size": 256, "local_size": 64}, "max_position_embeddings": 256}
    on = {"sparse": "block_scores", "sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}
    ours = patch_qwen(biased(**long), **on, density=0.4)
    mask = torch.ones(2, 450, dtype=torch.long)
    mask[1, :70] = 0
    cache = filled(ours, 450, 2, kv_cache="int8", attention_mask=mask)
    cache.save(folder)
    loaded = LongContextCache.load(folder, ours)
    longer = torch.cat((mask, mask.new_ones(2, 260)), 1)
    found = [following(ours, one, 260, attention_mask=longer) for one in (loaded, cache)]
    assert loaded.report()["density"] < 1 and torch.equal(*found)


# --- what is refused ----------------------------------------------------------------------------------------------


class File:
    """A saved prefix that can be changed as no bug would change it, checksums and all."""

    def __init__(self, folder):
        self.path = folder / "prefix.safetensors"
        whole = self.path.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        self.header, self.data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
        self.about = json.loads(self.header["__metadata__"]["qwen_longctx_prefix"])

    def write(self):
        text = json.dumps(self.about)
        checked = {"qwen_longctx_prefix": text, "qwen_longctx_prefix_crc32": f"{zlib.crc32(text.encode()):08x}"}
        header = json.dumps({**self.header, "__metadata__": checked}).encode()
        self.path.write_bytes(len(header).to_bytes(8, "little") + header + self.data)


def test_files_of_the_first_version_are_caches_of_kind_device(model, folder):
    cache = filled(model)
    cache.save(folder)
    file = File(folder)
    file.about["version"] = 1
    for name in ("kv_cache", "scalings"):
        del file.about[name]
    file.write()
    with patched_qwen(model, kv_cache="int8"):
        loaded = LongContextCache.load(folder, model)
    assert loaded.kv_cache == "device" and same(loaded, cache)


def test_kinds_of_later_releases(model, folder):
    filled(model, kv_cache="fp8").save(folder)
    file = File(folder)
    file.about["kv_cache"] = "int4"
    file.write()
    with pytest.raises(InvalidValue, match="a cache of kind 'int4', this release knows device, fp8, int8, host: save"):
        LongContextCache.load(folder, model)


PARTS = ("keys", "key_scales", "values", "value_scales", "spots", "bias.vector", "bias.tile", "bias.turns")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_tensors_of_another_shape_or_dtype_or_none(part, kind, model, folder):
    cache = filled(model, kv_cache=kind)
    cache.save(folder)
    other = {"int8": "fp8", "fp8": "int8"}[kind]
    name = f"layers.1.{part}"
    for wrong in ("missing", "shape", "dtype", "kind", "checksum"):
        file = File(folder)
        entry = file.header[name]
        if wrong == "missing":
            file.header[f"layers.2.{part}"] = file.header.pop(name)
        elif wrong == "shape":
            entry["shape"] = entry["shape"][::-1] if len(set(entry["shape"])) > 1 else [1, *entry["shape"]]
        elif wrong == "dtype":
            entry["dtype"] = {"I8": "U8", "U8": "I8", "F32": "I32", "I32": "F32", "F64": "I64"}[entry["dtype"]]
        elif wrong == "kind":
            file.about["kv_cache"] = other
        else:
            file.about["checksums"][name] = "00000000"
        file.write()
        with pytest.raises(InvalidValue, match=r"is damaged: (it lacks )?layers\.[01]\."):
            LongContextCache.load(folder, model)
        cache.save(folder)
    assert bits(LongContextCache.load(folder, model)) == bits(cache)


def test_a_cut_file_and_a_wrong_byte_of_every_part(model, folder):
    filled(model, kv_cache="int8").save(folder)
    path = folder / "prefix.safetensors"
    whole = path.read_bytes()
    for length in (100, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidValue, match="is damaged or no safetensors file"):
            LongContextCache.load(folder, model)
    path.write_bytes(whole)
    file = File(folder)
    start = len(whole) - len(file.data)
    assert {name.split(".", 2)[2] for name in file.header if name.startswith("layers.0")} == set(PARTS)
    for name, entry in file.header.items():
        if name.startswith("layers."):
            wrong = bytearray(whole)
            wrong[start + sum(entry["data_offsets"]) // 2] ^= 1
            path.write_bytes(wrong)
            with pytest.raises(InvalidValue, match=f"{name} has the checksum"):
                LongContextCache.load(folder, model)


def test_wide_numbers_lie_aligned(model, folder):
    filled(model, 151, kv_cache="int8").save(folder)
    sizes = {"F64": 8, "F32": 4, "I32": 4, "I8": 1}
    entries = [entry for name, entry in File(folder).header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)


def test_memory_that_is_not_there(model, folder, monkeypatch):
    """Of a layer: codes of 2 x 2 heads of 8 numbers, a scale for each, and a spot; the earlier layers are let go."""
    filled(model, kv_cache="int8").save(folder)
    allocate, calls = store.Store.allocate, []

    def full(self, *like):
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no")
        allocate(self, *like)

    monkeypatch.setattr(store.Store, "allocate", full)
    with pytest.raises(DoesNotFit, match=r"keys and values of a layer take 7,800 bytes, and layer 1 found no room"):
        LongContextCache.load(folder, model)
    assert len(calls) == 2 and 150 * (4 * (8 + 4) + 4) == 7800


@pytest.mark.gpu
@torch.no_grad()
def test_from_the_cpu_to_a_gpu_and_back(model, folder):
    wanted = filled(model, kv_cache="int8")
    wanted.save(folder)
    there = patch_qwen(copy.deepcopy(model).cuda(), prefill_chunk_size=40)
    loaded = LongContextCache.load(folder, there)
    assert all(x.is_cuda for layer in loaded.layers for x in (*layer.store.buffers, *layer.store.bias[:-1]))
    assert following(there, loaded).isfinite().all()
    loaded.save(folder)
    assert bits(LongContextCache.load(folder, model)) == bits(wanted)
