"""Ways to run one model: transformers as it is, with YaRN, or patched under some settings, read from short texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from qwen_longctx import LongContextConfig, patched_qwen, patches, sparsity
from qwen_longctx.checkpoint import local_heads, trained_length
from qwen_longctx.config import RULES, SPARSE
from qwen_longctx.errors import InvalidValue, PatchConflict
from qwen_longctx.evaluation import yarn
from qwen_longctx.evaluation.passkey import input_device

DEFAULT_MODES = ("stock", "dense", "sparse")
_PATCHED = {"dense": "off", "sparse": "auto"}  # what `sparse` of the settings is called here
_OF_VARIANTS = {
    "sparse",
    "sparse_attention_threshold",
    "sparse_decode",
    "sparse_decode_threshold",
    "recall_target",
    *chain.from_iterable(RULES.values()),
}


class Variant(NamedTuple):
    """A rule and its settings."""

    name: str
    overrides: dict[str, Any]


def variant(text: str) -> Variant:
    """Read ``rule`` or ``rule:setting=value,…``; a value is a number, true, false, or a word.

    Raises
    ------
    InvalidValue
        The text is not of this form. The settings themselves are checked by `LongContextConfig`.
    """
    rule, _, rest = text.partition(":")
    overrides: dict[str, Any] = {"sparse": rule}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if not value:
            raise InvalidValue(f"a variant reads RULE or RULE:SETTING=VALUE,…, got {text!r}")
        overrides[key] = _value(value)
    return Variant(text, overrides)


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def settings_in_place(model: Any) -> dict[str, Any]:
    """Overrides of the patch of a model or of its class, without those that a variant is about."""
    in_place = patches.current_overrides(model) or patches.current_overrides(None) or {}
    return {name: value for name, value in in_place.items() if name not in _OF_VARIANTS}


@dataclass(frozen=True)
class Mode:
    """A way to run a model.

    Attributes
    ----------
    name : str
        The text that it was read from.
    overrides : dict, optional
        Settings of the patch, see `LongContextConfig`; None runs transformers without the patch.
    yarn : bool
        Without the patch, under YaRN.
    factor : float, optional
        Of YaRN; None follows the length, see `yarn.default_factor`.
    """

    name: str
    overrides: dict[str, Any] | None = None
    yarn: bool = False
    factor: float | None = None

    @property
    def patched(self) -> bool:
        """Whether the model is patched."""
        return self.overrides is not None

    def settings(self, model: Any, config: Any) -> LongContextConfig:
        """Settings of the patch for a model of this config; those of a patch in place hold beneath the mode's own."""
        in_place = {} if model is None else settings_in_place(model)
        return LongContextConfig.from_model_config(config, **{**in_place, **(self.overrides or {})})

    def rule(self, model: Any, length: int) -> str | None:
        """The rule by which prompts of `length` tokens are prefilled sparsely on this model; None is dense."""
        if not self.patched:
            return None
        config = model.config
        return sparsity.rule_for(
            self.settings(model, config),
            config,
            heads=lambda: local_heads(model),
            device=input_device(model),
            dtype=model.dtype,
            length=length,
        )


def mode_of(text: str) -> Mode:
    """Read a mode.

    Parameters
    ----------
    text : str
        ``stock``, transformers without the patch; ``yarn`` or ``yarn:factor=2``, the same under YaRN; ``dense`` or
        ``sparse``, patched, without sparse prefill or with its default; or the name of a rule of sparse prefill. The
        last three take settings of the patch: ``RULE:SETTING=VALUE,…``.

    Raises
    ------
    InvalidValue
        There is no such mode, or the text is not of this form. Settings are checked by `check_modes`.
    """
    word, overrides = text.partition(":")[0], variant(text).overrides
    known = ("stock", "yarn", *_PATCHED, *(name for name in SPARSE if name not in _PATCHED.values()))
    if word not in known:
        raise InvalidValue(f"there is no mode {text!r}: name some of {', '.join(known)}, with :SETTING=VALUE,…")
    given = {name: value for name, value in overrides.items() if name != "sparse"}
    if overrides["sparse"] != word:
        raise InvalidValue(f"mode {text!r} says twice whether it is sparse: leave out sparse=, its name says it")
    if word == "stock" and given:
        raise InvalidValue(f"mode stock takes no settings, got {text!r}: name dense or sparse to patch the model")
    if word == "yarn":
        return _yarn(text, given)
    return Mode(text) if word == "stock" else Mode(text, {**given, "sparse": _PATCHED.get(word, word)})


def _yarn(text: str, given: dict[str, Any]) -> Mode:
    factor = given.pop("factor", None)
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool) and math.isfinite(factor)
    if given or not (factor is None or (number and factor >= 1)):
        raise InvalidValue(f"mode yarn takes a factor from 1 on, yarn:factor=4 for example, got {text!r}")
    return Mode(text, yarn=True, factor=factor)


def check_modes(config: Any, modes: Sequence[Mode], model: Any = None) -> None:
    """Refuse modes that a model cannot run in, from its config; with the model, also for what is in place on it.

    Raises
    ------
    InvalidValue, InvalidType, MissingFile
        No modes, one of them twice, a setting that is not valid, budgets that are not there, a kernel that does not
        run here, or a rotary embedding that YaRN does not fit.
    PatchConflict
        The model is patched and a mode needs it as it was.
    """
    names = [one.name for one in modes]
    if not names or len(set(names)) < len(names):
        raise InvalidValue(f"give at least one mode, and each once, got {', '.join(names) or 'none'}")
    for one in modes:
        if one.patched:
            sparsity.check_budgets(one.settings(model, config), config)
        elif one.yarn:
            yarn.check(config)
    if model is None:
        return
    for one in modes:
        if one.patched:
            one.rule(model, 1 << 60)  # a kernel that does not run here
        elif patches.current_overrides(model) is not None or patches.current_overrides(None) is not None:
            raise PatchConflict(
                f"mode {one.name} runs transformers as it is, and the model is patched: call unpatch_qwen() as you "
                "called patch_qwen() before, or leave the mode out"
            )


@contextmanager
def in_mode(model: Any, one: Mode, length: int) -> Iterator[None]:
    """Run a model in a mode for the length of a block, at `length` tokens; then it is as it was."""
    if one.overrides is not None:
        with patched_qwen(model, **{**settings_in_place(model), **one.overrides}):
            yield
    elif one.yarn:
        trained = trained_length(model.config)
        with yarn.stretched(model, one.factor or yarn.default_factor(trained, length)):
            yield
    else:
        yield
