"""Text and conversations from files, packed, drawn by their number, and refused where they are bad."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwen_longctx.cli import BUNDLED
from qwen_longctx.errors import InvalidType, InvalidValue, MissingFile, MissingPackage
from qwen_longctx.training import documents, store
from qwen_longctx.training.data import DataSettings, source
from qwen_longctx.training.packing import IGNORED, Document, pack
from qwen_longctx.training.plan import Piece, Stretches, TextPlan, WholePlan, shuffled
from training_helpers import CHATML, folder, text, tokenizer

TASKS = {name: 0.25 for name in DataSettings().shares}
TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A stone."}]


def rows(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


# packing


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), max_size=5), st.data())
def test_packed_sequences_keep_to_their_definition(content, data):
    """Labels, starts and positions against a loop over the tokens."""
    used = sum(map(len, content))
    tokens = used + data.draw(st.integers(0 if used else 1, 5))
    packed = pack([Document(*map(np.array, zip(*rows, strict=True))) for rows in content], tokens, padding=77)
    wanted = []
    for rows in content:
        for place, (token, _) in enumerate(rows):
            following = rows[place + 1] if place + 1 < len(rows) else (IGNORED, True)
            wanted.append((token, following[0] if following[1] else IGNORED, place))
    wanted += [(77, IGNORED, place) for place in range(tokens - used)]
    found = zip(packed.ids.tolist(), packed.labels.tolist(), packed.positions.tolist(), strict=True)
    assert list(found) == wanted
    assert packed.starts.tolist() == [*(i for i, row in enumerate(wanted) if row[2] == 0), tokens]
    assert (packed.ids.dtype, packed.labels.dtype, packed.starts.dtype) == (torch.int64, torch.int64, torch.int32)


def test_documents_that_do_not_fit_are_a_defect():
    with pytest.raises(ValueError, match="do not make a sequence"):
        pack([Document(np.arange(4), np.ones(4, dtype=bool))], 3, 0)


# plans


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 30), st.booleans(), st.data())
def test_a_token_comes_once_an_epoch(lengths, tokens, long_first, data):
    plan = TextPlan(np.array(lengths), tokens, long_first, 1)
    if not plan.count:
        assert sum(length % tokens for length in lengths) < tokens and max(lengths) < tokens
        return
    for epoch in range(2):
        seen: Counter[tuple[int, int]] = Counter()
        for ordinal in range(epoch * plan.count, (epoch + 1) * plan.count):
            pieces = plan.pieces(ordinal)
            assert sum(piece.end - piece.begin for piece in pieces) == tokens
            if long_first:
                assert (len(pieces) == 1 and pieces[0].begin % tokens == 0) or ordinal % plan.count >= plan.filled
            seen.update((piece.number, place) for piece in pieces for place in range(piece.begin, piece.end))
        assert max(seen.values()) == 1 and sum(lengths) - len(seen) < tokens
        assert all(0 <= number < len(lengths) and place < lengths[number] for number, place in seen)
    ordinal = data.draw(st.integers(0, 5 * plan.count))
    assert TextPlan(np.array(lengths), tokens, long_first, 1).pieces(ordinal) == plan.pieces(ordinal)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 50))
def test_whole_documents_are_never_cut(lengths, tokens):
    numbers = np.arange(len(lengths)) + 100
    plan = WholePlan(numbers, np.array(lengths), tokens, 1)
    fitting = [number for number, length in zip(numbers, lengths, strict=True) if length <= tokens]
    assert plan.left_out == len(lengths) - len(fitting)
    for epoch in range(2):
        found = [plan.documents(epoch * plan.count + place) for place in range(plan.count)]
        assert all(0 < sum(lengths[number - 100] for number in numbers) <= tokens for numbers in found)
        assert sorted(sum(found, [])) == fitting


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(-1, 2)), min_size=1, max_size=15), st.integers(1, 25))
def test_related_documents_are_joined(content, below):
    """Whole stretches against a loop: short related documents together, in their order, all others alone."""
    lengths, related = np.array(content).T
    wanted: dict[object, list[int]] = {}
    for number, (length, group) in enumerate(content):
        wanted.setdefault(group if group >= 0 and length < below else ("alone", number), []).append(number)
    stretches = Stretches(np.arange(len(content)) + 7, lengths, related, below)
    found = []
    for number, length in enumerate(stretches.lengths):
        parts = stretches.parts(Piece(number, 0, int(length)))
        assert [goes_on for _, goes_on in parts] == [True] * (len(parts) - 1) + [False]
        assert all((part.begin, part.end) == (0, lengths[part.number - 7]) for part, _ in parts)
        found.append([part.number - 7 for part, _ in parts])
        middle = stretches.parts(Piece(number, 1, int(length) - 1)) if length > 2 else []
        assert sum(part.end - part.begin for part, _ in middle) == max(0, length - 2 if length > 2 else 0)
    assert found == list(wanted.values())


def test_orders_do_not_depend_on_a_library():
    """A run that resumes after an upgrade draws what it would have drawn."""
    assert shuffled(8, "key", 1).tolist() == [0, 6, 1, 3, 2, 7, 5, 4]
    assert sorted(shuffled(1000, 3)) == list(range(1000))


# files


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "b" / "two.py").write_text("def f():\r\n    pass\r\n")
    (tmp_path / "b" / "one.md").write_bytes(b"\xef\xbb\xbf# One\n")
    (tmp_path / "a.jsonl").write_text('{"text": "row 1"}\n\n{"text": " "}\n' + json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "c.json").write_text('[{"text": "first"}, {"text": "second"}]')
    (tmp_path / "d.json").write_text('{"setting": 3}')
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "f.bin").write_bytes(b"\0\1\2")
    (tmp_path / "g.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "h.txt").write_text(" \n\n")
    (tmp_path / "i.gz").write_bytes(gzip.compress(b"text" * 100)[:-20])
    (tmp_path / "j").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "0.md").symlink_to(tmp_path / "b" / "one.md")  # among the files anyway
    (tmp_path / ".outside").write_text("linked to")
    (tmp_path / "k.txt").symlink_to(tmp_path / ".outside")
    (tmp_path / "l.txt").symlink_to(tmp_path / ".outside")
    (tmp_path / "m.txt").symlink_to(tmp_path / "nowhere")
    skipped: list[tuple[str, str]] = []
    found = [entry for file in documents.files_of([str(tmp_path)]) for entry in documents.read_file(file, skipped)]
    texts = {entry.name: "".join(entry.parts) for entry in found if isinstance(entry, documents.Text)}
    assert list(texts.items()) == [
        ("a.jsonl:1", "row 1"),
        ("b/one.md", "# One\n"),
        ("b/two.py", "def f():\n    pass\n"),
        ("c.json:1", "first"),
        ("c.json:2", "second"),
        ("d.json", '{"setting": 3}'),
        ("e.txt.gz", "packed"),
        ("k.txt", "linked to"),
    ]
    assert [entry.messages for entry in found if isinstance(entry, documents.Conversation)] == [TALK]
    related = {entry.name: entry.related for entry in found if isinstance(entry, documents.Text)}
    assert related["b/one.md"] == related["b/two.py"] != related["d.json"] == related["e.txt.gz"]
    assert related["a.jsonl:1"] is None
    reasons = dict(skipped)
    assert list(reasons) == ["f.bin", "g.txt", "h.txt", "i.gz"]
    assert "binary" in reasons["f.bin"] and "UTF-8" in reasons["g.txt"] and "empty" in reasons["h.txt"]
    assert "cannot be read" in reasons["i.gz"]


def test_files_that_are_passed_over_are_told(tmp_path, caplog):
    folder(tmp_path, 3)
    for number in range(9):
        (tmp_path / f"{number}.bin").write_bytes(b"\0")
    with caplog.at_level(logging.WARNING):
        found = source(DataSettings(paths=[str(tmp_path)]), tokenizer(), 0)
    assert [name for name, _ in found.contents.skipped] == [f"{number}.bin" for number in range(9)]
    assert "9 files are passed over: 0.bin is binary" in caplog.text and "and 4 more" in caplog.text


@given(st.text(st.sampled_from("ab \n\t}é"), max_size=60))
def test_long_texts_are_cut_where_their_tokens_are(content):
    """Pieces are the whole, and have the tokens of the whole where a line begins with no white space."""
    made = tokenizer()
    pieces = list(documents._cut(content[i : i + 5] for i in range(0, len(content), 5)))
    assert "".join(pieces) == content
    assert all(before.endswith("\n") and not after[0].isspace() for before, after in pairwise(pieces))
    ids = sum(store.plain_ids(made, pieces), []) if pieces else []
    assert ids == store.plain_ids(made, [content])[0]


def test_memory_is_bounded_for_lines_without_end(monkeypatch):
    monkeypatch.setattr(documents, "PART", 10)
    pieces = list(documents._cut(["x" * 10] * 20))
    assert "".join(pieces) == "x" * 200 and max(map(len, pieces)) == 40


def test_a_file_larger_than_a_part_has_the_tokens_of_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 100)
    monkeypatch.setattr(store, "_BATCH", 250)
    made, content = tokenizer(), text(1, 60)
    (tmp_path / "a.txt").write_text(content)
    found = source(DataSettings(paths=[str(tmp_path)], held_out=0), made, 0)
    assert found.store.read(0).ids.tolist() == [*store.plain_ids(made, [content])[0], made.get_vocab()["<|endoftext|>"]]


# a source


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("corpus"), 40)


def fields(packed):
    return packed.ids.tolist(), packed.labels.tolist(), packed.starts.tolist()


def test_a_sequence_is_a_function_of_its_number(corpus, tmp_path):
    """In any order, from a second process's cache, and never the same under another seed or number."""
    data = DataSettings(paths=[str(corpus)], **TASKS, cache=str(tmp_path / "cache"))
    first, second = (source(data, tokenizer(), 5) for _ in range(2))
    for tokens in (64, 300):
        numbers = [3, 0, 250, 7, 3]
        drawn = [fields(first.sequence(index, tokens)) for index in numbers]
        assert drawn == [fields(second.sequence(index, tokens)) for index in numbers]
        assert drawn == [fields(second.sequence(index, tokens)) for index in reversed(numbers)][::-1]
        assert drawn[0] == drawn[-1] and len({str(one) for one in drawn}) == 4
    assert fields(source(data, tokenizer(), 6).sequence(3, 300)) != fields(first.sequence(3, 300))


@pytest.mark.parametrize("long_from", [1, 10_000])
def test_an_epoch_holds_every_token_once(corpus, long_from):
    """Plain text: what the sequences hold are the documents' tokens, none twice; loss on all but documents' first."""
    found = source(DataSettings(paths=[str(corpus)], held_out=0, long_from=long_from), tokenizer(), 1)
    end, newline = found.end, store.plain_ids(tokenizer(), ["\n"])[0][0]
    whole: Counter[int] = Counter()
    for number in range(40):
        whole.update(found.store.read(number).ids.tolist())
    tokens = 200
    count = found.contents.tokens // tokens
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for index in range(epoch * count, (epoch + 1) * count):
            packed = found.sequence(index, tokens)
            seen.update(packed.ids.tolist())
            assert (packed.labels == IGNORED).sum() == len(packed.starts) - 1
        replaced = seen[newline] - whole[newline] if long_from == 1 else 0  # between documents that were joined
        left = whole - (seen - Counter({newline: replaced}) + Counter({end: replaced}))
        assert left.total() == found.contents.tokens - count * tokens


def test_related_documents_make_long_ones(corpus):
    """From `long_from` on, a sequence is of one document where a folder holds as much, with line ends between files."""
    made = tokenizer()
    found = source(DataSettings(paths=[str(corpus)], held_out=0, long_from=800), made, 1)
    assert found.sequence(0, 800).starts.tolist() == [0, 800]
    assert len(found.sequence(0, 799).starts) > 2
    content = made.decode(found.sequence(0, 800).ids)
    numbers = [int(number) for number in re.findall(r"document-(\d+)-", content)]
    assert numbers == list(range(numbers[0], numbers[0] + 2 * len(numbers), 2)) and len(numbers) > 1
    assert "<|endoftext|>" not in content and ".\n\nThis is document" in content


@pytest.mark.parametrize("long_from", [1, 10_000])
def test_held_out_documents_are_never_trained_on(corpus, tmp_path, long_from):
    """Not in tasks and not in conversations; equal documents lie on the same side; all others are seen."""
    copy = folder(tmp_path / "copies", 12)
    data = DataSettings(
        paths=[str(corpus), str(copy)], **TASKS, held_out=0.2, long_from=long_from, tasks_as_conversations=0.5
    )
    made = tokenizer()
    found = source(data, made, 3)
    held = [int(number) for number in np.flatnonzero(np.isin(np.arange(52), found._held_out))]
    apart = {re.search("document-[0-9]+-", made.decode(found.store.read(number).ids))[0] for number in held}
    assert apart and len(held) > len(apart)  # copies are held out as well
    seen = set()
    for tokens in (250, 700):
        for index in range(3 * found.contents.tokens // tokens):
            seen |= set(re.findall("document-[0-9]+-", made.decode(found.sequence(index, tokens).ids)))
    assert not seen & apart and len(seen | apart) == 40
    kept = "".join(made.decode(found.held_out_sequence(i, 100).ids) for i in range(found.held_out_count(100)))
    assert set(re.findall("document-[0-9]+-", kept)) <= apart
    assert fields(source(data, made, 4).held_out_sequence(1, 100)) == fields(found.held_out_sequence(1, 100))
    with pytest.raises(InvalidValue, match="there is no number"):
        found.held_out_sequence(found.held_out_count(100), 100)


def test_related_documents_are_held_out_together(tmp_path):
    """Whole groups up to the share, and copies of their files elsewhere; they make one long document."""
    for group in range(12):
        for number in range(5):
            file = tmp_path / f"{group:02}" / f"{number}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text(100 * group + number, 8) if number else "The same licence everywhere.")
    found = source(DataSettings(paths=[str(tmp_path)], held_out=0.2), tokenizer(), 0)
    held = found._held_out
    groups = {group for group in range(12) if set(range(5 * group, 5 * group + 5)) <= set(held)}
    licences = set(range(0, 60, 5))
    assert len(groups) in (1, 2, 3) and set(held) == licences | {5 * group + n for group in groups for n in range(5)}
    assert found.contents.held_out_tokens < 0.25 * (found.contents.tokens + found.contents.held_out_tokens)
    longest = int(found.store.lengths[[n for n in held if n // 5 == min(groups)]].sum())
    assert found.held_out_sequence(0, longest).starts.tolist() == [0, longest]


def test_special_tokens_in_a_text_are_text(tmp_path):
    made = tokenizer()
    content = "before <|endoftext|> and <|im_start|>user\nafter\n"
    (tmp_path / "a.txt").write_text(content)
    found = source(DataSettings(paths=[str(tmp_path)], held_out=0), made, 0)
    ids = found.store.read(0).ids.tolist()
    assert ids.count(found.end) == 1 and not set(ids) & {made.get_vocab()["<|im_start|>"]}
    assert made.decode(ids[:-1]) == content


def test_conversations_have_their_share(corpus, tmp_path):
    talks = rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 10)
    data = DataSettings(paths=[str(corpus)], conversations=[talks], conversation_share=0.3)
    found = source(data, tokenizer(), 0)
    kinds = [found._turn(index) for index in range(3000)]
    assert sum(of for of, _ in kinds) == 900 and 250 < sum(of for of, _ in kinds[:1000]) < 350
    for kind in (True, False):  # numbers of a kind follow each other, so that none is left out
        assert [ordinal for of, ordinal in kinds if of == kind] == list(range(900 if kind else 2100))
    index = next(index for index, (of, _) in enumerate(kinds) if of)
    packed = found.sequence(index, 64)
    answers = tokenizer().decode(packed.labels[packed.labels != IGNORED])
    assert answers == "A stone.<|im_end|>" * answers.count("A stone.") and answers


def test_conversations_alone(tmp_path, caplog):
    """Whole ones, several a sequence, padded; what does not fit is left out and told; what is too short is refused."""
    long = [{"role": "user", "content": text(1, 30)}, TALK[1]]
    talks = rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 5 + [{"messages": long}])
    found = source(DataSettings(conversations=[talks]), tokenizer(), 0)
    each = len(found.store.read(0).ids)
    with caplog.at_level(logging.WARNING):
        packed = found.sequence(0, 2 * each + 1)
    assert packed.starts.tolist() == [0, each, 2 * each, 2 * each + 1]
    assert "1 of 6 conversations are longer than" in caplog.text
    with pytest.raises(InvalidValue, match="no conversation is as short"):
        found.sequence(0, each - 1)


def test_a_cache_is_read_again_and_mended(corpus, tmp_path, monkeypatch):
    data = DataSettings(paths=[str(corpus)], cache=str(tmp_path))
    wanted = fields(source(data, tokenizer(), 0).sequence(0, 100))
    calls = []
    monkeypatch.setattr("qwen_longctx.training.data.stores.write", lambda *a: calls.append(a) or store_write(*a))
    assert fields(source(data, tokenizer(), 0).sequence(0, 100)) == wanted and not calls
    (place,) = tmp_path.iterdir()
    for damage in (lambda: (place / "index.npz").unlink(), lambda: os.truncate(place / "tokens.bin", 8)):
        damage()
        assert fields(source(data, tokenizer(), 0).sequence(0, 100)) == wanted
    assert len(calls) == 2
    file = next(path for path in corpus.rglob("*.txt"))
    os.utime(file, ns=(1, 1))
    source(data, tokenizer(), 0)
    source(data, tokenizer(CHATML + " "), 0)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 3


store_write = store.write


def test_a_temporary_folder_goes_with_its_source(corpus):
    found = source(DataSettings(paths=[str(corpus)]), tokenizer(), 0)
    place = found._folder.name
    assert os.path.isdir(place)
    del found
    assert not os.path.exists(place)


def test_the_bundled_tokenizer(corpus):
    made = AutoTokenizer.from_pretrained(BUNDLED)
    found = source(DataSettings(paths=[str(corpus)], **TASKS), made, 0)
    assert {len(found.sequence(index, 256).ids) for index in range(20)} == {256}


# what is refused


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"paths": "folder"}, InvalidType, "must be a list"),
        ({"dataset": 3}, InvalidType, "must be a name"),
        ({"fill_in_the_middle": -0.1}, InvalidValue, "fill_in_the_middle must lie between 0 and 1, got -0.1"),
        ({"held_out": 1}, InvalidValue, "held_out must lie"),
        ({"keyword_retrieval": "0.5"}, InvalidType, "must be a number"),
        ({"keyword_retrieval": 0.6, "fill_in_the_middle": 0.5}, InvalidValue, "sum to more than 1"),
        ({"keyword_retrieval": float("nan")}, InvalidValue, "must lie between 0 and 1"),
        ({"long_from": 0}, InvalidValue, "long_from"),
    ],
)
def test_bad_settings(values, error, match):
    with pytest.raises(error, match=match):
        DataSettings(**values)


def jsonl(line):
    return lambda path: (path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")


@pytest.mark.parametrize(
    ("prepare", "error", "match"),
    [
        (lambda path: None, InvalidValue, "holds no file"),
        (lambda path: path.rmdir(), MissingFile, "does not exist"),
        (lambda path: (path / "a.txt").write_text(" "), InvalidValue, "no file holds text: 1 were passed over"),
        (lambda path: (path / "a.txt").write_text("one document"), InvalidValue, "held_out 0.01 leaves none of 1"),
        (jsonl('{"text": '), InvalidValue, r"a\.jsonl, line 3: not JSON"),
        (jsonl('{"texts": "x"}'), InvalidValue, r"a\.jsonl, line 3: a row must be"),
        (jsonl('["text"]'), InvalidValue, r"a\.jsonl, line 3: a row must be"),
        (jsonl('{"text": 3}'), InvalidValue, r"a\.jsonl, line 3: text must be a string"),
        (jsonl(r'{"text": "\ud800"}'), InvalidValue, r"a\.jsonl, line 3: .*surrogate"),
        (jsonl('{"text": "x", "messages": []}'), InvalidValue, r"a\.jsonl, line 3: a row must be"),
        (jsonl('{"messages": "hello"}'), InvalidValue, r"a\.jsonl, line 3: messages must be a list"),
        (jsonl('{"messages": [{"role": "user"}]}'), InvalidValue, r"a\.jsonl, line 3: messages must be a list"),
        (jsonl(json.dumps({"messages": TALK[:1]})), InvalidValue, r"a\.jsonl, line 3: no message has the role assis"),
        (jsonl(json.dumps({"messages": TALK[1:]})), InvalidValue, r"a\.jsonl, line 3: .* begins with an answer"),
    ],
)
def test_bad_folders(tmp_path, prepare, error, match):
    path = tmp_path / "text"
    path.mkdir()
    prepare(path)
    with pytest.raises(error, match=match):
        source(DataSettings(paths=[str(path)]), tokenizer(), 0)


def test_nothing_is_left_of_a_source_that_is_refused(tmp_path):
    talks = rows(tmp_path / "a.jsonl", [{"text": "fine"}] * 3 + [{"messages": []}])
    with pytest.raises(InvalidValue):
        source(DataSettings(paths=[talks], cache=str(tmp_path / "cache")), tokenizer(), 0)
    assert not list((tmp_path / "cache").iterdir())


def test_bad_files(tmp_path):
    binary, plain = tmp_path / "a.bin", tmp_path / "a.txt"
    binary.write_bytes(b"\0")
    plain.write_text("text")
    for values, match in (
        ({"paths": [str(binary)]}, "a.bin is binary: name a file of text"),
        ({"paths": [str(plain), str(tmp_path)]}, "among the paths twice"),
        ({"conversations": [str(plain)]}, "among the conversations and holds text"),
        ({}, "nothing to train on"),
        ({"paths": [str(plain)], "held_out": 0, "cache": str(plain)}, "cannot write to"),
    ):
        with pytest.raises(InvalidValue, match=match):
            source(DataSettings(**values), tokenizer(), 0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_passed_over(tmp_path):
    folder(tmp_path, 3)
    (tmp_path / "locked.txt").write_text("x")
    (tmp_path / "locked.txt").chmod(0)
    assert "locked.txt" in dict(source(DataSettings(paths=[str(tmp_path)]), tokenizer(), 0).contents.skipped)


def test_tokenizers_that_lack_something(corpus, tmp_path):
    talks = rows(tmp_path / "talks.jsonl", [{"messages": TALK}])
    for values in (
        {"conversations": [talks]},
        {"paths": [talks]},
        {"paths": [str(corpus)], "tasks_as_conversations": 1},
    ):
        with pytest.raises(InvalidValue, match="no chat template"):
            source(DataSettings(**values), tokenizer(None), 0)
    with pytest.raises(InvalidValue, match="no text|made from text"):
        source(DataSettings(conversations=[talks], keyword_retrieval=0.1), tokenizer(), 0)
    bare = AutoTokenizer.from_pretrained(BUNDLED)
    bare.eos_token = None
    bare.get_vocab = lambda: {}
    with pytest.raises(InvalidValue, match="no end of text"):
        source(DataSettings(paths=[str(corpus)]), bare, 0)


def test_sequences_that_cannot_be(corpus):
    found = source(DataSettings(paths=[str(corpus)]), tokenizer(), 0)
    with pytest.raises(InvalidValue, match="fewer than one sequence of 1000000"):
        found.sequence(0, 1_000_000)
    for index, tokens, error in ((-1, 64, InvalidValue), (0, 1, InvalidValue), (1.5, 64, InvalidType)):
        with pytest.raises(error):
            found.sequence(index, tokens)


def test_a_data_set_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match="pip install datasets"):
        source(DataSettings(dataset="some/name"), tokenizer(), 0)


def test_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = [text(number, 8) for number in range(10)]
    datasets.Dataset.from_dict({"text": content}).save_to_disk(tmp_path / "saved")
    rows(tmp_path / "rows.jsonl", [{"text": one} for one in content])
    settings_of = {"held_out": 0.0}
    saved = source(DataSettings(dataset=str(tmp_path / "saved"), **settings_of), tokenizer(), 0)
    plain = source(DataSettings(paths=[str(tmp_path / "rows.jsonl")], **settings_of), tokenizer(), 0)
    assert fields(saved.sequence(3, 200)) == fields(plain.sequence(3, 200))
    talks = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"messages": TALK}] * 3)})
    talks.save_to_disk(tmp_path / "talks")
    assert source(DataSettings(dataset=str(tmp_path / "talks")), tokenizer(), 0).contents.conversations == 3
    datasets.Dataset.from_dict({"content": content}).save_to_disk(tmp_path / "other")
    for name, split, error in (("other", "train", InvalidValue), ("talks", "test", InvalidValue)):
        with pytest.raises(error):
            source(DataSettings(dataset=str(tmp_path / name), dataset_split=split), tokenizer(), 0)
    with pytest.raises(MissingFile, match="cannot be loaded"):
        source(DataSettings(dataset=str(tmp_path / "none")), tokenizer(), 0)
