"""Benchmarks on the shape of Qwen2.5-7B with random bf16 weights: right for time and memory, not for quality.

Every function yields plain rows; `cli` writes them to a results file with the environment as they come. Times are
medians of interleaved repeats after a warm-up of every shape.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Semaphore
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from qwen_longctx import LongContextCache, LongContextConfig, ops, patch_qwen, patched_qwen, sparsity
from qwen_longctx.attention.dense import attend
from qwen_longctx.geometry.layout import Call, RotarySource, make_layout
from qwen_longctx.geometry.rotary import rotate
from qwen_longctx.kv.store import Tensors

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


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, by CUDA events where there is CUDA."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000


def interleaved(functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every function, taken in turns after one warm-up of each, so that drift hits all alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return times


def attention(
    lengths: list[int], device: torch.device, tiny: bool = False, repeats: int = 2
) -> Iterator[dict[str, Any]]:
    """Dense dual chunk attention of one layer over a chunked prefill, against the raw cuDNN kernel.

    Ours: planning, rotating queries and keys, all segments, merging. Raw: the bare kernel over the same chunks as plain
    causal attention (a causal square and one rectangle a chunk), nothing merged. Both do the same multiplications.
    """
    for length in lengths:
        yield _attention_row(length, device, tiny, repeats)


@torch.no_grad()
def _attention_row(length: int, device: torch.device, tiny: bool, repeats: int) -> dict[str, Any]:
    config = model_config(tiny)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    settings = LongContextConfig.from_model_config(config)
    rotary = RotarySource(ROPE_THETA ** -(torch.arange(0, head_dim, 2, device=device) / head_dim), 1.0)
    q = torch.randn(1, length, heads, head_dim, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, length, kv_heads, head_dim, device=device, dtype=torch.bfloat16)
    kept = torch.empty_like(k)
    step = settings.prefill_chunk_size
    chunks = [(start, min(start + step, length)) for start in range(0, length, step)]

    def ours() -> None:
        for start, stop in chunks:
            layout = make_layout(
                Call.whole(1, length), start, stop, settings=settings, rotary=rotary, dtype=q.dtype, device=device
            )
            kept[:, start:stop] = rotate(k[:, start:stop], layout.tables.keys)
            attend(q[:, start:stop], Tensors(kept[:, :stop], v[:, :stop]), layout, head_dim**-0.5)

    def raw() -> None:
        for start, stop in chunks:
            mine = q[:, start:stop]
            _raw_kernel(mine, k[:, start:stop], v[:, start:stop], True)
            if start:
                _raw_kernel(mine, k[:, :start], v[:, :start], False)

    times = interleaved({"ours": ours, "raw": raw}, device, repeats)
    flop = 4 * (length * (length + 1) // 2) * heads * head_dim
    rates = {name: flop / statistics.median(values) / 1e12 for name, values in times.items()}
    return {
        "tokens": length,
        "seconds": times,
        "ours_tflops": round(rates["ours"], 1),
        "raw_cudnn_tflops": round(rates["raw"], 1),
        "share_of_raw": round(rates["ours"] / rates["raw"], 4),
    }


def _raw_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cuda":
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    else:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def stock(
    lengths: list[int], device: torch.device, tiny: bool = False, rounds: int = 5, new_tokens: int = 32
) -> Iterator[dict[str, Any]]:
    """Patched against stock transformers (SDPA) through plain generate: seconds of the prefill, and of a decoded token.

    Two models of the same weights, one of them patched, generate at the same time and take turns token by token, so
    that a noisy host hits both alike. Stock attention may plan anew for every length that it has not met, as cuDNN
    does: "decode" are the tokens of the first round, as a user meets them, "decode_again" those of later rounds. Both
    threads share one core where the system allows: cores of a busy host differ by half, for seconds on end.
    """
    model = random_model(device, tiny)
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    models = {"stock": model, "patched": patch_qwen(copy.deepcopy(model, shared))}
    with ThreadPoolExecutor(1, initializer=_pin) as one, ThreadPoolExecutor(1, initializer=_pin) as two:
        threads = dict(zip(models, (one, two), strict=True))  # two, because cuDNN's plans are kept by thread
        for length in lengths:
            ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
            parts = ("prefill", "decode", "decode_again")
            seconds: dict[str, list[float]] = {f"{name}_{part}": [] for part in parts for name in models}
            _in_turns(models, threads, ids, 1)  # warm-up
            for number in range(rounds):
                for name, (prefill, _, *decode) in _in_turns(models, threads, ids, new_tokens).items():
                    seconds[f"{name}_prefill"].append(prefill)
                    seconds[f"{name}_decode_again" if number else f"{name}_decode"] += decode
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratios = {f"{part}_ratio": medians[f"patched_{part}"] / medians[f"stock_{part}"] for part in parts}
            yield {
                "tokens": length,
                "new_tokens": new_tokens,
                **{f"{name}_seconds": round(value, 5) for name, value in medians.items()},
                **{name: round(value, 4) for name, value in ratios.items()},
                "seconds": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
            }


def _pin() -> None:
    """Keep this thread on the last core of those that the process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Turn(BaseStreamer):
    """A streamer that lets the other generate have a token after each of its own, and times its own.

    Parameters
    ----------
    mine, other : threading.Semaphore
        Released when it is this one's turn, and the other's.
    """

    def __init__(self, mine: Semaphore, other: Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []
        self._begin = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called by generate with the prompt, then with each token once it is on the host."""
        if self._begin:
            self.seconds.append(time.perf_counter() - self._begin)
        self.other.release()
        self.mine.acquire()
        self._begin = time.perf_counter()

    def end(self) -> None:
        """Called by generate at the end; see `_in_turns`."""


def _in_turns(
    models: dict[str, Qwen2ForCausalLM], threads: dict[str, ThreadPoolExecutor], ids: torch.Tensor, new_tokens: int
) -> dict[str, list[float]]:
    """Seconds to the first token and between tokens of two models that generate by turns."""
    semaphores = Semaphore(0), Semaphore(0)
    turns = dict(zip(models, (Turn(*semaphores), Turn(*semaphores[::-1])), strict=True))

    def run(name: str) -> None:
        turn = turns[name]
        try:
            turn.mine.acquire()
            models[name].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens + 1,
                min_new_tokens=new_tokens + 1,
                do_sample=False,
                streamer=turn,
            )
        finally:
            turn.other.release(2 + new_tokens)  # never waits again for this one, also when it failed

    running = [threads[name].submit(run, name) for name in models]
    semaphores[0].release()
    for one in running:
        one.result()
    return {name: turn.seconds for name, turn in turns.items()}


@torch.no_grad()
def mlp(length: int, device: torch.device, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Peak activation memory of one MLP on a whole prompt, sliced by the patch against stock.

    Intermediate activations are what lies between the hidden states that go in and those that come out (Qwen's 71 GB
    at 1M tokens are two of them). In chunked prefill an MLP meets one chunk at a time; that peak counts its output too.
    """
    with torch.device("meta"):
        config = model_config(tiny)
        config.num_hidden_layers, config.vocab_size = 1, 97
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    module = model.model.layers[0].mlp
    x = torch.randn(1, length, config.hidden_size, device=device, dtype=torch.bfloat16)

    def peak(tokens: int) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        module(x[:, :tokens])
        return torch.cuda.max_memory_allocated(device) - before

    whole = peak(length)
    with patched_qwen(model):
        sliced = peak(length)
        chunked = peak(min(length, LongContextConfig.prefill_chunk_size))
    out = x.numel() * x.element_size()
    yield from [
        {
            "tokens": length,
            "mlp_chunk_size": LongContextConfig.mlp_chunk_size,
            "prefill_chunk_size": LongContextConfig.prefill_chunk_size,
            "stock_peak_bytes": whole,
            "sliced_peak_bytes": sliced,
            "chunked_and_sliced_peak_bytes": chunked,
            "output_bytes": out,
            "cut_of_intermediate_activations": round(1 - (sliced - out) / (whole - out), 5),
            "cut_in_chunked_prefill": round(1 - chunked / whole, 5),
        }
    ]


@torch.no_grad()
def headline(length: int, device: torch.device, tiny: bool = False, new_tokens: int = 32) -> Iterator[dict[str, Any]]:
    """One prompt of `length` tokens and `new_tokens` decoded, through the patched model's plain generate."""
    model = random_model(device, tiny)
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    with patched_qwen(model, sparse="off"):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        _ = out.sequences.tolist()
    seconds = time.perf_counter() - begin
    report = out.past_key_values.report()
    cuda = device.type == "cuda"
    yield from [
        {
            "tokens": length,
            "new_tokens": out.sequences.shape[1] - length,
            "layers": model.config.num_hidden_layers,
            "attention": "dense, every layer",
            "seconds": round(seconds, 2),
            "prefill_seconds": round(report["prefill_seconds"], 2),
            "decode_seconds_per_token": round((seconds - report["prefill_seconds"]) / new_tokens, 4),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else 0,
            "kv_cache_bytes": sum(
                b.numel() * b.element_size() for x in out.past_key_values.layers for b in x.store.buffers
            ),
        }
    ]


# with the dense spans of a run, no less than block scores keep of real text by default (results/quality*.json)
DENSITIES = {32768: 0.29, 65536: 0.085, 131072: 0.042, 262144: 0.026, 524288: 0.018, 1_000_000: 0.02}
DENSE = {"sparse": "off"}
_ANY_RECALL = 1e-4  # far below what the least share of evenly spread attention holds


@torch.no_grad()
def speed(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    density: float | None = None,
    dense_layers: int = 0,
    whole_up_to: int = 131072,
) -> Iterator[dict[str, Any]]:
    """Time to the first token: stock transformers with SDPA, dense and sparse prefill, and where sparse spends it.

    Random weights attend evenly, so sparse runs block scores at a fixed density, steered towards a recall that every
    head has: the work of a run by default that keeps as much, trials of first budgets included. The breakdown is of
    the same run, by events that wait for nothing. Every length is warmed up on one layer before.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
    tiny : bool
        A toy shape.
    density : float, optional
        Share of the blocks; by default one for each length (`DENSITIES`, of the nearest length).
    dense_layers : int
        Project dense of longer prompts from two models of this many and twice as many layers, run at full length; 0
        runs it whole.
    whole_up_to : int
        Longest prompt for stock transformers, whose cache copies itself, and for dense as it is.
    """
    model = random_model(device, tiny)
    for length in lengths:
        share = density or DENSITIES[min(DENSITIES, key=lambda known: abs(known - length))]
        sparse = {"sparse": "block_scores", "density": share, "recall_target": _ANY_RECALL}
        sparse["sparse_attention_threshold"] = min(length - 1, 32767)
        ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
        row: dict[str, Any] = {"tokens": length, "density_asked": share}
        _warm_up(ids, [sparse, DENSE, *([None] if length <= whole_up_to else [])], device, tiny)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with Breakdown(model, device) as clock:
            row["sparse_seconds"], cache = _first_token(model, ids, sparse, device)
        row["density"] = round(cache.report()["density"], 5)
        row["list_kernel"] = cache.sparse_state.records[-1].kernel
        row["sparse_breakdown_seconds"] = clock.seconds(row["sparse_seconds"])
        if device.type == "cuda":
            row["sparse_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        del cache  # must be gone before the next run
        if dense_layers and length > whole_up_to:
            row["dense_seconds"] = _projected(ids, device, tiny, dense_layers, model.config.num_hidden_layers)
            row["dense_is"] = f"projected from {dense_layers} and {2 * dense_layers} layers at full length"
        else:
            row["dense_seconds"], row["dense_is"] = _first_token(model, ids, DENSE, device)[0], "run whole"
        if length <= whole_up_to:
            row["stock_seconds"] = _first_token(model, ids, None, device)[0]
        row["dense_over_sparse"] = round(row["dense_seconds"] / row["sparse_seconds"], 3)
        row["selection_share"] = round(row["sparse_breakdown_seconds"].get("selection", 0) / row["sparse_seconds"], 4)
        yield {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def _warm_up(ids: torch.Tensor, runs: list[dict[str, Any] | None], device: torch.device, tiny: bool) -> None:
    """Every run of a length on one layer: kernels are compiled, and cuDNN plans, once a process for every shape."""
    model = random_model(device, tiny, layers=1)
    for overrides in runs:
        _first_token(model, ids, overrides, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the long run finds its memory in one piece


def _first_token(
    model: Qwen2ForCausalLM, ids: torch.Tensor, overrides: dict[str, Any] | None, device: torch.device
) -> tuple[float, Any]:
    """Seconds from the prompt to the first token's logits, and the cache; stock transformers if `overrides` is None."""
    cache = None if overrides is None else LongContextCache(ids.shape[1] + 1)
    found = []

    def run() -> None:
        found.append(model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values)

    with nullcontext() if overrides is None else patched_qwen(model, **overrides):
        seconds = timed(run, device)
    return seconds, found[0]


def _projected(ids: torch.Tensor, device: torch.device, tiny: bool, layers: int, of: int) -> float:
    """Seconds of `of` layers from the slope between `layers` and twice as many, after `_warm_up`.

    Were planning in the first time only, the slope would lose it once for every layer.
    """
    times = []
    for count in (layers, 2 * layers):
        model = random_model(device, tiny, layers=count)
        times.append(_first_token(model, ids, DENSE, device)[0])
        del model
    return times[0] + (of - layers) * (times[1] - times[0]) / layers


class Breakdown:
    """Seconds of a sparse prefill in its linear layers, selection, attention kernels and recall, by events.

    The functions that do the work are wrapped while the context is open.
    """

    def __init__(self, model: Qwen2ForCausalLM, device: torch.device) -> None:
        self.model, self.device = model, device
        self.marks: dict[str, list[tuple[Any, Any]]] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Breakdown:
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                self._wrap(vars(module), "forward", "linear", module.forward)
        for rule in sparsity.RULES:
            selecting = sparsity.RULES[rule]
            timed_rule = selecting._replace(select=self._clocked("selection", selecting.select))
            self._wrap(sparsity.RULES, rule, "", selecting, timed_rule)
        self._wrap(vars(sparsity), "compact", "selection", sparsity.compact)
        for kernel, function in ops._LIST_KERNELS.items():
            self._wrap(ops._LIST_KERNELS, kernel, "attention", function)
        self._wrap(vars(sparsity), "merge", "merge", sparsity.merge)
        full = sparsity.SpanView.full_lse
        sparsity.SpanView.full_lse = self._clocked("recall", full)  # type: ignore[method-assign]
        self._undo.append(lambda: setattr(sparsity.SpanView, "full_lse", full))
        return self

    def __exit__(self, *error: Any) -> None:
        for undo in reversed(self._undo):
            undo()

    def _wrap(self, place: dict[str, Any], name: str, part: str, function: Any, by: Any = None) -> None:
        before = place.get(name)
        place[name] = by or self._clocked(part, function)
        self._undo.append(lambda: place.pop(name) if before is None else place.update({name: before}))

    def _clocked(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = function(*args, **kwargs)
            self.marks.setdefault(part, []).append((start, self._mark()))
            return result

        return clocked

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds by part, and the rest of `total`."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        parts = {
            part: sum(a.elapsed_time(b) / 1000 if cuda else b - a for a, b in marks)
            for part, marks in self.marks.items()
        }
        parts["rest"] = total - sum(parts.values())
        return {part: round(value, 4) for part, value in {**parts, "total": total}.items()}
