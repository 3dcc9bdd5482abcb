"""What the config of a checkpoint says: its geometry, its shape, and what dual chunk attention cannot do for it.

Everything here takes a transformers config as an object with attributes and imports no transformers.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.stage import stage_of

GEOMETRY_KEYS = ("chunk_size", "local_size", "original_max_position_embeddings")
SPARSE_KEYS = ("sparse_attention_threshold", "sparse_attention_config")
_UNBOUNDED_ROPE = ("dynamic", "longrope")
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
_KV_HEADS = "num_key_value_heads"
_EXPERTS = "num_experts_per_tok"


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
        Layers, query heads and key heads; of `local_shape` those of one process.
    head_dim, hidden, intermediate : int
        Numbers a head, and widths of the hidden states and of an MLP.
    experts_a_token : int
        Experts that every token passes through; 0 without experts.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    experts_a_token: int = 0

    @classmethod
    def of(cls, config: Any, ranks: int = 1) -> Shape:
        """The shape of a transformers config; with tensor parallelism over so many `ranks`, what one of them holds.

        Raises
        ------
        ValueError
            A size is absent or no positive whole number, or the heads cannot be divided among the ranks.
        """
        layers, heads, hidden, intermediate = (_size(config, name) for name in _SIZES)
        kv_heads = heads if getattr(config, "num_key_value_heads", None) is None else _size(config, _KV_HEADS)
        if heads % kv_heads:
            raise InvalidValue(
                f"{_KV_HEADS} ({kv_heads}) of the checkpoint's config must divide num_attention_heads ({heads}): "
                "correct config.json"
            )
        if ranks < 1 or heads % ranks or kv_heads % ranks:
            raise InvalidValue(
                f"{heads} query heads and {kv_heads} key heads cannot be divided among {ranks} processes: "
                "choose a tensor parallel size that divides both"
            )
        dim = head_dim(config)
        if dim < 2 or dim % 2:
            raise InvalidValue(
                f"a head of the checkpoint has {dim} numbers, and rotary positions need an even number from 2 on: "
                "correct head_dim, hidden_size or num_attention_heads in config.json"
            )
        experts = _size(config, _EXPERTS) if getattr(config, _EXPERTS, None) is not None else 0
        return cls(layers, heads // ranks, kv_heads // ranks, dim, hidden, -(-intermediate // ranks), experts)


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InvalidValue(
            f"{name} of the checkpoint's config must be a whole number from 1 on, got {value!r:.80}: "
            "correct config.json"
        )
    return int(value)


def local_shape(model: Any) -> Shape:
    """The shape of what this process holds of a live model: a part of the heads, or of the layers, among several."""
    shape, base = Shape.of(model.config, _place(model)[0]), getattr(model, "model", model)
    stage = stage_of(base)
    return shape if stage is None else replace(shape, layers=stage.stop - stage.first)


def local_heads(model: Any) -> Heads:
    """The heads of this process: the rows of the first ``q_proj`` of a live model, and their place.

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
    ranks, rank = _place(model)
    part = Shape.of(model.config, ranks)
    if rank is None:
        raise InvalidValue(
            f"q_proj holds {part.heads} of {ranks * part.heads} heads and no distributed tensor tells which: load the "
            "model with transformers' tensor parallelism (tp_plan), or set sparse='off'"
        )
    return Heads(part.heads, part.kv_heads, rank * part.heads)


def _place(model: Any) -> tuple[int, int | None]:
    """Among how many processes the heads are divided, and the number of this one; None if nothing tells it."""
    projection = next((m.q_proj for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")), None)
    if projection is None:
        return 1, 0
    weight = getattr(projection, "weight", None)  # quantised layers may have none
    mesh = getattr(weight, "device_mesh", None)  # transformers' own tensor parallelism: a distributed tensor
    if weight is not None and mesh is not None:
        if "tp" in (mesh.mesh_dim_names or ()):
            return mesh["tp"].size(), mesh["tp"].get_local_rank()
        divided = mesh.ndim == 1 and any(place.is_shard(0) for place in weight.placements)
        return (mesh.size(), mesh.get_local_rank()) if divided else (1, 0)
    whole = Shape.of(model.config)
    rows = whole.heads * whole.head_dim
    here = getattr(projection, "out_features", None) or (rows if weight is None else weight.shape[0])
    ranks = -(-rows // here)
    if ranks == 1:
        return 1, 0
    from torch import distributed

    return ranks, distributed.get_rank() % ranks if distributed.is_initialized() and rows % here == 0 else None


def head_dim(config: Any) -> int:
    """Numbers a head of a transformers config, which need not say it."""
    said = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if said is None else said


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
    if isinstance(given.get("sparse_attention_config"), str) and given["sparse_attention_config"] != "minference":
        del values["sparse_attention_config"]  # names a file beside the checkpoint, which `budgets.own_file` looks for
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
