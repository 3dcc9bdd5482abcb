"""A replaced method that remembers what it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_longctx.config import LongContextConfig


@dataclass(frozen=True, eq=False)
class PatchedMethod:
    """What a replacement knows; neither lives on a module.

    Parameters
    ----------
    function : callable
        The replacement, called as ``function(patched, instance, *args, **kwargs)``.
    stock : callable
        The function replaced, as transformers wrote it.
    overrides : dict
        Keyword overrides of `LongContextConfig`.
    """

    function: Callable[..., Any]
    stock: Callable[..., Any]
    overrides: dict[str, Any]

    def as_function(self) -> Callable[..., Any]:
        """A plain function with the stock signature, to stand on a class or to be bound to an instance."""
        patched = self

        @functools.wraps(self.stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return patched.function(patched, self, *args, **kwargs)

        method.qwen_longctx = self  # type: ignore[attr-defined]
        return method

    def settings(self, config: Any) -> LongContextConfig:
        """The settings for a model of this config, read now: users may change the config after loading."""
        return LongContextConfig.from_model_config(config, **self.overrides)


def patched_method(attribute: Any) -> PatchedMethod | None:
    """The `PatchedMethod` behind a class or instance attribute, if it is one."""
    function = getattr(attribute, "__func__", attribute)
    return vars(function).get("qwen_longctx") if callable(function) and hasattr(function, "__dict__") else None
