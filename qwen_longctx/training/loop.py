"""The run of a recipe: steps, saves, and what is measured on the way."""

from __future__ import annotations

import json
import logging
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from qwen_longctx.checkpoint import Shape
from qwen_longctx.errors import InvalidValue
from qwen_longctx.evaluation.environment import environment
from qwen_longctx.files import replacing
from qwen_longctx.kv.fingerprint import fingerprint
from qwen_longctx.training import result
from qwen_longctx.training.attention import Choice, Documents, choose
from qwen_longctx.training.by_position import by_position, figure
from qwen_longctx.training.data import Source, source
from qwen_longctx.training.flops import model_flops, peak_of
from qwen_longctx.training.model import (
    Trained,
    Work,
    causal_lm,
    check_model,
    parameters_of,
    set_rope_theta,
    trainable_layers,
)
from qwen_longctx.training.optimiser import Learner, rate, whole
from qwen_longctx.training.packing import IGNORED, Packed
from qwen_longctx.training.ranks import Ranks
from qwen_longctx.training.stages import Recipe, Stage, as_table
from qwen_longctx.training.state import RESULT, Folder

logger = logging.getLogger(__name__)

_CURVE, _PLOT = "loss_by_position.json", "loss_by_position.png"
_KEPT = 0.5  # share of the card's free memory that activations may take before they wait on the host


@dataclass(frozen=True)
class Prepared:
    """A run of which everything but the weights has been checked; made by `prepare`.

    Attributes
    ----------
    recipe : Recipe
    tokenizer
    source : Source
    texts : tuple of Packed
        Held out, for the loss by position.
    folder : Folder
    base_name : str
        What an adapter calls its base.
    ranks : Ranks
    """

    recipe: Recipe
    tokenizer: Any
    source: Source
    texts: tuple[Packed, ...]
    folder: Folder
    base_name: str
    ranks: Ranks


def prepare(
    config: Any, tokenizer: Any, recipe: Recipe, output: str | Path, base_name: str = "", ranks: Ranks | None = None
) -> Prepared:
    """Check a run, and make its folder, before any weights are loaded.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the checkpoint to train.
    tokenizer
        Its tokenizer.
    recipe : Recipe
    output : str or Path
        Folder of the run. One that holds this run goes on with it.
    base_name : str
        What an adapter calls its base; by default what the config is called.
    ranks : Ranks, optional
        The processes of the run; one by default.

    Raises
    ------
    InvalidType, InvalidValue, MissingFile, MissingPackage, Unsupported
        Something cannot be done; the message says what.
    """
    ranks = ranks or Ranks()
    check_model(config)
    Shape.of(config)
    for stage in recipe.stages:
        ranks.check(stage.sequences_per_step, stage.name)
    data = source(recipe.data, tokenizer, recipe.seed)
    lengths = sorted({length for stage in recipe.stages for length in stage.texts(stage.steps) if length})
    first = {length: data.sequence(0, length) for length in lengths}
    for length, packed in first.items():
        if int(packed.ids.max()) >= config.vocab_size:
            raise InvalidValue(
                f"the tokenizer makes token {int(packed.ids.max())}, and the model has {config.vocab_size}: take the "
                "tokenizer of the checkpoint"
            )
        logger.debug("first text of %d tokens: %d documents", length, len(packed.starts) - 1)
    texts = _held_out(data, recipe)
    if texts and find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed: the loss by position is written as numbers, and not drawn")
    table = as_table(recipe)
    table["data"].pop("cache", None)
    about = {
        "recipe": table,
        "model": {"name": base_name, "type": config.model_type, **asdict(Shape.of(config))},
        "texts": {str(length): f"{_checksum(packed):08x}" for length, packed in first.items()},
    }
    folder = Folder(output, about) if ranks.first else None
    ranks.wait()
    if folder is None:
        folder = Folder(output, about, writes=False)
    return Prepared(recipe, tokenizer, data, texts, folder, base_name, ranks)


def train(model: Any, prepared: Prepared) -> Path:
    """Run a prepared recipe to its end, from where its folder stands.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The checkpoint, of the recipe's dtype, on the device to train on. Its weights are changed.
    prepared : Prepared

    Returns
    -------
    Path
        Folder of the result: an adapter, or a whole checkpoint. See `result`.

    Raises
    ------
    InvalidValue
        The weights are others than those of the run that the folder holds.
    NotFinite
        The gradients of a step are no numbers; the folder keeps the state last saved.
    """
    folder = prepared.folder
    if not folder.finished:
        _Run(model, prepared).run()
    return folder.path / RESULT


class _Run:
    """One process's part of a run."""

    def __init__(self, model: Any, prepared: Prepared) -> None:
        recipe, self.ranks = prepared.recipe, prepared.ranks
        self.recipe, self.folder, self.source, self.prepared = recipe, prepared.folder, prepared.source, prepared
        self.config, self.device = model.config, model.device
        self.of_weights = fingerprint(model.model)["weights"]
        self.state = self.folder.load()
        if self.state is not None and self.state["of_weights"] != self.of_weights:
            raise InvalidValue(
                f"{self.folder.path} holds a run on other weights than those of this model: name another folder"
            )
        self.step = 0 if self.state is None else self.state["step"]
        self.choice = self._kernel()
        torch.manual_seed(recipe.seed)
        model.train()
        if recipe.method == "lora":
            self.model = result.with_adapters(model, recipe.lora)
        else:
            self.model = model.requires_grad_(True)
        work = Work(self.choice.kernel, recipe.memory.slice_tokens, self._offload(), recipe.memory.recompute)
        self.trained = Trained(self.model, work)
        self.ranks.divide(self.trained, causal_lm(self.model).model.layers)
        self.learner = Learner(parameters_of(self.model), recipe.optimiser)

    def _kernel(self) -> Choice:
        """The kernel of attention: that of the run, if it goes on."""
        setting = self.recipe.memory.kernel if self.state is None else self.state["kernel"]
        shape = Shape.of(self.config)
        dtype = getattr(torch, self.recipe.dtype)
        return choose(setting, self.device, dtype, shape.heads, shape.kv_heads, shape.head_dim, self.recipe.longest)

    def _offload(self) -> bool:
        """Whether activations wait on the host."""
        if self.recipe.memory.offload is not None or self.device.type != "cuda":
            return bool(self.recipe.memory.offload)
        shape, size = Shape.of(self.config), torch.finfo(getattr(torch, self.recipe.dtype)).bits // 8
        kept = self.recipe.longest * shape.layers * (2 * shape.hidden + shape.heads * shape.head_dim) * size
        return kept > _KEPT * torch.cuda.mem_get_info(self.device)[0]

    def run(self) -> None:
        """Steps, then the result."""
        with trainable_layers(self.model):
            if self.state is None:
                self._log_start()
                self._curve("before")
            else:
                self.learner.load_state(self.state["learner"])
                _set_random(self.state["random"])
                self.state = None
            if self.ranks.first:
                self.folder.cut_log(self.step)
            self._steps()
            set_rope_theta(self.model, self.recipe.stages[-1].rope_theta)
            self._curve("after")
        self.learner.close()
        self._finish()

    def _steps(self) -> None:
        """All steps that are left; the texts of the next are made meanwhile."""
        base: float | None = None
        bar = transformers_logging.tqdm(
            total=self.recipe.steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not self.ranks.first or None,
        )
        with ThreadPoolExecutor(1) as maker, bar:
            coming = maker.submit(self._sequences, self.step)
            while self.step < self.recipe.steps:
                stage, within = self.recipe.at(self.step)
                if base != stage.rope_theta:
                    set_rope_theta(self.model, stage.rope_theta)
                    base = stage.rope_theta
                sequences, coming = coming.result(), maker.submit(self._sequences, self.step + 1)
                row = self._step(stage, within, sequences)
                self.step += 1
                if self.ranks.first:
                    self.folder.log(row)
                bar.update()
                bar.set_postfix(loss=row["loss"])
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps:
                    self._save()

    def _sequences(self, step: int) -> list[Packed]:
        """What this process takes of a step; nothing behind the last."""
        if step >= self.recipe.steps:
            return []
        stage, within = self.recipe.at(step)
        first = within * stage.sequences_per_step
        return [
            _joined([self.source.sequence(*text) for text in self.recipe.numbered(stage, first + number)])
            for number in self.ranks.share(stage.sequences_per_step)
        ]

    def _step(self, stage: Stage, within: int, sequences: list[Packed]) -> dict[str, Any]:
        """Gradients of the sequences, and one change of the weights; returns the row of the log."""
        begin = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        own = sum(int((one.labels != IGNORED).sum()) for one in sequences)
        counted = self.ranks.total(own, self.device)
        if not counted:
            raise InvalidValue(
                f"no token of step {self.step} counts in the loss, which in conversations is that of answers: take "
                "longer sequences"
            )
        loss, scale = 0.0, 1 / counted
        if self.ranks.sharded:
            scale *= self.ranks.count  # FSDP takes the mean of all processes
        for packed in sequences:
            total = self.trained(packed)
            (total * scale).backward()
            loss += float(total.detach())
        if not self.ranks.sharded:
            self.ranks.add(self.learner.gradients())
        learning_rate = rate(stage, self.recipe.optimiser, within)
        norm = self.learner.step(learning_rate)
        seconds = time.perf_counter() - begin
        tokens = stage.sequence_length * stage.sequences_per_step
        return {
            "step": self.step,
            "stage": stage.name,
            "sequence_length": stage.sequence_length,
            "tokens": tokens,
            "counted": int(counted),
            "loss": self.ranks.total(loss, self.device) / counted,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            **self._speed(sequences, tokens, seconds),
        }

    def _speed(self, sequences: list[Packed], tokens: int, seconds: float) -> dict[str, Any]:
        """Tokens and operations a second, and the peak of memory."""
        pairs = sum(Documents(one.starts).pairs for one in sequences)
        own = sum(len(one.ids) for one in sequences)
        flops = model_flops(causal_lm(self.model), self.config, own, pairs) / seconds
        peak = peak_of(self.device)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "tflops_per_second": round(flops / 1e12, 4),  # of a card
            "share_of_peak": None if peak is None else round(flops / peak[1], 4),
            "peak_memory_bytes": memory,
        }

    def _save(self) -> None:
        state = {
            "step": self.step,
            "kernel": self.choice.kernel.name,
            "of_weights": self.of_weights,
            "learner": self.learner.state(),
            "random": _random(),
        }
        if self.ranks.first:
            self.folder.save(state)
        self.ranks.wait()

    def _log_start(self) -> None:
        """The first row of the log: what the run works with."""
        if not self.ranks.first:
            return
        learned = parameters_of(self.model)
        peak = peak_of(self.device)
        self.folder.cut_log(-1)
        self.folder.log(
            {
                "environment": environment(),
                "processes": self.ranks.count,
                "kernel": self.choice.kernel.name,
                "kernels": self.choice.found,
                "offload": self.trained.work.offload,
                "learned_parameters": sum(x.numel() for x in learned.values()),
                "peak_flops_per_second": None if peak is None else peak[1],
            }
        )

    def _curve(self, when: str) -> None:
        """Measure the loss by position, unless that has been done, and write it beside what there is."""
        path = self.folder.path / _CURVE
        lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.ranks.wait()  # until all have read: they must agree
        if not self.prepared.texts or when in lines:
            return
        lines[when] = by_position(self.trained, self.prepared.texts)
        if self.ranks.first:
            with replacing(path) as fresh:
                fresh.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
            if find_spec("matplotlib") is not None:
                with replacing(self.folder.path / _PLOT) as fresh:
                    figure(lines).savefig(fresh, dpi=100, format="png")
        self.ranks.wait()

    def _finish(self) -> None:
        """Write the result, after which the state is not needed any more."""
        weights = {name: whole(x) for name, x in self.model.state_dict().items()} if self.ranks.sharded else None
        if self.ranks.first:
            prepared = self.prepared
            name = prepared.base_name or self.config.name_or_path
            result.write(self.model, prepared.tokenizer, self.recipe, name, self.folder.path / RESULT, weights)
            self.folder.drop_state()
        self.ranks.wait()


def _joined(parts: list[Packed]) -> Packed:
    """Several packed sequences as one, whose documents go on not to see each other."""
    if len(parts) == 1:
        return parts[0]
    starts, at = [torch.zeros(1, dtype=torch.int32)], 0
    for part in parts:
        starts.append(part.starts[1:] + at)
        at += len(part.ids)
    ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels"))
    return Packed(ids, labels, torch.cat(starts))


def _held_out(data: Source, recipe: Recipe) -> tuple[Packed, ...]:
    """Texts that are never trained on."""
    wanted = recipe.evaluation.texts
    length = recipe.evaluation.length or recipe.longest
    if not wanted:
        return ()
    count = min(wanted, data.held_out_count(length))
    if count < wanted:
        logger.warning(
            "the documents held out make %d texts of %d tokens, and %d were asked for", count, length, wanted
        )
    return tuple(data.held_out_sequence(number, length) for number in range(count))


def _checksum(packed: Packed) -> int:
    return zlib.crc32(packed.ids.numpy().tobytes())


def _random() -> dict[str, Any]:
    """The state of PyTorch's random numbers; nothing else draws any."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
