"""A million tokens of context for Qwen2, Qwen2.5 and Qwen3 checkpoints in Hugging Face transformers.

>>> from qwen_longctx import patch_qwen
>>> patch_qwen()  # before loading, for every Qwen loaded after; or patch_qwen(model) for one model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
__all__ = [
    "LongContextCache",
    "LongContextConfig",
    "load_stage",
    "patch_qwen",
    "patched_qwen",
    "pipeline_parallel",
    "settings_of",
    "unpatch_qwen",
    "warm_up",
]

_LATE = {"LongContextCache": "qwen_longctx.kv.hf_cache", "LongContextConfig": "qwen_longctx.config"}

Model = TypeVar("Model")


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: importing a part of the package does not import transformers."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)


def patch_qwen(model: Model | None = None, *, warm_up: bool = False, **overrides: Any) -> Model | None:
    """Give Qwen models long context: dual chunk attention, chunked prefill, a cache that does not copy itself.

    Parameters
    ----------
    model : transformers.PreTrainedModel, optional
        Patch this model only, also when accelerate has dispatched it or PEFT has wrapped it. Without it every Qwen
        model is patched, loaded before or after.
    warm_up : bool
        Also call `warm_up` on the model. If that fails, the patch stays in force.
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
    from qwen_longctx.errors import InvalidType, InvalidValue
    from qwen_longctx.patches import warm_up as warming

    if not isinstance(warm_up, bool):
        raise InvalidType(f"warm_up must be True or False, got {warm_up!r:.80}")
    if warm_up and model is None:
        raise InvalidValue("patch_qwen got warm_up=True without a model: give the model, or call warm_up(model) later")
    if warm_up:
        warming.check(model)  # type: ignore[arg-type]
    patches.apply(model, overrides)  # type: ignore[arg-type]
    if warm_up:
        warming.warm_up(model)  # type: ignore[arg-type]
    return model


def warm_up(model: Any) -> None:
    """Compile all that a long prompt of a patched model needs, on every device that its layers lie on.

    Without it the first long prompt of a process does so. A prompt of a few thousand tokens passes through the model,
    and a decoded token; the model and its caches are left as they are. Kernels are kept on disk between processes, so
    that a machine compiles once. On the CPU nothing is compiled, and this does nothing.

    Call it when the model lies on its devices, and again after a change of its settings, dtype or devices. Processes of
    tensor parallelism call it together.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Patched.

    Raises
    ------
    TypeError
        It is no model that can be patched.
    ValueError
        It is not patched, its weights are not loaded, or the settings ask for what does not run here.
    """
    from qwen_longctx.patches.warm_up import warm_up as run

    run(model)


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
    """Undo `patch_qwen` of the same argument exactly; nothing happens where nothing is patched.

    A model that `pipeline_parallel` has divided leaves its pipeline.
    """
    from qwen_longctx import patches

    patches.revert(model)
    if model is not None:
        from qwen_longctx.patches import pipeline

        pipeline.end(model)


def pipeline_parallel(
    model: Model, group: Any = None, *, layers: Sequence[int] | None = None, timeout: float = 600.0
) -> Model:
    """Divide the layers of a model among the processes of a group, which work on several chunks of a prompt at once.

    Every process calls this together with the others, and from then on makes the same calls of the model on the same
    inputs, `generate` included; every one gets the same outputs. Rank 0 embeds, the last rank has the head. Sampling
    draws from the random state of rank 0. Call it before or after `patch_qwen`, which it needs; ``unpatch_qwen(model)``
    ends it. See ``docs/several-devices.md``.

    A process that fails, ends or is called with something else ends the call in all of them with an error. Where all
    processes are left, the model and its caches are as they were before the call.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Whole, or loaded by `load_stage`. What this process does not run stays where it is and is not touched.
    group : torch.distributed.ProcessGroup, optional
        "nccl" for CUDA devices, "gloo" for the CPU; by default that of all processes.
    layers : sequence of int, optional
        How many layers each rank runs, in order; by default as even as they go.
    timeout : float
        Seconds for which a process waits for a word of another before it gives up.

    Returns
    -------
    The model.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        A wrong argument, no process group, or a model that cannot be divided.
    RankFailed
        Another process could not do its part.
    """
    from qwen_longctx.patches import pipeline

    pipeline.divide(model, group, layers, timeout)
    return model


def load_stage(
    checkpoint: str | Path,
    group: Any = None,
    *,
    layers: Sequence[int] | None = None,
    device: Any = None,
    timeout: float = 600.0,
    **options: Any,
) -> Any:
    """Load a checkpoint with only the layers that this process runs, and divide it by `pipeline_parallel`.

    Parameters
    ----------
    checkpoint : str or path
        As for ``AutoModelForCausalLM.from_pretrained``.
    group, layers, timeout
        As for `pipeline_parallel`.
    device : torch.device, optional
        By default the current CUDA device of this process, and the CPU in a group of the backend "gloo".
    **options
        More arguments of ``from_pretrained``, such as ``dtype``.

    Returns
    -------
    transformers.PreTrainedModel
        Weights of other processes are on the meta device.

    Raises
    ------
    As `pipeline_parallel` and ``from_pretrained``.
    """
    from qwen_longctx.patches import pipeline

    return pipeline.load(checkpoint, group, layers, device, timeout, options)


@contextmanager
def patched_qwen(model: Any = None, **overrides: Any) -> Iterator[Any]:
    """Patch for the length of a ``with`` block, then restore what was there, an earlier patch included.

    Blocks of several threads may overlap; the newest one that is open is in force.
    """
    from qwen_longctx import patches

    with patches.block(model, overrides):
        yield model
