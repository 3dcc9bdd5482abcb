"""Linear layers of which the device holds 8 bits, ``linear="fp8"``; the host keeps the weights as they were.

A layer changes its class and nothing else of it is replaced: hooks, names and the parameter object stay, a copy or a
pickle carries everything that belongs to it, and ``state_dict`` and undoing give the kept weights bit for bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from qwen_longctx.errors import PatchConflict, Unsupported
from qwen_longctx.ops import fp8, thin
from qwen_longctx.ops.device import needs_gradient
from qwen_longctx.ops.fp8 import E4M3, Rows
from qwen_longctx.patches import runs

logger = logging.getLogger(__name__)

# of a decoder layer; routers, experts and heads are none of them
LAYERS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_SCALES = "weight_scales"
_HOOKED = "_old_forward"  # where accelerate's hooks keep the forward that they wrap


@dataclass(frozen=True)
class _Kept:
    """The weight as it was, on the host. Nothing writes to it, so copies of a layer share it."""

    weight: torch.Tensor
    requires_grad: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


class Fp8Linear(nn.Linear):
    """An ``nn.Linear`` whose weight is e4m3 with a float32 scale for each output; see `to_fp8`.

    Called with a tensor of shape (..., in_features), or with `Rows` of it that are in 8 bits already.
    """

    _kept: _Kept
    weight_scales: torch.Tensor

    def forward(self, x: torch.Tensor | Rows) -> torch.Tensor:  # type: ignore[override]
        """Shape (..., out_features), of the dtype that the weight had."""
        if self.weight.dtype != E4M3:
            raise PatchConflict(
                f'a weight of {self.weight.dtype} was put into a layer of linear="fp8" from outside: '
                "unpatch_qwen(model) before weights are replaced, cast or offloaded, and patch it again after that"
            )
        given = [one for one in (x, self.bias) if isinstance(one, torch.Tensor)]
        if needs_gradient(*given):
            raise Unsupported(
                'linear="fp8" has no gradients: run under torch.no_grad(), or train without it: patch_qwen(model)'
            )
        if isinstance(x, torch.Tensor):
            x = fp8.cast_rows(x)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return fp8.product(x, Rows(self.weight, self.weight_scales), bias).to(self._kept.weight.dtype)

    def _set(self, weight: torch.Tensor, device: torch.device) -> None:
        """Keep a weight and put it on the device in 8 bits."""
        kept = weight.detach().to("cpu", copy=True)
        rows = fp8.cast_rows(weight.detach().to(device))
        self._kept = _Kept(kept, self._kept.requires_grad)
        self.weight.requires_grad_(False).data = rows.values
        self.weight_scales = rows.scales

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves go to what the device holds; a change of dtype goes to the bias and to the kept weight."""
        tried = fn(self.weight.data)
        if tried.dtype != E4M3:
            self._kept = _Kept(self._kept.weight.to(tried.dtype), self._kept.requires_grad)
        self.weight.data = self.weight.data.to(tried.device)
        self.weight_scales = self.weight_scales.to(tried.device)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._kept.weight

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        """Weights come in as into any layer, and are cast again."""
        device = self.weight.device
        self.weight.data = self._kept.weight.clone()
        super()._load_from_state_dict(*arguments, **named)
        self._set(self.weight.data, device)


def check(layers: Iterable[nn.Module], layers_name: str) -> list[nn.Linear]:
    """The layers that `to_fp8` can take, which may be in 8 bits already; says which others stay as they are.

    Parameters
    ----------
    layers : iterable of Module
        Decoder layers.
    layers_name : str
        What messages call the model.

    Raises
    ------
    NotImplementedError
        A layer is offloaded, lies where 8 bits do not run, or is of another dtype than bf16; or none can be taken.
    """
    named = [pair for number, layer in enumerate(layers) for pair in _linears(number, layer)]
    shared = Counter(id(one.weight) for _, one in named if isinstance(getattr(one, "weight", None), torch.Tensor))
    found, left = [], {}
    for name, module in named:
        reason = "" if type(module) is Fp8Linear else _why_left(module)
        if not reason and shared[id(module.weight)] > 1:
            reason = "shares its weight with another layer"
        if reason:
            left[name] = reason
            continue
        if type(module) is not Fp8Linear:
            _check_one(name, module)
        found.append(module)
    if not found:
        reasons = "; ".join(sorted(set(left.values()))) or "it has none of its own"
        raise Unsupported(f'linear="fp8": {layers_name} has no linear layer to cast ({reasons}): leave linear out')
    if left:
        reasons = "; ".join(f"{count} that {reason}" for reason, count in Counter(left.values()).items())
        logger.warning('linear="fp8" leaves %d of %d linear layers as they are: %s', len(left), len(named), reasons)
    return found


def to_fp8(linears: Iterable[nn.Linear]) -> list[nn.Linear]:
    """Cast layers that `check` has found and that are not yet in 8 bits; all of them, or none if that fails.

    Returns
    -------
    list of nn.Linear
        Those that were cast now.
    """
    return _all_or_none((one for one in linears if type(one) is not Fp8Linear), _cast, _uncast)


def restore(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Put back the weights of those modules that are in 8 bits, where the layers are now; all of them, or none.

    Returns
    -------
    list of nn.Linear
        Those that were put back.
    """
    return _all_or_none((one for one in modules if type(one) is Fp8Linear), _uncast, _cast)


def _all_or_none(modules: Iterable[Any], do: Callable[[Any], None], undo: Callable[[Any], None]) -> list[Any]:
    """Those modules to which something was done; if it fails for one, it is undone for the others."""
    done: list[Any] = []
    try:
        for module in modules:
            do(module)
            done.append(module)
    except BaseException:
        _all_or_none(done, undo, do)
        raise
    return done


def rows_for(x: torch.Tensor | Rows, *modules: nn.Module) -> torch.Tensor | Rows:
    """`x` in 8 bits, cast once for layers that all take it so; `x` itself for others.

    Whoever hooks a layer sees its input as it is.
    """
    if type(x) is not torch.Tensor or not takes_rows(*modules) or needs_gradient(x):
        return x
    return fp8.cast_rows(x)


def takes_rows(*modules: nn.Module) -> bool:
    """Whether layers are in 8 bits, and nobody looks at what goes in."""
    return all(type(one) is Fp8Linear and not (one._forward_pre_hooks or one._forward_hooks) for one in modules)


def thin_weights(x: torch.Tensor | Rows, *modules: Any) -> list[thin.Weight] | None:
    """What linear layers hold, where `ops.thin` may run them all for `x`; None where each has to run itself.

    That is for tokens of a CUDA graph. Without one the host takes longer to launch a Triton kernel than PyTorch's.
    """
    in_8_bits = isinstance(x, Rows)
    given = x.scales if isinstance(x, Rows) else x
    if not runs.is_repeated() or not thin.pays(x) or torch.is_autocast_enabled(given.device.type):
        return None
    kind = type(modules[0])
    if in_8_bits and kind is not Fp8Linear:
        return None
    wanted = torch.bfloat16 if in_8_bits else given.dtype
    if kind not in (nn.Linear, Fp8Linear) or not all(type(one) is kind and _is_unwatched(one) for one in modules):
        return None
    dtype = E4M3 if kind is Fp8Linear else wanted
    weights, biases = [one.weight for one in modules], [one.bias for one in modules if one.bias is not None]
    if len(biases) not in (0, len(weights)) or needs_gradient(*weights, *biases):
        return None
    lying = [_lies(one, dtype, given.device) for one in weights] + [_lies(one, wanted, given.device) for one in biases]
    if not all(lying):
        return None
    if kind is Fp8Linear:
        kept = all(one._kept.weight.dtype == wanted for one in modules)
        return [thin.Weight(one.weight, one.bias, one.weight_scales) for one in modules] if kept else None
    return [thin.Weight(one.weight, one.bias) for one in modules]


def _is_unwatched(module: Any) -> bool:
    """Whether nobody looks at what goes into a module or comes out, or runs it in another way."""
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return not hooked and module._compiled_call_impl is None


def _lies(parameter: torch.Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    kind = type(parameter.data), parameter.dtype, parameter.device
    return kind == (torch.Tensor, dtype, device) and parameter.is_contiguous()


def _linears(number: int, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for part, names in LAYERS.items():
        for name in names:
            module = getattr(getattr(layer, part, None), name, None)
            if isinstance(module, nn.Module):
                yield f"layers.{number}.{part}.{name}", module


def _why_left(module: Any) -> str:
    """Why a layer stays as it is; empty if it can be cast."""
    if type(module) is not nn.Linear:
        return f"are {type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    if type(module.weight.data) is not torch.Tensor:
        return f"have weights of type {type(module.weight.data).__name__}"
    if module.weight.dtype.itemsize == 1:
        return f"have weights of {module.weight.dtype}"
    if module.in_features % fp8.MULTIPLE or module.out_features % fp8.MULTIPLE:
        return f"are {module.in_features} by {module.out_features} wide, no multiples of {fp8.MULTIPLE}"
    forward = vars(module).get(_HOOKED) or module.forward
    return "" if getattr(forward, "__func__", None) is nn.Linear.forward else "have a forward of another library"


def _check_one(name: str, module: nn.Linear) -> None:
    weight, hook = module.weight, getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    if weight.is_meta or any(getattr(one, "offload", False) for one in hooks):
        raise Unsupported(
            f'linear="fp8": the weight of {name} is not on a device (meta or offloaded): load all layers on CUDA '
            "devices, or leave linear out"
        )
    if missing := fp8.why_not(weight.device):
        raise Unsupported(
            f'linear="fp8" on {weight.device}, where {name} is, {missing}: load the model on a CUDA device of compute '
            "capability 8.9 or newer, or leave linear out"
        )
    if weight.dtype != torch.bfloat16:
        raise Unsupported(
            f'linear="fp8" takes weights of torch.bfloat16, {name} has {weight.dtype}: load the model with '
            "dtype=torch.bfloat16, or leave linear out"
        )


def _cast(linear: Any) -> None:
    weight, requires = linear.weight.data, linear.weight.requires_grad
    kept, rows = _Kept(weight.to("cpu", copy=True), requires), fp8.cast_rows(weight)
    linear.__class__ = Fp8Linear
    linear._kept = kept
    linear.weight.requires_grad_(False).data = rows.values
    linear.register_buffer(_SCALES, rows.scales, persistent=False)
    _rebind(linear)


def _uncast(linear: Any) -> None:
    kept = linear._kept
    weight = kept.weight.to(linear.weight.device)
    linear.__class__ = nn.Linear
    linear.weight.data = weight
    linear.weight.requires_grad_(kept.requires_grad)
    del linear._kept
    delattr(linear, _SCALES)
    linear._non_persistent_buffers_set.discard(_SCALES)
    _rebind(linear)


def _rebind(linear: Any) -> None:
    """Let whoever keeps the layer's forward, as hooks do, keep that of its present class."""
    for slot in (_HOOKED, "forward"):
        if getattr(vars(linear).get(slot), "__func__", None) in (nn.Linear.forward, Fp8Linear.forward):
            vars(linear)[slot] = MethodType(type(linear).forward, linear)
