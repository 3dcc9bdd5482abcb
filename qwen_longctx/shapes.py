"""Sizes of well-known checkpoints, as their config.json has them: a run can be planned without the checkpoint."""

from __future__ import annotations

from typing import Any

from qwen_longctx.errors import InvalidValue

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LONG = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def _dense(
    family: str,
    sizes: tuple[int, int, int, int, int],
    *,
    tied: bool = False,
    vocabulary: int = 151936,
    trained: int = 32768,
    **others: Any,
) -> dict[str, Any]:
    return {
        "model_type": family,
        **dict(zip(_SIZES, sizes, strict=True)),
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": trained,
        **({} if family == "qwen2" else {"head_dim": 128}),
        **others,
    }


def _experts(sizes: tuple[int, int, int, int, int], width: int, trained: int = 40960) -> dict[str, Any]:
    experts: dict[str, Any] = {"moe_intermediate_size": width, "num_experts": 128, "num_experts_per_tok": 8}
    return _dense("qwen3_moe", sizes, trained=trained, **experts, decoder_sparse_step=1)


_QWEN25_7B = (3584, 18944, 28, 28, 4)
_QWEN25_14B = (5120, 13824, 48, 40, 8)
_QWEN3_4B = (2560, 9728, 36, 32, 8)
_QWEN3_30B = (2048, 6144, 48, 32, 4)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _dense("qwen2", (896, 4864, 24, 14, 2), tied=True),
    "qwen2.5-1.5b": _dense("qwen2", (1536, 8960, 28, 12, 2), tied=True),
    "qwen2.5-3b": _dense("qwen2", (2048, 11008, 36, 16, 2), tied=True),
    "qwen2.5-7b": _dense("qwen2", _QWEN25_7B, vocabulary=152064),
    "qwen2.5-7b-1m": _dense(
        "qwen2", _QWEN25_7B, vocabulary=152064, trained=1_010_000, dual_chunk_attention_config=_LONG
    ),
    "qwen2.5-14b": _dense("qwen2", _QWEN25_14B, vocabulary=152064),
    "qwen2.5-14b-1m": _dense(
        "qwen2", _QWEN25_14B, vocabulary=152064, trained=1_010_000, dual_chunk_attention_config=_LONG
    ),
    "qwen2.5-32b": _dense("qwen2", (5120, 27648, 64, 40, 8), vocabulary=152064),
    "qwen2.5-72b": _dense("qwen2", (8192, 29568, 80, 64, 8), vocabulary=152064),
    "qwen3-0.6b": _dense("qwen3", (1024, 3072, 28, 16, 8), tied=True, trained=40960),
    "qwen3-1.7b": _dense("qwen3", (2048, 6144, 28, 16, 8), tied=True, trained=40960),
    "qwen3-4b": _dense("qwen3", _QWEN3_4B, tied=True, trained=40960),
    "qwen3-4b-2507": _dense("qwen3", _QWEN3_4B, tied=True, trained=262144),
    "qwen3-8b": _dense("qwen3", (4096, 12288, 36, 32, 8), trained=40960),
    "qwen3-14b": _dense("qwen3", (5120, 17408, 40, 40, 8), trained=40960),
    "qwen3-32b": _dense("qwen3", (5120, 25600, 64, 64, 8), trained=40960),
    "qwen3-30b-a3b": _experts(_QWEN3_30B, 768),
    "qwen3-30b-a3b-2507": _experts(_QWEN3_30B, 768, trained=262144),
    "qwen3-235b-a22b": _experts((4096, 12288, 94, 64, 4), 1536),
}


def known_config(name: str, **changed: Any) -> Any:
    """The transformers config of a well-known shape, by its name in any case; with other sizes where they are given.

    Raises
    ------
    ValueError
        There is no such name.
    """
    from transformers import AutoConfig

    if name.lower() not in SHAPES:
        raise InvalidValue(f"{name!r} is no known shape: name one of {', '.join(SHAPES)}, or give a config")
    return AutoConfig.for_model(**{**SHAPES[name.lower()], **changed})
