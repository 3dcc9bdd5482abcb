"""A replaced method that remembers what it stands for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version

from qwen_longctx.config import LongContextConfig

OLD_NAME = "past_key_values"  # of the cache, before transformers 5.24
_RENAMED = Version(transformers.__version__) >= Version("5.24")


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

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Parameters of the stock method that may be given by position, without ``self``."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in inspect.signature(self.stock).parameters.values() if p.kind in kinds)[1:]

    @functools.cached_property
    def cache_name(self) -> str:
        """What the stock method calls the cache: "cache" from transformers 5.24 on."""
        return "cache" if "cache" in self.names or self.stock.__name__ == "generate" and _RENAMED else OLD_NAME

    def as_function(self) -> Callable[..., Any]:
        """A plain function with the stock signature, to stand on a class or to be bound to an instance."""
        patched = self

        @functools.wraps(self.stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return patched.function(patched, self, **patched.by_name(args, kwargs))

        method.qwen_longctx = self  # type: ignore[attr-defined]
        return method

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; the cache is `past_key_values`, whatever this transformers calls it."""
        if len(args) > len(self.names):
            raise TypeError(f"{self.stock.__qualname__} takes {len(self.names)} positional arguments, got {len(args)}")
        for name, value in zip(self.names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"{self.stock.__qualname__} got two values for {name!r}")
            kwargs[name] = value
        if "cache" in kwargs and self.cache_name == "cache":
            old, new = kwargs.get(OLD_NAME), kwargs.pop("cache")
            kwargs[OLD_NAME] = old if new is None else new
        return kwargs

    def call(self, instance: Any, **kwargs: Any) -> Any:
        """The stock method, with the cache under the name that this transformers knows."""
        if self.cache_name != OLD_NAME and OLD_NAME in kwargs:
            kwargs[self.cache_name] = kwargs.pop(OLD_NAME)
        return self.stock(instance, **kwargs)

    def settings(self, config: Any) -> LongContextConfig:
        """The settings for a model of this config, read now: users may change the config after loading."""
        return LongContextConfig.from_model_config(config, **self.overrides)


def cache_of(outputs: Any) -> Any:
    """The cache in the outputs of a model."""
    return outputs.cache if "cache" in type(outputs).__dataclass_fields__ else outputs.past_key_values


def set_cache(outputs: Any, cache: Any) -> None:
    """Put a cache, or None, into the outputs of a model."""
    setattr(outputs, "cache" if "cache" in type(outputs).__dataclass_fields__ else OLD_NAME, cache)


def patched_method(attribute: Any) -> PatchedMethod | None:
    """The `PatchedMethod` behind a class or instance attribute, if it is one."""
    function = getattr(attribute, "__func__", attribute)
    return vars(function).get("qwen_longctx") if callable(function) and hasattr(function, "__dict__") else None
