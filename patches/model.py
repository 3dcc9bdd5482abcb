"""Replaces the base model's forward: checks the call, cuts it into chunks, and lays each of them out for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import StaticCache

from qwen_longctx import sparsity
from qwen_longctx.attention.ahead import Shapes, compile_ahead
from qwen_longctx.checkpoint import head_dim, local_heads, local_shape
from qwen_longctx.config import LongContextConfig
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.geometry.layout import Layout, Mode, RotarySource, make_layout, read_call
from qwen_longctx.kv.hf_cache import LongContextCache, guard
from qwen_longctx.kv.sequence import held_tokens, open_cache, origins_of, sequence_of
from qwen_longctx.patches import graphs, stages
from qwen_longctx.patches.attention import check_attended
from qwen_longctx.patches.linear import takes_rows
from qwen_longctx.patches.method import OLD_NAME, PatchedMethod, cache_argument
from qwen_longctx.patches.pipelined import pipelined
from qwen_longctx.patches.room import check_run
from qwen_longctx.patches.runs import in_stock_generate
from qwen_longctx.prefill.link import LinkedCall
from qwen_longctx.prefill.run import Run
from qwen_longctx.stage import Stage, layer_count, own_layers, stage_of

_WHOLE_ONLY = ("output_attentions", "output_hidden_states", "output_router_logits")


class Forward(NamedTuple):
    """One forward of a run: the tokens ``[start, stop)``, as indices in the cache."""

    run: Run
    start: int
    stop: int


def model_forward(
    patched: PatchedMethod, self: Any, *, dual_chunk_forward: Forward | None = None, **arguments: Any
) -> Any:
    """Hand every layer one layout of the forward; the rest is the stock forward.

    `dual_chunk_forward` comes from a patched ``ForCausalLM.forward``, which has checked the call and commits it. Called
    on its own, or by another head, the model does both itself, and prefills in chunks.
    """
    if dual_chunk_forward is not None:
        run, repeated = dual_chunk_forward.run, None
        if run.trusted and not torch.compiler.is_compiling():
            repeated = graphs.outputs(patched, self, run, arguments)
        return _one_forward(patched, self, dual_chunk_forward, arguments) if repeated is None else repeated
    if began_as_stock(arguments):
        return patched.call(self, **arguments)
    stage = stage_of(self)
    if stage is not None:
        return _over_stages(patched, self, stage, arguments)
    run = begin(patched, self, self, arguments)
    cut = in_chunks(run, self.config, arguments)
    run = pipelined(self, run) if cut else run
    # hidden states of all chunks are written to one tensor
    hidden = cut * len(run.call.rows) * run.tokens * self.config.hidden_size * self.dtype.itemsize
    check_run(self, run, cut, beside=hidden, at_the_end=hidden)
    arguments["past_key_values"] = run.cache
    with run.committed():
        if not cut:
            return _one_forward(patched, self, Forward(run, run.call.cached, run.call.end), arguments)
        return _in_chunks(patched, self, run, arguments)


def began_as_stock(arguments: dict[str, Any]) -> bool:
    """Whether a call continues what a stock generate began before its model was patched."""
    cache = arguments.get("past_key_values")
    if not hasattr(cache, "get_seq_length") or not held_tokens(cache):
        return False
    state = getattr(cache, "qwen_longctx", None)
    return (state is None or not state.length) and in_stock_generate()


def _one_forward(patched: PatchedMethod, model: Any, forward: Forward, arguments: dict[str, Any]) -> Any:
    run = forward.run
    inputs = given_inputs(arguments)[1]
    layout = _layout(model, forward, inputs)
    # a mask of four dimensions is handed on as it is, so transformers builds none of queries x keys
    arguments["attention_mask"] = torch.empty((0, 0, 0, 0), device=inputs.device)
    # without gradients to keep, gradient checkpointing has no reason to drop the cache
    with nullcontext() if run.mode == "train" else torch.no_grad():
        if stage_of(model) is None:
            outputs = patched.call(model, dual_chunk=layout, **arguments)
        else:
            outputs = _own_part(model, layout, arguments)
    check_attended(model, layout)
    if run.cache is not None:
        guard(run.cache)
    return outputs


@torch.compiler.disable
def _layout(model: Any, forward: Forward, inputs: torch.Tensor) -> Layout:
    run, rotary, stage = forward.run, model.rotary_emb, stage_of(model)
    layout = make_layout(
        run.call,
        forward.start,
        forward.stop,
        settings=run.settings,
        rotary=RotarySource(rotary.inv_freq, rotary.attention_scaling),
        dtype=inputs.dtype if inputs.is_floating_point() else model.embed_tokens.weight.dtype,
        device=inputs.device,
        mode=run.mode,
        weights=run.weights,
        sparse=run.sparse,
    )
    return layout if stage is None else replace(layout, first_layer=stage.first)


def _own_part(model: Any, layout: Layout, arguments: dict[str, Any]) -> torch.Tensor:
    """Hidden states behind the layers of this rank, of shape (batch, tokens, hidden); before the final norm."""
    name, hidden = given_inputs(arguments)
    if name == "input_ids":
        hidden = model.embed_tokens(hidden)
    beside = {
        "attention_mask": None,
        "position_embeddings": None,
        "use_cache": True,
        **cache_argument(arguments.get("past_key_values")),
    }
    for layer in own_layers(model):
        hidden = layer(hidden, dual_chunk=layout, **beside)
    return hidden


def over_stages(
    patched: PatchedMethod, model: Any, run: Run, arguments: dict[str, Any], stage: Stage, call: LinkedCall
) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """Pass a call through the layers of this rank, chunk by chunk as it comes from the rank before.

    Yields
    ------
    start, stop : int
        The tokens of a chunk, counted in the cache.
    hidden : torch.Tensor or None
        On the last rank what the base model hands out for them; None on others.
    """
    if run.sparse is not None and call.device.type == "cuda":
        run = replace(run, sparse=replace(run.sparse, ahead=True))  # the host waits for nothing within a chunk
    state = {"past_key_values": run.cache}
    for start, stop, taken in stages.chunks(model, run, stage, call):
        part = chunk_of(run, arguments, start, stop) if taken is None else {"inputs_embeds": taken, **state}
        hidden = _one_forward(patched, model, Forward(run, start, stop), part)
        if stage.is_last:
            with torch.no_grad():
                hidden = model.norm(hidden)
        else:
            call.send(start, stop, hidden)
        yield start, stop, hidden if stage.is_last else None
    if run.sparse is not None:
        run.sparse.state.check()  # before the other ranks are told that this one has passed


def _over_stages(patched: PatchedMethod, model: Any, stage: Stage, arguments: dict[str, Any]) -> Any:
    """The hidden states of all tokens, on every rank."""
    arguments = dict(arguments)
    with stages.call(model, stage) as call:
        stages.check_outputs(whole_outputs(model.config, arguments))
        run = begin(patched, model, model, arguments)
        size = len(run.call.rows) * run.tokens * model.config.hidden_size * model.dtype.itemsize
        check_run(model, run, True, beside=size, at_the_end=2 * size)
        stages.agree(call, run, given_inputs(arguments)[1])
        arguments["past_key_values"] = run.cache
        wants_cache, wants_dict = wanted_outputs(model.config, arguments)
        with run.committed():
            parts = [part for *_, part in over_stages(patched, model, run, arguments, stage, call) if part is not None]
            hidden = call.share(torch.cat(parts, dim=1) if parts else None)
    outputs = stages.outputs(model, "Base", run.cache)
    return with_fields(outputs, wants_dict, wants_cache, last_hidden_state=hidden)


def _in_chunks(patched: PatchedMethod, model: Any, run: Run, arguments: dict[str, Any]) -> Any:
    """The stock forward a chunk at a time, with the hidden states of all tokens."""
    arguments = dict(arguments)
    wants_cache, wants_dict = wanted_outputs(model.config, arguments)
    hidden: torch.Tensor | None = None
    outputs: Any = None
    for start, stop in run.chunks():
        part = chunk_of(run, arguments, start, stop)
        outputs = _one_forward(patched, model, Forward(run, start, stop), part)
        last = outputs.last_hidden_state
        if hidden is None:
            hidden = last.new_empty(last.shape[0], run.tokens, last.shape[2])
        hidden[:, start - run.call.cached : stop - run.call.cached] = last
    return with_fields(outputs, wants_dict, wants_cache, last_hidden_state=hidden)


def with_fields(outputs: Any, as_dict: bool, with_cache: bool, **fields: Any) -> Any:
    """Outputs of a model with other values in some fields, in the order of the class, as an object or a tuple."""
    values = {name: value for name, value in outputs.items() if with_cache or name not in ("cache", OLD_NAME)}
    changed = type(outputs)(**{**values, **fields})
    return changed if as_dict else changed.to_tuple()


def wanted_outputs(config: Any, arguments: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the caller wants the cache, and outputs as an object; takes ``return_dict`` out of `arguments`."""
    use_cache, return_dict = arguments.get("use_cache"), arguments.pop("return_dict", None)
    wants_cache = bool(config.use_cache if use_cache is None else use_cache)
    return wants_cache, getattr(config, "return_dict", True) if return_dict is None else bool(return_dict)


def chunk_of(run: Run, arguments: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments of the forward of one chunk, the tokens ``[start, stop)`` of the cache."""
    name, inputs = given_inputs(arguments)
    tokens = slice(start - run.call.cached, stop - run.call.cached)
    part = {**arguments, name: inputs[:, tokens], "use_cache": True, "return_dict": True}
    for along in ("position_ids", "cache_position"):
        if part.get(along) is not None:
            part[along] = part[along][..., tokens]
    return part


def in_chunks(run: Run, config: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call is cut: it is long, and neither gradients nor outputs of all layers are wanted."""
    whole = any(whole_outputs(config, arguments).values())
    return run.tokens > run.settings.prefill_chunk_size and run.mode != "train" and not whole


def whole_outputs(config: Any, arguments: dict[str, Any]) -> dict[str, bool]:
    """Whether outputs of all layers are asked for, by name."""
    return {name: _asked(config, arguments, name) for name in _WHOLE_ONLY}


def _asked(config: Any, arguments: dict[str, Any], name: str) -> bool:
    value = arguments.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def begin(patched: PatchedMethod, model: Any, base: Any, arguments: dict[str, Any]) -> Run:
    """Check a call before any work starts, and open its cache.

    Parameters
    ----------
    patched : PatchedMethod
    model, base : transformers.PreTrainedModel
        The model that was called, and the base model in it.
    arguments : dict
        Of the call, by name.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, PatchConflict
        What cannot be run, see `read_call` and `open_cache`.
    """
    _, inputs = given_inputs(arguments)
    cache = arguments.get("past_key_values")
    check_cache_type(cache)
    settings = settings_of(patched, model.config, cache)
    state = None
    if cache is not None:
        state = open_cache(cache, (settings.chunk_size, settings.local_size), layer_count(base))
    check_static_cache(cache, held_tokens(cache) + inputs.shape[1], settings)
    mode: Mode = "decode" if inputs.shape[1] == 1 else "prefill"
    if mode == "prefill":
        local_shape(base)  # refuses heads that cannot be divided among processes
    if needs_gradients(base, arguments.get("inputs_embeds"), cache):
        mode = "train"
        if getattr(cache, "kv_cache", None) == "auto":
            cache.settle("device")
        if getattr(cache, "kv_cache", "device") != "device":
            raise Unsupported(
                f'a cache of kind "{cache.kv_cache}" has no gradients: call the model under torch.no_grad(), or make '
                'the cache with kv_cache="device"'
            )
    new = cache is None and _wants_new_cache(
        model, base, mode, arguments, inputs.shape[1] > settings.prefill_chunk_size
    )
    if new:
        kind = "device" if mode == "train" else settings.kv_cache
        cache = LongContextCache(inputs.shape[1] if mode == "prefill" else 0, kv_cache=kind)
    held = held_tokens(cache)
    # without it every token would wait for the device
    trusted = mode == "decode" and state is not None and held > 0 and held == state.followed == state.length
    call = read_call(
        padding_mask(arguments.get("attention_mask")),
        arguments.get("position_ids"),
        batch=inputs.shape[0],
        tokens=inputs.shape[1],
        cached=held,
        known=origins_of(cache),
        announced=0 if state is None else state.announced,
        trusted=trusted and not torch.compiler.is_compiling(),
    )
    if state is not None and state.followed is not None:
        state.followed = call.end if mode == "decode" and call.goes_on else 0
    check_ids(inputs, base.config.vocab_size, mode)
    weights = _asked(model.config, arguments, "output_attentions")
    sparse = None
    drafts = state is not None and state.prompt_end is not None and held >= state.prompt_end
    if mode == "prefill" and not weights and not drafts:
        sparse = _sparse(settings, base, inputs.device, cache, call.longest)
    return Run(call, settings, mode, cache, inputs.device, weights, sparse, base, trusted, new)


def settings_of(patched: PatchedMethod, config: Any, cache: Any) -> LongContextConfig:
    """The settings of the `generate` in progress, which read them once, or those in force now."""
    settings = None if cache is None else sequence_of(cache).settings
    return patched.settings(config) if settings is None else settings


def _wants_new_cache(model: Any, base: Any, mode: Mode, arguments: dict[str, Any], chunked: bool) -> bool:
    """Whether the call fills a cache that nobody brought."""
    use_cache = arguments.get("use_cache")
    wanted = model.config.use_cache if use_cache is None else use_cache
    recomputed = mode == "train" and getattr(base, "gradient_checkpointing", False)
    return bool(wanted or (chunked and mode == "prefill")) and not recomputed


def given_inputs(arguments: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Name and value of ``input_ids`` or ``inputs_embeds``, checked for their form."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if ids is None and embeds is None:
        raise InvalidValue("give input_ids or inputs_embeds: the forward got neither")
    if ids is not None and embeds is not None:
        raise InvalidValue("give input_ids or inputs_embeds: the forward got both")
    name, inputs, form = ("input_ids", ids, 2) if embeds is None else ("inputs_embeds", embeds, 3)
    if not isinstance(inputs, torch.Tensor):
        raise InvalidType(f"{name} must be a tensor, got {type(inputs).__name__}")
    if inputs.ndim != form:
        shape = "(batch, tokens)" if form == 2 else "(batch, tokens, hidden)"
        raise InvalidValue(f"{name} must have shape {shape}, got {tuple(inputs.shape)}")
    if name == "input_ids" and inputs.dtype not in (torch.int64, torch.int32):
        raise InvalidType(
            f"input_ids must be integers, got {inputs.dtype}: an embedding takes torch.int64 or torch.int32"
        )
    if name == "inputs_embeds" and not inputs.is_floating_point():
        raise InvalidType(f"inputs_embeds must be floating point, got {inputs.dtype}")
    if 0 in inputs.shape[:2]:
        raise InvalidValue(f"{name} of shape {tuple(inputs.shape)} holds no tokens: give a prompt of at least one")
    return name, inputs


def check_ids(inputs: torch.Tensor, vocabulary: int, mode: Mode) -> None:
    """Refuse token ids that the model has no embedding for. One transfer to the host, none in decoding."""
    if inputs.is_floating_point() or mode == "decode":
        return
    least, most = torch.stack(torch.aminmax(inputs)).tolist()
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise InvalidValue(
            f"input_ids hold the token id {wrong}, the model knows 0 to {vocabulary - 1}: "
            "does the tokenizer belong to it?"
        )


def _sparse(settings: LongContextConfig, model: Any, device: torch.device, cache: Any, length: int) -> Any:
    """The request for sparse prefill, where the settings ask for it and the prompt is long enough."""
    request = sparsity.plan_request(
        settings,
        model.config,
        heads=lambda: local_heads(model),
        device=device,
        dtype=model.dtype,
        state=sparsity.SparseState() if cache is None else sequence_of(cache).sparse,
        length=length,
        observer=getattr(cache, "observer", None),
    )
    if request is not None and device.type == "cuda" and not torch.compiler.is_compiling():
        compile_ahead(request, shapes_of(model, device), length)
    return request


def shapes_of(model: Any, device: torch.device) -> Shapes:
    """What the kernels of a base model are compiled for."""
    heads, first = local_heads(model), own_layers(model)[0]
    mlp = getattr(first, "mlp", None)
    return Shapes(
        device,
        model.dtype,
        heads.query,
        heads.key,
        head_dim(model.config),
        model.config.hidden_size,
        model.config.intermediate_size,
        hasattr(getattr(first, "self_attn", None), "q_norm"),
        hasattr(mlp, "down_proj") and takes_rows(mlp.down_proj),
    )


def padding_mask(mask: Any) -> Any:
    """The 2D padding mask in what the caller or generate prepared."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return _padding_of_causal(mask)
    return mask


def _padding_of_causal(mask: torch.Tensor) -> torch.Tensor:
    """The padding in a 4D mask that is causal apart from it, as generate prepares for static caches.

    Other masks are handed back as they are, and refused.
    """
    seen = mask if mask.dtype == torch.bool else mask == 0
    queries, keys = mask.shape[2:]
    padding = seen[:, 0, -1]
    last = padding.any(0).nonzero()
    if mask.shape[1] != 1 or len(last) == 0:
        return mask
    end = int(last[-1]) + 1  # beyond it lies the free room of a static cache
    index = torch.arange(keys, device=mask.device)
    causal = index <= (index[end - queries : end] if end >= queries else index)[:, None]
    wanted = causal & padding[:, None]
    rows = torch.arange(end - queries, end, device=mask.device)
    # padded queries see nothing, or everything where a softmax over nothing is to be avoided
    blank = ~padding[:, rows] & (seen[:, 0].all(2) | ~seen[:, 0].any(2))
    same = (seen[:, 0] == wanted) | blank[..., None]
    return padding[:, :end] if bool(same.all()) else mask


def no_batching(name: str) -> str:
    """Why continuous batching, asked for by `name`, is refused."""
    return (
        f"{name} (continuous batching) packs requests into one row, which dual chunk attention cannot tell apart: call "
        "generate() with a batch that is padded on the left, or unpatch_qwen() first"
    )


def check_cache_type(cache: Any) -> None:
    """Refuse what is no transformers cache of one run."""
    name = type(cache).__name__
    if "Paged" in name:
        raise Unsupported(no_batching(f"{name}, the cache of generate_batch"))
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise Unsupported(f"{name} is not supported: pass a DynamicCache or a LongContextCache, or no cache")


def check_static_cache(cache: Any, length: int, settings: LongContextConfig) -> None:
    """Refuse a static cache beyond one chunk, or beyond its own size."""
    if not isinstance(cache, StaticCache):
        return
    if length > settings.stride:
        raise Unsupported(
            f"a static cache holds one chunk of {settings.stride} tokens at most, this run has {length}: "
            "leave cache_implementation out and generate() takes a LongContextCache"
        )
    size = cache.layers[0].max_cache_len
    if length > size:
        raise InvalidValue(
            f"the static cache has room for {size} tokens, this run has {length}: make it with a larger max_cache_len"
        )


def needs_gradients(model: Any, inputs_embeds: torch.Tensor | None, cache: Any) -> bool:
    """Whether anything in a call requires gradients: a parameter, the embeddings given, or keys in the cache."""
    if not torch.is_grad_enabled():
        return False
    if inputs_embeds is not None and inputs_embeds.requires_grad:
        return True
    read_out = getattr(cache, "kv_cache", "device") != "device"  # whose keys are other tensors at every look
    layers = () if read_out else getattr(cache, "layers", ())
    if any(getattr(getattr(layer, "keys", None), "requires_grad", False) for layer in layers):
        return True
    return any(parameter.requires_grad for parameter in model.parameters())
