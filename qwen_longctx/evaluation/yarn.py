"""YaRN (arXiv 2309.00071) on a loaded model, as the model cards of Qwen write it into a checkpoint's config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_longctx.checkpoint import rope_parameters, trained_length
from qwen_longctx.errors import InvalidValue

FACTOR = 4.0  # of the model cards: 32,768 trained tokens become 131,072
_STRETCHABLE = ("default", "yarn")


def default_factor(trained: int, length: int) -> float:
    """The factor at a length: `FACTOR`, and as much as the length needs beyond so many times the trained length."""
    return max(FACTOR, length / trained)


def check(config: Any) -> None:
    """Refuse a config whose rotary embedding is stretched in another way.

    Raises
    ------
    InvalidValue
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _STRETCHABLE:
        raise InvalidValue(
            f"mode yarn stretches plain rotary embeddings, and those of the checkpoint are of type {kind!r} already: "
            "leave the mode out"
        )


def with_yarn(config: Any, factor: float) -> Any:
    """A deep copy of a transformers config, with YaRN in it.

    `max_position_embeddings` is stretched too: transformers up to 4 derives the factor from it.
    """
    stretched, trained = copy.deepcopy(config), trained_length(config)
    known = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": trained}
    stretched.max_position_embeddings = round(factor * trained)
    if hasattr(config, "rope_parameters"):  # from transformers 5 on
        theta = rope_parameters(config).get("rope_theta", getattr(config, "rope_theta", None))
        stretched.rope_parameters = {**({} if theta is None else {"rope_theta": theta}), **known}
    else:
        stretched.rope_scaling = known
    return stretched


@contextmanager
def stretched(model: Any, factor: float) -> Iterator[None]:
    """Give a model the rotary embedding of YaRN for the length of a block, and then its own module back.

    The module is of the class of the model's own and brings the factor that YaRN has on the logits.
    """
    decoder = model.get_decoder()
    before = decoder.rotary_emb
    decoder.rotary_emb = type(before)(with_yarn(model.config, factor)).to(before.inv_freq.device)
    try:
        yield
    finally:
        decoder.rotary_emb = before
