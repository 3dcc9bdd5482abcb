"""Loading what ``--model`` names, with errors of ours for all that can be wrong with it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_longctx.errors import DoesNotFit, InvalidValue, MissingFile, Refused, Unsupported


def load_config(name: str, any_model: bool = False, revision: str | None = None) -> Any:
    """The config of a checkpoint.

    Parameters
    ----------
    name : str
        Folder or hub name.
    any_model : bool
        Take also what is no Qwen.
    revision : str, optional
        Branch, tag or commit on the hub.

    Raises
    ------
    MissingFile, Unsupported
    """
    from transformers import AutoConfig

    with reading("config", name):
        config = AutoConfig.from_pretrained(name, revision=revision)
    if not any_model and not _is_qwen(config):
        known = ", ".join(_families())
        raise Unsupported(f"{name} is a model of type {config.model_type!r}: name one of those known, {known}")
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise Unsupported(f"{name} has a vocabulary of {vocabulary} tokens: name a whole checkpoint of a text model")
    return config


def _families() -> list[str]:
    from qwen_longctx import patches

    return [family.module for family in patches.FAMILIES]


def _is_qwen(config: Any) -> bool:
    return config.model_type in _families()


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint.

    Raises
    ------
    MissingFile
        There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    with reading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        encoded = tokenizer("The grass is green.", add_special_tokens=False).input_ids
    if not encoded:  # transformers 5 makes an empty one where there are no files
        raise MissingFile(f"{name} holds no tokenizer: put the tokenizer files of the checkpoint into the folder")
    return tokenizer


def load_model(args: argparse.Namespace, revision: str | None = None) -> Any:
    """The model of ``--model``, as ``--dtype`` and ``--device-map`` say, in eval mode.

    Raises
    ------
    MissingFile, InvalidValue
        The weights are absent, cut short or incomplete, or do not go where they should.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if args.device_map == "meta":
        raise InvalidValue("--device-map meta loads no weights: name a device that holds them, or auto")
    with reading("weights", args.model):
        model, info = AutoModelForCausalLM.from_pretrained(
            args.model,
            revision=revision,
            dtype=getattr(torch, args.dtype),
            device_map=args.device_map,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise MissingFile(
            f"the weights of {args.model} lack {len(missing)} tensors, {missing[0]} for one: copy the checkpoint anew"
        )
    return model.eval()


def check_room(config: Any, lengths: list[int], dtype: str) -> None:
    """Refuse runs that no memory of this machine can hold, before anything is loaded.

    Of models that cannot be patched nothing is known.

    Raises
    ------
    DoesNotFit
        The KV cache of the longest run is larger than all memory of the machine and its GPUs.
    InvalidValue
        The config names a size that no model has.
    """
    import torch

    from qwen_longctx.checkpoint import Shape
    from qwen_longctx.prefill import memory

    if not _is_qwen(config):
        return
    longest = max(lengths)
    needed = memory.kv_bytes(Shape.of(config), getattr(torch, dtype)) * longest
    room = _memory_of_the_machine()
    if needed > room:
        raise DoesNotFit(
            f"the KV cache of {longest:,} tokens needs {needed // memory.GIB:,} GiB, and this machine has "
            f"{room // memory.GIB:,} GiB in all, its GPUs included: ask for fewer tokens"
        )


def _memory_of_the_machine() -> int:
    import torch

    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 40
    return host + sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Tell in one line what transformers says about files of the user's: anything may be in them, and go wrong."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
        lines = [line.strip() for line in lines if line.strip()]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
        raise MissingFile(
            f"cannot load the {what} of {name!r}: {reason}. Check the folder or hub name, that the checkpoint is "
            "whole, and the device"
        ) from error
