"""Samples that fill a length: as many pieces of filler as fit, counted once and checked once."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.task import Reader, Sample

LEFT_OUT = "\n\n[...]\n\n"  # stands where the middle of a text was
_PIECE = re.compile(r"[^\n]{1,200}(?=[ \n]|\Z)\n*|[^\n]{1,200}\n*|\n+")
_BATCH = 1024


def seeded(
    name: str, make: Callable[[Reader, int, random.Random], Sample]
) -> Callable[[Reader, int, int, int], Iterator[Sample]]:
    """`Task.samples` of a task whose samples are drawn at random, each from a source of its own.

    Parameters
    ----------
    name : str
        Of the task: two tasks draw differently.
    make : callable
        ``make(reader, length, source)``: one sample.
    """

    def samples(reader: Reader, length: int, count: int, seed: int) -> Iterator[Sample]:
        for index in range(count):
            yield make(reader, length, random.Random(f"{name} {seed} {index}"))

    return samples


def size(reader: Reader, sample: Sample) -> int:
    """Tokens that a sample takes up: its prompt, its target and the tokens to generate."""
    return len(reader.prompt_ids(sample)) + len(reader.target_ids(sample)) + sample.new_tokens


def fitted(reader: Reader, length: int, pieces: Iterable[str], build: Callable[[list[str]], Sample]) -> Sample:
    """The sample made of the first pieces, as many as fit into a length.

    Parameters
    ----------
    reader : Reader
    length : int
        Tokens that the sample may take up.
    pieces : iterable of str
        Filler, without end or as much as there is. Each should begin or end with the white space that parts it from the
        next, so that the tokens of the whole are those of the pieces.
    build : callable
        Makes the sample of a list of pieces, the same one of the same list; also of none.

    Raises
    ------
    InvalidValue
        The sample does not fit even without filler.
    """
    bare = size(reader, build([]))
    if bare > length:
        raise InvalidValue(f"this task needs {bare} tokens with this tokenizer, and length is {length}: ask for more")
    taken, counts = _take(reader, iter(pieces), length - bare)
    while True:
        sample = build(taken)
        over = size(reader, sample) - length
        if over <= 0:
            return sample
        while over > 0:  # pieces that take more tokens together than apart
            taken.pop()
            over -= counts.pop() or 1


def pieces_of(text: str) -> list[str]:
    """Lines and parts of lines, at most about 200 characters each, that make up a text together."""
    return _PIECE.findall(text)


def cut(reader: Reader, length: int, text: str, build: Callable[[str], Sample]) -> Sample:
    """The sample made of a text, or of its two ends where the whole does not fit into a length.

    Parameters
    ----------
    reader : Reader
    length : int
        Tokens that the sample may take up.
    text : str
        `LEFT_OUT` takes the place of what is left out, as many pieces before the middle as after it.
    build : callable
        Makes the sample of a text.

    Raises
    ------
    InvalidValue
        The sample does not fit even without the text.
    """
    pieces = pieces_of(text)
    half = (len(pieces) + 1) // 2
    outside_in = chain.from_iterable(zip_longest(pieces[:half], reversed(pieces[half:]), fillvalue=""))

    def of_pieces(taken: list[str]) -> Sample:
        gap = LEFT_OUT if len(taken) < len(pieces) else ""
        return build("".join(taken[::2]) + gap + "".join(reversed(taken[1::2])))

    return fitted(reader, length, outside_in, of_pieces)


def _take(reader: Reader, pieces: Iterable[str], room: int) -> tuple[list[str], list[int]]:
    """The first pieces that have at most `room` tokens together, and the tokens of each."""
    taken: list[str] = []
    counts: list[int] = []
    pieces = iter(pieces)
    while batch := list(islice(pieces, _BATCH)):
        for piece, ids in zip(batch, reader.tokenizer(batch, add_special_tokens=False).input_ids, strict=True):
            room -= len(ids)
            if room < 0:
                return taken, counts
            taken.append(piece)
            counts.append(len(ids))
    return taken, counts


def inserted(pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """`pieces` with each needle put in at its depth: 0 is before the first piece, 1 after the last."""
    places = sorted(zip((int(depth * (len(pieces) + 1)) for depth in depths), needles, strict=True))
    out: list[str] = []
    start = 0
    for place, needle in places:
        out += [*pieces[start:place], needle]
        start = min(place, len(pieces))
    return [*out, *pieces[start:]]
