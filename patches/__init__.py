"""What is replaced inside transformers, and how it is put back.

A class-level patch replaces class attributes and, on live modules, the bound methods that accelerate's hooks or
transformers' recorders keep. An instance-level patch replaces them on one model's modules only. Both are undone by
looking for what is ours, so a deep copy of a patched model can be unpatched too. The one piece of global state is
`_CLASSES`: what stood in each class before.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from qwen_longctx.config import LongContextConfig, check_overrides
from qwen_longctx.patches import qwen2, qwen2_moe, qwen3, qwen3_moe
from qwen_longctx.patches.attention import IMPLEMENTATION, registered_attention, registered_mask
from qwen_longctx.patches.family import Family, Replacement, stock_function
from qwen_longctx.patches.method import PatchedMethod, patched_method

logger = logging.getLogger(__name__)

FAMILIES = (qwen2.FAMILY, qwen2_moe.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)
_MISSING = object()
_CLASSES: dict[tuple[type, str], Any] = {}

AttentionInterface.register(IMPLEMENTATION, registered_attention)
AttentionMaskInterface.register(IMPLEMENTATION, registered_mask)


def apply(model: nn.Module | None, overrides: dict[str, Any]) -> None:
    """Patch one model, or with None the classes of every family. See `qwen_longctx.patch_qwen`."""
    check_overrides(overrides)
    if model is None:
        _apply_to_classes(overrides)
    else:
        _apply_to_model(model, overrides)


def revert(model: nn.Module | None) -> None:
    """Undo `apply`; nothing happens where nothing is patched."""
    if model is not None:
        _restore_modules(model.modules())
        return
    ours = {key: patched_method(vars(key[0]).get(key[1])) for key in _CLASSES}
    for (owner, name), before in _CLASSES.items():
        if ours[owner, name] is None:
            logger.warning("%s.%s was replaced after patch_qwen(): left as it is", owner.__name__, name)
        elif before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    if ours:
        _CLASSES.clear()
        _restore_modules(_live(tuple(owner for owner, _ in ours)), set(ours.values()))


def current_overrides(model: nn.Module | None) -> dict[str, Any] | None:
    """Overrides of the patch in place, or None where there is none."""
    if model is None:
        found = [patched_method(vars(owner).get(name)) for owner, name in _CLASSES]
    else:
        found = [patched_method(vars(m).get(slot)) for m in model.modules() for slot in _slots(m)]
    return next((method.overrides for method in found if method is not None), None)


def _apply_to_classes(overrides: dict[str, Any]) -> None:
    if not overrides.keys() >= {"chunk_size", "local_size", "original_max_position_embeddings"}:
        _check_values(overrides)
    else:
        LongContextConfig(**overrides)
    families = [family for family in FAMILIES if family.supported()]
    for family in families:
        family.check()
    if not families:
        FAMILIES[0].check()
    revert(None)
    targets = [target for family in families for target in family.targets()]
    for owner, replacement in targets:
        before = vars(owner).get(replacement.method, _MISSING)
        stock = stock_function(getattr(owner, replacement.method))
        _CLASSES[owner, replacement.method] = before
        setattr(owner, replacement.method, PatchedMethod(replacement.function, stock, overrides).as_function())
    for module in _live(tuple(owner for owner, _ in targets)):
        for slot in _slots(module):
            _rebind(module, slot)


def _check_values(overrides: dict[str, Any]) -> None:
    """Validate what can be validated without a checkpoint."""
    chunk = overrides.get("chunk_size", 1 << 40)
    unknown = {
        "chunk_size": chunk,
        "local_size": max(1, chunk // 4) if isinstance(chunk, int) else 1,
        "original_max_position_embeddings": 1,
    }
    LongContextConfig(**{**unknown, **overrides})


def _rebind(module: nn.Module, slot: str) -> None:
    """Point a bound stock method that a hook or recorder keeps at the class's own, patched one."""
    kept = vars(module).get(slot)
    method = "forward" if slot == "_old_forward" else slot
    of_class = getattr(type(module), method, None)
    ours = patched_method(of_class)
    if ours is not None and getattr(kept, "__func__", None) is ours.stock:
        setattr(module, slot, MethodType(of_class, module))


def _apply_to_model(model: nn.Module, overrides: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_qwen takes a model or nothing, got {type(model).__name__}: {model!r:.80}")
    targets = list(_targets(model))
    for config in {id(m.config): m.config for m, r in targets if r.suffix == "Model"}.values():
        LongContextConfig.from_model_config(config, **overrides)
    _restore_modules(model.modules())
    for module, replacement in targets:
        slot = replacement.method
        if slot == "forward" and "_old_forward" in vars(module):
            slot = "_old_forward"
        stock = stock_function(getattr(type(module), replacement.method))
        method = PatchedMethod(replacement.function, stock, overrides).as_function()
        setattr(module, slot, MethodType(method, module))


def _targets(model: nn.Module) -> Iterator[tuple[nn.Module, Replacement]]:
    """Modules of `model` to patch; raises before anything is changed."""
    families = [family for family in FAMILIES if any(_belongs(m, family) for m in model.modules())]
    if not families:
        known = ", ".join(family.prefix for family in FAMILIES)
        raise TypeError(f"{type(model).__name__} holds no model that can be patched: known families are {known}")
    for family in families:
        family.check()
        wanted = list(family.targets())
        for module in model.modules():
            for owner, replacement in wanted:
                if isinstance(module, owner):
                    yield module, replacement


def _belongs(module: nn.Module, family: Family) -> bool:
    home = f"transformers.models.{family.module}.modeling_{family.module}"
    return any(c.__module__ == home and c.__name__ == f"{family.prefix}Model" for c in type(module).__mro__)


def _slots(module: nn.Module) -> Iterator[str]:
    return (slot for slot in ("forward", "_old_forward", "generate") if slot in vars(module))


def _restore_modules(modules: Iterable[nn.Module], only: set[PatchedMethod | None] | None = None) -> None:
    """Take our methods (or `only` some of them) off modules: what remains is the class's own."""
    for module in list(modules):
        for slot in list(_slots(module)):
            kept = vars(module)[slot]
            method = patched_method(kept)
            if only is not None and method not in only:
                continue
            if method is None:
                _warn_if_covered(module, slot, kept)
            elif slot == "_old_forward":
                module._old_forward = MethodType(type(module).forward, module)
            else:
                delattr(module, slot)


def _warn_if_covered(module: nn.Module, slot: str, kept: Any) -> None:
    if "_old_forward" not in vars(module) and patched_method(getattr(kept, "__wrapped__", None)) is not None:
        logger.warning("%s.%s was wrapped after patch_qwen(): left as it is", type(module).__name__, slot)


def _live(owners: tuple[type, ...]) -> list[nn.Module]:
    # type() and issubclass: isinstance would follow dead weak references and raise
    return [o for o in gc.get_objects() if issubclass(type(o), owners)]
