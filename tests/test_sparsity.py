"""Sparse prefill against per-token definitions: what is kept, what comes out, what was recalled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from qwen_longctx import ops, sparsity
from qwen_longctx.attention import sparse
from qwen_longctx.geometry.positions import Span
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.compact import compact
from qwen_longctx.ops.keep import keep
from qwen_longctx.sparsity import request
from qwen_longctx.sparsity.record import NOT_MEASURED, SparseState
from qwen_longctx.sparsity.rules import block_scores, exact_shares, vertical_slash
from qwen_longctx.sparsity.rules.rule import Rule
from qwen_longctx.sparsity.steering import steer
from qwen_longctx.sparsity.view import Selection
from sparse_helpers import STRIDE, all_logits, draw, kept_pairs, masked, prefill, settings

CPU = torch.device("cpu")
# prompts within one chunk, across several; chunks of prefill that end on tiles, off them, at and across the stride
CUTS = [[150], [192, 384, 500], [100, 240, 333, 600], [96, 640], [576]]
BUDGETS = [{str(head): ["vertical_and_slash", 35 + head, 110 + 9 * head, 0.9] for head in range(4)}] * 2
RULES = [
    {"sparse": "block_scores"},
    {"sparse": "block_scores", "density": 0.4},
    {"sparse": "block_scores", "mass": 0.7},
    {"sparse": "block_scores", "score_threshold": 0.3},
    {"sparse": "exact_shares", "density": 0.4},
    {"sparse": "vertical_slash", "sparse_attention_config": BUDGETS},
    {"sparse": "vertical_slash", "sparse_attention_config": BUDGETS, "recall_target": 0.8},
]


# --- what a tile sees and keeps -----------------------------------------------------------------------------------


@how(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 150), st.sampled_from([4, 8, 32]))
def test_tiles(start, length, size):
    stop = start + length
    tiles = Tiles.of(Span(start, stop, ()), size, CPU)
    pairs = 0
    for tile, (first, end) in enumerate(zip(tiles.starts.tolist(), tiles.stops.tolist(), strict=True)):
        assert (first, end) == (start + tile * size, min(start + (tile + 1) * size, stop))
        whole = [b for b in range(tiles.blocks) if (b + 1) * size - 1 <= first]
        seen = [b for b in range(tiles.blocks) if b * size <= end - 1]
        assert int(tiles.whole[tile]) == len(whole) and int(tiles.visible[tile]) == len(seen)
        assert tiles.sees()[tile].nonzero()[:, 0].tolist() == seen
        pairs += len(seen)
    assert tiles.pairs == pairs


def keep_by_hand(scores, first, end, size, amount, by, most, sink, window):
    """One tile, in Python."""
    seen = [b for b in range(len(scores)) if b * size <= end - 1]
    whole = [b for b in seen if (b + 1) * size - 1 <= first]
    always = [b for b in seen if b not in whole or b < sink or b >= len(whole) - window]
    if most >= len(seen) and (amount >= 1 if by == "mass" else amount <= 0):
        return set(seen)
    ranked = sorted((b for b in whole if b not in always and scores[b] > 0), key=lambda b: -scores[b])
    if by == "threshold":
        best = max((scores[b] for b in whole), default=0.0)
        ranked = [b for b in ranked if scores[b] >= amount * best]
    total = sum(scores[b] for b in whole)
    have = sum(scores[b] for b in always if b in whole)
    kept = set(always)
    for b in ranked:
        if len(kept) >= most or (by == "mass" and have >= amount * total):
            break
        kept.add(b)
        have += scores[b]
    return kept


@how(max_examples=80, deadline=None)
@given(
    st.integers(0, 90),
    st.integers(1, 40),
    st.sampled_from(["mass", "threshold"]),
    st.booleans(),
    st.integers(0, 2),
    st.one_of(st.none(), st.integers(0, 2)),  # none: another for each tile
    st.integers(0, 1 << 16),
)
def test_keep(start, length, by, limited, sink, window, seed):
    source = torch.Generator().manual_seed(seed)
    size = 8
    tiles = Tiles.of(Span(start, start + length, ()), size, CPU)
    shape = (3, len(tiles.starts))
    scores = torch.rand(2, *shape, tiles.blocks, dtype=torch.float64, generator=source) ** 3
    amount = torch.rand(shape, generator=source, dtype=torch.float64)
    amount[0] = float(by == "mass")  # everything, up to the limit
    most = torch.randint(0, 12, shape, dtype=torch.int32, generator=source) if limited else None
    window = torch.randint(0, 3, shape[1:], dtype=torch.int32, generator=source) if window is None else window
    found = keep(scores, tiles, amount, by=by, most=most, sink=sink, window=window)
    for b in range(2):
        for h in range(3):
            for t in range(shape[1]):
                ends = int(tiles.starts[t]), int(tiles.stops[t])
                limit = int(most[h, t]) if limited else 1000
                near = int(window if isinstance(window, int) else window[t])
                values = scores[b, h, t].tolist(), *ends, size, amount[h, t].item(), by, limit, sink, near
                assert set(found[b, h, t].nonzero()[:, 0].tolist()) == keep_by_hand(*values)


def best_blocks(scores, tiles, counts, **always):
    """The best `counts` blocks of each head, shape (heads,)."""
    most = counts.int()[:, None].expand(-1, len(tiles.starts))
    return keep(scores, tiles, torch.zeros(most.shape), by="threshold", most=most, **always)


def test_scores_of_zero_are_not_kept_to_fill_a_count():
    tiles = Tiles.of(Span(96, 104, ()), 8, CPU)
    scores = torch.zeros(1, 1, 1, tiles.blocks)
    scores[..., 5] = 1.0
    found = best_blocks(scores, tiles, torch.tensor([8]), sink=1, window=1)
    assert found[0, 0, 0].nonzero()[:, 0].tolist() == [0, 5, 11, 12]


# --- kernels on lists ---------------------------------------------------------------------------------------------


LIST_KERNELS = [
    ("reference", "cpu"),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("reference", "flex", "fa4")),
]


@pytest.mark.parametrize(("name", "device"), LIST_KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 128, 2, 2), (2, 300, 700, 4, 2), (1, 256, 1000, 6, 1), (1, 130, 131, 3, 3)])
@pytest.mark.parametrize(
    ("size", "dim", "dtype"),
    [
        *((128, 64, torch.bfloat16), (64, 64, torch.bfloat16), (64, 128, torch.bfloat16), (64, 256, torch.float16)),
        *((64, 64, torch.float32), (64, 128, torch.float32), (256, 128, torch.bfloat16)),
    ],
)
def test_kernel_on_lists(name, device, causal, shape, size, dim, dtype):
    batch, queries, keys, heads, kv_heads = shape
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the same as of float32 there")
    if device == "cuda" and name != "reference":
        reason = ops.why_not(torch.device("cuda"), dtype, dim, size)[name]
        if reason:
            pytest.skip(f"{name} {reason}")
    q = torch.randn(batch, queries, heads, dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, keys, kv_heads, dim, device=device).to(dtype)
    tiles, blocks = -(-queries // size), -(-keys // size)
    chosen = torch.rand(batch, heads, tiles, blocks, device=device) < 0.5
    if causal:  # a tile always attends to its own blocks
        chosen[..., -1:] = True
    chosen[0, 0, 0] = False  # an empty list
    out, lse = ops.on_lists(name)(q, k, v, causal=causal, scale=0.125, blocks=compact(chosen, size))
    pairs = chosen.repeat_interleave(size, 2)[:, :, :queries].repeat_interleave(size, 3)[..., :keys]
    if causal:
        pairs = pairs & torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    group = heads // kv_heads

    def dense(dtype):
        kk, vv = (x.to(dtype).repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
        logits = (q.to(dtype).transpose(1, 2) @ kk.mT * 0.125).masked_fill(~pairs, -torch.inf)
        return (logits.softmax(-1).nan_to_num() @ vv).transpose(1, 2), logits.logsumexp(-1)

    (true_out, true_lse), (plain_out, _) = dense(torch.float64), dense(dtype)
    allowed = 2 * (plain_out - true_out).abs().max() + 4 * torch.finfo(dtype).eps
    assert (out - true_out).abs().max() <= allowed
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-3, rtol=1e-4)
    assert not out[0, :size, 0].any() and bool((lse[0, 0, :size] == -torch.inf).all())


def test_the_list_kernel_of_a_device():
    kind = CPU, torch.float32, 64
    assert ops.list_kernel("auto", *kind, 128) == "reference"
    with pytest.raises(ValueError, match='kernel="fa4" needs a CUDA device'):
        ops.list_kernel("fa4", *kind, 128)
    with pytest.raises(ValueError, match='kernel="flex" needs a CUDA device'):
        ops.list_kernel("flex", *kind, 128)


# --- attention over what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(str(v) for v in r.values() if not isinstance(v, list)))
def test_output_and_recall_are_those_of_the_kept_keys(rule, cuts):
    """One softmax over exactly what was selected, no key counted twice; recall as brute force finds it."""
    q, k, v = draw(cuts[-1], batch=2)
    config = settings(**rule)
    out, state, spy = prefill(q, k, v, config, cuts)
    sparse_rows = 0
    for row in range(2):
        logits = all_logits(q[row], k[row])
        wanted, share = masked(logits, kept_pairs(spy, row, cuts[-1], 4), v[row])
        torch.testing.assert_close(out[row], wanted, atol=1e-9, rtol=1e-9)
        for record in state.records:
            last = share[:, record.stop - config.last_q : record.stop].mean(dim=1)
            torch.testing.assert_close(record.recall[row], last, atol=1e-9, rtol=1e-9)
            sparse_rows += record.stop - record.start
    assert sparse_rows > 0


@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(str(v) for v in r.values() if not isinstance(v, list)))
def test_density_counts_what_is_kept(rule):
    cuts = [192, 384, 500]
    q, k, v = draw(500)
    _, state, spy = prefill(q, k, v, settings(**rule), cuts)
    kept = pairs = 0.0
    for view, selection in spy.seen:
        for tile in range(len(view.tiles.starts)):
            whole = int(view.tiles.whole[tile])
            for head in range(4):
                mask = selection.mask[0, head, tile]
                kept += int(mask.sum())
                if selection.columns is not None:
                    columns = [c for c in selection.columns[0, head].tolist() if c >= 0 and c // 32 < whole]
                    kept += sum(not mask[c // 32] for c in columns) / 32
            pairs += 4 * int(view.tiles.visible[tile])
    dense = 4 * sum(-(-stop // 32) for stop in (468, 500))  # the last two tiles of the prompt
    kept, pairs = kept + dense, pairs + dense
    assert state.density() == pytest.approx(kept / pairs)
    assert 0 < state.density() <= 1


@pytest.mark.parametrize("sizes", [[100, 240, 333, 600], [192, 384, 500]])
@pytest.mark.parametrize("rule", [{"density": 1.0}, {"mass": 1.0}, {"sparse": "vertical_slash"}])
def test_budgets_of_everything_are_dense(rule, sizes):
    q, k, v = draw(sizes[-1])
    out, state, _ = prefill(q, k, v, settings(**rule), sizes)
    every = torch.ones(4, sizes[-1], sizes[-1], dtype=torch.bool)
    torch.testing.assert_close(out[0], masked(all_logits(q[0], k[0]), every, v[0])[0], atol=1e-9, rtol=1e-9)
    assert state.density() == 1.0


@pytest.mark.parametrize("rule", [{"density": 0.4}, {"mass": 0.6}, {"score_threshold": 0.2}])
def test_chunks_of_whole_tiles_keep_the_same(rule):
    q, k, v = draw(600)
    whole = prefill(q, k, v, settings(**rule), [600])[0]
    for cuts in ([192, 384, 576, 600], [96, 256, 416, 600]):
        torch.testing.assert_close(prefill(q, k, v, settings(**rule), cuts)[0], whole, atol=1e-9, rtol=1e-9)


# --- the rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_block_scores_are_the_best_shares_of_pooled_queries_on_mean_keys(cuts):
    q, k, v = draw(cuts[-1])
    _, _, spy = prefill(q, k, v, settings(density=0.5), cuts)
    logits = all_logits(q[0], k[0])
    for view, _ in spy.seen:
        found = block_scores.scores(view)
        for tile, start in enumerate(view.tiles.starts.tolist()):
            whole = int(view.tiles.whole[tile])
            if whole == 0:
                assert not found[:, :, tile].any()
                continue
            rows = [min(start + i, view.span.stop - 1) for i in range(32)]
            # logits are linear in query and key: a mean of rotated vectors gives the mean of the logits
            pooled = logits[:, rows, : whole * 32].unflatten(1, (8, 4)).unflatten(3, (-1, 8)).mean(dim=(2, 4))
            share = pooled.softmax(-1).unflatten(2, (-1, 4)).sum(3).amax(1)
            torch.testing.assert_close(found[0, :, tile, :whole], share, atol=1e-9, rtol=1e-9)
            assert not found[0, :, tile, whole:].any()


@pytest.mark.parametrize(
    ("trained", "fidelity", "mass", "share"),
    [
        (640, "balanced", 0.93, 0.03125),
        (320, "balanced", 0.93, 0.0625),
        (40, "balanced", 0.85, 0.5),
        (320, "careful", 0.97, 0.0625),
        (640, "fast", 0.93, 0.03125),
        (320, "fast", 0.725, 0.0625),
        (40, "fast", 0.35, 0.5),
    ],
)
def test_a_fidelity_keeps_its_mass_and_a_window_that_grows_with_the_prompt(trained, fidelity, mass, share, monkeypatch):
    monkeypatch.setattr(block_scores, "NEAR", 2)
    monkeypatch.setitem(block_scores.MISSED, fidelity, 1.0)
    q, k, v = draw(640)
    config = settings(original_max_position_embeddings=trained, recall_target=0.01, fidelity=fidelity)
    _, _, spy = prefill(q, k, v, config, [256, 640])
    assert spy.seen
    for view, selection in spy.seen:
        scores = block_scores.scores(view)
        for tile, whole in enumerate(view.tiles.whole.tolist()):
            ends = int(view.tiles.starts[tile]), int(view.tiles.stops[tile])
            for head in range(4):
                values = scores[0, head, tile].tolist(), *ends, 32, mass, "mass", 1000, 1, max(int(whole * share), 1)
                assert set(selection.mask[0, head, tile].nonzero()[:, 0].tolist()) == keep_by_hand(*values)


@pytest.mark.parametrize(
    ("fidelity", "masses"),
    [
        ("fast", [0.93, 0.93, 0.85, 0.725, 0.6, 0.475, 0.35, 0.35]),
        ("balanced", [0.93, 0.93, 0.93, 0.93, 0.93, 0.93, 0.85, 0.85]),
        ("careful", [0.97, 0.97, 0.97, 0.97, 0.97, 0.97, 0.93, 0.93]),
    ],
)
def test_masses_over_lengths(fidelity, masses):
    found = [block_scores.mass_of(fidelity, times) for times in (0.1, 1, 1.0001, 2, 4, 8, 16, 64)]
    assert found == pytest.approx(masses, abs=1e-4)
    assert block_scores.mass_of("balanced", 8 * 2**0.5) == pytest.approx(0.89)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("fidelity", "missed"), [("fast", None), ("balanced", 0.2), ("careful", 0.4)])
def test_a_head_that_drops_what_a_query_wants_attends_to_everything(cuts, fidelity, missed, monkeypatch):
    """Against the softmax of each query of a span's last tile over all its keys; other heads keep their mass."""
    assert set(block_scores.MISSED) == set(block_scores.MASSES) and block_scores.MISSED["fast"] is None
    monkeypatch.setitem(block_scores.MISSED, fidelity, missed)
    monkeypatch.setitem(block_scores.MASSES, fidelity, ((1.0, 0.6),))
    q, k, v = draw(cuts[-1])
    _, _, spy = prefill(q, k, v, settings(fidelity=fidelity), cuts)
    logits = all_logits(q[0], k[0])
    assert spy.seen
    for view, selection in spy.seen:
        scores = block_scores.scores(view)
        for head in range(4):
            kept = []
            for tile, start in enumerate(view.tiles.starts.tolist()):
                stop = int(view.tiles.stops[tile])
                kept.append(keep_by_hand(scores[0, head, tile].tolist(), start, stop, 32, 0.6, "mass", 1000, 1, 1))
            share = logits[head, start:stop, :stop].softmax(-1)
            wanted = {at // 32: share[:, at : at + 32].sum(1).max().item() for at in range(0, stop, 32)}
            if max([wanted[block] for block in wanted.keys() - kept[-1]], default=0.0) > (missed or 1):
                kept = [set(range(visible)) for visible in view.tiles.visible.tolist()]
            found = [set(mask.nonzero()[:, 0].tolist()) for mask in selection.mask[0, head]]
            assert found == kept


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_exact_shares_are_shares_of_attention(cuts):
    """Against the softmax of each query over the keys of the blocks that its tile sees whole."""
    q, k, v = draw(cuts[-1])
    config = settings(sparse="exact_shares")
    _, _, spy = prefill(q, k, v, config, cuts)
    logits = all_logits(q[0], k[0])
    assert spy.seen
    for view, _ in spy.seen:
        found = exact_shares.scores(view)
        for tile, whole in enumerate(view.tiles.whole.tolist()):
            start, stop = int(view.tiles.starts[tile]), int(view.tiles.stops[tile])
            queries = [min(row, stop - 1) for row in range(start, start + 32)]  # the last fills a short tile up
            share = logits[:, queries, : whole * 32].softmax(-1).unflatten(2, (-1, 32)).sum(3).mean(1)
            torch.testing.assert_close(found[0, :, tile, :whole], share, atol=1e-9, rtol=1e-9)
            assert not found[0, :, tile, whole:].any()


def best(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_vertical_slash_selects_as_defined(cuts):
    """Columns and diagonals of every span from the per-token shares of its last queries."""
    q, k, v = draw(cuts[-1])
    config = settings(sparse="vertical_slash", sparse_attention_config=BUDGETS)
    _, _, spy = prefill(q, k, v, config, cuts)
    logits = all_logits(q[0], k[0], selecting=True)
    assert spy.seen
    for view, selection in spy.seen:
        stop, rows = view.span.stop, min(config.last_q, view.span.stop - view.span.start)
        share = logits[:, stop - rows : stop, :stop].softmax(-1)
        for head in range(4):
            verticals, slashes = BUDGETS[0][str(head)][1:3]
            sums = share[head].sum(0).tolist()
            sums[:30] = [float("inf")] * 30
            columns = set(best(sums, verticals))
            along = [0.0] * stop
            for row in range(rows):
                for key in range(stop - rows + row + 1):
                    along[stop - rows + row - key] += share[head, row, key].item()
            along[:100] = [float("inf")] * min(100, stop)
            distances = set(best(along, slashes))
            numbers = [torch.tensor([BUDGETS[0][str(h)][i] for h in range(4)]) for i in (1, 2)]
            found = vertical_slash.indices(view, *numbers, config.last_q)
            assert {c for c in found[0][0, head].tolist() if c >= 0} == columns
            assert {d for d in found[1][0, head].tolist() if d >= 0} == distances
            assert_blocks_hold_exactly_the_diagonals(view, selection.mask[0, head], distances)


def assert_blocks_hold_exactly_the_diagonals(view, mask, distances):
    for tile, start in enumerate(view.tiles.starts.tolist()):
        whole, seen = int(view.tiles.whole[tile]), int(view.tiles.visible[tile])
        wanted = set(range(whole, seen))
        for distance in distances:  # the span of keys at this distance from the tile's (full) rows
            first, last = (start - distance) // 32, (start + 31 - distance) // 32
            wanted |= {b for b in (first, last) if 0 <= b < seen}
        assert set(mask[tile].nonzero()[:, 0].tolist()) == wanted


def test_a_vertical_budget_of_30_reads_as_130():
    source = [{str(head): ["vertical_and_slash", 30, 100, 0.0] for head in range(4)}] * 2
    q, k, v = draw(500)
    _, _, spy = prefill(q, k, v, settings(sparse="vertical_slash", sparse_attention_config=source), [500])
    assert all(int((s.columns[0, h] >= 0).sum()) == min(130, view.span.stop) for view, s in spy.seen for h in range(4))


def test_forced_columns_and_diagonals_are_kept_whatever_the_budget():
    """Also where steering takes a budget below them: else the choice among them hangs on the other heads."""
    source = [{str(head): ["vertical_and_slash", 5, 7, 0.0] for head in range(4)}] * 2
    q, k, v = draw(500)
    config = settings(sparse="vertical_slash", sparse_attention_config=source, recall_target=0.01)
    _, state, spy = prefill(q, k, v, config, [192, 384, 500])
    assert bool((state.budgets["vertical_slash", 0] < 1).all())
    for view, selection in spy.seen:
        assert selection.columns.sort().values.tolist() == [[list(range(30))] * 4]
        for head in range(4):
            distances = set(range(min(100, view.span.stop)))
            assert_blocks_hold_exactly_the_diagonals(view, selection.mask[0, head], distances)


def test_a_third_rule_is_one_function(monkeypatch):
    """Sink and window alone (A-shape), written as a stranger would."""

    def select(view, budget, request):
        scores = torch.zeros(view.k.shape[0], view.heads, len(view.tiles.starts), view.tiles.blocks)
        nothing = torch.zeros(view.heads, len(view.tiles.starts))
        return Selection(keep(scores, view.tiles, nothing, by="mass", sink=1, window=2))

    monkeypatch.setitem(sparsity.RULES, "block_scores", Rule(select, 1.0, 1.0, 1.0, None))
    q, k, v = draw(600)
    out, _, spy = prefill(q, k, v, settings(), [300, 600])
    wanted, _ = masked(all_logits(q[0], k[0]), kept_pairs(spy, 0, 600, 4), v[0])
    torch.testing.assert_close(out[0], wanted, atol=1e-9, rtol=1e-9)


# --- steering by recall -------------------------------------------------------------------------------------------


def test_steering_moves_towards_the_target_within_bounds():
    rule = Rule(lambda *a: None, start=1.0, lowest=0.5, highest=8.0, recall_target=0.9)
    budget = torch.ones(4)
    recall = torch.tensor([[0.9, 0.5, 0.99, 0.0], [0.9, 0.7, 0.99, 0.0]])
    after = steer(budget, recall, 0.9, rule)
    assert after[0] == pytest.approx(1.0)
    assert after[1] == pytest.approx(6**0.5)  # odds of 9 against 1.5
    assert after[2] == pytest.approx(0.7)  # no faster
    assert after[3] == 4.0  # no faster either
    for _ in range(20):
        after = steer(after, recall, 0.9, rule)
    assert after[1] == 8.0 and after[2] == 0.5


def test_the_first_span_is_tried_on_its_last_tile(monkeypatch):
    """A prompt of one span has nothing to follow: its budgets come from trials, and reach the target too."""

    def select(view, budget, request):
        return Selection(best_blocks(block_scores.scores(view), view.tiles, budget.ceil(), sink=0, window=0))

    monkeypatch.setitem(sparsity.RULES, "block_scores", Rule(select, 1.0, 1.0, 100.0, None))
    q, k, v = draw(192 + 64)
    densities = []
    for target in (0.5, 0.7, 0.9):
        state = prefill(q, k, v, settings(recall_target=target), [192 + 64])[1]
        (record,) = state.records
        assert record.recall.mean() > target - 0.1
        densities.append(state.density())
    assert densities[0] < densities[1] < densities[2]


@pytest.mark.parametrize(
    "rule", [{"score_threshold": 0.9}, {"sparse": "vertical_slash", "sparse_attention_config": BUDGETS}]
)
def test_trials_score_a_tile_once(rule, monkeypatch):
    calls = []
    for module, name in ((block_scores, "scores"), (vertical_slash, "_sums")):
        work = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, work=work: calls.append(a) or work(*a))
    q, k, v = draw(190)
    _, state, spy = prefill(q, k, v, settings(recall_target=0.99, **rule), [190])
    (budget,) = state.budgets.values()
    assert len(calls) == 2 and bool((budget != 1).any())  # both rules start at 1: the trials have steered


@pytest.mark.parametrize("share", [{"fidelity": "fast"}, {"density": 0.2}, {"mass": 0.3}, {"score_threshold": 0.8}])
def test_steering_only_adds_to_a_share(share):
    """No head gets less than the share, and those that recall too little get more."""
    q, k, v = draw(640)
    beyond = {"original_max_position_embeddings": 300, **share}
    found = []
    for target in (0.01, 0.95):
        _, state, spy = prefill(q, k, v, settings(recall_target=target, **beyond), [192, 384, 640])
        found.append((state, [selection.mask for _, selection in spy.seen]))
    (plain, less), (steered, more) = found
    assert all(bool((a <= b).all()) for a, b in zip(less, more, strict=True))
    assert steered.density() > plain.density()
    assert bool((steered.budgets["block_scores", 0] > 1).any())
    assert torch.equal(plain.budgets["block_scores", 0], torch.ones(4))


def test_budgets_follow_recall_span_by_span():
    """A rule that keeps as many of the nearest blocks as its budget says: a head that turns global is widened."""
    tokens, turn, size = 1920, 768, 32
    q = torch.zeros(1, tokens, 2, 16, dtype=torch.float64)
    k, v = torch.zeros(1, tokens, 1, 16, dtype=torch.float64), torch.randn(1, tokens, 1, 16, dtype=torch.float64)
    # Equal logits everywhere: a query's attention is spread evenly over all keys, for head 1 from the turn on.
    # Before it, and for head 0 always, one pair of dimensions that hardly turns marks the newest 192 keys.
    chunk = torch.arange(tokens) // STRIDE
    k[0, :, 0, 7] = chunk.double()
    q[0, :, 0, 7] = q[0, :turn, 1, 7] = 80.0

    def nearest(view, budget, request):
        rank = torch.arange(view.tiles.blocks, dtype=torch.float64) + 1
        scores = rank.expand(1, 2, len(view.tiles.starts), -1)
        return Selection(best_blocks(scores, view.tiles, budget.round(), sink=0, window=0))

    rule = Rule(nearest, start=6.0, lowest=2.0, highest=60.0, recall_target=0.8)
    state = SparseState()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sparsity.RULES, "block_scores", rule)
        widths = []
        for stop in range(STRIDE, tokens + 1, STRIDE):
            cuts = list(range(STRIDE, stop + 1, STRIDE))
            state = prefill(q[:, :stop], k[:, :stop], v[:, :stop], settings(last_q=size), cuts)[1]
            widths.append(state.budgets["block_scores", 0].tolist())
    local, turning = zip(*widths, strict=True)
    before = turn // STRIDE
    assert max(local) <= 6.0 and max(turning[:before]) <= 6.0
    assert turning[-1] > 4 * turning[before - 1]
    recalls = [record.recall[0, 1].item() for record in state.records]
    assert recalls[before] < 0.5  # the turn is seen by the recall of the first span after it
    assert recalls[-1] > 0.7  # and made good, though attention spreads over ever more keys


@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 4), (2, 4), (3, 6), (4, 8), (8, 8)])
def test_beyond_a_length_recall_is_measured_in_turn(kv_heads, heads, monkeypatch):
    """What is measured is what a run that measures all finds; no head waits longer than it must; means count these."""
    q, k, v = draw(1100, heads, kv_heads)
    cuts = [*range(192, 1100, 64), 1100]
    how = settings(density=0.3)
    whole = prefill(q, k, v, how, cuts)[1]
    monkeypatch.setattr(request, "_MEASURED_WHOLE", 300)
    out, state, _ = prefill(q, k, v, how, cuts)
    turns = min(4, kv_heads)
    every, some = whole.records, state.records
    assert len(some) == len(every) > 10
    measured = torch.stack([r.recall[0] > NOT_MEASURED for r in some])
    assert measured[:2].all() and measured[2:].sum(1).max() <= -(-kv_heads // turns) * heads // kv_heads
    seen = torch.stack([r.recall[0] for r in some])
    torch.testing.assert_close(seen[measured], torch.stack([r.recall[0] for r in every])[measured])
    spans = range(-(-2 // turns) * turns, len(some) - turns + 1, turns)
    assert all(measured[start : start + turns].any(0).all() for start in spans)
    row = state.by_layer()[0]
    heads_seen = [seen[measured[:, h], h].mean() for h in range(heads)]
    assert row["recall"] == pytest.approx(torch.stack(heads_seen).mean().item())
    assert row["lowest_recall"] == pytest.approx(min(heads_seen).item())
    assert row["measured"] == pytest.approx(measured.double().mean().item())
    assert (row["measured"] < 1) == (kv_heads > 1)
    state.check()


def test_a_sequence_that_begins_far_away_is_measured_whole_first(monkeypatch):
    monkeypatch.setattr(request, "_MEASURED_WHOLE", 0)
    q, k, v = draw(640)
    state = prefill(q, k, v, settings(density=0.3), [192, 320, 384, 512, 640])[1]
    seen = torch.cat([record.recall for record in state.records]) >= 0
    assert seen.sum(1).tolist() == [4, 2, 2, 2, 2]
    assert (seen[2:4].sum(0) == 1).all()
    kept = state.snapshot()
    state.turns[0] += 5
    state.restore(kept)
    assert state.turns[0] == 5


def test_a_head_that_is_not_measured_keeps_its_budget():
    rule = Rule(lambda *a: None, start=1.0, lowest=0.5, highest=8.0, recall_target=0.9)
    recall = torch.tensor([[0.5, NOT_MEASURED], [0.7, NOT_MEASURED]])
    assert steer(torch.full((2,), 3.0), recall, 0.9, rule).tolist() == [pytest.approx(3 * 6**0.5), 3.0]


@pytest.mark.parametrize(("target", "trials"), [(1e-4, 1), (0.97, 3)])
def test_trials_end_where_they_change_nothing(target, trials, monkeypatch):
    seen = []
    steered = sparse.steer
    monkeypatch.setattr(sparse, "steer", lambda *a: seen.append(a) or steered(*a))
    q, k, v = draw(192)
    prefill(q, k, v, settings(density=0.2, recall_target=target), [192], layers=1)
    assert len(seen) == trials


# --- the canary ---------------------------------------------------------------------------------------------------


def replace_reference(monkeypatch, function):
    monkeypatch.setitem(ops.ENGINES, "reference", ops.ENGINES["reference"]._replace(function=function))


def broken(change):
    def kernel(q, k, v, *, causal, scale, blocks=None):
        return change(*ops.reference(q, k, v, causal=causal, scale=scale, blocks=blocks))

    return kernel


def test_a_mask_that_counts_keys_twice_is_caught(monkeypatch):
    """The defect of a kernel window that once cost an engine 82 points: nothing else would tell."""
    replace_reference(monkeypatch, broken(lambda out, lse: (out, lse + 0.01)))
    q, k, v = draw(600)
    _, state, _ = prefill(q, k, v, settings(density=0.9), [300, 600])
    with pytest.raises(RuntimeError, match=r"layer 0, tokens \d+ to \d+, recalls 1\.0.* kernel 'reference'"):
        state.check()


def test_a_list_with_a_block_twice_is_caught(monkeypatch):
    def doubled(q, k, v, *, causal, scale, blocks=None):
        blocks.indices[..., 1] = blocks.indices[..., 0]
        return ops.reference(q, k, v, causal=causal, scale=scale, blocks=blocks)

    q, k, v = draw(600)
    k[:, :32] *= 4  # the first block of a list outweighs the second, in whose place it is counted again
    replace_reference(monkeypatch, doubled)
    _, state, _ = prefill(q, k, v, settings(density=1.0), [600])
    with pytest.raises(RuntimeError, match="the kernel is wrong here"):
        state.check()


def test_nan_is_caught(monkeypatch):
    replace_reference(monkeypatch, broken(lambda out, lse: (out, lse * torch.nan)))
    q, k, v = draw(300)
    _, state, _ = prefill(q, k, v, settings(), [300])
    with pytest.raises(RuntimeError, match="recalls nan"):
        state.check()


def test_a_sound_run_passes_the_check():
    q, k, v = draw(600)
    for rule in RULES:
        prefill(q, k, v, settings(**rule), [300, 600])[1].check()
