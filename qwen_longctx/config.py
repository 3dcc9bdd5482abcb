"""What a run needs to know: read from the checkpoint, overridden by keyword, validated before any work starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

KERNELS = ("auto", "fa4", "flex", "sdpa", "reference")
SPARSE = ("off", "auto", "block_scores", "vertical_slash")
_LARGEST_BLOCK = 128
_SHARES = ("recall_target", "density", "mass", "score_threshold")
_TOKENS = (
    "chunk_size",
    "local_size",
    "original_max_position_embeddings",
    "prefill_chunk_size",
    "mlp_chunk_size",
    "sparse_attention_threshold",
    "last_q",
)
_CHECKPOINT_KEYS = ("chunk_size", "local_size", "original_max_position_embeddings")
_CHECKPOINT_SPARSE_KEYS = ("sparse_attention_threshold", "sparse_attention_config")
_UNBOUNDED_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class LongContextConfig:
    """Settings of dual chunk attention, of chunked prefill and of sparse prefill.

    Parameters
    ----------
    chunk_size : int
        Largest relative position the model ever sees, in tokens (``c`` of the Qwen2.5-1M report, section 5.1).
    local_size : int
        Tokens of the previous chunk whose distance stays exact (``w``). Keys rotate by ``position mod (c - w)``.
    original_max_position_embeddings : int
        Trained length, in tokens. The attention temperature starts beyond it.
    attention_temperature : bool
        Multiply logits by ``f²``, ``f = max(1, 0.1 ln(n / original_max_position_embeddings) + 1)``.
    prefill_chunk_size : int
        Tokens of a prompt that pass through the model at a time.
    mlp_chunk_size : int
        Tokens that pass through an MLP at a time.
    kernel : {"auto", "fa4", "flex", "sdpa", "reference"}
        Attention kernel; "auto" takes the fastest one that runs here. "fa4" and "flex" are for sparse prefill and run
        dense attention as "sdpa" does, which takes no block lists.
    sparse : {"off", "auto", "block_scores", "vertical_slash"}
        How prefill chooses keys. "auto" is "block_scores" where a fast kernel takes its lists, else dense.
    sparse_attention_threshold : int
        Prompts of more tokens are prefilled sparsely.
    last_q : int
        Queries at the end of a span on which recall is measured, and by which vertical-slash selects.
    block_size : int, optional
        Tokens a query tile and a key block of sparse prefill, a power of 2 that divides the stride; the largest such up
        to 128 if left out. "fa4" takes 128 only.
    sparse_attention_config : str, path or list, optional
        Budgets for vertical-slash: a file, its content, or "minference" for the file that package ships.
    recall_target : float, optional
        Share of the dense attention below which a head gets more than others; None is the rule's own.
    density, mass, score_threshold : float, optional
        What block scores keep, instead of their own choice: the best share of the blocks, of the scored mass, or what
        has this fraction of a tile's best score; `density` can limit the other two. Held for all heads, unless a
        `recall_target` is given too.

    Raises
    ------
    TypeError
        A field has the wrong type.
    ValueError
        A field is out of range.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int
    attention_temperature: bool = True
    prefill_chunk_size: int = 32768
    mlp_chunk_size: int = 2048
    kernel: str = "auto"
    sparse: str = "auto"
    sparse_attention_threshold: int = 32768
    last_q: int = 64
    block_size: int | None = None
    sparse_attention_config: Any = None
    recall_target: float | None = None
    density: float | None = None
    mass: float | None = None
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in _TOKENS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number of tokens, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1 token, got {value}")
        if self.block_size is not None and (isinstance(self.block_size, bool) or not isinstance(self.block_size, int)):
            raise TypeError(f"block_size must be a whole number of tokens, got {self.block_size!r}")
        if not isinstance(self.attention_temperature, bool):
            raise TypeError(f"attention_temperature must be True or False, got {self.attention_temperature!r}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.local_size >= self.chunk_size:
            raise ValueError(
                f"local_size ({self.local_size}) must be smaller than chunk_size ({self.chunk_size}): "
                "their difference is the stride of the chunks"
            )
        if self.local_size > self.stride:
            raise ValueError(
                f"local_size ({self.local_size}) must be at most half of chunk_size ({self.chunk_size}), "
                "or a query's exact window would reach past the previous chunk"
            )
        self._check_sparse()

    def _check_sparse(self) -> None:
        if self.sparse not in SPARSE:
            raise ValueError(f"sparse must be one of {', '.join(SPARSE)}, got {self.sparse!r}")
        given = {name: getattr(self, name) for name in _SHARES if getattr(self, name) is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value <= 1 or (name == "recall_target" and value == 1):
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if self.mass is not None and self.score_threshold is not None:
            raise ValueError("mass and score_threshold are given: a head's budget follows one of them")
        shares = [name for name in given if name != "recall_target"]
        if self.sparse == "vertical_slash" and shares:
            raise ValueError(f"{shares[0]} is a setting of block_scores, sparse is 'vertical_slash'")
        if not isinstance(self.sparse_attention_config, (str, Path, list, Mapping, NoneType)):
            raise TypeError(
                "sparse_attention_config must be a file, its content or 'minference', "
                f"got {self.sparse_attention_config!r:.80}"
            )
        if self.sparse in ("off", "auto"):
            return
        if self.kernel == "sdpa":
            raise ValueError(f"kernel='sdpa' takes no block lists, sparse is {self.sparse!r}: leave kernel at 'auto'")
        if not self.tile_fits:
            raise ValueError(
                f"sparse prefill needs blocks of a power of 2 from 32 on that divides chunk_size - local_size "
                f"({self.stride}), got {self.tile}: change block_size or local_size, or set sparse='off'"
            )

    @property
    def has_share(self) -> bool:
        """Whether a density, mass or threshold says what block scores keep."""
        return any(share is not None for share in (self.density, self.mass, self.score_threshold))

    @property
    def tile(self) -> int:
        """Tokens a query tile and a key block of sparse prefill."""
        return self.block_size or min(_LARGEST_BLOCK, self.stride & -self.stride)

    @property
    def tile_fits(self) -> bool:
        """Whether sparse prefill can work in such tiles: a power of 2 from 32 on that divides the stride."""
        return self.tile >= 32 and self.tile & (self.tile - 1) == 0 and self.stride % self.tile == 0

    @property
    def stride(self) -> int:
        """Length of a chunk in tokens, ``s = chunk_size - local_size``."""
        return self.chunk_size - self.local_size

    def temperature(self, length: int) -> float:
        """Factor ``f²`` on the logits of a sequence of `length` tokens (Qwen2.5-1M report, equation 1)."""
        if not self.attention_temperature or length <= self.original_max_position_embeddings:
            return 1.0
        return (0.1 * math.log(length / self.original_max_position_embeddings) + 1.0) ** 2

    @classmethod
    def from_model_config(cls, config: Any, **overrides: Any) -> LongContextConfig:
        """Read a transformers config; keyword overrides win.

        Without ``dual_chunk_attention_config`` in the checkpoint, `chunk_size` and
        `original_max_position_embeddings` are the trained length and `local_size` is a quarter of `chunk_size`.

        Parameters
        ----------
        config : transformers.PretrainedConfig
            Config of a Qwen2, Qwen2-MoE, Qwen3 or Qwen3-MoE checkpoint.
        **overrides
            Fields of this class.

        Raises
        ------
        TypeError
            An override or a key of the checkpoint's section is unknown or has the wrong type.
        ValueError
            A value is out of range, or the checkpoint has sliding-window layers or a length-dependent rotary base.
        """
        check_overrides(overrides)
        _refuse_unsupported(config)
        values = {**_from_checkpoint(config, overrides), **overrides}
        return cls(**values)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise TypeError if a keyword is not a field of `LongContextConfig`."""
    known = [field.name for field in fields(LongContextConfig)]
    for name in overrides:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}: the settings are {', '.join(known)}")


def _from_checkpoint(config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    section = getattr(config, "dual_chunk_attention_config", None)
    if section is not None and not isinstance(section, Mapping):
        raise TypeError(f"dual_chunk_attention_config must be a mapping, got {section!r}")
    section = section or {}
    values = {key: section[key] for key in (*_CHECKPOINT_KEYS, *_CHECKPOINT_SPARSE_KEYS) if key in section}
    if "sparse_attention_last_q" in section:
        values["last_q"] = section["sparse_attention_last_q"]
    trained = _trained_length(config)
    chunk_size = overrides.get("chunk_size", values.get("chunk_size", trained))
    defaults = {
        "chunk_size": chunk_size,
        "local_size": max(1, chunk_size // 4) if isinstance(chunk_size, int) else chunk_size,
        "original_max_position_embeddings": trained,
    }
    return {**defaults, **values}


def _trained_length(config: Any) -> int:
    """Trained length: that before YaRN stretched it, if the checkpoint says so."""
    rope = rope_parameters(config)
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def head_dim(config: Any) -> int:
    """Numbers a head of a transformers config, which need not say it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any) -> dict[str, Any]:
    """Rotary parameters of a transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) config."""
    return dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})


def _refuse_unsupported(config: Any) -> None:
    layer_types = getattr(config, "layer_types", None) or ()
    window = getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    if "sliding_attention" in layer_types or (window and not layer_types):
        raise ValueError(
            f"sliding-window layers (sliding_window={config.sliding_window}) cannot use dual chunk attention: "
            "set use_sliding_window=False in the config, or do not patch this model"
        )
    rope = rope_parameters(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in _UNBOUNDED_ROPE:
        raise ValueError(
            f"rope_type {rope_type!r} changes the rotary base with the length, which dual chunk attention replaces: "
            "set rope_type to 'default' (or 'yarn', 'linear')"
        )
