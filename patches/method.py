"""A replaced method that remembers what it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from qwen_longctx.config import LongContextConfig


class PatchedMethod:
    """Stands in for `stock` on a class or an instance and keeps its signature.

    Calls ``function(patched, instance, *args, **kwargs)``, so that the replacement can reach the stock method and
    the overrides; neither lives on a module.

    Parameters
    ----------
    function : callable
        The replacement.
    stock : callable
        The function replaced, as transformers wrote it.
    overrides : dict
        Keyword overrides of `LongContextConfig`.
    """

    def __init__(self, function: Callable[..., Any], stock: Callable[..., Any], overrides: dict[str, Any]) -> None:
        functools.update_wrapper(self, stock)
        self.function = function
        self.stock = stock
        self.overrides = overrides

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, instance, *args, **kwargs)

    def settings(self, config: Any) -> LongContextConfig:
        """The settings for a model of this config, read now: users may change the config after loading."""
        return LongContextConfig.from_model_config(config, **self.overrides)


def patched_method(attribute: Any) -> PatchedMethod | None:
    """The `PatchedMethod` behind a class or instance attribute, if it is one."""
    function = getattr(attribute, "__func__", attribute)
    return function if isinstance(function, PatchedMethod) else None
