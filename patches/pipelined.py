"""Whether the devices of a model work on several chunks of a run at once, and what makes the host wait for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qwen_longctx import ops
from qwen_longctx.checkpoint import local_shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.kv.sequence import sequence_of
from qwen_longctx.prefill.link import IN_FLIGHT
from qwen_longctx.prefill.pipeline import Pipeline, most_under_way, stages_of, why_not
from qwen_longctx.prefill.run import Run
from qwen_longctx.prefill.schedule import planned
from qwen_longctx.stage import stage_of


def pipelined(base: Any, run: Run, picked: bool = False) -> Run:
    """A run in chunks as it is, or with a pipeline where its layers lie on several CUDA devices and the settings ask.

    What is decided, and why, goes to the report of the sequence.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The base model.
    run : Run
    picked : bool
        Logits of some tokens are wanted, by their numbers.
    """
    if run.settings.pipeline == "off" or run.cache is None or torch.compiler.is_compiling():
        return run
    layers = _layers(base)
    stages = stages_of(layers)
    if len(stages) == 1:
        return run
    state = sequence_of(run.cache)
    reason = why_not(stages, base)
    if reason:
        state.pipeline = {"stages": 1, "why_not": reason}
        return run
    rule = None if run.sparse is None else run.sparse.name
    schedule = planned(run.call.cached, run.call.end, run.settings, local_shape(base), len(stages), rule)
    sparse = None if run.sparse is None else replace(run.sparse, ahead=True)
    run = replace(run, sparse=sparse, pipeline=Pipeline(layers, stages, schedule))
    state.pipeline = {
        "stages": len(stages),
        "chunks": schedule.chunks,
        "waits": _waits(base, run, stages[0].device, picked),
    }
    return run


def chunks_ahead(base: Any, tokens: int, settings: LongContextConfig) -> int:
    """Chunks of a prompt of so many new tokens that are under way at once at most; 0 where it is one after another."""
    if stage_of(base) is not None:
        return (IN_FLIGHT + 1) * (tokens > settings.prefill_chunk_size)
    stages = stages_of(_layers(base))
    if settings.pipeline == "off" or tokens <= settings.prefill_chunk_size or len(stages) == 1:
        return 0
    return 0 if why_not(stages, base) else most_under_way(stages)


def _layers(base: Any) -> Any:
    return base.layers[: base.config.num_hidden_layers]


def _waits(base: Any, run: Run, device: torch.device, picked: bool) -> list[str]:
    """What makes the host wait for a device within a chunk, so that the others wait too."""
    found = []
    sparse, settings = run.sparse, run.settings
    if sparse is not None and sparse.name == "vertical_slash" and sparse.recall_target is not None:
        found.append("vertical_slash with a recall_target looks at the budgets of every span")
    if sparse is not None:
        width = local_shape(base).head_dim
        if ops.list_kernel(settings.kernel, device, base.dtype, width, settings.tile) == "reference":
            found.append("the reference kernel looks at the length of every list")
    if (
        getattr(base.config, "num_experts", None)
        and getattr(base.config, "_experts_implementation", "eager") == "eager"
    ):
        found.append("experts are chosen on the host")
    if getattr(run.cache, "offloading", False):
        found.append("the cache is offloaded")
    if picked:
        found.append("logits are picked by their numbers")
    return found
