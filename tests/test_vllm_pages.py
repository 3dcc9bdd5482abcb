"""What the plugin for vLLM computes without vLLM: pieces, pages, attention over them, settings and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from definition import dual_chunk_attention, rotated
from qwen_longctx import LongContextConfig
from qwen_longctx import vllm as plugin
from qwen_longctx.errors import MissingPackage
from qwen_longctx.geometry.positions import spans
from qwen_longctx.vllm.attention import Decoding, Layer, Reaches, attend, lay_out, paged_attention
from qwen_longctx.vllm.pages import KINDS, cut, positions, segment_table
from qwen_longctx.vllm.settings import DualChunk, refuse_engine, settings_of, uses_dual_chunk

SECTION = {"chunk_size": 24, "local_size": 8, "original_max_position_embeddings": 20}
STRIDE, PAGE = 16, 4
REQUESTS = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 50)), min_size=1, max_size=6)


def config(**values):
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    sizes = {"head_dim": 8, "max_position_embeddings": 20, "num_attention_heads": 4, "num_hidden_layers": 3}
    base = {"model_type": "qwen2", "rope_parameters": rope, "dual_chunk_attention_config": dict(SECTION), **sizes}
    return SimpleNamespace(**{**base, **values})


def engine(cache_dtype="auto", **parallel):
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache_dtype), parallel_config=SimpleNamespace(**parallel)
    )


class Batch:
    """Requests as an engine lays them: `before` tokens are cached, `new` are this step's queries."""

    def __init__(self, requests, page=PAGE):
        self.requests, self.page = requests, page
        self.starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0).int()
        self.lengths = torch.tensor([before + new for before, new in requests]).int()
        self.longest = max(1, int(self.lengths.max()))
        self.width = -(-self.longest // page)
        pages = torch.randperm(len(requests) * self.width, generator=torch.Generator().manual_seed(1))
        self.table = pages.view(len(requests), self.width).int()

    def step(self, settings, longest=None, host=None, dtype=torch.float64, plan=None, padding=0):
        return lay_out(
            plan,
            settings.geometry,
            settings.inv_freq(self.starts.device),
            self.starts,
            self.starts if host is None else host,
            self.lengths,
            rows=int(self.starts[-1]) + padding,
            dtype=dtype,
            **self.size(longest),
        ).on(self.table, self.page)

    def size(self, longest=None):
        return {"longest": longest or self.longest, "most_queries": max(1, *(new for _, new in self.requests), 1)}


@given(REQUESTS, st.booleans())
def test_pieces_are_the_spans_of_each_request(requests, late):
    """As `spans` cuts them on the host, also where the host believes that a request has more queries than it has."""
    batch = Batch(requests)
    host = torch.tensor([0, *(new + 3 * late for _, new in requests)]).cumsum(0).int() if late else batch.starts
    pieces = cut(batch.starts, host, batch.lengths, STRIDE)
    assert pieces.rows.dtype == torch.int32 and pieces.rows[0] == 0 and pieces.rows[-1] == batch.starts[-1]
    wanted = []
    for number, (before, new) in enumerate(requests):
        for span in spans(before, before + new, STRIDE):
            begin = int(batch.starts[number]) + span.start - before
            keys = {kind: stop - start for kind, start, stop in span.segments}
            wanted.append((number, begin, begin + span.stop - span.start, span.start // STRIDE, keys))
    found = []
    for piece in range(len(pieces.owner)):
        begin, end = int(pieces.rows[piece]), int(pieces.rows[piece + 1])
        keys = {kind: int(pieces.keys[kind][piece]) for kind in KINDS if pieces.keys[kind][piece]}
        if begin == end:
            assert not keys
        else:
            found.append((int(pieces.owner[piece]), begin, end, int(pieces.chunk[piece]), keys))
    assert found == wanted
    assert pieces.whole == all(new + 3 * late <= 1 for _, new in requests)


@given(REQUESTS, st.integers(0, 5))
def test_positions_of_rows(requests, padding):
    batch = Batch(requests)
    found = positions(batch.starts, batch.lengths, int(batch.starts[-1]) + padding)
    wanted = [p for before, new in requests for p in range(before, before + new)]
    assert found[: len(wanted)].tolist() == wanted and len(found) == len(wanted) + padding and (found >= 0).all()


@given(REQUESTS)
def test_tables_list_the_pages_of_each_segment(requests):
    batch = Batch(requests)
    pieces = cut(batch.starts, batch.starts, batch.lengths, STRIDE)
    for kind in KINDS:
        most = max(1, int(pieces.keys[kind].max()))
        table = segment_table(batch.table, pieces, kind, stride=STRIDE, page_size=PAGE, longest=most)
        assert table.dtype == torch.int32 and table.shape == (len(pieces.owner), -(-most // PAGE))
        for piece, count in enumerate(pieces.keys[kind].tolist()):
            chunk = int(pieces.chunk[piece])
            first = {"intra": chunk, "successive": chunk - 1, "inter": 0}[kind] * STRIDE
            own = batch.table[pieces.owner[piece], first // PAGE : -(-(first + count) // PAGE)]
            assert table[piece, : -(-count // PAGE)].tolist() == own.tolist()


def paged(batch, keys, values):
    """Keys and values of each request in its pages; what no request owns is NaN, and must not be read."""
    heads, dim = keys[0].shape[1:]
    pages = torch.full((batch.table.numel(), heads, batch.page, 2 * dim), torch.nan, dtype=torch.float64)
    for request, (k, v) in enumerate(zip(keys, values, strict=True)):
        place = torch.arange(len(k))
        pages[batch.table[request, place // batch.page], :, place % batch.page] = torch.cat((k, v), -1)
    return pages


def attended(q, step, pages, layer=0):
    return attend(q, step, lambda q, segment: paged_attention(q, pages, segment, 0.3), Layer(pages, 0.3, layer))


MIXED = [(0, 50), (47, 1), (13, 4), (0, 0), (31, 2), (15, 18)]  # across several borders


@pytest.mark.parametrize(
    ("requests", "heat"),
    [
        ([(0, 5), (3, 1), (0, 12)], "position"),  # below one chunk
        ([(60, 1), (3, 1), (31, 1), (16, 1)], "position"),  # decoding
        (MIXED, "position"),
        (MIXED, False),
    ],
)
def test_attention_on_pages_is_that_of_the_definition(requests, heat):
    settings = settings_of(config(dual_chunk_attention_config={**SECTION, "attention_temperature": heat}))
    batch = Batch(requests)
    rows, pages, wanted = defined(batch, settings)
    for longest in (batch.longest, 200):  # an engine may give an upper bound
        out = attended(rows, batch.step(settings, longest=longest), pages)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)


def defined(batch, settings):
    """Random queries of a batch, pages of its keys and values, and what the definition makes of them, in float64."""
    generator, requests = torch.Generator().manual_seed(3), batch.requests
    inv_freq = settings.inv_freq(torch.device("cpu"))
    drawn = [torch.randn(n, 8, 8, generator=generator, dtype=torch.float64) for n in batch.lengths.tolist()]
    keys, values, queries = ([x[:, part] for x in drawn] for part in (slice(2), slice(2, 4), slice(4, 8)))
    turned = [k.clone() for k in keys]
    for k in turned:
        for place in range(len(k)):
            for head in range(2):
                k[place, head] = rotated(k[place, head], place % STRIDE, inv_freq)
    pages = paged(batch, turned, values)
    rows = torch.cat([q[before:] for q, (before, _) in zip(queries, requests, strict=True)])
    wanted = []
    for q, k, v, (before, _) in zip(queries, keys, values, requests, strict=True):
        factors = torch.tensor([settings.geometry.temperature(p + 1) for p in range(len(q))], dtype=torch.float64)
        wanted.append(dual_chunk_attention(q * factors[:, None, None], k, v, inv_freq, 24, 8, 0.3)[before:])
    return rows, pages, torch.cat(wanted)


@pytest.mark.parametrize("heat", ["position", False])
def test_decoded_tokens_are_those_of_the_definition(heat):
    """Of requests at all borders of chunks, in memory that stays where it is, with requests of nothing behind them."""
    settings = settings_of(config(dual_chunk_attention_config={**SECTION, "attention_temperature": heat}))
    inv_freq = settings.inv_freq(torch.device("cpu"))
    reaches = Reaches(settings.geometry, inv_freq, 9, torch.float64)
    places = []
    for cached in ([0, 1, 14, 15, 16, 17, 30], [31, 32, 33], [47, 48, 79, 80]):
        batch = Batch([(before, 1) for before in cached])
        rows, pages, wanted = defined(batch, settings)
        lengths = torch.cat((batch.lengths, torch.zeros(2, dtype=torch.int32)))
        reach = reaches.of(lengths)
        places.append([x.data_ptr() for x in reach[:-1]])
        table = torch.cat((batch.table, torch.full((2, batch.width), -1, dtype=torch.int32)))
        step = Decoding(reach, batch.table[:0]).on(table, PAGE)
        out = attended(torch.cat((rows, torch.ones(2, 4, 8, dtype=torch.float64))), step, pages)
        torch.testing.assert_close(out[: len(rows)], wanted, atol=1e-7, rtol=1e-7)  # heat is float32
        assert not out[len(rows) :].any()
    assert places[0] == places[1] == places[2]


def test_a_step_below_one_chunk_is_one_causal_call():
    step = Batch([(0, 5), (15, 1)]).step(settings_of(config()))
    assert step.kinds == ("intra",) and list(step.segments) == ["intra"]
    assert step.segments["intra"].keys.tolist() == [5, 16] and step.segments["intra"].causal
    assert Batch([(0, 5), (16, 1)]).step(settings_of(config())).kinds == ("intra", "successive")
    far = Batch([(60, 1)]).step(settings_of(config())).segments
    assert {kind: one.most_keys for kind, one in far.items()} == {"intra": 16, "successive": 16, "inter": 32}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_type": "llama"}, NotImplementedError, "is for models of the types qwen2"),
        ({"sliding_window": 8, "use_sliding_window": True}, ValueError, "sliding-window layers"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}}, ValueError, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}}, ValueError, "no rope_theta"),
        ({"dual_chunk_attention_config": 3}, TypeError, "must be a mapping"),
        ({"dual_chunk_attention_config": {}}, ValueError, "lacks chunk_size, local_size, original_max"),
        ({"dual_chunk_attention_config": {**SECTION, "chunk": 3}}, TypeError, "unknown key 'chunk'"),
        ({"dual_chunk_attention_config": {**SECTION, "local_size": 24}}, ValueError, "must be smaller than chunk_size"),
        (
            {"dual_chunk_attention_config": {**SECTION, "attention_temperature": True}},
            NotImplementedError,
            "which the engine does not know",
        ),
        (
            {"dual_chunk_attention_config": {**SECTION, "attention_temperature": "prompt"}},
            TypeError,
            "True, False or 'position'",
        ),
    ],
)
def test_checkpoints_that_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        settings_of(config(**values))


def test_settings_of_a_checkpoint():
    settings = settings_of(config())
    assert settings == DualChunk(LongContextConfig(**SECTION, sparse="off"), 10000.0, 8)
    assert settings.geometry.stride == STRIDE and settings.geometry.attention_temperature == "position"
    assert uses_dual_chunk(config()) and not uses_dual_chunk(SimpleNamespace())
    assert not uses_dual_chunk(config(dual_chunk_attention_config=None))


def test_pages_across_the_border_of_chunks_are_refused():
    settings = settings_of(config())
    for page_size in (4, 16):
        settings.check_page_size(page_size)
    with pytest.raises(ValueError, match="pages of 32 tokens do not divide the 16 tokens.*--block-size 16"):
        settings.check_page_size(32)
    odd = settings_of(config(dual_chunk_attention_config={**SECTION, "chunk_size": 28}))
    with pytest.raises(ValueError, match="pages of 16 tokens do not divide the 20 tokens.*choose another local_size"):
        odd.check_page_size(16)


def test_engines_that_are_refused():
    for fine in (engine(), engine("bfloat16", decode_context_parallel_size=1), engine(torch.bfloat16)):
        refuse_engine(fine)
    for dtype in ("fp8", "fp8_e5m2", "int8_per_token_head", "nvfp4"):
        with pytest.raises(NotImplementedError, match=f"the KV cache is '{dtype}': start vLLM with --kv-cache-dtype"):
            refuse_engine(engine(dtype))
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        with pytest.raises(NotImplementedError, match=f"{option} 2 spreads the keys"):
            refuse_engine(engine(**{option: 2}))


@pytest.mark.parametrize("version", ["0.25.1", "0.9", "0.26.0rc1.dev1", "0.26.0", "0.33.0+cpu", "1.0", "dev"])
def test_versions_of_vllm(version):
    if version.startswith(("0.25", "0.9")):
        with pytest.raises(MissingPackage, match=f"needs vLLM 0.26 or newer, found {version}"):
            plugin.check_version(version)
    else:
        plugin.check_version(version)
