"""Training steps of a shape: ours beside plain transformers' Trainer at lengths that it can do."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from qwen_longctx.bench.shapes import random_weights, train_config
from qwen_longctx.checkpoint import Shape
from qwen_longctx.training.attention import Choice, Documents, choose
from qwen_longctx.training.flops import model_flops, peak_of
from qwen_longctx.training.model import Trained, Work, parameters_of, trainable_layers
from qwen_longctx.training.optimiser import Learner
from qwen_longctx.training.packing import Packed
from qwen_longctx.training.result import with_adapters
from qwen_longctx.training.stages import Lora, Optimiser

LENGTHS = (65536, 131072)
STOCK_LENGTHS = (8192, 16384, 32768, 65536)
_LEARNING_RATE = 1e-5
_RANK = 16


def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    shape: str = "qwen2.5-0.5b",
    method: str = "full",
    kernel: str = "auto",
    stock_lengths: list[int] | None = None,
    steps: int = 2,
) -> Iterator[dict[str, Any]]:
    """Seconds of a step, share of the card and peak of memory, by length; a step is one sequence of random tokens.

    Every row is the fastest of `steps` steps after one that warms up. After ours come rows of the Trainer, at growing
    lengths to the first that does not fit: bf16, gradient checkpointing, SDPA, AdamW of PyTorch.

    Parameters
    ----------
    lengths : list of int
        Tokens of our sequences.
    device, tiny, shape
        See `bench.shapes`.
    method : {"full", "lora"}
    kernel : str
        Of attention, see `training.attention.choose`.
    stock_lengths : list of int, optional
        Tokens of the Trainer's sequences; by default some powers of 2.
    steps : int
        That are timed.
    """
    sizes = Shape.of(train_config(tiny, shape))
    choice = choose(kernel, device, torch.bfloat16, sizes.heads, sizes.kv_heads, sizes.head_dim, max(lengths))
    for row in _ours(sorted(lengths), device, tiny, shape, method, choice, steps):
        yield {"shape": shape, "method": method, **row}
    for length in sorted(list(STOCK_LENGTHS) if stock_lengths is None else stock_lengths):
        row = _or_no_room(partial(_by_trainer, length, device, tiny, shape, method, steps))
        yield {"shape": shape, "method": method, "by": "Trainer", "tokens": length, **row}
        if "out_of_memory" in row:
            break


def _or_no_room(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or one that says that it does not fit."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _model(device: torch.device, tiny: bool, shape: str, method: str) -> Any:
    """Random weights that learn, or adapters beside them."""
    model = random_weights(train_config(tiny, shape), device).train()
    if method == "lora":
        return with_adapters(model, Lora(rank=_RANK))
    return model.requires_grad_(True)


def _ours(
    lengths: list[int], device: torch.device, tiny: bool, shape: str, method: str, choice: Choice, steps: int
) -> Iterator[dict[str, Any]]:
    model = _model(device, tiny, shape, method)
    learner = Learner(parameters_of(model), Optimiser())
    with trainable_layers(model):
        for length, offload in product(lengths, (False, True)):
            row = _or_no_room(partial(_by_ours, model, learner, choice, length, device, offload, steps))
            yield {"by": "ours", "tokens": length, "offload": offload, **row}
            learner.optimizer.zero_grad(set_to_none=True)


def _by_ours(
    model: Any, learner: Learner, choice: Choice, length: int, device: torch.device, offload: bool, steps: int
) -> dict[str, Any]:
    ids = torch.randint(1, model.config.vocab_size, (length,))
    packed = Packed(ids, ids.roll(-1), torch.tensor([0, length], dtype=torch.int32))
    trained = Trained(model, Work(choice.kernel, offload=offload))

    def step() -> None:
        (trained(packed) / length).backward()
        learner.step(_LEARNING_RATE)

    return {"kernel": choice.kernel.name, "kernels": choice.found, **_timed(step, model, length, device, steps)}


def _timed(
    step: Callable[[], None], model: torch.nn.Module, length: int, device: torch.device, steps: int
) -> dict[str, Any]:
    """The fastest of some steps."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(steps):
        _synchronise(device)
        begin = time.perf_counter()
        step()
        _synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return _row(model, length, device, min(seconds))


def _row(model: Any, length: int, device: torch.device, seconds: float) -> dict[str, Any]:
    flops = model_flops(model, model.config, length, Documents(torch.tensor([0, length])).pairs) / seconds
    peak = peak_of(device)
    return {
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(length / seconds, 1),
        "tflops_per_second": round(flops / 1e12, 4),
        "share_of_peak": None if peak is None else round(flops / peak[1], 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Clock(TrainerCallback):
    """Seconds of the steps of a Trainer; the peak of memory of all but the first."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, list[float]()
        self._begin = 0.0

    def on_step_begin(self, *arguments: Any, **others: Any) -> None:
        """Start the clock."""
        _synchronise(self.device)
        if len(self.seconds) == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._begin = time.perf_counter()

    def on_step_end(self, *arguments: Any, **others: Any) -> None:
        """Stop it."""
        _synchronise(self.device)
        self.seconds.append(time.perf_counter() - self._begin)


def _by_trainer(length: int, device: torch.device, tiny: bool, shape: str, method: str, steps: int) -> dict[str, Any]:
    model = _model(device, tiny, shape, method)
    ids = torch.randint(1, model.config.vocab_size, (length,))
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=1 + steps,
            learning_rate=_LEARNING_RATE,
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch",
            use_cpu=device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = [{"input_ids": ids, "labels": ids}] * (1 + steps)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()  # type: ignore[arg-type]
    return _row(model, length, device, min(clock.seconds[1:]))
