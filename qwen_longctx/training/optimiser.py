"""The optimiser: AdamW in float32 beside weights in half precision, or torchao's in 8 bits; rates and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qwen_longctx.errors import InvalidValue, MissingPackage, NotFinite
from qwen_longctx.training.stages import Optimiser, Stage

_HALF = (torch.bfloat16, torch.float16)


def rate(stage: Stage, settings: Optimiser, step: int) -> float:
    """The learning rate of a step of a stage, the first being 0: it rises, and falls or stays."""
    rising = math.ceil(settings.warmup * stage.steps)
    if step < rising:
        return stage.learning_rate * (step + 1) / rising
    if settings.schedule == "constant":
        return stage.learning_rate
    done = (step - rising) / max(1, stage.steps - rising)
    return stage.learning_rate * (settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done)))


class Learner:
    """The weights that learn, their gradients, and the state of the optimiser.

    With "adamw", a weight in half precision has a master in float32, which learns, and from which the weight is rounded
    after each step: small steps add up. Gradients are added up in the master's dtype as soon as they are there, of
    every slice of an MLP and of every sequence. With "adamw_8bit" the weights learn by themselves, rounded at random.

    Parameters
    ----------
    named : mapping of str to Parameter
    settings : Optimiser

    Raises
    ------
    MissingPackage
        torchao is needed and absent.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], settings: Optimiser) -> None:
        self._named, self._settings = dict(named), settings
        with_masters = settings.name == "adamw"
        self.masters: dict[str, nn.Parameter] = {}
        self._hooks = []
        for name, weight in self._named.items():
            if with_masters and weight.dtype in _HALF:
                self.masters[name] = nn.Parameter(weight.detach().float())
                self._hooks.append(weight.register_post_accumulate_grad_hook(_to(self.masters[name])))
            else:
                self.masters[name] = weight
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        matrices = [x for x in self.masters.values() if x.ndim > 1]
        others = [x for x in self.masters.values() if x.ndim <= 1]
        groups = [
            {"params": some, "weight_decay": decay}
            for some, decay in ((matrices, self._settings.weight_decay), (others, 0.0))
            if some
        ]
        betas = (self._settings.beta1, self._settings.beta2)
        if self._settings.name == "adamw":
            return torch.optim.AdamW(groups, lr=1.0, betas=betas)
        return _adamw_8bit()(groups, lr=1.0, betas=betas, bf16_stochastic_round=True)

    def step(self, learning_rate: float) -> float:
        """Cut the gradients to their largest norm, change the weights, and forget the gradients.

        Returns
        -------
        float
            Norm of the gradients before the cut.

        Raises
        ------
        NotFinite
            The gradients are no numbers; nothing has changed.
        """
        learners = list(self.masters.values())
        norm = float(_together(nn.utils.clip_grad_norm_(learners, self._settings.clip)))
        if not math.isfinite(norm):
            raise NotFinite(
                f"the gradients have a norm of {norm}: lower learning_rate, or look at the data of this step. The "
                "state that was saved last is kept"
            )
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao compiles for a number
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round()
        return norm

    def gradients(self) -> list[torch.Tensor]:
        """All gradients that there are."""
        return [x.grad for x in self.masters.values() if x.grad is not None]

    def _round(self) -> None:
        """Give the weights what their masters have learned."""
        with torch.no_grad():
            for name, weight in self._named.items():
                if self.masters[name] is not weight:
                    weight.copy_(self.masters[name])

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, on the host."""
        weights = {name: whole(x) for name, x in self.masters.items()}
        return {"weights": weights, "optimizer": _map(self.optimizer.state_dict(), whole)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` gave.

        Raises
        ------
        InvalidValue
            It is of other weights.
        """
        if state["weights"].keys() != self.masters.keys():
            raise InvalidValue("the saved state is of other weights than those that learn now: take another folder")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(_like(state["weights"][name], master))
        self._round()
        groups = state["optimizer"]
        order = [x for group in self.optimizer.param_groups for x in group["params"]]
        for number, values in groups["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == order[number].shape:
                    values[key] = _like(value, order[number])
        self.optimizer.load_state_dict(groups)

    def close(self) -> None:
        """Take the hooks off the weights."""
        for hook in self._hooks:
            hook.remove()


def _to(master: nn.Parameter) -> Any:
    """A hook that adds the gradient of a weight to its master's."""

    def hook(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    return hook


def _adamw_8bit() -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        try:  # before torchao 0.10
            from torchao.prototype.low_bit_optim import AdamW8bit
        except ImportError as error:
            raise MissingPackage(
                'adamw_8bit needs torchao, which is not installed: pip install torchao, or take name = "adamw"'
            ) from error
    return AdamW8bit


# --- tensors that are divided among several cards -----------------------------------------------------------------


def whole(x: Any) -> Any:
    """A tensor as one on the host, put together if it is divided; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    return _together(x.detach()).to("cpu", copy=True)


def _together(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _like(whole: torch.Tensor, other: Any) -> torch.Tensor:
    """A whole tensor, divided as another is."""
    if not hasattr(other, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements)


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(one, function) for key, one in value.items()}
    if isinstance(value, list):
        return [_map(one, function) for one in value]
    return function(value)
