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
_MOST = 1 << 40  # tokens: no machine holds more
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
            source = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # not readable, no JSON, or no text at all
            raise InvalidValue(f"sparse_attention_config: {path} is no JSON: {error}") from error
    if isinstance(source, Mapping):
        source = [source.get(str(layer), source.get(layer, {})) for layer in range(layers)]
    if not isinstance(source, Sequence) or len(source) != layers:
        got = len(source) if isinstance(source, Sequence) else type(source).__name__
        raise InvalidValue(f"sparse_attention_config must list {layers} layers, got {got}")
    rows = [[_head(entry, layer, head) for head in range(heads)] for layer, entry in enumerate(source)]
    for layer, entry in enumerate(source):
        for head in entry:
            if not str(head).isdecimal() or int(head) >= heads:
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
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise InvalidValue(f"{where}: {name} must be a positive whole number, got {value!r:.60}")
    score = values[3] if len(values) > 3 else 0.0
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise InvalidValue(f"{where}: the score must be a number, got {score!r:.60}")
    return _WIDENED if verticals == _NARROW else verticals, slashes, float(score)


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
        As in `load`. Without it the checkpoint's `own_file`; a checkpoint without one gets MInference's default, and a
        warning says so once.

    Raises
    ------
    FileNotFoundError
        There is no such file, or the checkpoint says that it has one and it cannot be had.
    ValueError
        The content does not fit the format or the model.
    """
    shape, name = (config.num_hidden_layers, config.num_attention_heads), _name(config)
    if source is None:
        source, why = own_file(config)
    if source is not None:
        return load(source, *shape, name)
    remedy = f"give sparse_attention_config={FILE_NAME!r} with the path of the file, or write one with calibrate"
    section = checkpoint.section(config)
    if section.get("sparse_attention_enabled") or section.get("sparse_attention_config"):
        raise MissingFile(f"vertical_slash needs the budgets that {name or 'this checkpoint'} has, but {why}: {remedy}")
    _warn_once(f"vertical_slash uses MInference's default budgets {DEFAULT} for every head, because {why}: {remedy}")
    return uniform(*shape)


def own_file(config: Any) -> tuple[Path | None, str]:
    """The file of budgets that lies beside a checkpoint's weights, in its folder or on the hub; or None, and why.

    It has the name that the checkpoint's `dual_chunk_attention_config` gives as `sparse_attention_config`, or
    `FILE_NAME`. The working directory may have nothing to do with a name on the hub: a folder of that name there is
    taken only if it holds a config of the same shape.
    """
    name, file = _name(config), checkpoint.section(config).get("sparse_attention_config")
    file = file if isinstance(file, str) and file else FILE_NAME
    if not name:
        return None, "the model was not loaded from a checkpoint"
    folder = Path(name)
    commit = getattr(config, "_commit_hash", None)  # of the hub; transformers before 5.24
    if commit is None and folder.is_dir() and (folder.is_absolute() or _same_shape(folder, config)):
        path = folder / file
        return (path, "") if path.is_file() else (None, f"there is no {file} in {folder}")
    return _on_hub(name, file, commit)


def _name(config: Any) -> str:
    """Folder of the checkpoint, or its name on the hub."""
    return getattr(config, "name_or_path", "") or ""


def _same_shape(folder: Path, config: Any) -> bool:
    try:
        there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    keys = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    return isinstance(there, dict) and all(there.get(key) == getattr(config, key, None) for key in keys)


def _on_hub(name: str, file: str, commit: str | None) -> tuple[Path | None, str]:
    """A file in the hub's cache; if the checkpoint came from there, else on the hub, unless the user is offline."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        cached, known = (
            huggingface_hub.try_to_load_from_cache(name, wanted, revision=commit) for wanted in (file, "config.json")
        )
        if isinstance(cached, str):
            return Path(cached), ""
        if commit is None and not isinstance(known, str):
            return None, f"{name} is neither a folder with this model nor in the hub's cache"
        if cached is not None:  # a mark of the cache that the hub has no such file
            return None, f"{name} has no {file} on the hub"
        return Path(huggingface_hub.hf_hub_download(name, file, revision=commit)), ""
    except HFValidationError:
        return None, f"{name} is neither a folder with this model nor a name on the hub"
    except LocalEntryNotFoundError:
        return None, f"{file} of {name} is not in the hub's cache and cannot be fetched (offline, or no network)"
    except EntryNotFoundError:
        return None, f"{name} has no {file} on the hub"
    except (OSError, ValueError) as error:
        return None, f"{file} of {name} cannot be fetched from the hub ({type(error).__name__}: {error})"


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
