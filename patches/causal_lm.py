"""Replaces ``ForCausalLM.forward``: a prompt passes in chunks, and only the logits that are wanted exist."""

from __future__ import annotations

from typing import Any

import torch

from qwen_longctx.errors import InvalidType, InvalidValue
from qwen_longctx.patches.method import OLD_NAME, PatchedMethod
from qwen_longctx.patches.model import Forward, begin, chunk_of, in_chunks, wanted_outputs, with_fields
from qwen_longctx.prefill.run import Run


def causal_lm_forward(
    patched: PatchedMethod,
    self: Any,
    *,
    labels: torch.Tensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **arguments: Any,
) -> Any:
    """Prefill chunk by chunk where the prompt is longer than `prefill_chunk_size`; else the stock forward."""
    run = begin(patched, self, self.model, arguments)
    _check_labels(labels, run, self.config.vocab_size, arguments.get("ignore_index", -100))
    arguments["past_key_values"] = run.cache
    with run.committed():
        if in_chunks(run, self.config, arguments):
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


def _in_chunks(
    patched: PatchedMethod,
    model: Any,
    run: Run,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    arguments: dict[str, Any],
) -> Any:
    arguments = dict(arguments)
    wants_cache, wants_dict = wanted_outputs(model.config, arguments)
    keep = _kept(0 if labels is not None else logits_to_keep, run.tokens)
    logits, slots = [], []
    outputs: Any = None
    for start, stop in run.chunks():
        first = start - run.call.cached
        wanted = ((keep >= first) & (keep < stop - run.call.cached)).nonzero()[:, 0]
        outputs = patched.call(
            model,
            **chunk_of(run, arguments, start, stop),
            # one row is computed and dropped where none is wanted: the stock forward has no "none"
            logits_to_keep=(keep[wanted] - first).to(run.device) if len(wanted) else 1,
            dual_chunk_forward=Forward(run, start, stop),
        )
        if len(wanted):
            logits.append(outputs.logits)
            slots.append(wanted)
    fields = {"logits": _in_order(logits, slots)}
    if labels is not None:
        beside = {name: value for name, value in arguments.items() if name not in (*patched.names, OLD_NAME)}
        every = fields["logits"]
        fields["loss"] = model.loss_function(logits=every, labels=labels, vocab_size=model.config.vocab_size, **beside)
        fields["logits"] = every[:, _kept(logits_to_keep, run.tokens).to(every.device)]
    return with_fields(outputs, wants_dict, wants_cache, **fields)


def _kept(logits_to_keep: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """Indices of the tokens whose logits are wanted, in the order they are wanted."""
    if isinstance(logits_to_keep, int):
        return torch.arange(tokens)[slice(-logits_to_keep, None)]
    return torch.arange(tokens)[logits_to_keep.cpu()]


def _in_order(logits: list[torch.Tensor], slots: list[torch.Tensor]) -> torch.Tensor:
    """Logits of all chunks, in the order in which their tokens were asked for."""
    if not logits:
        raise InvalidValue("logits_to_keep names no token: leave it out for all of them")
    joined = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
    places = torch.cat(slots)
    if bool((places == torch.arange(len(places))).all()):
        return joined
    return joined[:, places.argsort().to(joined.device)]
