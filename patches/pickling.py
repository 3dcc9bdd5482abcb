"""Pickling of models whose classes are patched: the patch of classes belongs to the process, and is missed in another.

A model that was patched by itself, ``patch_qwen(model)``, carries its patch along, see `method.BoundMethod`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from qwen_longctx.patches.method import BoundMethod, PatchedMethod, patched_method

logger = logging.getLogger(__name__)


def model_reduce(patched: PatchedMethod, self: Any, **arguments: Any) -> Any:
    """What pickles the base model of a patched class: the stock way, and a check where it is loaded."""
    reduced = patched.stock(self, arguments["protocol"])
    if isinstance(vars(self).get("forward"), BoundMethod):
        return reduced
    make, parts, *rest = reduced
    return _loaded, (dict(patched.overrides), make, *parts), *rest


def _loaded(overrides: dict[str, Any], make: Callable[..., Any], *parts: Any) -> Any:
    model = make(*parts)
    if patched_method(type(model).forward) is None:
        settings = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        logger.warning(
            "a %s was pickled in a process that had called patch_qwen(%s) and is loaded in one that has not: it is not "
            "patched here. Call patch_qwen(%s) in this process too",
            type(model).__name__,
            settings,
            settings,
        )
    return model
