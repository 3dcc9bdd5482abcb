"""Caches in 8 bits: quantised once, whatever is done with them, and close to the cache that holds keys as they are."""

from __future__ import annotations

import random

import pytest
import torch

from helpers import tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.errors import Unsupported
from qwen_longctx.kv.eight_bit import EightBitStore, Turning
from qwen_longctx.kv.store import mean_keys
from qwen_longctx.ops.eight_bit import dequantise, quantise
from qwen_longctx.patches.method import cache_argument

KINDS = ["int8", "fp8"]
STEP = {"int8": 0.5 / 127, "fp8": 1 / 16}  # largest error: of the largest number of a vector, or of each number
HEADS, DIM = 2, 8
INV_FREQ = 100.0 ** -(torch.arange(0, DIM, 2) / DIM)


def turned(x, spots):
    """`x` rotated by the definition, in float64: shape (batch, tokens, heads, dim), spots (batch, tokens)."""
    angle = spots[..., None, None].double() * INV_FREQ.double()
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_vector(kind):
    x = torch.randn(50, 7, 64) * torch.logspace(-6, 4, 50)[:, None, None]
    codes, scales = quantise(x, kind)
    found = dequantise(codes, scales)
    assert codes.element_size() == 1 and scales.shape == (50, 7, 1)
    largest = x.abs().amax(-1, keepdim=True)
    allowed = STEP["int8"] * largest if kind == "int8" else STEP["fp8"] * x.abs() + largest / 448 / 512
    assert ((found - x).abs() <= allowed * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero_and_what_is_no_number_stays_none(kind):
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    found = dequantise(*quantise(x, kind))
    assert not found[0].any() and not found[1:].isfinite().all(1).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(100))
def test_random_sequences_against_plain_tensors(kind, seed):
    """Each token is quantised once: bit for bit the same wherever it is moved, and however it was appended."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    batch, length = dice.randint(1, 3), 0
    bias = 100 * torch.randn(HEADS * DIM)
    store = EightBitStore(kind, dice.choice([0, 40, 500]))
    plain = [torch.empty(batch, 0, *shape) for shape in ((HEADS, DIM), (HEADS, DIM))]
    once = [x.clone() for x in plain]
    for _ in range(dice.randint(3, 12)):
        action = dice.choice(["append", "append", "append", "crop", "rows", "empty"])
        if action == "append":
            tokens = dice.choice([1, 2, 7, 60])
            spots = torch.randint(0, 50, (dice.choice([1, batch]), tokens), dtype=torch.int32)
            free, v = torch.randn(2, batch, tokens, HEADS, DIM)
            k = (turned(free, spots) + turned(bias.view(HEADS, DIM), spots)).float()
            alone = EightBitStore(kind)
            alone.append(k, v, bias, Turning(spots, INV_FREQ, 1.0))
            store.append(k, v, bias, Turning(spots, INV_FREQ, 1.0))
            plain = [torch.cat(two, 1) for two in zip(plain, (k, v), strict=True)]
            once = [torch.cat(two, 1) for two in zip(once, alone.segment(0, tokens), strict=True)]
        elif action == "crop":
            length = dice.randint(0, plain[0].shape[1])
            store.truncate(length)
            plain, once = [x[:, :length] for x in plain], [x[:, :length] for x in once]
        elif action == "rows":
            rows = torch.randint(0, batch, (dice.randint(1, 3),))
            store.select_rows(rows)
            plain, once, batch = [x[rows] for x in plain], [x[rows] for x in once], len(rows)
        elif dice.random() < 0.2:
            store.truncate(0)
            plain, once = [x[:, :0] for x in plain], [x[:, :0] for x in once]
        if store.buffers is None:
            continue
        end = plain[0].shape[1]
        start = dice.randint(0, end)
        found = store.segment(start, end)
        assert store.length == end
        for got, wanted, true in zip(found, once, plain, strict=True):
            assert torch.equal(got, wanted[:, start:])
            # the keys without their bias are below 6: the bias of 100 and more costs them nothing
            assert (got - true[:, start:]).abs().max() < 6 * 1.5 * STEP[kind] if got.numel() else True
        assert torch.equal(store.key_means(4), mean_keys(once[0], 4))


def biased(**config):
    model = tiny_model(**config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.copy_(20 * torch.randn(layer.self_attn.k_proj.bias.shape))
    return model


@torch.no_grad()
def run(model, ids, pieces, kind, mask=None):
    cache, found = LongContextCache(kv_cache=kind), []
    for start, stop in zip([0, *pieces], [*pieces, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        found.append(model(ids[:, start:stop], attention_mask=seen, **cache_argument(cache)).logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_is_close_and_the_bias_costs_nothing(kind, padded):
    model = patch_qwen(biased(), prefill_chunk_size=23)
    ids = torch.randint(1, 97, (2, 150))
    mask = torch.ones_like(ids)
    mask[1, : 40 * padded] = 0
    exact, _ = run(model, ids, [100, 101, 102], "device", mask)
    found, cache = run(model, ids, [100, 101, 102], kind, mask)
    real = mask.bool()
    error = (found - exact)[real].norm() / exact[real].norm()
    assert 0 < error < {"int8": 0.02, "fp8": 0.1}[kind]
    with_bias = EightBitStore(kind)
    keys = run(model, ids, [], "device", mask)[1].layers[0].store.segment(0, 150)
    with_bias.append(*keys)
    wrong, right = ((s.segment(0, 150)[0] - keys[0])[real].norm() for s in (with_bias, cache.layers[0].store))
    assert right < wrong / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_generate_with_beams_and_crop(kind, family):
    ids = torch.randint(1, 97, (2, 90))
    model = patch_qwen(tiny_model(family), kv_cache=kind)
    out = model.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 95)
    logits, cache = run(model, ids, [60], kind)
    cache.crop(60)
    with torch.no_grad():
        assert torch.equal(model(ids[:, 60:], **cache_argument(cache)).logits, logits[:, 60:])


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_prefill(kind):
    geometry = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
    settings = {
        "sparse": "block_scores",
        "sparse_attention_threshold": 200,
        "prefill_chunk_size": 150,
        "block_size": 32,
    }
    model, ids = (
        tiny_model(dual_chunk_attention_config=geometry, max_position_embeddings=256),
        torch.randint(1, 97, (1, 500)),
    )
    with patched_qwen(model, prefill_chunk_size=150, sparse="off"):
        dense, _ = run(model, ids, [], kind)
    with patched_qwen(model, **settings, density=1.0):
        found, cache = run(model, ids, [], kind)
    assert cache.report()["layers"]
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)


def test_what_is_refused():
    ids = torch.randint(1, 97, (1, 20))
    model = tiny_model()
    with pytest.raises(Unsupported, match="filled by patched models only"):
        model(ids, **cache_argument(LongContextCache(kv_cache="int8")))
    patch_qwen(model)
    with pytest.raises(Unsupported, match="has no gradients"):
        model(ids, **cache_argument(LongContextCache(kv_cache="int8")))
    _, cache = run(model, ids, [], "int8")
    with pytest.raises(Unsupported, match="takes no tensors"):
        cache.layers[0].keys = torch.zeros(1, 2, 20, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_buffers(kind):
    from qwen_longctx.checkpoint import Shape
    from qwen_longctx.prefill.memory import kv_bytes

    model = patch_qwen(tiny_model())
    _, cache = run(model, torch.randint(1, 97, (1, 30)), [], kind)
    held = sum(b.numel() * b.element_size() for layer in cache.layers for b in layer.store.buffers)
    assert held == 30 * kv_bytes(Shape.of(model.config), torch.float32, kind)
