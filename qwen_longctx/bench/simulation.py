"""What several cards give when they work on chunks of one prompt at once, worked out from measured times of one card.

The results of ``bench speed`` tell what a whole prompt took on one card. From these follows what a layer takes for a
chunk, `layer_costs`, and from that when each card begins and ends each chunk. Another shape takes its operations in
proportion. What is assumed beside that is written into every row, and said in ``docs/several-devices.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen_longctx.bench.shapes import NAMES, model_config
from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.prefill.pipeline import Stage, most_under_way
from qwen_longctx.prefill.schedule import Cost, operations, planned

LENGTHS = (1_000_000,)
CARDS = (1, 2, 4, 8)
# assumed: seconds in which the host queues a layer of a chunk, densely and sparsely; bytes a second between cards
HOST = {"dense": 1e-3, "sparse": 6e-3}
BETWEEN_CARDS = 100e9
_TITLES = {"Qwen2.5-7B": "qwen2.5-7b", "Qwen2.5-14B": "qwen2.5-14b"}


class Times(NamedTuple):
    """What one results file says of a kind of prefill.

    Attributes
    ----------
    kind : {"dense", "sparse"}
    density : float
        Share of the blocks kept; 1 is dense.
    shape : str
        That was measured.
    layer : Cost
        Of one layer of that shape.
    seconds : float
        That the whole prompt took.
    source : str
        File and hardware.
    """

    kind: str
    density: float
    shape: str
    layer: Cost
    seconds: float
    source: str


def measure(
    lengths: list[int], device: torch.device, tiny: bool = False, from_results: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Seconds of prompts on 1 to 8 cards: one chunk at a time, and at once on equal and on dynamic chunks.

    Parameters
    ----------
    lengths : list of int
        The files must have a row for each.
    device, tiny
        Of no account: nothing is run.
    from_results : sequence of str
        Files of ``bench speed``. Of each, dense and sparse prefill are taken; dense of the first that has it.

    Raises
    ------
    ValueError, FileNotFoundError
        There are no such files, or they have no such rows.
    """
    if not from_results:
        raise InvalidValue("bench simulation needs measured times: give --from-results with files of bench speed")
    for length in lengths:
        seen = set()
        for times in (one for path in from_results for one in read(path, length)):
            if (times.kind, round(times.density, 3)) in seen:
                continue
            seen.add((times.kind, round(times.density, 3)))
            for shape in NAMES:
                yield from _rows(times, shape, length)


def read(path: str, length: int) -> list[Times]:
    """Dense and sparse times of a prompt of `length` tokens in a results file of ``bench speed``."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if row["tokens"] == length]
        shape, gpu = _TITLES[content["shape"]], content["environment"]["gpus"][0]["name"]
    except OSError as error:
        raise MissingFile(f"cannot read {path}: {error.strerror}. Give a results file of bench speed") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidValue(f"{path} holds no results of bench speed on a GPU: give a file that does") from error
    if not rows or "sparse_breakdown_seconds" not in rows[0]:
        raise InvalidValue(f"{path} has no row of {length} tokens: give --lengths that it has, or another file")
    layers = model_config(shape=shape).num_hidden_layers
    source = f"{Path(path).name}, {gpu}"
    row = rows[0]
    dense, sparse = layer_costs(row, layers)
    found = [Times("sparse", row["density"], shape, sparse, row["sparse_seconds"], source)]
    return found if dense is None else [Times("dense", 1.0, shape, dense, row["dense_seconds"], source), *found]


def layer_costs(row: dict[str, Any], layers: int) -> tuple[Cost | None, Cost]:
    """What a layer takes for a chunk, densely (None if that was not measured) and sparsely, from a row of a prompt.

    Linear layers and the rest take time by tokens, and attention and choosing keys by pairs of a query and a key before
    it. Recall is measured once a chunk, of 32,768 tokens here.
    """
    parts, tokens = row["sparse_breakdown_seconds"], row["tokens"]
    by_pair = sum(parts.get(name, 0.0) for name in ("attention", "selection", "merge"))
    recall = parts.get("recall", 0.0)
    by_token = parts["total"] - by_pair - recall
    pairs, chunks = tokens * (tokens + 1) / 2, -(-tokens // LongContextConfig.prefill_chunk_size)
    token = by_token / tokens / layers
    sparse = Cost(token, by_pair / pairs / layers, recall / chunks / layers)
    if "dense_seconds" not in row:
        return None, sparse
    return Cost(token, max(0.0, row["dense_seconds"] - by_token) / pairs / layers), sparse


def _rows(times: Times, name: str, length: int) -> Iterator[dict[str, Any]]:
    shape, measured = Shape.of(model_config(shape=name)), Shape.of(model_config(shape=times.shape))
    layer = scaled(times.layer, measured, shape)
    settings = LongContextConfig.from_model_config(
        model_config(shape=name), **({"sparse": "off"} if times.kind == "dense" else {"density": times.density})
    )
    rule = None if times.kind == "dense" else "block_scores"
    alone = 0.0
    for cards in CARDS:
        for cuts in ("off",) if cards == 1 else ("off", "equal", "auto", "measured"):
            schedule = planned(0, length, replace(settings, pipeline=cuts), shape, cards, rule)
            for start, stop in schedule:
                schedule.measured(start, stop, shape.layers * layer.seconds(start, stop - start))
            chunks = schedule.chunks
            seconds = simulated(chunks, shape, cards, layer, HOST[times.kind], at_once=cuts != "off")
            alone = alone or seconds
            yield {
                "tokens": length,
                "shape": name,
                "kind": times.kind,
                "density": times.density,
                "cards": cards,
                "pipeline": cuts,
                "simulated_seconds": round(seconds, 2),
                "times_as_fast": round(alone / seconds, 3),
                "chunks": len(chunks),
                "shortest_chunk": min(stop - start for start, stop in chunks),
                "times_from": times.source,
                **({"measured_seconds": times.seconds} if cards == 1 and name == times.shape else {}),
                "assumed": {"host_seconds_a_layer": HOST[times.kind], "bytes_a_second_between_cards": BETWEEN_CARDS},
            }


def scaled(layer: Cost, measured: Shape, shape: Shape) -> Cost:
    """The cost of a layer of another shape, by the operations of its linear layers and of its attention."""
    one, other = (operations(replace(which, layers=1)) for which in (measured, shape))
    return Cost(layer.token * other[0] / one[0], layer.pair * other[1] / one[1], layer.chunk)


def simulated(
    chunks: Sequence[tuple[int, int]], shape: Shape, cards: int, layer: Cost, host: float, at_once: bool
) -> float:
    """Seconds until the last card has done the last chunk.

    A card begins a chunk when it has done the one before, the card before has sent it, and the host has come to it; the
    host queues layer by layer, and is no more than `most_under_way` chunks ahead. Without `at_once` there is one chunk
    under way.
    """
    stages = [Stage(torch.device("cuda", i), *part(shape.layers, cards, i)) for i in range(cards)]
    most = most_under_way(stages) if at_once else 1
    free, done, queued = [0.0] * cards, [0.0] * most, 0.0
    for number, (start, stop) in enumerate(chunks):
        there = 0.0
        queued = max(queued, done[number % most])
        for stage, (_, first, last) in enumerate(stages):
            begin = max(free[stage], there, queued)
            queued += host * (last - first)
            free[stage] = max(begin + (last - first) * layer.seconds(start, stop - start), queued)
            there = free[stage] + (stop - start) * shape.hidden * 2 / BETWEEN_CARDS
        done[number % most] = free[-1]
    return free[-1]


def part(layers: int, cards: int, number: int) -> tuple[int, int]:
    """First layer of a card, and the one after its last: as many on each card as can be."""
    return layers * number // cards, layers * (number + 1) // cards
