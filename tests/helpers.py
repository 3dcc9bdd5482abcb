"""Tiny random models of every family, the devices that tests run on, and a process that is killed."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from qwen_longctx.ops import triton_runtime

if not triton_runtime.AVAILABLE:
    NO_INTERPRETER = "needs Triton"
elif torch.cuda.is_available():
    NO_INTERPRETER = "the interpreter is for the CPU"
elif Version(triton_runtime.triton.__version__) < Version("3.3"):
    NO_INTERPRETER = "the interpreter of Triton before 3.3 lacks loops over lengths and one-bit numbers"
else:
    NO_INTERPRETER = ""
INTERPRETED = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GEOMETRY = {"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 64}
CLASSES = {"qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("5.0")
FAMILIES = [f for f in CLASSES if f != "qwen2_moe" or not OLD_TRANSFORMERS]
MOE = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}


def tiny_model(
    family: str = "qwen2",
    dtype: torch.dtype = torch.float32,
    rope: dict[str, Any] | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Two layers, four heads on two, random but equal weights for equal arguments; in eval mode."""
    prefix = CLASSES[family]
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "dual_chunk_attention_config": dict(GEOMETRY),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family.endswith("moe"):
        values.update(MOE)
    if rope is not None:
        new = not OLD_TRANSFORMERS
        theta = rope["rope_theta"]
        own = rope if new else {k: v for k, v in rope.items() if k != "rope_theta"}
        values.update({"rope_parameters": own} if new else {"rope_scaling": own, "rope_theta": theta})
    values.update(config)
    if family.endswith("moe") and "experts_implementation" not in config:
        values["experts_implementation"] = "eager"  # the grouped kernels know no float64
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**values))
    return model.eval().to(dtype)


def kill_when_written(process: subprocess.Popen[bytes], path: Path, after: float) -> None:
    """Kill a process without notice, so many seconds after it has written a file, or after a minute."""
    try:
        for _ in range(600):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(after)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
