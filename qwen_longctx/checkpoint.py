"""What the config of a checkpoint says: its geometry, its shape, and what dual chunk attention cannot do for it.

Everything here takes a transformers config as an object with attributes and imports no transformers.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwen_longctx.errors import InvalidType, InvalidValue

GEOMETRY_KEYS = ("chunk_size", "local_size", "original_max_position_embeddings")
SPARSE_KEYS = ("sparse_attention_threshold", "sparse_attention_config")
_UNBOUNDED_ROPE = ("dynamic", "longrope")


class Heads(NamedTuple):
    """The heads that one process holds, which under tensor parallelism are a part of the model's.

    Attributes
    ----------
    query, key : int
        Query heads and key heads.
    first : int
        Number of the first query head.
    """

    query: int
    key: int
    first: int = 0


@dataclass(frozen=True)
class Shape:
    """The shape of a checkpoint's layers.

    Attributes
    ----------
    layers, heads, kv_heads : int
        Layers, query heads and key heads. Under tensor parallelism `local` gives those of one process.
    head_dim, hidden, intermediate : int
        Numbers a head, and widths of the hidden states and of an MLP.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, config: Any, ranks: int = 1) -> Shape:
        """The shape of a transformers config; with tensor parallelism over so many `ranks`, what one of them holds.

        Raises
        ------
        ValueError
            The heads cannot be divided among the ranks.
        """
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if ranks < 1 or heads % ranks or kv_heads % ranks:
            raise InvalidValue(
                f"{heads} query heads and {kv_heads} key heads cannot be divided among {ranks} processes: "
                "choose a tensor parallel size that divides both"
            )
        return cls(
            layers=config.num_hidden_layers,
            heads=heads // ranks,
            kv_heads=kv_heads // ranks,
            head_dim=head_dim(config),
            hidden=config.hidden_size,
            intermediate=-(-config.intermediate_size // ranks),
        )


def local_heads(model: Any) -> Heads:
    """The heads of this process: the rows of the first ``q_proj`` and ``k_proj`` of a live model, and their place.

    Tensor parallelism gives rank r of n processes the heads from ``r * heads / n`` on.

    Parameters
    ----------
    model : torch.nn.Module
        With a transformers `config`.

    Raises
    ------
    ValueError
        The projections hold a part of the heads, and nothing tells which.
    """
    whole = Shape.of(model.config)
    attention = next((m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")), None)
    if attention is None:
        return Heads(whole.heads, whole.kv_heads)
    ranks, rank = _place(attention.q_proj, whole.heads * whole.head_dim)
    part = Shape.of(model.config, ranks)
    return Heads(part.heads, part.kv_heads, rank * part.heads)


def _place(projection: Any, rows: int) -> tuple[int, int]:
    """Among how many processes a projection of so many rows is divided, and which of its parts is here."""
    weight = projection.weight
    mesh = getattr(weight, "device_mesh", None)  # transformers' own tensor parallelism: a distributed tensor
    if mesh is not None:
        if "tp" in (mesh.mesh_dim_names or ()):
            return mesh["tp"].size(), mesh["tp"].get_local_rank()
        divided = mesh.ndim == 1 and any(place.is_shard(0) for place in weight.placements)
        return (mesh.size(), mesh.get_local_rank()) if divided else (1, 0)
    here = getattr(projection, "out_features", None) or weight.shape[0]
    if here == rows:
        return 1, 0
    from torch import distributed

    if not distributed.is_initialized() or rows % here:
        raise InvalidValue(
            f"q_proj has {here} of {rows} rows and no distributed tensor tells which: load the model with "
            "transformers' tensor parallelism (tp_plan), or set sparse='off'"
        )
    ranks = rows // here
    return ranks, distributed.get_rank() % ranks


def head_dim(config: Any) -> int:
    """Numbers a head of a transformers config, which need not say it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any) -> dict[str, Any]:
    """Rotary parameters of a transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) config."""
    return dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})


def trained_length(config: Any) -> int:
    """Trained length in tokens: that before YaRN stretched it, if the checkpoint says so."""
    rope = rope_parameters(config)
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def section(config: Any) -> Mapping[str, Any]:
    """The checkpoint's `dual_chunk_attention_config`, empty if there is none.

    Raises
    ------
    TypeError
        It is no mapping.
    """
    found = getattr(config, "dual_chunk_attention_config", None)
    if found is not None and not isinstance(found, Mapping):
        raise InvalidType(
            f"dual_chunk_attention_config must be a mapping, got {found!r:.80}: correct it in the checkpoint's "
            "config.json"
        )
    return found or {}


def settings_of(config: Any, chunk_size: Any = None) -> dict[str, Any]:
    """The values that a checkpoint gives to the fields of `LongContextConfig`.

    Without a `dual_chunk_attention_config`, `chunk_size` and `original_max_position_embeddings` are the trained length
    and `local_size` is a quarter of `chunk_size`.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    chunk_size : int, optional
        Overrides the checkpoint's; a `local_size` that the checkpoint does not give follows from it.

    Raises
    ------
    TypeError, ValueError
        The checkpoint's section is no mapping, or the model cannot use dual chunk attention.
    """
    refuse_unsupported(config)
    given = section(config)
    values = {key: given[key] for key in (*GEOMETRY_KEYS, *SPARSE_KEYS) if key in given}
    if "sparse_attention_last_q" in given:
        values["last_q"] = given["sparse_attention_last_q"]
    budgets = values.get("sparse_attention_config")
    if (
        isinstance(budgets, str) and budgets != "minference"
    ):  # a file beside the checkpoint, not in the working directory
        values["sparse_attention_config"] = str(Path(getattr(config, "name_or_path", "") or "") / budgets)
    trained = trained_length(config)
    if chunk_size is None:
        chunk_size = values.get("chunk_size", trained)
    defaults = {
        "chunk_size": chunk_size,
        "local_size": max(1, int(chunk_size) // 4) if isinstance(chunk_size, numbers.Integral) else chunk_size,
        "original_max_position_embeddings": trained,
    }
    return {**defaults, **values}


def refuse_unsupported(config: Any) -> None:
    """Raise ValueError for sliding-window layers and for a rotary base that changes with the length."""
    layer_types = getattr(config, "layer_types", None) or ()
    window = getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    if "sliding_attention" in layer_types or (window and not layer_types):
        raise InvalidValue(
            f"sliding-window layers (sliding_window={config.sliding_window}) cannot use dual chunk attention: "
            "set use_sliding_window=False in the config, or do not patch this model"
        )
    rope = rope_parameters(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in _UNBOUNDED_ROPE:
        raise InvalidValue(
            f"rope_type {rope_type!r} changes the rotary base with the length, which dual chunk attention replaces: "
            "set rope_type to 'default' (or 'yarn', 'linear')"
        )
