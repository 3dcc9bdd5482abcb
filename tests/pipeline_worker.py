"""One of the ranks that `test_pipeline_ranks` starts: plays scenes, and writes down what came out of each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, LogitsProcessorList

from qwen_longctx import (
    LongContextCache,
    load_stage,
    patch_qwen,
    patched_qwen,
    pipeline_parallel,
    settings_of,
    unpatch_qwen,
)
from qwen_longctx.stage import stage_of

PIPELINES = ("auto", "equal", "measured", "off")
DENSE = {"sparse": "off", "prefill_chunk_size": 50}
SLOW = 0.06  # seconds of a layer in the scene about time


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@torch.no_grad()
def logits_of(
    model: Any, settings: dict[str, Any], kind: str, ids: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, Any]:
    """Logits of a prompt, of a few tokens behind it and of one more, and what sparse prefill kept here."""
    cache = LongContextCache(kv_cache=kind)
    masks = (None, None, None) if mask is None else (mask[:, :-4], mask[:, :-1], mask)
    with patched_qwen(model, **settings):
        parts = ids[:, :-4], ids[:, -4:-1], ids[:, -1:]
        wanted = 0, 2, 1
        every = [
            model(part, attention_mask=one, past_key_values=cache, logits_to_keep=keep).logits
            for part, one, keep in zip(parts, masks, wanted, strict=True)
        ]
    records = cache.sparse_state.records
    return {
        "logits": every,
        "layers": len(cache.layers),
        "length": cache.get_seq_length(),
        "bytes": sum(x.nbytes for layer in cache.layers for x in layer.store.held()),
        "recall": {(one.layer, one.start): one.recall for one in records},
        "report": cache.report(),
    }


def tokens_of(model: Any, options: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What generate says; every rank has a seed of its own."""
    torch.manual_seed(5 + rank())
    with patched_qwen(model, **DENSE):
        return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)


def raised(run: Callable[[], Any]) -> tuple[str, str]:
    """Type and text of what a call raises, the former empty if it raises nothing."""
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@contextmanager
def hooked(model: Any, layer: int, hook: Callable[[Any], None], here: bool = True) -> Iterator[None]:
    """A hook is called with the input of a layer, if the layer is of this rank."""
    stage = stage_of(model.model)
    if not here or not stage.first <= layer < stage.stop:
        yield
        return
    handle = model.model.layers[layer].register_forward_pre_hook(lambda module, given: hook(given))
    try:
        yield
    finally:
        handle.remove()


class Nth:
    """Raises at the nth call."""

    def __init__(self, number: int, error: Exception) -> None:
        self.left, self.error = number, error

    def __call__(self, given: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class Fails(LogitsProcessor):
    """Raises at the second token, on one rank."""

    def __init__(self, number: int) -> None:
        self.count, self.number = 0, number

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count == 2 and rank() == self.number:
            raise ArithmeticError("of a processor")
        return scores


@torch.no_grad()
def failures(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What every rank raises, and whether all goes on after it."""
    said: dict[str, Any] = {}
    cache = LongContextCache()

    def call(given: torch.Tensor = ids, **more: Any) -> Any:
        return model(given, past_key_values=cache, logits_to_keep=1, **more).logits

    def attempt(name: str, run: Callable[[], Any]) -> None:
        begun, held = time.monotonic(), cache.get_seq_length()
        what, text = raised(run)
        said[name] = what, text, time.monotonic() - begun, cache.get_seq_length() == held

    with patched_qwen(model, **DENSE):
        call(ids[:, :7])
        for number, layer in enumerate((0, 2, 3)):
            error = (ValueError, torch.OutOfMemoryError, KeyError)[number](f"in layer {layer}")
            with hooked(model, layer, Nth(2 + number, error)):
                attempt(f"layer {layer}", call)
        attempt("ids", lambda: call(ids + rank()))
        attempt("length", lambda: call(ids[:, rank() :]))
        attempt("vocabulary", lambda: call(ids + 90 * (rank() == 1)))
        attempt("kept", lambda: model(ids, past_key_values=cache, logits_to_keep=1 + rank()))
        attempt("cache", lambda: model(ids, past_key_values=DynamicCache()))
        attempt("states", lambda: call(output_hidden_states=True))
        attempt("generate", lambda: model.generate(ids + (rank() == 2), max_new_tokens=2))
        attempt("limit", lambda: model.generate(ids, max_new_tokens=2 + rank(), pad_token_id=0))
        attempt("time", lambda: model.generate(ids, max_new_tokens=2, max_time=60.0, pad_token_id=0))
        attempt("drafts", lambda: model.generate(ids, max_new_tokens=2, assistant_model=model, pad_token_id=0))
        attempt("static", lambda: model.generate(ids[:, :9], max_new_tokens=2, cache_implementation="static"))
        attempt("option", lambda: model.generate(ids, max_new_tokens=2, no_such=1, pad_token_id=0))
        for number in range(3):
            processors = LogitsProcessorList([Fails(number)])
            more = {"logits_processor": processors, "max_new_tokens": 4, "pad_token_id": 0}
            attempt(f"processor {number}", lambda more=more: model.generate(ids, **more))
        with torch.enable_grad():
            attempt("gradients", call)
        with hooked(model, 1, lambda given: call(), here=True):
            attempt("reentered", call)
        attempt("save", lambda: cache.save("never"))
        attempt("again", lambda: pipeline_parallel(model))
        said["after"] = call()
    with patched_qwen(model, **{**DENSE, "prefill_chunk_size": 50 + rank()}):
        attempt("settings", call)
    with patched_qwen(model, **DENSE):
        said["at the end"] = call(ids[:, :5])
    return said


@torch.no_grad()
def timeline(model: Any, ids: torch.Tensor, pipeline: str) -> list[list[float]]:
    """When this rank began and ended its layers' work on each chunk, by a clock that all processes share."""
    begun: list[float] = []
    ended: list[float] = []
    stage = stage_of(model.model)

    def slow(given: Any) -> None:
        begun.append(time.monotonic())
        time.sleep(SLOW)
        ended.append(time.monotonic())

    with patched_qwen(model, **DENSE, pipeline=pipeline), hooked(model, stage.first, slow):
        model(ids[:, :300], logits_to_keep=1)
    return [begun, ended]


@torch.no_grad()
def chunks_of(model: Any) -> dict[str, Any]:
    """Where a prompt is cut under every setting, and its last logits."""
    ids = torch.randint(1, 90, (1, 4600), generator=torch.Generator().manual_seed(8))
    said = {}
    for name in PIPELINES:
        cache = LongContextCache()
        with patched_qwen(model, sparse="off", prefill_chunk_size=2304, pipeline=name):
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        said[name] = cache.report()["pipeline"], logits
    return said


@torch.no_grad()
def of_two(folder: Path, ids: torch.Tensor, timeout: float) -> dict[str, Any]:
    """Two of the ranks, each with the whole model, patched before it is divided."""
    group = dist.new_group([0, 1])
    if rank() > 1:
        return {"outside": raised(lambda: pipeline_parallel(None, group))}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    before = model(ids[:, :40]).logits
    patch_qwen(model, **DENSE)
    said = {
        "layers": raised(lambda: pipeline_parallel(model, group, layers=[2, 1])),
        "differ": raised(lambda: pipeline_parallel(model, group, layers=[3, 1] if rank() else [1, 3])),
        "model": raised(lambda: pipeline_parallel(None if rank() else model, group)),
        "timeout": raised(lambda: pipeline_parallel(model, group, timeout=0)),
    }
    pipeline_parallel(model, group, layers=[3, 1], timeout=timeout)
    said["logits"] = model(ids).logits
    said["base"] = model.model(ids).last_hidden_state
    said["loss"] = model(ids, labels=ids).loss
    said["kept"] = model(ids, logits_to_keep=torch.tensor([3, 250, 3])).logits
    said["settings"] = settings_of(model).prefill_chunk_size
    dist.barrier(group)
    if rank() == 0:  # the other one is told that it is alone
        unpatch_qwen(model)
        said["stock"] = bool((model(ids[:, :40]).logits == before).all())
    else:
        time.sleep(0.5)
        said["left"] = raised(lambda: model(ids))
        unpatch_qwen(model)
    dist.barrier(group)
    return said


@torch.no_grad()
def silent(folder: Path, ids: torch.Tensor) -> Any:
    """Rank 1 does not call the model, and lives: the others wait no longer than they were told to."""
    model = load_stage(folder, dtype=torch.float64, timeout=1)
    patch_qwen(model, **DENSE)
    begun = time.monotonic()
    found = raised(lambda: model(ids)) if rank() != 1 else ("", "")
    took = time.monotonic() - begun
    dist.barrier()
    return *found, took


@torch.no_grad()
def killed(model: Any, ids: torch.Tensor) -> Any:
    """Rank 1 is killed in the middle of a chunk, the third one."""
    calls: list[Any] = []

    def kill(given: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    cache = LongContextCache()
    with patched_qwen(model, **DENSE), hooked(model, stage_of(model.model).first, kill, here=rank() == 1):
        begun = time.monotonic()
        found = raised(lambda: model(ids, past_key_values=cache))
        took = time.monotonic() - begun
        return *found, took, cache.get_seq_length(), raised(lambda: model(ids))


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    scenes = torch.load(folder / "scenes.pt", weights_only=False)
    results: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        results[name] = value
        torch.save(results, folder / f"results.{rank()}")

    model = load_stage(folder, dtype=torch.float64, layers=scenes["layers"], timeout=30)
    held = [name for name, one in model.named_parameters() if not one.is_meta and one.stride() != (0, 0)]
    note("held", (held, str(model.device)))
    note("logits", [logits_of(model, *scene) for scene in scenes["logits"]])
    note("tokens", [tokens_of(model, *scene) for scene in scenes["tokens"]])
    note("seed", torch.rand(1).item())
    note("failures", failures(model, scenes["ids"]))
    note("timeline", timeline(model, scenes["ids"], "auto"))
    note("one by one", timeline(model, scenes["ids"], "off"))
    note("chunks", chunks_of(model))
    note("two", of_two(folder, scenes["ids"], 30))
    note("silent", silent(folder, scenes["ids"]))
    note("killed", killed(model, scenes["ids"]))
