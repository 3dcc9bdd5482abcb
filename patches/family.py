"""What every model family has in common: which methods are replaced, and what their signatures must be."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers
from packaging.version import Version
from torch import nn

from qwen_longctx.errors import MissingPackage, PatchConflict
from qwen_longctx.patches.attention import attention_forward
from qwen_longctx.patches.causal_lm import causal_lm_forward
from qwen_longctx.patches.generation import generate, refuse_batching
from qwen_longctx.patches.layer import layer_forward
from qwen_longctx.patches.method import _RENAMED, OLD_NAME, of_class, stock_function
from qwen_longctx.patches.mlp import mlp_forward
from qwen_longctx.patches.model import model_forward
from qwen_longctx.patches.norm import norm_forward
from qwen_longctx.patches.pickling import model_reduce

SUPPORTED = "transformers >=4.57,<6"


class Replacement(NamedTuple):
    """One method to replace.

    Attributes
    ----------
    suffix : str
        Of the class that has it, behind the family's prefix.
    method : str
    function : callable
        What replaces it, see `method.PatchedMethod`.
    needs : tuple of str
        Parameters that the stock method must have.
    knows : tuple of str
        Parameters that it may have besides. One that is in neither is a change that this patch was not written for.
        Empty together with `needs` if the signature is of no account.
    vital : bool
        Without it the model would silently answer as an unpatched one, so a replacement of another library gives way
        to it, until the patch is undone. Other replacements give way to those of other libraries.
    is_run : bool
        A call is a run of the whole model.
    of_classes_only : bool
        Is not needed where one model is patched.
    of_instances : bool
        The class itself shows the stock method (`method.OnInstances`).
    """

    suffix: str
    method: str
    function: Callable[..., Any]
    needs: tuple[str, ...] = ()
    knows: tuple[str, ...] = ()
    vital: bool = False
    is_run: bool = False
    of_classes_only: bool = False
    of_instances: bool = False


_STATE = ("attention_mask", "cache" if _RENAMED else OLD_NAME)
_REQUEST = ("input_ids", *_STATE, "position_ids", "inputs_embeds", "use_cache", "kwargs")
_OLD = ("cache_position",)  # before transformers 5.4
_GENERATE = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "use_model_defaults",  # before transformers 5
)

REPLACEMENTS = (
    Replacement(
        "Attention",
        "forward",
        attention_forward,
        ("hidden_states", "position_embeddings", *_STATE, "kwargs"),
        _OLD,
        vital=True,
    ),
    Replacement(
        "DecoderLayer",
        "forward",
        layer_forward,
        ("hidden_states", "position_embeddings", "position_ids", *_STATE, "kwargs"),
        (*_OLD, "use_cache"),
        of_instances=True,
    ),
    Replacement("MLP", "forward", mlp_forward, ("x",)),
    Replacement("RMSNorm", "forward", norm_forward, ("hidden_states",)),
    Replacement("Model", "forward", model_forward, _REQUEST, _OLD, vital=True, is_run=True),
    Replacement("Model", "__reduce_ex__", model_reduce, of_classes_only=True),
    Replacement(
        "ForCausalLM",
        "forward",
        causal_lm_forward,
        (*_REQUEST, "labels", "logits_to_keep"),
        (*_OLD, "output_router_logits"),
        is_run=True,
    ),
    Replacement("ForCausalLM", "generate", generate, ("inputs", "generation_config", "kwargs"), _GENERATE, is_run=True),
    Replacement("ForCausalLM", "generate_batch", refuse_batching),
    Replacement("ForCausalLM", "init_continuous_batching", refuse_batching),
)


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Parameters
    ----------
    module : str
        Folder in ``transformers.models``.
    prefix : str
        Of the class names.
    minimum : str
        Oldest transformers whose code for this family can be patched.
    """

    module: str
    prefix: str
    minimum: str = "4.57"

    @property
    def home(self) -> str:
        """The module in which transformers defines the classes of the family."""
        return f"transformers.models.{self.module}.modeling_{self.module}"

    def supported(self) -> bool:
        """Whether the installed transformers is new enough."""
        return Version(transformers.__version__) >= Version(self.minimum)

    def owns(self, module: nn.Module) -> bool:
        """Whether `module` is a base model of this family, or of a class derived from one."""
        return any(c.__module__ == self.home and c.__name__ == f"{self.prefix}Model" for c in type(module).__mro__)

    def targets(self) -> Iterator[tuple[type, Replacement]]:
        """Every class and method to replace. Classes that another library has put in their place are left to it.

        Raises
        ------
        PatchConflict
            Another library has replaced a class without which there is no dual chunk attention.
        """
        module = importlib.import_module(self.home)
        for replacement in REPLACEMENTS:
            owner = getattr(module, self.prefix + replacement.suffix)
            if owner.__module__ == self.home:
                yield owner, replacement
            elif replacement.vital:
                raise PatchConflict(
                    f"{self.prefix}{replacement.suffix} of {self.home} was replaced by {owner.__module__}."
                    f"{owner.__qualname__}, which cannot be patched: call patch_qwen() without that replacement"
                )

    def check(self) -> None:
        """Raise if the installed transformers is not one this patch was written for.

        Raises
        ------
        ImportError
            The version is outside the supported range.
        RuntimeError
            The signature of a method is another than those that the patch was written for.
        """
        version = Version(transformers.__version__)
        if not Version(self.minimum) <= version < Version("6"):
            raise MissingPackage(
                f"{self.prefix} needs transformers >={self.minimum},<6, installed is {version}: install one of those"
            )
        for owner, replacement in self.targets():
            if replacement.needs:
                _check_signature(owner, replacement)


def _check_signature(owner: type, replacement: Replacement) -> None:
    """Compare all parameters of the stock method with those that its replacement was written for."""
    stock = stock_function(of_class(owner, replacement.method))
    parameters = dict(list(inspect.signature(stock).parameters.items())[1:])
    missing = [name for name in replacement.needs if name not in parameters]
    known = (*replacement.needs, *replacement.knows)
    fresh = [name for name in parameters if name not in known]
    kinds = [
        p.name
        for p in parameters.values()
        if (p.kind is p.VAR_KEYWORD) != (p.name == "kwargs") or p.kind is p.VAR_POSITIONAL
    ]
    said = [
        f"{what} {', '.join(names)}"
        for what, names in (("it has no", missing), ("it has the new", fresh), ("of another kind is", kinds))
        if names
    ]
    if not said:
        return
    name, home = f"{owner.__name__}.{replacement.method}", getattr(stock, "__module__", None) or ""
    if home.partition(".")[0] == "transformers":
        remedy = f"This qwen_longctx knows {SUPPORTED}: install a release it knows"
    else:
        remedy = f"It comes from {home}: call patch_qwen() before that replaces it, or without it"
    raise PatchConflict(f"transformers {transformers.__version__} changed {name}: {'; '.join(said)}. {remedy}")
