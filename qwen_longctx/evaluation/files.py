"""Files that a command writes: checked before its work starts, and replaced as a whole."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_longctx.errors import InvalidValue


def check_writable(path: str | Path) -> None:
    """Find out whether `replacing` will be able to write a file, and make its folder; an earlier file stays.

    Raises
    ------
    InvalidValue
        The path names a folder or a device, its folder cannot be made, or nothing can be written there.
    """
    with _told(path):
        _fresh(_target(path)).unlink()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes the place of `path` at the end of the block at once.

    Whoever reads `path` finds the earlier file or the whole new one, also when the block fails or is killed.

    Raises
    ------
    InvalidValue
        The file cannot be written; the message says why.
    """
    with _told(path):
        target = _target(path)
        fresh = _fresh(target)
        try:
            yield fresh
            with fresh.open("rb") as written:
                os.fsync(written.fileno())
            fresh.replace(target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def _target(path: str | Path) -> Path:
    """Where the file lies, behind links; its folder is made."""
    if not str(path):
        raise InvalidValue("the name of the output file is empty: name a file")
    try:
        target = Path(path).resolve()
    except (RuntimeError, ValueError) as error:  # of links in a circle, of a character that no path may hold
        raise InvalidValue(f"cannot write to {path!r}: {error}. Name another file") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise InvalidValue(f"cannot write to {path}: it is a folder. Name a file in it")
    if not stat.S_ISREG(mode):
        raise InvalidValue(f"cannot write to {path}: it is no regular file. Name one")
    return target


def _fresh(target: Path) -> Path:
    """An empty file beside `target`, of the same suffix."""
    fresh = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return fresh


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Turn what the system says about a path into an error of ours."""
    try:
        yield
    except OSError as error:
        raise InvalidValue(
            f"cannot write to {path}: {error.strerror or error}. Name a file in a folder that can be written to"
        ) from error
