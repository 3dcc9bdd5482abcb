"""Time to the first token where processes share the layers of a model, a GPU each; and what happens if one is killed.

This process measures nothing itself: it starts the ranks, and hands on what rank 0 says. Each holds its own layers of
random weights. Without CUDA there are two ranks on the CPU, to try the command.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from qwen_longctx import LongContextCache, patched_qwen, pipeline_parallel
from qwen_longctx.bench.processes import LIMIT, count_ranks, own_place, rows_of, say, started
from qwen_longctx.bench.shapes import NAMES, model_config, random_model, random_prompt
from qwen_longctx.bench.speed import DENSE, sparse_settings
from qwen_longctx.config import PIPELINES
from qwen_longctx.errors import RankFailed
from qwen_longctx.stage import even_shares

LENGTHS = (262144, 1_000_000)
_CHUNK = 32768
_NEW_TOKENS = 16
_AT_CHUNK = 3  # in which a rank is killed


def measure(
    lengths: list[int],
    device: torch.device,
    tiny: bool = False,
    shape: str = NAMES[0],
    density: float | None = None,
    prefill_chunk_size: int = _CHUNK,
) -> Iterator[dict[str, Any]]:
    """Rows of every length, with chunks cut in every way (the setting `pipeline`); then one of a rank that is killed.

    ``"off"`` is one chunk at a time, which is what one card takes beside the transfers. All rows of a length are of the
    same prompt, and `difference` is the largest one of its last logits from those of the first row.

    Parameters
    ----------
    lengths : list of int
    device : torch.device
        Of which kind those of the ranks are.
    tiny : bool
        A toy shape.
    shape : str
        See ``bench.shapes.NAMES``.
    density : float, optional
        Sparse prefill by block scores of this share; dense without it.
    prefill_chunk_size : int
        Tokens of the longest chunk.
    """
    ranks = count_ranks("ranks", device)
    settings = DENSE if density is None else sparse_settings(max(lengths), density)
    settings = {**settings, "prefill_chunk_size": prefill_chunk_size}
    spec = {"device": device.type, "tiny": tiny, "shape": shape, "settings": settings, "lengths": lengths}
    yield from rows_of(__name__, spec, ranks)
    yield _end(spec, ranks, killed=ranks - 1)


def _end(spec: dict[str, Any], ranks: int, killed: int) -> dict[str, Any]:
    """How the others take it that a rank is killed."""
    with started(__name__, {**spec, "kill": killed}, ranks) as processes:
        codes = processes.wait()
        said = [json.loads(path.read_text()) for path in sorted(processes.folder.glob("failed.*"))]
    return {
        "killed_rank": killed,
        "error": said[0]["error"] if said else "none",
        "seconds_until_the_error": round(max((one["seconds"] for one in said), default=LIMIT), 2),
        "all_ended": None not in codes,
    }


# --- a rank -------------------------------------------------------------------------------------------------------


def _rank(spec: dict[str, Any], folder: Path) -> None:
    rank, ranks, device = own_place(spec["device"])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    counts = even_shares(model_config(spec["tiny"], shape=spec["shape"]).num_hidden_layers, ranks)
    first = sum(counts[:rank])
    own = range(first, first + counts[rank])
    model = random_model(device, spec["tiny"], shape=spec["shape"], own=own)
    pipeline_parallel(model, layers=counts, timeout=300)
    with torch.no_grad():
        if "kill" in spec:
            _die(model, spec, device, folder)
            return
        _warm_up(model, spec, device)
        for length in spec["lengths"]:
            for row in _of_length(model, spec, length, device):
                if rank == 0:
                    say(folder, row)
    dist.destroy_process_group()


def _prompt(model: Any, length: int, device: torch.device) -> torch.Tensor:
    return random_prompt(length, model.config.vocab_size).to(device)


def _warm_up(model: Any, spec: dict[str, Any], device: torch.device) -> None:
    with patched_qwen(model, **spec["settings"]):
        model(_prompt(model, min(3 * spec["settings"]["prefill_chunk_size"], max(spec["lengths"])), device))


def _of_length(model: Any, spec: dict[str, Any], length: int, device: torch.device) -> Iterator[dict[str, Any]]:
    ids = _prompt(model, length, device)
    reference: torch.Tensor | None = None
    for name in PIPELINES:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        cache = LongContextCache(length + _NEW_TOKENS)
        with patched_qwen(model, **spec["settings"], pipeline=name):
            seconds, logits = _timed(lambda cache=cache: model(ids, past_key_values=cache, logits_to_keep=1), device)
            token = logits[:, -1].argmax(-1)[:, None]
            decoding = [
                _timed(lambda cache=cache, token=token: model(token, past_key_values=cache), device)[0]
                for _ in range(_NEW_TOKENS)
            ]
        report = cache.report()
        reference = logits if reference is None else reference
        yield {
            "tokens": length,
            "pipeline": name,
            "ranks": dist.get_world_size(),
            "layers": model.config.num_hidden_layers,
            "attention": spec["settings"]["sparse"],
            "density_of_rank_0": round(report["density"], 4),
            "chunks": len(report["pipeline"]["chunks"]),
            "seconds": round(seconds, 3),
            "decode_seconds_per_token": round(sorted(decoding)[len(decoding) // 2], 5),
            "peak_bytes_of_rank_0": report["peak_memory_bytes"],
            "difference": float((logits - reference).abs().max()),
        }
        del cache


def _timed(call: Any, device: torch.device) -> tuple[float, torch.Tensor]:
    """Seconds from the call until its logits are here, and these."""
    dist.barrier()
    begin = time.perf_counter()
    logits = call().logits.float().cpu()
    return time.perf_counter() - begin, logits


def _die(model: Any, spec: dict[str, Any], device: torch.device, folder: Path) -> None:
    """One rank is killed within a chunk; the others note what they raise, and when."""
    rank = dist.get_rank()
    chunks: list[None] = []

    def kill(module: Any, given: Any) -> None:
        chunks.append(None)
        if len(chunks) == _AT_CHUNK:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    settings, own = spec["settings"], [layer for layer in model.model.layers if not layer.mlp.up_proj.weight.is_meta]
    if rank == spec["kill"]:
        own[0].register_forward_pre_hook(kill)
    length = max(spec["lengths"][0], (_AT_CHUNK + 2) * settings["prefill_chunk_size"])
    try:
        with patched_qwen(model, **settings, pipeline="equal"):
            model(_prompt(model, length, device), logits_to_keep=1).logits.cpu()
    except RankFailed as error:
        seconds = time.time() - float((folder / "killed").read_text())
        (folder / f"failed.{rank}").write_text(json.dumps({"error": str(error), "seconds": seconds}))
        raise SystemExit(1) from None


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
