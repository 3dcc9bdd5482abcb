"""What a run makes: a checkpoint or an adapter, whose config holds the new rotary base and dual chunk attention."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_longctx.errors import InvalidValue, MissingFile, MissingPackage
from qwen_longctx.training.model import causal_lm, parameters_of
from qwen_longctx.training.stages import Lora, Recipe

_ADAPTER = "adapter_config.json"
_LARGEST_LOCAL = 8192  # tokens: `local_size` of the 1M checkpoints


def with_adapters(model: Any, settings: Lora) -> Any:
    """A PEFT model with fresh adapters around `model`, whose own weights are frozen.

    Raises
    ------
    InvalidValue
        The adapter's file would be larger than `settings` allow.
    MissingPackage
        PEFT is absent.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackage(
            'method "lora" needs PEFT, which is not installed: pip install "qwen-longctx[train]", or take "full"'
        ) from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=list(settings.modules),
        modules_to_save=["norm"] if settings.norms else None,  # every module whose name ends so
        task_type="CAUSAL_LM",
    )
    # in the dtype of the weights: the optimiser keeps masters in float32
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    check_size(parameters_of(wrapped), settings)
    return wrapped


def check_size(learned: dict[str, nn.Parameter], settings: Lora) -> None:
    """Refuse adapters that are larger than allowed.

    Raises
    ------
    InvalidValue
    """
    size = sum(x.nbytes for x in learned.values())
    if settings.largest_mib is not None and size > settings.largest_mib * (1 << 20):
        raise InvalidValue(
            f"an adapter of rank {settings.rank} takes {size / (1 << 20):.1f} MiB and largest_mib is "
            f"{settings.largest_mib:g}: lower rank, or name fewer modules"
        )


def set_config(config: Any, recipe: Recipe) -> None:
    """Write the trained length, and dual chunk attention beyond it, into a transformers config."""
    longest = recipe.longest
    config.max_position_embeddings = longest
    config.update(
        {
            "dual_chunk_attention_config": {
                "chunk_size": longest,
                "local_size": recipe.local_size or max(1, min(_LARGEST_LOCAL, longest // 4)),
                "original_max_position_embeddings": longest,
            }
        }
    )


def write(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    base_name: str,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the result into a new folder, which appears as a whole.

    An adapter's folder holds the config of the trained model beside the adapter, for `merged`.

    Parameters
    ----------
    model : torch.nn.Module
        A PEFT model, or a whole one.
    tokenizer
        Goes into the folder of a whole checkpoint.
    recipe : Recipe
    base_name : str
        What an adapter calls its base.
    folder : Path
    weights : dict of str to torch.Tensor, optional
        In place of the model's own, which may be divided among processes.
    """
    inner: Any = causal_lm(model)
    set_config(inner.config, recipe)
    if inner is model:
        write_checkpoint(inner, tokenizer, folder, weights)
        return
    wrapped: Any = model
    wrapped.peft_config[wrapped.active_adapter].base_model_name_or_path = base_name
    with _appearing(folder) as fresh:
        wrapped.save_pretrained(fresh, save_embedding_layers=False, **_given(weights))
        (fresh / "README.md").unlink(missing_ok=True)  # a template without a word in it
        inner.config.save_pretrained(fresh)


def write_checkpoint(model: Any, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a whole model and its tokenizer into a new folder, which appears as a whole. See `write`."""
    with _appearing(folder) as fresh:
        model.save_pretrained(fresh, **_given(weights))
        tokenizer.save_pretrained(fresh)


def _given(weights: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    return {} if weights is None else {"state_dict": weights}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint to, which takes its name at the end of the block.

    Raises
    ------
    InvalidValue
        It cannot be written.
    """
    fresh = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        _suit_older_transformers(fresh)
        fresh.replace(folder)
    except OSError as error:
        raise InvalidValue(
            f"cannot write to {folder}: {error.strerror or error}. Free space there and start the same command again, "
            "or name another folder"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _suit_older_transformers(folder: Path) -> None:
    """Add to a saved config what transformers 4.57 reads and transformers 5 no longer writes."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def base_of(adapter: str | Path) -> str:
    """What an adapter calls its base.

    Raises
    ------
    MissingFile
        The folder holds no adapter of ours.
    """
    folder = Path(adapter)
    for name in (_ADAPTER, "config.json"):
        if not (folder / name).is_file():
            raise MissingFile(f"{folder} holds no {name}: name the folder of an adapter that qwen-longctx train wrote")
    return str(json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])


def merged(
    adapter: str | Path, base: str | None = None, dtype: torch.dtype = torch.bfloat16, device: Any = "cpu"
) -> Any:
    """A whole model: the base of an adapter with the adapter's config, and the adapter added to its weights.

    Parameters
    ----------
    adapter : str or Path
        Folder that a run with method "lora" has written.
    base : str, optional
        Folder or hub name of the checkpoint that the adapter was trained on; by default what the adapter calls it.
    dtype : torch.dtype
        Of the weights.
    device
        Of the weights.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode; plain transformers runs it within the trained length, and `patch_qwen` beyond.

    Raises
    ------
    MissingFile
        The folder holds no such adapter.
    """
    base = base or base_of(adapter)
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype, device_map={"": device})
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
