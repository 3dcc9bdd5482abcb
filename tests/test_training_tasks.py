"""Synthetic tasks against their definitions, solved from the prompt alone; conversations against their templates."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_longctx.errors import InvalidValue
from qwen_longctx.training import synthetic
from qwen_longctx.training.conversations import encode_conversation
from qwen_longctx.training.data import DataSettings, source
from qwen_longctx.training.packing import IGNORED, Document
from qwen_longctx.training.store import plain_ids
from qwen_longctx.training.synthetic import QUESTIONS, Paragraphs, TaskWriter, split_paragraphs
from training_helpers import CHATML, FIM, folder, text, tokenizer

END = "<|endoftext|>"
GAP_WORDS = ("Text before a gap:\n", "\n\nText after the gap:\n", "\n\nText in the gap:\n")


# solvers, which know the format of a prompt and nothing of how it was made


def solve_keyword(prompt: str) -> str:
    *context, question = prompt.split("\n\n")
    (word,) = re.fullmatch(r'Repeat every paragraph of this text that contains the word "(\w+)".*', question).groups()
    hits = [part for part in context if re.search(rf"(?<!\w){word}(?!\w)", part)]
    assert 1 <= len(hits) <= 3 and len(word) >= 5
    return "\n\n".join(hits)


def solve_position(prompt: str) -> str:
    *context, question = prompt.split("\n\n")
    form = r"Repeat the paragraph that comes directly (before|after) the one which begins with these words:\n(.*)"
    side, words = re.fullmatch(form, question).groups()
    (place,) = [place for place, part in enumerate(context) if part.startswith(words)]
    answer = place + (1 if side == "after" else -1)
    assert answer >= 0
    return context[answer]


def parts_to_reorder(prompt: str) -> list[str]:
    """The numbered parts, in the order of the prompt."""
    context, question = prompt.rsplit("\n\n", 1)
    assert question.startswith("The parts of this text are out of order.")
    found = re.split(r"(?:^|\n\n)\[(\d+)\]\n", context)
    assert found[0] == "" and found[1::2] == [str(place) for place in range(1, len(found) // 2 + 1)]
    return found[2::2]


def check_reordering(prompt: str, answer: str, whole: str) -> None:
    """The answer is the beginning of the text, in parts that the prompt has in another order."""
    parts = parts_to_reorder(prompt)
    assert 3 <= len(parts) <= 12 and whole.startswith(answer)
    assert answer != "\n\n".join(parts) or len(set(parts)) < len(parts)
    left, places = answer, []
    for _ in parts:  # the texts of these tests have no two parts of which one begins the other, unless they are equal
        place = max((i for i, part in enumerate(parts) if left.startswith(part)), key=lambda i: len(parts[i]))
        places.append(parts[place])
        left = left[len(parts[place]) :].removeprefix("\n\n")
    assert not left and sorted(places) == sorted(parts)


SOLVERS = {"keyword_retrieval": solve_keyword, "position_retrieval": solve_position}

# paragraphs that are hard to tell apart: of few words, repeated, one within another
words = st.sampled_from("stone stones stony-stone Stone a_stone kettle kettles copper, (copper) the of 12345".split())
lines = st.lists(words, min_size=1, max_size=9).map(" ".join)
paragraphs = st.lists(st.one_of(lines, st.lists(lines, min_size=2, max_size=3).map("\n".join)), min_size=1, max_size=25)


@given(paragraphs, st.sampled_from(list(SOLVERS)), st.integers(40, 400), st.integers(0, 99))
def test_questions_are_answered_from_the_prompt_alone(content, task, room, seed):
    made = Paragraphs(content, [len(part.split()) + 1 for part in content])
    question = QUESTIONS[task](made, room, random.Random(seed))
    if question is None:
        return
    prompt = f"{question.context}\n\n{question.question}"
    assert SOLVERS[task](prompt) == question.answer
    used = len(question.context.split("\n\n"))
    assert question.context == "\n\n".join(content[:used])
    assert sum(made.tokens[:used]) + len(question.answer.split()) <= room


@given(st.integers(1, 30), st.integers(100, 2000), st.integers(0, 99))
def test_parts_come_back_into_their_order(count, room, seed):
    content = text(seed, count).rstrip("\n").split("\n\n")
    made = Paragraphs(content, [len(part.split()) + 1 for part in content])
    question = QUESTIONS["paragraph_reordering"](made, room, random.Random(seed))
    if question is not None:
        check_reordering(f"{question.context}\n\n{question.question}", question.answer, "\n\n".join(content))


@given(st.text(st.sampled_from("ab \n\t"), max_size=60))
def test_paragraphs_hold_the_text_but_for_white_space(content):
    found = split_paragraphs(content)
    assert "".join("".join(found).split()) == "".join(content.split())
    assert all(part.strip() and "\n\n" not in part and part == part.strip("\n") for part in found)


def split_document(made, document: Document) -> tuple[str, str]:
    """Prompt and answer of a document, by where the loss counts: at the end, without a gap."""
    begin = int(np.argmax(document.counts))
    assert document.counts[begin:].all() and not document.counts[:begin].any()
    return made.decode(document.ids[:begin]), made.decode(document.ids[begin:])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", list(QUESTIONS))
def test_questions_as_tokens(task, chat):
    """What a model reads and learns, taken apart again; never longer than the text."""
    made, written = tokenizer(), 0
    writer = TaskWriter(made, made.get_vocab()[END])
    for seed in range(24):
        whole = text(seed, 5 + seed)
        ids = np.array([*plain_ids(made, [whole])[0], made.get_vocab()[END]])
        document = writer.write(task, ids, random.Random(seed), chat)
        if document is None:
            continue
        written += 1
        assert len(document.ids) <= len(ids)
        prompt, answer = split_document(made, document)
        if chat:
            head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
            assert prompt.startswith(head) and prompt.endswith(tail) and answer.endswith("<|im_end|>")
            prompt, answer = prompt[len(head) : -len(tail)], answer.removesuffix("<|im_end|>")
        else:
            assert prompt.endswith("\n\n") and answer.endswith(END)
            prompt, answer = prompt[:-2], answer.removesuffix(END)
        if task == "paragraph_reordering":
            check_reordering(prompt, answer, whole)
        else:
            assert SOLVERS[task](prompt) == answer
            assert whole.startswith(prompt.rsplit("\n\n", 1)[0])
    assert written >= 18


@pytest.mark.parametrize("known", [True, False])
def test_fill_in_the_middle(known):
    """Before, after and in the gap make the text; the loss counts on all of it and on the end, not on marks."""
    made = tokenizer()
    end, marks = made.get_vocab()[END], FIM
    if not known:
        made.get_vocab = lambda: {}
        marks = GAP_WORDS
    writer, gaps, places = TaskWriter(made, end), [], []
    for seed in range(60):
        whole = text(seed, 20)
        ids = np.array([*plain_ids(made, [whole])[0], end])
        document = writer.write("fill_in_the_middle", ids, random.Random(seed), chat=seed % 2 == 0)
        assert len(document.ids) == len(ids)
        first, before, second, after, third, middle = re.split(
            "(" + "|".join(map(re.escape, marks)) + ")", made.decode(document.ids)
        )[1:]
        assert [first, second, third] == list(marks) and middle.endswith(END)
        middle = middle.removesuffix(END)
        assert whole.startswith(before + middle + after) and before and middle and after
        assert made.decode(document.ids[document.counts]) == before + after + middle + END
        gaps.append(len(middle) / len(whole))
        places.append(len(before) / len(whole))
    assert min(gaps) < 0.05 and max(gaps) > 0.3 and min(places) < 0.2 and max(places) > 0.7


def test_texts_that_tasks_cannot_be_made_of():
    """Too short, without paragraphs, or with special tokens in what would become a conversation: told by None."""
    made = tokenizer()
    end = made.get_vocab()[END]
    writer = TaskWriter(made, end)

    def write(content, task, chat=False):
        return writer.write(task, np.array([*plain_ids(made, [content])[0], end]), random.Random(0), chat)

    special = text(1, 20) + "\n\n<|im_end|>\n"
    for task in synthetic.TASKS:
        assert write("short", task) is None
    for task in QUESTIONS:
        assert write("stone " * 400, task) is None
        assert write(special, task) is not None and write(special, task, chat=True) is None
    assert write("half \ufffd of a character" * 40, "fill_in_the_middle") is not None


def test_tasks_of_a_source_have_their_shares(tmp_path):
    """Of pieces that are long enough; what room a task leaves is filled by the text, and nothing is padded."""
    corpus = folder(tmp_path, 30, paragraphs=60)
    shares = {
        "fill_in_the_middle": 0.1,
        "keyword_retrieval": 0.2,
        "position_retrieval": 0.3,
        "paragraph_reordering": 0.3,
    }
    made = tokenizer()
    found = source(DataSettings(paths=[str(corpus)], held_out=0, long_from=1, **shares), made, 2)
    marks = {
        "fill_in_the_middle": FIM[0],
        "keyword_retrieval": "Repeat every paragraph of",
        "position_retrieval": "Repeat the paragraph that",
        "paragraph_reordering": "are out of order.",
    }
    count, seen = 150, dict.fromkeys(shares, 0)
    for index in range(count):
        packed = found.sequence(index, 600)
        content = made.decode(packed.ids)
        for task, mark in marks.items():
            seen[task] += mark in content
        assert int((packed.ids == found.end).sum()) <= len(packed.starts)
    for task, share in shares.items():
        assert abs(seen[task] / count - share) < 0.11, (task, seen)


# conversations


def talk(*contents: str, system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


@given(st.lists(st.text(max_size=12), min_size=2, max_size=6), st.booleans())
@settings(max_examples=25)
def test_the_loss_counts_on_answers(contents, system):
    """Any text in any turn: ids are the template's rendering, and what counts are answers with their end of turn."""
    made = tokenizer()
    contents = contents[: len(contents) // 2 * 2]
    messages = talk(*contents, system="Be short." if system else "")
    (document,) = encode_conversation(made, messages, "here")
    rendered = made.apply_chat_template(messages, tokenize=False).rstrip()
    assert made.decode(document.ids) == made.backend_tokenizer.normalizer.normalize_str(rendered)
    answers = contents[1::2]
    found = made.decode(document.ids[document.counts])
    assert found == "".join(
        made.backend_tokenizer.normalizer.normalize_str(answer) + "<|im_end|>" for answer in answers
    )
    assert not document.counts[0]


def test_prompts_have_the_tokens_that_generate_will_see():
    made = tokenizer()
    for answer, turns in (("First.", (1, 3)), ("\n  First.", (1,))):  # white space joins that before it when read again
        messages = talk("One?", answer, "Two?", "Second.")
        (document,) = encode_conversation(made, messages, "here")
        for number in turns:
            prompt = made.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            ids = made(prompt, add_special_tokens=False).input_ids
            assert document.ids[: len(ids)].tolist() == ids and document.counts[len(ids)]


THOUGHTS = (  # takes thoughts out of all answers but the last, as Qwen3's does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns():
    """Each answer is learned from a document in which it comes last, after what `generate` will see."""
    made = tokenizer(THOUGHTS)
    messages = talk("One?", "First.", "Two?", "Second.")
    found = encode_conversation(made, messages, "here")
    assert len(found) == 2
    for document, number in zip(found, (1, 3), strict=True):
        prompt, answer = split_document(made, document)
        assert prompt == made.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        assert answer == f"<think>\n\n</think>\n\n{messages[number]['content']}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "otherwise than its generation prompt"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
    ],
)
def test_templates_that_do_not_fit(template, match):
    with pytest.raises(InvalidValue, match=rf"talks\.jsonl:3: .*{match}"):
        encode_conversation(tokenizer(template), talk("One?", "First."), "talks.jsonl:3")


def test_conversations_with_tools():
    template = "{% if tools %}[{{ tools | length }} tools]{% endif %}" + CHATML.replace(
        "m['content']", "m['content'] or ''"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [*talk("One?"), call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}]
    (document,) = encode_conversation(tokenizer(template), messages, "here", tools=[{}, {}])
    decoded = tokenizer().decode(document.ids)
    assert decoded.startswith("[2 tools]") and tokenizer().decode(document.ids[document.counts]).endswith(
        "Three.<|im_end|>"
    )
    assert "tool\n3" not in tokenizer().decode(document.ids[document.counts])


def test_packed_conversations_never_learn_a_question(tmp_path):
    made = tokenizer()
    file = tmp_path / "talks.jsonl"
    messages = [talk(f"ask {number}", f"tell {number}", "ask again", "tell again") for number in range(30)]
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    found = source(DataSettings(conversations=[str(file)]), made, 0)
    for index in range(5):
        packed = found.sequence(index, 150)
        assert "ask" not in made.decode(packed.labels[packed.labels != IGNORED])
