"""Shapes of checkpoints with random bf16 weights: right for time and memory, not for quality."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_longctx.shapes import known_config

NAMES = ("qwen2.5-7b", "qwen2.5-14b")  # of which the measurements take the 1M checkpoints
TRAINED = ("qwen2.5-0.5b", "qwen2.5-7b")  # that training is measured on
_TOY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROPE_THETA = 10_000_000.0


def model_config(tiny: bool = False, layers: int | None = None, shape: str = NAMES[0]) -> Qwen2Config:
    """Config of the 1M checkpoint of a shape, Qwen2.5-7B-Instruct-1M by default, or of a toy; all layers or some."""
    changed = {**(_TOY if tiny else {}), **({"num_hidden_layers": layers} if layers else {})}
    config = known_config(f"{shape}-1m", **changed)
    if getattr(config, "rope_parameters", None):
        config.rope_parameters["rope_theta"] = ROPE_THETA
    else:
        config.rope_theta = ROPE_THETA
    return config


def random_model(
    device: torch.device,
    tiny: bool = False,
    layers: int | None = None,
    shape: str = NAMES[0],
    own: range | None = None,
) -> Qwen2ForCausalLM:
    """`random_weights` of a `model_config`."""
    return random_weights(model_config(tiny, layers, shape), device, own)


def random_prompt(length: int, vocabulary: int) -> torch.Tensor:
    """Random token ids on the host, shape (1, length), int64: of a length and vocabulary always the same."""
    return torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def train_config(tiny: bool = False, shape: str = TRAINED[0]) -> Qwen2Config:
    """Config of the plain checkpoint of a shape, from which training starts, or of a toy."""
    return known_config(shape, **(_TOY if tiny else {}))


def draw_weights(model: nn.Module) -> None:
    """Draw all parameters, but for those on the meta device: normal (standard deviation 0.02), and norms are 1."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)


def random_weights(config: Qwen2Config, device: torch.device, own: range | None = None) -> Qwen2ForCausalLM:
    """A model of normal random weights (standard deviation 0.02), bf16, made on `device`.

    Of the layers only those with the numbers `own`, if it is given: the others are on the meta device.
    """
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model, base = model.eval().requires_grad_(False), model.model
    ends = [base.embed_tokens, base.norm, model.lm_head]
    for part in [model] if own is None else [*ends, *base.layers[own.start : own.stop]]:
        part.to_empty(device=device)
    model.tie_weights()  # which have parted on the way
    draw_weights(model)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
