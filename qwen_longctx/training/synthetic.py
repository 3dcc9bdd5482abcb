"""Tasks made from a text: fill in the middle, retrieval by keyword and by position, reordering of paragraphs.

The Qwen2.5-1M report (section 3, on the data of pre-training) names them, without formats: parts of natural text that
lie far apart have little to do with each other, and these tasks tie them together. The formats are ours.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qwen_longctx.training.conversations import encode_conversation
from qwen_longctx.training.packing import Document
from qwen_longctx.training.store import plain_ids

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
FIM_TEXTS = ("Text before a gap:\n", "\n\nText after the gap:\n", "\n\nText in the gap:\n")
KEYWORD = 'Repeat every paragraph of this text that contains the word "{word}", in the order of the text.'
POSITION = "Repeat the paragraph that comes directly {side} the one which begins with these words:\n{words}"
REORDER = "The parts of this text are out of order. Write the text with its parts in the right order."

_SHORTEST_GAP = 8  # tokens
_LEAST = 32  # tokens of a text that a task can be made of
_ROOM = 64  # tokens set aside for a question and the marks around it
_MOST_PARTS = 12
_SHORTEST_WORD = 5  # letters
_MOST_HITS = 3  # paragraphs that contain a keyword
_ANCHOR = 8  # words
_TRIES = 16


@dataclass(frozen=True)
class Question:
    """A task in words: the text, what is asked about it, and the answer."""

    context: str
    question: str
    answer: str


@dataclass(frozen=True)
class Paragraphs:
    """A text in paragraphs, and about how many tokens each has with the blank line behind it."""

    texts: list[str]
    tokens: list[int]

    def fitting(self, room: int) -> int:
        """How many from the first on have at most `room` tokens together."""
        return int(np.searchsorted(np.cumsum(self.tokens), room, side="right"))


def split_paragraphs(text: str) -> list[str]:
    """Paragraphs of a text: between blank lines, or its lines where it has fewer than four paragraphs."""
    for mark in (r"(?:[ \t\r]*\n){2,}", r"[ \t\r]*\n"):
        found = [part.strip("\n") for part in re.split(mark, text) if part.strip()]
        if len(found) > 3:
            break
    return found


def keyword_retrieval(text: Paragraphs, room: int, source: random.Random) -> Question | None:
    """Which paragraphs contain a word (report, section 3: retrieval based on keywords).

    The keyword has five letters or more and stands, as a whole word and in this case, in one to three paragraphs. The
    answer is these paragraphs, verbatim and in order, with blank lines between them.
    """
    most = room // 8
    used = text.fitting(room - most - _ROOM)
    words: dict[str, list[int]] = defaultdict(list)
    for number in range(used):
        for word in _words(text.texts[number]):
            words[word].append(number)
    asked = sorted(
        word
        for word, hits in words.items()
        if len(hits) <= _MOST_HITS and sum(text.tokens[hit] for hit in hits) <= most
    )
    if not asked:
        return None
    word = source.choice(asked)
    answer = [text.texts[hit] for hit in words[word]]
    free = room - _ROOM - sum(text.tokens[hit] for hit in words[word])
    used = _extended(text, used, free, lambda paragraph: word not in _words(paragraph))
    return Question("\n\n".join(text.texts[:used]), KEYWORD.format(word=word), "\n\n".join(answer))


def position_retrieval(text: Paragraphs, room: int, source: random.Random) -> Question | None:
    """Which paragraph comes before or after another (report, section 3: retrieval based on positions).

    The other is named by its first words, up to eight of its first line, with which no other paragraph begins. The
    answer is the whole paragraph beside it, verbatim.
    """
    most = room // 8
    used = text.fitting(room - most - _ROOM)
    for _ in range(_TRIES if used > 1 else 0):
        number, side = source.randrange(used), source.choice((-1, 1))
        answer = number + side
        words = _first_words(text.texts[number])
        if not 0 <= answer < used or text.tokens[answer] > most or not words:
            continue
        if sum(paragraph.startswith(words) for paragraph in text.texts[:used]) > 1:
            continue
        free = room - _ROOM - text.tokens[answer]
        used = _extended(text, used, free, partial(_begins_otherwise, words))
        question = POSITION.format(side="before" if side < 0 else "after", words=words)
        return Question("\n\n".join(text.texts[:used]), question, text.texts[answer])
    return None


def paragraph_reordering(text: Paragraphs, room: int, source: random.Random) -> Question | None:
    """The text in order again (report, section 3: reordering of shuffled paragraphs).

    The text is cut into three to twelve parts of one paragraph or more, which are numbered ``[1]``, ``[2]`` and so on
    in a shuffled order that is not the text's own. The answer is the whole text as it was.
    """
    used = text.fitting((room - _ROOM) // 2 - 4 * _MOST_PARTS)
    if used < 3:
        return None
    count = source.randint(3, min(used, _MOST_PARTS))
    cuts = [0, *sorted(source.sample(range(1, used), count - 1)), used]
    parts = ["\n\n".join(text.texts[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    order = list(range(count))
    while order == sorted(order):
        source.shuffle(order)
    context = "\n\n".join(f"[{place}]\n{parts[number]}" for place, number in enumerate(order, 1))
    return Question(context, REORDER, "\n\n".join(parts))


Maker = Callable[[Paragraphs, int, random.Random], Question | None]
QUESTIONS: dict[str, Maker] = {
    "keyword_retrieval": keyword_retrieval,
    "position_retrieval": position_retrieval,
    "paragraph_reordering": paragraph_reordering,
}
TASKS = ("fill_in_the_middle", *QUESTIONS)


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text) if len(word) >= _SHORTEST_WORD and word.isalpha()}


def _first_words(paragraph: str) -> str:
    """Up to eight words of the first line; none of them where it has fewer than three."""
    line = paragraph.split("\n", 1)[0]
    words = list(re.finditer(r"\S+", line))[:_ANCHOR]
    return line[: words[-1].end()] if len(words) > 2 else ""


def _begins_otherwise(words: str, paragraph: str) -> bool:
    return not paragraph.startswith(words)


def _extended(text: Paragraphs, used: int, room: int, harmless: Callable[[str], bool]) -> int:
    """How many paragraphs fit when those behind `used` are taken on, as long as they leave the answer what it is."""
    total = sum(text.tokens[:used])
    while used < len(text.texts) and total + text.tokens[used] <= room and harmless(text.texts[used]):
        total += text.tokens[used]
        used += 1
    return used


class TaskWriter:
    """Turns a piece of text into a task of at most the same number of tokens.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    end : int
        Token that ends a document.
    """

    def __init__(self, tokenizer: Any, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        vocabulary = tokenizer.get_vocab()
        if all(token in vocabulary for token in FIM_TOKENS):
            self._marks = [[vocabulary[token]] for token in FIM_TOKENS]
        else:
            self._marks = plain_ids(tokenizer, list(FIM_TEXTS))

    def write(self, task: str, ids: np.ndarray, source: random.Random, chat: bool) -> Document | None:
        """The task as a document.

        Parameters
        ----------
        task : str
            One of `TASKS`.
        ids : numpy.ndarray
            Shape (tokens,), int64: the text, with or without its end.
        source : random.Random
        chat : bool
            Question and answer as the turns of a conversation, by the chat template; not of fill in the middle.

        Returns
        -------
        Document or None
            At most as long as the text. None where the text is too short, has too few paragraphs, or would put
            special tokens into a conversation.
        """
        room = len(ids)
        inner = ids[:-1] if ids[-1] == self.end else ids
        if len(inner) < _LEAST:
            return None
        if task == "fill_in_the_middle":
            return self._fill_in_the_middle(inner, room, source)
        text = self._paragraphs(inner)
        if chat and any(token in paragraph for paragraph in text.texts for token in self.tokenizer.all_special_tokens):
            return None
        seed, left = source.random(), room
        # the tokens of paragraphs are estimates: a task that came out too long is made again, shorter
        for _ in range(3):
            question = QUESTIONS[task](text, left, random.Random(seed))
            if question is None:
                return None
            document = self._conversation(question) if chat else self._plain(question)
            if len(document.ids) <= room:
                return document
            left -= len(document.ids) - room + 8
        return None

    def _paragraphs(self, ids: np.ndarray) -> Paragraphs:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts = split_paragraphs(text.strip("\ufffd"))  # halves of characters, where a piece was cut
        # tokens a character: to tokenise every paragraph would take as long as the whole
        each = len(ids) / max(1, len(text))
        return Paragraphs(texts, [math.ceil(each * (len(paragraph) + 2)) for paragraph in texts])

    def _fill_in_the_middle(self, ids: np.ndarray, room: int, source: random.Random) -> Document | None:
        """A gap, and what it held (report, section 3: fill in the middle).

        The text before the gap, the text behind it, then the text in it, each behind its mark: the tokens of Qwen2.5
        for this, or words where a tokenizer lacks them. Position and length of the gap vary: from 8 tokens to half of
        the text, every order of size alike. The loss counts on all of the text, as in plain language modelling, and
        on the end behind the middle; not on the marks.
        """
        marks = self._marks
        ids = ids[: room - sum(map(len, marks)) - 1]
        if len(ids) < _LEAST:
            return None
        gap = round(_SHORTEST_GAP * (len(ids) / 2 / _SHORTEST_GAP) ** source.random())
        begin = source.randrange(1, len(ids) - gap)
        parts = [ids[:begin], ids[begin + gap :], np.append(ids[begin : begin + gap], self.end)]
        return _joined(
            [half for mark, part in zip(marks, parts, strict=True) for half in ((mark, False), (part, True))]
        )

    def _plain(self, question: Question) -> Document:
        asked = f"{question.context}\n\n{question.question}\n\n"
        prompt, answer = plain_ids(self.tokenizer, [asked, question.answer])
        return _joined([(prompt, False), ([*answer, self.end], True)])

    def _conversation(self, question: Question) -> Document:
        messages = [
            {"role": "user", "content": f"{question.context}\n\n{question.question}"},
            {"role": "assistant", "content": question.answer},
        ]
        return encode_conversation(self.tokenizer, messages, "a conversation made from text")[0]


def _joined(parts: Sequence[tuple[Any, bool]]) -> Document:
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in parts])
    return Document(ids, np.repeat([loss for _, loss in parts], [len(ids) for ids, _ in parts]))
