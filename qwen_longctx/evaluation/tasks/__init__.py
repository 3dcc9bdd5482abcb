"""The tasks of ``qwen-longctx eval``, a file or a family of files each; see `evaluation.task` for what a task is.

To add one, write a file with ``TASKS`` and name it in `FILES`, or give ``--tasks`` the path of the file. Samples of a
published benchmark are read from a file of the user's: `tasks.published`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.evaluation.packages import run_file
from qwen_longctx.evaluation.task import Task

FILES: tuple[str, ...] = ("ruler", "aa_lcr", "graphwalks", "infinitebench", "needles", "texts")


def find(names: Sequence[str], judge: Callable[[str], str] | None = None) -> list[Task]:
    """Tasks by name; the name of a file stands for all of its tasks.

    Parameters
    ----------
    names : sequence of str
        A name, the path of a Python file that defines ``TASKS``, or ``NAME=FILE`` for the samples of a benchmark that
        lie in a file (`tasks.published`).
    judge : callable, optional
        What a model says about a prompt (`evaluation.judge`), for tasks that are scored by one.

    Raises
    ------
    InvalidValue
        There is no such task, a file of the user's defines none or holds no samples, or a judge is missing.
    MissingFile
        There is no such file.
    MissingPackage
        The prompts of a published task are in a package that is not installed.
    """
    from qwen_longctx.evaluation.tasks import published

    known = {name: import_module(f"{__name__}.{name}").TASKS for name in FILES}
    single = {task.name: (task,) for tasks in known.values() for task in tasks}
    found: dict[str, Task] = {}
    for name in names:
        form, equals, path = name.partition("=")
        if equals:
            tasks: tuple[Task, ...] | None = (published.task(form, path, judge),)
        else:
            tasks = _of_file(name) if name.endswith(".py") else known.get(name) or single.get(name)
        if not tasks:
            raise InvalidValue(f"there is no task {name!r}: name some of {', '.join([*known, *single])}")
        found.update({task.name: task for task in tasks})
    return list(found.values())


def _of_file(path: str) -> tuple[Task, ...]:
    if not Path(path).is_file():
        raise MissingFile(f"there is no file {path}: name a task, or a Python file that defines TASKS")
    tasks = getattr(run_file(Path(path), Path(path).stem), "TASKS", ())
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise InvalidValue(f"{path} defines no tasks: give it TASKS, a tuple of qwen_longctx.evaluation.task.Task")
    return tuple(tasks)
