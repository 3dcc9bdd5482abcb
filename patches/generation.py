"""Replaces ``generate``: checks the request and brings a cache with room for the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from qwen_longctx import settings_of
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.geometry.layout import read_call
from qwen_longctx.kv.fingerprint import base_of
from qwen_longctx.kv.hf_cache import LongContextCache
from qwen_longctx.kv.sequence import held_tokens, open_cache, origins_of, sequence_of
from qwen_longctx.kv.store import STEP
from qwen_longctx.patches import graphs, room, stages
from qwen_longctx.patches.method import PatchedMethod
from qwen_longctx.patches.model import (
    check_cache_type,
    check_ids,
    check_static_cache,
    given_inputs,
    no_batching,
    padding_mask,
)
from qwen_longctx.patches.runs import outermost
from qwen_longctx.prefill.link import LinkedCall
from qwen_longctx.stage import layer_count, stage_of

_STATIC = ("static", "offloaded_static")
_DYNAMIC = (None, "dynamic", "dynamic_full")  # the last is what older transformers ask for drafts
_ALIKE = ("do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p")  # on all ranks
Configs = tuple[Any, ...]  # generation configs, the most binding first
Partner = tuple[Any, LongContextConfig]  # a base model and its settings


def generate(patched: PatchedMethod, self: Any, **arguments: Any) -> Any:
    """The stock generate on a `LongContextCache`, unless the caller brings or asks for another cache."""
    configs = arguments.get("generation_config"), self.generation_config
    stage, random = stage_of(self.model), None
    with nullcontext() if stage is None else stages.call(self.model, stage) as call:
        settings = patched.settings(self.config)
        run = _prepared(patched, self, settings, configs, arguments)
        if call is not None:
            random = _agree(call, run, configs, arguments)
    kept = _settings_kept(run.cache, settings, run.announced, run.end, custom=run.custom)
    captured = _captured(run.cache, run.captures and not run.custom and stage is None)
    with kept, captured, stages.generating(self.model, stage, random):
        return patched.call(self, **arguments)


class _Prepared(NamedTuple):
    """What is known of a generate before its first forward.

    Attributes
    ----------
    prompt : torch.Tensor, optional
    cache : transformers Cache, optional
    tokens, limit : int
        Of the text before generation starts, cached ones included, and when it ends at the latest.
    announced, end : int
        Length of the prompt that the first forward passes, and tokens held then.
    captures, custom : bool
        Whether there are tokens enough for a graph, and whether the loop is not that of transformers.
    """

    prompt: torch.Tensor | None
    cache: Any
    tokens: int
    limit: int
    announced: int
    end: int
    captures: bool
    custom: bool


def _prepared(
    patched: PatchedMethod, self: Any, settings: LongContextConfig, configs: Configs, arguments: dict[str, Any]
) -> _Prepared:
    """Check a generate, all of it, and bring the cache into `arguments`."""
    prompt = _prompt(arguments)
    cache = arguments.get("past_key_values")
    check_cache_type(cache)
    held = 0
    if cache is not None:
        open_cache(cache, (settings.chunk_size, settings.local_size), layer_count(self.model))
        held = held_tokens(cache)
    if prompt is not None:
        _check_prompt(self, prompt, held, configs, arguments)
    tokens, limit = _lengths(prompt, held, configs, arguments)
    implementation = _option(configs, arguments, "cache_implementation")
    _check_cache_implementation(implementation, limit, settings)
    check_static_cache(cache, tokens, settings)
    length = min(limit, tokens + STEP)  # the cache grows from there on
    uses_cache = _option(configs, arguments, "use_cache") is not False
    ours = cache is None and implementation in _DYNAMIC and uses_cache and prompt is not None
    if ours:
        cache = arguments["past_key_values"] = LongContextCache(length, kv_cache=settings.kv_cache)
    if prompt is not None and cache is not None:
        _check_memory(self, prompt, cache, length, settings, configs, arguments, ours)
    if ours and implementation is not None:  # transformers refuses it beside a cache
        arguments["cache_implementation"] = None
    captures = settings.cuda_graphs and limit - tokens >= graphs.FEWEST_TOKENS
    begun = 1 if prompt is None else prompt.shape[1]
    announced, end = 0 if prompt is None or held else begun, begun + held * (begun <= held)
    custom = arguments.get("custom_generate") is not None
    return _Prepared(prompt, cache, tokens, limit, announced, end, captures, custom)


def _agree(call: LinkedCall, run: _Prepared, configs: Configs, arguments: dict[str, Any]) -> Any:
    """Go on if the other ranks of a pipeline generate alike; returns what all of them sample from."""
    options = {name: _option(configs, arguments, name) for name in stages.REFUSED}
    implementation = _option(configs, arguments, "cache_implementation")
    if implementation not in _DYNAMIC:
        raise Unsupported(
            f"cache_implementation={implementation!r} does not go with a pipeline over processes: leave it out"
        )
    alike = {name: _option(configs, arguments, name) for name in _ALIKE}
    mask = padding_mask(arguments.get("attention_mask"))
    alike |= {"lengths of prompt and text": (run.tokens, run.limit)}
    return stages.begin_generate(call, run.prompt, mask, run.cache, options, alike)


@contextmanager
def _settings_kept(cache: Any, settings: LongContextConfig, announced: int, end: int, custom: bool) -> Iterator[None]:
    """All forwards of the block on `cache` run with `settings` and know where the prompt ends; the first its length.

    `custom` says that the loop is not that of transformers.
    """
    if cache is None:
        yield
        return
    state = sequence_of(cache)
    before = state.settings, state.prompt_end
    state.settings, state.prompt_end, state.announced = settings, end, announced
    state.followed = None if custom else 0
    try:
        yield
    finally:
        (state.settings, state.prompt_end), state.announced, state.followed = before, 0, None


@contextmanager
def _captured(cache: Any, wanted: bool) -> Iterator[None]:
    """The tokens of the block on `cache` may be captured; what was captured goes with its end."""
    if cache is None:
        yield
        return
    state = sequence_of(cache)
    before, state.graphs = state.graphs, graphs.Decoding() if wanted else None
    try:
        yield
    finally:
        state.graphs = before


def _prompt(arguments: dict[str, Any]) -> torch.Tensor | None:
    """What the first forward is given; None where generate makes its own beginning of a text."""
    embeds = arguments.get("inputs_embeds")
    ids = arguments.get("inputs") if arguments.get("inputs") is not None else arguments.get("input_ids")
    prompt = ids if embeds is None else embeds
    if prompt is not None:
        given_inputs({"input_ids": prompt} if embeds is None else {"inputs_embeds": prompt})
    return prompt


def _option(configs: Configs, arguments: dict[str, Any], name: str) -> Any:
    """An option of generate: given by keyword, by the generation config of the call, or by that of the model."""
    values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _check_prompt(model: Any, prompt: torch.Tensor, held: int, configs: Configs, arguments: dict[str, Any]) -> None:
    """Refuse what a forward would refuse, and rows that are padded on the right, before the first chunk.

    Puts a mask into `arguments` where transformers would make one that hides tokens within the text, or is too short.
    """
    check_ids(prompt, model.config.vocab_size, "prefill")
    batch, tokens = prompt.shape[:2]
    embedded = arguments.get("inputs_embeds") is not None
    mask = padding_mask(arguments.get("attention_mask"))
    whole = not isinstance(mask, torch.Tensor) or mask.shape[-1:] == (tokens,)
    if held and embedded and not (whole and tokens > held):
        raise InvalidValue(
            f"inputs_embeds hold {tokens} tokens, the cache {held}: beside a filled cache generate takes embeddings of "
            "the whole text, cached tokens included, and an attention_mask of as many or none"
        )
    if whole and tokens > held:
        held = 0  # the whole text so far, of which the cache may hold the beginning
    if mask is None and not held and not embedded:
        mask = arguments["attention_mask"] = _inferred_mask(prompt, configs, arguments)
    elif mask is None and held:
        mask = arguments["attention_mask"] = prompt.new_ones((batch, held + tokens), dtype=torch.long)
    if mask is None:
        return
    known = origins_of(arguments["past_key_values"]) if held else ()
    call = read_call(mask, None, batch=batch, tokens=tokens, cached=held, known=known)
    for number, row in enumerate(call.rows):
        if row.last and row.last < call.end:
            raise InvalidValue(
                f"row {number} of attention_mask ends with {call.end - row.last} tokens of padding, and generate would "
                'go on behind them: pad on the left (tokenizer.padding_side = "left")'
            )


def _inferred_mask(ids: torch.Tensor, configs: Configs, arguments: dict[str, Any]) -> torch.Tensor | None:
    """The mask that generate makes of pad tokens where it is given none, with padding before a row's text only.

    A pad token within the text is a token like others: the drafts of assisted decoding may hold it.
    """
    pad, eos = (_option(configs, arguments, name) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    if pad is None or int(pad) in ends:
        return None
    padding = ids == int(pad)
    if not bool(padding.any()):
        return None
    leading = padding.long().cumprod(dim=1).bool()
    if ids.shape[0] > 1 and bool((padding[:, -1] & ~leading[:, -1]).any()):
        return (~padding).long()  # padded on the right, it seems: refused by the caller
    return (~leading | leading.all(dim=1, keepdim=True)).long()


def _lengths(prompt: torch.Tensor | None, held: int, configs: Configs, arguments: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the text before generation starts, cached ones included, and when it ends at the latest."""
    tokens = prompt.shape[1] if prompt is not None else 0
    tokens = held + tokens if tokens <= held else tokens
    new = _option(configs, arguments, "max_new_tokens")
    if new is None:
        new = (_option(configs, arguments, "max_length") or 0) - tokens
    return tokens, tokens + max(0, new)


def _check_cache_implementation(implementation: Any, length: int, settings: LongContextConfig) -> None:
    if implementation == "paged":
        raise Unsupported(no_batching("cache_implementation='paged'"))
    if implementation in _STATIC and length > settings.stride:
        raise Unsupported(
            f"cache_implementation={implementation!r} holds one chunk of {settings.stride} tokens at most, this run "
            f"has {length}: leave it out and generate() takes a LongContextCache"
        )


def _check_memory(
    model: Any,
    prompt: torch.Tensor,
    cache: Any,
    length: int,
    settings: LongContextConfig,
    configs: Configs,
    arguments: dict[str, Any],
    ours: bool,
) -> None:
    """Say before the start that a run of `length` tokens cannot fit, and decide the kind of its cache if it is open."""
    beams, sequences = (_option(configs, arguments, name) or 1 for name in ("num_beams", "num_return_sequences"))
    mask = padding_mask(arguments.get("attention_mask"))
    padded = isinstance(mask, torch.Tensor) and not bool(mask.all())
    rows = prompt.shape[0] * max(beams, sequences)
    need = room.need_of(model.model, cache, length, rows, padded=padded, beams=beams > 1)._replace(own=ours)
    drafts, target = _partners(model, arguments)

    def others(kind: str) -> Counter[torch.device]:
        if drafts is None:
            return Counter()
        own = drafts[1].kv_cache
        return room.bytes_of_cache(drafts[0], length, rows, kind if own == "auto" else own)

    judging = 0 if target is None else room.bytes_beside_cache(target[0], length, rows, target[1])
    room.check_room(model.model, need, room.with_kind_of(cache, settings), cache, others, judging)
    if ours and drafts is not None and drafts[1].kv_cache == "auto":
        room.take_room(model.model, cache, rows)  # so that the drafts find what is left


def _partners(model: Any, arguments: dict[str, Any]) -> tuple[Partner | None, Partner | None]:
    """In assisted decoding the base model that makes drafts, or the one that judges those of `model`; with settings.

    Where a draft model is not patched, nothing is known of its cache.
    """
    drafts, outer = arguments.get("assistant_model"), outermost()
    return tuple(
        None if one is None or one is model or (settings := _settings_of(one)) is None else (base_of(one), settings)
        for one in (drafts, outer)
    )


def _settings_of(model: Any) -> LongContextConfig | None:
    try:
        return settings_of(model)
    except InvalidType:  # a model of another kind
        return None


def refuse_batching(patched: PatchedMethod, self: Any, **arguments: Any) -> Any:
    """Refuse continuous batching before its thread starts, whose errors are told beside empty answers only."""
    raise Unsupported(no_batching(patched.name))
