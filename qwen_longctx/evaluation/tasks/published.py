"""Tasks whose samples lie in a file of the user's, in the format in which a benchmark publishes them.

``--tasks NAME=FILE`` makes such a task. The file holds JSON lines, or one JSON list. NAME is one of

``lveval``, ``lveval_recall``
    LV-Eval, by its own score or by the recall of its keywords alone: `tasks.lv_eval`.
``longbench_chat``
    LongBench-Chat, by a judge: `tasks.longbench_chat`.
a task of lm-eval
    Of LongBench, LongBench v2, BABILong or InfiniteBench, by the prompts and scores of that package: `tasks.lm_eval`.

Sample `index` of `seed` is a document that is drawn without repeating one. Where a text is longer than the length asked
for, its middle is left out; where it is shorter, so is the sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.evaluation.fitting import cut
from qwen_longctx.evaluation.task import Reader, Sample, Task

Document = dict[str, Any]
Judge = Callable[[str], str]


class Format(NamedTuple):
    """What a benchmark makes of its documents.

    Attributes
    ----------
    text : str
        The field that holds the long text.
    sample : callable
        ``sample(document, text, chat)``: the sample of a document with this text, whole or cut; `chat` tells whether a
        chat template will stand before the answer.
    score : callable
        As `Task.score`.
    """

    text: str
    sample: Callable[[Document, str, bool], Sample]
    score: Callable[[Sample, str], float]


def task(name: str, path: str, judge: Judge | None = None) -> Task:
    """The task NAME of the documents in a file; its name is ``NAME:`` and that of the file.

    Raises
    ------
    InvalidValue
        There is no such format, the file is none of JSON objects, one lacks its long text, or a judge is missing.
    MissingFile
    MissingPackage
    """
    form = _format(name, path, judge)
    documents = _documents(Path(path))
    for number, document in enumerate(documents, 1):
        if not isinstance(document.get(form.text), str):
            raise InvalidValue(f"document {number} of {path} has no text {form.text!r}: is it a file of {name}?")

    def samples(reader: Reader, length: int, count: int, seed: int) -> Iterator[Sample]:
        if count > len(documents):
            raise InvalidValue(f"{path} holds {len(documents)} documents, and {count} samples are asked for")
        for document in random.Random(seed).sample(documents, count):
            yield _fitted(form, reader, length, document)

    return Task(f"{name}:{Path(path).stem}", samples, form.score)


def _fitted(form: Format, reader: Reader, length: int, document: Document) -> Sample:
    return cut(reader, length, document[form.text], lambda text: form.sample(document, text, reader.chat))


def _format(name: str, path: str, judge: Judge | None) -> Format:
    from qwen_longctx.evaluation.tasks import lm_eval, longbench_chat, lv_eval

    if name in lv_eval.FORMATS:
        return lv_eval.FORMATS[name]
    if name == "longbench_chat":
        return longbench_chat.form(Path(path), judge)
    return lm_eval.form(name)


def _documents(path: Path) -> list[Document]:
    documents = parsed(path)
    if not isinstance(documents, list) or not documents or not all(isinstance(one, dict) for one in documents):
        raise InvalidValue(f"{path} must hold JSON objects, one a line in a file called .jsonl, or a list of them")
    return documents


def parsed(path: Path) -> Any:
    """What a file of JSON holds; a file of JSON lines, called ``.jsonl``, holds a list.

    Raises
    ------
    MissingFile, InvalidValue
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFile(f"cannot read {path}: {error}") from error
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidValue(f"{path} is no JSON: {error}. A file of JSON lines must be called .jsonl") from error
