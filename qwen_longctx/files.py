"""Files that are written: checked before work starts, and replaced as a whole."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_longctx.errors import InvalidValue

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_YOUNG = 60  # seconds
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ANOTHER = "Name a file in a folder that can be written to"


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
            with _locked(fresh):
                yield fresh
            with fresh.open("rb") as written:
                os.fsync(written.fileno())
            fresh.replace(target)
            _sync_folder(target.parent)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def remove_leftovers(folder: Path, suffix: str) -> None:
    """Remove files of `suffix` that a killed process left in a folder by `replacing`, and that nobody writes now."""
    for path in folder.iterdir():
        if not is_leftover(path.name, suffix):
            continue
        with suppress(OSError):
            # it is locked just after it is made, and by no system that knows no locks
            if fcntl is not None and time.time() - path.stat().st_mtime > _YOUNG:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def is_leftover(name: str, suffix: str) -> bool:
    """Whether a file of this name was made by `replacing`, in place of one of `suffix`."""
    return re.fullmatch(rf"\.[0-9a-f]{{32}}{re.escape(suffix)}", name) is not None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let `remove_leftovers` of other processes know that a file is being written; not where that is impossible."""
    with path.open("rb") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _sync_folder(folder: Path) -> None:
    """Let a new name in a folder outlast a failure of power, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


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
        full = error.errno in _NO_ROOM
        remedy = "Free space there, or name another place" if full else _ANOTHER
        raise InvalidValue(f"cannot write to {path}: {error.strerror or error}. {remedy}") from error
