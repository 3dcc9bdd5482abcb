"""A replaced method: what stands in for it, what it stood for, and where it no longer holds.

What is ours is known by identity: by the function objects in `_OURS`, and by the type `BoundMethod`. Wrappers of other
libraries copy names and attributes of what they wrap, so neither tells anything.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from packaging.version import Version
from torch import nn

from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidType
from qwen_longctx.patches import runs

OLD_NAME = "past_key_values"  # of the cache, before transformers 5.24
_RENAMED = Version(transformers.__version__) >= Version("5.24")
_HOOKED = "_old_forward"  # where accelerate's hooks keep the forward that they wrap


@dataclass(eq=False)
class Patch:
    """One call of `patch_qwen`.

    Wrappers of other libraries may keep a replaced method beyond our reach. Each asks its patch whether it still holds,
    and runs the stock method where it does not.

    Attributes
    ----------
    overrides : dict
        Keyword overrides of `LongContextConfig`.
    of_classes : bool
        Whether classes were patched, or the modules of one model.
    over : bool
        It was undone everywhere.
    left : WeakSet of Module
        Modules for which it was undone.
    earlier : list of frames
        Stock runs that were in progress when it was made.
    simple : bool
        Nothing of the above is to be heeded: every call asks, and decoding counts microseconds.
    """

    overrides: dict[str, Any]
    of_classes: bool
    over: bool = False
    left: WeakSet[nn.Module] = field(default_factory=WeakSet)
    earlier: list[FrameType] = field(default_factory=list)
    simple: bool = True

    def end(self) -> None:
        """Put the patch out of force everywhere."""
        self.over, self.simple = True, False

    def leave(self, modules: Iterable[nn.Module]) -> None:
        """Put the patch out of force for some modules."""
        self.left.update(modules)
        self.simple = False

    def spare(self, frames: list[FrameType]) -> None:
        """Let stock runs that are in progress, with these frames, end as they began."""
        self.earlier = frames
        self.simple = self.simple and not frames

    def holds(self, module: nn.Module) -> bool:
        """Whether methods of `module` are replaced."""
        return not self.over and module not in self.left

    def came_later(self) -> bool:
        """Whether the patch was made while a stock run was in progress that the caller is a part of."""
        self.earlier = runs.still_running(self.earlier)
        return runs.is_within(self.earlier)

    def __reduce__(self) -> Any:
        return Patch, (self.overrides, self.of_classes, self.over)


@dataclass(frozen=True, eq=False)
class PatchedMethod:
    """What a replacement knows; nothing of it lives on a module.

    Parameters
    ----------
    function : callable
        The replacement, called as ``function(patched, instance, **arguments)``.
    name : str
        Of the method.
    stock : callable
        The function that is replaced.
    patch : Patch
    is_run : bool
        A call is a run of the whole model, for which changes of the patch wait.
    """

    function: Callable[..., Any]
    name: str
    stock: Callable[..., Any]
    patch: Patch
    is_run: bool = False

    @property
    def overrides(self) -> dict[str, Any]:
        """Keyword overrides of `LongContextConfig`."""
        return self.patch.overrides

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Parameters of the stock method that may be given by position, without ``self``."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in inspect.signature(self.stock).parameters.values() if p.kind in kinds)[1:]

    @functools.cached_property
    def cache_name(self) -> str:
        """What the stock method calls the cache: "cache" from transformers 5.24 on."""
        return "cache" if "cache" in self.names or self.name == "generate" and _RENAMED else OLD_NAME

    def as_function(self) -> Callable[..., Any]:
        """A plain function with the signature of the stock method, to stand on a class or to be bound to a module."""
        patched, patch = self, self.patch
        kinds = {p.kind for p in inspect.signature(self.function).parameters.values()}
        named = inspect.Parameter.VAR_KEYWORD in kinds  # norms and MLPs take what they are given as it is

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            valid = patched if patch.simple else patched.valid(self)
            if valid is None:
                return patched.stock(self, *args, **kwargs)
            if named:
                kwargs, args = valid.by_name(args, kwargs), ()
            return valid.function(valid, self, *args, **kwargs)

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            with runs.running(self):
                return method(self, *args, **kwargs)

        function = run if self.is_run else method
        functools.update_wrapper(function, self.stock)
        function.__signature__ = inspect.signature(self.stock)  # type: ignore[attr-defined]
        del function.__wrapped__  # type: ignore[attr-defined]  # who unwraps a method, as accelerate does, stops here
        _OURS[function] = self
        return function

    def valid(self, module: nn.Module) -> PatchedMethod | None:
        """What runs when this is called on `module`: this, what has replaced it since, or the stock method (None)."""
        now: PatchedMethod | None = self
        if not self.patch.holds(module):  # the caller got this before it was replaced, or holds it in a wrapper
            now = patched_method(vars(module).get(slot_of(module, self.name), getattr(type(module), self.name)))
        if now is None or not now.patch.holds(module):
            return None
        return None if now.patch.earlier and now.patch.came_later() else now

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; the cache is `past_key_values`, whatever this transformers calls it."""
        if args:
            self._add_by_name(args, kwargs)
        if "cache" in kwargs and self.cache_name == "cache":
            old, new = kwargs.get(OLD_NAME), kwargs.pop("cache")
            kwargs[OLD_NAME] = old if new is None else new
        return kwargs

    def _add_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        label = getattr(self.stock, "__qualname__", self.name)
        if len(args) > len(self.names):
            raise InvalidType(f"{label} takes {len(self.names)} positional arguments, got {len(args)}")
        for name, value in zip(self.names, args, strict=False):
            if name in kwargs:
                raise InvalidType(f"{label} got two values for {name!r}: give it once")
            kwargs[name] = value

    def call(self, instance: Any, **kwargs: Any) -> Any:
        """The stock method, with the cache under the name that this transformers knows."""
        if self.cache_name != OLD_NAME and OLD_NAME in kwargs:
            kwargs[self.cache_name] = kwargs.pop(OLD_NAME)
        return self.stock(instance, **kwargs)

    def settings(self, config: Any) -> LongContextConfig:
        """The settings for a model of this config, read now: users may change the config after loading."""
        return LongContextConfig.from_model_config(config, **self.overrides)


_OURS: WeakKeyDictionary[Callable[..., Any], PatchedMethod] = WeakKeyDictionary()


class BoundMethod:
    """A replaced method of one module, which remembers what the module held in its place.

    It is deep copied and pickled together with its module, so that a copy is patched too and can be undone.

    Attributes
    ----------
    function : callable
        Made by `PatchedMethod.as_function`.
    module : Module
    before : object
        What stood in the module's slot; `MISSING` if nothing did.
    """

    __slots__ = ("__weakref__", "before", "function", "module")

    def __init__(self, function: Callable[..., Any], module: nn.Module, before: Any) -> None:
        self.function, self.module, self.before = function, module, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The name and other attributes of the function, as a bound method has them."""
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__annotations__"):
            raise AttributeError(name)
        return getattr(self.function, name)

    @property
    def __func__(self) -> Callable[..., Any]:
        return self.function

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundMethod:
        twin = object.__new__(BoundMethod)
        memo[id(self)] = twin
        BoundMethod.__init__(twin, self.function, copy.deepcopy(self.module, memo), copy.deepcopy(self.before, memo))
        return twin

    def __reduce__(self) -> Any:
        patched = _OURS[self.function]
        if patched.patch.of_classes:  # belongs to the process; this is what a bound method of the class becomes
            return getattr, (self.module, patched.name)
        state = patched.function, patched.name, patched.patch, patched.is_run, self.module, self.before
        return copyreg.__newobj__, (BoundMethod,), state  # type: ignore[attr-defined]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        function, name, patch, is_run, self.module, self.before = state
        stock = stock_function(getattr(type(self.module), name))
        self.function = PatchedMethod(function, name, stock, patch, is_run).as_function()


class _Missing:
    """Stands for an attribute that was not there; there is one such object, in copies and pickles too."""

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def slot_of(module: nn.Module, method: str) -> str:
    """Where a module keeps the method that runs in the end, beneath a hook of accelerate."""
    return _HOOKED if method == "forward" and _HOOKED in vars(module) else method


def patched_method(attribute: Any) -> PatchedMethod | None:
    """The `PatchedMethod` behind an attribute of a class or a module, if it is one of ours."""
    function = attribute.__func__ if isinstance(attribute, (BoundMethod, MethodType)) else attribute
    return _OURS.get(function) if isinstance(function, FunctionType) else None


def stock_function(attribute: Any) -> Callable[..., Any]:
    """The function that stood there before any patch of ours."""
    patched = patched_method(attribute)
    return patched.stock if patched is not None else getattr(attribute, "__func__", attribute)


def cache_of(outputs: Any) -> Any:
    """The cache in the outputs of a model."""
    return outputs.cache if "cache" in type(outputs).__dataclass_fields__ else outputs.past_key_values
