"""The results file of an evaluation: what it was made by, so that the same command continues it and no other does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_longctx.checkpoint import trained_length
from qwen_longctx.errors import InvalidValue, MissingFile
from qwen_longctx.evaluation.runner import key_of
from qwen_longctx.evaluation.samples import Samples, fingerprint
from qwen_longctx.evaluation.task import Reader, Sample

_NUMBERS = 8  # of each weight


def about(name: str, config: Any, dtype: str, samples: Samples) -> dict[str, Any]:
    """What is known of an evaluation before the weights are loaded: all of it must be alike in a file that goes on."""
    return {
        "model": Path(name).name,
        "dtype": dtype,
        "trained_length": trained_length(config) if hasattr(config, "max_position_embeddings") else None,
        "samples": samples.count,
        "seed": samples.seed,
        "chat": samples.reader.chat,
        "tokenizer": samples.tokenizer,
    }


def weights_of(model: Any) -> str:
    """Short hash of the names and shapes of all parameters and of the first numbers of each.

    Weights that are offloaded or kept in a format of their own count by name and shape only.
    """
    known = hashlib.sha256()
    for name, weight in model.named_parameters():
        known.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if type(weight.data) is torch.Tensor and weight.device.type != "meta":
            known.update(weight.data.flatten()[:_NUMBERS].double().cpu().numpy().tobytes())
    return known.hexdigest()[:16]


def read(path: str | Path) -> dict[str, Any]:
    """The content of a results file; without rows where there is no such file.

    Raises
    ------
    MissingFile, InvalidValue
        It cannot be read, or is none of an evaluation.
    """
    if not Path(path).exists():
        return {"rows": []}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MissingFile(f"cannot read {path}: {error}. Delete it, or name another file") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    whole = {"task", "length", "index", "mode", "fingerprint"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and whole <= row.keys() for row in rows):
        raise InvalidValue(f"{path} holds no results of eval, which could go on: name another file")
    return content


def check_same(path: str | Path, content: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a file that was made from something else.

    Parameters
    ----------
    path : path
        Of the file, for the message.
    content : mapping
        What the file holds.
    now : mapping
        What it must hold.

    Raises
    ------
    InvalidValue
    """
    for name, value in now.items() if content["rows"] else ():
        if content.get(name) != value:
            raise InvalidValue(
                f"{path} was made with {name} {content.get(name)!r}, this run has {value!r}: name another file, or run "
                "with the same"
            )


def check_samples(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    reader: Reader,
    samples: Sequence[Sample],
    task: str,
    length: int,
) -> None:
    """Refuse to continue a file whose rows of a task and length are of others than these samples.

    Raises
    ------
    InvalidValue
    """
    theirs = [(row["index"], row["fingerprint"]) for row in rows if (row["task"], row["length"]) == (task, length)]
    known = {index for index, _ in theirs}
    ours = {index: fingerprint(reader, sample) for index, sample in enumerate(samples) if index in known}
    if any(ours.get(index) != run_on for index, run_on in theirs):
        raise InvalidValue(
            f"{path} has results of other samples of {task} at {length} tokens: name another file, or give "
            "--samples-in the folder that it was made from"
        )


def keys(rows: Sequence[dict[str, Any]]) -> set[Any]:
    """Which samples under which modes need not run again."""
    return {key_of(row) for row in rows}
