"""Texts and conversations in files, folders and data sets of Hugging Face, in an order that never changes."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qwen_longctx.errors import InvalidValue, MissingFile, MissingPackage

PART = 1 << 20  # characters of a text that are read, and tokenised, at a time
_ROW = "an object with a text field, or with a list of messages"


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes
    ----------
    name : str
        The file below the path that was given, and the line where a file holds several.
    related : str or None
        Documents of one value belong together: files below one folder of the first level under a path that was
        given, as those of a repository do, and those that lie in the path itself.
    parts : iterable of str
        The text in pieces that end at line ends, so that a file of any size needs little memory.
    """

    name: str
    related: str | None
    parts: Iterable[str]


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, the last one an answer; `name` says where they come from."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class File:
    """A file that was named (`named`) or found in a folder."""

    path: Path
    name: str
    related: str
    named: bool

    @property
    def kind(self) -> str:
        """``.jsonl``, ``.json`` or anything else, with ``.gz`` taken off."""
        return Path(self.path.name.removesuffix(".gz")).suffix.lower()

    def open(self) -> TextIO:
        """The file as text: UTF-8, with or without a byte order mark, unpacked where it ends in ``.gz``."""
        if self.path.suffix == ".gz":
            return gzip.open(self.path, "rt", encoding="utf-8-sig")  # type: ignore[return-value]
        return self.path.open(encoding="utf-8-sig")


def files_of(paths: Sequence[str]) -> list[File]:
    """The files of paths, folders with all below them, in the order of their names.

    Hidden ones in folders are left out, and links to files that are there anyway.

    Raises
    ------
    MissingFile
        A path does not exist.
    InvalidValue
        A folder holds no file, or a path is named twice.
    """
    found: list[File] = []
    for number, given in enumerate(paths):
        path = Path(given).expanduser()
        if not path.exists():
            raise MissingFile(f"{given} does not exist: name a file or folder of text")
        inside = _below(path) if path.is_dir() else [File(path, path.name, f"{number}", True)]
        if not inside:
            raise InvalidValue(f"the folder {given} holds no file: name one that holds text")
        found += [File(file.path, file.name, f"{number}/{file.related}", file.named) for file in inside]
    return _each_once(found)


def _each_once(files: list[File]) -> list[File]:
    """The files without links to any of them."""
    own: set[Path] = set()
    for file in files:
        if not file.path.is_symlink():
            real = file.path.resolve()
            if real in own:
                raise InvalidValue(f"{file.path} is among the paths twice, and would be trained on twice: name it once")
            own.add(real)
    kept = []
    for file in files:
        real = file.path.resolve()
        if not file.path.is_symlink() or real not in own:
            kept.append(file)
            own.add(real)
    return kept


def _below(folder: Path) -> list[File]:
    """Files of a folder and of those in it; folders that are links are not entered, which could go in circles."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(where, name)
            if name.startswith(".") or not path.exists():
                continue
            inner = path.relative_to(folder)
            found.append(File(path, inner.as_posix(), inner.parts[0] if len(inner.parts) > 1 else "", False))
    return sorted(found, key=lambda file: Path(file.name).parts)


def read_file(file: File, skipped: list[tuple[str, str]]) -> Iterator[Text | Conversation]:
    """The documents of a file: rows of ``.jsonl`` and ``.json``, else the whole.

    Parameters
    ----------
    file : File
    skipped : list
        Takes name and reason of a file in a folder that holds no text.

    Raises
    ------
    InvalidValue
        A file that was named holds no text; a row is none of text or conversation, by file and line.
    """
    why = _why_no_text(file)
    if why:
        if file.named:
            raise InvalidValue(f"{file.path} {why}: name a file of text")
        skipped.append((file.name, why))
    elif file.kind == ".jsonl":
        yield from _lines(file)
    elif file.kind == ".json":
        yield from _json(file)
    else:
        yield Text(file.name, file.related, _Parts(file))


def _why_no_text(file: File) -> str | None:
    """What keeps a file from being read as text, found by reading all of it once."""
    blank = True
    try:
        with file.open() as text:
            while part := text.read(PART):
                if "\0" in part:
                    return "is binary"
                blank = blank and not part.strip()
    except UnicodeDecodeError:
        return "is not text in UTF-8"
    except (OSError, EOFError, zlib.error) as error:  # permissions, damaged gzip
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return "is empty" if blank else None


class _Parts:
    """The text of a file from its begin, each time it is iterated over."""

    def __init__(self, file: File) -> None:
        self.file = file

    def __iter__(self) -> Iterator[str]:
        with self.file.open() as text:
            yield from _cut(iter(lambda: text.read(PART), ""))


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end at line ends.

    Qwen's tokenizers join line ends with the white space before them: a piece ends before a line that begins with none,
    and so has the tokens that it has in the whole.
    """
    kept = ""
    for piece in pieces:
        kept += piece
        cut = kept.rfind("\n", 0, -1) + 1
        while cut and kept[cut].isspace():
            cut = kept.rfind("\n", 0, cut - 1) + 1
        if not cut and len(kept) >= 4 * PART:
            cut = len(kept)  # a line without end: memory is bounded all the same
        if cut:
            yield kept[:cut]
            kept = kept[cut:]
    if kept:
        yield kept


def _lines(file: File) -> Iterator[Text | Conversation]:
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidValue(f"{file.path}, line {number}: not JSON ({error.msg}). Write {_ROW}") from error
            yield from of_row(row, f"{file.name}:{number}", f"{file.path}, line {number}")


def _json(file: File) -> Iterator[Text | Conversation]:
    """Rows of a file that holds a list of them or one; any other JSON is a text like others."""
    with file.open() as text:
        content = text.read()
    try:
        rows = json.loads(content)
    except json.JSONDecodeError:
        rows = None
    rows = rows if isinstance(rows, list) else [rows]
    if rows and isinstance(rows[0], dict) and ("text" in rows[0] or "messages" in rows[0]):
        for number, row in enumerate(rows, 1):
            yield from of_row(row, f"{file.name}:{number}", f"{file.path}, row {number}")
    else:
        yield Text(file.name, file.related, list(_cut(_slices(content))))


def of_row(row: Any, name: str, where: str) -> Iterator[Text | Conversation]:
    """The document of a row of data; a text of white space alone is none.

    Raises
    ------
    InvalidValue
        The row holds neither text nor messages, or the messages are no conversation; `where` is named.
    """
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise InvalidValue(f"{where}: a row must be {_ROW}, got {row!r:.60}")
    if "messages" in row:
        yield _conversation(row, name, where)
        return
    if not isinstance(row["text"], str):
        raise InvalidValue(f"{where}: text must be a string, got {row['text']!r:.60}")
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(f"{where}: text holds half a surrogate pair, which no tokenizer takes: {error}") from error
    if row["text"].strip():
        yield Text(name, None, list(_cut(_slices(row["text"]))))


def _slices(text: str) -> Iterator[str]:
    return (text[begin : begin + PART] for begin in range(0, len(text), PART))


def _conversation(row: dict[str, Any], name: str, where: str) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise InvalidValue(f"{where}: messages must be a list of objects with role and content, got {messages!r:.60}")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise InvalidValue(f"{where}: no message has the role assistant, so that there is nothing to learn. Remove it")
    if all(message["role"] == "system" for message in messages[: answers[0]]):
        raise InvalidValue(f"{where}: the conversation begins with an answer. Put a message of the role user first")
    # data sets give every message the keys of all, None where it has none of its own
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return Conversation(name, kept[: answers[-1] + 1], row.get("tools"))


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))


def load_dataset(name: str, split: str) -> Any:
    """A data set of Hugging Face, by name, or from a folder, with a column ``text`` or ``messages``.

    Raises
    ------
    MissingPackage
        The package `datasets` is not installed.
    MissingFile
        There is none of that name, or it cannot be had without a network.
    InvalidValue
        It has none of these columns, or no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage(f"the data set {name} is read by the package datasets: pip install datasets") from error
    try:
        saved = Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file()
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:  # of many kinds: of the hub, of the network, of the files
        raise MissingFile(f"the data set {name} cannot be loaded: {error}") from error
    if isinstance(found, dict):  # as save_to_disk wrote it
        if split not in found:
            raise InvalidValue(f"the data set {name} has no split {split!r}: name one of {', '.join(found)}")
        found = found[split]
    if ("text" in found.column_names) == ("messages" in found.column_names):
        raise InvalidValue(
            f"the data set {name} has the columns {', '.join(found.column_names)}: one of text and messages is needed"
        )
    return found


def read_dataset(rows: Any, name: str) -> Iterator[Text | Conversation]:
    """The documents of what `load_dataset` gave."""
    for number, row in enumerate(rows):
        yield from of_row(row, f"{name}:{number}", f"data set {name}, row {number}")
