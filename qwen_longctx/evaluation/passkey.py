"""Passkey retrieval: a five-digit key hidden in a prompt of any exact length, asked for by plain ``generate``.

The wording is that of Qwen's published example (Qwen2.5-1M release, after Mohtashami and Jaggi, arXiv 2305.16300).
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.patches.method import cache_of

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
NEEDLE = " The {name} is {key}. Remember it. {key} is the {name}."
NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
QUESTION = "\nWhat is the {name}? The {name} is"
NAME = "pass key"
NEW_TOKENS = 8


@dataclass(frozen=True)
class Record:
    """One prompt and its outcome. Seconds are of the whole generate; `peak_memory_bytes` is 0 without CUDA."""

    length: int
    depth: float
    key: str
    answer: str
    correct: bool
    seconds: float
    prefill_tokens_per_second: float
    peak_memory_bytes: int


def prompt(tokenizer: Any, length: int, depth: float, key: str) -> torch.Tensor:
    """Token ids of a prompt, shape (1, `length`), int64.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    length : int
        Tokens of the whole prompt, exactly.
    depth : float
        Where the key stands: 0 right after the introduction, 1 right before the question.
    key : str
        Five digits.

    Raises
    ------
    InvalidValue
        `depth` is outside 0 to 1, `key` is not five digits, or `length` leaves no room for the key and the question.
    """
    check_depths([depth])
    if not re.fullmatch(r"\d{5}", key):
        raise InvalidValue(f"key must be five digits, got {key!r}: write it with its leading zeros")
    intro, needle, question = (
        _encode(tokenizer, text) for text in (INTRO, NEEDLE.format(name=NAME, key=key), QUESTION.format(name=NAME))
    )
    room = length - len(intro) - len(needle) - len(question)
    if room < 0:
        raise InvalidValue(f"length must be at least {length - room} tokens for this tokenizer, got {length}")
    sentences = [_encode(tokenizer, sentence) for sentence in NOISE]
    if not any(sentences):
        raise InvalidValue("the tokenizer makes no tokens of English text: use the one of the checkpoint")
    before = _noise(sentences, round(depth * room))
    after = _noise(sentences, room - len(before))
    return torch.tensor([intro + before + needle + after + question])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _noise(sentences: list[list[int]], length: int) -> list[int]:
    """`length` tokens that end with a whole sentence; the first may be cut."""
    cycle = [token for sentence in sentences for token in sentence]
    filler = cycle * (length // len(cycle) + 1)
    return filler[len(filler) - length :]


def random_key(source: random.Random) -> str:
    """Five digits, the first not 0."""
    return str(source.randrange(10_000, 100_000))


def check_depths(depths: Sequence[float]) -> None:
    """Refuse depths outside 0 to 1.

    Raises
    ------
    InvalidValue
    """
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InvalidValue(f"a depth must be between 0 (the start) and 1 (the end of the prompt), got {depth}")


def check_tokens(ids: torch.Tensor, vocabulary: int) -> None:
    """Refuse token ids that a model with such a vocabulary does not know.

    Parameters
    ----------
    ids : torch.Tensor
        Shape (1, tokens), integers.
    vocabulary : int
        Token ids that the model knows, its `vocab_size`.

    Raises
    ------
    InvalidValue, InvalidType
    """
    if not isinstance(ids, torch.Tensor):
        raise InvalidType(f"a text must be a tensor of token ids, got {type(ids).__name__}")
    wrong = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] == 0 or wrong:
        raise InvalidValue(
            f"a text must be token ids of shape (1, tokens), got {ids.dtype} of shape {tuple(ids.shape)}: "
            "give whole numbers, one row at a time"
        )
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= vocabulary:
        raise InvalidValue(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}: use the tokenizer "
            "that belongs to the checkpoint"
        )


def check(tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], repeats: int, vocabulary: int) -> None:
    """Refuse a request of `evaluate` that cannot be fulfilled.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    lengths, depths, repeats
        As `evaluate` takes them.
    vocabulary : int
        Token ids that the model knows, its `vocab_size`.

    Raises
    ------
    InvalidValue
        There are no prompts, one is too short for the key and the question, a depth is outside 0 to 1, or the
        tokenizer does not belong to the model.
    """
    if not len(lengths) or not len(depths) or repeats < 1:
        raise InvalidValue(
            f"there is nothing to ask: got {len(lengths)} lengths, {len(depths)} depths and {repeats} repeats. "
            "Give at least one of each"
        )
    check_depths(depths)
    check_tokens(prompt(tokenizer, min(lengths), depths[0], "12345"), vocabulary)


def records(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int = 1,
    seed: int = 0,
) -> Iterator[Record]:
    """Ask for a key at every length and depth, `repeats` times, by greedy ``model.generate``.

    Yields
    ------
    Record
        Lengths ascending; the keys depend on `seed` only.

    Raises
    ------
    InvalidValue
        See `check`; before the first prompt.
    """
    check(tokenizer, lengths, depths, repeats, model.config.vocab_size)
    source = random.Random(seed)
    tokens = sum(lengths) * len(depths) * repeats
    with transformers_logging.tqdm(total=tokens, desc="Passkey", unit="tok") as bar:
        for length in sorted(lengths):
            for depth in depths:
                for _ in range(repeats):
                    yield ask(model, tokenizer, length, depth, random_key(source))
                    bar.update(length)


def evaluate(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int = 1,
    seed: int = 0,
) -> list[Record]:
    """All of `records`, in a list."""
    return list(records(model, tokenizer, lengths, depths, repeats, seed))


def input_device(model: Any) -> torch.device:
    """Where the token ids of a model belong: on the host, where accelerate keeps its first weights off every device."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def ask(model: Any, tokenizer: Any, length: int, depth: float, key: str) -> Record:
    """Ask for one key."""
    ids = prompt(tokenizer, length, depth, key).to(input_device(model))
    cuda = ids.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
    begin = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
    answer = tokenizer.decode(out.sequences[0, length:], skip_special_tokens=True)  # waits for the device
    seconds = time.perf_counter() - begin
    cache = cache_of(out)
    rate = cache.report()["tokens_per_second"] if isinstance(cache, LongContextCache) else 0.0
    peak = torch.cuda.max_memory_allocated(ids.device) if cuda else 0
    return Record(length, depth, key, answer, is_correct(answer, key), seconds, rate, peak)


def is_correct(answer: str, key: str) -> bool:
    """Whether the first five digits of `answer` are the key."""
    return "".join(re.findall(r"\d", answer)[:5]) == key


def accuracy(records: Sequence[Record]) -> dict[int, float]:
    """Share of keys found, by length."""
    lengths = sorted({record.length for record in records})
    return {n: sum(r.correct for r in records if r.length == n) / sum(r.length == n for r in records) for n in lengths}


def as_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as plain dictionaries, for a results file."""
    return [asdict(record) for record in records]
