"""Processes that hold some of the heads each compute what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import tiny_model
from qwen_longctx import checkpoint
from qwen_longctx.patches import apply, revert
from ranks import run_ranks
from tensor_parallel_worker import generate, run

GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
HEADS = 8
BUDGETS = [{str(head): ["vertical_and_slash", 31 + 9 * head, 101 + 20 * head, 0.5] for head in range(HEADS)}] * 2
DENSE = {"sparse": "off", "prefill_chunk_size": 150}
SPARSE = {"sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}
RUNS = [
    DENSE,
    {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS},
    {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS, "recall_target": 0.9},
    {**SPARSE, "sparse": "block_scores"},
]
KINDS = [{**DENSE, "kv_cache": kind} for kind in ("int8", "fp8", "host")]


def scenes(ranks: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 90, (1, 500), generator=generator)
    batch = torch.randint(1, 90, (2, 189), generator=generator)  # the 192nd token begins a chunk
    mask = torch.ones_like(batch)
    mask[0, :70] = 0
    return {
        "ids": ids,
        "settings": DENSE,
        # four processes on two cores take their time
        "runs": [*RUNS, *KINDS] if ranks == 2 else [RUNS[0], RUNS[1], RUNS[3], KINDS[0]],
        "generate": [
            (batch, mask, {"max_new_tokens": 6, "do_sample": False}),
            (ids[:, :189], None, {"max_new_tokens": 6, "do_sample": True}),
            (batch, mask, {"max_new_tokens": 4, "num_beams": 2}),
        ][: 3 if ranks == 2 else 2],
    }


def model_of(kv_heads: int) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": kv_heads}
    return tiny_model(dtype=torch.float64, max_position_embeddings=256, dual_chunk_attention_config=GEOMETRY, **sizes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_are_one(tmp_path: Path, ranks: int):
    model, given = model_of(4), scenes(ranks)
    model.save_pretrained(tmp_path / "model")
    torch.save(given, tmp_path / "scenes.pt")
    if ranks == 4:
        model_of(2).save_pretrained(tmp_path / "few")
    codes = run_ranks("tensor_parallel_worker", tmp_path, ranks)
    assert codes == [int(rank == 1) for rank in range(ranks)], (tmp_path / "said").read_text()[-6000:]
    wanted = run(model, given["ids"], given["runs"])
    parts = [torch.load(tmp_path / f"results.{rank}", weights_only=False) for rank in range(ranks)]
    local = HEADS // ranks
    assert [part["heads"] for part in parts] == [(local, 4 // ranks, rank * local) for rank in range(ranks)]
    for part in parts:  # what the memory check counts with is what the cache of a process takes
        assert {one["bytes_a_token"] for one in part["runs"][:3]} == {part["planned"]}
        assert part["planned"] == wanted[0]["bytes_a_token"] / ranks
        assert part["save"][0] == "Unsupported" and "tensor parallelism" in part["save"][1]
    for one, *these in zip(wanted, *(part["runs"] for part in parts), strict=True):
        check_run(one, these)
    dense, *sparse = wanted[: len(RUNS) - (ranks == 4)]
    assert dense["report"]["density"] == 1.0 and all(one["report"]["density"] < 1 for one in sparse)
    apply(model, DENSE)
    tokens = generate(model, given)
    revert(model)
    for part in parts:
        for name in ("early", "late"):
            assert all(torch.equal(here, there) for here, there in zip(part[name], tokens, strict=True)), name
    check_failing([torch.load(tmp_path / f"failing.{rank}") for rank in range(ranks) if rank != 1])
    if ranks == 4:
        check_few([part["few"] for part in parts])


def check_run(one: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """One run of the whole model against those of its parts."""
    for part in parts:
        torch.testing.assert_close(part["logits"], one["logits"], atol=1e-9, rtol=1e-9)
    for whole, *some in zip(one["recall"], *(part["recall"] for part in parts), strict=True):
        torch.testing.assert_close(torch.cat(some, dim=1), whole, atol=1e-9, rtol=1e-9)
    for whole, *some in zip(one["kept"], *(part["kept"] for part in parts), strict=True):
        assert sum(some) == pytest.approx(whole)
    reports, report = [part["report"] for part in parts], one["report"]
    for here in reports:
        assert here["tokens"] == 500 and here["prefill_seconds"] > 0
        assert [x["layer"] for x in here["layers"]] == [x["layer"] for x in report["layers"]]
    for whole, *some in zip(report["layers"], *(here["layers"] for here in reports), strict=True):
        assert sum(x["recall"] for x in some) / len(some) == pytest.approx(whole["recall"])
        assert min(x["lowest_recall"] for x in some) == pytest.approx(whole["lowest_recall"])
    assert sum(here["density"] for here in reports) / len(reports) == pytest.approx(report["density"])  # of local heads
    if one["budgets"] is not None:
        assert [sum(row, []) for row in zip(*(part["budgets"] for part in parts), strict=True)] == one["budgets"]


def check_failing(said: list[tuple[str, str, float]]) -> None:
    """A process that fails and ends takes the others along."""
    for what, text, seconds in said:
        assert what and text and seconds < 20


def check_few(said: list[dict[str, tuple[str, str]]]) -> None:
    """Two key heads on four processes: transformers loads that and cannot run it; here it is said before."""
    for one in said:
        assert one["stock"][0] == "RuntimeError"
        for name in ("after loading", "before loading", "generate"):
            what, text = one[name]
            assert what == "InvalidValue", (name, text)
            assert "8 query heads and 2 key heads cannot be divided among 4 processes" in text


def sharded(rows: int) -> nn.Module:
    """A model whose projections someone cut by hand, without distributed tensors."""
    model = tiny_model()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj, attention.k_proj = nn.Linear(32, rows), nn.Linear(32, rows // 2)
    return model


def test_local_heads_of_projections_cut_by_hand(monkeypatch):
    assert checkpoint.local_heads(sharded(32)) == checkpoint.Heads(4, 2, 0)
    with pytest.raises(ValueError, match="q_proj holds 2 of 4 heads and no distributed tensor tells which"):
        checkpoint.local_heads(sharded(16))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    assert checkpoint.local_heads(sharded(16)) == checkpoint.Heads(2, 1, 2)


def test_the_shape_of_projections_cut_by_hand():
    """What a process needs is known, also where nothing tells which part it has."""
    shape = checkpoint.local_shape(sharded(16))
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden, shape.intermediate) == (2, 1, 8, 32, 32)
    assert checkpoint.local_shape(sharded(32)) == checkpoint.Shape.of(tiny_model().config)


def test_a_quantised_projection_may_have_no_weight():
    model = tiny_model()
    for layer in model.model.layers:
        del layer.self_attn.q_proj.weight
    assert checkpoint.local_heads(model) == checkpoint.Heads(4, 2, 0)


@pytest.mark.parametrize("ranks", [0, -1, 3, 4])
def test_heads_that_cannot_be_divided(ranks):
    with pytest.raises(ValueError, match=f"4 query heads and 2 key heads cannot be divided among {ranks} processes"):
        checkpoint.Shape.of(tiny_model().config, ranks)
