"""Retrieval tasks of InfiniteBench (Zhang et al., arXiv 2402.13718), generated at any length.

``infinitebench_passkey``
    Five digits among sentences that repeat.
``infinitebench_number``
    Ten digits, of which five repeat their neighbour, so that they are hard to copy; among the same sentences.
``infinitebench_kv``
    A JSON object of pairs of UUIDs; the value of one key is asked for.

Prompts and scores are those published with the benchmark; lengths and depths are ours. Between the words of a question
and those that start its answer, raw prompts have a space where InfiniteBench has a line break.
"""

from __future__ import annotations

import random
import re
import uuid
from itertools import repeat
from string import digits

from qwen_longctx.evaluation.fitting import fitted, inserted, seeded
from qwen_longctx.evaluation.task import Reader, Sample, Task

_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it{}. "
    "I will quiz you about the important information there.\n\n"
)
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NEEDLE = "The {name} is {key}. Remember it. {key} is the {name}.\n"
_KV = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"


def _passkey(reader: Reader, length: int, source: random.Random) -> Sample:
    key = "".join(source.choices(digits, k=5))
    return _hidden(reader, length, source.random(), "pass key", key, _INTRO.format(" and memorize them"))


def _number(reader: Reader, length: int, source: random.Random) -> Sample:
    key = source.choices(digits, k=5)
    for _ in range(5):
        place = source.randrange(len(key))
        key.insert(place, key[place])
    return _hidden(reader, length, source.random(), "sequence of digits", "".join(key), _INTRO.format(""))


def _hidden(reader: Reader, length: int, depth: float, name: str, key: str, intro: str) -> Sample:
    needle = _NEEDLE.format(name=name, key=key)

    def build(pieces: list[str]) -> Sample:
        return Sample(
            f"{intro}{''.join(inserted(pieces, [needle], [depth]))}\nWhat is the {name}?",
            target=" " + key,
            answers=(key,),
            prefix=f"The {name} is",
            new_tokens=len(key) + 2,
        )

    return fitted(reader, length, repeat(_NOISE), build)


def _kv(reader: Reader, length: int, source: random.Random) -> Sample:
    key, value, depth = _uuid(source), _uuid(source), source.random()

    def build(pieces: list[str]) -> Sample:
        pairs = "".join(inserted(pieces, [_pair(key, value)], [depth]))
        return Sample(
            f'{_KV}{{{pairs.strip(" ,")}}}\n\nKey: "{key}"',
            target=" " + value,
            answers=(value,),
            prefix="The value associated with the specified key is:",
            new_tokens=50,
        )

    others = (_pair(_uuid(source), _uuid(source)) for _ in repeat(None))
    return fitted(reader, length, others, build)


def _pair(key: str, value: str) -> str:
    return f' "{key}": "{value}",'


def _uuid(source: random.Random) -> str:
    return str(uuid.UUID(int=source.getrandbits(128), version=4))


def first_digits(sample: Sample, answer: str) -> float:
    """Whether the first run of digits of the answer is the key."""
    return float(re.findall("[0-9]+", answer)[:1] == [sample.answers[0]])


def word_of_answer(sample: Sample, answer: str) -> float:
    """Whether the value is a word of the answer, parted by white space, quotes or punctuation."""
    return float(sample.answers[0] in re.split(r"[\s:\"'.,?!{}]+", answer))


TASKS = (
    Task("infinitebench_passkey", seeded("infinitebench_passkey", _passkey), first_digits),
    Task("infinitebench_number", seeded("infinitebench_number", _number), first_digits),
    Task("infinitebench_kv", seeded("infinitebench_kv", _kv), word_of_answer),
)
