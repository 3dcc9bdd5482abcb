"""What the families share: which methods of which classes are replaced, and by what."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers
from packaging.version import Version

from qwen_longctx.patches.attention import attention_forward
from qwen_longctx.patches.causal_lm import causal_lm_forward
from qwen_longctx.patches.generation import generate
from qwen_longctx.patches.method import _RENAMED, OLD_NAME, patched_method
from qwen_longctx.patches.mlp import mlp_forward
from qwen_longctx.patches.model import model_forward
from qwen_longctx.patches.norm import norm_forward

SUPPORTED = "transformers >=4.57,<6"


class Replacement(NamedTuple):
    """One method to replace: `needs` are parameters that the stock method must have."""

    suffix: str
    method: str
    function: Callable[..., Any]
    needs: tuple[str, ...]


_STATE = ("attention_mask", "cache" if _RENAMED else OLD_NAME)
_REQUEST = ("input_ids", *_STATE, "position_ids", "inputs_embeds", "use_cache", "kwargs")
REPLACEMENTS = (
    Replacement("Attention", "forward", attention_forward, ("hidden_states", "position_embeddings", *_STATE, "kwargs")),
    Replacement("MLP", "forward", mlp_forward, ("x",)),
    Replacement("RMSNorm", "forward", norm_forward, ("hidden_states",)),
    Replacement("Model", "forward", model_forward, _REQUEST),
    Replacement("ForCausalLM", "forward", causal_lm_forward, (*_REQUEST, "labels", "logits_to_keep")),
    Replacement("ForCausalLM", "generate", generate, ("inputs", "generation_config", "kwargs")),
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

    def supported(self) -> bool:
        """Whether the installed transformers is new enough."""
        return Version(transformers.__version__) >= Version(self.minimum)

    def targets(self) -> Iterator[tuple[type, Replacement]]:
        """Every class and method to replace."""
        module = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        for replacement in REPLACEMENTS:
            yield getattr(module, self.prefix + replacement.suffix), replacement

    def check(self) -> None:
        """Raise if the installed transformers is not one this patch was written for.

        Raises
        ------
        ImportError
            The version is outside the supported range.
        RuntimeError
            A method has lost a parameter that the patch relies on.
        """
        version = Version(transformers.__version__)
        if not Version(self.minimum) <= version < Version("6"):
            raise ImportError(
                f"{self.prefix} needs transformers >={self.minimum},<6, installed is {version}: install one of those"
            )
        for owner, replacement in self.targets():
            stock = stock_function(getattr(owner, replacement.method))
            missing = [name for name in replacement.needs if name not in inspect.signature(stock).parameters]
            if missing:
                raise RuntimeError(
                    f"transformers {version} changed {owner.__name__}.{replacement.method}: it has no "
                    f"{', '.join(missing)}. This qwen_longctx knows {SUPPORTED}: install a release it knows"
                )


def stock_function(attribute: Any) -> Callable[..., Any]:
    """The function as transformers wrote it, under any patch of ours."""
    patched = patched_method(attribute)
    return patched.stock if patched is not None else getattr(attribute, "__func__", attribute)
