"""What a run will need, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import DoesNotFit, InvalidValue
from qwen_longctx.ops.merge import TOKENS_AT_A_TIME
from qwen_longctx.sparsity.rules.block_scores import MEANS_A_BLOCK

GIB = 1 << 30
_BYTES_A_PAIR = 4 + 1 + 2 * 4  # score, mask, and the lists of all segments with what they are made from


@dataclass(frozen=True)
class Memory:
    """Bytes of one run. `activations` is the estimated peak within one prefill chunk."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.kv_cache + self.activations


def estimate(config: Any, tokens: int, batch: int, dtype: torch.dtype, settings: LongContextConfig) -> Memory:
    """Estimate a run of `batch` rows of `tokens` tokens, prompt and new ones together, in one process.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    tokens, batch : int
    dtype : torch.dtype
        Of weights, cache and activations.
    settings : LongContextConfig

    Raises
    ------
    ValueError
        `tokens` or `batch` is below 1, or no model can be built of the config.
    """
    if tokens < 1 or batch < 1:
        raise InvalidValue(f"tokens and batch must be at least 1, got {tokens} and {batch}")
    shape = Shape.of(config)
    return Memory(
        _parameters(config) * dtype.itemsize,
        kv_bytes(shape, dtype) * tokens * batch,
        activation_bytes(shape, tokens, batch, dtype, settings),
    )


def _parameters(config: Any) -> int:
    """Numbers in the weights of a model, which is built without them."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # whatever transformers makes of a config that it has not checked
        raise InvalidValue(
            f"transformers cannot build a model of this config ({type(error).__name__}: {error}): correct config.json"
        ) from error


def kv_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of one row leaves in the cache."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


def activation_bytes(shape: Shape, tokens: int, batch: int, dtype: torch.dtype, settings: LongContextConfig) -> int:
    """Peak of one prefill chunk: the larger of attention and MLP, beside hidden states, residual and norm."""
    rows = min(tokens, settings.prefill_chunk_size) * batch
    queries = shape.heads * shape.head_dim
    stream = 3 * rows * shape.hidden * dtype.itemsize
    projected = rows * (2 * queries + 4 * shape.kv_heads * shape.head_dim) * dtype.itemsize
    partial = 4 * rows * queries * dtype.itemsize  # three segments' results and their merge
    sums = 2 * min(rows, TOKENS_AT_A_TIME * batch) * queries * 4
    partial += _sparse_bytes(shape, tokens, batch, dtype, settings)
    mlp = min(rows, settings.mlp_chunk_size * batch) * shape.intermediate * 4 * dtype.itemsize
    return stream + max(projected + partial + sums, mlp + rows * shape.hidden * dtype.itemsize)


def _sparse_bytes(shape: Shape, tokens: int, batch: int, dtype: torch.dtype, settings: LongContextConfig) -> int:
    """Means of keys of all layers; scores, mask and lists of one chunk of one layer."""
    if settings.sparse == "off" or tokens <= settings.sparse_attention_threshold:
        return 0
    means = kv_bytes(shape, dtype) // 2 * tokens * batch * MEANS_A_BLOCK // settings.tile
    tiles, blocks = (-(-n // settings.tile) for n in (min(tokens, settings.prefill_chunk_size), tokens))
    return means + batch * shape.heads * tiles * blocks * _BYTES_A_PAIR


def check_fits(
    shape: Shape, tokens: int, batch: int, dtype: torch.dtype, free_bytes: int, settings: LongContextConfig
) -> None:
    """Raise before a run whose cache and activations cannot fit beside weights that are loaded already.

    Parameters
    ----------
    shape : Shape
        Of what one process holds, see `checkpoint.local_shape`.
    tokens, batch : int
        Prompt and new tokens of a row, and rows.
    dtype : torch.dtype
    free_bytes : int
        On the device of this process.
    settings : LongContextConfig

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes free and the tokens that would fit.
    """
    cache = kv_bytes(shape, dtype) * tokens * batch
    activations = activation_bytes(shape, tokens, batch, dtype, settings)
    if cache + activations <= free_bytes:
        return
    fit = max(0, free_bytes - activations) // (kv_bytes(shape, dtype) * batch)
    raise DoesNotFit(
        f"{batch} x {tokens:,} tokens need {cache / GIB:.1f} GiB of KV cache and about {activations / GIB:.1f} GiB of "
        f"activations, {free_bytes / GIB:.1f} GiB are free: {fit:,} tokens would fit. Shorten the prompt or "
        "max_new_tokens, lower prefill_chunk_size or the number of beams, or spread the model with device_map"
    )
