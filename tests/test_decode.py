"""One pass over the cache for a decoding step: against the definition in float64, and through whole models."""

from __future__ import annotations

import collections
import traceback
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.streamers import BaseStreamer

from definition import _pair_logits, all_rotations
from helpers import INTERPRETED, tiny_model
from qwen_longctx import LongContextConfig, patch_qwen, patched_qwen
from qwen_longctx.attention.dense import attend
from qwen_longctx.errors import InvalidType
from qwen_longctx.geometry import layout as layouts
from qwen_longctx.geometry.layout import RotarySource, make_layout, read_call
from qwen_longctx.geometry.rotary import Rotation, rotate, rotation
from qwen_longctx.geometry.step import lay_out
from qwen_longctx.kv.store import Tensors
from qwen_longctx.ops import decode as ops_decode
from qwen_longctx.ops.decode import MOST_TOKENS, decode, decode_triton, sizes, split_count, why_not
from qwen_longctx.patches.method import cache_argument, cache_of

TWIN, KERNEL = "twin", pytest.param("kernel", marks=INTERPRETED)
WAYS = [TWIN, KERNEL, pytest.param("cuda", marks=pytest.mark.gpu)]
CHUNK, LOCAL = 40, 8  # chunks of 32
STRIDE = CHUNK - LOCAL


def wherever_it_can(setting, device, dtype, head_dim, tokens):
    return why_not(setting, torch.device("meta"), torch.float32, 64, tokens).replace("needs a CUDA device", "")


@pytest.fixture
def one_pass(request, monkeypatch):
    """Decoding steps run in one pass on the CPU too, on the twin unless a test asks for the kernel. Counts them."""
    calls = []
    monkeypatch.setattr(layouts, "why_not", wherever_it_can)
    interpreted = getattr(request, "param", TWIN) != TWIN
    monkeypatch.setattr(ops_decode, "uses_triton", lambda *x: bool(calls.append(1)) or interpreted)
    return calls


class Case:
    """Random tensors of a step that adds `tokens` to rows that end at `end` and begin at `firsts`, None for padding.

    What lies outside of the rows, free room behind them included, is not a number.
    """

    def __init__(self, firsts, end, tokens=1, heads=(4, 2), head_dim=16, dtype=torch.float32, device="cpu", **config):
        self.end, self.tokens = end, tokens
        self.settings = (
            LongContextConfig(**{"chunk_size": CHUNK, "local_size": LOCAL, **config})
            if config
            else (LongContextConfig(CHUNK, LOCAL, 10**9))
        )
        self.rotary = RotarySource(100.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim), 1.0)
        self.firsts = [end if first is None else first for first in firsts]
        batch = len(firsts)
        mask = (torch.arange(end) >= torch.tensor(self.firsts)[:, None]).long()
        self.call = read_call(mask, None, batch=batch, tokens=tokens, cached=end - tokens)
        self.q = torch.randn(batch, tokens, heads[0], head_dim, device=device).to(dtype)
        self.k, self.v = torch.randn(2, batch, end + 5, heads[1], head_dim, device=device).to(dtype)
        outside = torch.cat((mask == 0, torch.ones(batch, 5, dtype=torch.bool)), 1).to(device)
        index = torch.arange(end + 5, device=device) - torch.tensor(self.firsts, device=device)[:, None]
        table = rotation(index.clamp(min=0) % self.settings.stride, self.rotary.inv_freq, 1.0, dtype)
        self.keys = rotate(self.k, table).masked_fill(outside[..., None, None], torch.nan)
        self.v = self.v.masked_fill(outside[..., None, None], torch.nan)

    def layout(self):
        how = {"settings": self.settings, "rotary": self.rotary, "dtype": self.q.dtype, "device": self.q.device}
        return make_layout(self.call, self.end - self.tokens, self.end, **how)

    def reach(self):
        how = {"settings": self.settings, "rotary": self.rotary, "dtype": self.q.dtype, "device": self.q.device}
        return lay_out(self.call, self.end - self.tokens, self.end, **how)[1]

    def each(self):
        """Row, token, its position and its number of keys, of every query that is no padding."""
        for row, first in enumerate(self.firsts):
            for token in range(self.tokens):
                position = self.end - self.tokens + token - first
                if position >= 0:
                    yield row, token, position, slice(first, first + position + 1)

    def definition(self, scale):
        """The table of the paper in float64."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        group = self.q.shape[2] // self.k.shape[2]
        for row, token, position, keys in self.each():
            k, v = (x[row, keys].cpu().double().repeat_interleave(group, 1) for x in (self.k, self.v))
            at = all_rotations(position + 1, self.settings.chunk_size, self.settings.local_size)[position][None]
            logits = _pair_logits(self.q[row, token].cpu().double()[None], k, at, self.rotary.inv_freq.cpu().double())
            heat = self.call.temperature(self.call.rows[row], position, self.settings)
            out[row, token] = torch.einsum("hts,shd->thd", (logits * scale * heat).softmax(-1), v)[0]
        return out

    def plain(self, scale):
        """Attention as a beginner writes it, in the dtype of the tensors."""
        out = torch.zeros_like(self.q)
        group = self.q.shape[2] // self.k.shape[2]
        rotated = all_rotations(self.end, self.settings.chunk_size, self.settings.local_size)[..., 0]
        for row, token, position, keys in self.each():
            k, v = (x[row, keys].repeat_interleave(group, 1) for x in (self.keys, self.v))
            at = rotated[position, : position + 1].to(self.q.device)[None]
            table = rotation(at, self.rotary.inv_freq, 1.0, self.q.dtype)
            q = rotate(self.q[row, token].expand(1, position + 1, -1, -1), table)[0]
            heat = self.call.temperature(self.call.rows[row], position, self.settings)
            weights = ((q * k).sum(-1) * scale * heat).softmax(0)
            out[row, token] = (weights[..., None] * v).sum(0)
        return out

    def largest(self, scale):
        """What rounding errors are of: the largest value."""
        return self.v.nan_to_num().abs().max().item()

    def check(self, run, scale=0.3):
        true = self.definition(scale)
        found, plain = run(self, scale).cpu().double(), self.plain(scale).cpu().double()
        rounding = torch.finfo(self.q.dtype).eps * self.largest(scale)
        allowed = 2 * (plain - true).abs().max() + 4 * rounding  # of few numbers the plain error may be none by chance
        assert (found - true).abs().max() <= allowed
        seen = torch.zeros(self.q.shape[:2], dtype=torch.bool)
        for row, token, *_ in self.each():
            seen[row, token] = True
        assert not found[~seen].any()


def by(way, splits=None):
    if way == TWIN:
        return lambda case, scale: decode(case.q, case.keys, case.v, case.reach(), scale=scale)
    return lambda case, scale: decode_triton(case.q, case.keys, case.v, case.reach(), scale=scale, splits=splits)


def device_of(way):
    return "cuda" if way == "cuda" else "cpu"


BORDERS = [1, 2, STRIDE - 1, STRIDE, STRIDE + 1, CHUNK, 2 * STRIDE - 1, 2 * STRIDE, 2 * STRIDE + 1, 3 * STRIDE + 1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("length", BORDERS)
def test_at_the_borders_of_chunks(way, tokens, length):
    Case([0], length + tokens - 1, tokens, device=device_of(way)).check(by(way, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_and_dtypes(way, dtype, head_dim):
    if way == "kernel" and dtype == torch.bfloat16:
        pytest.skip("the interpreter holds bfloat16 as numbers of another kind")
    case = Case([3, 0], 77, heads=(6, 2), head_dim=head_dim, dtype=dtype, device=device_of(way))
    case.check(by(way, 2), head_dim**-0.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (16, 1), (14, 2), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 8])
def test_groups(way, heads, tokens):
    """Up to 128 packed rows, which is more than one tile."""
    Case([0, 9], 70, tokens, heads=heads, device=device_of(way)).check(by(way, 2))


@pytest.mark.parametrize("way", WAYS)
def test_sixteen_rows_with_padding(way):
    """Rows that begin in every chunk, with this call, within it, and one of padding alone."""
    firsts = [0, 1, 31, 32, 33, 40, 63, 64, 65, 90, 95, 96, 97, 98, 99, None]
    Case(firsts, 100, 3, device=device_of(way)).check(by(way, 4))


@settings(max_examples=6)
@given(st.data())
@pytest.mark.parametrize("way", WAYS)
def test_random_steps(way, data):
    def whole(least, most):
        return data.draw(st.integers(least, most))

    torch.manual_seed(whole(0, 10**6))
    chunk = whole(4, 90)
    config = {"chunk_size": chunk, "local_size": whole(1, chunk // 2), "original_max_position_embeddings": whole(4, 99)}
    config["attention_temperature"] = data.draw(st.sampled_from([True, False, "position"]))
    end = whole(1, 200)
    tokens = whole(1, min(MOST_TOKENS, end))
    firsts = data.draw(st.lists(st.none() | st.integers(0, end - 1), min_size=1, max_size=4))
    kv_heads = whole(1, 3)
    heads = kv_heads * whole(1, 16), kv_heads
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    case = Case(firsts, end, tokens, heads, 8 * whole(2, 10), dtype, device_of(way), **config)
    case.check(by(way, whole(1, 5)))


def in_pages(case, size, way):
    """Pages of keys and values, those of a row anywhere and more of them, as a serving engine holds them; the table."""
    batch, room, heads, dim = case.keys.shape
    columns = -(-room // size) + 2
    both = torch.full((batch, columns * size, heads, 2 * dim), torch.nan, dtype=case.q.dtype, device=case.q.device)
    both[:, :room] = torch.cat((case.keys, case.v), -1)
    table = torch.randperm(batch * columns + 3)[: batch * columns].view(batch, columns).int()
    pages = torch.full((batch * columns + 3, heads, size, 2 * dim), torch.nan, dtype=case.q.dtype, device=case.q.device)
    pages[table.flatten().long()] = both.view(-1, size, heads, 2 * dim).transpose(1, 2)
    table[:, -(-case.end // size) :] = -1  # no page of anything
    k, v = pages.transpose(1, 2).split(dim, -1)
    run = decode if way == TWIN else partial(decode_triton, splits=3)
    return lambda one, scale: run(one.q, k, v, one.reach(), scale=scale, table=table.to(one.q.device))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [8, 16, 64, 96])
@pytest.mark.parametrize("length", [1, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE, 3 * STRIDE + 5, 259])
def test_pages(way, size, length):
    case = Case([0, length // 3, None], length, heads=(6, 2), head_dim=32, device=device_of(way))
    case.check(in_pages(case, size, way))


@pytest.mark.parametrize("way", WAYS)
def test_pages_of_half_precision(way):
    case = Case([0, 7], 150, 3, heads=(4, 1), head_dim=64, dtype=torch.float16, device=device_of(way))
    case.check(in_pages(case, 16, way))


@pytest.mark.parametrize("way", WAYS)
def test_listed_blocks_of_pages(way):
    """As of a cache in one piece: the places of the keys are all that differs."""
    device = device_of(way)
    case = Case([0, 40], 400, heads=(4, 2), head_dim=32, device=device)
    blocks = torch.tensor([[[0, 2, 6], [1, 5, 6]], [[1, 3, 6], [0, 4, 6]]], dtype=torch.int32, device=device)
    run = decode if way == TWIN else partial(decode_triton, splits=2)
    wanted = run(case.q, case.keys, case.v, case.reach(), scale=0.2, blocks=blocks)
    size, columns = 16, -(-case.keys.shape[1] // 16)
    table = torch.randperm(2 * columns).view(2, columns).int()
    held = []
    for x in (case.keys, case.v):
        whole = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, columns * size - x.shape[1]))
        pages = torch.empty(2 * columns, size, *x.shape[2:], dtype=x.dtype, device=device)
        pages[table.flatten().long()] = whole.view(-1, size, *x.shape[2:])
        held.append(pages)
    found = run(case.q, *held, case.reach(), scale=0.2, blocks=blocks, table=table.to(device))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_splits_do_not_change_the_result():
    """More splits than tiles of keys, one, and what the device is given."""
    case = Case([0, 50], 97, 2)
    wanted = by(TWIN)(case, 0.3)
    for splits in (None, 1, 5, 19):
        if not INTERPRETED.args[0] or torch.cuda.is_available():
            torch.testing.assert_close(by("kernel", splits)(case, 0.3), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", [TWIN, KERNEL])
def test_queries_of_a_step_may_lie_in_two_chunks_with_one_table_for_all_rows(way):
    case = Case([0, 0, 0], 2 * STRIDE + 3, 6)
    assert case.reach().cos.shape[1] == 1
    case.check(by(way, 3))


def test_strides_of_views_are_heeded():
    case = Case([0, 7], 70, 2)
    case.q, case.keys, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.keys, case.v))
    for way in (TWIN, "kernel")[: 1 if INTERPRETED.args[0] else 2]:
        case.check(by(way, 2))


def test_dtypes_must_agree():
    case = Case([0], 9)
    with pytest.raises(InvalidType, match="queries are torch.float32, keys torch.bfloat16"):
        decode(case.q, case.keys.bfloat16(), case.v, case.reach(), scale=1.0)


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"setting": "sdpa"}, "kernel is 'sdpa'"),
        ({"setting": "reference"}, "kernel is 'reference'"),
        ({"tokens": 9}, "takes up to 8 tokens, not 9"),
        ({"dtype": torch.float64}, "takes no torch.float64"),
        ({"head_dim": 12}, "not 12"),
        ({"head_dim": 264}, "not 264"),
        ({}, "needs a CUDA device"),
    ],
)
def test_why_not(changed, reason):
    kind = {"setting": "auto", "device": torch.device("cpu"), "dtype": torch.bfloat16, "head_dim": 128, "tokens": 1}
    assert reason in why_not(**{**kind, **changed})


@pytest.mark.parametrize("kernel", ["auto", "fa4", "flex", "sdpa", "reference"])
def test_the_setting_kernel(kernel, one_pass):
    """What was asked for by name runs; the other names are of sparse prefill."""
    case = Case([0], 70, **{"original_max_position_embeddings": 10**9, "kernel": kernel})
    layout = case.layout()
    assert (layout.reach is None) == (kernel in ("sdpa", "reference"))
    case.check(lambda case, scale: attend(case.q, Tensors(case.keys, case.v), layout, scale))
    assert bool(one_pass) == (layout.reach is not None)


@pytest.mark.parametrize("temperature", ["position", True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_temperature_is_that_of_the_dense_path(temperature, tokens, one_pass, monkeypatch):
    config = {"original_max_position_embeddings": 20, "attention_temperature": temperature}
    case = Case([0, 30, 97], 100, tokens, **config)
    found = attend(case.q, Tensors(case.keys, case.v), case.layout(), 0.3)
    assert one_pass
    monkeypatch.setattr(layouts, "why_not", why_not)
    dense = case.layout()
    assert dense.reach is None
    torch.testing.assert_close(found, attend(case.q, Tensors(case.keys, case.v), dense, 0.3), atol=1e-5, rtol=1e-5)


def test_prompts_and_gradients_keep_the_dense_path(one_pass):
    case = Case([0], 8, 8, original_max_position_embeddings=9)
    assert case.layout().reach is None  # fills an empty cache
    case = Case([0], 70, original_max_position_embeddings=9)
    how = {"settings": case.settings, "rotary": case.rotary, "dtype": case.q.dtype, "device": case.q.device}
    assert make_layout(case.call, 69, 70, **how, mode="train").reach is None
    assert make_layout(case.call, 69, 70, **how, weights=True).reach is None
    assert make_layout(case.call, 69, 70, **how, mode="decode").reach is not None


def test_a_layout_moves_with_its_reach(one_pass):
    moved = Case([0], 70).layout().to("meta")
    assert {x.device.type for x in moved.reach[:-1]} == {"meta"} == {moved.tables.keys.cos.device.type}


# --- the cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 56, 128])
def test_two_programs_fit_into_a_multiprocessor(shared, itemsize, head_dim, rows):
    size = sizes(shared << 10, itemsize, head_dim, rows)
    width = 1 << (head_dim - 1).bit_length()
    copied = 2 * (size.stages - 1) * size.keys * width * itemsize
    assert copied <= shared << 9
    assert size.rows in (16, 32, 64) and size.keys in (16, 32, 64)


def test_splits_fill_the_device_and_know_no_lengths():
    assert split_count(264, 4, 1_000_000) == 66  # 7B on 132 multiprocessors
    assert split_count(264, 64, 1_000_000) == 4
    assert split_count(264, 1000, 1_000_000) == 1
    assert split_count(264, 1, 1_000_000) == 128
    assert split_count(264, 4, 1) == 1
    assert len({split_count(264, 4, room) for room in range(1, 40_000)}) <= 8


# --- whole models -------------------------------------------------------------------------------------------------


def tokens_of(model, ids, mask=None, **how):
    mask = torch.ones_like(ids) if mask is None else mask
    # transformers 4.57 drafts with an end of text only
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": 96, **how}
    return model.generate(ids, attention_mask=mask, **how).tolist()


@pytest.mark.parametrize("one_pass", [KERNEL], indirect=True)
def test_a_model_on_the_kernel(one_pass, monkeypatch):
    model = patch_qwen(tiny_model(head_dim=16))
    ids, mask = torch.randint(1, 97, (2, 94)), torch.ones(2, 95, dtype=torch.long)
    mask[1, :50] = 0

    def logits():
        with torch.no_grad():
            cache = cache_of(model(ids, attention_mask=mask[:, :94], use_cache=True))
            return model(ids[:, :1], attention_mask=mask, **cache_argument(cache)).logits

    found = logits()
    assert len(one_pass) == 2
    monkeypatch.setattr(layouts, "why_not", why_not)
    torch.testing.assert_close(found, logits(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": 0}])
def test_generate_gives_the_same_tokens(family, how, one_pass, monkeypatch):
    """Padded rows and beams; and drafts, which come several at a time, across the border of a chunk."""
    model = patch_qwen(tiny_model(family, head_dim=16))
    ids = torch.randint(1, 97, (1 if "prompt_lookup_num_tokens" in how else 3, 90))
    ids[:, 40:80] = ids[:, :40]
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :20], mask[2, :85] = 0, 0
    found = tokens_of(model, ids, mask, do_sample=False, **how)
    assert len(one_pass) >= 2 * (3 if "prompt_lookup_num_tokens" in how else 11)
    monkeypatch.setattr(layouts, "why_not", why_not)
    assert found == tokens_of(model, ids, mask, do_sample=False, **how)


def test_a_compiled_model(one_pass, monkeypatch):
    model = patch_qwen(tiny_model(head_dim=16))
    ids = torch.randint(1, 97, (2, 94))

    def logits(run):
        with torch.no_grad():
            cache = cache_of(model(ids, use_cache=True))
            return run(ids[:, :1], **cache_argument(cache)).logits

    found = logits(torch.compile(model, backend="eager"))
    assert one_pass
    monkeypatch.setattr(layouts, "why_not", why_not)
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)


def test_a_foreign_cache_is_read_as_it_is(one_pass):
    """Static, dynamic: with free room behind the tokens or none."""
    model = tiny_model(head_dim=16)
    ids = torch.randint(1, 97, (2, 30))
    with patched_qwen(model):
        wanted = tokens_of(model, ids)
        assert wanted == tokens_of(model, ids, cache_implementation="static")
        assert wanted == tokens_of(model, ids, cache_implementation="dynamic")
    assert one_pass


class Counted(BaseStreamer):
    """Counts transfers to the host that our files ask for, a token at a time."""

    def __init__(self, patch):
        self.asked, self.by_token = collections.Counter(), []
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, stock):
        def counted(tensor, *args, **kwargs):
            frame = traceback.extract_stack(limit=2)[0]
            if "transformers" not in frame.filename:
                self.asked[f"{frame.filename}:{frame.lineno}"] += 1
            return stock(tensor, *args, **kwargs)

        return counted

    def put(self, value):
        self.by_token.append(dict(self.asked))
        self.asked.clear()

    def end(self):
        pass


def test_a_decoded_token_asks_the_device_for_nothing(one_pass, monkeypatch):
    """Where the rows of a padded batch begin is read with the prompt and the first token, and known from then on."""
    model = patch_qwen(tiny_model(head_dim=16))
    ids = torch.randint(1, 97, (3, 90))
    mask = torch.ones_like(ids)
    mask[1, :20], mask[2, :85] = 0, 0
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        tokens_of(model, ids, mask, do_sample=False, streamer=counted)
    assert any(counted.by_token[1:3])  # it does count
    assert not any(counted.by_token[3:]), counted.by_token[3:]


# --- true shapes --------------------------------------------------------------------------------------------------


def beginner(q, k, v, reach, scale):
    """One query after all keys, as a beginner writes it, in the dtype of the tensors."""
    parts = []
    for segment in range(3):
        start, stop = reach.ranges[0, 0, segment].tolist()
        rotated = rotate(q, Rotation(reach.cos[segment].to(q.dtype), reach.sin[segment].to(q.dtype)))
        parts.append(torch.einsum("ngd,snd->ngs", rotated.unflatten(2, (k.shape[2], -1))[0, 0], k[0, start:stop]))
    ranges = reach.ranges[0, 0].tolist()
    logits = torch.cat(parts, -1) * (scale * reach.heat.item())
    values = torch.cat([v[0, start:stop] for start, stop in ranges])
    return torch.einsum("ngs,snd->ngd", logits.softmax(-1), values).flatten(0, 1)[None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 131_072, 1_000_000])
def test_qwen_7b(length, capsys):
    """28 heads on 4, head dim 128, bf16: its error, and how fast it reads."""
    case = Case([0], 9, heads=(28, 4), head_dim=128, dtype=torch.bfloat16, device="cuda")
    case.settings = LongContextConfig(262_144, 8192, 262_144)
    case.call, case.end = read_call(None, None, batch=1, tokens=1, cached=length - 1), length
    q, reach = case.q, case.reach()
    copies = max(1, (1 << 29) // (length * 4 * 128 * 4))  # more than the second-level cache holds
    held = [torch.randn(2, 1, length + 7, 4, 128, device="cuda", dtype=q.dtype) for _ in range(copies)]
    k, v = held[0]
    true = beginner(q.double(), k.double(), v.double(), reach, 128**-0.5)
    plain = beginner(q, k, v, reach, 128**-0.5)
    found = decode(q, k, v, reach, scale=128**-0.5)
    allowed = 2 * (plain - true).abs().max() + 2 * torch.finfo(q.dtype).eps * true.abs().max()
    assert (found - true).abs().max() <= allowed

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # until all launches are queued
    start.record()
    for one in held * 3:
        decode(q, *one, reach, scale=128**-0.5)
    stop.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(stop) / 1000 / (3 * copies)
    rate = length * 4 * 128 * 4 / seconds / 1e9
    with capsys.disabled():
        print(f"\n{length} keys: {1e6 * seconds:.1f} us a layer, {rate:.0f} GB/s")


@pytest.mark.gpu
def test_a_sequence_that_grows_compiles_nothing():
    kernel = ops_decode._decode
    case = Case([0, 30], 400, device="cuda", dtype=torch.bfloat16)
    by("kernel")(case, 0.3)
    if not hasattr(kernel, "device_caches"):
        pytest.skip("this Triton keeps its kernels elsewhere")
    before = sum(len(one[0]) for one in kernel.device_caches.values())
    for end in (9, 63, 64, 65, 256, 399):
        case.end, case.call = end, read_call(None, None, batch=2, tokens=1, cached=end - 1)
        by("kernel")(case, 0.3)
    assert sum(len(one[0]) for one in kernel.device_caches.values()) == before
