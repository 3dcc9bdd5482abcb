"""Texts that train the bundled checkpoint: named numbers among filler, then questions about some of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import cycle

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from qwen_longctx.evaluation.passkey import INTRO, NAME, NEEDLE, NOISE, QUESTION, random_key

VOCABULARY = 1024
END = "<|endoftext|>"

_NAMES = (
    "door code|safe code|room number|bus number|secret number|magic number|ticket number|order number|house number|"
    "phone code|train number|gate code|box number|lucky number|bank code|garden code|ship number|post code|"
    "member number|test number|seat number"
).split("|")
_WHO = "The farmer|My sister|A tall man|The old teacher|Our neighbour|The small dog|A quiet girl|The baker".split("|")
_DID = "walked to|looked at|talked about|painted|found|waited near|drove past|remembered|sold|cleaned".split("|")
_WHAT = "the river|a red house|the long road|an empty box|the green hill|some bread|the market|two boats".split("|")
_WHEN = "in the morning|after lunch|last winter|before the rain|every Sunday|at night|for an hour|again".split("|")
_COUNTED = " {who} counted {n} apples.| There were {n} birds on the roof.| Page {n} was missing.| It cost {n} coins."


def sentence(source: random.Random) -> str:
    """One sentence of filler; one in eight holds a number that nobody asks for."""
    if source.random() < 0.125:
        template = source.choice(_COUNTED.split("|"))
        return template.format(who=source.choice(_WHO), n=source.randrange(10 ** source.randint(1, 5)))
    return f" {source.choice(_WHO)} {source.choice(_DID)} {source.choice(_WHAT)} {source.choice(_WHEN)}."


def train_tokenizer(source: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE over texts of this module; digits stay single, as in Qwen's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [sentence(source) for _ in range(4000)] + [INTRO, *NOISE] * 40
    for name in (NAME, *_NAMES):
        texts += [NEEDLE.format(name=name, key=random_key(source)), QUESTION.format(name=name)] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


class Recall(IterableDataset):
    """Endless texts of `length` tokens: named numbers among filler, then questions with their answers.

    Yields ids of shape (length,) and a mask of the same shape that marks the answers' digits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self._digits = [self._encode(str(digit))[0] for digit in range(10)]
        self._blanks: dict[tuple[str, str], list[int]] = {}

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        info = torch.utils.data.get_worker_info()
        source = random.Random(self.seed * 1000 + (info.id if info else 0))
        bank = [self._encode(sentence(source)) for _ in range(3000)]
        noise = [self._encode(text) for text in NOISE]
        self.intro = self._encode(INTRO)
        while True:
            yield self._text(source, bank, noise)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(
        self, source: random.Random, bank: list[list[int]], noise: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        named = self._named(source)
        asked = list(named)
        source.shuffle(asked)
        end, marks = self._questions(asked[: source.randint(1, len(asked))])
        needles = [self._with_key(NEEDLE, name, key)[0] for name, key in named]
        start = self.intro if source.random() < 0.5 else []
        free = self.length - sum(map(len, needles)) - len(end)
        start = start if free >= len(start) else []
        free = max(0, free - len(start))
        trailing = source.randrange(free + 1) if source.random() < 0.25 else 0
        cuts = sorted(source.randrange(free - trailing + 1) for _ in needles)
        gaps = np.diff([0, *cuts, free - trailing]).tolist()
        plain = source.random() < 0.5
        body = list(start)
        for gap, needle in zip(gaps, [*needles, []], strict=True):
            body += self._filler(source, bank, noise, gap, plain) + needle
        ids = body + end + self._filler(source, bank, noise, trailing, plain)
        mask = [0] * len(body) + marks + [0] * trailing
        return np.array(ids[-self.length :]), np.array(mask[-self.length :], dtype=bool)

    def _named(self, source: random.Random) -> list[tuple[str, str]]:
        """Names of one text and their keys; the name of the passkey task is the first of every other text."""
        count = max(1, min(source.choice((1, 1, 1, 2, 3, 4)), self.length // 48))
        names = [NAME] if source.random() < 0.5 else [source.choice(_NAMES)]
        names += source.sample([name for name in _NAMES if name not in names], count - 1)
        return [(name, random_key(source)) for name in names]

    def _questions(self, asked: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids of the questions with their answers, and a mask of the answers."""
        ids: list[int] = []
        marks: list[int] = []
        for name, key in asked:
            text, first = self._with_key(QUESTION + " {key}.", name, key)
            ids += text
            marks += [0] * (first - 1) + [1] * (len(text) - first + 1)  # from the space before the key
        return ids, marks

    def _with_key(self, template: str, name: str, key: str) -> tuple[list[int], int]:
        """Ids of a template filled in, and where the key first stands; a template is encoded once for each name."""
        if (template, name) not in self._blanks:
            self._blanks[template, name] = self._encode(template.format(name=name, key="00000"))
        ids = list(self._blanks[template, name])
        places = [place for place, token in enumerate(ids) if token == self._digits[0]]
        for place, digit in zip(places, cycle(key), strict=False):
            ids[place] = self._digits[int(digit)]
        return ids, places[0]

    @staticmethod
    def _filler(
        source: random.Random, bank: list[list[int]], noise: list[list[int]], length: int, plain: bool
    ) -> list[int]:
        """`length` tokens of the passkey's noise (`plain`) or of varied sentences; the first may be cut."""
        out: list[int] = []
        following = source.randrange(len(noise))
        while len(out) < length:
            out += noise[following % len(noise)] if plain else source.choice(bank)
            following += 1
        return out[len(out) - length :]
