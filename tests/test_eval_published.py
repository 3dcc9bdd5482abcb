"""Tasks whose samples lie in a file of the user's, in the formats of the benchmarks."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from qwen_longctx.cli import BUNDLED
from qwen_longctx.errors import InvalidValue, MissingFile, MissingPackage
from qwen_longctx.evaluation import judge, packages
from qwen_longctx.evaluation.fitting import size
from qwen_longctx.evaluation.task import Reader
from qwen_longctx.evaluation.tasks import find, longbench_chat

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED)
READER = Reader(TOKENIZER)
CHAT = Reader(AutoTokenizer.from_pretrained(BUNDLED), chat=True)
CHAT.tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<assistant>"
LONG = "".join(f"Fact {i} is of no interest to anybody.\n" for i in range(400))


def has(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def write(path, documents):
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents), encoding="utf-8")
    return path


def load(name, path, documents, judge=None):
    """The task NAME=FILE of documents that are written there."""
    return find([f"{name}={write(path, documents)}"], judge)[0]


LV_EVAL = [
    {"input": f"Who owns boat {i}?", "context": f"Boat {i} is Ann's.\n{LONG}", "answers": ["It is owned by Ann Lee."]}
    | {"answer_keywords": "Ann Lee", "language": "en", "length": 16000, "dataset": "loogle_SD_mixup"}
    for i in range(3)
]


@pytest.mark.parametrize("reader", [READER, CHAT], ids=["raw", "chat"])
def test_a_published_text_is_cut_from_its_middle(tmp_path, reader):
    task = load("lveval", tmp_path / "loogle_SD_mixup_16k.jsonl", LV_EVAL)
    assert task.name == "lveval:loogle_SD_mixup_16k"
    samples = list(task.samples(reader, 3000, 3, 0))
    assert list(task.samples(reader, 3000, 2, 0)) == samples[:2]
    for sample in samples:
        number = re.search(r"Question: Who owns boat (\d)\?\nAnswer:$", sample.prompt)[1]
        assert f"Boat {number} is Ann's." in sample.prompt and "Fact 399" in sample.prompt
        assert "[...]" in sample.prompt and "Fact 200 " not in sample.prompt
        assert 2900 < size(reader, sample) <= 3000
        assert sample.target == ("" if reader.chat else " ") + "It is owned by Ann Lee."
    assert len({sample.prompt for sample in samples}) == 3
    firsts = {next(task.samples(reader, 3000, 1, seed)).prompt for seed in range(8)}
    assert len(firsts) > 1  # another seed begins with another document
    (whole,) = task.samples(reader, 60_000, 1, 0)
    assert LONG in whole.prompt and size(reader, whole) < 60_000


@pytest.mark.parametrize(
    "answer, score, recall",
    [
        (" It is owned by Ann Lee.", 1, 1),
        ("Ann Lee", 2 * 2 / (2 + 6), 1),
        ("Ann", 2 * 1 / (1 + 6), 1 / 2),
        ("it is owned by Bob", 0, 0),  # four of the words, but no keyword
        ("", 0, 0),
    ],
)
def test_scores_of_lv_eval(tmp_path, answer, score, recall):
    for name, expected in (("lveval", score), ("lveval_recall", recall)):
        task = load(name, tmp_path / "a.jsonl", LV_EVAL)
        sample = next(task.samples(READER, 2000, 1, 0))
        assert task.score(sample, answer) == pytest.approx(expected)


def test_gates_of_lv_eval_ignore_function_words(tmp_path):
    document = {**LV_EVAL[0], "answers": ["the house by the lake"], "answer_keywords": "by the lake"}
    task = load("lveval", tmp_path / "a.jsonl", [document])
    sample = next(task.samples(READER, 2000, 1, 0))
    assert task.score(sample, "by") == 0 < task.score(sample, "lake")


@pytest.mark.skipif(not has("jieba"), reason="jieba is not installed")
def test_chinese_of_lv_eval(tmp_path):
    document = {"input": "谁有船？", "context": "船是王小明的。" * 300, "answers": ["王小明，北京"], "language": "zh"}
    task = load("lveval", tmp_path / "a.jsonl", [document])
    sample = next(task.samples(READER, 2500, 1, 0))
    assert sample.prompt.endswith("问题：谁有船？\n回答：") and sample.target == "王小明，北京"
    assert task.score(sample, "北京。 王小明") == 1
    assert task.score(sample, "上海") == 0


def test_chinese_of_lv_eval_without_jieba(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    task = load("lveval", tmp_path / "a.jsonl", [{**LV_EVAL[0], "language": "zh"}])
    sample = next(task.samples(READER, 2000, 1, 0))
    with pytest.raises(MissingPackage, match="pip install jieba"):
        task.score(sample, "x")


CASES = [
    {"idx": i + 1, "prompt": f"{LONG}\nWhat is fact {i}?", "query": f"What is fact {i}?", "answer": f"Dull, {i}."}
    for i in range(2)
]


def test_longbench_chat(tmp_path):
    asked = []

    def fake(prompt: str) -> str:
        asked.append(prompt)
        return "It names the fact, though [[3]] might do. [[8]]"

    shots = [[{"answer": f"Unknown {i}", "score": 2}, {"answer": "Quite dull", "score": 9}] for i in range(2)]
    (tmp_path / "few_shots.json").write_text(json.dumps(shots))
    (tmp_path / "test_cases.json").write_text(json.dumps(CASES))
    (task,) = find([f"longbench_chat={tmp_path / 'test_cases.json'}"], fake)
    assert task.name == "longbench_chat:test_cases"
    for sample in task.samples(CHAT, 4000, 2, 0):
        number = re.search(r"What is fact (\d)\?$", sample.prompt)[1]
        assert task.score(sample, " It is dull. ") == 0.8
        question = asked[-1]
        for part in (f"What is fact {number}?", f"Dull, {number}.", f"Unknown {number}\nScore: [[2]]", "It is dull."):
            assert part in question
        assert LONG[:100] not in question and size(CHAT, sample) <= 4000


def test_longbench_chat_without_shots(tmp_path):
    task = load("longbench_chat", tmp_path / "a.jsonl", CASES, lambda prompt: "[[10]]" * ("Score: [[" not in prompt))
    assert task.score(next(task.samples(READER, 4000, 1, 0)), "x") == 1


@pytest.mark.parametrize(
    "said, score", [("[[7]]", 0.7), ("[[ 7.5 ]] ", 0.75), ("7", 0), ("[[70]]", 0), ("[[0]]", 0), ("[[2]] [[9]]", 0.9)]
)
def test_verdicts(said, score):
    assert longbench_chat.verdict(said) == pytest.approx(score)


def test_a_checkpoint_judges(monkeypatch):
    monkeypatch.setattr(judge, "_NEW_TOKENS", 4)
    said = judge.checkpoint(str(BUNDLED))("The pass key is 12345. What is the pass key? The pass key is")
    assert isinstance(said, str) and said


LM_EVAL = {
    "longbench/_common_yaml": """
target_delimiter: ' '
generation_kwargs:
  max_gen_toks: 12
  until: ["\\n"]
""",
    "longbench/longbench_small.yaml": """
include: _common_yaml
task: longbench_small
process_results: !function metrics.of
doc_to_text: "Read.\\n\\n{{context}}\\n\\nQuestion: {{question}}\\nAnswer:"
""",
    "longbench/metrics.py": "def of(doc, results):\n    return {'score': results[0].strip() in doc['answers']}\n",
    "longbench/longbench_needs.yaml": """
include: _common_yaml
task: longbench_needs
process_results: !function absent.of
""",
    "longbench/absent.py": "import no_such_package\n",
    "longbench2/two.yaml": """
task: longbench2_small
output_type: multiple_choice
doc_to_choice: ["A", "B", "C", "D"]
doc_to_text: "{{context}}\\n{{question}}\\n(A) {{choices[0]}}\\n(D) {{choices[3]}}\\nAnswer:"
""",
    "babilong/one.yaml": """
task: babilong_small
num_fewshot: 1
process_results: !function utils.of
description: "Say.\\n\\n"
doc_to_text: "{{input.strip()}}\\n{{question}}"
generation_kwargs:
  max_gen_toks: 9
fewshot_config:
  samples:
  - input: Al is in.
    question: Where?
    target: In.
""",
    "babilong/utils.py": "def of(doc, results):\n    return {'acc': doc['target'] in results[0]}\n",
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A package with task definitions of the form of lm-eval's."""
    for name, text in LM_EVAL.items():
        path = tmp_path / "tasks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(packages, "folder", lambda package, install: tmp_path)
    return tmp_path


def test_prompts_and_scores_of_task_definitions(small):
    document = {"input": "Who?", "context": LONG, "answers": ["Ann", "Ann Lee"], "all_classes": None}
    task = load("longbench_small", small / "narrative.jsonl", [document])
    (sample,) = task.samples(READER, 2000, 1, 0)
    assert sample.prompt.startswith("Read.\n\nFact 0 ") and sample.prompt.endswith("\n\nQuestion: Who?\nAnswer:")
    assert sample.target == " Ann" and sample.answers == ("Ann", "Ann Lee") and sample.new_tokens == 12
    assert 1900 < size(READER, sample) <= 2000
    assert [task.score(sample, said) for said in (" Ann Lee\nQuestion:", " Bob", " Ann, I think")] == [1, 0, 0]


def test_questions_of_choice(small):
    letters = {f"choice_{letter}": f"It is {letter.lower()}." for letter in "ABCD"}
    document = {"question": "Which?", "context": LONG, "answer": "D", "difficulty": "hard", **letters}
    task = load("longbench2_small", small / "two.jsonl", [document])
    (sample,) = task.samples(READER, 2000, 1, 0)
    assert sample.prompt.endswith("Which?\n(A) It is a.\n(D) It is d.\nAnswer:") and sample.target == " D"
    assert [task.score(sample, said) for said in (" D", " (D) It is", " A or D", " Do", "")] == [1, 1, 0, 0, 0]


def test_shots_of_task_definitions(small):
    document = {"input": LONG, "question": "Where is Al?", "target": "kitchen"}
    task = load("babilong_small", small / "qa1.jsonl", [document])
    (sample,) = task.samples(CHAT, 2000, 1, 0)
    assert sample.prompt.startswith("Say.\n\nAl is in.\nWhere? In.\n\nFact 0 ")
    assert sample.prompt.endswith("Fact 399 is of no interest to anybody.\nWhere is Al?") and sample.target == "kitchen"
    assert task.score(sample, "in the kitchen") == 1


def test_what_task_definitions_lack(small):
    with pytest.raises(InvalidValue, match="no published task 'longbench_none'"):
        load("longbench_none", small / "a.jsonl", [{"context": LONG}])
    with pytest.raises(MissingPackage, match="no_such_package"):
        load("longbench_needs", small / "a.jsonl", [{"context": LONG}])
    for document, message in (({}, "no answers"), ({"answers": ["x"]}, "lacks a field .*question")):
        task = load("longbench_small", small / "a.jsonl", [{"context": LONG, **document}])
        with pytest.raises(InvalidValue, match=message):
            list(task.samples(READER, 2000, 1, 0))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(MissingFile, match="cannot read"):
        find([f"lveval={tmp_path / 'none.jsonl'}"])
    for text in ("{", "[]", "[1]", "3"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InvalidValue, match="a.json"):
            find([f"lveval={tmp_path / 'a.json'}"])
    with pytest.raises(InvalidValue, match="document 2 of .* has no text 'context'"):
        load("lveval", tmp_path / "a.jsonl", [LV_EVAL[0], {"input": "x"}])
    with pytest.raises(InvalidValue, match="holds 3 documents, and 4"):
        list(load("lveval", tmp_path / "a.jsonl", LV_EVAL).samples(READER, 2000, 4, 0))
    with pytest.raises(InvalidValue, match="--judge"):
        load("longbench_chat", tmp_path / "a.jsonl", CASES)


def test_lm_eval_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install --no-deps lm_eval"):
        load("longbench_qasper", tmp_path / "a.jsonl", [{"context": LONG}])


needs_lm_eval = pytest.mark.skipif(not has("lm_eval"), reason="lm_eval is not installed")


@needs_lm_eval
@pytest.mark.skipif(not has("jieba", "fuzzywuzzy", "rouge"), reason="the metrics of LongBench are not installed")
@pytest.mark.parametrize("name", ["narrativeqa", "trec", "gov_report", "passage_retrieval_en", "lcc", "passage_count"])
def test_longbench(tmp_path, name):
    answers = {"trec": "Food", "passage_retrieval_en": "Paragraph 3", "passage_count": "5"}
    answer = answers.get(name, "a long answer of some words")
    document = {"input": "A question", "context": LONG, "answers": [answer], "all_classes": ["Food", "Other"]}
    task = load(f"longbench_{name}", tmp_path / f"{name}.jsonl", [{**document, "length": 9, "language": "en"}])
    (sample,) = task.samples(READER, 3500, 1, 0)
    assert "Fact 0 " in sample.prompt and "Fact 399" in sample.prompt and size(READER, sample) <= 3500
    assert task.score(sample, " " + answer if name != "lcc" else answer) == pytest.approx(1)
    assert task.score(sample, " 4711") == 0 or name == "lcc"


@needs_lm_eval
def test_longbench_2(tmp_path):
    letters = {f"choice_{letter}": letter * 3 for letter in "ABCD"}
    document = {"question": "Which?", "context": LONG, "answer": "C", "domain": "x", **letters}
    task = load("longbench2_graph", tmp_path / "graph.jsonl", [document])
    (sample,) = task.samples(READER, 3000, 1, 0)
    assert "(C) CCC\n(D) DDD" in sample.prompt and sample.target == " C" and task.score(sample, " C") == 1


@needs_lm_eval
def test_infinitebench_of_a_file(tmp_path):
    document = {"id": 1, "context": LONG, "input": "Who?", "answer": ["Ann"], "options": []}
    task = load("infinitebench_longbook_qa_en", tmp_path / "longbook.jsonl", [document])
    (sample,) = task.samples(READER, 3000, 1, 0)
    assert "Fact 0 " in sample.prompt and "Who?" in sample.prompt and task.score(sample, " Ann") == 1


@needs_lm_eval
def test_babilong(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))  # imported for samples of the hub
    document = {"input": LONG + "Mary is in the kitchen.", "question": "Where is Mary? ", "target": "kitchen"}
    task = load("babilong_qa1", tmp_path / "qa1.jsonl", [document])
    (sample,) = task.samples(READER, 3000, 1, 0)
    assert "location of Charlie is balcony." in sample.prompt and sample.prompt.endswith("kitchen.\nWhere is Mary?")
    assert task.score(sample, " The most recent location of Mary is kitchen.") == 1
