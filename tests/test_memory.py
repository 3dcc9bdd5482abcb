"""The estimate against the shapes it is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen_longctx import LongContextConfig
from qwen_longctx.bench.shapes import model_config
from qwen_longctx.checkpoint import Shape
from qwen_longctx.errors import DoesNotFit, InvalidValue
from qwen_longctx.prefill import memory

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def config():
    return model_config()


@pytest.fixture(scope="module")
def settings(config):
    return LongContextConfig.from_model_config(config, sparse="off")


def test_the_shape_of_the_7b(config, settings):
    assert memory.kv_bytes(Shape.of(config), BF16) == 57_344
    found = memory.estimate(config, 1_010_000, 1, BF16, settings)
    assert found.kv_cache == 57_344 * 1_010_000
    assert found.weights == pytest.approx(15.2e9, rel=0.01)
    assert found.total < 79 * memory.GIB


def test_the_estimate_covers_what_was_measured(config, settings):
    """Peak of the 1,000,000-token run on an H100 (benchmarks/results/headline.json): 75,184,612,352 bytes."""
    estimate = memory.estimate(config, 1_000_032, 1, BF16, settings).total
    assert estimate * 1.005 >= 75_184_612_352 and estimate <= 75_184_612_352 * 1.03


def test_the_estimate_covers_what_sparse_prefill_was_measured_to_take(config, settings):
    """Peak of the 1,000,000 tokens of benchmarks/results/speed.json: 76,365,908,480 bytes."""
    estimate = memory.estimate(config, 1_000_000, 1, BF16, replace(settings, sparse="auto")).total
    assert estimate >= 76_365_908_480 and estimate <= 76_365_908_480 * 1.03


def test_activations_do_not_grow_with_the_prompt(config, settings):
    short, long = (memory.activation_bytes(Shape.of(config), n, 1, BF16, settings) for n in (32_768, 1_000_000))
    assert short == long


def test_what_fits_is_said(config, settings):
    free = 20 * memory.GIB
    with pytest.raises(DoesNotFit, match="20.0 GiB are free: (.*) tokens would fit") as told:
        memory.check_fits(Shape.of(config), 1_000_000, 1, BF16, free, settings)
    fit = int(str(told.value).split("free: ")[1].split(" tokens")[0].replace(",", ""))
    memory.check_fits(Shape.of(config), fit, 1, BF16, free, settings)
    with pytest.raises(MemoryError):
        memory.check_fits(Shape.of(config), fit + 1, 1, BF16, free, settings)


@pytest.mark.parametrize("tokens, batch", [(0, 1), (5, 0)])
def test_nothing_to_estimate(config, settings, tokens, batch):
    with pytest.raises(InvalidValue, match=f"tokens and batch must be at least 1, got {tokens} and {batch}"):
        memory.estimate(config, tokens, batch, BF16, settings)


def test_sparse_prefill_counts_its_means_and_lists(config, settings):
    sparse = replace(settings, sparse="block_scores")
    dense, more = (memory.estimate(config, 1_000_000, 1, BF16, s) for s in (settings, sparse))
    means = 1_000_000 * 57_344 // 2 // 32
    pairs = 28 * 256 * 7813 * 13
    assert more.activations - dense.activations == pytest.approx(means + pairs, rel=0.01)
    short = memory.estimate(config, 30_000, 1, BF16, sparse)
    assert short == memory.estimate(config, 30_000, 1, BF16, settings)


def test_a_process_of_tensor_parallelism_needs_its_part(config, settings):
    """Cache, sparse lists and MLP follow the local heads and widths; the hidden states are whole in every process."""
    sparse = replace(settings, sparse="block_scores")
    whole, part = Shape.of(config), Shape.of(config, 4)
    assert (part.heads, part.kv_heads, part.hidden) == (7, 1, 3584)
    assert 4 * memory.kv_bytes(part, BF16) == memory.kv_bytes(whole, BF16)
    one, all_of_it = (memory.activation_bytes(shape, 1_000_000, 1, BF16, sparse) for shape in (part, whole))
    stream = 3 * 32_768 * 3584 * 2
    assert 4 * (one - stream) == pytest.approx(all_of_it - stream, rel=0.01)
    free = memory.kv_bytes(part, BF16) * 1_000_000 + one
    memory.check_fits(part, 1_000_000, 1, BF16, free, sparse)
    with pytest.raises(DoesNotFit):
        memory.check_fits(part, 1_000_000, 1, BF16, free - 1, sparse)
