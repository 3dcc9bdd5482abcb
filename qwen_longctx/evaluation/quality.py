"""Sparse against dense prefill on real text: likelihood, agreement, density, time and passkeys.

Within the trained length dense attention is the standard. Beyond it dense attention errs too: judge there by likelihood
and passkeys.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from qwen_longctx import LongContextCache, LongContextConfig, patched_qwen, settings_of, sparsity
from qwen_longctx.checkpoint import head_dim
from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation import passkey
from qwen_longctx.evaluation.modes import Variant, settings_in_place

JUDGED = 8192  # tokens at the end of the text, where it has twice as many
_ROWS_AT_A_TIME = 256  # of float32 logits over the vocabulary

DEFAULT_VARIANTS = (
    "block_scores",
    "block_scores:recall_target=0.8",
    "block_scores:score_threshold=0.1",
    "block_scores:score_threshold=0.05",
    "block_scores:score_threshold=0.02",
    "block_scores:density=0.04",
    "block_scores:density=0.08",
    "block_scores:density=0.16",
    "block_scores:mass=0.6",
    "block_scores:mass=0.8",
    "block_scores:mass=0.9",
    "vertical_slash",
    "vertical_slash:recall_target=0.9",
)


class Judged(NamedTuple):
    """One prefill: `logits` of shape (judged, vocabulary) predict `targets`, and the report of the cache."""

    logits: torch.Tensor
    targets: torch.Tensor
    seconds: float
    report: dict[str, Any]


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, judged: int, overrides: dict[str, Any]) -> Judged:
    """Prefill `ids` of shape (1, tokens) under these settings and keep the logits that predict the last `judged`."""
    cuda = ids.device.type == "cuda"
    with patched_qwen(model, **overrides):
        settings = settings_of(model)
        assert settings is not None  # of a patched model
        cache = LongContextCache(ids.shape[1], kv_cache=settings.kv_cache)
        begin = time.perf_counter()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=judged + 1).logits[0, :-1]
        if cuda:
            torch.cuda.synchronize(ids.device)
        seconds = time.perf_counter() - begin
    return Judged(logits, ids[0, -judged:], seconds, cache.report())


def compare(judged: Judged, truth: Judged) -> dict[str, float]:
    """Mean NLL of the targets (nats a token), top-1 agreement with `truth` and KL divergence from it."""
    nll = agreement = divergence = 0.0
    for start in range(0, len(judged.targets), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        ours, theirs = (x.logits[rows].float().log_softmax(-1) for x in (judged, truth))
        nll += functional.nll_loss(ours, judged.targets[rows], reduction="sum").item()
        agreement += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        divergence += functional.kl_div(ours, theirs, log_target=True, reduction="sum").item()
    tokens = len(judged.targets)
    return {"nll": nll / tokens, "agreement": agreement / tokens, "kl": divergence / tokens}


def default_judged(tokens: int) -> int:
    """Tokens that are judged of a text of so many: `JUDGED`, or half of a short text."""
    return min(JUDGED, tokens // 2)


def check(config: Any, tokens: int, variants: Sequence[Variant], judged: int | None, depths: Sequence[float]) -> None:
    """Refuse a request of `evaluate` that cannot be fulfilled, from the model's config alone.

    Raises
    ------
    InvalidValue, InvalidType, MissingFile
        `judged` does not fit the text, a depth is outside 0 to 1, or a variant has a setting that is not valid, or
        needs budgets that are not there.
    """
    if tokens < 2:
        raise InvalidValue(f"a text must have at least 2 tokens, one to judge and one before it, got {tokens}")
    if judged is not None and not 0 < judged < tokens:
        raise InvalidValue(
            f"judged must be between 1 and {tokens - 1} for a text of {tokens} tokens, got {judged}: judge fewer "
            "tokens, or give a longer text"
        )
    passkey.check_depths(depths)
    for one in variants:
        sparsity.check_budgets(LongContextConfig.from_model_config(config, **one.overrides), config)


def evaluate(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    variants: Sequence[Variant],
    judged: int | None = None,
    depths: Sequence[float] = (),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """One row for dense prefill, then one a variant.

    A patch in place, of the model or of the classes, stays as it is: its settings hold in every run, but for those
    that say what sparse prefill keeps.

    Parameters
    ----------
    model, tokenizer
        A checkpoint that can be patched.
    ids : torch.Tensor
        Shape (1, tokens): the text.
    variants : sequence of Variant
    judged : int, optional
        Tokens at the end that are judged, by default `default_judged`.
    depths : sequence of float
        Passkeys asked for at the same length, one a depth.
    seed : int
        Of the passkeys.

    Raises
    ------
    InvalidValue, InvalidType, MissingFile
        See `check` and `passkey.check`; or a kernel does not run here. All before the first run.
    """
    vocabulary = model.config.vocab_size
    passkey.check_tokens(ids, vocabulary)
    tokens = ids.shape[1]
    base = settings_in_place(model)
    variants = [Variant(name, {**base, **overrides}) for name, overrides in variants]
    check(model.config, tokens, variants, judged, depths)
    if depths:
        passkey.check(tokenizer, [tokens], depths, 1, vocabulary)
    judged = default_judged(tokens) if judged is None else judged
    ids = ids.to(passkey.input_device(model))
    for one in variants:  # a kernel that does not run here
        settings = LongContextConfig.from_model_config(model.config, **one.overrides)
        sparsity.rule_name(settings, ids.device, model.dtype, head_dim(model.config))
    truth: Judged | None = None
    runs = [Variant("dense", {**base, "sparse": "off"}), *variants]
    with transformers_logging.tqdm(total=len(runs), desc=f"Quality at {tokens:,}", unit="run") as bar:
        for name, overrides in runs:
            if overrides["sparse"] != "off":
                overrides = {"sparse_attention_threshold": min(tokens - 1, 32768), **overrides}
            run = prefill(model, ids, judged, overrides)
            truth = truth or run
            row = {"tokens": tokens, "judged": judged, "variant": name, **_figures(run, truth)}
            if run is not truth:
                del run  # its logits make room for the next
            if depths:
                with patched_qwen(model, **overrides):
                    records = passkey.evaluate(model, tokenizer, [tokens], depths, seed=seed)
                row["passkeys"] = f"{sum(r.correct for r in records)}/{len(records)}"
                row["passkey_answers"] = {str(r.depth): r.answer for r in records}
            yield row
            bar.update()


def _figures(run: Judged, truth: Judged) -> dict[str, float]:
    """What a row says of one prefill."""
    layers = run.report["layers"]
    return {
        **{key: round(value, 6) for key, value in compare(run, truth).items()},
        "density": round(run.report["density"], 5),
        "recall": round(sum(x["recall"] for x in layers) / len(layers), 5) if layers else 1.0,
        "lowest_recall": round(min((x["lowest_recall"] for x in layers), default=1.0), 5),
        "seconds": round(run.seconds, 3),
    }
