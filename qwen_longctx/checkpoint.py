"""What the config of a checkpoint says: its geometry, its shape, and what dual chunk attention cannot do for it.

Everything here takes a transformers config as an object with attributes and imports no transformers.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_longctx.errors import InvalidType, InvalidValue

GEOMETRY_KEYS = ("chunk_size", "local_size", "original_max_position_embeddings")
SPARSE_KEYS = ("sparse_attention_threshold", "sparse_attention_config")
_UNBOUNDED_ROPE = ("dynamic", "longrope")


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
    def of(cls, config: Any) -> Shape:
        """The shape of the whole model of a transformers config."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim(config),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
        )


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
