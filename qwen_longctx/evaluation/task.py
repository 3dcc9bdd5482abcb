"""What a task of ``qwen-longctx eval`` is: samples of any length, and a score.

A task is a small file in `evaluation/tasks` (or anywhere, named by its path) that defines ``TASKS``, a tuple of `Task`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One question about one long text, or a text whose end is judged.

    Attributes
    ----------
    prompt : str or tuple of int
        What the model reads: text, which a chat template may wrap, or token ids, which are taken as they are.
    target : str or tuple of int
        The continuation whose likelihood is measured; text starts with the space that separates it from what stands
        before it, where there is one.
    answers : tuple of str
        What `Task.score` compares an answer with.
    prefix : str
        Words that the answer starts with, written after the template's header of the answer (RULER's answer prefix).
    new_tokens : int
        Tokens to generate; 0 for none, and no score.
    document : dict
        What else `Task.score` needs to know of a published sample.
    """

    prompt: str | tuple[int, ...]
    target: str | tuple[int, ...]
    answers: tuple[str, ...] = ()
    prefix: str = ""
    new_tokens: int = 0
    document: dict[str, Any] = field(default_factory=dict, compare=False)


def in_template(tokenizer: Any, content: str) -> str:
    """A chat of one message of the user's, in the tokenizer's template, up to where the answer begins."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # of Qwen3: its thoughts would use up the tokens of the answer
    )


@dataclass(frozen=True)
class Reader:
    """How text becomes tokens of one checkpoint.

    Attributes
    ----------
    tokenizer
        Of transformers.
    chat : bool
        Whether prompts that are text are wrapped in the tokenizer's chat template.
    """

    tokenizer: Any
    chat: bool = False

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)  # no word on its length

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def prompt_ids(self, sample: Sample) -> list[int]:
        """What the model reads of a sample before the target: prompt, template and answer prefix."""
        if not isinstance(sample.prompt, str):
            return list(sample.prompt)
        if not self.chat:
            return self.encode(sample.prompt + (" " + sample.prefix if sample.prefix else ""))
        return self.encode(in_template(self.tokenizer, sample.prompt) + sample.prefix)

    def target_ids(self, sample: Sample) -> list[int]:
        """The continuation whose likelihood is measured."""
        return self.encode(sample.target) if isinstance(sample.target, str) else list(sample.target)


@dataclass(frozen=True)
class Task:
    """Samples and a score.

    Attributes
    ----------
    name : str
        As ``--tasks`` takes it.
    samples : callable
        ``samples(reader, length, count, seed)`` yields `count` samples. The prompt ids of each, with its target and
        the tokens to generate, are at most `length` tokens and as near to it as the task allows; they depend on the
        arguments only. Raises `InvalidValue` where `length` is too short, `MissingPackage` where texts are not there.
    score : callable, optional
        ``score(sample, answer)``: 0 (wrong) to 1 (right) for the generated text; None for tasks of likelihood only.
        The prompt of the sample is token ids by then: samples are kept in files without their text.
    """

    name: str
    samples: Callable[[Reader, int, int, int], Iterator[Sample]]
    score: Callable[[Sample, str], float] | None = None
