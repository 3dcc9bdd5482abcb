"""LongBench-Chat (LongAlign, arXiv 2401.18058): open questions over a long text, scored by a judge.

The file of cases holds for each a ``prompt``, its ``query`` and the ``answer`` of an expert. Where ``few_shots.json``
lies beside it, the judge reads the scored answers in it first. The judge is any function from a prompt to what a model
says about it (`evaluation.judge`); the words it is asked with are ours, and its verdict ends in ``[[7]]``, of 1 to 10.
"""

from __future__ import annotations

import re
from pathlib import Path

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.task import Sample
from qwen_longctx.evaluation.tasks.published import Document, Format, Judge, parsed

_NEW_TOKENS = 1024
_ASKED = """\
Judge how well an assistant has answered a question about a long document that you do not see. An expert's answer tells
you what the document says. Give 1 for an answer that is wrong or useless, and 10 for one that is as correct and as
complete as the expert's. Ignore style and length.

Question: {query}

Answer of the expert: {answer}
"""
_SHOT = "\nAnswer of another assistant: {answer}\nScore: [[{score}]]\n"
_END = """
Answer of the assistant to judge: {said}

Explain your verdict in one or two sentences, then write the score in double square brackets, such as [[5]].
Verdict:"""


def form(path: Path, judge: Judge | None) -> Format:
    """The format of a file of cases.

    Raises
    ------
    InvalidValue
        There is no judge, or ``few_shots.json`` cannot be used.
    """
    if judge is None:
        raise InvalidValue("longbench_chat is scored by a judge: name a checkpoint that judges, with --judge")
    shots = path.with_name("few_shots.json")
    few = parsed(shots) if shots.is_file() else []
    if not isinstance(few, list):
        raise InvalidValue(f"{shots} must hold a list: for each case in order, a list of answers with their scores")

    def sample(document: Document, text: str, chat: bool) -> Sample:
        place = document.get("idx", 0) - 1
        return Sample(
            text,
            target=document["answer"] if chat else "\n" + document["answer"],
            answers=(document["answer"],),
            new_tokens=_NEW_TOKENS,
            document={"query": document["query"], "few_shots": few[place] if 0 <= place < len(few) else []},
        )

    def score(sample: Sample, answer: str) -> float:
        return verdict(judge(question(sample, answer)))

    return Format("prompt", sample, score)


def question(sample: Sample, answer: str) -> str:
    """What the judge is asked about an answer."""
    shots = "".join(_SHOT.format(**shot) for shot in sample.document["few_shots"])
    asked = _ASKED.format(query=sample.document["query"], answer=sample.answers[0])
    return asked + shots + _END.format(said=answer.strip())


def verdict(said: str) -> float:
    """A tenth of the last number in double square brackets; 0 where there is none from 1 to 10."""
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", said)
    score = float(found[-1]) if found else 0.0
    return score / 10 if 1 <= score <= 10 else 0.0
