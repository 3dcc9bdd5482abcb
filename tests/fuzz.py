"""Random calls of patched models against the definition in float64: ``python tests/fuzz.py --cases 10000``.

A case draws a model of some family, a geometry, settings, a padded batch and a history of calls on one cache: a prompt,
further turns, decoded tokens, crops, and rows selected as beam search does. The definition knows nothing of batches,
padding, chunks of prefill or caches: every row is worked out alone, from its tokens and the attention temperature that
each of them had when it was added. Logits, hidden states and losses must agree.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from definition import dense_model
from helpers import FAMILIES, tiny_model
from qwen_longctx import LongContextCache, patched_qwen

TOLERANCE = 1e-7  # transformers works some norms and rotary tables of a float64 model out in float32
VOCABULARY = 97


@dataclass
class Row:
    """A row of the batch: its tokens so far, and the factor on the logits of each of them as a query."""

    tokens: list[int] = field(default_factory=list)
    heat: list[float] = field(default_factory=list)


class Case:
    """One random case; all choices come from its seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        dice = self.dice
        chunk = dice.randint(6, 40)
        self.geometry = {
            "chunk_size": chunk,
            "local_size": dice.randint(1, chunk // 2),
            "original_max_position_embeddings": dice.choice([5, 20, 60, 1000]),
        }
        self.settings = {
            "attention_temperature": dice.choice([True, True, "position", False]),
            "prefill_chunk_size": dice.choice([1, 3, 7, 16, 50, 1000]),
            "mlp_chunk_size": dice.choice([2, 5, 2048]),
            "kernel": dice.choice(["auto", "auto", "reference"]),
            "sparse": "off",
        }
        self.family = dice.choice(FAMILIES)
        self.training = dice.random() < 0.15
        self.rows = [Row() for _ in range(dice.randint(1, 3))]
        self.pads = [0] * len(self.rows)
        self.steps: list[str] = []
        self.cache: Any = None

    def describe(self) -> str:
        """What was drawn, for a report."""
        return (
            f"{self.family} {self.geometry} {self.settings} training={self.training} rows={len(self.rows)} {self.steps}"
        )

    def run(self) -> float:
        """Run the case; returns the largest error against the definition, relative to the largest logit."""
        model = _model(self.family)
        self.model = model
        with patched_qwen(model, **self.geometry, **self.settings), torch.set_grad_enabled(self.training):
            worst = self._prompt()
            for _ in range(self.dice.randint(0, 4) if self.cache is not None else 0):
                worst = max(worst, self._step())
        return worst

    def _prompt(self) -> float:
        dice = self.dice
        side = dice.choice(["none", "left", "left", "right", "both"])
        longest = dice.choice([dice.randint(1, 20), dice.randint(1, 110)])
        lengths = [longest if side == "none" else dice.randint(1, longest) for _ in self.rows]
        before = [
            {"none": 0, "left": longest - n, "right": 0, "both": dice.randint(0, longest - n)}[side] for n in lengths
        ]
        self.pads = before
        if side in ("none", "left") and not self.training and dice.random() < 0.8:
            self.cache = dice.choice([DynamicCache, LongContextCache, lambda: LongContextCache(dice.randint(0, 200))])()
        new = [[dice.randrange(1, VOCABULARY) for _ in range(n)] for n in lengths]
        return self._call(new, before, longest, f"prompt {side} {lengths}")

    def _step(self) -> float:
        dice = self.dice
        kind = dice.choice(["decode", "turn", "turn", "crop", "rows"])
        held = self.pads[0] + len(self.rows[0].tokens)
        if kind == "crop":
            keep = dice.randint(max(p for p in self.pads) + 1, held) if held > max(self.pads) + 1 else held
            if keep < held:
                self.cache.crop(keep - held)
            for row, pad in zip(self.rows, self.pads, strict=True):
                del row.tokens[keep - pad :], row.heat[keep - pad :]
            self.steps.append(f"crop to {keep}")
            return 0.0
        if kind == "rows":
            chosen = [dice.randrange(len(self.rows)) for _ in range(dice.randint(1, 3))]
            if len(chosen) == len(self.rows):
                self.cache.reorder_cache(torch.tensor(chosen))
            else:
                self.cache.batch_select_indices(torch.tensor(chosen))
            self.rows = [Row(list(self.rows[i].tokens), list(self.rows[i].heat)) for i in chosen]
            self.pads = [self.pads[i] for i in chosen]
            self.steps.append(f"rows {chosen}")
            return 0.0
        count = 1 if kind == "decode" else dice.randint(1, 60)
        new = [[dice.randrange(1, VOCABULARY) for _ in range(count)] for _ in self.rows]
        return self._call(new, [0] * len(new), count, f"{kind} of {count}")

    def _call(self, new: list[list[int]], before: list[int], width: int, name: str) -> float:
        """Make one call that adds `new` to the rows, `before` tokens of padding in front of each, `width` in all."""
        dice = self.dice
        self.steps.append(name)
        first = not self.rows[0].tokens
        held = 0 if first else self.pads[0] + len(self.rows[0].tokens)
        ids = torch.full((len(new), width), dice.randrange(VOCABULARY))
        mask = torch.zeros(len(new), held + width, dtype=torch.long)
        for number, (row, tokens, pad) in enumerate(zip(self.rows, new, before, strict=True)):
            self._add(row, tokens, first)
            ids[number, pad : pad + len(tokens)] = torch.tensor(tokens)
            begin = self.pads[number]
            mask[number, begin : begin + len(row.tokens)] = 1
        arguments = self._arguments(ids, mask, held)
        labels = None
        if dice.random() < 0.25:
            labels = torch.where(mask[:, held:] == 1, ids, -100)
        if labels is not None and not (labels[:, 1:] != -100).any():
            labels = None
        if labels is None and dice.random() < 0.2:
            hidden = self.model.model(**arguments).last_hidden_state
            logits = self.model.lm_head(hidden)
            self.steps[-1] += " base"
        else:
            outputs = self.model(**arguments, **({} if labels is None else {"labels": labels}))
            logits = outputs.logits
        wanted = [self._definition(row)[-len(tokens) :] for row, tokens in zip(self.rows, new, strict=True)]
        worst = 0.0
        for number, (pad, true) in enumerate(zip(before, wanted, strict=True)):
            found = logits[number, pad : pad + len(true)]
            worst = max(worst, float((found - true).abs().max() / true.abs().max()))
        if labels is not None:
            worst = max(worst, self._loss_error(outputs, wanted, before, labels))
        return worst

    def _add(self, row: Row, tokens: list[int], first: bool) -> None:
        """Add tokens to a row, with the attention temperature that the definition gives each of them."""
        end = len(tokens)
        for token in tokens:
            position = len(row.tokens)
            mode = self.settings["attention_temperature"]
            length = end if mode is True and first else position + 1
            row.tokens.append(token)
            row.heat.append(_heat(length, self.geometry["original_max_position_embeddings"]) if mode else 1.0)

    def _arguments(self, ids: torch.Tensor, mask: torch.Tensor, held: int) -> dict[str, Any]:
        dice = self.dice
        arguments: dict[str, Any] = {"past_key_values": self.cache}
        if dice.random() < 0.2:
            arguments["inputs_embeds"] = self.model.get_input_embeddings()(ids)
        else:
            arguments["input_ids"] = ids
        if not bool(mask.all()) or dice.random() < 0.5:
            arguments["attention_mask"] = dice.choice([mask, mask.bool()])
        positions = dice.choice(["none", "none", "generate", "index"])
        if positions == "generate":
            arguments["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, dice.choice([0, 1]))[:, held:]
        elif positions == "index" and (held == 0 or not any(self.pads)):
            arguments["position_ids"] = torch.arange(held, mask.shape[1])[None]
            if any(self.pads):
                self.dice.random()
        return arguments

    def _definition(self, row: Row) -> torch.Tensor:
        heat = torch.tensor(row.heat, dtype=torch.float64)[:, None]
        c, w = self.geometry["chunk_size"], self.geometry["local_size"]
        with torch.no_grad():
            return dense_model(self.model, torch.tensor([row.tokens]), c, w, heat)[0]

    def _loss_error(self, outputs: Any, wanted: list[torch.Tensor], before: list[int], labels: torch.Tensor) -> float:
        losses = []
        for number, (pad, true) in enumerate(zip(before, wanted, strict=True)):
            targets = labels[number, pad + 1 : pad + len(true)]
            losses.append(functional.cross_entropy(true[:-1].float(), targets, reduction="none"))
        mean = torch.cat(losses).mean() if not any(before) else None
        if mean is None:  # padding before a row: its last token of padding predicts the row's first token
            return 0.0
        return float((outputs[0].float() - mean).abs()) * 1e-2  # the loss is worked out in float32


def _heat(length: int, original: int) -> float:
    return max(1.0, 0.1 * math.log(length / original) + 1.0) ** 2


_MODELS: dict[str, Any] = {}


def _model(family: str) -> Any:
    if family not in _MODELS:
        _MODELS[family] = tiny_model(family, dtype=torch.float64, max_position_embeddings=40)
    return _MODELS[family]


def main() -> int:
    """Run cases until the number asked for is reached; returns 1 if any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones count on")
    arguments = parser.parse_args()
    begin, wrong, worst = time.perf_counter(), 0, 0.0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        case = Case(seed)
        try:
            error = case.run()
        except Exception as problem:  # a refusal is a failure too: every case is one that must run
            print(f"seed {seed}: {type(problem).__name__}: {problem}\n    {case.describe()}", flush=True)
            wrong += 1
            continue
        worst = max(worst, error)
        if not error <= TOLERANCE:
            print(f"seed {seed}: error {error:.2e}\n    {case.describe()}", flush=True)
            wrong += 1
    seconds = time.perf_counter() - begin
    print(
        f"{arguments.cases} cases from seed {arguments.seed}, {wrong} wrong, largest error {worst:.1e}, {seconds:.0f} s"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
