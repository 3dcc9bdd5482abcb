"""Vertical and slash budgets of every head, in the file format of Qwen2.5-1M and MInference."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from qwen_longctx import checkpoint
from qwen_longctx.errors import InvalidValue, MissingFile

logger = logging.getLogger(__name__)

FILE_NAME = "sparse_attention_config.json"
PATTERN = "vertical_and_slash"
DEFAULT = (1000, 6096)  # of MInference, for heads that a file leaves out
_NARROW, _WIDENED = 30, 130  # Qwen reads a vertical budget of 30 as 130


class HeadBudgets(NamedTuple):
    """Columns (`verticals`) and diagonals (`slashes`) of each layer's heads, and the recall a search gave them."""

    verticals: list[list[int]]
    slashes: list[list[int]]
    scores: list[list[float]]

    def part(self, first: int, heads: int) -> HeadBudgets:
        """Those of `heads` heads from number `first` on, as one process of tensor parallelism holds them."""
        return HeadBudgets(*([row[first : first + heads] for row in rows] for rows in self))  # type: ignore[arg-type]


def load(source: str | Path | Sequence[Any], layers: int, heads: int, model_name: str = "") -> HeadBudgets:
    """Read budgets.

    Parameters
    ----------
    source : str, path or list
        A file, the parsed content of one (one mapping a layer, from head to
        ``["vertical_and_slash", verticals, slashes, score]``), or "minference" for the file that an installed
        ``minference`` package ships for the model.
    layers, heads : int
        Of the model.
    model_name : str
        Name or folder of the checkpoint, for "minference".

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The content does not fit the format or the model.
    """
    if isinstance(source, (str, Path)):
        path = minference_file(model_name) if str(source) == "minference" else Path(source)
        if not path.is_file():
            raise MissingFile(f"sparse_attention_config: there is no file {path}")
        try:
            source = json.loads(path.read_text())
        except ValueError as error:  # no JSON, or no text at all
            raise InvalidValue(f"sparse_attention_config: {path} is no JSON: {error}") from error
    if isinstance(source, Mapping):
        source = [source.get(str(layer), source.get(layer, {})) for layer in range(layers)]
    if not isinstance(source, Sequence) or len(source) != layers:
        got = len(source) if isinstance(source, Sequence) else type(source).__name__
        raise InvalidValue(f"sparse_attention_config must list {layers} layers, got {got}")
    rows = [[_head(entry, layer, head) for head in range(heads)] for layer, entry in enumerate(source)]
    for layer, entry in enumerate(source):
        for head in entry:
            if not str(head).isdigit() or int(head) >= heads:
                raise InvalidValue(
                    f"sparse_attention_config names head {head!r} of layer {layer}: the model has {heads}"
                )
    return HeadBudgets(*([[head[i] for head in row] for row in rows] for i in range(3)))  # type: ignore[arg-type]


def _head(entry: Any, layer: int, head: int) -> tuple[int, int, float]:
    if not isinstance(entry, Mapping):
        raise InvalidValue(f"sparse_attention_config: layer {layer} must be a mapping of heads, got {entry!r:.60}")
    values = entry.get(str(head), entry.get(head, (PATTERN, *DEFAULT, 0.0)))
    where = f"sparse_attention_config: head {head} of layer {layer}"
    if not isinstance(values, Sequence) or len(values) < 3:
        raise InvalidValue(f"{where} must be [pattern, verticals, slashes, score], got {values!r:.60}")
    pattern, verticals, slashes = values[:3]
    if pattern != PATTERN:
        raise InvalidValue(f"{where} has the pattern {pattern!r}: only {PATTERN!r} is known")
    for name, value in (("verticals", verticals), ("slashes", slashes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValue(f"{where}: {name} must be a positive whole number, got {value!r}")
    score = float(values[3]) if len(values) > 3 else 0.0
    return _WIDENED if verticals == _NARROW else verticals, slashes, score


def dump(budgets: HeadBudgets) -> list[dict[str, list[Any]]]:
    """The content of a file that `load` reads back to the same budgets."""
    return [
        {str(head): [PATTERN, *values] for head, values in enumerate(zip(*row, strict=True))}
        for row in zip(*budgets, strict=True)
    ]


def uniform(layers: int, heads: int) -> HeadBudgets:
    """MInference's default for every head."""
    rows = [[value] * heads for value in DEFAULT]
    return HeadBudgets([rows[0]] * layers, [rows[1]] * layers, [[0.0] * heads] * layers)


def of_checkpoint(config: Any, source: Any = None) -> HeadBudgets:
    """The budgets of all heads of a model.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    source : optional
        As in `load`. Without it the file that lies beside the checkpoint's weights, in its folder or on the hub; a
        checkpoint without one gets MInference's default, and a warning says so once.

    Raises
    ------
    FileNotFoundError
        There is no such file, or the checkpoint says that it has one and it cannot be had.
    ValueError
        The content does not fit the format or the model.
    """
    shape, name = (config.num_hidden_layers, config.num_attention_heads), getattr(config, "name_or_path", "") or ""
    if source is None:
        source, why = locate(name, config)
    if source is not None:
        return load(source, *shape, name)
    remedy = f"give sparse_attention_config={FILE_NAME!r} with the path of the file, or write one with calibrate"
    if checkpoint.section(config).get("sparse_attention_enabled"):
        raise MissingFile(f"vertical_slash needs the budgets that {name or 'this checkpoint'} has, but {why}: {remedy}")
    _warn_once(f"vertical_slash uses MInference's default budgets {DEFAULT} for every head, because {why}: {remedy}")
    return uniform(*shape)


def locate(name: str, config: Any = None) -> tuple[Path | None, str]:
    """The file of budgets of a checkpoint, or None and why there is none.

    Parameters
    ----------
    name : str
        Folder of the checkpoint, or its name on the hub.
    config : transformers.PretrainedConfig, optional
        The loaded config. A folder relative to the working directory is taken only if it holds a config of the same
        shape, because the working directory may have nothing to do with a name on the hub. Without a config, `name`
        is what ``from_pretrained`` would take: a folder first, then the hub.
    """
    if not name:
        return None, "the model was not loaded from a checkpoint"
    folder, commit = (
        Path(name),
        getattr(config, "_commit_hash", None),
    )  # the commit: transformers before 5.24, of the hub
    if commit is None and folder.is_dir() and (config is None or folder.is_absolute() or _same_shape(folder, config)):
        path = folder / FILE_NAME
        return (path, "") if path.is_file() else (None, f"there is no {FILE_NAME} in {folder}")
    return _on_hub(name, commit)


def _same_shape(folder: Path, config: Any) -> bool:
    try:
        there = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    keys = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    return isinstance(there, dict) and all(there.get(key) == getattr(config, key, None) for key in keys)


def _on_hub(name: str, commit: str | None) -> tuple[Path | None, str]:
    """The file in the hub's cache; if the checkpoint came from there, else on the hub, unless the user is offline."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        cached, known = (
            huggingface_hub.try_to_load_from_cache(name, file, revision=commit) for file in (FILE_NAME, "config.json")
        )
        if isinstance(cached, str):
            return Path(cached), ""
        if commit is None and not isinstance(known, str):
            return None, f"{name} is neither a folder with this model nor in the hub's cache"
        if cached is not None:  # a mark of the cache that the hub has no such file
            return None, f"{name} has no {FILE_NAME} on the hub"
        return Path(huggingface_hub.hf_hub_download(name, FILE_NAME, revision=commit)), ""
    except HFValidationError:
        return None, f"{name} is neither a folder with this model nor a name on the hub"
    except LocalEntryNotFoundError:
        return None, f"{FILE_NAME} of {name} is not in the hub's cache and cannot be fetched (offline, or no network)"
    except EntryNotFoundError:
        return None, f"{name} has no {FILE_NAME} on the hub"
    except (OSError, ValueError) as error:
        return None, f"{FILE_NAME} of {name} cannot be fetched from the hub ({type(error).__name__}: {error})"


def beside_checkpoint(name: str, config: Any = None) -> Path | None:
    """The file of a checkpoint, if there is one. Arguments as in `locate`."""
    return locate(name, config)[0]


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def minference_file(model_name: str) -> Path:
    """The file that an installed ``minference`` package ships for a model; the package is not imported.

    Raises
    ------
    FileNotFoundError
        The package is not installed, or has no file of that name.
    """
    spec = find_spec("minference")
    if spec is None or not spec.submodule_search_locations:
        raise MissingFile('sparse_attention_config="minference" needs the package minference: pip install it')
    folder = Path(spec.submodule_search_locations[0]) / "configs"
    wanted = re.escape(re.sub(r"[^a-z0-9.]", "_", Path(model_name).name.lower()))
    # named after the model alone, or after it, its length and how the search was done; not "…_1M" for a shorter model
    fitting = [p for p in sorted(folder.glob("*.json")) if re.fullmatch(rf"{wanted}(_\d+k_.*|_kv_.*|)", p.stem.lower())]
    if not wanted or not fitting:
        raise MissingFile(f"sparse_attention_config: {folder} has no file for {model_name!r}: give its path")
    return fitting[0]
