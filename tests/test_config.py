"""Settings: parts that make a whole, numbers of other libraries, and what a checkpoint says."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import Qwen2Config

from qwen_longctx import LongContextConfig, checkpoint, config
from qwen_longctx.errors import InvalidType, InvalidValue, Refused
from qwen_longctx.sparsity.rules import block_scores

THREE = (256, 64, 128)


def test_flat_keywords_are_the_interface():
    settings = LongContextConfig(256, 64, 128, density=0.5, kernel="reference", sparse="block_scores", mlp_chunk_size=7)
    assert (settings.stride, settings.tile, settings.mlp_chunk_size, settings.density) == (192, 64, 7, 0.5)
    assert replace(settings, mlp_chunk_size=8).mlp_chunk_size == 8
    assert LongContextConfig.mlp_chunk_size == 2048
    parts = (config.Geometry, config.Prefill, config.Sparse, config.Kernels, config.KeyValueCache)
    assert [f.name for f in fields(LongContextConfig)] == [f.name for part in parts for f in fields(part)]


def test_equality_and_hash():
    one, other = (LongContextConfig(*THREE, sparse_attention_config=[{}]) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != replace(one, last_q=3) and one != replace(one, sparse_attention_config=[])
    assert one.geometry == replace(one, last_q=3).geometry == config.Geometry(*THREE)
    assert one.geometry != replace(one, attention_temperature=True).geometry


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64])
def test_whole_numbers_of_numpy(kind):
    settings = LongContextConfig(kind(200), kind(40), kind(160), block_size=kind(32), last_q=kind(5))
    assert settings == LongContextConfig(200, 40, 160, block_size=32, last_q=5)
    assert {type(settings.chunk_size), type(settings.stride), type(settings.block_size)} == {int}
    assert replace(settings, density=np.float32(0.5)).density == 0.5


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(64), np.array([64]), "64", 64.0, None, float("nan")])
def test_what_is_no_whole_number(value):
    for name in ("chunk_size", "last_q", "prefill_chunk_size"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number of tokens, got"):
            LongContextConfig(
                **{"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 9, name: value}
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 0, 1.5])
@pytest.mark.parametrize("name", ["density", "mass", "score_threshold", "recall_target"])
def test_shares_out_of_range(name, value):
    with pytest.raises(InvalidValue, match=f"{name} must lie between 0 and 1, got {value}"):
        LongContextConfig(*THREE, **{name: value})


def test_huge_numbers():
    settings = LongContextConfig(256, 64, 10, prefill_chunk_size=10**400, last_q=10**30, mlp_chunk_size=1 << 70)
    assert settings.temperature(10**400) == pytest.approx((0.1 * 399 * math.log(10) + 1) ** 2)
    assert LongContextConfig(1 << 61, 1, 10**400).temperature(10**399) == 1.0
    with pytest.raises(InvalidValue, match=r"chunk_size must be below 2\*\*62 tokens, got 1000"):
        LongContextConfig(10**30, 64, 10)


@pytest.mark.parametrize("size", [0, -32])
def test_blocks_without_tokens(size):
    with pytest.raises(InvalidValue, match=f"block_size must be at least 1 token, got {size}"):
        LongContextConfig(*THREE, block_size=size)


@pytest.mark.parametrize("rule", [True, False, "position"])
def test_attention_temperature(rule):
    settings = LongContextConfig(*THREE, attention_temperature=rule)
    assert settings.temperature(128) == 1.0
    assert settings.temperature(1280) == (pytest.approx((0.1 * math.log(10) + 1) ** 2) if rule else 1.0)


@pytest.mark.parametrize("rule", [None, 0, "prompt", np.bool_(True), ["position"]])
def test_no_attention_temperature(rule):
    with pytest.raises(InvalidType, match="attention_temperature must be True, False or 'position', got"):
        LongContextConfig(*THREE, attention_temperature=rule)


def test_a_rule_owns_its_settings():
    settings = LongContextConfig(*THREE, mass=0.5, density=0.25)
    assert settings.options("block_scores") == block_scores.Options(density=0.25, mass=0.5)
    for values in ({"density": 2}, {"mass": "x"}, {"mass": 0.5, "score_threshold": 0.5}):
        with pytest.raises(Refused) as own:
            block_scores.Options(**values)
        with pytest.raises(Refused) as flat:
            LongContextConfig(*THREE, **values)
        assert str(own.value) == str(flat.value)
    for name in config.RULES["block_scores"]:
        value = "fast" if name == "fidelity" else 0.5
        with pytest.raises(ValueError, match=f"{name} is a setting of block_scores, sparse is 'vertical_slash'"):
            LongContextConfig(*THREE, sparse="vertical_slash", **{name: value})
        assert LongContextConfig(*THREE, sparse="exact_shares", **{name: value}).options("exact_shares")


def test_one_setting_says_how_much_is_kept():
    with pytest.raises(ValueError, match="fidelity must be one of fast, balanced, careful, got 'slow'"):
        LongContextConfig(*THREE, fidelity="slow")
    with pytest.raises(ValueError, match="fidelity must be one of"):
        LongContextConfig(*THREE, fidelity=1)
    with pytest.raises(ValueError, match="fidelity='careful' is given beside density, mass or score_threshold"):
        LongContextConfig(*THREE, fidelity="careful", mass=0.5)


def test_what_a_checkpoint_says():
    plain = Qwen2Config(max_position_embeddings=1000, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    assert checkpoint.settings_of(plain) == {
        "chunk_size": 1000,
        "local_size": 250,
        "original_max_position_embeddings": 1000,
    }
    assert checkpoint.settings_of(plain, chunk_size=np.int64(80))["local_size"] == 20
    shape = checkpoint.Shape.of(plain)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden) == (4, 2, 8, 32)
    plain.dual_chunk_attention_config = {"chunk_size": 80, "local_size": 8, "sparse_attention_last_q": 3, "other": 1}
    settings = LongContextConfig.from_model_config(plain, local_size=16)
    assert (settings.chunk_size, settings.local_size, settings.last_q) == (80, 16, 3)


SIZES = [
    ({"num_attention_heads": 0}, "num_attention_heads of the checkpoint's config must be .* got 0"),
    ({"num_hidden_layers": None}, "num_hidden_layers of the checkpoint's config must be .* got None"),
    ({"hidden_size": -8}, "hidden_size .* got -8"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) .* must divide num_attention_heads \(4\)"),
    ({"num_key_value_heads": 0}, "num_key_value_heads .* got 0"),
    ({"head_dim": 0}, "a head of the checkpoint has 0 numbers"),
    ({"head_dim": 7}, "a head of the checkpoint has 7 numbers"),
    ({"head_dim": None, "hidden_size": 2}, "a head of the checkpoint has 0 numbers"),
]


@pytest.mark.parametrize(("values", "message"), SIZES)
def test_configs_of_no_model(values, message):
    """Told by name, not by a division by zero."""
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
    }
    with pytest.raises(InvalidValue, match=message):
        checkpoint.Shape.of(SimpleNamespace(**{**sizes, **values}))
    assert checkpoint.Shape.of(SimpleNamespace(**sizes)).kv_heads == 4


@pytest.mark.parametrize("name", ["qwen_longctx.config", "qwen_longctx.checkpoint"])
def test_settings_import_neither_torch_nor_transformers(name):
    code = f"import sys, {name}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
