"""Random calls of patched models against the definition in float64: ``python tests/fuzz.py --cases 10000``.

10,000 cases take a quarter to half an hour on a core; ``--seed`` continues where another run stopped, and
``--cases 1 --seed 4711`` repeats one case. `test_fuzz` runs the first cases of every kind.

A case draws a model of some family, a geometry, settings, a padded batch, and what is done with it: a history of calls
on one cache (a prompt, further turns, decoded tokens, crops, rows selected as beam search does, interruptions and
retries), a `generate`, or a classification. The definition knows nothing of batches, padding, chunks of prefill or
caches: every row is worked out alone, from its tokens and the attention temperature that each of them had when it was
added. Logits, hidden states, losses and generated tokens must agree.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from definition import dense_model
from helpers import CLASSES, FAMILIES, tiny_model
from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.patches.method import cache_of

TOLERANCE = 1e-7  # transformers works some norms and rotary tables of a float64 model out in float32
VOCABULARY = 97
LABELS = 3
EVERYTHING = [{str(head): ["vertical_and_slash", 10_000, 10_000, 1.0] for head in range(4)}] * 2
SPARSE = [
    {"sparse": "block_scores", "density": 1.0},
    {"sparse": "vertical_slash", "sparse_attention_config": EVERYTHING},
]


class Interruption(Exception):
    """Raised in the middle of a call."""


@dataclass
class Row:
    """A row of the batch.

    `heat` is the factor on the logits of each token as a query, `pad` what stands before the row, and `shift` what its
    position ids count more than its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    heat: list[float] = field(default_factory=list)
    pad: int = 0
    shift: int = 0

    def copy(self) -> Row:
        """A row that goes on by itself."""
        return replace(self, tokens=list(self.tokens), heat=list(self.heat))


class Case:
    """One random case; all choices come from its seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        dice = self.dice
        sparse = dice.random() < 0.12
        local = dice.randint(1, 16) if sparse else 0
        chunk = dice.choice([32, 64]) + local if sparse else dice.randint(6, 40)
        self.geometry = {
            "chunk_size": chunk,
            "local_size": local or dice.randint(1, chunk // 2),
            "original_max_position_embeddings": dice.choice([5, 20, 60, 1000]),
        }
        self.settings: dict[str, Any] = {
            "attention_temperature": dice.choice([True, True, "position", False]),
            "prefill_chunk_size": dice.choice([1, 3, 7, 16, 50, 1000]),
            "mlp_chunk_size": dice.choice([2, 5, 2048]),
            "kernel": "reference" if sparse else dice.choice(["auto", "auto", "reference"]),
            **(
                {"sparse_attention_threshold": dice.choice([1, 40]), **dice.choice(SPARSE)}
                if sparse
                else {"sparse": "off"}
            ),
        }
        self.family = dice.choice(FAMILIES)
        self.kind = dice.choices(["calls", "generate", "classify"], [6, 1, 1])[0]
        self.training = self.kind == "calls" and dice.random() < 0.15
        self.rows = [Row() for _ in range(dice.randint(1, 3))]
        self.steps: list[str] = []
        self.cache: Any = None
        self.room: int | None = None  # of a cache that cannot grow

    def describe(self) -> str:
        """What was drawn, for a report."""
        cache = type(self.cache).__name__
        return (
            f"{self.kind} {self.family} {self.geometry} {self.settings} training={self.training} "
            f"rows={len(self.rows)} {cache} {self.steps}"
        )

    def run(self) -> float:
        """Run the case; returns the largest error against the definition, relative to the largest logit."""
        self.model = _classifier(self.family) if self.kind == "classify" else _model(self.family)
        with patched_qwen(self.model, **self.geometry, **self.settings), torch.set_grad_enabled(self.training):
            if self.kind == "generate":
                return self._generate()
            if self.kind == "classify":
                return self._classify()
            worst = self._prompt()
            for _ in range(self.dice.randint(0, 4) if self.cache is not None else 0):
                worst = max(worst, self._step())
        return worst

    # histories of calls

    @property
    def held(self) -> int:
        """Tokens in the cache, padding included."""
        return self.rows[0].pad + len(self.rows[0].tokens)

    def _prompt(self) -> float:
        dice = self.dice
        side = dice.choice(["none", "left", "left", "right", "both"])
        longest = dice.choice([dice.randint(1, 20), dice.randint(1, 110)])
        if side in ("none", "left") and not self.training and dice.random() < 0.8 and self.cache is None:
            longest = self._make_cache(longest)
        elif self.cache is not None:
            side = dice.choice(["none", "left"])
            longest = min(longest, self.room or longest)
        lengths = self._lengths(side, longest)
        for row, length in zip(self.rows, lengths, strict=True):
            row.pad = {"left": longest - length, "both": dice.randint(0, longest - length)}.get(side, 0)
            row.shift = 0
        return self._call([_draw(dice, length) for length in lengths], longest, 0, f"prompt {side} {lengths}")

    def _lengths(self, side: str, longest: int) -> list[int]:
        """Tokens of every row; some hold none beside others that do."""
        if side == "none":
            return [longest] * len(self.rows)
        lengths = [self.dice.randint(1, longest) for _ in self.rows]
        if side == "left" and len(lengths) > 1 and self.dice.random() < 0.15:
            lengths[0] = 0
        return lengths

    def _make_cache(self, longest: int) -> int:
        """Make a cache; returns a number of tokens that fits."""
        dice = self.dice
        stride = self.geometry["chunk_size"] - self.geometry["local_size"]
        kind = dice.choice(["dynamic", "dynamic", "own", "own with room", "static"])
        if kind == "static":
            self.room = stride
            self.cache = StaticCache(config=self.model.config, max_cache_len=stride)
            return min(longest, stride)
        room = dice.randint(0, 200) if kind == "own with room" else 0
        self.cache = DynamicCache() if kind == "dynamic" else LongContextCache(room)
        return longest

    def _step(self) -> float:
        dice = self.dice
        kinds = ["decode", "turn", "turn", "crop", "rows"] if self.room is None else ["decode", "turn", "rows"]
        kind = dice.choice(kinds)
        if kind == "crop":
            self._crop(dice.choice([dice.randint(0, self.held), max(0, self.held - dice.randint(0, 5))]))
            return 0.0
        if kind == "rows":
            self._select()
            return 0.0
        if self.held == 0:
            return self._prompt()
        count = 1 if kind == "decode" else dice.randint(1, 60)
        if self.room is not None:
            count = min(count, self.room - self.held)
        if count == 0:
            return 0.0
        return self._call([_draw(dice, count) for _ in self.rows], count, self.held, f"{kind} of {count}")

    def _crop(self, keep: int) -> None:
        held = self.held
        if keep < held:
            self.cache.crop(keep - held)
        for row in self.rows:
            row.pad = min(row.pad, keep)
            del row.tokens[keep - row.pad :], row.heat[keep - row.pad :]
        self.steps.append(f"crop to {keep}")

    def _select(self) -> None:
        chosen = [self.dice.randrange(len(self.rows)) for _ in range(self.dice.randint(1, 3))]
        if self.room is not None:
            chosen = (chosen * len(self.rows))[: len(self.rows)]  # the batch of a static cache is fixed
        if len(chosen) == len(self.rows):
            self.cache.reorder_cache(torch.tensor(chosen))
        else:
            self.cache.batch_select_indices(torch.tensor(chosen))
        self.rows = [self.rows[i].copy() for i in chosen]
        self.steps.append(f"rows {chosen}")

    def _call(self, new: list[list[int]], width: int, held: int, name: str) -> float:
        """Make one call that adds `new` to the rows: `width` tokens with padding, to the `held` that the cache has."""
        self.steps.append(name)
        before = [row.pad if held == 0 else 0 for row in self.rows]
        fresh = [not row.tokens for row in self.rows]
        ids = torch.full((len(new), width), self.dice.randrange(VOCABULARY))
        mask = torch.zeros(len(new), held + width, dtype=torch.long)
        for number, (row, tokens, pad) in enumerate(zip(self.rows, new, before, strict=True)):
            self._add(row, tokens, held == 0)
            ids[number, pad : pad + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[number, row.pad : row.pad + len(row.tokens)] = 1
        arguments = self._arguments(ids, mask, held, fresh)
        wanted = [
            _definition(self.model, row, self.geometry)[len(row.tokens) - len(t) :]
            for row, t in zip(self.rows, new, strict=True)
        ]
        labels = self._labels(ids, mask[:, held:])
        if labels is not None:
            return self._with_labels(arguments, labels, wanted, before)
        kept, logits = self._logits(arguments, width)
        worst = 0.0
        for number, (pad, true) in enumerate(zip(before, wanted, strict=True)):
            for place, token in enumerate(kept):
                if pad <= token < pad + len(true):
                    worst = max(worst, _apart(logits[number, place], true[token - pad], true))
        return worst

    def _logits(self, arguments: dict[str, Any], width: int) -> tuple[list[int], torch.Tensor]:
        """Call the model or its base in some form; returns the tokens whose logits came, and the logits."""
        dice = self.dice
        form = dice.choice(["plain", "plain", "base", "tuple", "no cache", "last", "some"])
        self.steps[-1] += f" {form}"
        every = list(range(width))
        if form == "base":
            hidden = self._attempt(lambda: self.model.model(**arguments).last_hidden_state)
            return every, self.model.lm_head(hidden)
        if form == "tuple":
            return every, self._attempt(lambda: self.model(**arguments, return_dict=False)[0])
        if form == "no cache" and self.cache is None:
            outputs = self._attempt(lambda: self.model(**arguments, use_cache=False))
            assert cache_of(outputs) is None
            return every, outputs.logits
        if form == "last":
            count = dice.randint(1, width + 3)
            return every[-count:], self._attempt(lambda: self.model(**arguments, logits_to_keep=count).logits)
        if form == "some":
            kept = [dice.randrange(width) for _ in range(dice.randint(1, 5))]
            return kept, self._attempt(lambda: self.model(**arguments, logits_to_keep=torch.tensor(kept)).logits)
        return every, self._attempt(lambda: self.model(**arguments).logits)

    def _attempt(self, call: Callable[[], Any]) -> Any:
        """Make a call, sometimes after one that was interrupted: it must have left nothing."""
        if self.dice.random() > 0.15:
            return call()
        held = 0 if self.cache is None else self.cache.get_seq_length()
        try:
            with _interruption(self.model, self.dice, self.steps):
                return call()
        except Interruption:
            assert self.cache is None or self.cache.get_seq_length() == held
        return call()

    def _add(self, row: Row, tokens: list[int], first: bool) -> None:
        """Add tokens to a row, with the attention temperature that the definition gives each of them."""
        end = len(tokens)
        for token in tokens:
            position = len(row.tokens)
            mode = self.settings["attention_temperature"]
            length = end if mode is True and first else position + 1
            row.tokens.append(token)
            row.heat.append(_heat(length, self.geometry["original_max_position_embeddings"]) if mode else 1.0)

    def _arguments(self, ids: torch.Tensor, mask: torch.Tensor, held: int, fresh: list[bool]) -> dict[str, Any]:
        dice = self.dice
        arguments: dict[str, Any] = {"past_key_values": self.cache}
        if dice.random() < 0.2:
            arguments["inputs_embeds"] = self.model.get_input_embeddings()(ids)
        else:
            arguments["input_ids"] = ids
        if not bool(mask.all()) or dice.random() < 0.5:
            longer = torch.ones(len(mask), dice.choice([0, 0, 3]), dtype=torch.long)  # as for a cache with free room
            given = torch.cat((mask, longer), 1)
            arguments["attention_mask"] = given.to(dice.choice([torch.long, torch.bool, torch.float32, torch.int32]))
        form = dice.choice(["none", "none", "counted", "own", "one row"])
        if form == "one row" and any(
            row.shift != row.pad for row, new in zip(self.rows, fresh, strict=True) if not new
        ):
            form = "own"
        for row, new in zip(self.rows, fresh, strict=True):
            if new:
                row.shift = {"own": dice.randint(0, 30), "one row": row.pad}.get(form, 0)
        positions = mask.cumsum(1) - 1
        if form == "counted":
            arguments["position_ids"] = positions.masked_fill(mask == 0, dice.choice([0, 1]))[:, held:]
        elif form == "own":
            arguments["position_ids"] = (positions + torch.tensor([row.shift for row in self.rows])[:, None])[:, held:]
        elif form == "one row":
            arguments["position_ids"] = torch.arange(held, mask.shape[1])[None]
        return arguments

    def _labels(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
        """Labels of the real tokens but for some; none at a row's first one, which padding would predict."""
        if self.dice.random() > 0.2:
            return None
        labels = ids.masked_fill(real == 0, -100)
        labels[:, 1:].masked_fill_(real[:, :-1] == 0, -100)
        for _ in range(self.dice.choice([0, 5])):
            labels[self.dice.randrange(len(ids)), self.dice.randrange(ids.shape[1])] = -100
        return labels if bool((labels[:, 1:] != -100).any()) else None

    def _with_labels(
        self, arguments: dict[str, Any], labels: torch.Tensor, wanted: list[torch.Tensor], before: list[int]
    ) -> float:
        """The error of logits and of the loss, which is worked out in float32."""
        items = self.dice.choice([None, None, 7])
        extra = {} if items is None else {"num_items_in_batch": items}
        self.steps[-1] += f" labels {items}"
        outputs = self._attempt(lambda: self.model(**arguments, labels=labels, **extra))
        losses, worst = [], 0.0
        for number, (pad, true) in enumerate(zip(before, wanted, strict=True)):
            if len(true):
                worst = max(worst, _apart(outputs.logits[number, pad : pad + len(true)], true, true))
                targets = labels[number, pad + 1 : pad + len(true)]
                losses.append(functional.cross_entropy(true[:-1], targets, reduction="none")[targets != -100])
        every = torch.cat(losses)
        loss = every.mean() if items is None else every.sum() / items
        return max(worst, float((outputs[0] - loss).abs() / loss.abs().clamp(min=1)) * 1e-2)

    # generate, and other heads

    def _padded(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of random length, padded on the left: ids and mask."""
        lengths = [self.dice.randint(1, longest) for _ in self.rows]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, length in enumerate(lengths):
            ids[number, ids.shape[1] - length :] = torch.tensor(_draw(self.dice, length))
            mask[number, ids.shape[1] - length :] = 1
        self.steps.append(f"rows {lengths}")
        return ids, mask

    def _generate(self) -> float:
        """Generated tokens must be those of transformers' own loop over the definition."""
        dice = self.dice
        strategy = dice.choice(["greedy", "greedy", "sample", "beams", "lookup", "assisted", "chunks"])
        if strategy in ("lookup", "assisted"):
            self.rows = self.rows[:1]
        ids, mask = self._padded(60)
        prefix = 0
        self.cache = dice.choice([lambda: None, DynamicCache, LongContextCache])()
        # transformers' assisted decoding passes the whole text again, and its chunks want an empty cache before 5.0
        if self.cache is not None and strategy in ("greedy", "sample") and dice.random() < 0.5:
            prefix = dice.randint(0, ids.shape[1] - 1)
        if prefix:
            self.model(ids[:, :prefix], attention_mask=mask[:, :prefix], past_key_values=self.cache)
        common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": dice.randint(1, 5), "do_sample": False}
        if strategy == "lookup" or dice.random() < 0.3:  # which wants an end token before 5.0
            common["eos_token_id"], common["pad_token_id"] = dice.randrange(1, VOCABULARY), 0
        common.update(self._strategy(strategy))
        ours = dict(common)
        if strategy == "lookup":
            ours["prompt_lookup_num_tokens"] = dice.randint(1, 6)
        elif strategy == "assisted":
            ours["assistant_model"] = _assistant(self.family)
        elif strategy == "chunks" and self.cache is not None:
            ours["prefill_chunk_size"] = dice.randint(1, 30)
        cut = ours.get("prefill_chunk_size")
        first = min(prefix or cut or ids.shape[1], ids.shape[1])
        self.steps.append(f"{strategy} prefix {prefix} chunks {cut} { ({**common, 'attention_mask': 'given'}) }")
        oracle = _oracle(self.family, self, first)
        torch.manual_seed(0)
        wanted = oracle.generate(ids, use_cache=False, **common)
        torch.manual_seed(0)
        found = self.model.generate(ids, past_key_values=self.cache, **ours)
        return 0.0 if torch.equal(found[:, : wanted.shape[1]], wanted) else math.inf

    def _strategy(self, name: str) -> dict[str, Any]:
        if name == "sample":
            return {
                "do_sample": True,
                "top_k": 20,
                "num_return_sequences": self.dice.choice([1, 2]) if self.cache is None else 1,
            }
        if name == "beams":
            return {"num_beams": 3, "num_return_sequences": self.dice.choice([1, 2]), "length_penalty": 0.5}
        return {}

    def _classify(self) -> float:
        """A classification head reads the last token of each row."""
        ids, mask = self._padded(90)
        if self.dice.random() < 0.5:
            ids, mask = _moved_left(ids, mask), _moved_left(mask, mask)
        logits = self._attempt(lambda: self.model(ids, attention_mask=mask).logits)
        worst = 0.0
        shim = SimpleNamespace(model=self.model.model, lm_head=self.model.score)
        for number in range(len(ids)):
            row = Row()
            self._add(row, ids[number][mask[number] == 1].tolist(), True)
            worst = max(worst, _apart(logits[number], _definition(shim, row, self.geometry)[-1]))
        return worst


def _draw(dice: random.Random, count: int) -> list[int]:
    return [dice.randrange(1, VOCABULARY) for _ in range(count)]


def _apart(values: torch.Tensor, true: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """The largest error, relative to the largest of `scale`."""
    return float(((values - true).abs().max() / (true if scale is None else scale).abs().max()).detach())


def _moved_left(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows that were padded on the left, padded on the right."""
    return torch.stack([row.roll(int(real.sum())) for row, real in zip(values, mask, strict=True)])


@contextmanager
def _interruption(model: Any, dice: random.Random, steps: list[str]) -> Iterator[None]:
    """Raise in some part of some layer at one of its first calls; if that is never reached, nothing happens."""
    layer = dice.choice(list(model.model.layers))
    part = dice.choice([layer, layer.self_attn, layer.self_attn.k_proj, layer.mlp])
    left = dice.choice([1, 1, 2, 3])
    steps[-1] += f" interrupted at call {left}"

    def count(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interruption

    hook = part.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _heat(length: int, original: int) -> float:
    return max(1.0, 0.1 * math.log(length / original) + 1.0) ** 2


def _definition(model: Any, row: Row, geometry: dict[str, int]) -> torch.Tensor:
    """What the definition gives for a row, a line for each of its tokens."""
    if not row.tokens:
        return torch.zeros(0, VOCABULARY, dtype=torch.float64)
    heat = torch.tensor(row.heat, dtype=torch.float64)[:, None]
    with torch.no_grad():
        return dense_model(model, torch.tensor([row.tokens]), geometry["chunk_size"], geometry["local_size"], heat)[0]


_MODELS: dict[Any, Any] = {}


def _model(family: str) -> Any:
    if family not in _MODELS:
        _MODELS[family] = tiny_model(family, dtype=torch.float64, max_position_embeddings=40)
    return _MODELS[family]


def _assistant(family: str) -> Any:
    """A small model of the same family that drafts."""
    if (family, "assistant") not in _MODELS:
        _MODELS[family, "assistant"] = tiny_model(family, dtype=torch.float64, num_hidden_layers=1)
    return _MODELS[family, "assistant"]


def _classifier(family: str) -> Any:
    if (family, "classifier") not in _MODELS:
        torch.manual_seed(1)
        head = getattr(transformers, f"{CLASSES[family]}ForSequenceClassification")
        config = tiny_model(family, max_position_embeddings=40, num_labels=LABELS).config
        _MODELS[family, "classifier"] = head(config).double().eval()
    return _MODELS[family, "classifier"]


def _oracle(family: str, case: Case, first: int) -> Any:
    """A model whose every step is the definition: transformers' loops run on it without a cache.

    The first `first` tokens of a row, padding included, have the attention temperature of a prompt.
    """
    if (family, "oracle") not in _MODELS:
        _MODELS[family, "oracle"] = tiny_model(family, dtype=torch.float64, max_position_embeddings=40)
    model = _MODELS[family, "oracle"]

    def forward(input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        logits = []
        starts = input_ids.shape[1] - attention_mask.sum(1) if attention_mask is not None else [0] * len(input_ids)
        for ids, start in zip(input_ids, starts, strict=True):
            row, start = Row(), int(start)
            case._add(row, ids[start:first].tolist(), True)
            case._add(row, ids[max(start, first) :].tolist(), False)
            logits.append(_definition(model, row, case.geometry)[-1:])
        return CausalLMOutputWithPast(logits=torch.stack(logits))

    model.forward = forward
    return model


def main() -> int:
    """Run cases until the number asked for is reached; returns 1 if any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
