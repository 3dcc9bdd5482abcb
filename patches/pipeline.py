"""`pipeline_parallel` and `load_stage`: which layers a process runs, agreed on by all of them."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import torch
import transformers
from torch import distributed as dist
from torch import nn

from qwen_longctx import checkpoint
from qwen_longctx.checkpoint import Shape
from qwen_longctx.errors import InvalidType, InvalidValue, PatchConflict, Unsupported
from qwen_longctx.ops.device import device_of
from qwen_longctx.patches import base_of
from qwen_longctx.patches.runs import changing
from qwen_longctx.prefill.link import connect
from qwen_longctx.stage import Stage, even_shares, set_stage, stage_of

logger = logging.getLogger(__name__)

_OF_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "force_download")


def divide(model: Any, group: Any, layers: Any, timeout: Any) -> None:
    """See `qwen_longctx.pipeline_parallel`."""
    _together(group, layers, timeout, lambda _group, _layers: model)


def load(name: Any, group: Any, layers: Any, device: Any, timeout: Any, options: dict[str, Any]) -> Any:
    """See `qwen_longctx.load_stage`."""
    return _together(group, layers, timeout, lambda group, layers: _loaded(name, group, layers, device, options))


def end(model: Any) -> None:
    """This process leaves the pipeline of a model; nothing happens where there is none."""
    base = next((module for module in model.modules() if stage_of(module) is not None), None)
    if base is not None:
        with changing(model.modules()):
            stage = set_stage(base, None)
        if stage is not None:
            stage.link.close()


def _together(group: Any, layers: Any, timeout: Any, model_of: Callable[[Any, Any], Any]) -> Any:
    """The model of this rank, whose part is noted once all ranks have theirs."""
    if not dist.is_available() or not dist.is_initialized():
        raise InvalidValue(
            "a pipeline over processes needs a process group: call torch.distributed.init_process_group() in every "
            "process of `torchrun --nproc-per-node 2 script.py` first"
        )
    group = dist.group.WORLD if group is None else group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0 or ranks < 2:
        raise InvalidValue(
            f"a pipeline over processes needs a group of at least two ranks of which this process is one, got {ranks} "
            f"ranks and rank {rank}: start more processes, or leave pipeline_parallel out"
        )
    found: list[Any] = []

    def prepare() -> tuple[Any, ...]:
        _check_timeout(timeout)
        model = model_of(group, layers)
        base = base_of("pipeline_parallel", model)
        counts = _counts(layers, base.config.num_hidden_layers, ranks)
        _check(base, model, group, rank, counts)
        found.extend((model, base, counts))
        return (base.config.model_type, base.config.num_hidden_layers, base.config.hidden_size, counts, float(timeout))

    def check(said: list[Any]) -> None:
        if any(one != said[0] for one in said):
            raise InvalidValue(
                "the ranks of the pipeline do not agree on model type, layers, hidden size, layers of each rank and "
                f"timeout: {', '.join(f'rank {number}: {one}' for number, one in enumerate(said))}"
            )

    link = connect(group, float(timeout) if isinstance(timeout, (int, float)) else 60.0, prepare, check)
    model, base, counts = found
    first = sum(counts[:rank])
    with changing(model.modules()):
        set_stage(base, Stage(rank, ranks, first, first + counts[rank], link))
    finalize(base, link.close)
    logger.info("rank %d of %d runs layers %d to %d", rank, ranks, first, first + counts[rank] - 1)
    return model


def _check_timeout(timeout: Any) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise InvalidType(f"timeout must be a number of seconds, got {timeout!r:.40}")
    if not 1 <= timeout < math.inf:
        raise InvalidValue(f"timeout must be at least 1 second and finite, got {timeout}")


def _counts(layers: Any, total: int, ranks: int) -> list[int]:
    """Layers of every rank, in order: those asked for, or as even as can be."""
    if layers is None:
        if total < ranks:
            raise InvalidValue(f"{total} layers cannot be divided among {ranks} ranks: start {total} processes at most")
        return even_shares(total, ranks)
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise InvalidType(f"layers must be a list, how many each rank runs, got {layers!r:.60}")
    if any(isinstance(one, bool) or not isinstance(one, numbers.Integral) for one in layers):
        raise InvalidType(f"layers must hold whole numbers, got {layers!r:.60}")
    if len(layers) != ranks or min(layers) < 1 or sum(layers) != total:
        raise InvalidValue(
            f"layers must say for each of {ranks} ranks how many of the {total} layers it runs, at least 1, got "
            f"{list(layers)}, which are {sum(layers)}"
        )
    return [int(one) for one in layers]


def _check(base: Any, model: nn.Module, group: Any, rank: int, counts: list[int]) -> None:
    """Refuse a model that this rank cannot run its part of."""
    if stage_of(base) is not None:
        raise PatchConflict("the model is in a pipeline already: call unpatch_qwen(model) first, which ends that")
    if checkpoint.local_shape(base) != Shape.of(base.config):
        raise Unsupported("a pipeline over processes takes whole layers: load the model without tensor parallelism")
    first = sum(counts[:rank])
    needed = list(base.layers[first : first + counts[rank]])
    needed += [base.embed_tokens] * (rank == 0)
    if rank == len(counts) - 1:
        needed += [base.norm, *([model.lm_head] if hasattr(model, "lm_head") else [])]
    devices = {device_of(one) for one in needed}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise InvalidValue(
            f"what rank {rank} runs must lie on one device, layers {first} to {first + counts[rank] - 1} and what goes "
            f"with them lie on {', '.join(sorted(map(str, devices)))}: load it with qwen_longctx.load_stage"
        )
    (device,) = devices
    backend = dist.get_backend(group)
    if (device.type, backend) in (("cuda", "gloo"), ("cpu", "nccl")):
        wanted = "nccl" if device.type == "cuda" else "gloo"
        raise InvalidValue(
            f'the layers of rank {rank} lie on {device} and the process group has the backend "{backend}", which '
            f'cannot send from there: init_process_group("{wanted}")'
        )


# --- loading ------------------------------------------------------------------------------------------------------


def _loaded(name: Any, group: Any, layers: Any, device: Any, options: dict[str, Any]) -> Any:
    """The checkpoint with the weights of this rank's layers; others are left on the meta device."""
    refused = sorted({"device_map", "tp_plan", "tp_size", "distributed_config"} & options.keys())
    if refused:
        raise InvalidValue(f"load_stage places the layers itself: leave {', '.join(refused)} out, and give device")
    config = transformers.AutoConfig.from_pretrained(name, **{k: v for k, v in options.items() if k in _OF_HUB})
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    counts = _counts(layers, config.num_hidden_layers, ranks)
    if device is None:
        nccl = "nccl" in dist.get_backend(group)
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    places = _places(config, rank, counts, str(device))
    model = transformers.AutoModelForCausalLM.from_pretrained(name, device_map=places, **options)
    _drop_hooks(model)
    embedding = model.model.embed_tokens
    if embedding.weight.is_meta:  # one number that stands for all: the model says by it where it lies
        zero = torch.zeros((), dtype=embedding.weight.dtype, device=device)
        embedding.weight = nn.Parameter(zero.expand(embedding.weight.shape), requires_grad=False)
    return model.eval()


def _places(config: Any, rank: int, counts: list[int], device: str) -> dict[str, str]:
    """A device map in which what other ranks have stays on disk."""
    first, ends = sum(counts[:rank]), rank in (0, len(counts) - 1)
    tied = ends and getattr(config, "tie_word_embeddings", False)
    here = {
        "model.embed_tokens": rank == 0 or tied,
        "model.rotary_emb": True,
        "model.norm": rank == len(counts) - 1,
        "lm_head": rank == len(counts) - 1 or tied,
    }
    here |= {f"model.layers.{n}": first <= n < first + counts[rank] for n in range(sum(counts))}
    return {name: device if own else "disk" for name, own in here.items()}


def _drop_hooks(model: Any) -> None:
    """Take off what accelerate would fetch the weights of other ranks with."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    vars(model).pop("hf_device_map", None)
