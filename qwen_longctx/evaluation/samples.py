"""Samples of tasks, built once for every task and length, and kept in files that another machine can run from."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.evaluation import corpus
from qwen_longctx.evaluation.task import Reader, Sample, Task
from qwen_longctx.files import check_writable, replacing

_PROBE = (
    "The 3 keys: 12345, é, 数字.\n\n\tdef f(x):\n        return x  # don't\n"  # texts that tokenizers split differently
)


def reader_of(tokenizer: Any, chat: bool | None = None) -> Reader:
    """How text becomes tokens: with the tokenizer's chat template, without it, or (None) with it where there is one.

    Raises
    ------
    InvalidValue
        The template is asked for, and there is none.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise InvalidValue("the tokenizer has no chat template: leave chat at auto, or switch it off")
    return Reader(tokenizer, has_template if chat is None else chat)


def fingerprint_of(reader: Reader) -> str:
    """Short hash of a vocabulary, of how a text with many kinds of characters is split, and of the template in use."""
    vocabulary = sorted(reader.tokenizer.get_vocab().items())
    template = str(reader.tokenizer.chat_template) if reader.chat else None
    content = json.dumps([vocabulary, reader.encode(_PROBE), template])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fingerprint(reader: Reader, sample: Sample) -> str:
    """Short hash of the token ids of a sample, prompt and target."""
    return corpus.fingerprint(torch.tensor(reader.prompt_ids(sample) + reader.target_ids(sample)))


class Samples:
    """Samples by task and length: read from a folder where they are there, else built, and kept.

    Parameters
    ----------
    reader : Reader
    count, seed : int
        As `Task.samples` takes them.
    folder : path, optional
        Where files are read and written, one for each task and length; without it samples stay in memory.
    """

    def __init__(self, reader: Reader, count: int, seed: int, folder: str | Path | None = None) -> None:
        self.reader, self.count, self.seed = reader, count, seed
        self.folder = None if folder is None else Path(folder)
        self.tokenizer = fingerprint_of(reader)
        self._built: dict[tuple[str, int], list[Sample]] = {}

    def of(self, task: Task, length: int) -> list[Sample]:
        """The samples of a task at a length. Their prompts are token ids, whatever the task made them from.

        Raises
        ------
        InvalidValue
            The task cannot build them, or builds others than it should; or a file is damaged or of other samples.
        MissingPackage
            They are not in the folder, and a package that the task needs is not installed.
        """
        if self.folder is None:
            if (task.name, length) not in self._built:
                self._built[task.name, length] = self._build(task, length)
            return self._built[task.name, length]
        path = self.path(task, length)
        if not path.exists():
            check_writable(path)
            content = {**self._about(task, length), "samples": [asdict(s) for s in self._build(task, length)]}
            with replacing(path) as fresh:
                fresh.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
        return self._read(path, task, length)

    def path(self, task: Task, length: int) -> Path:
        """The file of a task and a length in the folder."""
        assert self.folder is not None
        name = re.sub(r"[^\w.-]", "_", task.name)
        chat = "chat" if self.reader.chat else "plain"
        return self.folder / f"{name}-{length}-{self.count}-{self.seed}-{self.tokenizer}-{chat}.json.gz"

    def _about(self, task: Task, length: int) -> dict[str, Any]:
        about = {"task": task.name, "length": length, "count": self.count, "seed": self.seed}
        return {**about, "chat": self.reader.chat, "tokenizer": self.tokenizer}

    def _build(self, task: Task, length: int) -> list[Sample]:
        found = [
            replace(sample, prompt=tuple(self.reader.prompt_ids(sample)))
            for sample in task.samples(self.reader, length, self.count, self.seed)
        ]
        if len(found) != self.count:
            raise InvalidValue(f"task {task.name} built {len(found)} samples, {self.count} were asked for: correct it")
        for number, sample in enumerate(found):
            self._check(task, length, number, sample)
        return found

    def _check(self, task: Task, length: int, number: int, sample: Sample) -> None:
        """Refuse what cannot be run, with the number of the sample."""
        prompt, target = len(sample.prompt), len(self.reader.target_ids(sample))
        where = f"sample {number} of task {task.name} at {length} tokens"
        if prompt < 2:
            raise InvalidValue(f"{where} has a prompt of {prompt} tokens: it needs at least 2")
        if prompt + max(target, sample.new_tokens) > length:
            raise InvalidValue(
                f"{where} has {prompt} tokens of prompt, {target} of target and {sample.new_tokens} to generate: "
                "together they must fit in the length"
            )
        if not target and not (sample.new_tokens and task.score):
            raise InvalidValue(f"{where} has neither a target nor an answer that is scored: give it one of them")

    def _read(self, path: Path, task: Task, length: int) -> list[Sample]:
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise MissingFile(f"cannot read {path}: {error}. Delete it, and it is built again") from error
        about = self._about(task, length)
        if not isinstance(content, dict) or {name: content.get(name) for name in about} != about:
            raise InvalidValue(f"{path} holds other samples than its name says: delete it, and it is built again")
        return [_restored(values) for values in content["samples"]]


def _restored(values: dict[str, Any]) -> Sample:
    """A sample from JSON, which knows no tuples."""
    fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Sample(**fields)


def check_vocabulary(samples: list[Sample], reader: Reader, vocabulary: int, name: str) -> None:
    """Refuse samples of a task called `name` whose token ids a model with such a vocabulary does not know.

    Raises
    ------
    InvalidValue
    """
    for number, sample in enumerate(samples):
        ids = reader.prompt_ids(sample) + reader.target_ids(sample)
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidValue(
                f"sample {number} of task {name} holds the token id {wrong}, which is outside the model's vocabulary "
                f"of {vocabulary}: use the tokenizer that belongs to the checkpoint"
            )
