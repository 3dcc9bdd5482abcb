"""Reading caches in 8 bits out: the kernel against PyTorch, and what memory it takes."""

from __future__ import annotations

import random

import pytest
import torch

from helpers import INTERPRETED, tiny_model
from launches import NEEDS_RULES, recorded
from qwen_longctx import LongContextCache, patch_qwen
from qwen_longctx.kv.eight_bit import EightBitStore, room_for
from qwen_longctx.ops.eight_bit import KINDS, EightBit, KeyBias, quantise
from qwen_longctx.ops.read_out import AT_A_TIME, read_out, read_out_triton
from qwen_longctx.patches.method import cache_argument

DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
STRIDE = 253_952  # spots of the 1M checkpoints end there


def held(kind, heads, head_dim, biased, device, rows=slice(1, None), tokens=slice(3, 95)):
    """Some rows and tokens of larger buffers, numbers of all sizes, zeros and what is no number among them."""
    x = torch.randn(2, 100, heads, head_dim) * torch.logspace(-6, 3, 100)[:, None, None]
    x[1, 3], x[1, 50, 0, 3] = 0, torch.nan
    spots = torch.randint(0, STRIDE, (2, 100), dtype=torch.int32)
    spots[1, 3:6] = torch.tensor([0, 1, STRIDE - 1])
    bias = None
    if biased:
        inv_freq = 1e7 ** -(torch.arange(0, head_dim, 2) / head_dim)
        bias = KeyBias.of((150 * torch.randn(heads, head_dim)).to(device), inv_freq.to(device), 1.3, torch.float32)
    codes, scales, spots = (y[rows].to(device) for y in (*quantise(x, kind), spots))
    return EightBit(codes, scales, spots, bias).part(tokens)


def error_of(x):
    """A cosine is within 7e-7, and a number is the sum of two products with a part of the bias of up to 1.3 * 700."""
    return 2 * 8e-7 * 1.3 * float(x.bias.vector.abs().max())


def both(x, dtype):
    """What the kernel and PyTorch write into a part of more memory, and the rest of that memory."""
    rows, tokens, *vector = x.shape
    found, wanted = (torch.full((rows, tokens + 5, *vector), 7.0, dtype=dtype, device=x.codes.device) for _ in "ab")
    read_out_triton(x, found[:, :tokens])
    wanted[:, :tokens] = x.numbers()
    return found, wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 128), (3, 80), (1, 24)])
def test_codes_and_scales_bit_for_bit(device, kind, heads, head_dim):
    for rows in (slice(0, 2), slice(1, 2)):
        x = held(kind, heads, head_dim, False, device, rows)
        for dtype in (torch.float32, torch.float16):
            found, wanted = both(x, dtype)
            assert torch.equal(found.nan_to_num(9), wanted.nan_to_num(9))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 128), (3, 80)])
def test_the_bias_within_rounding_of_float32(device, kind, heads, head_dim):
    x = held(kind, heads, head_dim, True, device)
    found, wanted = both(x, torch.float32)
    exact = x.numbers()
    assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any()
    assert (found - wanted).abs().nan_to_num().max() < error_of(x) + 1e-7 * float(exact.abs().nan_to_num().max())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_many_keys(kind):
    x = held(kind, 4, 128, True, "cuda")
    many = EightBit(*(y.repeat(1, 3000, *[1] * (y.ndim - 2)) for y in x[:3]), x.bias)
    found, wanted = both(many, torch.bfloat16)
    assert (found == wanted).float().mean() > 0.98  # elsewhere the last bit, or more of what is left of a large bias
    torch.testing.assert_close(found, wanted, atol=error_of(x), rtol=2**-7, equal_nan=True)


def test_nothing_to_read_and_pieces():
    store = EightBitStore("int8")
    k, v = torch.randn(2, 1, AT_A_TIME + 3, 1, 2)
    store.append(k, v)
    found = store.segment(0, AT_A_TIME + 3)
    for got, true in zip(found, (k, v), strict=True):
        assert (got - true).abs().max() < 0.5 / 127 * true.abs().max() * 1.01
    for start, stop in ((0, 0), (5, 5), (7, 9)):
        part = store.segment(start, stop)
        assert all(torch.equal(got, whole[:, start:stop]) for got, whole in zip(part, found, strict=True))
    out = torch.empty(0, 4, 1, 2)
    read_out(EightBit(torch.empty(0, 4, 1, 2, dtype=torch.int8), torch.empty(0, 4, 1, 1)), out)


def test_memory_is_of_few_sizes_and_never_more_than_the_cache_has():
    sizes = [room_for(tokens) for tokens in range(1, 100_000)]
    assert all(tokens <= size <= tokens * 1.125 + 1 for tokens, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len({size for size in sizes if size > 50_000}) <= 9
    assert room_for(0) == 0 and room_for(1_000_000) - 1_000_000 < 65_536
    dice = random.Random(1)
    store = EightBitStore("fp8", 1000)
    for _ in range(5):
        store.append(*torch.randn(2, 1, dice.randint(1, 200), 2, 8))
        keys, values = store.segment(0, store.length)
        room = min(room_for(store.length), 1000)
        assert keys.untyped_storage().nbytes() == values.untyped_storage().nbytes() == 4 * 16 * room


@NEEDS_RULES
@torch.no_grad()
def test_prompts_of_any_length_launch_two_variants():
    """One for keys, one for values."""
    model = patch_qwen(tiny_model(), kv_cache="int8", prefill_chunk_size=23, sparse="off")
    with recorded() as launches:
        for tokens in (16, 50, 131):
            model(torch.randint(1, 97, (1, tokens)), **cache_argument(LongContextCache(tokens, kv_cache="int8")))
    assert len({variant for variant in launches if variant[0] == "_read_out"}) == 2
