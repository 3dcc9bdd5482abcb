"""Conversations as tokens: rendered by the tokenizer's chat template, with the loss on answers only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from qwen_longctx.errors import InvalidValue
from qwen_longctx.training.packing import Document


def check_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot render conversations.

    Raises
    ------
    InvalidValue
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidValue(
            "the tokenizer has no chat template, which conversations need: set tokenizer.chat_template, "
            "or take the tokenizer of an instruction-tuned checkpoint"
        )


def encode_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: list[Any] | None = None
) -> list[Document]:
    """A conversation as one document, or, where it must be, as one for each answer.

    What comes before an answer is the template's rendering of the messages before it with the generation prompt, as
    `generate` will see it; the answer is what the rendering with it adds, up to its last visible character, which is
    the marker that ends a turn. The two are tokenised apart, as they are when a model is asked. Markers such as
    ``{% generation %}`` are not needed.

    Most templates only ever add to what they have rendered: then the whole is one document, and the loss counts on
    all answers. Some rewrite earlier turns, as Qwen3's does, which takes thoughts out of them: then each answer is
    learned from a document of its own, in which it comes last.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        With a chat template.
    messages : list of dict
        The last is an answer.
    where : str
        Named in errors.
    tools : list, optional
        Passed to the template.

    Raises
    ------
    InvalidValue
        The template refuses the messages, or its generation prompt is not how it begins an answer.
    """
    turns = _turns(tokenizer, messages, where, tools)
    if all(before.startswith(after) for (_, after), (before, _) in pairwise(turns)):
        return [_document(tokenizer, turns)]
    return [_document(tokenizer, [turn]) for turn in turns]


def _turns(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: list[Any] | None
) -> list[tuple[str, str]]:
    """For each answer the rendering up to it, with the generation prompt, and the rendering with it."""
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = tokenizer.apply_chat_template(
                messages[:number], tools=tools, tokenize=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: number + 1], tools=tools, tokenize=False)
        except Exception as error:  # templates raise errors of their own, and of Jinja
            raise InvalidValue(f"{where}: the chat template refuses the conversation: {error}") from error
        after = after.rstrip()
        if not after.startswith(before) or after == before:
            raise InvalidValue(
                f"{where}: the chat template begins its answer {number + 1} otherwise than its generation prompt ends, "
                f"{before[-40:]!r}, so that the answer's tokens cannot be told. Take another template"
            )
        turns.append((before, after))
    return turns


def _document(tokenizer: Any, turns: list[tuple[str, str]]) -> Document:
    ids: list[int] = []
    counts: list[bool] = []
    done = 0
    for before, after in turns:
        for text, loss in ((before[done:], False), (after[len(before) :], True)):
            part = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += part
            counts += [loss] * len(part)
        done = len(after)
    return Document(np.array(ids, dtype=np.int64), np.array(counts, dtype=bool))
