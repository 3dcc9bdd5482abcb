"""What a decoded token leaves in a cache where the device says: its keys in 8 bits, and the mean that it completes."""

from __future__ import annotations

import pytest
import torch

from helpers import DEVICES, INTERPRETED
from qwen_longctx.kv.eight_bit import EightBitStore, Turning
from qwen_longctx.kv.store import Store
from qwen_longctx.ops import eight_bit
from qwen_longctx.ops.eight_bit import KeyBias, quantise, write_triton
from qwen_longctx.ops.means import mean_keys, write_mean, write_mean_triton

KINDS = ["int8", "fp8"]
RUBBISH = (99, torch.nan, 99, torch.nan, 99)
ON = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]


def frequencies(head_dim, device="cpu"):
    return 1e4 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)


def buffers_of(kind, batch, room, heads, head_dim, device="cpu"):
    """Those of an `EightBitStore`, full of rubbish."""
    store = EightBitStore(kind, room)
    store.append(*torch.zeros(2, batch, 1, heads, head_dim, device=device))
    for buffer, rubbish in zip(store.buffers, RUBBISH, strict=True):
        buffer.fill_(rubbish)
    return store.buffers


def by_pytorch(*arguments, **how):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eight_bit, "uses_triton", lambda *x: False)
        eight_bit.write(*arguments, **how)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "scaling", "rows", "biased"),
    [
        (torch.float32, 64, 1.0, 1, True),
        (torch.float16, 80, 1.0, 3, True),
        (torch.bfloat16, 128, 1.3, 1, True),
        (torch.float32, 24, 1.0, 3, False),
    ],
)
def test_one_launch_writes_the_bits_of_pytorch(device, kind, dtype, head_dim, scaling, rows, biased):
    """Also from views, of several tokens, and beside what lies elsewhere."""
    torch.manual_seed(head_dim)
    k, v = (30 * torch.randn(2, 3, 2, 5, head_dim, device=device).transpose(2, 3)).to(dtype)
    spots = torch.randint(0, 260_000, (5, rows), device=device).t()
    bias = None
    if biased:
        vector = 100 * torch.randn(2, head_dim, device=device)
        bias = KeyBias.of(vector, frequencies(head_dim, device), scaling, dtype)
    found, wanted = (buffers_of(kind, 3, 9, 2, head_dim, device) for _ in range(2))
    write_triton(found, k, v, spots, bias, start=3)
    by_pytorch(wanted, k, v, spots, bias, start=3)
    slot = torch.tensor([1], device=device)
    write_triton(found, k[:, :1], v[:, :1], spots[:, :1].int(), bias, slot=slot)
    by_pytorch(wanted, k[:, :1], v[:, :1], spots[:, :1].int(), bias, slot=slot)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.nan_to_num(99), other.nan_to_num(99))
        assert (one[:, [0, 2, 8]].nan_to_num(99) == 99).all()


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rounding_is_that_of_pytorch(device, kind):
    """All float16 numbers as codes of a scale of 1: halves, numbers below the smallest, zeros of both signs."""
    most = {"int8": 127.0, "fp8": 448.0}[kind]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    every = every[every.abs() <= most]
    every = torch.cat((every, (every.double() * (1 + 2**-20)).float().clamp(-most, most)))
    x = torch.nn.functional.pad(every, (0, -len(every) % 4095)).view(1, -1, 1, 4095)
    x = torch.cat((x, torch.full_like(x[..., :1], most)), -1).to(device)
    found = buffers_of(kind, 1, x.shape[1], 1, 4096, device)
    write_triton(found, x, x, torch.zeros(1, x.shape[1], dtype=torch.int32, device=device), None)
    codes, scales = quantise(x, kind)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales) and torch.equal(found[2], codes)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_has_a_scale_that_is_none(device, kind):
    x = torch.zeros(1, 3, 1, 16, device=device)
    x[0, 1, 0, 2], x[0, 2, 0, 5] = torch.nan, torch.inf
    found = buffers_of(kind, 1, 3, 1, 16, device)
    write_triton(found, x, x, torch.zeros(1, 3, dtype=torch.int32, device=device), None)
    scales = found[1].flatten()
    assert scales[0] == 0 and not found[0][0, 0].any() and not scales[1:].isfinite().any()


def unturned(k):
    """The table that rotates by nothing."""
    return k.new_ones(1, 1, 1, k.shape[3]), k.new_zeros(1, 1, 1, k.shape[3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_at_a_time_is_held_as_all_at_once(device, kind):
    """What the device is told where to write, and what the host appends, is the same cache."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 40, 2, 16, device=device)
    bias, spots = 50 * torch.randn(32, device=device), torch.randint(0, 99, (2, 40), device=device)
    one, other = EightBitStore(kind, 50), EightBitStore(kind, 50)
    one.append(k, v, bias, Turning(spots, frequencies(16, device), 1.0))
    other.append(k[:, :30], v[:, :30], bias, Turning(spots[:, :30], frequencies(16, device), 1.0))
    for at in range(30, 40):
        slot = torch.tensor([at], device=device)
        other.write(k[:, at : at + 1], v[:, at : at + 1], slot, unturned(k), spots[:, at : at + 1].int())
        other.count(at + 1)
    for a, b in zip(one.buffers, other.buffers, strict=True):
        assert torch.equal(a[:, :40], b[:, :40])


def stores(kind, k, spots, vector, device):
    if kind == "device":
        store = Store(k.shape[1])
        store.append(k, k)
        return store
    store = EightBitStore(kind, k.shape[1])
    store.append(k, k, vector.flatten(), Turning(spots, frequencies(k.shape[3], device), 1.0))
    return store


@pytest.mark.parametrize("way", ["twin", *ON])
@pytest.mark.parametrize("kind", ["device", *KINDS])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 24), (torch.float16, 64)])
def test_the_mean_that_a_key_completes(way, kind, dtype, head_dim):
    """Kernels write none before its last key."""
    torch.manual_seed(0)
    device = "cpu" if way == "twin" else way
    k = torch.randn(2, 100, 1, head_dim, device=device).to(dtype)
    spots = torch.randint(0, 260_000, (1, 100), device=device)
    bias = 20 * torch.randn(1, head_dim, device=device)
    store = stores(kind, k, spots, bias, device)
    wanted = mean_keys(store.segment(0, 100)[0].float(), 32)
    means = torch.full((2, 4, 1, head_dim), 7.0, device=device, dtype=dtype)
    how = write_mean if way == "twin" else write_mean_triton
    for at in (31, 95, 62, 99):
        how(store.room()[0], means, torch.tensor([at], device=device), 32)
    largest = wanted.abs().max().item()
    if way == "cuda" and kind != "device":  # the rotated bias is taken off and added again, by two sines
        largest = max(largest, bias.abs().max().item())
    tolerance = 4 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(means[:, [0, 2]].float(), wanted[:, [0, 2]], rtol=0, atol=tolerance)
    if way != "twin":
        assert (means[:, [1, 3]] == 7).all()


@pytest.mark.parametrize("kind", ["device", *KINDS])
def test_means_are_known_alike_by_device_and_host(kind, monkeypatch):
    """Tokens of a graph, tokens of the host, drafts, crops, beams and growth, in any order: those of a fresh store."""
    torch.manual_seed(1)
    vector, turning = torch.randn(2, 16), frequencies(16)
    store = EightBitStore(kind, 70) if kind != "device" else Store(70)
    plain = torch.empty(2, 0, 2, 16)
    dice = torch.Generator().manual_seed(3)

    def append(tokens):
        nonlocal plain
        k = torch.randn(2, tokens, 2, 16)
        at = plain.shape[1] + torch.arange(tokens)[None]
        more = () if kind == "device" else (vector.flatten(), Turning(at, turning, 1.0))
        store.append(k, k, *more)
        plain = torch.cat((plain, k), 1)

    def token():
        nonlocal plain
        store.means_room(8)
        at = plain.shape[1]
        if at >= store.size()[0]:
            return append(1)
        k = torch.randn(2, 1, 2, 16)
        slot = torch.tensor([at])
        store.write(k, k, slot, unturned(k), slot[None])
        store.means_room(8, slot)
        store.count(at + 1, means=True)
        plain = torch.cat((plain, k), 1)

    def crop():
        nonlocal plain
        store.truncate(max(1, plain.shape[1] - int(torch.randint(1, 20, (), generator=dice))))
        plain = plain[:, : store.length]

    def beams():
        nonlocal plain
        rows = torch.randint(0, 2, (2,), generator=dice)
        store.select_rows(rows)
        plain = plain[rows]

    append(20)
    for _ in range(300):
        action = int(torch.randint(0, 10, (), generator=dice))
        {0: crop, 1: beams, 2: lambda: append(5), 3: lambda: append(9)}.get(action, token)()
        assert store.length == plain.shape[1]
        if kind == "device":
            assert torch.equal(store.segment(0, store.length)[0], plain)
        wanted = mean_keys(store.segment(0, store.length)[0], 8)
        torch.testing.assert_close(store.key_means(8), wanted, rtol=1e-6, atol=1e-6)
