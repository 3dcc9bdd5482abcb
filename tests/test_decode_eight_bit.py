"""Decoding steps on a cache in 8 bits, which is read as it lies: against the quantised numbers in float64."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import INTERPRETED, tiny_model
from qwen_longctx import patch_qwen
from qwen_longctx.geometry import layout as layouts
from qwen_longctx.geometry.rotary import rotate, rotation
from qwen_longctx.kv.eight_bit import EightBitStore, Turning
from qwen_longctx.ops import decode as ops_decode
from qwen_longctx.ops.decode import BLOCK, MOST_TOKENS, Reach, Sizes, decode, decode_triton, why_not
from qwen_longctx.ops.eight_bit import EightBit, quantise
from qwen_longctx.patches.method import cache_argument, cache_of
from test_decode import BORDERS, KERNEL, TWIN, WAYS, Case, device_of, tokens_of, wherever_it_can
from test_sparse_decode import some_blocks

KINDS = ["int8", "fp8"]
SMALL = Sizes(rows=16, keys=16, warps=4, stages=2)
INTERPRETED_ONLY = pytest.mark.skipif(bool(INTERPRETED.args[0]), reason=INTERPRETED.kwargs["reason"])


class EightBitCase(Case):
    """A `Case` whose keys and values, and the bias in its keys, are held in 8 bits. Free room is no number."""

    def __init__(self, kind, *args, bias=0.0, **how):
        super().__init__(*args, **how)
        end, device = self.end, self.q.device
        index = torch.arange(end, device=device) - torch.tensor(self.firsts, device=device)[:, None]
        spots = index.clamp(min=0) % self.settings.stride
        vector = bias * torch.randn(self.k.shape[2] * self.k.shape[3], device=device)
        table = rotation(spots, self.rotary.inv_freq, 1.0, torch.float64)
        turned = rotate(vector.double().view(1, 1, *self.k.shape[2:]).expand(len(spots), end, -1, -1), table)
        keys = (self.keys[:, :end].double() + turned).to(self.q.dtype)
        store = EightBitStore(kind, end + 5)
        store.append(keys, self.v[:, :end], vector if bias else None, Turning(spots, self.rotary.inv_freq, 1.0))
        for buffer, rubbish in zip(store.buffers, (127, torch.nan, 127, torch.nan, 7), strict=True):
            buffer[:, end:] = rubbish
        self.held = store.room()
        exact = [(one.codes if kind == "int8" else one.codes.view(torch.float8_e4m3fn)).double() for one in self.held]
        self.exact = [x * one.scales.double() for x, one in zip(exact, self.held, strict=True)]
        self.exact[0][:, :end] += turned
        self.keys, self.v = (x.to(self.q.dtype) for x in self.exact)

    def definition(self, scale):
        """By the quantised numbers and the exact bias in float64."""
        exact = copy(self)
        exact.q, (exact.keys, exact.v) = self.q.double(), self.exact
        return exact.plain(scale).cpu()

    def largest(self, scale):
        """The largest value, or as much of it as a rounding in the largest product of a logit moves."""
        q, k, v = (x.nan_to_num().abs().max().item() for x in (self.q, self.keys, self.v))
        return v * max(1.0, scale * q * k)


def by(way, splits=None, size=SMALL):
    """Tiles of 16 keys, so that most of them begin within a chunk; None takes those of the device."""
    if way == TWIN:
        return lambda case, scale: decode(case.q, *case.held, case.reach(), scale=scale)
    return lambda case, scale: decode_triton(case.q, *case.held, case.reach(), scale=scale, splits=splits, by=size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("length", BORDERS)
def test_at_the_borders_of_chunks(way, kind, tokens, length):
    EightBitCase(kind, [0], length + tokens - 1, tokens, bias=50.0, device=device_of(way)).check(by(way, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_head_dims_and_dtypes(way, kind, dtype, head_dim, bias):
    if way == "kernel" and dtype == torch.bfloat16:
        pytest.skip("the interpreter holds bfloat16 as numbers of another kind")
    case = EightBitCase(
        kind, [3, 0], 77, heads=(6, 2), head_dim=head_dim, dtype=dtype, device=device_of(way), bias=bias
    )
    case.check(by(way, 2), head_dim**-0.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (14, 2)])
@pytest.mark.parametrize("tokens", [1, 8])
def test_groups(way, heads, tokens):
    EightBitCase("int8", [0, 9], 70, tokens, heads=heads, device=device_of(way), bias=50.0).check(by(way, 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["int8"])  # the interpreter takes its time
def test_sixteen_rows_with_padding(way, kind):
    firsts = [0, 1, 31, 32, 33, 40, 63, 64, 65, 90, 95, 96, 97, 98, 99, None]
    EightBitCase(kind, firsts, 100, 3, device=device_of(way), bias=50.0).check(by(way, 4))


@settings(max_examples=4)
@given(st.data())
@pytest.mark.parametrize("way", WAYS)
def test_random_steps(way, data):
    def whole(least, most):
        return data.draw(st.integers(least, most))

    torch.manual_seed(whole(0, 10**6))
    chunk = whole(4, 90)
    config = {"chunk_size": chunk, "local_size": whole(1, chunk // 2), "original_max_position_embeddings": whole(4, 99)}
    end = whole(1, 120)
    tokens = whole(1, min(MOST_TOKENS, end))
    firsts = data.draw(st.lists(st.none() | st.integers(0, end - 1), min_size=1, max_size=3))
    kv_heads = whole(1, 2)
    heads = kv_heads * whole(1, 16), kv_heads
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    kind, bias = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([0.0, 1.0, 50.0]))
    case = EightBitCase(kind, firsts, end, tokens, heads, 8 * whole(2, 10), dtype, device_of(way), bias=bias, **config)
    case.check(by(way, whole(1, 5)))


@pytest.mark.parametrize("way", WAYS)
def test_long_chunks_in_one_part(way):
    """The rotation is carried on from tile to tile, 30 times."""
    how = {"chunk_size": 2000, "local_size": 16, "original_max_position_embeddings": 10**9}
    case = EightBitCase("int8", [0], 3960, heads=(1, 1), device=device_of(way), bias=50.0, **how)
    case.check(by(way, 1, None))


class ListedCase(EightBitCase):
    """One whose queries attend to some blocks only, against PyTorch with the same lists, in float64 and as it is."""

    def __init__(self, *args, count, **how):
        super().__init__(*args, **how)
        self.blocks = some_blocks(self, count)

    def definition(self, scale):
        exact = copy(self)
        exact.q = self.q.double()
        return decode(exact.q, *self.exact, exact.reach(), scale=scale, blocks=self.blocks).cpu()

    def plain(self, scale):
        return decode(self.q.cpu(), self.keys.cpu(), self.v.cpu(), self.reach().to("cpu"), **self.how(scale, "cpu"))

    def how(self, scale, device):
        return {"scale": scale, "blocks": self.blocks.to(device)}

    def across(self):
        """Listed blocks that hold the border of two chunks of their row."""
        found = 0
        for row, first in enumerate(self.firsts):
            borders = range(first + self.settings.stride, self.end, self.settings.stride)
            found += sum(border % BLOCK != 0 and border // BLOCK in self.blocks[row] for border in borders)
        return found


def listed(way, splits=None, size=None):
    if way == TWIN:
        return lambda case, scale: decode(case.q, *case.held, case.reach(), **case.how(scale, "cpu"))
    how = {"splits": splits, "by": size}
    return lambda case, scale: decode_triton(case.q, *case.held, case.reach(), **case.how(scale, case.q.device), **how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [0.0, 50.0])
@pytest.mark.parametrize(("tokens", "size"), [(1, None), (3, SMALL)])
def test_lists_of_blocks_across_chunks(way, kind, bias, tokens, size):
    """Chunks of 250 keys that begin at the row's first key, which is no multiple of 64 in padded rows."""
    config = {"chunk_size": 320, "local_size": 70, "original_max_position_embeddings": 10**9}
    how = {"heads": (4, 1), "device": device_of(way), "bias": bias, **config}
    case = ListedCase(kind, [0, 21, None], 800, tokens, count=9, **how)
    assert case.across() >= 3
    case.check(listed(way, 2, size))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stride", [5, 33, 64, 65])
def test_lists_of_blocks_of_short_chunks(way, stride):
    """A tile of 64 keys reaches over more than two chunks, just two, or one border."""
    config = {"chunk_size": stride + 2, "local_size": 2, "original_max_position_embeddings": 10**9}
    case = ListedCase("int8", [0, 19], 330, count=4, heads=(2, 1), device=device_of(way), bias=50.0, **config)
    case.check(listed(way, 1))


def one_key_at_a_time(codes, scales, dtype, device):
    """Values of a decoding step that sees one key: codes of shape (keys, 1, head_dim), one of them in each row."""
    held = EightBit(codes[:, None].to(device), scales[:, None].to(device))
    keys, _, head_dim = codes.shape
    q = torch.zeros(keys, 1, 1, head_dim, dtype=dtype, device=device)
    ranges = torch.tensor([[0, 1], [0, 0], [0, 0]], dtype=torch.int32, device=device).repeat(keys, 1, 1, 1)
    table = torch.ones(3, 1, 1, 1, head_dim, dtype=dtype, device=device)
    reach = Reach(table, table, ranges, torch.ones(keys, 1, device=device), 4)
    return decode_triton(q, held, held, reach, scale=1.0)[:, 0].cpu()


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_read_exactly(way, kind, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(4, 1, 64)
    numbers = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).double()
    codes = codes.view(torch.int8) if kind == "int8" else codes
    found = one_key_at_a_time(codes, torch.full((4, 1, 1), 0.5), dtype, device_of(way)).double()
    real = numbers.isfinite()
    assert torch.equal(found[real], (numbers * 0.5)[real])


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_small_weights_in_half_precision_count(way, kind):
    """Beside one key that takes almost all attention: thousands of small ones, of values with a scale below 0.01."""
    keys, device = 3000, device_of(way)
    k, v = torch.zeros(2, 1, keys, 1, 16)
    k[:, 0], v[:, 1:] = 11 / 16, 1.0
    held = [EightBit(*(x.to(device) for x in quantise(one, kind))) for one in (k, v)]
    table = torch.ones(3, 1, 1, 1, 16, dtype=torch.float16, device=device)
    ranges = torch.tensor([[0, keys], [0, 0], [0, 0]], dtype=torch.int32, device=device)[None, None]
    reach = Reach(table, 0 * table, ranges, torch.ones(1, 1, device=device), keys)
    found = decode_triton(torch.ones(1, 1, 1, 16, dtype=torch.float16, device=device), *held, reach, scale=1.0)
    small = (keys - 1) * torch.tensor(-11.0).double().exp()
    assert (found.cpu().double() / (small / (1 + small)) - 1).abs().max() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_is_seen(kind):
    """A value or key that is no number is none in the result either, and does not become a large one."""
    for which in (0, 1):
        case = EightBitCase(kind, [0], 40)
        case.held[which].scales[0, 20] = torch.nan
        ways = (TWIN, "kernel")[: 1 if INTERPRETED.args[0] else 2]
        assert all(by(way)(case, 0.3).isnan().any() for way in ways)


def test_a_step_reads_about_half_of_the_bytes_of_bf16():
    """Nothing is worked out beforehand: what a step is given are the buffers of the store."""
    store = EightBitStore("int8", 300)
    store.append(*torch.randn(2, 1, 200, 4, 128, dtype=torch.bfloat16))
    held = [x for one in store.room() for x in (one.codes, one.scales)]
    assert [x.data_ptr() for x in held] == [x.data_ptr() for x in store.buffers[:4]]
    assert sum(x[:, 0].nbytes for x in held) < 0.52 * 2 * 4 * 128 * 2


# --- whole models -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[TWIN, KERNEL])
def way(request, monkeypatch):
    """Decoding steps of models run in one pass on the CPU too: on the twin, or on the kernel in its interpreter."""
    calls = []
    monkeypatch.setattr(layouts, "why_not", wherever_it_can)
    monkeypatch.setattr(ops_decode, "uses_triton", lambda *x: bool(calls.append(1)) or request.param != TWIN)
    return calls


def biased(family):
    model = tiny_model(family, head_dim=16)
    with torch.no_grad():
        for layer in model.model.layers if family == "qwen2" else ():
            layer.self_attn.k_proj.bias.copy_(20 * torch.randn(layer.self_attn.k_proj.bias.shape))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_logits_are_those_of_the_cache_read_out(kind, family, way, monkeypatch):
    model = patch_qwen(biased(family), kv_cache=kind)
    ids, mask = torch.randint(1, 97, (2, 94)), torch.ones(2, 97, dtype=torch.long)
    mask[1, :50] = 0

    def logits():
        with torch.no_grad():
            cache = cache_of(model(ids, attention_mask=mask[:, :94], use_cache=True))
            return model(ids[:, :3], attention_mask=mask, **cache_argument(cache)).logits

    found = logits()
    assert len(way) == 2
    monkeypatch.setattr(layouts, "why_not", why_not)
    # the new tokens are quantised too: a rounding error may move one number of theirs to the next code
    torch.testing.assert_close(found, logits(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("way", [TWIN], indirect=True)  # the interpreter takes a second for each layer and token
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generate_gives_the_tokens_of_the_cache_read_out(kind, family, how, way, monkeypatch):
    model = patch_qwen(biased(family), kv_cache=kind)
    ids = torch.randint(1, 97, (1 if "prompt_lookup_num_tokens" in how else 3, 90))
    ids[:, 40:80] = ids[:, :40]
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :20], mask[2, :85] = 0, 0
    found = tokens_of(model, ids, mask, do_sample=False, **how)
    assert len(way) >= 2 * (3 if "prompt_lookup_num_tokens" in how else 11)
    monkeypatch.setattr(layouts, "why_not", why_not)
    assert found == tokens_of(model, ids, mask, do_sample=False, **how)
