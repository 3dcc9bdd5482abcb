"""Sparse prefill in the plugin for vLLM, without vLLM: against the library's own attention on plain tensors."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from definition import dual_chunk_attention
from qwen_longctx.attention import dense
from qwen_longctx.checkpoint import Heads
from qwen_longctx.geometry.layout import Call, RotarySource, make_layout
from qwen_longctx.geometry.positions import key_positions
from qwen_longctx.geometry.rotary import rotate, rotation
from qwen_longctx.kv.store import Tensors
from qwen_longctx.sparsity import SparseState, plan_request
from qwen_longctx.sparsity.record import SpanRecord
from qwen_longctx.vllm.settings import settings_of
from qwen_longctx.vllm.sparse import Plan, RecallLog, SparsePrefill, on_host
from test_vllm_pages import Batch, attended, config, paged

SECTION = {"chunk_size": 96, "local_size": 32, "original_max_position_embeddings": 80}
STRIDE, TILE, THRESHOLD = 64, 32, 100
CPU = torch.device("cpu")
BUDGETS = [{str(head): ["vertical_and_slash", 40 + 3 * head, 110 + 7 * head, 0.5] for head in range(4)}] * 3
RULES = [
    {"sparse": "block_scores", "density": 0.3},
    {"sparse": "block_scores"},
    {"sparse": "exact_shares", "mass": 0.6},
    {"sparse": "vertical_slash", "sparse_attention_config": BUDGETS},
]
LONG = [(0, 230), (200, 1), (101, 97), (64, 128), (0, 40), (0, 0), (320, 96)]


def prefill(heads=None, step=500, **section):
    """Settings, a config and the plan maker of a process with some of its heads."""
    section = {**SECTION, "block_size": TILE, "sparse_attention_threshold": THRESHOLD, "last_q": 20, **section}
    section["sparse_attention_last_q"] = section.pop("last_q")
    model = config(dual_chunk_attention_config=section)
    dual = settings_of(model).in_steps_of(step)
    return dual, model, SparsePrefill(dual, model, heads or Heads(4, 2), CPU, torch.float64)


class Numbers:
    """Queries, keys and values of the requests of a batch, the keys rotated as they are cached."""

    def __init__(self, batch, dual):
        generator = torch.Generator().manual_seed(int(batch.lengths.sum()))
        drawn = [torch.randn(n, 8, 8, generator=generator, dtype=torch.float64) for n in batch.lengths.tolist()]
        self.keys, self.values, self.queries = (
            [x[:, part] for x in drawn] for part in (slice(2), slice(2, 4), slice(4, 8))
        )
        inv_freq = dual.inv_freq(CPU)
        tables = [
            rotation(key_positions(torch.arange(len(k)), STRIDE)[None], inv_freq, 1.0, torch.float64) for k in self.keys
        ]
        self.cached = [rotate(k[None], table)[0] for k, table in zip(self.keys, tables, strict=True)]
        self.pages = paged(batch, self.cached, self.values)
        self.rows = torch.cat([q[before:] for q, (before, _) in zip(self.queries, batch.requests, strict=True)])


def by_the_library(batch, numbers, dual, model, heads, layer):
    """Each request as a call of its own on plain tensors; the results, and the states of those that were sparse."""
    outs, states = [], []
    for (before, new), q, k, v in zip(batch.requests, numbers.queries, numbers.cached, numbers.values, strict=True):
        end, state = before + new, SparseState()
        request = plan_request(
            dual.settings, model, heads=lambda: heads, device=CPU, dtype=torch.float64, state=state, length=end
        )
        layout = make_layout(
            Call.whole(1, new, before),
            before,
            end,
            settings=dual.settings,
            rotary=RotarySource(dual.inv_freq(CPU), 1.0),
            dtype=torch.float64,
            device=CPU,
            mode="prefill",
            sparse=request,
        )
        outs.append(dense.attend(q[before:][None], Tensors(k[None], v[None]), layout, 0.3, layer)[0])
        states += [state] if state.records else []
    return torch.cat(outs), states


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 180), st.integers(0, 160)), min_size=1, max_size=4),
    st.sampled_from([4, 16, 32, 64]),
    st.sampled_from(RULES),
    st.integers(0, 2),
)
@example(LONG, 16, RULES[0], 1)
@example(LONG, 64, RULES[1], 0)
@example(LONG, 4, RULES[3], 2)
@example([(0, 300)], 32, RULES[0], 0)  # no other request
def test_pages_are_attended_to_as_tensors_are(requests, page, rule, layer):
    """Parts of long prompts, short requests and decoding in one step, by every rule."""
    dual, model, sparse = prefill(**rule)
    batch, heads = Batch(requests, page), Heads(4, 2)
    if not int(batch.starts[-1]):
        return
    numbers = Numbers(batch, dual)
    plan = sparse.plan(batch.starts, batch.lengths, **batch.size())
    out = attended(numbers.rows, batch.step(dual, plan=plan), numbers.pages, layer)
    wanted, states = by_the_library(batch, numbers, dual, model, heads, layer)
    torch.testing.assert_close(out, wanted, atol=1e-11, rtol=1e-11)
    found = [part.layout.sparse.state for part in plan.parts] if plan else []
    for ours, theirs in zip([state for state in found if state.records], states, strict=True):
        assert [(r.layer, r.start, r.stop, int(r.kept), r.pairs) for r in ours.records] == [
            (r.layer, r.start, r.stop, int(r.kept), r.pairs) for r in theirs.records
        ]
        torch.testing.assert_close(ours.records[0].recall, theirs.records[0].recall)
        assert sum(r.pairs for r in ours.dense) == sum(r.pairs for r in theirs.dense)


@pytest.mark.parametrize("requests", [[(0, 200), (90, 1)], [(0, 200)]])
def test_rows_of_padding_change_nothing(requests):
    """An engine may have more rows than its requests own, and look at none of them."""
    dual, _, sparse = prefill(**RULES[0])
    batch = Batch(requests, 16)
    numbers = Numbers(batch, dual)
    plan = sparse.plan(batch.starts, batch.lengths, **batch.size())
    wanted = attended(numbers.rows, batch.step(dual, plan=plan), numbers.pages)
    padded = torch.cat((numbers.rows, torch.full((5, 4, 8), torch.nan, dtype=torch.float64)))
    plan = sparse.plan(batch.starts, batch.lengths, **batch.size())
    out = attended(padded, batch.step(dual, plan=plan, padding=5), numbers.pages)
    assert torch.equal(out[:-5], wanted)


def test_some_of_it_is_sparse():
    """That the test above compares what it says: of `LONG` four requests are parts of long prompts."""
    dual, _, sparse = prefill(density=0.3, sparse="block_scores")
    batch = Batch(LONG)
    plan = sparse.plan(batch.starts, batch.lengths, **batch.size())
    assert [part.number for part in plan.parts] == [0, 2, 3, 6] and plan.longest == 416
    assert plan.queries == (64, 1, 64, 64, 40, 0, 64)  # two tiles at the end of a part
    assert [(part.end[0].start, part.end[-1].stop) for part in plan.parts] == [
        (166, 230),
        (134, 198),
        (128, 192),
        (352, 416),
    ]
    numbers = Numbers(batch, dual)
    attended(numbers.rows, batch.step(dual, plan=plan), numbers.pages)
    states = [part.layout.sparse.state for part in plan.parts]
    # of the second, the border of a chunk leaves less than a tile beside the end that attends to everything
    assert [len(state.records) for state in states] == [3, 0, 1, 1] and 0.3 < on_host(states).density() < 0.9


@pytest.fixture(scope="module")
def defined():
    """A part of a long prompt in its second chunk and a short request, and what the definition says of them."""
    batch, dual = Batch([(64, 100), (30, 1)], 16), prefill()[0]
    numbers, wanted = Numbers(batch, dual), []
    for q, k, v, (before, _) in zip(numbers.queries, numbers.keys, numbers.values, batch.requests, strict=True):
        factors = torch.tensor([dual.geometry.temperature(p + 1) for p in range(len(q))], dtype=torch.float64)
        heated = q * factors[:, None, None]
        wanted.append(dual_chunk_attention(heated, k, v, dual.inv_freq(CPU), 96, 32, 0.3)[before:])
    return batch, numbers, torch.cat(wanted)


EVERYTHING = [{str(head): ["vertical_and_slash", 10_000, 10_000, 1.0] for head in range(4)}] * 3


@pytest.mark.parametrize(
    "rule",
    [
        {"sparse": "block_scores", "density": 1.0},
        {"sparse": "vertical_slash", "sparse_attention_config": EVERYTHING},
    ],
)
def test_budgets_of_everything_are_dense(rule, defined):
    """The float64 definition, where every block, or every column, is kept."""
    batch, numbers, wanted = defined
    dual, _, sparse = prefill(**rule, step=64)
    plan = sparse.plan(batch.starts, batch.lengths, **batch.size())
    out = attended(numbers.rows, batch.step(dual, plan=plan), numbers.pages)
    torch.testing.assert_close(out, wanted, atol=1e-10, rtol=1e-10)
    assert len(plan.parts) == 1 and plan.parts[0].layout.sparse.state.records


def test_a_rank_takes_its_own_budgets():
    """Two processes with half of the heads each give what one gives."""
    batch = Batch([(0, 200), (90, 1)], 16)
    dual, _, whole = prefill(**RULES[3])
    numbers = Numbers(batch, dual)
    step = batch.step(dual, plan=whole.plan(batch.starts, batch.lengths, **batch.size()))
    wanted = attended(numbers.rows, step, numbers.pages, 1)
    for rank in range(2):
        _, _, own = prefill(Heads(2, 1, 2 * rank), **RULES[3])
        step = batch.step(dual, plan=own.plan(batch.starts, batch.lengths, **batch.size()))
        own_heads = slice(2 * rank, 2 * rank + 2)
        pages = numbers.pages[:, rank : rank + 1].contiguous()
        out = attended(numbers.rows[:, own_heads].contiguous(), step, pages, 1)
        torch.testing.assert_close(out, wanted[:, own_heads], atol=1e-11, rtol=1e-11)


UNREAD = None  # no tensor: reading lengths waits for the device


@pytest.mark.parametrize(
    ("section", "size"),
    [
        ({"sparse": "off"}, {"longest": 10_000, "most_queries": 5_000}),
        ({"sparse": "auto"}, {"longest": 10_000, "most_queries": 5_000}),  # no fast kernel takes lists here
        ({"sparse": "block_scores"}, {"longest": 10_000, "most_queries": 95}),  # decoding, drafts, short parts
        ({"sparse": "block_scores"}, {"longest": 100, "most_queries": 96}),  # short prompts
    ],
)
def test_other_steps_wait_for_nothing(section, size):
    assert prefill(**section)[2].plan(UNREAD, UNREAD, **size) is None


def test_bounds_of_different_requests_make_no_plan():
    sparse = prefill(sparse="block_scores")[2]
    batch = Batch([(500, 1), (0, 100)])
    assert sparse.plan(batch.starts, batch.lengths, **batch.size()) is None
    batch = Batch([(500, 1), (1, 100)])
    assert [part.number for part in sparse.plan(batch.starts, batch.lengths, **batch.size()).parts] == [1]


def test_nothing_outlives_a_step():
    """Budgets are those of the rule, whatever an earlier step recalled; heads are measured in turn by position."""
    dual, _, sparse = prefill(sparse="block_scores", fidelity="fast")
    batch = Batch([(1000, 200)])
    (part,) = sparse.plan(batch.starts, batch.lengths, **batch.size()).parts
    (again,) = sparse.plan(batch.starts, batch.lengths, **batch.size()).parts
    request = part.layout.sparse
    assert request.recall_target is None and request.budget(0) is None
    assert request.state is not again.layout.sparse.state and not again.layout.sparse.state.records
    assert request.prompt.times_trained == 1200 / 80
    assert request.state.turns == dict.fromkeys(range(3), 2)  # the third step of 500 tokens
    far = {request.measured(layer, 1 << 20, 4).start for layer in range(4)}
    assert request.measured(0, 200, 4) == slice(0, 4) and len(far) > 1


def test_room_for_the_longest_prompt():
    """What a layer takes is more than its keys, and nothing where nothing is sparse."""
    assert prefill(sparse="off")[2].room(10_000) == 0 and prefill(sparse="block_scores")[2].room(100) == 0
    sparse = prefill(sparse="block_scores")[2]
    keys = 2 * 2 * 8 * 8  # keys and values of two heads, float64
    few, many = sparse.room(10_000), sparse.room(1_000_000)
    assert few > 10_000 * keys and many > 1_000_000 * keys and many - few > 990_000 * keys


def test_settings_of_sparse_prefill(tmp_path):
    def found(**section):
        return settings_of(config(dual_chunk_attention_config={**SECTION, **section})).settings

    assert found().sparse == "off"
    assert found(sparse_attention_enabled=False).sparse == "off"
    # the sections of Qwen2.5-1M, with the budgets that vLLM puts there
    shipped = {"sparse_attention_enabled": True, "sparse_attention_threshold": 77, "sparse_attention_last_q": 9}
    settings = found(**shipped, sparse_attention_config={"0": BUDGETS[0], "1": BUDGETS[0], "2": BUDGETS[0]})
    assert (settings.sparse, settings.sparse_attention_threshold, settings.last_q) == ("auto", 77, 9)
    assert found(**shipped, sparse="off").sparse == "off"
    assert found(sparse_attention_config=BUDGETS).sparse == "auto"  # as in vLLM while it had this attention
    assert found(sparse_attention_config=BUDGETS, sparse_attention_enabled=False).sparse == "off"
    settings = found(sparse="block_scores", mass=0.7, density=0.5, kernel="flex", block_size=32)
    assert (settings.mass, settings.density, settings.kernel, settings.tile) == (0.7, 0.5, "flex", 32)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"sparse": "blocks"}, ValueError, "sparse must be one of off, auto, block_scores"),
        ({"sparse_attention_enabled": 1}, TypeError, "sparse_attention_enabled must be true or false, got 1"),
        ({"sparse_attention_threshold": 0}, ValueError, "sparse_attention_threshold must be at least 1"),
        ({"sparse": "block_scores", "fidelity": "exact"}, ValueError, "fidelity must be one of fast, balanced"),
        ({"sparse": "block_scores", "density": 2}, ValueError, "density must lie between 0 and 1, got 2"),
        ({"sparse": "vertical_slash", "density": 0.1}, ValueError, "density is a setting of block_scores"),
        ({"sparse": "block_scores", "block_size": 48}, ValueError, "a power of 2 from 32 on"),
        ({"sparse": "block_scores", "kernel": "sdpa"}, ValueError, "takes no block lists"),
        ({"sparse": "block_scores", "recall_target": 0.5}, NotImplementedError, "keeps nothing between them"),
        ({"prefill_chunk_size": 5}, TypeError, "unknown key 'prefill_chunk_size'.*fidelity"),
        ({"sparse": "vertical_slash", "sparse_attention_config": [{}]}, ValueError, "must list 3 layers"),
        ({"sparse": "vertical_slash", "sparse_attention_enabled": True}, FileNotFoundError, "needs the budgets"),
    ],
)
def test_settings_that_are_refused(section, error, message):
    with pytest.raises(error, match=message):
        settings_of(config(dual_chunk_attention_config={**SECTION, **section}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs there")
def test_a_kernel_that_does_not_run_here_is_refused():
    with pytest.raises(ValueError, match='kernel="fa4"'):
        prefill(sparse="block_scores", kernel="fa4")


def state_of(recall, kept, layers=2):
    state = SparseState()
    for layer in range(layers):
        record = SpanRecord(layer, 0, 64, "reference", torch.tensor([recall]), torch.tensor(kept), 100)
        state.records.append(record)
    return state


def step_of(*states):
    parts = [SimpleNamespace(layout=SimpleNamespace(sparse=SimpleNamespace(state=state))) for state in states]
    return Plan(tuple(parts), (), 0)


def test_recall_is_told_after_a_prompt_and_now_and_then(caplog):
    now = [0.0]
    log = RecallLog("block_scores", lambda: now[0])
    with caplog.at_level(logging.INFO, "vllm.qwen_longctx"):
        log.step(step_of(state_of([0.9, 0.8], 10)))
        log.step(step_of(state_of([0.7, -1.0], 30)))  # the second head was not measured
        assert not caplog.messages
        log.step(None)
        assert caplog.messages == [
            "Sparse prefill (block_scores) kept 20.0 % of the blocks of its prompts, which hold a recall of 0.800 of "
            "the dense attention, and of 0.800 in the worst head"
        ]
        now[0] = 9.0
        log.step(step_of(state_of([0.5, 0.5], 10)))
        log.step(None)
        assert len(caplog.messages) == 1  # too soon
        now[0] = 10.0
        log.step(None)
        assert len(caplog.messages) == 2 and "kept 10.0 %" in caplog.messages[1]
        for now[0] in (20.0, 50.0, 79.0):
            log.step(step_of(state_of([0.5, 0.5], 10)))
        assert len(caplog.messages) == 2
        now[0] = 80.0
        log.step(step_of(state_of([0.5, 0.5], 10)))
        log.step(None)
        assert len(caplog.messages) == 3
        now[0] = 200.0
        log.step(step_of(SparseState()))
        log.step(None)
    assert len(caplog.messages) == 4  # the one that was left, and nothing of a step without records


@pytest.mark.parametrize(("recall", "message"), [(float("nan"), "not finite"), (1.5, "recalls 1.5")])
def test_a_broken_step_is_told(recall, message, caplog):
    log = RecallLog("block_scores", lambda: 0.0)
    with caplog.at_level(logging.INFO, "vllm.qwen_longctx"):
        log.step(step_of(state_of([recall, 0.5], 10)))
        log.step(None)
    assert [record.levelname for record in caplog.records] == ["ERROR"] and message in caplog.messages[0]


def test_it_is_announced_once_it_can_happen(caplog):
    with caplog.at_level(logging.INFO, "vllm.qwen_longctx"):
        prefill(sparse="off")[2].announce(10_000)
        prefill(sparse="block_scores")[2].announce(100)
        assert not caplog.messages
        prefill(sparse="block_scores")[2].announce(101)
    assert "Sparse prefill (block_scores) is on for prompts of more than 100 tokens" in caplog.messages[0]
