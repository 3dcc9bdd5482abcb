"""What the forwards and ``generate`` of a model ask of the other ranks, where several processes share its layers."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import modeling_outputs

from qwen_longctx.checkpoint import Shape
from qwen_longctx.errors import Unsupported
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.kv.sequence import sequence_of
from qwen_longctx.ops.device import device_of
from qwen_longctx.patches.method import cache_argument
from qwen_longctx.prefill.link import IN_FLIGHT, LinkedCall
from qwen_longctx.prefill.run import Run, bar
from qwen_longctx.prefill.schedule import planned
from qwen_longctx.stage import Stage, own_layers

REFUSED = {  # options of generate that ranks would answer each for itself, and what to do instead
    "assistant_model": "each rank would make drafts for itself: leave it out",
    "max_time": "ranks would stop at different tokens: give max_new_tokens",
}
_OUTPUTS = {  # of dense models, and of mixtures of experts
    "CausalLM": ("CausalLMOutputWithPast", "MoeCausalLMOutputWithPast"),
    "Base": ("BaseModelOutputWithPast", "MoeModelOutputWithPast"),
}


def call(base: Any, stage: Stage) -> AbstractContextManager[LinkedCall]:
    """A call that all ranks make together, see `Link.call`."""
    return stage.link.call(device_of(own_layers(base)[0]))


def agree(call: LinkedCall, run: Run, inputs: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
    """Go on if every rank was called alike, and can make the call.

    Parameters
    ----------
    call : LinkedCall
    run : Run
    inputs : torch.Tensor
        Token ids of shape (batch, tokens), or embeddings, of which those of rank 0 are taken.
    wanted : torch.Tensor, optional
        Which of the results are wanted.

    Raises
    ------
    ValueError
        They were not called alike.
    NotImplementedError
        The call cannot be made on several ranks.
    """
    if run.mode == "train":
        raise Unsupported("a pipeline over processes has no gradients: call the model under torch.no_grad()")
    _check_cache(run.cache)
    what = {"input_ids": _digest(inputs), "tokens in the cache": run.call.cached}
    if run.mode != "decode":
        what["attention_mask or position_ids"] = _digest(str(run.call))
        what["settings of patch_qwen"] = _digest(str(run.settings))
        what["use_cache or past_key_values"] = f"a {'cache' if run.cache is not None else 'call without a cache'}"
        what["logits_to_keep or labels"] = "-" if wanted is None else _digest(wanted)
    call.agree(what)


def check_outputs(asked: dict[str, bool]) -> None:
    """Refuse outputs of all layers, which no rank has; `asked` says which are wanted."""
    for name, wanted in asked.items():
        if wanted:
            raise Unsupported(f"{name} needs all layers in one process: a pipeline over processes has a part in each")


def _check_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, LongContextCache):
        raise Unsupported(
            f"a pipeline over processes fills no {type(cache).__name__}, whose layers are those of the whole model: "
            "pass a LongContextCache, or no cache"
        )


def _digest(value: Any) -> str:
    """What tells inputs apart, short enough for a message."""
    if not isinstance(value, torch.Tensor):
        return f"{zlib.crc32(value.encode()):08x}"
    if value.is_floating_point():
        return f"embeddings of shape {tuple(value.shape)}"
    content = value.detach().cpu().long().contiguous().numpy().tobytes()
    return f"{'x'.join(map(str, value.shape))} numbers, CRC {zlib.crc32(content):08x}"


def chunks(base: Any, run: Run, stage: Stage, call: LinkedCall) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """The chunks of a run as they come to this rank: first token, the one after the last, and hidden states.

    The first rank cuts them, so that they take equal time, and has no hidden states yet. The others are told.
    """
    done: list[tuple[int, int]] = []
    under_way: deque[Any] = deque()
    if run.cache is not None and run.mode == "prefill":
        sequence_of(run.cache).pipeline = {"stages": stage.ranks, "chunks": done}
    one_by_one = run.settings.pipeline == "off"
    if stage.is_first:
        for start, stop in _cuts(base, run, stage, call):
            yield start, stop, None
            done.append((start, stop))
            _pace(under_way, call.device)
            if one_by_one:
                call.follow()
    else:
        stop = run.call.cached
        while stop < run.call.end:
            (start, stop, *_), hidden = call.take()
            yield start, stop, hidden
            done.append((start, stop))
            _pace(under_way, call.device)
            if one_by_one and stage.is_last:
                call.arrive()


def _cuts(base: Any, run: Run, stage: Stage, call: LinkedCall) -> Iterator[tuple[int, int]]:
    """The chunks that the first rank cuts, measured if the settings ask for that."""
    rule = None if run.sparse is None else run.sparse.name
    schedule = planned(run.call.cached, run.call.end, run.settings, Shape.of(base.config), stage.ranks, rule)
    fitted = schedule.fitted
    marks: deque[tuple[int, int, Any, Any]] = deque()
    with bar(run.tokens, hidden=run.tokens <= schedule.size) as shown:
        for start, stop in schedule:
            begin = _mark(call.device) if fitted else None
            yield start, stop
            if fitted:
                marks.append((start, stop, begin, _mark(call.device)))
            while marks and (took := _seconds(*marks[0][2:])) is not None:
                schedule.measured(*marks.popleft()[:2], took)
            shown.update(stop - start)


def _pace(under_way: deque[Any], device: torch.device) -> None:
    """Let the host be ahead of its device by `IN_FLIGHT` chunks at most, which bounds what is held of them."""
    under_way.append(_mark(device))
    if device.type == "cuda" and len(under_way) > IN_FLIGHT:
        under_way.popleft().synchronize()


def _mark(device: torch.device) -> Any:
    """A point in the work of a device, and on the CPU the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(first: Any, last: Any) -> float | None:
    """Seconds between two points; None while the second has not passed."""
    if isinstance(last, float):
        return last - first
    return first.elapsed_time(last) / 1000 if last.query() else None


def outputs(model: Any, name: str, cache: Any) -> Any:
    """The outputs of a model as its class hands them out, with nothing but the cache: a `name` of `_OUTPUTS`."""
    kind = _OUTPUTS[name][hasattr(model.config, "num_experts")]
    return getattr(modeling_outputs, kind)(**cache_argument(cache))


# --- generate -----------------------------------------------------------------------------------------------------


def begin_generate(
    call: LinkedCall, prompt: torch.Tensor | None, mask: Any, cache: Any, refused: dict[str, Any], alike: dict[str, Any]
) -> Any:
    """Go on if every rank generates alike; returns the random state of rank 0, from which all of them sample.

    Parameters
    ----------
    call : LinkedCall
    prompt, mask : torch.Tensor, optional
    cache : transformers Cache, optional
    refused : dict
        Options of generate by the names of `REFUSED`; None where they are not given.
    alike : dict
        What must be the same on all ranks, by name.
    """
    for name, value in refused.items():
        if value is not None:
            raise Unsupported(f"{name} does not go with a pipeline over processes: {REFUSED[name]}")
    _check_cache(cache)
    tensors = {"inputs": prompt, "attention_mask": mask}
    what = {name: _digest(one) for name, one in tensors.items() if isinstance(one, torch.Tensor)}
    return call.agree(what | alike, _random_state(call.device) if call.is_first else None)[0]


@contextmanager
def generating(base: Any, stage: Stage | None, random: Any) -> Iterator[None]:
    """The block samples with the random state of rank 0; if it fails between two forwards, the other ranks are told."""
    if stage is None:
        yield
        return
    device = device_of(own_layers(base)[0])
    with stage.link.between_calls(), nullcontext() if stage.is_first else _random_of(*random, device):
        yield


@contextmanager
def _random_of(cpu: torch.Tensor, cuda: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """The block runs with another random state of the CPU and of the device; that of this process comes back."""
    with torch.random.fork_rng([] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
