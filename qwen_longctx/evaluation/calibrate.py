"""Offline refinement of vertical and slash budgets: heads that recall too little get more (Qwen2.5-1M report, Alg. 1).

The report publishes neither threshold nor step. The step here is what the budgets of Qwen2.5-7B- and 14B-Instruct-1M
show: they are MInference's, raised by multiples of 2,048 columns and diagonals.
"""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from qwen_longctx import LongContextCache, LongContextConfig, patched_qwen
from qwen_longctx.checkpoint import Shape, local_shape
from qwen_longctx.config import share
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.evaluation import corpus, passkey
from qwen_longctx.files import check_writable, replacing
from qwen_longctx.sparsity.budgets import HeadBudgets, dump, load
from qwen_longctx.sparsity.record import SpanRecord, recall_of_heads

THRESHOLD, STEP, ROUNDS = 0.9, 2048, 10
_SPARSE_FROM = 3  # tiles: one that is sparse, and the two at the end of a prompt that never are
_VALUES_OF_A_TENSOR = 16  # tell one set of weights from another
_GIVEN = ("sparse", "sparse_attention_config", "recall_target")  # a target would change budgets within a prefill
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")  # a checkpoint may be moved, and read by another version


class Round(NamedTuple):
    """One prefill of one text: the recall of all heads, and how many of them were raised after it.

    `text` is the number of the text, `tokens` its length, and `number` that of the round; both numbers count from 0.
    """

    text: int
    tokens: int
    number: int
    recall: float
    lowest_recall: float
    raised: int


@dataclass(frozen=True)
class Steps:
    """How budgets are raised.

    Attributes
    ----------
    threshold : float
        Recall wanted of each head, the mean over the spans of a text; between 0 and 1.
    step : int
        Columns and diagonals that a head gains in a round.
    rounds : int
        Rounds a text at most.

    Raises
    ------
    InvalidValue, InvalidType
        A number is out of range, or none.
    """

    threshold: float = THRESHOLD
    step: int = STEP
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", share("threshold", self.threshold, below_one=True))
        for name in ("step", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise InvalidType(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise InvalidValue(f"{name} must be at least 1, got {value}")
            object.__setattr__(self, name, int(value))


def calibrate(
    model: Any,
    texts: Sequence[torch.Tensor],
    start: HeadBudgets,
    output: str | Path,
    *,
    threshold: float = THRESHOLD,
    step: int = STEP,
    rounds: int = ROUNDS,
    **overrides: Any,
) -> list[Round]:
    """Raise budgets text by text until every head recalls `threshold`, and write them in Qwen's file format.

    The file is written after every round, with a note of the progress beside it: the same call on the same model and
    texts goes on where it was stopped, and another call is refused while the note is there.

    Parameters
    ----------
    model
        A checkpoint that can be patched.
    texts : sequence of torch.Tensor
        Shape (1, tokens) each, integers; ascending lengths save rounds.
    start : HeadBudgets
    output : str or path
        File to write.
    threshold, step, rounds
        See `Steps`.
    **overrides
        Other settings of the patch.

    Returns
    -------
    list of Round
        Of this call and those it continues.

    Raises
    ------
    InvalidValue, InvalidType
        See `check`; or `output` cannot be written, or the note beside it is of another call.
    Unsupported
        The model is divided among processes, each of which would know its own heads only.
    """
    steps = Steps(threshold, step, rounds)
    if local_shape(model) != Shape.of(model.config):
        raise Unsupported(
            "calibrate needs all heads and layers in one process: load the model on one device, or by device_map"
        )
    for ids in texts:
        passkey.check_tokens(ids, model.config.vocab_size)
    check(model.config, [ids.shape[1] for ids in texts], start, overrides)
    check_writable(output)
    start = load(dump(start), model.config.num_hidden_layers, model.config.num_attention_heads)  # as a file is read
    progress = _Progress(Path(output), _request(model, texts, start, steps, overrides))
    budgets, done = progress.read(start)
    with transformers_logging.tqdm(
        total=steps.rounds * len(texts), initial=len(done), desc="Calibrate", unit="round"
    ) as bar:
        for number, ids in enumerate(texts):
            of_text = [one for one in done if one.text == number]
            while len(of_text) < steps.rounds and not (of_text and of_text[-1].raised == 0):
                recall = _recall(model, ids, budgets, overrides)
                budgets, raised = _raise(budgets, recall, steps, ids.shape[1])
                figures = float(recall.mean()), float(recall.min()), raised
                of_text.append(Round(number, ids.shape[1], len(of_text), *figures))
                done.append(of_text[-1])
                progress.write(budgets, done)
                bar.update()
            bar.update(steps.rounds - len(of_text))
    progress.finish()
    return done


def check(
    config: Any, lengths: Sequence[int], start: HeadBudgets, overrides: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse a request of `calibrate` that cannot be fulfilled, from the model's config alone.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    lengths : sequence of int
        Tokens of the texts.
    start : HeadBudgets
    overrides : mapping, optional
        Other settings of the patch.

    Raises
    ------
    InvalidValue, InvalidType
        There is no text, or one of which no part is prefilled sparsely; `start` does not fit the model; a setting is
        not valid, or is one that calibration itself gives.
    """
    for name in _GIVEN:
        if name in overrides:
            raise InvalidValue(f"{name} is {overrides[name]!r:.60}, and calibrate gives it itself: leave it out")
    load(dump(start), config.num_hidden_layers, config.num_attention_heads)
    if not lengths:
        raise InvalidValue("there is no text to calibrate on: give one or more")
    shortest = min(lengths)
    settings = _settings(config, shortest, overrides)
    if settings.prefill_chunk_size < settings.tile:
        raise InvalidValue(
            f"prefill_chunk_size is {settings.prefill_chunk_size}, shorter than a block of {settings.tile} tokens: "
            "nothing is prefilled sparsely then, give more"
        )
    least = max(_SPARSE_FROM * settings.tile, settings.sparse_attention_threshold + 1)
    if shortest < least:
        raise InvalidValue(
            f"a text must have at least {least} tokens for this checkpoint and these settings, got {shortest}: shorter "
            "ones have no part that is prefilled sparsely"
        )


def _settings(config: Any, tokens: int, overrides: Mapping[str, Any]) -> LongContextConfig:
    """Settings of a run on a text of so many tokens; the budgets are put in later."""
    given = {"sparse": "vertical_slash", "sparse_attention_config": None}
    threshold = max(1, min(tokens - 1, 32768))
    return LongContextConfig.from_model_config(
        config, **{"sparse_attention_threshold": threshold, **overrides, **given}
    )


@torch.no_grad()
def _recall(model: Any, ids: torch.Tensor, budgets: HeadBudgets, overrides: Mapping[str, Any]) -> torch.Tensor:
    """Mean recall of every head over the spans of one prefill, shape (layers, heads)."""
    settings = asdict(_settings(model.config, ids.shape[1], overrides))
    cache = LongContextCache(ids.shape[1], kv_cache=settings["kv_cache"])
    with patched_qwen(model, **{**settings, "sparse_attention_config": dump(budgets)}):
        model(ids.to(passkey.input_device(model)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    by_layer: dict[int, list[SpanRecord]] = {}
    for record in cache.sparse_state.records:
        by_layer.setdefault(record.layer, []).append(record)
    return torch.stack([recall_of_heads(by_layer[layer])[0] for layer in sorted(by_layer)])


def _raise(budgets: HeadBudgets, recall: torch.Tensor, steps: Steps, tokens: int) -> tuple[HeadBudgets, int]:
    """Budgets after one round, with the recall as their scores; heads that keep everything already stay."""
    verticals, slashes = [list(row) for row in budgets.verticals], [list(row) for row in budgets.slashes]
    raised = 0
    for layer, row in enumerate(recall.tolist()):
        for head, value in enumerate(row):
            if value < steps.threshold and min(verticals[layer][head], slashes[layer][head]) < tokens:
                verticals[layer][head] += steps.step
                slashes[layer][head] += steps.step
                raised += 1
    return HeadBudgets(verticals, slashes, [[round(x, 4) for x in row] for row in recall.tolist()]), raised


def _request(
    model: Any, texts: Sequence[torch.Tensor], start: HeadBudgets, steps: Steps, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """What tells one call of `calibrate` from another, as plain values."""
    return {
        "model": _fingerprint_of_model(model),
        "texts": [corpus.fingerprint(ids.long()) for ids in texts],
        "start": dump(start),
        "steps": asdict(steps),
        "settings": [asdict(_settings(model.config, ids.shape[1], overrides)) for ids in texts],
    }


def _fingerprint_of_model(model: Any) -> str:
    """Short hash of the config and of some numbers of each plain weight; where the weights came from does not count."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    parts = [json.dumps(config, sort_keys=True, default=str)]
    for name, weight in model.named_parameters():
        plain = type(weight.data) is torch.Tensor and not weight.is_meta  # neither quantised nor on disk
        values = weight.detach().flatten()[:_VALUES_OF_A_TENSOR].float().tolist() if plain else []
        parts.append(f"{name} {tuple(weight.shape)} {weight.dtype} {values}")
    return _hash("\n".join(parts))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def noted_start(output: str | Path) -> list[Any] | None:
    """The budgets that an unfinished call which writes to `output` started from, as `load` takes them; else None.

    They are no longer in the file where it started from the file that it writes.

    Raises
    ------
    InvalidValue
        What lies beside `output` is no note of `calibrate`.
    """
    noted = _read_note(_note_beside(Path(output)))
    return None if noted is None else noted["request"]["start"]


def _note_beside(path: Path) -> Path:
    return path.with_name(path.name + ".progress")


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(noted["request"]["start"], list) and {"rounds", "budgets"} <= noted.keys()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        known = False
    if not known:
        raise InvalidValue(f"{path} is no note of progress that calibrate can read: delete it, or name another output")
    return noted


class _Progress:
    """The file of budgets, and beside it a note of the call, its rounds and its budgets, from which the call goes on.

    Each of the two is replaced as a whole, the note first. It holds all that is needed, so that a call that is stopped
    between the two loses nothing, and the call that goes on brings the file up to the note.
    """

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path, self.request, self.note = path, request, _note_beside(path)

    def read(self, start: HeadBudgets) -> tuple[HeadBudgets, list[Round]]:
        """Budgets and rounds of an earlier call of the same request, or the start."""
        noted = _read_note(self.note)
        if noted is None:
            return start, []
        different = [name for name, value in self.request.items() if noted["request"].get(name) != value]
        if different:
            raise InvalidValue(
                f"{self.note} notes the progress of another call ({', '.join(different)} differ): finish that call, "
                "name another output, or delete the note"
            )
        budgets = load(noted["budgets"], len(start.verticals), len(start.verticals[0]))
        self._write_file(budgets)
        return budgets, [Round(*row) for row in noted["rounds"]]

    def write(self, budgets: HeadBudgets, done: list[Round]) -> None:
        """Note a round, then write its budgets."""
        note = {"request": self.request, "rounds": done, "budgets": dump(budgets)}
        with replacing(self.note) as fresh:
            fresh.write_text(json.dumps(note) + "\n", encoding="utf-8")
        self._write_file(budgets)

    def _write_file(self, budgets: HeadBudgets) -> None:
        with replacing(self.path) as fresh:
            fresh.write_text(json.dumps(dump(budgets)) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """The call has come to its end: the same call would start again."""
        self.note.unlink(missing_ok=True)
