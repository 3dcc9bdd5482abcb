"""Replaces ``ForCausalLM.forward``: a prompt passes in chunks, and only the logits that are wanted exist."""

from __future__ import annotations

from typing import Any

import torch
from transformers import modeling_utils

from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.patches import stages
from qwen_longctx.patches.method import OLD_NAME, PatchedMethod
from qwen_longctx.patches.model import (
    Forward,
    began_as_stock,
    begin,
    chunk_of,
    given_inputs,
    in_chunks,
    over_stages,
    wanted_outputs,
    whole_outputs,
    with_fields,
)
from qwen_longctx.patches.pipelined import pipelined
from qwen_longctx.patches.room import check_run
from qwen_longctx.prefill.run import Run
from qwen_longctx.stage import Stage, stage_of


def causal_lm_forward(
    patched: PatchedMethod,
    self: Any,
    *,
    labels: torch.Tensor | None = None,
    logits_to_keep: Any = 0,
    **arguments: Any,
) -> Any:
    """Prefill chunk by chunk where the prompt is longer than `prefill_chunk_size`; else the stock forward."""
    if began_as_stock(arguments):
        return patched.call(self, labels=labels, logits_to_keep=logits_to_keep, **arguments)
    stage = stage_of(self.model)
    if stage is not None:
        return _over_stages(patched, self, stage, labels, logits_to_keep, arguments)
    run = begin(patched, self, self.model, arguments)
    _check_labels(labels, run, self.config.vocab_size, arguments.get("ignore_index", -100))
    cut = in_chunks(run, self.config, arguments)
    if cut:
        run = pipelined(self.model, run, picked=labels is None and isinstance(logits_to_keep, torch.Tensor))
    _check_room(self, run, labels is not None, logits_to_keep, cut)
    arguments["past_key_values"] = run.cache
    with run.committed():
        if cut:
            return _in_chunks(patched, self, run, labels, logits_to_keep, arguments)
        forward = Forward(run, run.call.cached, run.call.end)
        return patched.call(self, labels=labels, logits_to_keep=logits_to_keep, dual_chunk_forward=forward, **arguments)


def _check_labels(labels: Any, run: Run, vocabulary: int, ignored: int) -> None:
    if labels is None:
        return
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise InvalidType(
            f"labels must be a tensor of token ids, got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    if labels.shape != (len(run.call.rows), run.tokens):
        raise InvalidValue(
            f"labels must have the shape of the tokens, {(len(run.call.rows), run.tokens)}, got {tuple(labels.shape)}"
        )
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= vocabulary))]
    if len(wrong):
        raise InvalidValue(
            f"labels hold {int(wrong[0])}, the model knows 0 to {vocabulary - 1}: "
            f"mark tokens without a label by {ignored}"
        )


def _check_room(model: Any, run: Run, loss: bool, logits_to_keep: Any, cut: bool) -> None:
    """Refuse a call that cannot fit, its logits counted."""
    kept = run.tokens
    if not loss and isinstance(logits_to_keep, int) and 0 < logits_to_keep < kept:
        kept = logits_to_keep
    elif not loss and isinstance(logits_to_keep, torch.Tensor):
        kept = logits_to_keep.shape[-1] if logits_to_keep.ndim else 1
    row, size = len(run.call.rows) * model.config.vocab_size, model.dtype.itemsize
    last = (run.tokens - 1) % run.settings.prefill_chunk_size + 1 if cut else run.tokens
    last = last if run.pipeline is None else 0  # which may have few tokens there
    # while the last chunk passes, those of the others are there; then all are joined, and a loss takes them in float32
    at_the_end = kept * row * ((2 if cut else 1) * size + 2 * 4 * loss)
    check_run(model.model, run, cut, beside=max(0, kept - last) * row * size, at_the_end=at_the_end)


def _in_chunks(
    patched: PatchedMethod,
    model: Any,
    run: Run,
    labels: torch.Tensor | None,
    logits_to_keep: Any,
    arguments: dict[str, Any],
) -> Any:
    arguments = dict(arguments)
    wants_cache, wants_dict = wanted_outputs(model.config, arguments)
    rows, tokens = _wanted(logits_to_keep, len(run.call.rows), run.tokens)
    computed = tokens.unique() if labels is None else torch.arange(run.tokens)
    logits = []
    outputs: Any = None
    for start, stop in run.chunks():
        inside = _inside(computed, run, start, stop)
        part, forward = chunk_of(run, arguments, start, stop), Forward(run, start, stop)
        if len(inside) == 0 and stop < run.call.end:
            model.model(**part, dual_chunk_forward=forward)
            continue
        outputs = patched.call(model, **part, logits_to_keep=_keep(inside, stop - start), dual_chunk_forward=forward)
        if len(inside):
            logits.append(outputs.logits)
    every = torch.cat(logits, dim=1) if logits else outputs.logits[:, :0]
    fields = {"logits": _pick(every, rows, torch.searchsorted(computed, tokens))}
    fields |= _loss(patched, model, every, labels, arguments)
    return with_fields(outputs, wants_dict, wants_cache, **fields)


def _inside(computed: torch.Tensor, run: Run, start: int, stop: int) -> torch.Tensor:
    """Which of the logits to compute, by ascending numbers within the call, are of a chunk; by numbers within that."""
    first, end = start - run.call.cached, stop - run.call.cached
    return computed[(computed >= first) & (computed < end)] - first


def _loss(
    patched: PatchedMethod, model: Any, logits: torch.Tensor, labels: torch.Tensor | None, arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The loss as a field of the outputs, if there are labels."""
    if labels is None:
        return {}
    beside = {name: value for name, value in arguments.items() if name not in (*patched.names, OLD_NAME)}
    return {"loss": model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **beside)}


def _over_stages(
    patched: PatchedMethod,
    model: Any,
    stage: Stage,
    labels: torch.Tensor | None,
    logits_to_keep: Any,
    arguments: dict[str, Any],
) -> Any:
    """The logits that are wanted, which the last rank computes and every rank gets."""
    base, arguments = model.model, dict(arguments)
    with stages.call(base, stage) as call:
        stages.check_outputs(whole_outputs(model.config, arguments))
        run = begin(patched, model, base, arguments)
        _check_labels(labels, run, model.config.vocab_size, arguments.get("ignore_index", -100))
        _check_room(model, run, labels is not None, logits_to_keep, True)
        rows, tokens = _wanted(logits_to_keep, len(run.call.rows), run.tokens)
        computed = tokens.unique() if labels is None else torch.arange(run.tokens)
        stages.agree(call, run, given_inputs(arguments)[1], computed)
        arguments["past_key_values"] = run.cache
        wants_cache, wants_dict = wanted_outputs(model.config, arguments)
        with run.committed():
            logits = []
            for start, stop, hidden in over_stages(patched, base, run, arguments, stage, call):
                inside = _inside(computed, run, start, stop)
                if hidden is not None and (len(inside) or (stop == run.call.end and not logits)):
                    with torch.no_grad():
                        logits.append(model.lm_head(_stock_slice(hidden, _keep(inside, stop - start))))
            every = call.share(torch.cat(logits, dim=1) if logits else None)[:, : len(computed)]
    fields = {"logits": _pick(every, rows, torch.searchsorted(computed, tokens))}
    fields |= _loss(patched, model, every, labels, arguments)
    return with_fields(stages.outputs(model, "CausalLM", run.cache), wants_dict, wants_cache, **fields)


def _keep(inside: torch.Tensor, tokens: int) -> Any:
    """`logits_to_keep` for some tokens of a chunk of so many, ascending numbers on the host: the head may lie anywhere.

    A number where they are the last ones, since an index would make the host wait for the device. One row is computed
    and dropped where none is wanted: the stock forward has no "none".
    """
    if len(inside) == 0:
        return 1
    return len(inside) if int(inside[0]) + len(inside) == tokens else inside


def _wanted(logits_to_keep: Any, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and token of all logits that are wanted, each in the shape in which the stock forward hands logits out."""
    if isinstance(logits_to_keep, torch.Tensor):
        logits_to_keep = logits_to_keep.cpu()
    cells = torch.stack(torch.meshgrid(torch.arange(batch), torch.arange(tokens), indexing="ij"), -1)
    rows, numbers = _stock_slice(cells, logits_to_keep).unbind(-1)
    return rows, numbers.contiguous()


def _stock_slice(values: torch.Tensor, logits_to_keep: Any) -> torch.Tensor:
    """What the stock forward keeps of `values`, shape (batch, tokens, any)."""
    if hasattr(modeling_utils, "slice_logits_to_keep"):  # from transformers 5.24 on, also with indices of each row
        return modeling_utils.slice_logits_to_keep(values, logits_to_keep)
    return values[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


def _pick(logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Logits at some rows and columns; not copied where these are all of them in order."""
    if columns.shape == logits.shape[:2] and bool((columns == torch.arange(logits.shape[1])).all()):
        return logits
    return logits[rows.to(logits.device), columns.to(logits.device)]
