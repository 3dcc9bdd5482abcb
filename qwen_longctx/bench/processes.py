"""Measurements that need a process for each device: this one starts them, and hands on what the first one says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from qwen_longctx.errors import InvalidValue, RankFailed

LIMIT = 60.0  # seconds in which processes must have ended behind the last row
_A_LOOK = 0.05  # seconds


class Processes:
    """The ranks of a measurement, and the folder in which they write.

    Parameters
    ----------
    ranks : list of subprocess.Popen
    folder : Path
    """

    def __init__(self, ranks: list[subprocess.Popen[bytes]], folder: Path) -> None:
        self.ranks, self.folder = ranks, folder

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of rank 0, as they come, until any rank has ended with an error, or rank 0 has ended."""
        told, ended, path = 0, False, self.folder / "rows"
        while not ended:
            ended = self.ranks[0].poll() is not None or any(one.poll() for one in self.ranks)
            lines = path.read_text().splitlines() if path.exists() else []
            yield from map(json.loads, lines[told:])
            told = len(lines)
            time.sleep(_A_LOOK)

    def wait(self) -> list[int | None]:
        """How the ranks ended; None of one that has not after `LIMIT` seconds."""
        for rank in self.ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(LIMIT)
        return [rank.poll() for rank in self.ranks]


@contextmanager
def started(module: str, spec: dict[str, Any], ranks: int) -> Iterator[Processes]:
    """Run ``python -m MODULE SPEC FOLDER`` as so many ranks; whatever still runs at the end of the block is killed.

    Parameters
    ----------
    module : str
    spec : dict
        What they are to do, as JSON takes it.
    ranks : int
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, json.dumps(spec), folder]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        try:
            yield Processes(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.wait()


def rows_of(module: str, spec: dict[str, Any], ranks: int) -> Iterator[dict[str, Any]]:
    """What rank 0 of `started` ranks says, a row each.

    Raises
    ------
    RankFailed
        One of them ended with an error.
    """
    with started(module, spec, ranks) as processes:
        yield from processes.rows()
        codes = processes.wait()
    if any(codes):
        raise RankFailed(f"{ranks} processes ended with {codes}: see what they printed")


def count_ranks(bench: str, device: torch.device) -> int:
    """Ranks of a measurement: one for each CUDA device, or two on the CPU.

    Raises
    ------
    InvalidValue
        There is one device only.
    """
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks < 2:
        raise InvalidValue(
            f"bench {bench} needs two CUDA devices, a process for each, and found 1: add --tiny on a CPU"
        )
    return ranks


def own_place(kind: str) -> tuple[int, int, torch.device]:
    """In a rank: its number, how many there are, and its device of that kind, which becomes the current one."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if kind != "cuda":
        return rank, ranks, torch.device(kind)
    torch.cuda.set_device(rank)
    return rank, ranks, torch.device("cuda", rank)


def say(folder: Path, row: dict[str, Any]) -> None:
    """Hand on a row; for rank 0."""
    with (folder / "rows").open("a") as file:
        file.write(json.dumps(row) + "\n")
