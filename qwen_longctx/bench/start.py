"""The first long prompt of a process: on a machine that has compiled nothing yet, and on one that has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qwen_longctx import LongContextCache, patch_qwen, warm_up
from qwen_longctx.bench.shapes import random_model
from qwen_longctx.bench.speed import DENSITIES
from qwen_longctx.bench.timing import timed
from qwen_longctx.errors import InvalidValue

LENGTHS = (131072,)
SHORTEST = 384  # tokens: one tile of 128 that is sparse, and the two at the end of a prompt that never are
# where Triton, PyTorch's compiler, flash-attn-4 and the driver keep what they have compiled
_FOLDERS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
_OF_THE_USER = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


def measure(lengths: list[int], device: torch.device, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Seconds of the first prompt of three new processes, and of the same prompt again, a row for each process.

    The first finds empty cache folders, the second what the first has compiled; the third calls `warm_up` before.

    Raises
    ------
    InvalidValue
        A length is below `SHORTEST`.
    """
    for length in lengths:
        if length < SHORTEST:
            raise InvalidValue(f"bench start measures prompts of at least {SHORTEST} tokens, got {length}")
    for length in lengths:
        with TemporaryDirectory() as folder:
            for process in ("first", "second", "warmed up"):
                yield {"tokens": length, "process": process, **_in_new_process(length, device, tiny, process, folder)}


def _in_new_process(length: int, device: torch.device, tiny: bool, process: str, folder: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_USER}
    environment |= {name: str(Path(folder) / name.lower()) for name in _FOLDERS}
    asked = json.dumps([length, str(device), tiny, process == "warmed up"])
    command = [sys.executable, "-m", "qwen_longctx.bench.start", asked]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _process(length: int, device: torch.device, tiny: bool, warmed: bool) -> dict[str, float]:
    """What one process measures, in seconds."""
    model = random_model(device, tiny)
    share = DENSITIES[min(DENSITIES, key=lambda known: abs(known - length))]
    threshold = min(length - 1, 32767)
    # random weights attend evenly: they are steered towards a recall that every head has, as in bench speed
    patch_qwen(model, sparse="block_scores", density=share, recall_target=1e-4, sparse_attention_threshold=threshold)
    row = {}
    if warmed:
        begin = time.perf_counter()
        warm_up(model)
        row["warm_up_seconds"] = time.perf_counter() - begin
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
    for name in ("first_seconds", "again_seconds"):
        cache = LongContextCache(length + 1)
        row[name] = timed(lambda cache=cache: model(ids, past_key_values=cache, logits_to_keep=1), device)  # type: ignore[misc]
        del cache
    return {name: round(seconds, 3) for name, seconds in row.items()}


if __name__ == "__main__":
    length, where, tiny, warmed = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(_process(length, torch.device(where), tiny, warmed)) + "\n")
