"""Sparse decode: the choice of blocks and the attention to them, against float64 definitions, and through models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from definition import _pair_logits, all_rotations
from helpers import INTERPRETED, tiny_model
from qwen_longctx import LongContextCache, LongContextConfig, patch_qwen, patched_qwen
from qwen_longctx.attention import choice
from qwen_longctx.attention.choice import blocks_kept
from qwen_longctx.attention.dense import attend
from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.evaluation import runner
from qwen_longctx.evaluation.modes import in_mode, mode_of
from qwen_longctx.evaluation.task import Reader
from qwen_longctx.kv.store import Store, Tensors, mean_keys
from qwen_longctx.ops.choose import MEAN, _best_blocks, choose, choose_triton
from qwen_longctx.ops.decode import BLOCK, decode, decode_triton
from qwen_longctx.patches.method import cache_argument, cache_of
from test_decode import Case, device_of
from test_eval_runner import Letters, random_rows

TWIN, KERNEL = "twin", pytest.param("kernel", marks=INTERPRETED)
WAYS = [TWIN, KERNEL, pytest.param("cuda", marks=pytest.mark.gpu)]
LONG = {"chunk_size": 320, "local_size": 70, "original_max_position_embeddings": 10**9}


def definition(case, blocks, scale):
    """Attention of every query to the keys of its row in the listed blocks, in float64."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    group = case.q.shape[2] // case.k.shape[2]
    for row, token, position, keys in case.each():
        k, v = (x[row, keys].cpu().double().repeat_interleave(group, 1) for x in (case.k, case.v))
        at = all_rotations(position + 1, case.settings.chunk_size, case.settings.local_size)[position][None]
        logits = _pair_logits(case.q[row, token].cpu().double()[None], k, at, case.rotary.inv_freq.cpu().double())
        block = torch.arange(keys.start, keys.stop) // BLOCK
        kept = torch.stack([torch.isin(block, chosen) for chosen in blocks[row].cpu()]).repeat_interleave(group, 0)
        heat = case.call.temperature(case.call.rows[row], position, case.settings)
        logits = (logits * scale * heat).masked_fill(~kept[:, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num()  # a query may see none of the blocks
        out[row, token] = torch.einsum("hts,shd->thd", weights, v)[0]
    return out


def check(way, case, blocks, scale=0.3, splits=None):
    true = definition(case, blocks, scale)
    if way == TWIN:
        found = decode(case.q, case.keys, case.v, case.reach(), scale=scale, blocks=blocks)
    else:
        how = {"scale": scale, "blocks": blocks, "splits": splits}
        found = decode_triton(case.q, case.keys, case.v, case.reach(), **how)
    error = 64 * torch.finfo(case.q.dtype).eps * case.v.nan_to_num().abs().max().item()
    assert (found.cpu().double() - true).abs().max() <= error


def some_blocks(case, count, seed=0):
    every = -(-case.end // BLOCK)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads = len(case.firsts), case.k.shape[2]
    orders = [torch.randperm(every, generator=generator)[:count].sort().values for _ in range(batch * kv_heads)]
    return torch.stack(orders).unflatten(0, (batch, kv_heads)).to(case.q.device, torch.int32)


@settings(max_examples=5)
@given(st.data())
@pytest.mark.parametrize("way", WAYS)
def test_random_lists(way, data):
    """Lengths, borders of chunks, padding, groups, head dims, drafts, lists and splits."""

    def whole(least, most):
        return data.draw(st.integers(least, most))

    torch.manual_seed(whole(0, 10**6))
    chunk = whole(40, 400)
    config = {"chunk_size": chunk, "local_size": whole(1, chunk // 2), "original_max_position_embeddings": whole(4, 99)}
    end = whole(8, 700)
    kv_heads = whole(1, 3)
    firsts = data.draw(st.lists(st.none() | st.integers(0, end - 1), min_size=1, max_size=3))
    heads = kv_heads * whole(1, 8), kv_heads
    case = Case(firsts, end, whole(1, 8), heads, 8 * whole(2, 9), torch.float32, device_of(way), **config)
    check(way, case, some_blocks(case, whole(1, -(-end // BLOCK)), end), splits=whole(1, 9))


@pytest.mark.parametrize("way", [TWIN, KERNEL])
def test_numbers_beyond_the_last_key_are_ignored(way):
    case = Case([0, 90], 300, 2, **LONG)
    blocks = some_blocks(case, 3)
    check(way, case, torch.cat((blocks, torch.full_like(blocks, 1000)), -1), splits=2)


def scores(case, scale, newest):
    """Scores of all blocks, straight from the text of `choose`, in float64; padding scores nothing."""
    end, count = case.end, -(-case.end // BLOCK)
    means = mean_keys(case.keys[:, :end].cpu().double(), MEAN)
    group = case.q.shape[2] // case.k.shape[2]
    settings, inv_freq = case.settings, case.rotary.inv_freq.cpu().double()
    shares = torch.zeros(len(case.firsts), case.k.shape[2], count * (BLOCK // MEAN), dtype=torch.float64)
    for row, token, position, keys in case.each():
        inside = torch.arange(keys.stop // MEAN)
        inside = inside[inside * MEAN >= keys.start]  # all of whose keys are those of the row
        if len(inside) == 0:
            continue
        # a mean is scored where its last key is, as a key that stands there would be
        last = (inside + 1) * MEAN - 1 - keys.start
        apart = position // settings.stride - last // settings.stride
        at = position % settings.stride
        nearest = torch.tensor([at, min(at + settings.stride, settings.chunk_size), settings.chunk_size])
        angle = nearest[apart.clamp(max=2), None] * inv_freq
        a, b = case.q[row, token].cpu().double()[:, None].chunk(2, -1)
        turned = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
        each = means[row, inside].repeat_interleave(group, 1)
        heat = case.call.temperature(case.call.rows[row], position, settings)
        share = (torch.einsum("hmd,mhd->hm", turned, each) * scale * heat).softmax(-1)
        shares[row, :, inside] = shares[row, :, inside].maximum(share.unflatten(0, (-1, group)).amax(1))
    found = shares.unflatten(2, (count, -1)).sum(3)
    block = torch.arange(count)
    for row, first in enumerate(case.firsts):
        if first == end:  # of padding alone
            continue
        begins = first // BLOCK
        found[row, :, (block == begins) | (block == begins + 1) | ((block + 1) * BLOCK > end - newest)] = 2.0
    return found


def check_choice(way, case, count, scale=0.9, newest=128, room=0):
    """The lists hold the best blocks, up to what rounding may confuse, each once and in rising order."""
    true = scores(case, scale, newest)
    # with those of the free room, which are not numbers
    means = torch.nn.functional.pad(mean_keys(case.keys, MEAN), (0, 0, 0, 0, 0, room // MEAN), value=torch.nan)
    how = choose if way == TWIN else choose_triton
    blocks = how(case.q, means, case.reach(), case.keys.shape[1] + room, count, scale=scale, newest=newest).cpu()
    assert blocks.shape == (*true.shape[:2], count) and blocks.dtype == torch.int32
    assert (blocks.diff(dim=-1) > 0).all() and (blocks >= 0).all() and (blocks < true.shape[2]).all()
    found, best = true.gather(2, blocks.long()).sort(-1).values, true.topk(count, -1).values.sort(-1).values
    assert ((best - found).abs() <= 1e-5 * best + 1e-9).all()


@settings(max_examples=5)
@given(st.data())
@pytest.mark.parametrize("way", WAYS)
def test_random_choices(way, data):
    """Lengths, borders of chunks within blocks and means, padding, groups, head dims and drafts."""

    def whole(least, most):
        return data.draw(st.integers(least, most))

    torch.manual_seed(whole(0, 10**6))
    chunk = whole(40, 1000)
    config = {"chunk_size": chunk, "local_size": whole(1, chunk // 2), "original_max_position_embeddings": whole(4, 99)}
    end, kv_heads = whole(8, 2500), whole(1, 2)
    firsts = data.draw(st.lists(st.none() | st.integers(0, end - 1), min_size=1, max_size=3))
    heads = kv_heads * whole(1, 8), kv_heads
    case = Case(firsts, end, whole(1, 8), heads, 8 * whole(2, 9), torch.float32, device_of(way), **config)
    check_choice(way, case, whole(1, -(-end // BLOCK)), newest=whole(0, 300), room=whole(0, 5000))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", [31, 64, 4097])
def test_many_query_rows_and_ends_of_tiles(way, end):
    """17 heads of a group and 8 drafts fill five tiles of queries; several programs share every list."""
    torch.manual_seed(end)
    case = Case([0, 25], end, 8, (34, 2), 40, torch.float32, device_of(way), **LONG)
    check_choice(way, case, max(1, end // 300))


@pytest.mark.parametrize("way", [TWIN, KERNEL])
def test_what_is_not_a_number_does_not_spoil_a_list(way):
    """Every number of a list is that of a block, whatever the scores: attention reads where it says."""
    case = Case([0, 10], 2000, **LONG)
    case.q[0] = torch.nan
    case.keys[1, 600:900] = torch.inf
    how = choose if way == TWIN else choose_triton
    blocks = how(case.q, mean_keys(case.keys, MEAN), case.reach(), 2000, 20, scale=1.0, newest=64)
    assert (blocks.diff(dim=-1) > 0).all() and (blocks >= 0).all() and (blocks <= 2000 // BLOCK).all()


@INTERPRETED
@pytest.mark.parametrize("blocks", [1, 100, 4096, 9000])
@pytest.mark.parametrize("kinds", [1, 3, 10**6])
def test_lists_of_scores(blocks, kinds):
    """The best are listed, and of equal ones the earliest, over several tiles of blocks."""
    generator = torch.Generator().manual_seed(blocks)
    scores = torch.randint(0, kinds, (2, blocks), generator=generator) / kinds * 2.0
    scores[:, ::7] = 0.0
    scores[:, 5::11] = 2.0
    for count in {1, blocks // 3 + 1, blocks}:
        chosen = torch.full((2, count), -1, dtype=torch.int32)
        ranges = torch.tensor([0, 0, 0, blocks * BLOCK, 0, 0], dtype=torch.int32)  # of one token
        _best_blocks[(2,)](scores, ranges, chosen, 1, 2, blocks, count, BLOCK=BLOCK, WIDTH=4096, num_warps=16)
        wanted = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
        assert chosen.tolist() == wanted.tolist()


def test_how_many_blocks():
    assert blocks_kept(0.05, choice.LEAST) is None
    assert blocks_kept(0.05, choice.LEAST + 1) == choice.LEAST // BLOCK
    assert blocks_kept(1.0, 10**6) is None
    assert blocks_kept(0.05, 999_424) == -(-49_971 // BLOCK)  # 61 steps of 16,384
    counts = {blocks_kept(0.05, length) for length in range(400_000, 409_600, 7)}
    assert len(counts) == 1  # shapes stay while a sequence grows


def test_means_follow_crops_and_beams():
    torch.manual_seed(0)
    store = Store(300)
    k = torch.randn(3, 256, 2, 16)
    store.append(k[:, :200], k[:, :200])
    store.key_means(32)
    store.truncate(150)
    rows = torch.tensor([2, 0])
    store.select_rows(rows)
    new = torch.randn(2, 90, 2, 16)
    store.append(new, new)
    wanted = mean_keys(torch.cat((k[rows, :150], new), 1), 32)
    assert torch.equal(store.key_means(32), wanted)


ALWAYS = {"sparse_decode_threshold": 1}  # not only beyond 131,072 keys


# --- whole models -------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Sparse from 192 keys on."""
    monkeypatch.setattr(choice, "LEAST", 128)
    monkeypatch.setattr(choice, "NEWEST", 64)
    monkeypatch.setattr(choice, "_STEP", 64)


def tokens_of(model, ids, mask, **how):
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **how}
    # transformers 4.57 drafts with an end of text only
    return model.generate(ids, attention_mask=mask, eos_token_id=96, **how).tolist()


def batch(rows=3, length=400):
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 97, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    if rows > 1:
        mask[1, :20], mask[2, :85] = 0, 0
    return ids, mask


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_all_keys_give_the_tokens_of_dense(family, how, short):
    model = tiny_model(family, head_dim=16)
    ids, mask = batch(1 if "prompt_lookup_num_tokens" in how else 3)
    with patched_qwen(model):
        wanted = tokens_of(model, ids, mask, **how)
    with patched_qwen(model, **ALWAYS, sparse_decode=1.0):
        assert tokens_of(model, ids, mask, **how) == wanted


def step_logits(model, ids, mask):
    with torch.no_grad():
        cache = cache_of(model(ids, attention_mask=mask[:, :-1], use_cache=True))
        return model(ids[:, :1], attention_mask=mask, **cache_argument(cache)).logits


def test_a_share_changes_the_step_and_not_the_prompt(short):
    model = tiny_model(head_dim=16)
    ids, mask = batch()
    longer = torch.cat((mask, mask[:, :1] * 0 + 1), 1)
    with patched_qwen(model):
        prompt, dense = model(ids, attention_mask=mask).logits, step_logits(model, ids, longer)
    with patched_qwen(model, **ALWAYS, sparse_decode=0.1):
        assert torch.equal(model(ids, attention_mask=mask).logits, prompt)
        sparse = step_logits(model, ids, longer)
        assert not torch.equal(sparse, dense)
        # a row of the batch is as it is alone, but for where its padding puts the borders of blocks
        alone = step_logits(model, ids[:1], longer[:1])
    torch.testing.assert_close(sparse[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_any_cache_gives_the_same_tokens(how, short):
    """Means that are kept, and those worked out anew for a foreign cache."""
    model = patch_qwen(tiny_model(head_dim=16), **ALWAYS, sparse_decode=0.1)
    ids, mask = batch()
    wanted = tokens_of(model, ids, mask, **how)
    assert wanted == tokens_of(model, ids, mask, cache_implementation="dynamic", **how)
    if not how:
        from transformers import DynamicCache

        assert wanted == tokens_of(model, ids, mask, **cache_argument(DynamicCache()))


def test_a_cropped_cache_goes_on_as_before(short):
    model = patch_qwen(tiny_model(head_dim=16), **ALWAYS, sparse_decode=0.1)
    ids, mask = batch(1)
    cache, fresh = LongContextCache(), LongContextCache()
    tokens_of(model, ids, mask, **cache_argument(cache))
    cache.crop(ids.shape[1] - 1)
    with torch.no_grad():
        model(ids[:, :-1], use_cache=True, **cache_argument(fresh))
    wanted = tokens_of(model, ids, mask, **cache_argument(fresh))
    assert tokens_of(model, ids, mask, **cache_argument(cache)) == wanted


def test_sequences_up_to_the_threshold_are_exact(short):
    """By default those of 65,536 keys; the step after that chooses."""
    model = tiny_model(head_dim=16)
    ids, mask = batch(1)
    longer = torch.cat((mask, mask[:, :1]), 1)  # 401 keys
    with patched_qwen(model):
        dense = step_logits(model, ids, longer)
    for how, exact in (({}, True), ({"sparse_decode_threshold": 401}, True), ({"sparse_decode_threshold": 400}, False)):
        with patched_qwen(model, sparse_decode=0.1, **how):
            assert torch.allclose(step_logits(model, ids, longer), dense, atol=1e-5) == exact
    settings = LongContextConfig.from_model_config(model.config, sparse_decode=0.1)
    assert settings.share_decoded(131_072) is None and settings.share_decoded(131_073) == 0.1


def test_short_sequences_are_exact():
    """Below 4,096 keys nothing is left out: the step is that of all keys, bit for bit."""
    case = Case([0], 2000, **LONG)
    kv = Tensors(case.keys, case.v)
    how = {"original_max_position_embeddings": 10**9, "chunk_size": 320, "local_size": 70}
    outs = []
    for share in (1.0, 0.01):
        case.settings = LongContextConfig(**how, **ALWAYS, sparse_decode=share)
        outs.append(attend(case.q, kv, case.layout(), 0.3))
    assert torch.equal(*outs)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_hostile_values_are_refused(value):
    with pytest.raises(InvalidValue, match="sparse_decode must lie between 0 and 1"):
        patch_qwen(tiny_model(), sparse_decode=value)


@pytest.mark.parametrize("value", ["0.1", True, [0.1]])
def test_hostile_types_are_refused(value):
    with pytest.raises(InvalidType, match="sparse_decode must be a number"):
        patch_qwen(tiny_model(), sparse_decode=value)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_kernels_without_lists_are_refused(kernel):
    with pytest.raises(InvalidValue, match="has no sparse_decode"):
        patch_qwen(tiny_model(), sparse_decode=0.1, kernel=kernel)


@pytest.mark.parametrize("mode", ["dense", "dense:sparse_decode=0.1,sparse_decode_threshold=1"])
def test_the_likelihood_of_an_answer_is_that_of_its_decoded_tokens(mode, short):
    """A token at a time, where decoding is sparse, and as generate would; in one forward as before where it is not."""
    model, one = tiny_model(head_dim=16), mode_of(mode)
    rows = list(random_rows(400, 2, 0, target=12))
    batch = runner.Batch.of(rows, Reader(Letters()), torch.device("cpu"))
    with in_mode(model, one, 400), torch.no_grad():
        cache = LongContextCache()
        runner.prefill(model, batch, cache)
        found = runner.likelihoods(model, batch, cache, by_token="sparse" in mode)
        assert cache.get_seq_length() == batch.ids.shape[1] - 1
        for row, sample in enumerate(rows):
            own, nll, token = LongContextCache(), 0.0, sample.prompt[-1]
            model(torch.tensor([sample.prompt[:-1]]), **cache_argument(own))
            for wanted in sample.target:
                logits = model(torch.tensor([[token]]), **cache_argument(own)).logits[0, -1]
                nll, token = nll - logits.log_softmax(-1)[wanted].item(), wanted
            assert found[row][0] == pytest.approx(nll / len(sample.target), abs=1e-4)
