"""Patched against stock transformers through plain generate, token by token in turns."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Any

import torch
from transformers import Qwen2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from qwen_longctx import patch_qwen
from qwen_longctx.bench.shapes import random_model

LENGTHS = (4096, 8192, 16384, 32768)


def measure(
    lengths: list[int], device: torch.device, tiny: bool = False, rounds: int = 5, new_tokens: int = 32
) -> Iterator[dict[str, Any]]:
    """Patched against stock transformers (SDPA) through plain generate: seconds of the prefill, and of a decoded token.

    Two models of the same weights, one of them patched, generate at the same time and take turns token by token, so
    that a noisy host hits both alike. Stock attention may plan anew for every length that is new to it, as cuDNN
    does: "decode" are the tokens of the first round, as a user has them, "decode_again" those of later rounds. Both
    threads share one core where the system allows: cores of a busy host differ by half, for seconds on end.
    """
    model = random_model(device, tiny)
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    models = {"stock": model, "patched": patch_qwen(copy.deepcopy(model, shared))}
    with ThreadPoolExecutor(1, initializer=_pin) as one, ThreadPoolExecutor(1, initializer=_pin) as two:
        threads = dict(zip(models, (one, two), strict=True))  # two, because cuDNN's plans are kept by thread
        for length in lengths:
            ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
            parts = ("prefill", "decode", "decode_again")
            seconds: dict[str, list[float]] = {f"{name}_{part}": [] for part in parts for name in models}
            _in_turns(models, threads, ids, 1)  # warm-up
            for number in range(rounds):
                for name, (prefill, _, *decode) in _in_turns(models, threads, ids, new_tokens).items():
                    seconds[f"{name}_prefill"].append(prefill)
                    seconds[f"{name}_decode_again" if number else f"{name}_decode"] += decode
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratios = {f"{part}_ratio": medians[f"patched_{part}"] / medians[f"stock_{part}"] for part in parts}
            yield {
                "tokens": length,
                "new_tokens": new_tokens,
                **{f"{name}_seconds": round(value, 5) for name, value in medians.items()},
                **{name: round(value, 4) for name, value in ratios.items()},
                "seconds": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
            }


def _pin() -> None:
    """Keep this thread on the last core of those that the process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Turn(BaseStreamer):
    """A streamer that lets the other generate have a token after each of its own, and times its own.

    Parameters
    ----------
    own, other : threading.Semaphore
        Released when it is this one's turn, and the other's.
    """

    def __init__(self, own: Semaphore, other: Semaphore) -> None:
        self.own, self.other = own, other
        self.seconds: list[float] = []
        self._begin = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called by generate with the prompt, then with each token once it is on the host."""
        if self._begin:
            self.seconds.append(time.perf_counter() - self._begin)
        self.other.release()
        self.own.acquire()
        self._begin = time.perf_counter()

    def end(self) -> None:
        """Called by generate at the end; see `_in_turns`."""


def _in_turns(
    models: dict[str, Qwen2ForCausalLM], threads: dict[str, ThreadPoolExecutor], ids: torch.Tensor, new_tokens: int
) -> dict[str, list[float]]:
    """Seconds to the first token and between tokens of two models that generate by turns."""
    semaphores = Semaphore(0), Semaphore(0)
    turns = dict(zip(models, (Turn(*semaphores), Turn(*semaphores[::-1])), strict=True))

    def run(name: str) -> None:
        turn = turns[name]
        try:
            turn.own.acquire()
            models[name].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens + 1,
                min_new_tokens=new_tokens + 1,
                do_sample=False,
                streamer=turn,
            )
        finally:
            turn.other.release(2 + new_tokens)  # never waits again for this one, also when it failed

    running = [threads[name].submit(run, name) for name in models]
    semaphores[0].release()
    for one in running:
        one.result()
    return {name: turn.seconds for name, turn in turns.items()}
