"""Arithmetic of a step, and the share of a card that it makes use of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# bf16, dense, 10¹² a second, as the data sheets of the cards say; matched by the first name that the card's contains
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 5090": 209.0,
}


def model_flops(model: nn.Module, config: Any, tokens: int, pairs: int) -> int:
    """Operations of forward and backward that the model asks for, whatever is computed twice.

    A product with a matrix takes 2 a number and token forward, 2 for the gradient of its input, and 2 more if the
    matrix learns. Attention takes 4 a pair and number of a head forward, and twice that backward.

    Parameters
    ----------
    model : torch.nn.Module
        With its adapters.
    config : transformers.PretrainedConfig
    tokens : int
    pairs : int
        Pairs of a query and a key that it attends to, see `Documents.pairs`.
    """
    from qwen_longctx.checkpoint import Shape

    shape = Shape.of(config)
    linear = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight is not None:
            linear += weight.numel() * (6 if weight.requires_grad else 4)
    attention = 12 * shape.layers * shape.heads * shape.head_dim
    return linear * tokens + attention * pairs


def peak_of(device: torch.device) -> tuple[str, float] | None:
    """Name of the card, and operations a second in bf16 by its data sheet; None if that is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(((name, 1e12 * peak) for key, peak in PEAKS.items() if key in name), None)
