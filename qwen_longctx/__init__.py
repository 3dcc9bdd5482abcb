"""A million tokens of context for Qwen2, Qwen2.5 and Qwen3 checkpoints in Hugging Face transformers.

>>> from qwen_longctx import patch_qwen
>>> patch_qwen()  # before loading, for every Qwen loaded after; or patch_qwen(model) for one model
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

_here = Path(__file__).resolve().parent
if not (_here / "patches").is_dir():  # a checkout that is not installed: setup.cfg maps ../patches to this package
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from qwen_longctx.config import LongContextConfig
    from qwen_longctx.kv.hf_cache import LongContextCache

__version__ = "0.1.0"
__all__ = ["LongContextCache", "LongContextConfig", "patch_qwen", "patched_qwen", "settings_of", "unpatch_qwen"]

_LATE = {"LongContextCache": "qwen_longctx.kv.hf_cache", "LongContextConfig": "qwen_longctx.config"}

Model = TypeVar("Model")


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: importing a part of the package does not import transformers."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)


def patch_qwen(model: Model | None = None, **overrides: Any) -> Model | None:
    """Give Qwen models long context: dual chunk attention, chunked prefill, a cache that does not copy itself.

    Parameters
    ----------
    model : transformers.PreTrainedModel, optional
        Patch this model only, also when accelerate has dispatched it or PEFT has wrapped it. Without it every Qwen
        model is patched, loaded before or after.
    **overrides
        Fields of `LongContextConfig`; the rest comes from the checkpoint. Patching again replaces them.

    Returns
    -------
    The model.

    Raises
    ------
    TypeError, ValueError
        No model that can be patched, or a bad setting. Nothing is changed then.
    ImportError, RuntimeError
        The installed transformers is outside the supported range, or its code has changed.
    """
    from qwen_longctx import patches

    patches.apply(model, overrides)  # type: ignore[arg-type]
    return model


def settings_of(model: Any) -> LongContextConfig | None:
    """The settings that `patch_qwen` has put in force for a model; None where it is not patched.

    Raises
    ------
    TypeError
        It is no model that can be patched.
    """
    from qwen_longctx import patches

    return patches.settings_of(model)


def unpatch_qwen(model: Any = None) -> None:
    """Undo `patch_qwen` of the same argument exactly; nothing happens where nothing is patched."""
    from qwen_longctx import patches

    patches.revert(model)


@contextmanager
def patched_qwen(model: Any = None, **overrides: Any) -> Iterator[Any]:
    """Patch for the length of a ``with`` block, then restore what was there, an earlier patch included.

    Blocks of several threads may overlap; the newest one that is open is in force.
    """
    from qwen_longctx import patches

    with patches.block(model, overrides):
        yield model
