"""What a first long prompt compiles: few variants, none of them for a length, all of them in `warm_up`."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

from helpers import tiny_model
from launches import NEEDS_RULES, recorded
from qwen_longctx import LongContextCache, patch_qwen, settings_of, unpatch_qwen, warm_up
from qwen_longctx.attention import choice
from qwen_longctx.config import LongContextConfig
from qwen_longctx.patches import runs
from qwen_longctx.patches import warm_up as warming
from qwen_longctx.patches.warm_up import run_short_prompt

# Qwen2.5-7B's heads in chunks of 384 tokens, tiles of 128
SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
LONG = {
    "chunk_size": 512,
    "local_size": 128,
    "original_max_position_embeddings": 512,
    "prefill_chunk_size": 512,
    "sparse": "block_scores",
    "sparse_attention_threshold": 1,
}

TINY = {"chunk_size": 96, "local_size": 32, "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _shorter(monkeypatch):
    """A shorter prompt yet: its length is for kernels that run on a GPU only, and takes half a minute here."""
    monkeypatch.setattr(warming, "_STRIDE", 512)
    monkeypatch.setattr(warming, "_TILES", 4)


def variants(model, tokens, batch=1, padded=0):
    """Of one `generate` of three tokens, with room for as many as a long prompt has."""
    ids = torch.randint(1, 97, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    with recorded() as launches, torch.no_grad():
        cache = LongContextCache(1 << 15)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False)
    return set(launches)


@NEEDS_RULES
def test_a_long_prompt_compiles_little_and_other_lengths_nothing():
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, **SHAPE), **LONG)
    first = variants(model, 1536)
    counts = Counter(kernel for kernel, _ in first)
    prefill = {"_rotate": 1, "_row_lse": 1, "_block_shares": 2, "_keep": 1, "_compact": 1, "_merge": 2}
    assert counts == {**prefill, "_decode": 1, "_join": 1}
    for tokens in (1600, 1791, 2048):
        assert variants(model, tokens) <= first, tokens


@NEEDS_RULES
def test_rows_and_padding_compile_nothing_for_a_prefill():
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, **SHAPE), **LONG)
    first = variants(model, 1536)
    more = variants(model, 1700, batch=2, padded=77)
    assert {kernel for kernel, _ in more - first} <= {"_join"}  # which joins as many parts as fill the device


@NEEDS_RULES
@pytest.mark.parametrize(
    ("family", "shape", "how"),
    [
        ("qwen2", SHAPE, {"sparse_attention_threshold": 1700}),
        ("qwen3", SMALL, {"attention_temperature": False, "fidelity": "fast"}),
        ("qwen2", SMALL, {"density": 0.4, "mass": 0.9}),
        ("qwen2", SMALL, {"block_size": 64, "score_threshold": 0.1}),
        ("qwen2", SMALL, {"sparse": "vertical_slash"}),
        ("qwen2", SMALL, {"sparse": "off"}),
    ],
)
def test_warm_up_compiles_all_that_a_long_prompt_needs(family, shape, how):
    model = patch_qwen(tiny_model(family, dtype=torch.bfloat16, **shape), **{**LONG, **how})
    with recorded() as launches:
        run_short_prompt(model.model, settings_of(model))
    assert launches
    assert variants(model, 1701) <= set(launches)


@NEEDS_RULES
def test_sparse_decode_is_warmed_up_and_compiles_nothing_for_a_length(monkeypatch):
    monkeypatch.setattr(choice, "LEAST", 128)
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, **SMALL), **LONG, sparse_decode=0.05)
    with recorded() as launches:
        run_short_prompt(model.model, settings_of(model))
    counts = Counter(kernel for kernel, _ in set(launches))
    assert counts["_mean_logits"] == counts["_mean_scores"] == counts["_best_blocks"] == 1
    for threshold in (1, 65536):
        patch_qwen(model, **LONG, sparse_decode=0.05, sparse_decode_threshold=threshold)
        for tokens in (1536, 1701):
            assert variants(model, tokens) <= set(launches), (threshold, tokens)


@NEEDS_RULES
@pytest.mark.parametrize("graphs", [True, False])
def test_warm_up_compiles_the_layers_of_captured_tokens(graphs):
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, **SMALL), **LONG, cuda_graphs=graphs)
    with recorded() as launches:
        run_short_prompt(model.model, settings_of(model))
    with recorded() as token, torch.no_grad(), runs.repeated():
        cache = LongContextCache(1 << 15)
        model(torch.randint(1, 97, (1, 300)), past_key_values=cache)
        del token[:]
        model(torch.randint(1, 97, (1, 1)), past_key_values=cache)
    layers = {one for one in token if one[0] in ("_thin", "_norm")}
    assert len(layers) >= 4 and (layers <= set(launches)) == graphs


@NEEDS_RULES
def test_warm_up_takes_the_rule_of_long_prompts():
    """Settings under which a prompt as short as its own would be dense."""
    how = {"sparse_attention_threshold": 32768, "prefill_chunk_size": 32768}
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, **SMALL), **{**LONG, **how})
    with recorded() as launches:
        run_short_prompt(model.model, settings_of(model))
    assert {"_keep", "_compact", "_block_shares"} <= {kernel for kernel, _ in launches}


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_the_short_prompt_leaves_the_model_as_it_is(family):
    model = patch_qwen(tiny_model(family), **TINY, sparse="block_scores")
    ids = torch.randint(1, 97, (1, 150))
    with torch.no_grad():
        before = model(ids).logits
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        run_short_prompt(model.model, settings_of(model))
        assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert settings_of(model) == LongContextConfig.from_model_config(model.config, **TINY, sparse="block_scores")


def test_no_message_names_the_settings_of_the_short_prompt(caplog):
    model = patch_qwen(tiny_model(), **TINY, sparse="block_scores")
    with caplog.at_level(logging.INFO, "qwen_longctx"):
        run_short_prompt(model.model, settings_of(model))
    assert not caplog.records


def test_warm_up_does_nothing_on_the_cpu(monkeypatch):
    model = patch_qwen(tiny_model(), warm_up=True)
    monkeypatch.setattr(warming, "run_short_prompt", lambda *_: pytest.fail("ran"))
    assert patch_qwen(model, warm_up=True, prefill_chunk_size=77) is model
    assert settings_of(model).prefill_chunk_size == 77
    warm_up(model)


def test_warm_up_on_the_cpu_of_a_machine_with_a_gpu_says_so(monkeypatch, caplog):
    model = patch_qwen(tiny_model())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    warm_up(model)
    assert "on the CPU" in caplog.text


def test_what_cannot_be_warmed_up_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="not patched"):
        warm_up(model)
    with pytest.raises(ValueError, match="without a model"):
        patch_qwen(warm_up=True)
    with pytest.raises(TypeError, match="True or False"):
        patch_qwen(model, warm_up=1)
    with pytest.raises(TypeError, match="holds no model"):
        warm_up(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="takes a model"):
        warm_up(None)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="meta device"):
        patch_qwen(empty, warm_up=True)
    assert settings_of(empty) is None and settings_of(model) is None
    unpatch_qwen(patch_qwen(model))
    with pytest.raises(ValueError, match="not patched"):
        warm_up(model)


@pytest.mark.gpu
def test_a_warm_model_compiles_nothing():
    """With Triton's own count of compilations, on a real device."""
    from triton import knobs

    model = patch_qwen(tiny_model(dtype=torch.bfloat16, **SHAPE).cuda(), **LONG, warm_up=True)
    compiled = []
    before, knobs.compilation.listener = knobs.compilation.listener, lambda **what: compiled.append(what["src"].name)
    try:
        ids = torch.randint(1, 97, (1, 1701), device="cuda")
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, past_key_values=LongContextCache(1 << 15)
        )
    finally:
        knobs.compilation.listener = before
    assert not compiled
