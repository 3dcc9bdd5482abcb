"""The shape of Qwen2.5-7B with random bf16 weights: right for time and memory, not for quality."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPE_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1_010_000,
}
SHAPE_TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1_010_000,
}
GEOMETRY_1M = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
ROPE_THETA = 10_000_000.0


def model_config(tiny: bool = False, layers: int | None = None) -> Qwen2Config:
    """Config of Qwen2.5-7B-Instruct-1M, or of a toy for tests; all layers or some."""
    shape = SHAPE_TINY if tiny else SHAPE_7B
    config = Qwen2Config(
        **{**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]},
        dual_chunk_attention_config=GEOMETRY_1M,
        tie_word_embeddings=False,
    )
    if getattr(config, "rope_parameters", None):
        config.rope_parameters["rope_theta"] = ROPE_THETA
    else:
        config.rope_theta = ROPE_THETA
    return config


def random_model(device: torch.device, tiny: bool = False, layers: int | None = None) -> Qwen2ForCausalLM:
    """The shape with normal random weights (standard deviation 0.02), bf16, made on `device`."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(model_config(tiny, layers)).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
