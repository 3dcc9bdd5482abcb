"""What runs here, and why."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``qwen-longctx doctor`` has no options."""


def run(args: argparse.Namespace) -> None:
    """Print versions, which families can be patched, and which kernel runs on each device and why."""
    import torch
    import transformers

    from qwen_longctx import ops, patches
    from qwen_longctx.evaluation.environment import environment
    from qwen_longctx.ops import decode
    from qwen_longctx.ops.device import uses_triton
    from qwen_longctx.ops.engines import dense

    about = environment()
    print(f"qwen_longctx {about['qwen_longctx']}, python {about['python']}, {about['platform']}")
    for name, version in about["packages"].items():
        print(f"  {name} {version}")
    for family in patches.FAMILIES:
        try:
            family.check()
            verdict = "can be patched"
        except (ImportError, RuntimeError) as error:
            verdict = str(error)
        print(f"{family.prefix} on transformers {transformers.__version__}: {verdict}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        long, short = (dense(torch.empty(1, tokens, 1, 128, device=device, dtype=dtype)).name for tokens in (4096, 1))
        if not decode.why_not("auto", device, dtype, 128, 1):
            short = "one Triton kernel for all segments"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{device} ({name}): prefill runs on {long}, decode on {short} ({_why(long)})")
        reasons = ops.why_not(device, dtype, 128, 128)
        chosen = ops.list_kernel("auto", device, dtype, 128, 128)
        passed_over = "; ".join(f"{kernel} {reason}" for kernel, reason in reasons.items() if reason)
        when = "on request only, " if chosen == "reference" else ""
        print(f"{device} ({name}): sparse prefill runs {when}on {chosen} ({passed_over or 'the fastest'})")
        norms = "Triton" if uses_triton(torch.empty(1, device=device, dtype=dtype)) else "PyTorch"
        print(f"{device} ({name}): norms and SwiGLU of long prompts run on {norms}")


def _why(name: str) -> str:
    return {
        "cpu": "PyTorch's fused CPU attention",
        "cudnn": "cuDNN is the fastest dense kernel from compute capability 9.0 on, but plans anew for every length",
        "flash": "PyTorch's FlashAttention; cuDNN's kernel is faster from compute capability 9.0 on only",
        "efficient": "no other fused kernel takes this dtype",
    }.get(name, "no fused kernel knows this device")
