"""Retrieval that is harder than one passkey: several needles, one of thousands, and the end of a chain.

``multi_needle``
    Eight codes among plain sentences; all are asked for. The score is the share that is named.
``needles_one_of_many``
    A code in every line, one for about 32 tokens; one of them is asked for.
``needles_chain``
    Variables that name each other, ``X2 = X1``, in chains of four whose lines are mixed; the number at the start of one
    chain is asked for by the variable at its end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from string import ascii_uppercase

from qwen_longctx.evaluation.fitting import fitted, inserted, seeded
from qwen_longctx.evaluation.prose import MOST_NAMES, names, sentences
from qwen_longctx.evaluation.task import Reader, Sample, Task

NEEDLES = 8
LINKS = 4  # lines of a chain
_CODES = range(10_000, 100_000)
_FACT = "The code of {} is {}."


def _multi_needle(reader: Reader, length: int, source: random.Random) -> Sample:
    keys = names(source, NEEDLES)
    codes = [str(code) for code in source.sample(_CODES, NEEDLES)]
    facts = [" " + _FACT.format(*pair) for pair in zip(keys, codes, strict=True)]
    depths = [source.random() for _ in facts]

    def build(pieces: list[str]) -> Sample:
        return Sample(
            "The text below holds the codes of some things. At its end you will be asked for them.\n\n"
            + "".join(inserted(pieces, facts, depths)).strip()
            + f"\n\nWhat are the codes of {', '.join(keys[:-1])} and {keys[-1]}? Name only the codes, in this order.",
            target=" " + ", ".join(codes),
            answers=tuple(codes),
            prefix="In this order, the codes are",
            new_tokens=8 * NEEDLES,
        )

    return fitted(reader, length, (" " + sentence for sentence in sentences(source)), build)


def _one_of_many(reader: Reader, length: int, source: random.Random) -> Sample:
    keys = names(source, MOST_NAMES)
    codes = [str(code) for code in source.sample(_CODES, MOST_NAMES)]
    depth = source.random()
    lines = _lines([_FACT.format(*pair) for pair in zip(keys, codes, strict=True)], source)
    asked = next(lines)

    def build(pieces: list[str]) -> Sample:
        return Sample(
            "Every line below holds the code of one thing. At the end you will be asked for one of them.\n\n"
            + "".join(inserted(pieces, [asked], [depth]))
            + f"\nWhat is the code of {keys[0]}? Name only the code.",
            target=" " + codes[0],
            answers=(codes[0],),
            prefix=f"The code of {keys[0]} is",
            new_tokens=8,
        )

    return fitted(reader, length, lines, build)


def _lines(facts: list[str], source: random.Random) -> Iterator[str]:
    """A line for each fact, with a sentence after it; then sentences alone, without end."""
    prose = sentences(source)
    for fact in facts:
        yield f"{fact} {next(prose)}\n"
    for sentence in prose:
        yield sentence + "\n"


def _chain(reader: Reader, length: int, source: random.Random) -> Sample:
    chains = _chains(source)
    asked, number, last = next(chains)
    order = source.random()

    def build(pieces: list[str]) -> Sample:
        return Sample(
            "Every line below says what a variable stands for: a number, or the same as another variable.\n\n"
            + _mixed([asked, *pieces], random.Random(order))
            + f"\nWhich number does {last} stand for in the end? Name only the number.",
            target=" " + number,
            answers=(number,),
            prefix=f"The number that {last} stands for is",
            new_tokens=8,
        )

    return fitted(reader, length, (text for text, other, _ in chains if other != number), build)


def _chains(source: random.Random) -> Iterator[tuple[str, str, str]]:
    """Chains without end, no variable twice: the lines of each, its number, and its last variable."""
    seen: set[str] = set()
    while True:
        links: list[str] = []
        while len(links) < LINKS:
            name = "".join(source.choices(ascii_uppercase, k=5))
            if name not in seen:
                seen.add(name)
                links.append(name)
        number = str(source.choice(_CODES))
        values = [number, *links]
        yield "".join(f"{name} = {value}\n" for name, value in zip(links, values, strict=False)), number, links[-1]


def _mixed(chains: list[str], source: random.Random) -> str:
    """The lines of all chains in random order, but those of one chain in theirs."""
    lines = [iter(chain.splitlines(keepends=True)) for chain in chains]
    turns = [i for i in range(len(chains)) for _ in range(LINKS)]
    source.shuffle(turns)
    return "".join(next(lines[i]) for i in turns)


def all_named(sample: Sample, answer: str) -> float:
    """Share of the numbers asked for that the answer names."""
    named = set(re.findall(r"\d+", answer))
    return sum(number in named for number in sample.answers) / len(sample.answers)


def first_number(sample: Sample, answer: str) -> float:
    """Whether the first number of the answer is the one asked for."""
    return float(re.findall(r"\d+", answer)[:1] == [sample.answers[0]])


TASKS = (
    Task("multi_needle", seeded("multi_needle", _multi_needle), all_named),
    Task("needles_one_of_many", seeded("needles_one_of_many", _one_of_many), first_number),
    Task("needles_chain", seeded("needles_chain", _chain), first_number),
)
