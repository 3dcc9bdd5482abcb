"""LV-Eval (Yuan et al., arXiv 2402.05136): questions over mixed documents, in English and Chinese.

The score of the benchmark, here ``lveval``, is F1 of words, but 0 where the answer holds less than 0.2 (English) or 0.4
(Chinese) of the words of ``answer_keywords``, function words apart. Qwen reports the recall of the keywords instead,
because the F1 of a right answer in other words is low: ``lveval_recall`` (Qwen2.5-1M, arXiv 2501.15383).

Prompts and the list of function words are ours, and the texts of DuReader are scored as the others, so that figures are
not those of the benchmark's leaderboard to the digit. Chinese needs the package jieba, which finds its words.
"""

from __future__ import annotations

import unicodedata

from qwen_longctx.errors import MissingPackage
from qwen_longctx.evaluation.answers import f1, normalised, shared
from qwen_longctx.evaluation.task import Sample
from qwen_longctx.evaluation.tasks.published import Document, Format

_NEW_TOKENS = 64
_ENGLISH = (
    "Read the passages. One or a few of them answer a question that is asked at the end.\n\n{text}\n\n"
    "Answer the question from the passages above, in a few words and without explanation.\n\nQuestion: {input}\nAnswer:"
)
_CHINESE = (
    "请阅读以下文章，其中有一篇或几篇可以回答最后的问题。\n\n{text}\n\n"
    "请根据上文用几个词回答问题，不要解释。\n\n问题：{input}\n回答："
)
_FUNCTION_WORDS = set(
    "and as at be by for from he her his in is it of on or she that their they this to was with".split()
)
_FUNCTION_WORDS |= set("的 了 和 是 在 与 为 或 等 有 也 不 就 都 而 及 于 以 对 从 到 由 将 被 把".split())


def _sample(document: Document, text: str, chat: bool) -> Sample:
    chinese = document.get("language") == "zh"
    answers = tuple(document["answers"])
    return Sample(
        (_CHINESE if chinese else _ENGLISH).format(text=text, input=document["input"]),
        target=answers[0] if chat or chinese else " " + answers[0],
        answers=answers,
        new_tokens=_NEW_TOKENS,
        document={"keywords": document.get("answer_keywords") or answers[0], "chinese": chinese},
    )


def words(text: str, chinese: bool) -> list[str]:
    """Words of a text, normalised.

    Raises
    ------
    MissingPackage
        jieba is needed for Chinese.
    """
    if not chinese:
        return normalised(text).split()
    try:
        import jieba
    except ImportError as error:
        raise MissingPackage("LV-Eval in Chinese needs the words of a text: pip install jieba") from error
    return [word.lower() for word in jieba.lcut(text) if not all(unicodedata.category(c)[0] in "PZC" for c in word)]


def recall(sample: Sample, answer: str) -> float:
    """Share of the words of the keywords that the answer names."""
    chinese = sample.document["chinese"]
    keywords = words(sample.document["keywords"], chinese)
    return shared(keywords, words(answer, chinese)) / len(keywords) if keywords else 0.0


def gated_f1(sample: Sample, answer: str) -> float:
    """F1 of the words of the first published answer, where enough of the keywords are named."""
    chinese = sample.document["chinese"]
    keywords, said = words(sample.document["keywords"], chinese), words(answer, chinese)
    told = [word for word in keywords if word not in _FUNCTION_WORDS]
    if shared(told, said) < (0.4 if chinese else 0.2) * len(keywords):
        return 0.0
    return f1(said, words(sample.answers[0], chinese))


FORMATS = {"lveval": Format("context", _sample, gated_f1), "lveval_recall": Format("context", _sample, recall)}
