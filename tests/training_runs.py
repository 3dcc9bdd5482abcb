"""Tiny runs of training. As a program: runs that are killed and go on, and runs of two processes.

python tests/training_runs.py FOLDER
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoTokenizer, PreTrainedModel

import qwen_longctx
from helpers import tiny_model
from qwen_longctx.training import loop, stages
from qwen_longctx.training.ranks import Ranks, joined
from qwen_longctx.training.stages import Recipe

BUNDLED = Path(qwen_longctx.__file__).parent / "assets" / "tiny-qwen2"
TIMES = ("seconds", "tokens_per_second", "tflops_per_second", "environment", "kernels", "processes")
SAVE_EVERY = 2
_WORDS = "the farmer sold bread near a river and two boats waited for an hour before rain".split()


def write_texts(folder: Path, files: int = 6, words: int = 400) -> Path:
    """Files of different text."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(1)
    for number in range(files):
        sentences = [" ".join(source.choices(_WORDS, k=9)) + "." for _ in range(words // 9)]
        (folder / f"{number}.txt").write_text("\n\n".join(sentences))
    return folder


def table(texts: Path, **changed: Any) -> dict[str, Any]:
    """A recipe of two stages and ten steps."""
    return {
        "dtype": "float32",
        "save_every": SAVE_EVERY,
        "lora": {"rank": 4},
        "data": {"paths": [str(texts)], "held_out": 0.2},
        "evaluation": {"texts": 1},
        "stages": [
            {
                "name": "short",
                "sequence_length": 64,
                "rope_theta": 20_000.0,
                "tokens": 64 * 2 * 4,
                "learning_rate": 3e-3,
                "sequences_per_step": 2,
                "short_length": 20,
            },
            {
                "name": "long",
                "sequence_length": 128,
                "rope_theta": 50_000.0,
                "tokens": 128 * 2 * 6,
                "learning_rate": 3e-3,
                "sequences_per_step": 2,
            },
        ],
        **changed,
    }


def model_for(recipe: Recipe) -> PreTrainedModel:
    """Random but equal weights for equal recipes, with the vocabulary of the bundled tokenizer."""
    return tiny_model(dtype=getattr(torch, recipe.dtype), vocab_size=600, max_position_embeddings=32)


def run(recipe: Recipe, output: Path, ranks: Ranks | None = None, model: Any = None) -> Path:
    """Train from where the folder stands."""
    model = model_for(recipe) if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    return loop.train(model, loop.prepare(model.config, tokenizer, recipe, output, "base", ranks))


def rows(output: Path) -> list[dict[str, Any]]:
    """The log without what differs from run to run."""
    lines = (output / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def killed(folder: Path, method: str) -> dict[str, Any]:
    """Run once as it is, then again with kills at random moments to its end; says where it stood after each."""
    recipe = stages.of(table(folder / "texts", method=method, dtype="bfloat16"))
    assert _in_a_child(recipe, folder / f"whole-{method}") == 0
    source, output, standing = random.Random(method), folder / f"killed-{method}", []
    for steps in (0, 2, 1, 3, 3):
        status = _in_a_child(recipe, output, (_standing(output)[1] + steps, source.uniform(0, 0.1)))
        if os.WIFSIGNALED(status):
            standing.append(_standing(output))
    return {"standing": standing, "status": _in_a_child(recipe, output)}


def _in_a_child(recipe: Recipe, output: Path, kill: tuple[int, float] | None = None) -> int:
    """The status of a process that trains, and is killed so many seconds after it has done so many steps."""
    child = os.fork()
    if not child:
        _and_leave(lambda: run(recipe, output))
    if kill is not None:
        while _standing(output)[0] < kill[0] and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        time.sleep(kill[1])
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _and_leave(work: Callable[[], Any]) -> NoReturn:
    """Do the work of a child, which must not go on with its parent's."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _standing(output: Path) -> tuple[int, int]:
    """Steps that are in the log, and in the state; in the result, which the state gives way to."""
    done = max((row["step"] + 1 for row in _readable(output / "log.jsonl") if "step" in row), default=0)
    if (output / loop.RESULT).exists():
        return done, done
    state = output / "state.pt"
    return done, torch.load(state, weights_only=True)["step"] if state.exists() else 0


def _readable(log: Path) -> list[dict[str, Any]]:
    found = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def together(folder: Path, method: str, sharded: bool) -> int:
    """Run two processes, as a launcher starts them; returns the worse status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = f"two-{method}-sharded" if sharded else f"two-{method}"
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()

        def as_one_of_two() -> None:
            with joined() as ranks:
                run(stages.of(table(folder / "texts", method=method)), folder / name, ranks)

        _and_leave(as_one_of_two)
    return max(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":  # one process that imports everything once, and has no threads of autograd yet
    place = Path(sys.argv[1])
    found: dict[str, Any] = {f"killed-{method}": killed(place, method) for method in ("lora", "full")}
    found |= {"two-lora": together(place, "lora", False), "two-full-sharded": together(place, "full", True)}
    (place / "found.json").write_text(json.dumps(found))
