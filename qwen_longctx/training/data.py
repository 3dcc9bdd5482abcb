"""What a model is trained on: sequences out of text and conversations, each drawn by its number alone."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.files import check_writable
from qwen_longctx.training import store as stores
from qwen_longctx.training.conversations import check_chat_template
from qwen_longctx.training.documents import (
    Conversation,
    File,
    Text,
    files_of,
    load_dataset,
    read_dataset,
    read_file,
)
from qwen_longctx.training.packing import Document, Packed, pack
from qwen_longctx.training.plan import Piece, Stretches, TextPlan, WholePlan, shuffled
from qwen_longctx.training.store import Store
from qwen_longctx.training.synthetic import TASKS, TaskWriter

logger = logging.getLogger(__name__)

_BLOCK = 1000  # sequences over which conversations have exactly their share
_LISTED = 5  # files that a warning names


@dataclass(frozen=True)
class DataSettings:
    """The ``[data]`` table of a recipe. Lists, as TOML has them, become tuples.

    Attributes
    ----------
    paths : tuple of str
        Files and folders of text; ``.jsonl`` and ``.json`` with a ``text`` field, or with ``messages``, which are
        conversations; any of them as ``.gz``.
    dataset, dataset_split : str
        A data set of Hugging Face with a column ``text`` or ``messages``: a name, or a folder.
    fill_in_the_middle, keyword_retrieval, position_retrieval, paragraph_reordering : float
        Shares of the pieces of text that are made a task, see `synthetic`; the rest stays plain text.
    tasks_as_conversations : float
        Share of the tasks that are put as a conversation, by the chat template: long instructions. Fill in the middle
        never is.
    conversations : tuple of str
        Files and folders of ``.jsonl`` and ``.json`` with ``messages``.
    conversation_share : float
        Share of the sequences that hold conversations, where there is text too.
    held_out : float
        Share of the text, in tokens, that is never trained on: whole groups of related documents where they are small
        enough, else single documents, and at least one unless it is 0.
    long_from : int
        From this length of a sequence on, related documents are joined and long ones come first.
    cache : str, optional
        Folder for the token ids, 4 bytes a token, which later runs and other processes read. By default each process
        writes a temporary one.
    """

    paths: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_split: str = "train"
    fill_in_the_middle: float = 0.0
    keyword_retrieval: float = 0.0
    position_retrieval: float = 0.0
    paragraph_reordering: float = 0.0
    tasks_as_conversations: float = 0.0
    conversations: tuple[str, ...] = ()
    conversation_share: float = 0.5
    held_out: float = 0.01
    long_from: int = 131_072
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("paths", "conversations"):
            value = getattr(self, name)
            if isinstance(value, (str, Path)) or not isinstance(value, Sequence):
                raise InvalidType(f"{name} must be a list of files and folders, got {value!r}")
            object.__setattr__(self, name, tuple(str(item) for item in value))
        for name in ("dataset", "cache"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, Path)) or not str(value)):
                raise InvalidType(f"{name} must be a name or None, got {value!r}")
        for name in (*TASKS, "tasks_as_conversations", "conversation_share", "held_out"):
            _check_share(name, getattr(self, name), below_one=name == "held_out")
        if sum(self.shares.values()) > 1 + 1e-9:
            listed = ", ".join(f"{name} {value}" for name, value in self.shares.items())
            raise InvalidValue(f"the shares of the tasks sum to more than 1: {listed}. Lower them")
        if isinstance(self.long_from, bool) or not isinstance(self.long_from, int) or self.long_from < 1:
            raise InvalidValue(f"long_from must be a whole number of tokens, at least 1, got {self.long_from!r}")

    @property
    def shares(self) -> dict[str, float]:
        """Share of each synthetic task, by its name."""
        return {name: getattr(self, name) for name in TASKS}


def _check_share(name: str, value: Any, below_one: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise InvalidValue(f"{name} must lie between 0 and 1, got {value}")


@dataclass(frozen=True)
class Contents:
    """What a source holds, for a log.

    Attributes
    ----------
    documents, tokens : int
        Of text that is trained on.
    held_out_documents, held_out_tokens : int
    conversations, conversation_tokens : int
        A conversation whose template rewrites earlier turns counts once for each answer.
    skipped : tuple of (str, str)
        Files of folders that hold no text, and why.
    """

    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    conversations: int
    conversation_tokens: int
    skipped: tuple[tuple[str, str], ...]


class Source:
    """Sequences by number; made by `source`.

    Nothing is remembered from one sequence to the next, so a run resumes by its step number, and processes that take
    different numbers see different sequences.
    """

    def __init__(self, data: DataSettings, tokenizer: Any, seed: int, store: Store, folder: Any = None) -> None:
        self.data, self.seed, self.store = data, seed, store
        self._folder = folder  # a temporary one lasts as long as the source
        self.end = stores.end_of_text(tokenizer)
        self._newline = stores.plain_ids(tokenizer, ["\n"])[0][-1]
        self._tasks = TaskWriter(tokenizer, self.end)
        text = np.flatnonzero(~store.conversations)
        apart = _held_out(store, text, data.held_out)
        self._trained, self._held_out = text[~apart], text[apart]
        self._conversations = np.flatnonzero(store.conversations)
        self._text_plans: dict[tuple[str, int], tuple[Stretches, TextPlan]] = {}
        self._conversation_plans: dict[int, WholePlan] = {}

    @property
    def contents(self) -> Contents:
        """Documents and tokens of each kind, and the files that were passed over."""
        kinds = (self._trained, self._held_out, self._conversations)
        tokens = [int(self.store.lengths[chosen].sum()) for chosen in kinds]
        text, held_out, talks = map(len, kinds)
        return Contents(text, tokens[0], held_out, tokens[1], talks, tokens[2], self.store.skipped)

    def sequence(self, index: int, tokens: int) -> Packed:
        """The sequence of a number: a pure function of the data, the seed, `index` and `tokens`.

        Of sequences of one length, every token of text and every conversation comes once before any comes again.

        Parameters
        ----------
        index : int
            From 0, without end.
        tokens : int
            Length of the sequence, at least 2.

        Raises
        ------
        InvalidValue
            The text is shorter than one sequence, or every conversation is longer: so ``sequence(0, tokens)`` tells
            whether a stage can be run.
        """
        _check_whole("index", index, 0)
        _check_whole("tokens", tokens, 2)
        self._check_length(tokens)
        of_conversations, ordinal = self._turn(index)
        if of_conversations:
            numbers = self._conversation_plan(tokens).documents(ordinal)
            return pack([self.store.read(number) for number in numbers], tokens, self.end)
        stretches, plan = self._text_plan("text", tokens)
        documents: list[Document] = []
        for number, piece in enumerate(plan.pieces(ordinal)):
            source = random.Random(f"{self.seed} {tokens} {index} {number}")
            documents += self._documents(self._read(stretches, piece), source)
        return pack(documents, tokens, self.end)

    def held_out_count(self, tokens: int) -> int:
        """Sequences of `tokens` that documents which are never trained on make."""
        _check_whole("tokens", tokens, 2)
        return self._text_plan("held out", tokens)[1].count

    def held_out_sequence(self, index: int, tokens: int) -> Packed:
        """A sequence of held-out documents, plain: for the loss by position. Long documents come first.

        Related documents are joined at every length. The same whatever the seed.

        Parameters
        ----------
        index : int
            Below `held_out_count`.
        tokens : int
        """
        count = self.held_out_count(tokens)
        _check_whole("index", index, 0)
        if index >= count:
            raise InvalidValue(
                f"held-out documents make {count} sequences of {tokens} tokens, so that there is no number {index}: "
                "raise held_out, or take shorter ones"
            )
        stretches, plan = self._text_plan("held out", tokens)
        return pack([_plain(self._read(stretches, piece)) for piece in plan.pieces(index)], tokens, self.end)

    def _turn(self, index: int) -> tuple[bool, int]:
        """Whether a sequence holds conversations, and its number among its kind."""
        if not len(self._conversations) or not len(self._trained):
            return bool(len(self._conversations)), index
        block, place = divmod(index, _BLOCK)
        each = round(_BLOCK * self.data.conversation_share)
        chosen = shuffled(_BLOCK, self.seed, "turns", block) < each
        before = int(chosen[:place].sum())
        if chosen[place]:
            return True, block * each + before
        return False, block * (_BLOCK - each) + place - before

    def _check_length(self, tokens: int) -> None:
        """Refuse a length that any kind of sequence cannot have."""
        share = self.data.conversation_share
        both = len(self._conversations) and len(self._trained)
        if len(self._trained) and not (both and share == 1):
            plan = self._text_plan("text", tokens)[1]
            if not plan.count:
                total = int(plan.lengths.sum())
                raise InvalidValue(
                    f"the text to train on has {total} tokens, fewer than one sequence of {tokens}: "
                    "add text, lower held_out, or take shorter sequences"
                )
        if len(self._conversations) and not (both and share == 0) and not self._conversation_plan(tokens).count:
            raise InvalidValue(
                f"no conversation is as short as a sequence of {tokens} tokens: take longer sequences, or cut them"
            )

    def _text_plan(self, kind: str, tokens: int) -> tuple[Stretches, TextPlan]:
        if (kind, tokens) not in self._text_plans:
            held_out = kind == "held out"
            numbers = self._held_out if held_out else self._trained
            long = held_out or tokens >= self.data.long_from
            lengths, related = self.store.lengths[numbers], self.store.related[numbers]
            stretches = Stretches(numbers, lengths, related, below=tokens if long else 1)
            key = (kind,) if held_out else (kind, self.seed)
            self._text_plans[kind, tokens] = stretches, TextPlan(stretches.lengths, tokens, long, *key)
        return self._text_plans[kind, tokens]

    def _conversation_plan(self, tokens: int) -> WholePlan:
        if tokens not in self._conversation_plans:
            lengths = self.store.lengths[self._conversations]
            plan = WholePlan(self._conversations, lengths, tokens, "conversations", self.seed)
            if plan.left_out:
                logger.warning(
                    "%d of %d conversations are longer than %d tokens and are left out at this length",
                    *(plan.left_out, len(lengths), tokens),
                )
            self._conversation_plans[tokens] = plan
        return self._conversation_plans[tokens]

    def _read(self, stretches: Stretches, piece: Piece) -> np.ndarray:
        """Ids of a piece; between joined documents a line end stands in the place of the end of text."""
        found = []
        for part, goes_on in stretches.parts(piece):
            ids = self.store.read(part.number, part.begin, part.end).ids
            if goes_on and part.end == self.store.lengths[part.number]:
                ids[-1] = self._newline
            found.append(ids)
        return np.concatenate(found)

    def _documents(self, ids: np.ndarray, source: random.Random) -> list[Document]:
        """A piece of text as it is, or as a task where the draw says so and the piece is long enough.

        A task is made from the begin of the piece; the room that it leaves is filled by the piece's end.
        """
        draw, chat = source.random(), source.random() < self.data.tasks_as_conversations
        for task, share in self.data.shares.items():
            if draw < share:
                made = self._tasks.write(task, ids, source, chat)
                if made is None:
                    break
                rest = ids[len(made.ids) :]
                return [made, _plain(rest)] if len(rest) else [made]
            draw -= share
        return [_plain(ids)]


def source(data: DataSettings, tokenizer: Any, seed: int) -> Source:
    """Read and tokenise what the settings name, and refuse what cannot be trained on.

    Parameters
    ----------
    data : DataSettings
    tokenizer : transformers tokenizer
        With an end of text, and with a chat template where there are conversations.
    seed : int
        Decides the order of the text, the tasks, and what is asked in them.

    Raises
    ------
    MissingFile
        A path does not exist, or a data set cannot be loaded.
    MissingPackage
        A data set is named, and the package `datasets` is absent.
    InvalidValue
        There is nothing to train on, a row is malformed (by file and line), or the tokenizer lacks what is needed.
    """
    stores.end_of_text(tokenizer)
    if data.conversations or data.tasks_as_conversations:
        check_chat_template(tokenizer)
    texts, conversations = files_of(data.paths), files_of(data.conversations)
    rows = load_dataset(data.dataset, data.dataset_split) if data.dataset else None
    if not texts and not conversations and rows is None:
        raise InvalidValue("there is nothing to train on: name files or folders of text in paths")
    temporary = None if data.cache else tempfile.TemporaryDirectory(prefix="qwen-longctx-")
    folder = Path(temporary.name if temporary else str(data.cache), _key(texts, conversations, rows, tokenizer))
    store = stores.open_store(folder)
    if store is None:
        check_writable(folder.parent / "index.npz")
        skipped: list[tuple[str, str]] = []
        entries = _entries(texts, conversations, rows, data.dataset, skipped)
        try:
            stores.write(entries, skipped, tokenizer, folder)
        except BaseException:
            with suppress(OSError):  # of a folder that holds something
                folder.rmdir()
            raise
        store = stores.open_store(folder)
        assert store is not None
    _tell(store.skipped)
    found = Source(data, tokenizer, seed, store, temporary)
    _check_contents(found.contents, data)
    return found


def _entries(
    texts: list[File], conversations: list[File], rows: Any, name: str | None, skipped: list[tuple[str, str]]
) -> Iterator[Text | Conversation]:
    """All documents, in an order that the names decide."""
    from transformers.utils.logging import tqdm

    for file in conversations:
        for entry in read_file(file, skipped):
            if isinstance(entry, Text):
                raise InvalidValue(f"{entry.name} is among the conversations and holds text: name it in paths")
            yield entry
    for file in tqdm(texts, desc="reading text", unit="file"):
        yield from read_file(file, skipped)
    if rows is not None:
        yield from tqdm(read_dataset(rows, str(name)), desc="reading the data set", unit="row", total=len(rows))


def _key(texts: list[File], conversations: list[File], rows: Any, tokenizer: Any) -> str:
    """What the tokens of a source depend on, as a short hash: files by name, size and time, and the tokenizer."""
    files = []
    for file in (*texts, *conversations):
        status = file.path.stat()
        files.append((str(file.path.resolve()), file.related, file.named, status.st_size, status.st_mtime_ns))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    known = (stores.FORMAT, files, len(texts), getattr(rows, "_fingerprint", None), vocabulary)
    template = (stores.end_of_text(tokenizer), tokenizer.chat_template)
    return hashlib.sha256(repr((known, template)).encode()).hexdigest()[:32]


def _held_out(store: Store, text: np.ndarray, share: float) -> np.ndarray:
    """Which documents of text are held out: whole groups of related ones where one is small enough, else single ones.

    Their order is that of hashes of their text. Documents that equal one of them are held out as well.
    """
    if not share or not len(text):
        return np.zeros(len(text), dtype=bool)
    hashes, lengths, related = store.hashes[text], store.lengths[text], store.related[text]
    groups = np.where(related >= 0, related, related.max() + 1 + np.arange(len(text)))
    most = share * int(lengths.sum())
    chosen = _chosen(groups, hashes, lengths, most)
    if not chosen.any():
        chosen = _chosen(np.arange(len(text)), hashes, lengths, most)
    if not chosen.any():
        chosen = hashes == hashes.min()
    return np.isin(hashes, hashes[chosen])


def _chosen(groups: np.ndarray, hashes: np.ndarray, lengths: np.ndarray, most: float) -> np.ndarray:
    """The documents of groups that have at most so many tokens together, each taken where it still fits."""
    names, inverse = np.unique(groups, return_inverse=True)
    tokens, hashed = np.zeros(len(names), dtype=np.int64), np.zeros(len(names), dtype=np.uint64)
    np.add.at(tokens, inverse, lengths)
    np.bitwise_xor.at(hashed, inverse, hashes)
    taken = np.zeros(len(names), dtype=bool)
    least = int(tokens.min())
    for number in np.argsort(hashed, kind="stable").tolist():
        if tokens[number] <= most:
            taken[number] = True
            most -= int(tokens[number])
        if most < least:
            break
    return taken[inverse]


def _tell(skipped: tuple[tuple[str, str], ...]) -> None:
    if skipped:
        listed = "; ".join(f"{name} {why}" for name, why in skipped[:_LISTED])
        more = f"; and {len(skipped) - _LISTED} more, see Source.contents" if len(skipped) > _LISTED else ""
        logger.warning("%d files are passed over: %s%s", len(skipped), listed, more)


def _check_contents(contents: Contents, data: DataSettings) -> None:
    """Refuse a source without anything to learn, or whose settings need what it lacks."""
    text = contents.documents + contents.held_out_documents
    if not text and not contents.conversations:
        raise InvalidValue(f"no file holds text: {len(contents.skipped)} were passed over. Name files of text in paths")
    if text and not contents.documents:
        raise InvalidValue(
            f"held_out {data.held_out} leaves none of {text} documents to train on: "
            "give more documents, or set held_out = 0"
        )
    if not text and any(data.shares.values()):
        raise InvalidValue("the tasks are made from text, and there is none: name files of text in paths")


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidType(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise InvalidValue(f"{name} must be at least {least}, got {value}")


def _plain(ids: np.ndarray) -> Document:
    return Document(ids, np.ones(len(ids), dtype=bool))
