"""Kernels compiled side by side: all that a long prompt needs, once a process; failures are left to the run."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny_model
from launches import NEEDS_RULES, recorded
from qwen_longctx import LongContextCache, patch_qwen, settings_of, sparsity
from qwen_longctx.attention import ahead
from qwen_longctx.checkpoint import local_heads
from qwen_longctx.ops import norm
from qwen_longctx.patches import model as models
from qwen_longctx.patches.model import shapes_of
from qwen_longctx.sparsity.record import SparseState

SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
LONG = {
    "chunk_size": 512,
    "local_size": 128,
    "original_max_position_embeddings": 512,
    "prefill_chunk_size": 512,
    "sparse": "block_scores",
    "sparse_attention_threshold": 1,
}
CPU = torch.device("cpu")


def request_of(model, tokens=1536):
    settings = settings_of(model)
    heads = local_heads(model.model)
    return sparsity.make_request(settings.sparse, settings, model.config, heads, SparseState(), tokens)


@NEEDS_RULES
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("qwen2", {}),
        ("qwen3", {"fidelity": "fast"}),
        ("qwen2", {"density": 0.4}),
        ("qwen2", {"density": 0.4, "score_threshold": 0.1, "block_size": 64}),
    ],
)
def test_it_launches_all_that_a_long_prompt_launches(family, how, monkeypatch):
    monkeypatch.setattr(norm, "_FEWEST", 1)
    model = patch_qwen(tiny_model(family, dtype=torch.bfloat16, hidden_size=128, **SHAPE), **{**LONG, **how})
    request = request_of(model)
    with recorded() as launches:
        shapes, tile = shapes_of(model.model, CPU), request.settings.tile
        asked = request.prompt.options, tile, request.settings.last_q, 1024
        for name, jobs in ahead.kernels(shapes, *asked, beyond=True).items():
            before = len(launches)
            for job in jobs:
                job()
            assert [kernel for kernel, _ in launches[before:]] == [name] * len(jobs)
    known = set(launches)
    assert len(known) == len(launches)  # nothing is compiled twice
    with recorded() as launches, torch.no_grad():
        model(torch.randint(1, 97, (1, 1536)), past_key_values=LongContextCache(1 << 15), logits_to_keep=1)
    needed = set(launches)
    assert {"_keep", "_norm", "_rotate", "_merge"} <= {kernel for kernel, _ in needed}
    assert needed <= known, [kernel for kernel, _ in needed - known]
    with recorded() as launches, torch.no_grad():  # within the first chunk
        model(torch.randint(1, 97, (1, 384)), past_key_values=LongContextCache(1 << 15), logits_to_keep=1)
    needed = set(launches)
    assert {"_keep", "_norm", "_rotate", "_merge"} <= {kernel for kernel, _ in needed}
    with recorded() as launches:
        for jobs in ahead.kernels(shapes, *asked, beyond=False).values():
            for job in jobs:
                job()
    assert needed <= set(launches) < known


def test_attention_on_lists_is_compiled_for_the_chunks_that_there_are(monkeypatch):
    calls = []
    monkeypatch.setattr(ahead.ops, "list_kernel", lambda *_: "fa4")
    monkeypatch.setattr(ahead.ops, "on_lists", lambda _: lambda *_, causal, **how: calls.append(causal))
    monkeypatch.setattr(ahead, "_in_threads", lambda: True)
    model = patch_qwen(tiny_model(**SHAPE), **LONG)
    ahead._compile.cache_clear()
    for tokens in (200, 384, 385, 1536):
        ahead.compile_ahead(request_of(model, tokens), shapes_of(model.model, CPU), tokens)
    assert calls == [True, True, False]
    ahead._compile.cache_clear()


@pytest.mark.parametrize("eight_bits", [False, True])
def test_calls_are_such_as_their_functions_take(eight_bits):
    """On the CPU PyTorch computes them."""
    model = patch_qwen(tiny_model("qwen3", hidden_size=64, **SHAPE), **LONG)
    request = request_of(model)
    shapes = shapes_of(model.model, CPU)._replace(eight_bits=eight_bits)
    groups = ahead.kernels(shapes, request.prompt.options, request.settings.tile, 64, 4096, beyond=True)
    jobs = [job for group in groups.values() for job in group]
    for job in jobs:
        if job.func is not ahead.rotate_triton:  # which is no more than the kernel
            job()
    assert len(jobs) == 14 + 2 * eight_bits
    assert sum(job.func is ahead._choose for job in jobs) == 3


def test_once_a_process_and_failures_are_left_to_the_run(monkeypatch):
    model = patch_qwen(tiny_model(**SHAPE), **LONG)
    ran = []

    def kernels(*asked):
        def fails():
            raise RuntimeError("no kernel")

        return {"one": [fails, lambda: ran.append(asked)], "two": [fails]}

    monkeypatch.setattr(ahead, "kernels", kernels)
    monkeypatch.setattr(ahead, "_in_threads", lambda: True)
    ahead._compile.cache_clear()
    for tokens in (1000, 1536, 131_072, 131_073, 131_073):
        ahead.compile_ahead(request_of(model, tokens), shapes_of(model.model, CPU), tokens)
    assert settings_of(model).tile == 128
    assert [asked[-2] for asked in ran] == [1024, 2048]  # blocks
    patch_qwen(model, **{**LONG, "fidelity": "careful"})
    ahead.compile_ahead(request_of(model), shapes_of(model.model, CPU), 1000)
    assert len(ran) == 3
    ahead._compile.cache_clear()


def test_other_rules_and_old_compilers_are_left_alone(monkeypatch):
    monkeypatch.setattr(ahead, "_compile", lambda *_: pytest.fail("ran"))
    model = patch_qwen(tiny_model(**SHAPE), **{**LONG, "sparse": "exact_shares"})
    monkeypatch.setattr(ahead, "_in_threads", lambda: True)
    ahead.compile_ahead(request_of(model), shapes_of(model.model, CPU), 1000)
    monkeypatch.undo()
    for version, safe in (("3.2.0", False), ("3.4.1", True), ("3.6.0+git", True), ("4.0", True)):
        monkeypatch.setattr(ahead.triton_runtime, "AVAILABLE", True)
        monkeypatch.setattr(ahead.triton_runtime.triton, "__version__", version)
        assert ahead._in_threads() is safe
    monkeypatch.setattr(ahead.triton_runtime, "AVAILABLE", False)
    assert not ahead._in_threads()


def test_prompts_on_the_cpu_compile_nothing(monkeypatch):
    monkeypatch.setattr(models, "compile_ahead", lambda *_: pytest.fail("ran"))
    model = patch_qwen(tiny_model(**SHAPE), **LONG)
    with torch.no_grad():
        model(torch.randint(1, 97, (1, 700)), logits_to_keep=1)


@pytest.mark.gpu
def test_a_long_prompt_compiles_nothing_more(monkeypatch):
    """What Triton has compiled for prefill is what was compiled ahead."""
    model = patch_qwen(tiny_model(dtype=torch.bfloat16, hidden_size=512, **SHAPE).cuda(), **LONG)
    monkeypatch.setattr(norm, "_FEWEST", 1)
    request = request_of(model)
    device = next(model.parameters()).device
    ahead.compile_ahead(request, shapes_of(model.model, device), 1536)
    from qwen_longctx.ops import block_shares, compact, keep, merge, rotate, row_lse

    kernels = (
        *(block_shares._block_shares, compact._compact, keep._keep, merge._merge, rotate._rotate, row_lse._row_lse),
        *(norm._norm, norm._silu_mul),
    )

    def variants():
        return [len(kernel.device_caches[device.index][0]) for kernel in kernels]

    before = variants()
    with torch.no_grad():
        model(torch.randint(1, 97, (1, 1536), device=device), logits_to_keep=1)
    assert min(before) > 0 and variants() == before
