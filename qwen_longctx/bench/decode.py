"""A decoded token by the memory that it reads: through plain generate, and its attention alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, Qwen2ForCausalLM

from qwen_longctx import LongContextCache, LongContextConfig, patched_qwen
from qwen_longctx.attention.dense import attend
from qwen_longctx.bench.shapes import random_model
from qwen_longctx.bench.timing import Clock, timed
from qwen_longctx.geometry.layout import Call, Layout, Origin, RotarySource, make_layout
from qwen_longctx.kv.eight_bit import Turning
from qwen_longctx.kv.sequence import transaction
from qwen_longctx.kv.store import Store
from qwen_longctx.ops.eight_bit import EightBit
from qwen_longctx.patches.method import cache_argument

LENGTHS = (4096, 32768, 131072, 524288, 1_000_000)
_AT_A_TIME = 65536  # tokens that are drawn at once
_HEAD_START = 100_000_000  # cycles that the device waits, so that launches are queued and only their work is timed
_ON_THE_HOST = 8  # new tokens of a round, each of which reads the whole cache over the bus
_READ = 1 << 32  # bytes of the reduction that measures the bandwidth


@torch.no_grad()
def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    whole_up_to: int = 131072,
    rounds: int = 3,
    new_tokens: int | None = None,
    kv_cache: str = "device",
    sparse_decode: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Seconds of a decoded token after a cache of random keys and values, one row, beside the bytes that it reads.

    Bytes are those of keys, values and weights without the embeddings. The bandwidth is that of a sum over a tensor in
    the same process; the share of a token is the time in which its bytes could be read, over the time that it took.
    Stock transformers runs SDPA on its own cache, which copies itself for every token. Every kind runs one round to
    warm up, then rounds in turns; medians are over all tokens but the first of each round. `without_graphs` is
    ``cuda_graphs=False``, which a cache on the host always is.

    "attention" is that of all layers alone: `pass` in one pass over the cache, `segments` by an engine a segment, and
    `sparse` to a share of the keys, their choice included. Shares of the bandwidth count all keys and values, also
    where a part of them is read.

    Parameters
    ----------
    lengths : list of int
        Tokens in the cache.
    device : torch.device
    tiny : bool
        A toy shape.
    whole_up_to : int
        Longest cache for stock transformers.
    rounds : int
    new_tokens : int, optional
        Of a round: 32, or 8 of a cache on the host, of which a token may take a second.
    kv_cache : {"device", "fp8", "int8", "host"}
        How our cache holds keys and values; stock transformers has them as they are.
    sparse_decode : float, optional
        Also measure sparse decode with this share of the keys.
    """
    new_tokens = new_tokens or (_ON_THE_HOST if kv_cache == "host" else 32)
    model = random_model(device, tiny)
    bandwidth = _bandwidth(device)
    embeddings = model.get_input_embeddings().weight
    weights = sum(x.numel() * x.element_size() for x in model.parameters()) - embeddings.numel() * embeddings.itemsize
    for length in lengths:
        row: dict[str, Any] = {
            "tokens": length,
            "new_tokens": new_tokens,
            "kv_cache": kv_cache,
            "read_gb_per_second": round(bandwidth / 1e9, 1),
        }
        ours = _our_cache(model, length, new_tokens, kv_cache)
        caches: dict[str, Any] = {"patched": ours}
        if kv_cache != "host":  # which is never captured
            caches["without_graphs"] = ours
        held = sum(_bytes_read(layer.store) for layer in ours.layers)
        row |= {"weight_bytes": weights, "kv_bytes": held}
        if sparse_decode is not None:
            caches["sparse"] = ours  # each leaves it as it was
        if length <= whole_up_to:
            caches["stock"] = _stock_cache(ours)
        seconds = _tokens(model, caches, length, rounds, new_tokens, sparse_decode)
        del caches
        for name, values in seconds.items():
            median = statistics.median(values)
            row[f"{name}_ms"] = round(1e3 * median, 3)
            row[f"{name}_share_of_bandwidth"] = round((weights + held) / bandwidth / median, 4)
        for name, values in _attention(model, ours, length, device, rounds, sparse_decode).items():
            median = statistics.median(values)
            row[f"attention_{name}_ms"] = round(1e3 * median, 4)
            row[f"attention_{name}_share_of_bandwidth"] = round(held / bandwidth / median, 4)
        row["seconds"] = {name: [round(value, 6) for value in values] for name, values in seconds.items()}
        yield row
        del ours


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of a plain sum, the best of ten."""
    x = torch.ones((_READ if device.type == "cuda" else 1 << 22) // 4, device=device)
    seconds = [timed(x.sum, device) for _ in range(10)]
    return x.numel() * x.element_size() / min(seconds)


def _bytes_read(store: Store) -> int:
    """Bytes of keys and values that a token attends to."""
    parts = ((x.codes, x.scales) if isinstance(x, EightBit) else (x,) for x in store.room())
    return sum(x[:, : store.length].nbytes for part in parts for x in part)


def _our_cache(model: Qwen2ForCausalLM, length: int, new_tokens: int, kv_cache: str) -> LongContextCache:
    """A cache as a prompt of `length` tokens leaves it, of random numbers beside the biases of keys."""
    config, settings = model.config, LongContextConfig.from_model_config(model.config)
    shape = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = LongContextCache(length + new_tokens + 1, kv_cache=kv_cache)
    rotary = model.model.rotary_emb
    with transaction(cache, settings, (Origin(0),), model.model):
        for number, layer in enumerate(model.model.layers):
            for start in range(0, length, _AT_A_TIME):
                index = torch.arange(start, min(start + _AT_A_TIME, length), device=model.device)
                k, v = torch.randn(2, 1, len(index), *shape, device=model.device, dtype=model.dtype)
                turning = Turning(index[None] % settings.stride, rotary.inv_freq, rotary.attention_scaling)
                cache.append(k, v, number, layer.self_attn.k_proj.bias, turning)
    return cache


def _stock_cache(ours: LongContextCache) -> DynamicCache:
    cache = DynamicCache()
    for number, layer in enumerate(ours.layers):
        keys, values = (x.to(layer.device).contiguous() for x in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache


def _tokens(
    model: Qwen2ForCausalLM,
    caches: dict[str, Any],
    length: int,
    rounds: int,
    new_tokens: int,
    sparse_decode: float | None,
) -> dict[str, list[float]]:
    """Seconds of decoded tokens by kind of cache; each cache holds `length` tokens afterwards."""
    ids = torch.randint(1, model.config.vocab_size, (1, length + 1), device=model.device)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for number in range(rounds + 1):
        for name, cache in caches.items():
            clock = Clock()
            graphs, share = name != "without_graphs", sparse_decode if name == "sparse" else None
            patch = partial(patched_qwen, model, cuda_graphs=graphs, sparse_decode=share, sparse_decode_threshold=1)
            with nullcontext() if name == "stock" else patch():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    streamer=clock,
                    **cache_argument(cache),
                )
            cache.crop(length - cache.get_seq_length())
            seconds[name] += clock.seconds() if number else []
    return seconds


def _attention(
    model: Qwen2ForCausalLM,
    cache: LongContextCache,
    length: int,
    device: torch.device,
    rounds: int,
    sparse_decode: float | None,
) -> dict[str, list[float]]:
    """Seconds of the attention of all layers for one token, nothing else of the model, and no time of the host."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    q = torch.randn(1, 1, config.num_attention_heads, head_dim, device=device, dtype=model.dtype)
    rotary = RotarySource(model.model.rotary_emb.inv_freq, 1.0)
    call = Call.whole(1, 1, length - 1)

    def all_layers(layout: Layout) -> Callable[[], None]:
        def run() -> None:
            for number, layer in enumerate(cache.layers):
                attend(q, layer.store, layout, head_dim**-0.5, number)

        return run

    runs = {}
    kinds: list[tuple[str, str, float | None]] = [("pass", "auto", None), ("segments", "sdpa", None)]
    if sparse_decode is not None:
        kinds.append(("sparse", "auto", sparse_decode))
    for name, kernel, keep in kinds:
        kind: dict[str, Any] = {"kernel": kernel, "sparse_decode": keep, "sparse_decode_threshold": 1}
        settings = LongContextConfig.from_model_config(config, sparse="off", **kind)
        how = {"settings": settings, "rotary": rotary, "dtype": model.dtype, "device": device}
        runs[name] = all_layers(make_layout(call, length - 1, length, mode="decode", **how))
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 * rounds):
        for name, run in runs.items():
            seconds[name].append(_queued(run, device))
    return seconds


def _queued(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that the device works on `run`: it waits first, until all of it is queued."""
    if device.type != "cuda":
        return timed(run, device)
    torch.cuda._sleep(_HEAD_START)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000
