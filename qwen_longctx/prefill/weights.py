"""Bytes of a checkpoint's weights, by layer, from its config alone: quantised ones count by their bits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qwen_longctx.errors import InvalidValue, Unsupported
from qwen_longctx.ops.fp8 import MULTIPLE

_ABSMAX_BLOCK = 64  # weights that share a scale in bitsandbytes' 4 bits
_DOUBLE_BLOCK = 256  # such scales that share one of their own
_KEPT = "lm_head"  # every method leaves it as it is unless told otherwise

Matrix = Callable[[int, int], float]  # bytes of a quantised matrix of so many rows (outputs) and columns (inputs)


class Weights(NamedTuple):
    """Bytes of the decoder layers, one by one, of the embeddings, and of what follows the layers."""

    layers: tuple[int, ...]
    embeddings: int
    head: int

    @property
    def total(self) -> int:
        """All together. A head that shares its weights with the embeddings takes none of its own."""
        return sum(self.layers) + self.embeddings + self.head

    def on_cards(self, cards: int) -> list[tuple[int, int]]:
        """Layers of each card and bytes of their weights, layers dealt out in order and as evenly as they go.

        Embeddings lie on the first card, the head on the last; with more cards than layers some hold nothing.
        """
        used = min(cards, len(self.layers))
        share, more = divmod(len(self.layers), used)
        found, first = [], 0
        for card in range(used):
            count = share + (card < more)
            size = sum(self.layers[first : first + count])
            size += (card == 0) * self.embeddings + (card == used - 1) * self.head
            found.append((count, size))
            first += count
        return found


def weights_of(config: Any, dtype: torch.dtype, linear: str = "auto", model: Any = None) -> Weights:
    """Weights of the model of a transformers config, which is built without them.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        With ``quantization_config`` where the checkpoint is quantised. All experts are held.
    dtype : torch.dtype
        Of what is not quantised.
    linear : {"auto", "fp8"}
        The setting of that name. Weights that are quantised already stay as they are.
    model : transformers.PreTrainedModel, optional
        What `without_weights` has built of the config.

    Raises
    ------
    ValueError
        No model can be built of the config.
    NotImplementedError
        It is quantised by a method whose bytes are not known here.
    """
    section = getattr(config, "quantization_config", None)
    quantised = _CAST if linear == "fp8" and section is None else _Quantisation.of(section)
    model = without_weights(config) if model is None else model
    base = model.model
    layers = tuple(_bytes([layer], f"model.layers.{at}", dtype, quantised) for at, layer in enumerate(base.layers))
    embeddings = _bytes([base.embed_tokens], "model.embed_tokens", dtype, quantised)
    after = [base.norm] if config.tie_word_embeddings else [base.norm, model.lm_head]
    head = _bytes(after, _KEPT, dtype, quantised)
    return Weights(layers, embeddings, head)


def without_weights(config: Any) -> Any:
    """The model of a config, on the meta device.

    Raises
    ------
    ValueError
        None can be built.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers makes of a config that it has not checked
        raise InvalidValue(
            f"transformers cannot build a model of this config ({type(error).__name__}: {error}): correct config.json"
        ) from error


class _Quantisation(NamedTuple):
    """Which matrices are quantised, and what one takes."""

    matrix: Matrix | None
    kept: tuple[re.Pattern[str], ...] = ()
    experts: bool = True  # those that transformers holds in one tensor of all

    @classmethod
    def of(cls, section: Any) -> _Quantisation:
        if section is None:
            return cls(None)
        method: Any = None
        try:
            given = section if isinstance(section, Mapping) else section.to_dict()
            method = getattr(given["quant_method"], "value", given["quant_method"])
            matrix = _METHODS[method](given)
            matrix(128, 128)
            lists = (given.get(name) or () for name in ("modules_to_not_convert", "llm_int8_skip_modules", "ignore"))
            kept = tuple(_pattern(name) for names in lists for name in names) + (_pattern(_KEPT),)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
            raise Unsupported(
                f"the checkpoint is quantised (method {method!r:.40}) in a way whose bytes are not known here: plan "
                "with the config of the checkpoint before it was quantised, and subtract what its weights take less"
            ) from error
        return cls(matrix, kept, method != "bitsandbytes")

    def takes(self, name: str) -> bool:
        """Whether the module called `name` is quantised."""
        return self.matrix is not None and not any(pattern.search(name) for pattern in self.kept)


def _cast(rows: int, columns: int) -> float:
    """A matrix under ``linear="fp8"``: a byte a number and a float32 a row, or bf16 where its widths do not fit."""
    fits = rows % MULTIPLE == 0 == columns % MULTIPLE
    return rows * columns + 4 * rows if fits else 2 * rows * columns


# routers and experts, which are no layers of attention or of a plain MLP, stay
_CAST = _Quantisation(_cast, (re.compile(r"lm_head|experts?\b|gate$"),), experts=False)


def _pattern(name: str) -> re.Pattern[str]:
    """What matches the names of modules that `name` leaves out: an expression behind ``re:``, or a part of the name."""
    return re.compile(f"^{name[3:]}" if name.startswith("re:") else rf"(^|\.){re.escape(name)}($|\.)")


def _bytes(modules: list[nn.Module], name: str, dtype: torch.dtype, quantised: _Quantisation) -> int:
    total = 0.0
    for module in modules:
        for inner, part in module.named_modules(prefix=name):
            for parameter in part.parameters(recurse=False):
                expert = parameter.ndim == 3 and quantised.experts
                matrix = parameter.ndim == 2 and isinstance(part, nn.Linear)
                if (expert or matrix) and quantised.matrix is not None and quantised.takes(inner):
                    total += math.prod(parameter.shape[:-2]) * quantised.matrix(*parameter.shape[-2:])
                else:
                    total += parameter.numel() * dtype.itemsize
    return math.ceil(total)


def _bitsandbytes(given: Mapping[str, Any]) -> Matrix:
    if given.get("load_in_4bit"):
        scale = 1 + 4 / _DOUBLE_BLOCK if given.get("bnb_4bit_use_double_quant") else 4
        return lambda rows, columns: rows * columns * (0.5 + scale / _ABSMAX_BLOCK)
    if given.get("load_in_8bit"):
        return lambda rows, columns: rows * columns + 4 * rows
    raise ValueError


def _grouped(given: Mapping[str, Any]) -> Matrix:
    """GPTQ and AWQ: scales in half precision, and zero points, for every group of inputs; GPTQ also their order."""
    bits, size = _bits(given["bits"]), int(given.get("group_size", 128))
    order = 4 if given["quant_method"] == "gptq" else 0

    def matrix(rows: int, columns: int) -> float:
        groups = 1 if size < 1 else -(-columns // size)
        return rows * columns * bits / 8 + groups * rows * (2 + bits / 8) + order * columns

    return matrix


def _fp8(given: Mapping[str, Any]) -> Matrix:
    """One byte each, and a float32 for every block of weights."""
    high, wide = given.get("weight_block_size") or (1, 1 << 62)
    return lambda rows, columns: rows * columns + 4 * -(-rows // high) * -(-columns // wide)


def _compressed(given: Mapping[str, Any]) -> Matrix:
    """compressed-tensors, where all groups of modules agree."""
    groups = [(one["weights"]["num_bits"], one["weights"].get("group_size")) for one in given["config_groups"].values()]
    ((bits, size),) = set(groups)
    bits = _bits(bits)
    return lambda rows, columns: rows * columns * bits / 8 + 2 * rows * (-(-columns // size) if size else 1)


def _bits(value: Any) -> int:
    if isinstance(value, bool) or value not in range(1, 17):
        raise ValueError(value)
    return int(value)


_METHODS: dict[str, Callable[[Mapping[str, Any]], Matrix]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _grouped,
    "awq": _grouped,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}
