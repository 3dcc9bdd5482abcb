"""Documents as tokens in one file on disk, tokenised once and mapped into memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_longctx.errors import InvalidValue
from qwen_longctx.files import replacing
from qwen_longctx.training.conversations import check_chat_template, encode_conversation
from qwen_longctx.training.documents import Conversation, Text
from qwen_longctx.training.packing import Document

FORMAT = 1
_COUNTS = np.uint32(1 << 31)  # set in tokens that the loss counts on; vocabularies are far smaller
_BATCH = 1 << 22  # characters that are tokenised in one call
_TOKENS, _INDEX = "tokens.bin", "index.npz"


@dataclass(frozen=True)
class Store:
    """Documents by number, read from disk as they are asked for.

    Attributes
    ----------
    tokens : numpy.ndarray
        Shape (tokens,), uint32, mapped: ids, with the highest bit where the loss counts.
    offsets : numpy.ndarray
        Shape (documents + 1,), int64: where each document begins.
    related : numpy.ndarray
        Shape (documents,), int64: documents of one number belong together; -1 for those that belong to none.
    hashes : numpy.ndarray
        Shape (documents,), uint64, of a document's text.
    conversations : numpy.ndarray
        Shape (documents,), bool: rendered from a conversation. Others are text and close with the end of text.
    skipped : tuple of (str, str)
        Files that hold no text, and why.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    related: np.ndarray
    hashes: np.ndarray
    conversations: np.ndarray
    skipped: tuple[tuple[str, str], ...]

    @property
    def lengths(self) -> np.ndarray:
        """Shape (documents,), int64: tokens of each document."""
        return np.diff(self.offsets)

    def read(self, number: int, begin: int = 0, end: int | None = None) -> Document:
        """The tokens from `begin` to `end` of a document, all of it by default."""
        first, last = int(self.offsets[number]), int(self.offsets[number + 1])
        raw = np.array(self.tokens[first + begin : last if end is None else first + end])
        return Document((raw & ~_COUNTS).astype(np.int64), raw >= _COUNTS)


def end_of_text(tokenizer: Any) -> int:
    """The token that closes a document of text: Qwen's, also where a chat model ends its turns by another.

    Raises
    ------
    InvalidValue
        The tokenizer has none.
    """
    own = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if own is None:
        raise InvalidValue("the tokenizer has no end of text: set tokenizer.eos_token")
    return own


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts in which names of special tokens are text like any other."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def write(entries: Iterable[Text | Conversation], skipped: list[tuple[str, str]], tokenizer: Any, folder: Path) -> None:
    """Tokenise documents into a folder, which `open_store` reads.

    Parameters
    ----------
    entries : iterable of Text and Conversation
    skipped : list of (str, str)
        Filled while `entries` are read.
    tokenizer : transformers tokenizer
    folder : Path
        Written at once: whoever looks finds all or nothing. Two processes may write the same.
    """
    with replacing(folder / _TOKENS) as path, path.open("wb") as file:
        writer = _Writer(file, tokenizer)
        for entry in entries:
            writer.add(entry)
        writer.flush()
    with replacing(folder / _INDEX) as path, path.open("wb") as file:
        np.savez(
            file,
            offsets=np.append(0, np.cumsum(np.array(writer.lengths, dtype=np.int64))),
            related=np.array(writer.related, dtype=np.int64),
            hashes=np.array(writer.hashes, dtype=np.uint64),
            conversations=np.array(writer.conversations, dtype=bool),
            skipped=np.array(json.dumps(skipped)),
        )


def open_store(folder: Path) -> Store | None:
    """What `write` left in a folder; None where it has not, or was ended before it was through."""
    if not (folder / _INDEX).is_file():
        return None
    with np.load(folder / _INDEX) as index:
        arrays = {name: index[name] for name in ("offsets", "related", "hashes", "conversations")}
        skipped = tuple((name, why) for name, why in json.loads(str(index["skipped"])))
    count = int(arrays["offsets"][-1])
    file = folder / _TOKENS
    if not file.is_file() or file.stat().st_size != 4 * count:
        return None
    tokens = np.memmap(file, dtype=np.uint32, mode="r") if count else np.zeros(0, dtype=np.uint32)
    return Store(tokens, skipped=skipped, **arrays)


class _Writer:
    """Writes tokens of documents in their order, and notes what the index holds."""

    def __init__(self, file: BinaryIO, tokenizer: Any) -> None:
        self.file, self.tokenizer = file, tokenizer
        self.end = end_of_text(tokenizer)
        self.lengths, self.related, self.hashes = array("q"), array("q"), array("Q")
        self.conversations = array("b")
        self._groups: dict[str, int] = {}
        self._waiting: list[tuple[int, str]] = []  # numbers of documents, and parts of them
        self._characters = 0

    def add(self, entry: Text | Conversation) -> None:
        if isinstance(entry, Conversation):
            self._add_conversation(entry)
        else:
            self._add_text(entry)

    def flush(self) -> None:
        """Tokenise and write the parts of texts that wait; a document that is complete has its end of text."""
        if not self._waiting:
            return
        rows = plain_ids(self.tokenizer, [part for _, part in self._waiting])
        for (number, part), row in zip(self._waiting, rows, strict=True):
            ids = row if part else [self.end]  # an empty part closes a document
            self._write(np.array(ids, dtype=np.uint32) | _COUNTS)
            self.lengths[number] += len(ids)
        self._waiting, self._characters = [], 0

    def _add_text(self, text: Text) -> None:
        group = -1 if text.related is None else self._groups.setdefault(text.related, len(self._groups))
        hashed = hashlib.blake2b(digest_size=8)
        number = self._begin(group, False)
        for part in chain(text.parts, [""]):
            hashed.update(part.encode())
            self._waiting.append((number, part))
            self._characters += len(part)
            if self._characters >= _BATCH:
                self.flush()
        self.hashes[number] = int.from_bytes(hashed.digest(), "little")

    def _add_conversation(self, conversation: Conversation) -> None:
        self.flush()
        check_chat_template(self.tokenizer)
        for document in encode_conversation(
            self.tokenizer, conversation.messages, conversation.name, conversation.tools
        ):
            number = self._begin(-1, True)
            self._write(document.ids.astype(np.uint32) | np.where(document.counts, _COUNTS, np.uint32(0)))
            self.lengths[number] = len(document.ids)

    def _begin(self, group: int, conversation: bool) -> int:
        self.lengths.append(0)
        self.related.append(group)
        self.hashes.append(0)
        self.conversations.append(conversation)
        return len(self.lengths) - 1

    def _write(self, raw: np.ndarray) -> None:
        self.file.write(raw.tobytes())
