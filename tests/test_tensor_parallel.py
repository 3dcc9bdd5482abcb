"""Two processes that hold half of the heads each compute what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import tiny_model
from qwen_longctx import checkpoint
from tensor_parallel_worker import run

GEOMETRY = {"chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256}
HERE = Path(__file__).parent
BUDGETS = [{str(head): ["vertical_and_slash", 31 + 9 * head, 101 + 20 * head, 0.5] for head in range(4)}] * 2
SPARSE = {"sparse_attention_threshold": 200, "prefill_chunk_size": 150, "block_size": 32}
RUNS = [
    {"sparse": "off", "prefill_chunk_size": 150},
    {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS},
    {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS, "recall_target": 0.9},
    {**SPARSE, "sparse": "block_scores"},
]


def start(rank: int, folder: Path, port: int) -> subprocess.Popen:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **{k: str(v) for k, v in place.items()}, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "tensor_parallel_worker.py"), str(folder), str(folder / "results")]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_are_one(tmp_path):
    model = tiny_model(dtype=torch.float64, max_position_embeddings=256, dual_chunk_attention_config=GEOMETRY)
    ids = torch.randint(1, 90, (1, 500), generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "runs.json").write_text(json.dumps(RUNS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(rank, tmp_path, port) for rank in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    wanted = run(model, ids, RUNS)
    parts = [torch.load(tmp_path / f"results.{rank}", weights_only=False) for rank in range(2)]
    assert [part["heads"] for part in parts] == [(2, 1, 0), (2, 1, 2)]
    for part in parts:  # what the memory check counts with is what the cache of a process takes
        assert {one["bytes_a_token"] for one in part["runs"]} == {part["planned"]} == {wanted[0]["bytes_a_token"] / 2}
    for one, *both in zip(wanted, *(part["runs"] for part in parts), strict=True):
        for part in both:
            torch.testing.assert_close(part["logits"], one["logits"], atol=1e-9, rtol=1e-9)
        for whole, *halves in zip(one["recall"], *(part["recall"] for part in both), strict=True):
            torch.testing.assert_close(torch.cat(halves, dim=1), whole, atol=1e-9, rtol=1e-9)
        for whole, *halves in zip(one["kept"], *(part["kept"] for part in both), strict=True):
            assert sum(halves) == pytest.approx(whole)
        for part in both:
            assert part["report"]["tokens"] == 500 and part["report"]["prefill_seconds"] > 0
            assert [x["layer"] for x in part["report"]["layers"]] == [x["layer"] for x in one["report"]["layers"]]
        for whole, *halves in zip(one["report"]["layers"], *(part["report"]["layers"] for part in both), strict=True):
            assert sum(half["recall"] for half in halves) / 2 == pytest.approx(whole["recall"])
            assert min(half["lowest_recall"] for half in halves) == pytest.approx(whole["lowest_recall"])
        densities = [part["report"]["density"] for part in both]
        assert sum(densities) / 2 == pytest.approx(one["report"]["density"])  # of the local heads
        if one["budgets"] is not None:
            assert [a + b for a, b in zip(*(part["budgets"] for part in both), strict=True)] == one["budgets"]
    assert wanted[0]["report"]["density"] == 1.0 and all(one["report"]["density"] < 1 for one in wanted[1:])


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
