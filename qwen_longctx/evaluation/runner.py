"""Tasks at several lengths under several modes, the same samples for every mode, a row for each sample and mode.

A batch is prefilled once. Its cache gives the likelihood of the targets first; it is then cut back to the prompts, and
``generate`` continues from it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.utils import logging as transformers_logging

from qwen_longctx import LongContextCache
from qwen_longctx.errors import InvalidValue, NotFinite
from qwen_longctx.evaluation.modes import DEFAULT_MODES, Mode, check_modes, in_mode, mode_of
from qwen_longctx.evaluation.passkey import input_device
from qwen_longctx.evaluation.samples import Samples, check_vocabulary, fingerprint, reader_of
from qwen_longctx.evaluation.task import Reader, Sample, Task
from qwen_longctx.evaluation.tasks import find
from qwen_longctx.patches.method import cache_argument

logger = logging.getLogger(__name__)

BATCH_TOKENS = 131072
COUNT = 10
_MASKED = 8192  # tokens: beyond, the mask of queries x keys that transformers makes for padded rows weighs gigabytes
_LOGITS_AT_A_TIME = 256  # of float32 over the vocabulary

Key = tuple[str, int, int, str]  # task, length, index of the sample, mode


def key_of(row: dict[str, Any]) -> Key:
    """Which sample under which mode a row is of."""
    return row["task"], row["length"], row["index"], row["mode"]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the left.

    Attributes
    ----------
    ids, mask : torch.Tensor
        Prompts and their mask, both of shape (rows, tokens), int64, on the device of the model's inputs.
    targets : list of list of int
        Token ids of every row's target.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: list[list[int]]

    @classmethod
    def of(cls, samples: Sequence[Sample], reader: Reader, device: torch.device) -> Batch:
        """The rows of some samples."""
        prompts = [reader.prompt_ids(sample) for sample in samples]
        ids, mask = _padded(prompts, left=True)
        return cls(ids.to(device), mask.to(device), [reader.target_ids(sample) for sample in samples])


def _padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one tensor, padded with token 0, and the mask of what is no padding."""
    widest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), widest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(widest - len(row), widest) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions of tokens in their rows, shape of `mask`; 0 at padding before them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def prefill(model: Any, batch: Batch, cache: Any) -> float:
    """Fill `cache` with all tokens of the prompts but the last. Returns the seconds that it took."""
    ids, mask = batch.ids[:, :-1], batch.mask[:, :-1]
    begin = time.perf_counter()
    model(
        ids,
        attention_mask=mask,
        position_ids=_positions(mask),
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(cache),
    )
    if ids.device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
    return time.perf_counter() - begin


@torch.no_grad()
def likelihoods(model: Any, batch: Batch, cache: Any, by_token: bool = False) -> list[tuple[float | None, bool | None]]:
    """Mean negative log-likelihood of each target, nats a token, and whether every token of it is the most likely one.

    Both are None for a row without a target. The targets pass as a continuation of the prompts in `cache`, and are
    taken out of it again: as one, or a token at a time, `by_token`, as `generate` decodes.
    """
    if not any(batch.targets):
        return [(None, None)] * len(batch.targets)
    last = batch.ids[:, -1].tolist()
    ids, mask = _padded([[token, *target[:-1]] for token, target in zip(last, batch.targets, strict=True)], left=False)
    mask = torch.cat((batch.mask[:, :-1], mask.to(batch.mask.device)), dim=1)
    ids = ids.to(batch.ids.device)
    held, tokens = batch.ids.shape[1] - 1, ids.shape[1]
    positions = _positions(mask)[:, held:]
    parts = []
    for start, stop in [(at, at + 1) for at in range(tokens)] if by_token else [(0, tokens)]:
        outputs = model.get_decoder()(
            ids[:, start:stop],
            attention_mask=mask[:, : held + stop],
            position_ids=positions[:, start:stop],
            use_cache=True,
            **cache_argument(cache),
        )
        parts.append(outputs.last_hidden_state)
    hidden = torch.cat(parts, 1)
    cache.crop(-tokens)
    return [_likelihood(model.get_output_embeddings(), *row) for row in zip(hidden, batch.targets, strict=True)]


def _likelihood(head: Any, hidden: torch.Tensor, target: list[int]) -> tuple[float | None, bool | None]:
    """`hidden` of shape (at least the tokens of the target, width): from a token on, each predicts the next."""
    if not target:
        return None, None
    nll, right = 0.0, 0
    for start in range(0, len(target), _LOGITS_AT_A_TIME):
        wanted = torch.tensor(target[start : start + _LOGITS_AT_A_TIME])
        logits = head(hidden[start : start + len(wanted)]).float()
        wanted = wanted.to(logits.device)
        nll -= logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        right += int((logits.argmax(-1) == wanted).sum())
    if not math.isfinite(nll):
        raise NotFinite(
            f"the likelihood of a target is {nll}: load the model in bfloat16 or float32, or copy the checkpoint anew"
        )
    return nll / len(target), right == len(target)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, batch: Batch, cache: Any, new_tokens: Sequence[int]) -> list[str]:
    """What greedy ``generate`` adds to each prompt in `cache`, as text; at most so many tokens a row."""
    with _greedy(model) as ends:
        out = model.generate(
            batch.ids, attention_mask=batch.mask, max_new_tokens=max(new_tokens), **cache_argument(cache)
        )
    added = [row[:most] for row, most in zip(out[:, batch.ids.shape[1] :].tolist(), new_tokens, strict=True)]
    for row in added:  # what follows an end is padding
        del row[next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in added]


@contextmanager
def _greedy(model: Any) -> Iterator[list[int]]:
    """Take away for a block how the checkpoint samples and penalises; gives the tokens that end an answer."""
    before = model.generation_config
    end = before.eos_token_id
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    pad = next((token for token in (before.pad_token_id, *ends) if token is not None), 0)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield ends
    finally:
        model.generation_config = before


def run(model: Any, reader: Reader, task: Task, mode: Mode, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The figures of some samples in one batch; the model runs in `mode` already."""
    batch = Batch.of(samples, reader, input_device(model))
    new_tokens = [sample.new_tokens if task.score else 0 for sample in samples]
    room = batch.ids.shape[1] + max(*map(len, batch.targets), *new_tokens)
    cache = DynamicCache()
    if mode.patched:
        cache = LongContextCache(room, kv_cache=mode.settings(model, model.config).kv_cache)
    seconds = prefill(model, batch, cache)
    kept = _kept(cache)
    sparse_decode = mode.patched and mode.settings(model, model.config).sparse_decode is not None
    likely = likelihoods(model, batch, cache, by_token=sparse_decode)
    texts = answers(model, reader.tokenizer, batch, cache, new_tokens) if any(new_tokens) else [""] * len(samples)
    rows = []
    for number, sample in enumerate(samples):
        nll, right = likely[number]
        score = task.score if new_tokens[number] else None
        rows.append(
            {
                "tokens": len(sample.prompt),
                "fingerprint": fingerprint(reader, sample),
                "nll": None if nll is None else round(nll, 6),
                "target_tokens": len(batch.targets[number]),
                "target_correct": right,
                "score": None if score is None else float(score(sample, texts[number])),
                "answer": None if score is None else texts[number],
                "seconds": round(seconds / len(samples), 4),
                **kept,
            }
        )
    return rows


def _kept(cache: Any) -> dict[str, float | None]:
    """Density of the prefill, and its recall where it was sparse."""
    if not isinstance(cache, LongContextCache):
        return {"density": None, "recall": None}
    report = cache.report()
    recall = [layer["recall"] for layer in report["layers"]]
    return {
        "density": round(report["density"], 5),
        "recall": round(sum(recall) / len(recall), 5) if recall else None,
    }


def rows_together(model: Any, mode: Mode, length: int, batch_tokens: int) -> int:
    """Rows of a batch.

    Sparse prefill steers the budgets of all rows of a batch together, and transformers makes a mask of queries x keys
    for rows that are padded: the first would let rows depend on each other, the second does not fit. Both run alone.
    """
    alone = mode.rule(model, length) is not None if mode.patched else length > _MASKED
    return 1 if alone else max(1, batch_tokens // length)


def batches(
    model: Any,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    modes: Sequence[Mode],
    samples: Samples,
    batch_tokens: int = BATCH_TOKENS,
    done: Collection[Key] = (),
) -> Iterator[list[dict[str, Any]]]:
    """The rows of `evaluate`, those of a batch together, without those of `done`.

    Raises
    ------
    InvalidValue, InvalidType, MissingFile, PatchConflict
        See `modes.check_modes`; before the first run.
    """
    check_modes(model.config, modes, model)
    for mode in modes:
        _tell_dense(model, mode, lengths)
    total = len(tasks) * sum(lengths) * len(modes) * samples.count
    with transformers_logging.tqdm(total=total, desc="Evaluation", unit="tok", unit_scale=True) as bar:
        for task, length in product(tasks, sorted(lengths)):
            found = samples.of(task, length)
            check_vocabulary(found, samples.reader, model.config.vocab_size, task.name)
            for mode in modes:
                size = rows_together(model, mode, length, batch_tokens)
                for start in range(0, len(found), size):
                    numbers = range(start, min(start + size, len(found)))
                    heads: list[dict[str, Any]] = [
                        {"task": task.name, "length": length, "index": n, "mode": mode.name} for n in numbers
                    ]
                    heads = [head for head in heads if key_of(head) not in done]
                    if heads:
                        with in_mode(model, mode, length):
                            rows = run(model, samples.reader, task, mode, [found[head["index"]] for head in heads])
                        yield [{**head, **row} for head, row in zip(heads, rows, strict=True)]
                    bar.update(length * len(numbers))


def _tell_dense(model: Any, mode: Mode, lengths: Sequence[int]) -> None:
    """Warn where a mode that may be sparse is dense."""
    if not mode.patched or mode.settings(model, model.config).sparse == "off":
        return
    dense = [length for length in sorted(lengths) if mode.rule(model, length) is None]
    if not dense:
        return
    if mode.rule(model, 1 << 60) is None:
        logger.warning(f"Mode {mode.name} is dense here: no fast kernel runs that takes block lists")
    else:
        threshold = mode.settings(model, model.config).sparse_attention_threshold
        logger.warning(
            f"Mode {mode.name} is dense at {', '.join(f'{n:,}' for n in dense)} tokens: sparse prefill starts beyond "
            f"sparse_attention_threshold={threshold}, and sparse='auto' where it is faster for this model"
        )


def check(tasks: Sequence[Task], lengths: Sequence[int], count: int) -> None:
    """Refuse an evaluation of nothing.

    Raises
    ------
    InvalidValue
    """
    if not tasks or not lengths or count < 1 or min(lengths) < 1:
        raise InvalidValue(
            f"there is nothing to evaluate: got {len(tasks)} tasks, lengths {list(lengths)} and {count} samples. Give "
            "at least one of each, and lengths from 1 on"
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task | str],
    lengths: Sequence[int],
    modes: Sequence[str] = DEFAULT_MODES,
    *,
    count: int = COUNT,
    seed: int = 0,
    chat: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    samples_in: Any = None,
) -> Iterator[dict[str, Any]]:
    """Run tasks at several lengths under several modes.

    Parameters
    ----------
    model, tokenizer
        Of one checkpoint. A patch in place stays: its settings hold in the modes that patch, and the others are
        refused.
    tasks : sequence of Task or str
        Tasks, their names, or paths of files that define some.
    lengths : sequence of int
        Tokens of prompt and answer.
    modes : sequence of str
        See `modes.mode_of`.
    count, seed : int
        Samples for each task and length, and what they depend on.
    chat : bool, optional
        Wrap prompts in the chat template; by default where the tokenizer has one.
    batch_tokens : int
        Tokens of a batch at most, padding included; a single row may have more.
    samples_in : path, optional
        Folder of sample files, which are read if they are there and written if not.

    Yields
    ------
    dict
        A row for each sample and mode; docs/evaluation.md lists what it holds.

    Raises
    ------
    InvalidValue, InvalidType, MissingFile, MissingPackage, PatchConflict
        Before the first run, unless samples cannot be built: those are built length by length.
    NotFinite
        The model computes what is no number.
    """
    named = [one for task in tasks for one in (find([task]) if isinstance(task, str) else [task])]
    found, lengths = list({task.name: task for task in named}.values()), sorted(set(lengths))
    check(found, lengths, count)
    if batch_tokens < 1:
        raise InvalidValue(f"batch_tokens must be at least 1, got {batch_tokens}")
    samples = Samples(reader_of(tokenizer, chat), count, seed, samples_in)
    read = [mode_of(text) for text in modes]
    return chain.from_iterable(batches(model, found, lengths, read, samples, batch_tokens))
