"""A replaced method: what stands in for it, what it stood for, and where it no longer holds.

What is ours is known by identity: by the function objects in `_OURS`, and by the type `BoundMethod`. Wrappers of other
libraries copy names and attributes of what they wrap, so neither tells anything.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
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
    simple : bool
        Nothing of the above is to be heeded: every call asks, and decoding counts microseconds.
    """

    overrides: dict[str, Any]
    of_classes: bool
    over: bool = False
    left: WeakSet[nn.Module] = field(default_factory=WeakSet)
    simple: bool = True

    def end(self) -> None:
        """Put the patch out of force everywhere."""
        self.over, self.simple = True, False

    def leave(self, modules: Iterable[nn.Module]) -> None:
        """Put the patch out of force for some modules."""
        self.left.update(modules)
        self.simple = False

    def holds(self, module: nn.Module) -> bool:
        """Whether methods of `module` are replaced."""
        return not self.over and module not in self.left

    def __reduce__(self) -> Any:
        return Patch, (self.overrides, self.of_classes)  # a copy elsewhere has not been undone


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
        # norms, MLPs and layers take what they are given as it is: checkpointing needs arguments by position to stay so
        named = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds

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
            now = patched_method(vars(module).get(slot_of(module, self.name), of_class(type(module), self.name)))
        return None if now is None or not now.patch.holds(module) else now

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


class BoundMethod(functools.partial):  # which calls without a frame of Python: decoding counts microseconds
    """A replaced method of one module, which remembers what the module held in its place.

    It is deep copied and pickled together with its module, so that a copy is patched too and can be undone.

    Parameters
    ----------
    function : callable
        Made by `PatchedMethod.as_function`.
    module : Module
    before : object
        What stood in the module's slot; `MISSING` if nothing did.
    """

    __slots__ = ("before",)

    def __new__(cls, function: Callable[..., Any], module: nn.Module, before: Any) -> BoundMethod:
        self = super().__new__(cls, function, module)
        self.before = before
        return self

    @property
    def __func__(self) -> Callable[..., Any]:
        return self.func

    @property
    def __self__(self) -> nn.Module:
        return self.args[0]

    def __getattr__(self, name: str) -> Any:
        """The name of the function, as a bound method has it."""
        if name in ("__name__", "__qualname__"):
            return getattr(self.func, name)
        raise AttributeError(name)

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.func)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def _bind(self, function: Callable[..., Any], module: nn.Module, before: Any) -> None:
        super().__setstate__((function, (module,), {}, None))  # type: ignore[misc]
        self.before = before

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundMethod:
        twin = memo[id(self)] = _unbound()
        twin._bind(self.func, copy.deepcopy(self.__self__, memo), copy.deepcopy(self.before, memo))
        return twin

    def __reduce__(self) -> Any:
        patched = _OURS[self.func]
        if patched.patch.of_classes:  # belongs to the process; this is what a bound method of the class becomes
            return getattr, (self.__self__, patched.name)
        return _unbound, (), (patched.function, patched.name, patched.patch, patched.is_run, self.__self__, self.before)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        function, name, patch, is_run, module, before = state
        stock = stock_function(of_class(type(module), name))
        self._bind(PatchedMethod(function, name, stock, patch, is_run).as_function(), module, before)


def _unbound() -> BoundMethod:
    """A method whose module is still to come: modules and their methods refer to each other."""
    return functools.partial.__new__(BoundMethod, _unbound)


class OnInstances:
    """A replaced method for the instances of a class, while the class itself shows the stock method.

    Layers of transformers compare their class's forward with their own, and checkpoint gradients only where the two
    are one.

    Parameters
    ----------
    function : callable
        Made by `PatchedMethod.as_function`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return _OURS[self.function].stock if instance is None else MethodType(self.function, instance)


def of_class(kind: type, method: str) -> Any:
    """The function that a call of a method of an instance finds on its class."""
    found = inspect.getattr_static(kind, method)
    return found.function if isinstance(found, OnInstances) else getattr(kind, method)


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


def runs_as(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether a call of `module` runs the replacement `function` and nothing else: no hook sees what goes in or out."""
    if module._forward_pre_hooks or module._forward_hooks or _HOOKED in vars(module):
        return False
    method = patched_method(vars(module).get("forward", type(module).forward))
    return method is not None and method.function is function and method.patch.holds(module)


def stock_function(attribute: Any) -> Callable[..., Any]:
    """The function that stood there before any patch of ours."""
    patched = patched_method(attribute)
    return patched.stock if patched is not None else getattr(attribute, "__func__", attribute)


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument of a forward or of generate, by the name that this transformers has for it."""
    return {"cache" if _RENAMED else OLD_NAME: cache}


def cache_of(outputs: Any) -> Any:
    """The cache in the outputs of a model."""
    return outputs.cache if "cache" in type(outputs).__dataclass_fields__ else outputs.past_key_values
