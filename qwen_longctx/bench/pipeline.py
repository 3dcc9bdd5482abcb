"""Several cards on chunks of one prompt: one card, one chunk at a time over ``device_map``, and chunks at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from qwen_longctx import LongContextCache, patched_qwen
from qwen_longctx.bench.shapes import NAMES, random_model, random_prompt
from qwen_longctx.bench.simulation import HOST, part, simulated
from qwen_longctx.bench.speed import DENSE, check_lengths, sparse_settings
from qwen_longctx.bench.timing import timed
from qwen_longctx.checkpoint import local_shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidValue
from qwen_longctx.patches import pipelined
from qwen_longctx.prefill.pipeline import Stage
from qwen_longctx.prefill.schedule import Cost, Schedule, cost_of

LENGTHS = (262144,)
WAYS = ("one", "off", "equal", "auto", "measured")  # one card, and values of the setting `pipeline` over all of them
_DENSITY = 0.28  # of the default on texts, see results/quality*.json
_WARM_UP = 5  # chunks
_LONG = 100.0  # seconds from which on a prompt is run once
_POINTS = 1000  # of a timeline


@torch.no_grad()
def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    shape: str = NAMES[0],
    cards: int = 2,
    ways: Sequence[str] = WAYS,
    density: float = _DENSITY,
    sparse_only: bool = False,
    kv_cache: str = "device",
    prefill_chunk_size: int | None = None,
    timeline: bool = False,
) -> Iterator[dict[str, Any]]:
    """Time to the first token by each way, dense and sparse: of a second prompt, and of the first of its length.

    The first one plans anew for lengths that were not seen before; where it takes long there is no second. Logits of
    the last token are compared with those of the first way. Where there are fewer cards, the layers of one are taken
    for those of several: on streams of their own, or on the CPU one after the other, which shows that the command works
    and nothing else.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
    tiny : bool
        A toy shape, in short chunks.
    shape : str
        Of the model, see ``bench.shapes.NAMES``.
    cards : int
        Cards that share the layers.
    ways : sequence of str
        Some of `WAYS`. Without "one" nothing is said of how much faster others are.
    density : float
        Share of the blocks that sparse prefill keeps.
    sparse_only : bool
        Leave dense prefill out.
    kv_cache : {"device", "fp8", "int8", "host"}
    prefill_chunk_size : int, optional
        The setting of that name.
    timeline : bool
        Run each way once more under PyTorch's profiler, for the times in which cards are busy.

    Raises
    ------
    InvalidValue
        A length or the number of cards is too small.
    """
    check_lengths("pipeline", lengths)
    model = random_model(device, tiny, layers=4 if tiny else None, shape=shape)
    if not 2 <= cards <= model.config.num_hidden_layers:
        raise InvalidValue(f"bench pipeline shares layers among 2 cards or more, one layer each at least, got {cards}")
    size = prefill_chunk_size or (128 if tiny else 32768)
    kinds: list[dict[str, Any]] = [] if sparse_only else [DENSE]
    kinds.append({**sparse_settings(max(lengths), density), "sparse_attention_threshold": 1})
    compared = _Compared()
    spread = False
    for way in sorted(ways, key=WAYS.index):
        if way != "one" and not spread:
            model, spread = _spread(model, cards, device), True
        for length in lengths:
            ids = random_prompt(length, model.config.vocab_size).to(device)
            for kind in kinds:
                given = {**kind, "kv_cache": kv_cache, "prefill_chunk_size": size}
                given["pipeline"] = "off" if way == "one" else way
                with _stand_ins(cards if way != "one" else 1, device):
                    row, logits = _row(model, ids, given, device, timeline)
                about = {"tokens": length, "kind": row["kind"], "way": way, "cards": 1 if way == "one" else cards}
                if way == "one":
                    row["simulated_seconds"] = _simulated(model, given, length, row["seconds"], cards)
                yield {**about, **row, **compared.to_the_first(length, row["kind"], row["seconds"], logits)}


class _Compared:
    """What the first way gave, by length and kind."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, str], tuple[float, torch.Tensor]] = {}

    def to_the_first(self, length: int, kind: str, seconds: float, logits: torch.Tensor) -> dict[str, Any]:
        """How many times as fast, and how far the last token's logits are from those of the first way."""
        before, wanted = self._first.setdefault((length, kind), (seconds, logits))
        return {
            "times_as_fast": round(before / seconds, 3),
            "same_token": bool(wanted.argmax() == logits.argmax()),
            "largest_difference": float((wanted - logits).abs().max()),
            "largest_logit": float(wanted.abs().max()),
        }


def _row(
    model: Any, ids: torch.Tensor, given: dict[str, Any], device: torch.device, timeline: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    """The part of a row that one way gives, and logits of the last token, float32 of shape (vocabulary,)."""
    _first_token(model, ids[:, : _WARM_UP * given["prefill_chunk_size"]], given, device)
    first, logits, report = _first_token(model, ids, given, device)
    seconds = first
    if first < _LONG:
        seconds, logits, report = _first_token(model, ids, given, device)
    found = report.get("pipeline", {"stages": 1})
    row: dict[str, Any] = {
        "kind": "dense" if given["sparse"] == "off" else "sparse",
        "density": round(report["density"], 4),
        "kv_cache": given["kv_cache"],
        "stages": found["stages"],
        "seconds": round(seconds, 4),
        "first_seconds": round(first, 4),
    }
    if "chunks" in found:
        lengths = [stop - start for start, stop in found["chunks"]]
        row |= {"chunks": len(lengths), "shortest_chunk": min(lengths), "waits": found["waits"]}
    if timeline:
        row["busy"] = _busy(lambda: _first_token(model, ids, given, device))
    return row, logits


def _simulated(model: Any, given: dict[str, Any], tokens: int, seconds: float, cards: int) -> dict[str, float]:
    """What ``bench simulation`` makes of one card's seconds on `cards` cards, by the setting `pipeline`.

    Parts take their shares of the seconds as the schedule expects, since nothing else is known of them here.
    """
    kind = "dense" if given["sparse"] == "off" else "sparse"
    shape, size = local_shape(model.model), given["prefill_chunk_size"]
    settings = LongContextConfig.from_model_config(model.config, **given)
    cost = cost_of(shape, settings, None if kind == "dense" else given["sparse"])
    equal = list(Schedule(0, tokens, size))
    scale = seconds / sum(cost.seconds(start, stop - start) for start, stop in equal) / shape.layers
    layer = Cost(*(scale * value for value in (cost.token, cost.pair, cost.chunk)))
    cuts = {"equal": equal, "auto": list(Schedule(0, tokens, size, cards, cost))}
    return {
        way: round(simulated(chunks, shape, cards, layer, HOST[kind], at_once=True), 4) for way, chunks in cuts.items()
    }


def _first_token(
    model: Any, ids: torch.Tensor, given: dict[str, Any], device: torch.device
) -> tuple[float, torch.Tensor, dict[str, Any]]:
    """Seconds to the logits of the last token, these, and the cache's report."""
    cache = LongContextCache(ids.shape[1] + 1, kv_cache=given["kv_cache"])
    logits: list[torch.Tensor] = []

    def run() -> None:  # which ends by waiting for all devices
        logits.append(model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1])

    with patched_qwen(model, **given):
        seconds = timed(run, device)
    gc.collect()  # modules and their methods refer to each other
    return seconds, logits[0].float().cpu(), cache.report()


def _spread(model: Any, cards: int, device: torch.device) -> Any:
    """The model over the first CUDA devices, as many layers on each as can be; as it is where there are not so many."""
    if device.type != "cuda" or torch.cuda.device_count() < cards:
        return model
    from accelerate import dispatch_model

    layers = model.config.num_hidden_layers
    places = {f"model.layers.{n}": n * cards // layers for n in range(layers)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": cards - 1, "lm_head": cards - 1}
    return dispatch_model(model, {**places, **ends}, main_device=0)


@contextmanager
def _stand_ins(cards: int, device: torch.device) -> Iterator[None]:
    """On a machine with fewer cards, layers of one device that count as those of several while the block runs."""
    if cards == 1 or (device.type == "cuda" and torch.cuda.device_count() >= cards):
        yield
        return
    here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device

    def stages(layers: Any) -> tuple[Stage, ...]:
        number = len(layers)
        return tuple(Stage(here, *part(number, cards, i)) for i in range(cards))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(pipelined, "stages_of", stages))
        stack.enter_context(mock.patch.object(pipelined, "why_not", lambda stages, base: ""))
        yield


def _busy(run: Any) -> dict[str, list[list[float]]]:
    """Seconds from the first kernel on in which each card computes, by its number: joined where pauses are short."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    by_card: dict[int, list[tuple[int, int]]] = {}
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() == wanted and event.duration_ns() > 0:
            begin = event.start_ns()
            card = event.device_index() if cuda else 0
            by_card.setdefault(card, []).append((begin, begin + event.duration_ns()))
    start = min((begin for spans in by_card.values() for begin, _ in spans), default=0)
    end = max((stop for spans in by_card.values() for _, stop in spans), default=1)
    pause = (end - start) / _POINTS
    return {
        str(card): [[round((x - start) / 1e9, 4) for x in span] for span in _joined(sorted(spans), pause)]
        for card, spans in sorted(by_card.items())
    }


def _joined(spans: list[tuple[int, int]], pause: float) -> list[list[int]]:
    found: list[list[int]] = []
    for begin, stop in spans:
        if found and begin <= found[-1][1] + pause:
            found[-1][1] = max(found[-1][1], stop)
        else:
            found.append([begin, stop])
    return found
