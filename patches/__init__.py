"""What is replaced inside transformers, and how it is put back.

A patch of the classes replaces class attributes, and on live modules the bound methods that hooks and other libraries
keep there. A patch of one model replaces methods on its modules only. Each remembers what stood in its place, so the
very attribute comes back. The one piece of global state is the registry: `_CLASSES`, the attributes of
classes; `_PATCHES`, the models that were patched; and `_BLOCKS`, the ``with patched_qwen()`` blocks that are open.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from qwen_longctx.config import LongContextConfig, check_overrides
from qwen_longctx.errors import InvalidType, InvalidValue, PatchConflict
from qwen_longctx.patches import linear, qwen2, qwen2_moe, qwen3, qwen3_moe
from qwen_longctx.patches.attention import IMPLEMENTATION, registered_attention, registered_mask
from qwen_longctx.patches.family import Replacement
from qwen_longctx.patches.method import (
    MISSING,
    BoundMethod,
    OnInstances,
    Patch,
    PatchedMethod,
    of_class,
    patched_method,
    slot_of,
    stock_function,
)
from qwen_longctx.patches.runs import changing, check_outside

logger = logging.getLogger(__name__)

FAMILIES = (qwen2.FAMILY, qwen2_moe.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)

AttentionInterface.register(IMPLEMENTATION, registered_attention)
AttentionMaskInterface.register(IMPLEMENTATION, registered_mask)


class _Replaced(NamedTuple):
    """An attribute of a class: what stood there, what stands there now, and the function of ours in it."""

    before: Any
    attribute: Any
    function: Callable[..., Any]


@dataclass(eq=False)
class _Block:
    """An open ``with patched_qwen()`` block: its model, None for the classes, and the overrides in force before it."""

    model: nn.Module | None
    before: dict[str, Any] | None


_CLASSES: dict[tuple[type, str], _Replaced] = {}
_PATCHES: WeakKeyDictionary[Patch, ref[nn.Module]] = WeakKeyDictionary()
_BLOCKS: list[_Block] = []
_TURNS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # a lock for the blocks of each model, and of the classes
_lock = threading.Lock()  # of the registry


def apply(model: nn.Module | None, overrides: dict[str, Any]) -> None:
    """Patch one model, or with None the classes of every family. See `qwen_longctx.patch_qwen`."""
    check_overrides(overrides)
    if model is None:
        _check_values(overrides)
        targets = _class_targets()
        with changing(None):
            _apply_to_classes(targets, overrides)
        return
    bound = _model_targets(model, overrides)
    cast = _to_cast(model, bound) if overrides.get("linear") == "fp8" else []
    with changing(model.modules()), _weights_cast(model, cast):
        _apply_to_model(model, bound, overrides)


def revert(model: nn.Module | None) -> None:
    """Undo `apply`; nothing happens where nothing is patched."""
    if model is None:
        with changing(None):
            if _CLASSES:
                _revert_classes()
        return
    _check_model("unpatch_qwen", model)
    with changing(model.modules()):
        patches = _patches_of(model)
        with _weights_cast(model, []), _whole_or_not(model.modules()):
            _put_all_back(model)
        _revoke(patches, model)


def current_overrides(model: nn.Module | None) -> dict[str, Any] | None:
    """Overrides of the patch in place, or None where there is none."""
    if model is None:
        methods = [patched_method(replaced.function) for replaced in list(_CLASSES.values())]
    else:
        methods = [patched_method(value) for module in model.modules() for value in _ours(module, False).values()]
    return next((dict(method.overrides) for method in methods if method is not None), None)


def settings_of(model: nn.Module) -> LongContextConfig | None:
    """The settings in force for a model. See `qwen_longctx.settings_of`."""
    base = base_of("settings_of", model)
    method = patched_method(vars(base).get(slot_of(base, "forward"), type(base).forward))
    valid = None if method is None else method.valid(base)
    return None if valid is None else valid.settings(base.config)


def base_of(caller: str, model: Any) -> Any:
    """The base model in `model`, which `caller` was given.

    Raises
    ------
    TypeError
        It holds no model that can be patched.
    """
    _check_model(caller, model)
    for module in model.modules():
        if any(family.owns(module) for family in FAMILIES):
            return module
    known = ", ".join(family.prefix for family in FAMILIES)
    raise InvalidType(f"{type(model).__name__} holds no model that can be patched: known families are {known}")


@contextmanager
def block(model: nn.Module | None, overrides: dict[str, Any]) -> Iterator[None]:
    """Patch for the length of a block, then restore what was there. See `qwen_longctx.patched_qwen`.

    Blocks of several threads may overlap. One that ends before a later one on the same model leaves the patch to that.
    """
    if model is not None:
        _check_model("patched_qwen", model)
    with _alone(model):
        this = _Block(model, current_overrides(model))
        apply(model, overrides)
        _BLOCKS.append(this)
    try:
        yield
    finally:
        with _alone(model):
            later = [other for other in _BLOCKS[_BLOCKS.index(this) + 1 :] if other.model is model]
            _BLOCKS.remove(this)
            if later:
                later[0].before = this.before
            elif this.before is None:
                revert(model)
            else:
                apply(model, this.before)


@contextmanager
def _alone(model: nn.Module | None) -> Iterator[None]:
    """Blocks of one model begin and end one after another; whoever waits here is in no run of the model."""
    check_outside(None if model is None else model.modules())
    with _lock:
        turn = _TURNS.setdefault(_Block if model is None else model, threading.RLock())
    with turn:
        yield


def _check_model(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidType(f"{caller} takes a model or nothing, got {type(model).__name__}: {model!r:.80}")


# --- the classes --------------------------------------------------------------------------------------------------


def _class_targets() -> list[tuple[type, Replacement]]:
    """Classes and methods to replace; raises before anything is changed."""
    families = [family for family in FAMILIES if family.supported()]
    for family in families or FAMILIES[:1]:
        family.check()
    return [target for family in families for target in family.targets()]


def _check_values(overrides: dict[str, Any]) -> None:
    """Validate what can be validated without a checkpoint."""
    if overrides.get("linear") == "fp8":
        raise InvalidValue('linear="fp8" casts the weights of one model: patch_qwen(model, linear="fp8")')
    chunk = overrides.get("chunk_size", 1 << 40)
    unknown = {
        "chunk_size": chunk,
        "local_size": max(1, chunk // 4) if isinstance(chunk, int) else 1,
        "original_max_position_embeddings": 1,
    }
    LongContextConfig(**{**unknown, **overrides})


def _apply_to_classes(targets: list[tuple[type, Replacement]], overrides: dict[str, Any]) -> None:
    """Replace the methods of classes, at one stroke each: no thread may see the stock method between two patches."""
    patch, former = Patch(dict(overrides), of_classes=True), dict(_CLASSES)
    live = _live(owner for owner, _ in targets)
    with _whole_or_not(live, [*former, *((owner, replacement.method) for owner, replacement in targets)]):
        for owner, replacement in targets:
            name = replacement.method
            held, stock = vars(owner).get(name, MISSING), stock_function(of_class(owner, name))
            old = former.get((owner, name))
            before = old.before if old is not None and old.attribute is held else held
            function = PatchedMethod(replacement.function, name, stock, patch, replacement.is_run).as_function()
            attribute = OnInstances(function) if replacement.of_instances else function
            _CLASSES[owner, name] = _Replaced(before, attribute, function)
            setattr(owner, name, attribute)
            for module in live:
                if isinstance(module, owner):
                    _replace_kept(module, replacement, function, stock)
    for old in former.values():
        _end(old.function)


def _replace_kept(module: nn.Module, replacement: Replacement, function: Callable[..., Any], stock: Any) -> None:
    """Replace the class's method where a module keeps it for itself, as hooks do, and another library's if it must be.

    A method of a derived class stays: it calls that of the class. So does that of a patch of this model alone.
    """
    slot = slot_of(module, replacement.method)
    kept = vars(module).get(slot, MISSING)
    method, theirs = patched_method(kept), getattr(kept, "__func__", None)
    if kept is MISSING or theirs is of_class(type(module), replacement.method):
        return
    if method is not None and not method.patch.of_classes:
        kept.before = _renewed(module, kept.before, function)
    elif method is not None or theirs is stock or replacement.vital:
        vars(module)[slot] = (
            _renewed(module, kept, function) if method is not None else BoundMethod(function, module, kept)
        )


def _renewed(module: nn.Module, kept: Any, function: Callable[..., Any]) -> Any:
    """A method of an earlier patch of the classes as one of the new patch; anything else as it is."""
    method = patched_method(kept)
    if method is None or not method.patch.of_classes:
        return kept
    return BoundMethod(function, module, kept.before if isinstance(kept, BoundMethod) else MISSING)


def _end(function: Callable[..., Any]) -> None:
    """Put the patch of a class's method out of force, also where others still hold the method."""
    method = patched_method(function)
    assert method is not None
    method.patch.end()


def _revert_classes() -> None:
    """Put the attributes of the classes back, and what live modules kept."""
    former = dict(_CLASSES)
    live = _live(owner for owner, _ in former)
    functions = {replaced.function for replaced in former.values()}
    with _whole_or_not(live, former):
        for (owner, name), replaced in former.items():
            if vars(owner).get(name) is not replaced.attribute:
                logger.warning("%s.%s was replaced after patch_qwen(): left as it is", owner.__name__, name)
            else:
                _set(owner, name, replaced.before)
        _CLASSES.clear()
        for module in live:
            for slot, value in _ours(module, True).items():
                _put_back(module, slot, value)
            for value in _ours(module, False).values():
                if getattr(value.before, "__func__", None) in functions:
                    value.before = _beneath(module, value.before)
    for function in functions:
        _end(function)


# --- one model ----------------------------------------------------------------------------------------------------

_Target = tuple[nn.Module, Replacement]


def _model_targets(model: nn.Module, overrides: dict[str, Any]) -> list[_Target]:
    """Modules and methods to replace; raises before anything is changed."""
    _check_model("patch_qwen", model)
    families = [family for family in FAMILIES if any(family.owns(module) for module in model.modules())]
    if not families:
        known = ", ".join(family.prefix for family in FAMILIES)
        raise InvalidType(f"{type(model).__name__} holds no model that can be patched: known families are {known}")
    targets: list[_Target] = []
    for family in families:
        family.check()
        wanted = [(owner, replacement) for owner, replacement in family.targets() if not replacement.of_classes_only]
        for module in model.modules():
            targets += [(module, r) for owner, r in wanted if isinstance(module, owner) and _is_own(module, owner, r)]
    for config in {id(m.config): m.config for m, r in targets if r.suffix == "Model"}.values():
        LongContextConfig.from_model_config(config, **overrides)
    return targets


def _to_cast(model: nn.Module, targets: list[_Target]) -> list[nn.Linear]:
    """Linear layers that are to be in 8 bits; raises before anything is changed."""
    bases = {id(module): module for module, replacement in targets if replacement.suffix == "Model"}.values()
    return linear.check((layer for base in bases for layer in base.layers), type(model).__name__)


@contextmanager
def _weights_cast(model: nn.Module, cast: list[nn.Linear]) -> Iterator[None]:
    """Put these layers of a model, and no others, into 8 bits for good, unless the block fails."""
    wanted = {id(one) for one in cast}
    restored = linear.restore(one for one in model.modules() if id(one) not in wanted)
    done: list[nn.Linear] = []
    try:
        done = linear.to_fp8(cast)
        yield
    except BaseException:
        linear.restore(done)
        linear.to_fp8(restored)
        raise


def _is_own(module: nn.Module, owner: type, replacement: Replacement) -> bool:
    """Whether a module runs the method of the family's class, and not one that a derived class has in its place."""
    kind, name = type(module), replacement.method
    if of_class(kind, name) is of_class(owner, name):
        return True
    if replacement.vital:
        raise PatchConflict(
            f"{kind.__module__}.{kind.__qualname__} overrides {name} of {owner.__name__}, and a patch of this model "
            "alone would bypass it: call patch_qwen() without a model, which patches the class beneath"
        )
    return False


def _apply_to_model(model: nn.Module, targets: list[_Target], overrides: dict[str, Any]) -> None:
    """Replace methods of modules, at one stroke each: no thread may see the stock method between two patches."""
    patch, former = Patch(dict(overrides), of_classes=False), _patches_of(model)
    methods: dict[tuple[type, str], Callable[..., Any]] = {}
    written: set[tuple[int, str]] = set()
    with _whole_or_not(model.modules()):
        for module, replacement in targets:
            kind, name = type(module), replacement.method
            stock = stock_function(of_class(kind, name))
            slot = slot_of(module, name)
            before = vars(module).get(slot, MISSING)
            if slot in _ours(module, False):
                before = before.before if isinstance(before, BoundMethod) else MISSING
            if not replacement.vital and not _is_of_class(before, stock):
                continue  # another library's own: it stays
            if (kind, name) not in methods:
                method = PatchedMethod(replacement.function, name, stock, patch, replacement.is_run)
                methods[kind, name] = method.as_function()
            vars(module)[slot] = BoundMethod(methods[kind, name], module, before)
            written.add((id(module), slot))
        _put_all_back(model, written)
        with _lock:
            _PATCHES[patch] = ref(model)
    _revoke(former, model)


def _is_of_class(kept: Any, stock: Callable[..., Any]) -> bool:
    """Whether what a module keeps is the method of its class, stock or patched, or nothing."""
    return kept is MISSING or patched_method(kept) is not None or getattr(kept, "__func__", None) is stock


def _patches_of(model: nn.Module) -> set[Patch]:
    """Patches of a model, or of a model around or inside it, whose methods may be held somewhere."""
    modules = list(model.modules())
    methods = [patched_method(value) for module in modules for value in _ours(module, False).values()]
    with _lock:
        patches = {patch for patch, root in _PATCHES.items() if any(root() is module for module in modules)}
    return patches.union(method.patch for method in methods if method is not None)


def _put_all_back(model: nn.Module, but: Collection[tuple[int, str]] = ()) -> None:
    """Take our methods off the modules of a model, but for some slots, given by module and name."""
    for module in model.modules():
        for slot, value in _ours(module, False).items():
            if (id(module), slot) not in but:
                _put_back(module, slot, value)


def _revoke(patches: Iterable[Patch], model: nn.Module) -> None:
    """Put patches out of force for a model, also where wrappers of others still hold their methods."""
    for patch in patches:
        patch.leave(model.modules())


# --- slots --------------------------------------------------------------------------------------------------------


def _ours(module: nn.Module, of_classes: bool) -> dict[str, Any]:
    """Attributes of a module itself that are methods replaced by a patch of the classes, or by one of a model."""
    methods = ((name, value, patched_method(value)) for name, value in vars(module).items())
    return {name: value for name, value, found in methods if found is not None and found.patch.of_classes == of_classes}


def _put_back(module: nn.Module, slot: str, value: Any) -> None:
    """Put back what a slot of a module held before."""
    before = _beneath(module, value)
    method = patched_method(value)
    assert method is not None
    if before is MISSING and slot != method.name:  # a hook that came later: it needs a method there
        before = MethodType(of_class(type(module), method.name), module)
    _set(module, slot, before)


def _beneath(module: nn.Module, value: Any) -> Any:
    """What one of our methods stands for: what the module held, or the method of the class that it was bound from."""
    if isinstance(value, BoundMethod):
        return value.before
    method = patched_method(value)
    assert method is not None
    return MethodType(of_class(type(module), method.name), module)


def _set(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a class or a module; delete it if the value is `MISSING`."""
    if value is not MISSING:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


def _live(owners: Iterable[type]) -> list[nn.Module]:
    """All modules of these classes, and of classes derived from them, that are alive."""
    kinds, more = set(), list(owners)
    while more:
        kind = more.pop()
        if kind not in kinds:
            kinds.add(kind)
            more += kind.__subclasses__()
    # gc.get_objects() would hand out tuples that other threads are still filling, which breaks them
    return [o for o in gc.get_referrers(*kinds) if type(o) in kinds]


@contextmanager
def _whole_or_not(modules: Iterable[nn.Module], attributes: Iterable[tuple[type, str]] = ()) -> Iterator[None]:
    """If the block fails or is interrupted, modules and classes get the attributes back that they had."""
    of_modules = [(module, dict(vars(module))) for module in modules]
    of_classes = [(owner, name, vars(owner).get(name, MISSING)) for owner, name in attributes]
    classes = dict(_CLASSES)
    try:
        yield
    except BaseException:
        for module, before in of_modules:
            vars(module).clear()
            vars(module).update(before)
        for owner, name, value in of_classes:
            _set(owner, name, value)
        _CLASSES.clear()
        _CLASSES.update(classes)
        raise
