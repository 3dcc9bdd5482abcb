"""Processes of `torch.distributed` for tests: one imports what all of them need, and they are forked from it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(worker: str, folder: Path, ranks: int, seconds: float = 120) -> list[int]:
    """Call ``worker.main(folder)`` in so many processes that can form a group; returns how each of them ended.

    Results are for the workers to write into `folder`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, worker, str(folder)]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):  # those that hang are of its process group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    codes = folder / "codes.json"
    if not codes.exists():
        raise AssertionError(f"the ranks did not end within {seconds} s:\n{(folder / 'said').read_text()[-6000:]}")
    return json.loads(codes.read_text())


def _rank(worker: str, folder: Path, rank: int) -> None:
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        importlib.import_module(worker).main(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(worker: str, folder: Path) -> None:
    importlib.import_module(worker)
    children = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        child = os.fork()
        if child == 0:
            _rank(worker, folder, rank)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    fresh = folder / "codes.fresh"
    fresh.write_text(json.dumps(codes))
    fresh.rename(folder / "codes.json")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
