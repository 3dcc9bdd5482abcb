"""What tells a model from others: its config, what its layers rotate by, and a few numbers of every weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qwen_longctx.checkpoint import Shape, local_shape, rope_parameters
from qwen_longctx.errors import InvalidType, Unsupported

# of a config: what the keys and values of a text depend on, beside the weights. What a config lacks is left out
_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "shared_expert_intermediate_size",
)
_SAMPLES = 64  # numbers of a weight
_COMPILED = "_orig_mod."  # in the names of modules within one that torch.compile has wrapped
_CLOSE = 1e-5  # frequencies worked out on another device or by another release differ by rounding


def base_of(model: Any) -> Any:
    """The base model, of embedding and layers, in any model that holds one.

    Raises
    ------
    TypeError
        There is none.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if {"embed_tokens", "layers", "rotary_emb"} <= dict(module.named_children()).keys():
                return module
    raise InvalidType(f"model must be a Qwen model of transformers, got {type(model).__name__}")


def fingerprint(base: Any) -> dict[str, Any]:
    """What tells a base model from others, of JSON's types; `differences` compares two.

    Raises
    ------
    NotImplementedError
        This process holds a part of the model's heads or layers.
    """
    if local_shape(base) != Shape.of(base.config):
        raise Unsupported(
            "prefixes are saved and loaded whole, and under tensor parallelism, or in a pipeline over processes, each "
            "process holds a part: load the model on one device, or by device_map on several"
        )
    rotary = base.rotary_emb
    return {
        "config": {name: getattr(base.config, name) for name in _FIELDS if getattr(base.config, name, None) is not None}
        | {"head_dim": Shape.of(base.config).head_dim, "rope_type": _rope_type(base.config)},
        "dtype": str(base.dtype),
        "rotary": [float(rotary.attention_scaling), *rotary.inv_freq.tolist()],
        "adapters": _adapters(base),
        "weights": _digests(base),
    }


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """How a fingerprint differs from a saved one, a sentence's part each; empty if it does not."""
    found = [
        f"{name} is {present['config'].get(name)!r} and was {saved['config'].get(name)!r}"
        for name in sorted({*saved["config"], *present["config"]})
        if saved["config"].get(name) != present["config"].get(name)
    ]
    found += [
        f"{label} {present[name]} and was {saved[name]}"
        for name, label in (("dtype", "its dtype is"), ("adapters", "what its adapters do is"))
        if saved[name] != present[name]
    ]
    if not _close(saved["rotary"], present["rotary"]):
        found.append("its rotary frequencies are others (rope_theta or the scaling of rotary positions)")
    return found or _other_weights(saved["weights"], present["weights"])


def _other_weights(saved: dict[str, str], present: dict[str, str]) -> list[str]:
    """Named only where nothing else differs: other sizes or another dtype change every weight."""
    wrong = [name for name in sorted({*saved, *present}) if saved.get(name) != present.get(name)]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return [f"its weights are others ({wrong[0]}{more})"] if wrong else []


def _close(saved: list[float], present: list[float]) -> bool:
    return len(saved) == len(present) and all(
        abs(x - y) <= _CLOSE * abs(y) for x, y in zip(saved, present, strict=True)
    )


def _rope_type(config: Any) -> str:
    rope = rope_parameters(config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def _adapters(base: nn.Module) -> list[str]:
    """Whether adapters in the layers are on, merged, and how much they count."""
    found = set()
    for module in base.modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple, str)):  # of a layer of PEFT; models of transformers have a method here
            facts = (getattr(module, name, None) for name in ("disable_adapters", "merged", "scaling"))
            found.add(repr((active, *facts)))
    return sorted(found)


def _digests(base: nn.Module) -> dict[str, str]:
    """A digest of shape, dtype and some numbers of every weight, by its name."""
    found = {}
    for prefix, module in base.named_modules():
        for name, weight in _weights(module):
            digest = hashlib.sha256()
            for part in _plain(_loaded(module, name, weight)):
                digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
                digest.update(_samples(part))
            found[f"{prefix}.{name}".replace(_COMPILED, "")] = digest.hexdigest()[:16]
    return found


def _weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of a module itself, and the buffers that checkpoints hold: quantised weights may be buffers."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _loaded(module: Any, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, or what accelerate has put aside for it: it leaves a tensor without data then."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return weights[name] if parameter.is_meta and weights is not None else parameter


def _plain(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a weight is made of: quantised ones hold several."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain(getattr(weight, name))
    else:
        yield weight.detach()


def _samples(weight: torch.Tensor) -> bytes:
    """The bytes of some numbers of a weight, the first and the last among them."""
    if weight.is_meta or not weight.numel():
        return b""
    if not weight.ndim:
        weight = weight[None]
    if weight.dtype.itemsize == 1:
        weight = weight.view(torch.uint8)  # torch 2.6 picks no numbers of 8 bits
    index = torch.linspace(0, weight.numel() - 1, min(_SAMPLES, weight.numel()), dtype=torch.float64, device="cpu")
    chosen = weight[torch.unravel_index(index.round().long().to(weight.device), weight.shape)]
    return chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes()
