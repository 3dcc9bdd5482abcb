"""Offline refinement of vertical and slash budgets: heads that recall too little get more (Qwen2.5-1M report, Alg. 1).

The report publishes neither threshold nor step. The step here is what the budgets of Qwen2.5-7B- and 14B-Instruct-1M
show: they are MInference's, raised by multiples of 2,048 columns and diagonals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.sparsity.budgets import HeadBudgets, dump, load
from qwen_longctx.sparsity.record import SpanRecord

THRESHOLD, STEP, ROUNDS = 0.9, 2048, 10


class Round(NamedTuple):
    """One prefill of one text: the recall of all heads, and how many of them were raised after it."""

    tokens: int
    number: int
    recall: float
    lowest_recall: float
    raised: int


def calibrate(
    model: Any,
    texts: Sequence[torch.Tensor],
    start: HeadBudgets,
    output: str | Path,
    *,
    threshold: float = THRESHOLD,
    step: int = STEP,
    rounds: int = ROUNDS,
    **overrides: Any,
) -> list[Round]:
    """Raise budgets text by text until every head recalls `threshold`, and write them in Qwen's file format.

    The file is written after every round, with a note of the progress beside it: the same call goes on where it was
    stopped.

    Parameters
    ----------
    model
        A checkpoint that can be patched.
    texts : sequence of torch.Tensor
        Shape (1, tokens) each; ascending lengths save rounds.
    start : HeadBudgets
    output : str or path
        File to write.
    threshold : float
        Recall wanted of each head, the mean over the spans of a text.
    step : int
        Columns and diagonals that a head gains in a round.
    rounds : int
        Rounds a text at most.
    **overrides
        Other settings of the patch.

    Returns
    -------
    list of Round
        Of this call and those it continues.

    Raises
    ------
    ValueError
        `threshold` is not between 0 and 1, or `step` or `rounds` below 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
    if step < 1 or rounds < 1:
        raise ValueError(f"step and rounds must be at least 1, got {step} and {rounds}")
    path = Path(output)
    progress = _Progress(path, {"threshold": threshold, "step": step, "texts": [t.shape[1] for t in texts]})
    budgets, done = progress.read(start)
    with transformers_logging.tqdm(total=rounds * len(texts), initial=len(done), desc="Calibrate", unit="round") as bar:
        for ids in texts:
            for number in range(rounds):
                if any((r.tokens, r.number) == (ids.shape[1], number) for r in done):
                    continue
                if any(r.tokens == ids.shape[1] and r.raised == 0 for r in done):
                    bar.update()
                    continue
                recall = _recall(model, ids, budgets, overrides)
                budgets, raised = _raise(budgets, recall, threshold, step, ids.shape[1])
                done.append(Round(ids.shape[1], number, float(recall.mean()), float(recall.min()), raised))
                progress.write(budgets, done)
                bar.update()
    progress.finish()
    return done


@torch.no_grad()
def _recall(model: Any, ids: torch.Tensor, budgets: HeadBudgets, overrides: dict[str, Any]) -> torch.Tensor:
    """Mean recall of every head over the spans of one prefill, shape (layers, heads)."""
    cache = LongContextCache(ids.shape[1])
    settings = {
        "sparse_attention_threshold": min(ids.shape[1] - 1, 32768),
        **overrides,
        "sparse": "vertical_slash",
        "sparse_attention_config": dump(budgets),
    }
    with patched_qwen(model, **settings):
        model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    by_layer: dict[int, list[SpanRecord]] = {}
    for record in cache.sparse_state.records:
        by_layer.setdefault(record.layer, []).append(record)
    return torch.stack(
        [torch.stack([r.recall.mean(0).cpu() for r in by_layer[layer]]).mean(0) for layer in sorted(by_layer)]
    )


def _raise(
    budgets: HeadBudgets, recall: torch.Tensor, threshold: float, step: int, tokens: int
) -> tuple[HeadBudgets, int]:
    """Budgets after one round, with the recall as their scores; heads that keep everything already stay."""
    verticals, slashes = [list(row) for row in budgets.verticals], [list(row) for row in budgets.slashes]
    raised = 0
    for layer, row in enumerate(recall.tolist()):
        for head, found in enumerate(row):
            if found < threshold and min(verticals[layer][head], slashes[layer][head]) < tokens:
                verticals[layer][head] += step
                slashes[layer][head] += step
                raised += 1
    return HeadBudgets(verticals, slashes, [[round(x, 4) for x in row] for row in recall.tolist()]), raised


class _Progress:
    """The file of budgets, and beside it which rounds it holds."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path, self.request = path, request
        self.note = path.with_name(path.name + ".progress")

    def read(self, start: HeadBudgets) -> tuple[HeadBudgets, list[Round]]:
        """Budgets and rounds of an earlier call of the same request, or the start."""
        if not (self.path.is_file() and self.note.is_file()):
            return start, []
        noted = json.loads(self.note.read_text())
        if noted["request"] != self.request:
            raise ValueError(
                f"{self.note} notes the progress of another request ({noted['request']}): finish that, or delete it"
            )
        budgets = load(self.path, len(start.verticals), len(start.verticals[0]))
        return budgets, [Round(*row) for row in noted["rounds"]]

    def write(self, budgets: HeadBudgets, done: list[Round]) -> None:
        """After a round: the budgets first, so that the note never promises more than there is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(dump(budgets)) + "\n")
        self.note.write_text(json.dumps({"request": self.request, "rounds": done}) + "\n")

    def finish(self) -> None:
        self.note.unlink(missing_ok=True)
