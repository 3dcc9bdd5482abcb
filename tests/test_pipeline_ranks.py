"""Processes that hold some of the layers each compute what one process does, at once, and end together."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import pipeline_worker as worker
from helpers import tiny_model
from qwen_longctx import load_stage, pipeline_parallel
from qwen_longctx.errors import InvalidValue
from ranks import run_ranks

RANKS = 3
LAYERS = [2, 1, 1]
GEOMETRY = {"chunk_size": 128, "local_size": 32, "original_max_position_embeddings": 128}
BUDGETS = [{str(h): ["vertical_and_slash", 31 + 9 * h + layer, 101, 0.5] for h in range(4)} for layer in range(4)]
SPARSE = {"sparse_attention_threshold": 150, "prefill_chunk_size": 64, "block_size": 32}
BLOCKS = {**SPARSE, "sparse": "block_scores", "density": 0.3}
STEERED = {**SPARSE, "sparse": "block_scores", "recall_target": 0.7}
SLASH = {**SPARSE, "sparse": "vertical_slash", "sparse_attention_config": BUDGETS}


def prompts() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Random prompts: rows, lengths and padding, long and shorter than a chunk."""
    draw, generator = random.Random(11), torch.Generator().manual_seed(3)
    found = []
    for rows, most in ((1, 330), (1, 40), (3, 260), (2, 180)):
        tokens = draw.randint(most // 2, most)
        ids = torch.randint(1, 90, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows - 1):
            mask[row, : draw.randint(1, tokens - 5)] = 0
        found.append((ids, mask if rows > 1 else None))
    return found


def scenes() -> dict[str, Any]:
    long, short, three, two = prompts()
    ids = torch.randint(1, 90, (1, 320), generator=torch.Generator().manual_seed(4))
    return {
        "layers": LAYERS,
        "ids": ids,
        "logits": [
            *((worker.DENSE, "device", *one) for one in (long, short, three)),
            ({**worker.DENSE, "prefill_chunk_size": 1}, "device", *short),
            (worker.DENSE, "int8", *two),
            (worker.DENSE, "host", *long),
            (BLOCKS, "device", ids, None),
            (BLOCKS, "fp8", ids, None),
            (STEERED, "device", ids, None),
            (SLASH, "device", ids, None),
        ],
        "tokens": [
            ({"max_new_tokens": 9, "do_sample": False}, *three),
            ({"max_new_tokens": 9, "do_sample": True, "temperature": 5.0}, *two),
            ({"max_new_tokens": 6, "num_beams": 3}, *two),
            ({"max_new_tokens": 6, "num_beams": 2, "do_sample": True, "num_return_sequences": 2}, *long),
            ({"max_new_tokens": 6, "prompt_lookup_num_tokens": 3, "eos_token_id": 96}, *long),
        ],
    }


class Played:
    """What all ranks wrote down, and what one process does on the same model."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model(
            dtype=torch.float64, num_hidden_layers=4, max_position_embeddings=128, dual_chunk_attention_config=GEOMETRY
        )
        self.scenes = scenes()
        self.model.save_pretrained(folder)
        torch.save(self.scenes, folder / "scenes.pt")
        self.codes = run_ranks("pipeline_worker", folder, RANKS)
        self.said = (folder / "said").read_text()
        self.ranks = [torch.load(folder / f"results.{rank}", weights_only=False) for rank in range(RANKS)]

    def of(self, name: str) -> list[Any]:
        """A scene, by rank."""
        return [one[name] for one in self.ranks if name in one]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return Played(tmp_path_factory.mktemp("ranks"))


def test_all_scenes_were_played(played):
    assert played.codes == [0, -signal.SIGKILL, 0], played.said[-6000:]


def test_a_rank_loads_its_layers_only(played):
    held = played.of("held")
    first = 0
    for rank, ((names, device), count) in enumerate(zip(held, LAYERS, strict=True)):
        layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert layers == set(range(first, first + count)) and device == "cpu"
        beside = {name for name in names if ".layers." not in name}
        ends = {0: {"model.embed_tokens.weight"}, RANKS - 1: {"model.norm.weight", "lm_head.weight"}}
        assert beside == ends.get(rank, set())
        first += count


@torch.no_grad()
def test_logits_are_those_of_one_process(played):
    wanted = [worker.logits_of(played.model, *scene) for scene in played.scenes["logits"]]
    sparse = 0
    for one, *parts in zip(wanted, *played.of("logits"), strict=True):
        for part, count in zip(parts, LAYERS, strict=True):
            assert part["layers"] == count and part["length"] == one["length"]
            for here, there in zip(part["logits"], one["logits"], strict=True):
                torch.testing.assert_close(here, there, atol=1e-12, rtol=1e-12)
            assert part["report"]["tokens"] == one["report"]["tokens"] and part["report"]["prefill_seconds"] > 0
        assert sum(part["bytes"] for part in parts) == one["bytes"]
        recall = {key: value for part in parts for key, value in part["recall"].items()}
        assert recall.keys() == one["recall"].keys()
        for key, value in recall.items():
            torch.testing.assert_close(value, one["recall"][key], atol=1e-12, rtol=1e-12)
        layers = [layer for part in parts for layer in part["report"]["layers"]]
        assert layers == one["report"]["layers"]
        sparse += bool(recall) and min(layer["density"] for layer in layers) < 1
    assert sparse == 3


def test_generate_says_the_same_on_every_rank(played):
    for options, *parts in zip(played.scenes["tokens"], *played.of("tokens"), strict=True):
        wanted = worker.tokens_of(played.model, *options)  # with the seed of rank 0
        assert all(torch.equal(part, wanted) for part in parts), options
    draws = []
    for rank in range(RANKS):  # those that are not rank 0 have their own random state back
        torch.manual_seed(5 + rank)
        draws.append(torch.rand(1).item())
    assert played.of("seed")[1:] == draws[1:]


FAILURES = {  # what a rank raises that fails itself, the ranks that do, and what is said
    "layer 0": ("ValueError", {0}, "in layer 0"),
    "layer 2": ("OutOfMemoryError", {1}, "in layer 2"),
    "layer 3": ("KeyError", {2}, "in layer 3"),
    "ids": ("InvalidValue", {0, 1, 2}, "called with different input_ids"),
    "length": ("InvalidValue", {0, 1, 2}, "different input_ids"),
    "vocabulary": ("InvalidValue", {1}, "hold the token id"),
    "kept": ("InvalidValue", {0, 1, 2}, "different logits_to_keep"),
    "cache": ("Unsupported", {0, 1, 2}, "fills no DynamicCache"),
    "states": ("Unsupported", {0, 1, 2}, "output_hidden_states needs all layers"),
    "generate": ("InvalidValue", {0, 1, 2}, "different inputs"),
    "limit": ("InvalidValue", {0, 1, 2}, "different lengths"),
    "time": ("Unsupported", {0, 1, 2}, "max_time does not go with"),
    "drafts": ("Unsupported", {0, 1, 2}, "assistant_model does not go with"),
    "static": ("Unsupported", {0, 1, 2}, "cache_implementation='static'"),
    "option": ("ValueError", {0, 1, 2}, "no_such"),
    "processor 0": ("ArithmeticError", {0}, "of a processor"),
    "processor 1": ("ArithmeticError", {1}, "of a processor"),
    "processor 2": ("ArithmeticError", {2}, "of a processor"),
    "gradients": ("Unsupported", {0, 1, 2}, "has no gradients"),
    "reentered": ("PatchConflict", {0}, "is in progress"),
    "save": ("Unsupported", {0, 1, 2}, "in a pipeline over processes"),
    "again": ("PatchConflict", {0, 1, 2}, "unpatch_qwen(model) first"),
    "settings": ("InvalidValue", {0, 1, 2}, "different settings of patch_qwen"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_any_rank_ends_the_call_on_all(played, name):
    kind, those, text = FAILURES[name]
    for rank, found in enumerate(played.of("failures")):
        what, said, seconds, unchanged = found[name]
        assert text in said and seconds < 10 and unchanged
        # where all of them fail by themselves, the word of another one may come first
        assert what == kind if rank in those and len(those) < RANKS else what in (kind, "RankFailed")
        assert what == "RankFailed" or rank in those


@torch.no_grad()
def test_calls_after_failures_are_right(played):
    cache = worker.LongContextCache()
    with worker.patched_qwen(played.model, **worker.DENSE):
        ids = played.scenes["ids"]
        parts = ids[:, :7], ids, ids[:, :5]
        wanted = [played.model(part, past_key_values=cache, logits_to_keep=1).logits for part in parts]
    for found in played.of("failures"):
        torch.testing.assert_close(found["after"], wanted[1], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found["at the end"], wanted[2], atol=1e-12, rtol=1e-12)


def test_ranks_work_on_different_chunks_at_once(played):
    """Every rank is slow for a time on each chunk: without a pipeline these times follow one another."""
    times = played.of("timeline")
    chunks = len(times[0][0])
    assert chunks == 6 and all(len(begun) == chunks for begun, _ in times)
    for (_, before), (begun, _) in zip(times, times[1:], strict=False):
        assert all(end <= start for end, start in zip(before, begun, strict=True))  # a chunk waits for its input
    for rank in range(RANKS - 1):  # while a rank works on a chunk, the one before it works on the next
        (starts, _), (_, ends) = times[rank], times[rank + 1]
        together = sum(start < end for start, end in zip(starts[1:], ends[:-1], strict=True))
        assert together >= chunks - 2


def test_one_chunk_after_another_where_that_is_asked_for(played):
    times = played.of("one by one")
    (starts, _), (_, ends) = times[0], times[-1]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


@torch.no_grad()
def test_all_ranks_cut_alike(played):
    """Under every setting, also where the first rank measures, which no other could know of."""
    one, *others = played.of("chunks")
    for name, (report, logits) in one.items():
        chunks = report["chunks"]
        assert report["stages"] == RANKS and chunks[0][0] == 0 and chunks[-1][1] == 4600
        assert all(stop == start for (_, stop), (start, _) in zip(chunks, chunks[1:], strict=False))
        for other in others:
            assert other[name][0] == report and torch.equal(other[name][1], logits)
        torch.testing.assert_close(logits, one["off"][1], atol=1e-12, rtol=1e-12)
    assert one["equal"][0]["chunks"] == one["off"][0]["chunks"] == [(0, 2304), (2304, 4600)]
    assert one["auto"][0]["chunks"] != one["equal"][0]["chunks"]


@torch.no_grad()
def test_two_ranks_that_hold_the_whole_model(played):
    one, other, outside = played.of("two")
    ids, model = played.scenes["ids"], played.model
    with worker.patched_qwen(model, **worker.DENSE):
        wanted = {
            "logits": model(ids).logits,
            "base": model.model(ids).last_hidden_state,
            "loss": model(ids, labels=ids).loss,
            "kept": model(ids, logits_to_keep=torch.tensor([3, 250, 3])).logits,
        }
    for said in (one, other):
        for name, value in wanted.items():
            torch.testing.assert_close(said[name], value, atol=1e-12, rtol=1e-12)
        assert said["settings"] == 50
        assert said["layers"][0] == "InvalidValue" and "got [2, 1], which are 3" in said["layers"][1]
        assert said["differ"][0] == "InvalidValue" and "do not agree" in said["differ"][1]
        assert said["timeout"][0] == "InvalidValue" and "timeout must be at least 1 second" in said["timeout"][1]
    assert one["model"][0] == "RankFailed" and "pipeline_parallel takes a model" in one["model"][1]
    assert other["model"][0] == "InvalidType"
    assert one["stock"] and other["left"][0] == "RankFailed" and "has left the pipeline" in other["left"][1]
    assert outside["outside"][0] == "InvalidValue" and "of which this process is one" in outside["outside"][1]


def test_a_rank_that_says_nothing_is_given_up(played):
    for rank, (what, said, seconds) in enumerate(played.of("silent")):
        if rank != 1:
            assert what == "RankFailed" and "rank 1 of the pipeline" in said and 0.9 < seconds < 10


def test_a_rank_that_is_killed_ends_the_others(played):
    first, last = played.of("killed")
    for what, said, seconds, held, (afterwards, _) in (first, last):
        assert what == "RankFailed" and "rank 1 of the pipeline is gone" in said
        assert seconds < 10 and held == 0 and afterwards == "RankFailed"


def test_without_a_process_group():
    assert not dist.is_initialized()
    for call in (lambda: pipeline_parallel(tiny_model()), lambda: load_stage("nowhere")):
        with pytest.raises(InvalidValue, match="needs a process group"):
            call()
