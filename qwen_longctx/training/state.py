"""What a run leaves in its folder while it is under way: what it is, what it has done, and where it stands.

``run.json`` says which run the folder holds. ``log.jsonl`` has a row a step. ``state.pt`` is everything that the next
step depends on, in one file that is replaced as a whole: a run that is killed goes on from there.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.files import check_writable, is_leftover, remove_leftovers, replacing

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

RUN, LOG, STATE = "run.json", "log.jsonl", "state.pt"
RESULT = "result"
_OWN = (RUN, LOG, STATE, RESULT, "recipe.toml", "loss_by_position.json", "loss_by_position.png")
_VERSION = 1


class Folder:
    """The folder of one run.

    Parameters
    ----------
    path : str or Path
        Of the folder; it is made if it is missing.
    about : mapping
        What tells this run from others, of JSON's types.
    writes : bool
        Whether this process is the one that writes: it locks the folder for as long as this object lives.

    Raises
    ------
    InvalidValue
        The folder cannot be written to, holds files of others, or another run, or another process works in it; nothing
        in it is changed.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any], writes: bool = True) -> None:
        if not str(path):
            raise InvalidValue("the output folder has no name: name one")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InvalidValue(f"{path} is a file: name a folder for the output")
        check_writable(self.path / RUN)
        present = json.loads(json.dumps({"version": _VERSION, **about}))
        if not (self.path / RUN).exists():
            self._refuse_files_of_others()
            self._write_json(RUN, present)
            self._lock(writes)
            return
        saved = self._read_json(RUN)
        wrong = list(_differences(saved, present))
        if wrong:
            raise InvalidValue(
                f"{path} holds another run: {'; '.join(wrong[:5])}. Name another folder, or go on with the same "
                "recipe, model and data"
            )
        self._lock(writes)
        if writes:
            self._remove_leftovers()

    def _lock(self, writes: bool) -> None:
        if not writes or fcntl is None:
            return
        self._locked = (self.path / RUN).open("rb")
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InvalidValue(
                    f"another process works in {self.path}: wait for its end, or name another folder"
                ) from error

    def _remove_leftovers(self) -> None:
        """Remove what killed processes were writing."""
        for suffix in {Path(name).suffix for name in _OWN}:
            remove_leftovers(self.path, suffix)
        for one in self.path.iterdir():
            if one.is_dir() and is_leftover(one.name, ""):  # a result
                shutil.rmtree(one, ignore_errors=True)

    def _refuse_files_of_others(self) -> None:
        known = {Path(name).suffix for name in _OWN}
        others = [
            one.name
            for one in sorted(self.path.iterdir())
            if not any(is_leftover(one.name, suffix) for suffix in known)
        ]
        if others:
            raise InvalidValue(
                f"{self.path} holds files of something else ({', '.join(others[:3])}): name a new or an empty folder"
            )

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MissingFile(f"cannot read {self.path / name}: {error}. Name another folder for the output") from error

    def _write_json(self, name: str, content: Any) -> None:
        with replacing(self.path / name) as fresh:
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / RESULT).is_dir()

    # --- the state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state by a later one, at once."""
        with replacing(self.path / STATE) as fresh:
            torch.save(dict(state), fresh)

    def load(self) -> dict[str, Any] | None:
        """The state last saved; None before the first.

        Raises
        ------
        MissingFile
            It cannot be read.
        """
        path = self.path / STATE
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise MissingFile(
                f"cannot read the state of the run, {path}: {str(error).splitlines()[0]}. Name another folder, and "
                "begin anew"
            ) from error

    def drop_state(self) -> None:
        """Remove the state of a run that has come to its end, and what was left on the way."""
        (self.path / STATE).unlink(missing_ok=True)
        self._remove_leftovers()

    # --- the log

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the log; a last one that was cut off is left out."""
        try:
            lines = (self.path / LOG).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def cut_log(self, step: int) -> None:
        """Leave out the rows of steps from `step` on, which are to be done again."""
        rows = [row for row in self.rows() if row.get("step", -1) < step]
        with replacing(self.path / LOG) as fresh:
            fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _differences(saved: Any, present: Any, name: str = "") -> Any:
    """Where two values of JSON's types differ, a sentence's part each."""
    if isinstance(saved, dict) and isinstance(present, dict):
        for key in {**saved, **present}:
            yield from _differences(saved.get(key), present.get(key), f"{name}.{key}" if name else key)
    elif saved != present:
        yield f"{name or 'it'} was {saved!r:.60} and is {present!r:.60}"
