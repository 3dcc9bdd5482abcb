"""What `cache.report()` says of prompts of any length, of several turns, and after a crop or reset."""

from __future__ import annotations

import pytest
import torch

from helpers import OLD_TRANSFORMERS, tiny_model
from qwen_longctx import LongContextCache, patch_qwen, patched_qwen
from qwen_longctx.prefill import run

EMPTY = {"density": 1.0, "layers": [], "tokens": 0, "prefill_seconds": 0.0, "tokens_per_second": 0.0}
GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
ON = {"sparse": "block_scores", "sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}


@pytest.fixture(scope="module")
def model():
    return patch_qwen(tiny_model())


@pytest.fixture
def clock(monkeypatch):
    """Every prefill takes one second: how many there were can be read from the seconds."""
    now = iter(range(10**6))
    monkeypatch.setattr(run.time, "perf_counter", lambda: float(next(now)))


def draw(tokens, seed=1):
    return torch.randint(1, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new=9, **arguments):
    arguments = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **arguments)


def check(cache, tokens, prefills):
    """All fields of the report of dense prefills that took a second each."""
    rate = tokens / prefills
    wanted = {**EMPTY, "tokens": tokens, "prefill_seconds": float(prefills), "tokens_per_second": rate}
    assert cache.report() == {**wanted, "peak_memory_bytes": 0}


def test_of_an_empty_cache():
    assert LongContextCache().report() == {**EMPTY, "peak_memory_bytes": 0}


@pytest.mark.parametrize("tokens", [1, 2, 47, 48, 49, 170])
def test_of_a_prompt_of_any_length(tokens, model, clock):
    check(generate(model, draw(tokens)).past_key_values, tokens, 1)
    cache = LongContextCache()
    with torch.no_grad():
        model(draw(tokens), past_key_values=cache)
        model(draw(1), past_key_values=cache)
    check(cache, tokens, 1)


def test_of_generate_that_begins_by_itself(clock):
    model = patch_qwen(tiny_model(bos_token_id=1))
    cache = LongContextCache()
    model.generate(max_new_tokens=5, do_sample=False, past_key_values=cache)
    check(cache, 1, 1)


@pytest.mark.parametrize("tokens", [1, 60, 170])
@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_drafts_that_are_checked_are_no_prompt(kind, tokens, model, clock):
    drafts = (
        {"prompt_lookup_num_tokens": 4, "eos_token_id": 96} if kind == "lookup" else {"assistant_model": tiny_model()}
    )
    out = generate(model, draw(tokens), new=20, **drafts)
    check(out.past_key_values, tokens, 1)


def test_a_prompt_that_generate_passes_in_parts(model, clock):
    parts = 5 if OLD_TRANSFORMERS else 4  # transformers 4.57 passes the last token by itself
    check(generate(model, draw(170), prefill_chunk_size=50).past_key_values, 170, parts)


@pytest.mark.parametrize("more", [1, 30])
def test_of_several_turns(more, model, clock):
    """The text so far, of which the cache holds all but the newest token, and a further turn."""
    out = generate(model, draw(60))
    cache = out.past_key_values
    held = cache.get_seq_length()
    ids = torch.cat((out.sequences, draw(more)), dim=1)
    generate(model, ids, past_key_values=cache)
    check(cache, 60 + ids.shape[1] - held, 2)


def test_of_a_copy_and_after_a_reset(model, clock):
    cache = generate(model, draw(60)).past_key_values
    cache.reset()
    assert cache.report() == {**EMPTY, "peak_memory_bytes": 0}
    generate(model, draw(70), past_key_values=cache)
    check(cache, 70, 1)


def test_after_a_crop(model, clock):
    """The work that was done stays in the report; cropped to nothing, the sequence is another one."""
    cache = generate(model, draw(60), past_key_values=LongContextCache()).past_key_values
    cache.crop(40)
    with torch.no_grad():
        model(draw(25), past_key_values=cache)
    check(cache, 85, 2)
    cache.crop(-cache.get_seq_length())
    with torch.no_grad():
        model(draw(25), past_key_values=cache)
    check(cache, 25, 1)


def test_a_call_that_fails_costs_nothing(model, clock):
    cache = LongContextCache()
    with torch.no_grad(), pytest.raises(ValueError, match="labels"):
        model(draw(30), labels=draw(29), past_key_values=cache)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *call: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(draw(30), past_key_values=cache)
    handle.remove()
    assert cache.report() == {**EMPTY, "peak_memory_bytes": 0}


def test_density_of_sparse_turns_and_after_a_crop():
    """Blocks kept among blocks seen, over every prefill, as tokens and seconds are."""
    model = tiny_model(dtype=torch.float64, dual_chunk_attention_config=dict(GEOMETRY), max_position_embeddings=256)
    cache, first = LongContextCache(), LongContextCache()
    with patched_qwen(model, **ON, density=0.3), torch.no_grad():
        model(draw(500), past_key_values=first)
        model(draw(500), past_key_values=cache)
        assert cache.report()["density"] == first.report()["density"] < 1
        cache.crop(300)
        model(draw(300, 2), past_key_values=cache)
    state = cache.sparse_state
    seen = sum(one.pairs for one in (*state.records, *state.dense))
    kept = sum(float(one.kept) for one in state.records) + sum(one.pairs for one in state.dense)
    assert cache.report()["density"] == pytest.approx(kept / seen) and cache.report()["tokens"] == 800
    assert max(one.stop for one in state.records + state.dense) == 600
    cache.reset()
    assert cache.report()["density"] == 1.0 and cache.report()["layers"] == []


def test_the_peak_is_that_of_the_prefill(monkeypatch, model):
    """Not of what ran before it: the statistics of every device start anew with each prefill, and the largest stays."""
    peaks, resets = iter([700, 300]), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    now = {}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now[device.index])
    state = LongContextCache().qwen_longctx
    for _ in range(2):
        with run._recorded(state, 5, torch.device("cuda", 0)):
            now = {0: 100, 1: next(peaks)}
    assert state.peak_memory_bytes == 700 and state.prefill_tokens == 10
    assert [device.index for device in resets] == [0, 1, 0, 1]
