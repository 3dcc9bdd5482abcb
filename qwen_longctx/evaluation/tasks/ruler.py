"""RULER (Hsieh et al., arXiv 2404.06654): thirteen tasks of any length, drawn by the code of lm-eval.

A sample is what lm-eval's generator makes with the same amount of text from the same random state. How much text fits
is found here: the generators measure the whole prompt again for each little piece, which takes minutes to hours at
these lengths. The count includes chat template, answer prefix and the tokens to generate.

The target, whose likelihood is measured, is all gold answers as the answer prefix would go on:

==========================  =============================================  =================================
task                        the prefix ends                                target
==========================  =============================================  =================================
needles, one answer         "... mentioned in the provided text is"        " 1234567"
needles, several answers    "... mentioned in the provided text are"       " 1234567, 2345678, and 3456789"
variable tracking           "... they are:"                                " ABCDE FGHIJ", as the example has
common words                "... most often in the list are:"              " 1. word 2. word"
frequent words              "... frequently appeared words are:"           " abcdef, ghijkl, and mnopqr"
questions                   "Answer:"                                      " " and the first gold answer
==========================  =============================================  =================================
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.task import Reader, Sample, Task
from qwen_longctx.evaluation.tasks import ruler_sources as sources

_SHORT = 4096  # below it lm-eval takes finer steps
_HOLDS_ANY = 65536  # tokens that hold the smallest sample of every task and question, whatever the tokenizer


class Request(NamedTuple):
    """One sample that is wanted: its number, its seed, and the length of the prompt."""

    reader: Reader
    length: int
    number: int
    seed: int


class Sizes(NamedTuple):
    """Amounts of text that lm-eval tries: ``start``, ``start + step`` and so on, but at least ``least``."""

    least: int
    step: int
    start: int = 0

    def at(self, rank: int) -> int:
        """The amount after `rank` steps."""
        return max(self.least, self.start + rank * self.step)


class Kind(NamedTuple):
    """How a task draws a sample with an amount of text (words, sentences, documents), and which amounts it may have."""

    draw: Callable[[Request, int], Sample]
    sizes: Callable[[Request], Sizes]


def samples(name: str, reader: Reader, length: int, count: int, seed: int) -> Iterator[Sample]:
    """`count` samples of at most `length` tokens; those of a smaller count are the first of a larger one.

    Raises
    ------
    InvalidValue
        `length` is too short; before the first sample.
    MissingPackage
        lm-eval or the texts are not installed; before the first sample.
    """
    kind, source = _KINDS[name], random.Random(f"{name} {seed}")
    requests = [Request(reader, length, number, source.getrandbits(32)) for number in range(count)]
    least = max((_least_length(kind, request) for request in requests), default=0)
    if least > length:
        raise InvalidValue(f"length must be at least {least} tokens for ruler_{name} and this tokenizer, got {length}")
    return _largest(kind, requests)


def _least_length(kind: Kind, request: Request) -> int:
    """The length of the request, or the least one above it that holds the smallest sample."""
    length = request.length
    if length >= _HOLDS_ANY:
        return length
    while (needed := _tokens(kind, request._replace(length=length), 0)[1]) > length:
        length = needed  # the smallest sample grows with the length where words are counted
    return length


def _largest(kind: Kind, requests: Sequence[Request]) -> Iterator[Sample]:
    """Samples with as much text as fits into the first, and less where another does not take it."""
    for request in requests[:1]:
        rank, sample = _search(kind, request)
        yield sample
    for request in requests[1:]:
        tried = (_tokens(kind, request, fewer) for fewer in range(rank, -1, -1))
        yield next(sample for sample, tokens in tried if tokens <= request.length)


def _tokens(kind: Kind, request: Request, rank: int) -> tuple[Sample, int]:
    """The sample after `rank` steps, and the tokens of its prompt with what is generated or judged after it."""
    with sources.seeded(request.seed):
        sample = kind.draw(request, kind.sizes(request).at(rank))
    after = max(sample.new_tokens, len(request.reader.target_ids(sample)))
    return sample, len(request.reader.prompt_ids(sample)) + after


def _search(kind: Kind, request: Request) -> tuple[int, Sample]:
    """The highest rank that fits and its sample: tokens grow almost evenly, so that few have to be counted."""
    sizes = kind.sizes(request)
    low, high = 0, request.length // sizes.step + 1  # no amount has more parts than tokens
    best, tokens = _tokens(kind, request, low)
    each = tokens / sizes.at(low)
    while high - low > 1:
        guess = low + int((request.length - tokens) / max(each * sizes.step, 1))
        guess = min(max(guess, low + 1), high - 1)
        sample, counted = _tokens(kind, request, guess)
        if sizes.at(guess) > sizes.at(low):
            each = (counted - tokens) / (sizes.at(guess) - sizes.at(low))
        if counted <= request.length:
            low, best, tokens = guess, sample, counted
        else:
            high = guess
    return low, best


def _listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them, and as RULER lists its keys."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]


def _needle(haystack: str, keys: str = "words", values: str = "numbers", **counts: int) -> Kind:
    """Needles in a haystack.

    Parameters
    ----------
    haystack : str
        ``"repeat"`` (one sentence), ``"essay"``, or ``"needle"`` (sentences like the needle).
    keys, values : str
        ``"words"``, ``"numbers"`` or ``"uuids"``.
    **counts : int
        ``num_needle_k`` keys, ``num_needle_v`` values a key, ``num_needle_q`` keys asked for; 1 of each by default.
    """
    counts = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1, **counts}

    def draw(request: Request, size: int) -> Sample:
        module = sources.lm_eval("prepare_niah")
        if haystack == "essay":
            words = sources.essays()
            text = words * (size // len(words) + 1)
        else:
            text = module.get_haystack(haystack)
        with sources.own_sentences():
            prompt, answers, query = module.generate_input_output(
                size,
                text,
                type_haystack=haystack,
                type_needle_k=keys,
                type_needle_v=values,
                template=sources.lm_eval("niah_utils").TEMPLATE,
                **counts,
            )
        one = len(answers) == 1
        prefix = (
            f"The special magic {values[:-1] if one else values} for {query} mentioned in the provided text "
            f"{'is' if one else 'are'}"
        )
        return Sample(prompt, " " + _listed(answers), tuple(answers), prefix, 128)

    def sizes(request: Request) -> Sizes:
        step = 500 if haystack == "essay" else 5 if request.length < _SHORT else 25
        return Sizes(counts["num_needle_k"] * counts["num_needle_v"], step)

    return Kind(draw, sizes)


def _tracking(request: Request, size: int) -> Sample:
    """One chain of five variables in `size` repeated sentences, after one short solved example."""
    module = sources.lm_eval("vt_utils")
    example = _tracking_example(module, request)
    text, names = module.generate_input_output(size, 1, 4)
    begin = module.CONFIG["variable_tracking"]["answer_prefix"].partition("{")[0]
    prompt, prefix = text[: text.rindex(begin)], text[text.rindex(begin) :].strip()
    example = module.randomize_icl(example)
    return Sample(f"{example}\n\n{prompt}", " " + " ".join(names), tuple(names), prefix, 30)


def _tracking_example(module: Any, request: Request) -> str:
    """A chain with its answer, in as many sentences as 500 tokens hold; its values are not those of the sample."""
    found = ""
    for size in range(5, 500, 5):
        with sources.seeded((request.seed + 1) % 2**32):
            text, names = module.generate_input_output(size, 1, 4, is_icl=True)
        if found and request.reader.count(f"{text} {names}") + 30 > 500:
            break
        found = f"{text} {' '.join(names)}\n\n"
    return found


def _common_words(request: Request, size: int) -> Sample:
    """A numbered list of `size` different words, ten of which appear ten times as often as the others."""
    module = sources.lm_eval("cwe_utils")
    with sources.more_words(size):
        _, text, words = module.generate_input_output(size, request.length)
    prefix = module.CONFIG["answer_prefix"]
    target = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    return Sample(text[: text.rindex(prefix)].strip(), " " + target, tuple(words), prefix.strip(), 120)


def _frequent_words(request: Request, size: int) -> Sample:
    """`size` coded words whose frequencies fall as a zeta distribution does; the three after the most frequent."""
    module = sources.lm_eval("fwe_utils")
    text, words, _ = module.generate_input_output(
        request.length,
        lambda text: SimpleNamespace(input_ids=()),  # lm-eval would shorten the text by its own count
        num_words=size,
        vocab_size=max(4, request.length // 50),
    )
    prefix = module.CONFIG["answer_prefix"]
    return Sample(text[: text.rindex(prefix)].strip(), " " + _listed(words), tuple(words), prefix.strip(), 50)


def _question(dataset: str) -> Kind:
    """The question of this number in ``"squad"`` or ``"hotpotqa"``, among documents most of which do not answer it."""

    def question(request: Request) -> int:
        return request.number % len(sources.questions(dataset)[0])

    def draw(request: Request, size: int) -> Sample:
        module = sources.lm_eval("qa_utils")
        questions, documents = sources.questions(dataset)
        text, answers = module.generate_input_output(
            question(request), size, questions, documents * (size // len(documents) + 1)
        )
        return Sample(text, f" {answers[0]}", tuple(answers), module.CONFIG["answer_prefix"], 32)

    def sizes(request: Request) -> Sizes:
        return Sizes(len(sources.questions(dataset)[0][question(request)]["context"]), 10)

    return Kind(draw, sizes)


def score_all(sample: Sample, answer: str) -> float:
    """Share of the gold answers that stand in the answer, letter case aside.

    That is ``string_match_all`` of lm-eval and, for one answer, its ``string_match_part`` too.
    """
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(gold.lower() in text for gold in sample.answers) / len(sample.answers)


_KINDS = {
    "niah_single_1": _needle("repeat"),
    "niah_single_2": _needle("essay"),
    "niah_single_3": _needle("essay", values="uuids"),
    "niah_multikey_1": _needle("essay", num_needle_k=4),
    "niah_multikey_2": _needle("needle"),
    "niah_multikey_3": _needle("needle", keys="uuids", values="uuids"),
    "niah_multivalue": _needle("essay", num_needle_v=4),
    "niah_multiquery": _needle("essay", num_needle_k=4, num_needle_q=4),
    "vt": Kind(_tracking, lambda request: Sizes(10, 10)),
    "cwe": Kind(_common_words, lambda request: Sizes(10, 10)),
    "fwe": Kind(_frequent_words, lambda request: Sizes(1, max(1, request.length // 32), request.length // 6)),
    "qa_squad": _question("squad"),
    "qa_hotpot": _question("hotpotqa"),
}

TASKS = tuple(Task(f"ruler_{name}", partial(samples, name), score_all) for name in _KINDS)
