"""Vertical and slash budgets of every head, in the file format of Qwen2.5-1M and MInference."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME = "sparse_attention_config.json"
PATTERN = "vertical_and_slash"
DEFAULT = (1000, 6096)  # of MInference, for heads that a file leaves out
_NARROW, _WIDENED = 30, 130  # Qwen reads a vertical budget of 30 as 130


class HeadBudgets(NamedTuple):
    """Columns (`verticals`) and diagonals (`slashes`) of each layer's heads, and the recall a search gave them."""

    verticals: list[list[int]]
    slashes: list[list[int]]
    scores: list[list[float]]


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
            raise FileNotFoundError(f"sparse_attention_config: there is no file {path}")
        try:
            source = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"sparse_attention_config: {path} is no JSON: {error}") from error
    if isinstance(source, Mapping):
        source = [source.get(str(layer), source.get(layer, {})) for layer in range(layers)]
    if not isinstance(source, Sequence) or len(source) != layers:
        found = len(source) if isinstance(source, Sequence) else type(source).__name__
        raise ValueError(f"sparse_attention_config must list {layers} layers, got {found}")
    rows = [[_head(entry, layer, head) for head in range(heads)] for layer, entry in enumerate(source)]
    for layer, entry in enumerate(source):
        for head in entry:
            if not str(head).isdigit() or int(head) >= heads:
                raise ValueError(f"sparse_attention_config names head {head!r} of layer {layer}: the model has {heads}")
    return HeadBudgets(*([[head[i] for head in row] for row in rows] for i in range(3)))  # type: ignore[arg-type]


def _head(entry: Any, layer: int, head: int) -> tuple[int, int, float]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"sparse_attention_config: layer {layer} must be a mapping of heads, got {entry!r:.60}")
    found = entry.get(str(head), entry.get(head, (PATTERN, *DEFAULT, 0.0)))
    where = f"sparse_attention_config: head {head} of layer {layer}"
    if not isinstance(found, Sequence) or len(found) < 3:
        raise ValueError(f"{where} must be [pattern, verticals, slashes, score], got {found!r:.60}")
    pattern, verticals, slashes = found[:3]
    if pattern != PATTERN:
        raise ValueError(f"{where} has the pattern {pattern!r}: only {PATTERN!r} is known")
    for name, value in (("verticals", verticals), ("slashes", slashes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a positive whole number, got {value!r}")
    score = float(found[3]) if len(found) > 3 else 0.0
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


def beside_checkpoint(model_name: str) -> Path | None:
    """The file in the checkpoint's folder, if there is one."""
    path = Path(model_name) / FILE_NAME
    return path if model_name and path.is_file() else None


def minference_file(model_name: str) -> Path:
    """The file that an installed ``minference`` package ships for a model; the package is not imported.

    Raises
    ------
    FileNotFoundError
        The package is not installed, or has no file of that name.
    """
    spec = find_spec("minference")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError('sparse_attention_config="minference" needs the package minference: pip install it')
    folder = Path(spec.submodule_search_locations[0]) / "configs"
    wanted = re.escape(re.sub(r"[^a-z0-9.]", "_", Path(model_name).name.lower()))
    # named after the model alone, or after it, its length and how the search was done; not "…_1M" for a shorter model
    fitting = [p for p in sorted(folder.glob("*.json")) if re.fullmatch(rf"{wanted}(_\d+k_.*|_kv_.*|)", p.stem.lower())]
    if not wanted or not fitting:
        raise FileNotFoundError(f"sparse_attention_config: {folder} has no file for {model_name!r}: give its path")
    return fitting[0]
