"""Documents of a user's file with the prompts and scores of lm-eval's own task definitions.

Of the package (``pip install --no-deps lm_eval``) only the YAML file of the task and the Python file it names are read.
LongBench needs the packages jieba, fuzzywuzzy and rouge as well, and BABILong datasets.

A file is in the format of its benchmark: LongBench's ``input`` is also called ``question`` here, as the task
definitions want it, and LongBench v2's ``choice_A`` to ``choice_D`` are its ``choices``. Questions of choice, which
lm-eval judges by likelihood, are judged by the first letter that stands alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

from qwen_longctx.errors import InvalidValue, MissingPackage
from qwen_longctx.evaluation import packages
from qwen_longctx.evaluation.task import Sample
from qwen_longctx.evaluation.tasks.published import Document, Format

_FAMILIES = ("babilong", "infinitebench", "longbench", "longbench2")
_LETTERS = "ABCD"
_BETWEEN_SHOTS = "\n\n"


class _Function(NamedTuple):
    """What ``!function file.name`` in a task definition names."""

    folder: Path
    name: str

    def load(self) -> Callable[..., Any]:
        module, _, name = self.name.rpartition(".")
        return getattr(_module(self.folder / f"{module}.py"), name)


@lru_cache
def _module(path: Path) -> ModuleType:
    """A Python file beside a task definition, without the package around it."""
    try:
        return packages.run_file(path, f"{path.parent.name}_{path.stem}")
    except ImportError as error:
        raise MissingPackage(f"this task of lm-eval needs another package: {error}") from error


def form(name: str) -> Format:
    """The format of a task of lm-eval.

    Raises
    ------
    InvalidValue
        lm-eval has no such task in the families that are known here.
    MissingPackage
    """
    config = _definition(packages.folder("lm_eval", "--no-deps lm_eval") / "tasks", name)
    text = "input" if name.startswith("babilong") else "context"

    def sample(document: Document, shown: str, chat: bool) -> Sample:
        return _sample(config, _completed({**document, text: shown}), text, chat)

    return Format(text, sample, _first_letter if _is_choice(config) else _score(config))


def _definition(tasks: Path, name: str) -> dict[str, Any]:
    heading = re.compile(rf"^task: {re.escape(name)}\s*$", re.MULTILINE)
    for family in _FAMILIES:
        for path in sorted((tasks / family).glob("*.yaml")):
            if heading.search(path.read_text(encoding="utf-8")):
                return _config(path)
    raise InvalidValue(
        f"there is no published task {name!r}: name lveval, lveval_recall, longbench_chat, or a task of lm-eval that "
        f"starts with {', '.join(_FAMILIES)}"
    )


def _config(path: Path) -> dict[str, Any]:
    """A task definition, with what it includes."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: _Function(path.parent, node.value))
    config = yaml.load(path.read_text(encoding="utf-8"), Loader)  # of a SafeLoader: it makes plain values only
    included = config.pop("include", None)
    return {**_config(path.parent / included), **config} if included else config


def _completed(document: Document) -> Document:
    """A document with the fields that task definitions name otherwise than the benchmarks."""
    if "input" in document:
        document.setdefault("question", document["input"])
    if "choice_A" in document:
        document.setdefault("choices", [document[f"choice_{letter}"] for letter in _LETTERS])
    return document


def _sample(config: dict[str, Any], document: Document, text: str, chat: bool) -> Sample:
    delimiter = config.get("target_delimiter", " ")
    answers = _answers(document)
    shots = config.get("fewshot_config", {}).get("samples", [])[: config.get("num_fewshot") or 0]
    shown = "".join(_rendered(config, shot) + delimiter + shot["target"] + _BETWEEN_SHOTS for shot in shots)
    return Sample(
        config.get("description", "") + shown + _rendered(config, document),
        target=answers[0] if chat else delimiter + answers[0],
        answers=answers,
        new_tokens=8 if _is_choice(config) else config["generation_kwargs"]["max_gen_toks"],
        document={key: value for key, value in document.items() if key != text},
    )


def _is_choice(config: dict[str, Any]) -> bool:
    return config.get("output_type") == "multiple_choice"


def _rendered(config: dict[str, Any], document: Document) -> str:
    from jinja2 import Environment, StrictUndefined, UndefinedError

    template = config["doc_to_text"]
    try:
        if isinstance(template, _Function):
            return template.load()(document)
        return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template).render(document)
    except (UndefinedError, KeyError) as error:
        raise InvalidValue(f"a document lacks a field that {config['task']} asks about: {error}") from error


def _answers(document: Document) -> tuple[str, ...]:
    for field in ("answers", "answer", "target"):
        if value := document.get(field):
            return tuple(map(str, value)) if isinstance(value, list) else (str(value),)
    raise InvalidValue(f"a document has no answers, answer or target, but {', '.join(document)}: is it a test sample?")


def _score(config: dict[str, Any]) -> Callable[[Sample, str], float]:
    """The score of a task definition, of an answer up to where its generation ends."""
    ends = config["generation_kwargs"].get("until") or []
    figures_of = config["process_results"].load()

    def score(sample: Sample, answer: str) -> float:
        for end in ends:
            answer = answer.partition(end)[0]
        figures = figures_of(sample.document, [answer])
        return float(figures.get("score", next(iter(figures.values()))))

    return score


def _first_letter(sample: Sample, answer: str) -> float:
    found = re.search(rf"\b[{_LETTERS}]\b", answer)
    return float(found is not None and found[0] == sample.answers[0])
