"""What a checkpoint asks of dual chunk attention in vLLM, and what vLLM cannot give it.

Configs of vLLM are taken as objects with attributes, so nothing here imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qwen_longctx import checkpoint
from qwen_longctx.config import Geometry, LongContextConfig
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.sparsity import check_budgets

SECTION = "dual_chunk_attention_config"
FAMILIES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_TEMPERATURE = "attention_temperature"
_ENABLED = "sparse_attention_enabled"
_OF_CHECKPOINTS = (_ENABLED, *(f"sparse_attention_{name}" for name in ("threshold", "last_q", "config")))
_OURS = ("sparse", "fidelity", "density", "mass", "score_threshold", "block_size", "kernel")  # of `LongContextConfig`
_LEAST_PAGE = 16  # tokens, of vLLM's backends
_PLAIN = ("auto", "bfloat16", "float16", "float32", "half", "float")  # dtypes of a cache that is not quantised


@dataclass(frozen=True)
class DualChunk:
    """Settings and rotary frequencies of a model.

    Attributes
    ----------
    settings : LongContextConfig
    base : float
        Rotary base, ``rope_theta``.
    head_dim : int
        Numbers a head.
    """

    settings: LongContextConfig
    base: float
    head_dim: int

    @property
    def geometry(self) -> Geometry:
        """Chunks and the attention temperature."""
        return self.settings.geometry

    def in_steps_of(self, tokens: int) -> DualChunk:
        """The same for an engine that reads up to so many tokens in a step."""
        return replace(self, settings=replace(self.settings, prefill_chunk_size=tokens))

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """Rotary frequencies, shape (head_dim / 2,), float32, computed as transformers does."""
        share = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        return 1.0 / (self.base**share)

    def check_page_size(self, page_size: int) -> None:
        """Refuse pages over which the border between two chunks can run.

        Raises
        ------
        ValueError
        """
        stride = self.geometry.stride
        if stride % page_size:
            largest = stride & -stride
            way = f"start vLLM with --block-size {largest}" if largest >= _LEAST_PAGE else "choose another local_size"
            raise InvalidValue(
                f"pages of {page_size} tokens do not divide the {stride} tokens of a chunk (chunk_size - local_size): "
                + way
            )


def uses_dual_chunk(config: Any) -> bool:
    """Whether a config of transformers asks for dual chunk attention."""
    return getattr(config, SECTION, None) is not None


def long_context(config: Any) -> LongContextConfig:
    """The settings in the section of a checkpoint's config, or of ``--hf-overrides``.

    Without `sparse` in the section, prefill is sparse where the checkpoint says so (`sparse_attention_enabled`, or that
    there are budgets) and a fast kernel takes block lists.

    Raises
    ------
    TypeError, ValueError
        A key is absent, unknown or has a wrong value.
    FileNotFoundError
        Prefill shall go by budgets that the checkpoint does not have.
    NotImplementedError
        The attention temperature shall go by the length of the prompt, which the engine does not know, or sparse
        prefill be steered from step to step.
    """
    section = dict(checkpoint.section(config))
    absent = [key for key in checkpoint.GEOMETRY_KEYS if key not in section]
    if absent:
        raise InvalidValue(
            f"{SECTION} lacks {', '.join(absent)}: give all of {', '.join(checkpoint.GEOMETRY_KEYS)} in config.json or "
            "--hf-overrides"
        )
    known = (*checkpoint.GEOMETRY_KEYS, _TEMPERATURE, *_OF_CHECKPOINTS, *_OURS)
    for key in section:
        if key == "recall_target":
            raise Unsupported(
                f"{key} steers sparse prefill from one part of a prompt to the next, and the engine keeps nothing "
                "between them: leave it out, and choose a fidelity"
            )
        if key not in known:
            raise InvalidType(f"unknown key {key!r} in {SECTION}: the keys are {', '.join(known)}")
    heat = section.get(_TEMPERATURE, "position")
    if heat is True:
        raise Unsupported(
            f"{_TEMPERATURE} true goes by the length of the whole prompt, which the engine does not know: set "
            '"position" or false'
        )
    enabled = section.get(_ENABLED, bool(section.get("sparse_attention_config")))
    if not isinstance(enabled, bool):
        raise InvalidType(f"{_ENABLED} must be true or false, got {enabled!r}")
    given = {key: section[key] for key in _OURS if key in section}
    settings = LongContextConfig(
        **{
            **checkpoint.settings_of(config),
            "sparse": "auto" if enabled else "off",
            **given,
            _TEMPERATURE: heat,
        }
    )
    check_budgets(settings, config)
    return settings


def settings_of(config: Any) -> DualChunk:
    """Read a config of transformers that asks for dual chunk attention (`uses_dual_chunk`).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        It asks for what cannot be done; see `long_context`.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise Unsupported(
            f"{SECTION} is for models of the types {', '.join(FAMILIES)}, this one is {family!r}: remove the section "
            "from config.json or --hf-overrides"
        )
    checkpoint.refuse_unsupported(config)
    rope = checkpoint.rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InvalidValue(
            f"rope_type {kind!r} stretches positions, and so does dual chunk attention: leave the rope scaling out of "
            f"config.json and --hf-overrides, or {SECTION}"
        )
    base = rope.get("rope_theta", getattr(config, "rope_theta", None))
    if base is None:
        raise InvalidValue("the checkpoint's config has no rope_theta: correct config.json")
    return DualChunk(long_context(config), float(base), checkpoint.head_dim(config))


def refuse_engine(config: Any) -> None:
    """Refuse what this plugin does not do, before weights are loaded.

    Parameters
    ----------
    config : vllm.config.VllmConfig

    Raises
    ------
    NotImplementedError, ValueError
    """
    refuse_cache(config.cache_config.cache_dtype)
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(config.parallel_config, option, 1) > 1:
            raise Unsupported(
                f"{option} {getattr(config.parallel_config, option)} spreads the keys of a sequence over devices, "
                "which dual chunk attention does not do: leave it at 1, and use --tensor-parallel-size"
            )


def refuse_cache(dtype: Any) -> None:
    """Refuse keys and values that are not held as they are.

    Raises
    ------
    NotImplementedError
    """
    stored = str(dtype).removeprefix("torch.")
    if stored not in _PLAIN:
        raise Unsupported(
            f"dual chunk attention needs keys in the dtype of the model, and the KV cache is {stored!r}: start vLLM "
            "with --kv-cache-dtype auto, or bfloat16 where the checkpoint itself quantises its cache"
        )
