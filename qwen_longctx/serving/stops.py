"""Cuts texts at stop strings: what is answered ends before the first one, as clients of the API expect."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the one of `stops` that is complete first; of those that end together, the longest.

    So what follows changes nothing: another one that begins earlier and ends later is no part of an answer any more.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


class StopsAt(StoppingCriteria):
    """Ends the answer of one row once a stop string is in it; it may be longer by the rest of the last token.

    That of transformers looks at the end of the prompt too, and at every token of the vocabulary before it begins.

    Parameters
    ----------
    stops : sequence of str
        None of them empty.
    tokenizer : transformers tokenizer
    prompt : int
        Tokens of the prompt.
    """

    _SPARE = 8  # tokens of no text, such as special ones

    def __init__(self, stops: Sequence[str], tokenizer: Any, prompt: int) -> None:
        self._stops, self._tokenizer, self._prompt = stops, tokenizer, prompt
        self._reach = max(len(stop.encode()) for stop in stops) + self._SPARE  # a token of text is a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether the row ends, bool of shape (1,); `input_ids` of shape (1, tokens)."""
        last = input_ids[0, max(self._prompt, input_ids.shape[1] - self._reach) :]
        text = self._tokenizer.decode(last, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stops)], device=input_ids.device)


class Cutter:
    """`cut` for a text that comes in pieces: holds back what may be the beginning of a stop string.

    Parameters
    ----------
    stops : sequence of str
        None of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self._over = stops, "", False

    def feed(self, piece: str) -> str:
        """What can be told of the text by now."""
        if self._over:
            return ""
        text = self._held + piece
        told = cut(text, self._stops)
        self._over = told != text
        longest = 0 if self._over else max(_begun(text, stop) for stop in self._stops)
        told, self._held = told[: len(told) - longest], told[len(told) - longest :]
        return told

    def flush(self) -> str:
        """What was held back, when no more comes."""
        rest, self._held = self._held, ""
        return rest


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


class CutQueue:
    """A queue of pieces of an answer, as transformers' handlers read it, without stop strings and what follows them.

    Parameters
    ----------
    queue : asyncio.Queue
        Of str for text; of anything else, which ends a stretch of text and is passed on.
    stops : sequence of str
    """

    def __init__(self, queue: asyncio.Queue, stops: Sequence[str]) -> None:
        self._queue, self._cutter = queue, Cutter(stops)
        self._ready: list[Any] = []

    async def get(self) -> Any:
        """The next piece."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.pop(0)

    def get_nowait(self) -> Any:
        """The next piece, if there is one.

        Raises
        ------
        asyncio.QueueEmpty
        """
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.pop(0)

    def _take(self, item: Any) -> None:
        plain = type(item) is str  # text of the reasoning is of a class of its own
        pieces = [self._cutter.feed(item)] if plain else [self._cutter.flush(), item]
        self._ready += [piece for piece in pieces if piece != ""]
