"""Walks on a graph given as a list of edges, after the description of OpenAI's GraphWalks data set.

``graphwalks_bfs``
    The nodes that breadth-first search from a node reaches first at a depth of two or three.
``graphwalks_parents``
    The nodes with an edge to a node.

The form of the list, of the operations and of the answer is that of the data set, and so is the score: F1 of the set of
nodes. Graphs and words are ours. The answer is begun for the model with ``Final Answer:``, and the first list after it
counts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from qwen_longctx.evaluation.fitting import fitted, inserted, seeded
from qwen_longctx.evaluation.task import Reader, Sample, Task

_OUT = 2  # edges that leave a node, on average
_BACK = 0.25  # share of the edges of a search that lead to a node already reached
_PARENTS = range(3, 13)

_INTRO = """\
Below is a directed graph, given as the list of its edges, and an operation. Find the nodes that the operation returns.
A breadth-first search (BFS) to a depth returns the nodes first reached at exactly that depth, without the start.
The parents of a node are the nodes with an edge to it, without the node itself.
Give your answer as one line: Final Answer: [nodes, separated by commas]

Three examples on this graph:
uvwx -> alke
abcd -> uvwx
abcd -> efgh
efgh -> uvwx

Operation: Perform a BFS from node abcd with depth 1.
Final Answer: [uvwx, efgh]

Operation: Perform a BFS from node abcd with depth 2.
Final Answer: [alke]

Operation: Find the parents of node uvwx.
Final Answer: [abcd, efgh]

The graph has the following edges:
"""

Edge = tuple[str, str]


def _bfs(reader: Reader, length: int, source: random.Random) -> Sample:
    nodes = _nodes(reader, length, source)
    depth = source.choice((2, 3))
    levels, edges = _search(nodes, depth, source)
    expanded = {node for level in levels[:-1] for node in level}
    others = (edge for edge in _edges(nodes, source, edges) if edge[0] not in expanded)
    operation = f"Perform a BFS from node {levels[0][0]} with depth {depth}."
    return _sample(reader, length, source, operation, edges, others, levels[-1])


def _search(nodes: Sequence[str], depth: int, source: random.Random) -> tuple[list[list[str]], list[Edge]]:
    """A start and what is reached from it, level by level, and the edges that leave all levels but the last."""
    fresh = iter(source.sample(nodes, len(nodes)))
    levels = [[next(fresh)]]
    edges: dict[Edge, None] = {}
    for _ in range(depth):
        reached = [node for level in levels for node in level]
        levels.append([])
        for node in levels[-2]:
            new = next(fresh)  # at least one, so that there is a next level
            levels[-1].append(new)
            edges[node, new] = None
            for _ in range(source.randrange(2 * _OUT - 1)):
                known = source.random() < _BACK
                end = source.choice(reached) if known else next(fresh)
                if end != node:
                    edges[node, end] = None
                if not known:
                    levels[-1].append(end)
    return levels, list(edges)


def _parents(reader: Reader, length: int, source: random.Random) -> Sample:
    nodes = _nodes(reader, length, source)
    node, *parents = source.sample(nodes, 1 + source.choice(_PARENTS))
    edges = [(parent, node) for parent in parents]
    others = (edge for edge in _edges(nodes, source, edges) if edge[1] != node)
    return _sample(reader, length, source, f"Find the parents of node {node}.", edges, others, parents)


def _nodes(reader: Reader, length: int, source: random.Random) -> list[str]:
    """Hashes to name the nodes by: one for every `_OUT` edges that fit."""
    line = reader.count(_line((f"{source.getrandbits(40):010x}", f"{source.getrandbits(40):010x}")))
    count = max(64, length // line // _OUT)
    return list(dict.fromkeys(f"{source.getrandbits(40):010x}" for _ in range(count)))


def _edges(nodes: Sequence[str], source: random.Random, seen: Iterable[Edge]) -> Iterator[Edge]:
    """Random edges without end, none twice and none from a node to itself."""
    drawn = set(seen)
    while True:
        start, end = source.choice(nodes), source.choice(nodes)
        if start != end and (start, end) not in drawn:
            drawn.add((start, end))
            yield start, end


def _line(edge: Edge) -> str:
    return f"{edge[0]} -> {edge[1]}\n"


def _sample(
    reader: Reader,
    length: int,
    source: random.Random,
    operation: str,
    edges: Sequence[Edge],
    others: Iterable[Edge],
    answer: Sequence[str],
) -> Sample:
    """A graph of `edges` scattered among `others`; the answer lists its nodes in the order in which they name them."""
    edges = source.sample(edges, len(edges))
    answers = tuple(dict.fromkeys(node for edge in edges for node in edge if node in set(answer)))
    depths = sorted(source.random() for _ in edges)
    target = f" [{', '.join(answers)}]"
    new_tokens = reader.count(target) + 16

    def build(pieces: list[str]) -> Sample:
        graph = "".join(inserted(pieces, [_line(edge) for edge in edges], depths))
        return Sample(
            f"{_INTRO}{graph}\nOperation: {operation}", target, answers, prefix="Final Answer:", new_tokens=new_tokens
        )

    return fitted(reader, length, (_line(edge) for edge in others), build)


def f1(sample: Sample, answer: str) -> float:
    """F1 of the nodes of the first list that the answer gives, as a set."""
    found = re.search(r"Final Answer: ?\[(.*?)\]", sample.prefix + answer)
    named = {node.strip() for node in found[1].split(",")} - {""} if found else set()
    right = len(named & set(sample.answers))
    return 2 * right / (len(named) + len(sample.answers))


TASKS = (
    Task("graphwalks_bfs", seeded("graphwalks_bfs", _bfs), f1),
    Task("graphwalks_parents", seeded("graphwalks_parents", _parents), f1),
)
