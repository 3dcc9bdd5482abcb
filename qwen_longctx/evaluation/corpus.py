"""Long real text that every installation has: the source code of an installed package."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.packages import python_files

PACKAGE = "transformers"


def source_code(tokenizer: Any, length: int, package: str = PACKAGE) -> torch.Tensor:
    """The first tokens of a package's Python files, joined in the order of their paths.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    length : int
        Tokens wanted, exactly.
    package : str
        An installed package.

    Returns
    -------
    torch.Tensor
        Shape (1, `length`), int64.

    Raises
    ------
    InvalidValue
        The package is not installed, or its source is shorter; `length` is below 1.
    """
    if length < 1:
        raise InvalidValue(f"a text must have at least 1 token, got {length}")
    folder = _folder(package)
    tokens: list[int] = []
    for name, source in python_files(folder):
        tokens += tokenizer(f"# {name}\n{source}\n", add_special_tokens=False).input_ids
        if len(tokens) >= length:
            return torch.tensor([tokens[:length]])
    raise InvalidValue(
        f"the source of {package!r} has {len(tokens)} tokens, {length} are wanted: name a larger package"
    )


def _folder(package: str) -> Path:
    """Where an installed package lies; nothing of it is imported."""
    spec = find_spec(package) if package.isidentifier() and package != "__main__" else None
    if spec is None or not spec.submodule_search_locations:
        raise InvalidValue(f"package {package!r} is not installed: name one that is, without dots")
    return Path(next(iter(spec.submodule_search_locations)))


def fingerprint(ids: torch.Tensor) -> str:
    """Short hash of token ids: two results of one hash ran on the same text."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
