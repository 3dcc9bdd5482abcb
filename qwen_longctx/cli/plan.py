"""Memory that a run will need."""

from __future__ import annotations

import argparse

from qwen_longctx.cli.options import at_least_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx plan``."""
    parser.add_argument("--model", required=True, help="folder or hub name of the checkpoint; only its config is read")
    parser.add_argument("--tokens", type=at_least_one, required=True, help="prompt and new tokens")
    parser.add_argument("--batch", type=at_least_one, default=1, help="rows, beams included; 1 by default")


def run(args: argparse.Namespace) -> None:
    """Print what weights, cache and activations take, and what the GPUs have."""
    import torch

    from qwen_longctx import LongContextConfig
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.prefill import memory

    config = checkpoint.load_config(args.model)
    settings = LongContextConfig.from_model_config(config)
    needed = memory.estimate(config, args.tokens, args.batch, torch.bfloat16, settings)
    rows = [
        ("weights", needed.weights),
        ("KV cache", needed.kv_cache),
        ("activations, about", needed.activations),
        ("together", needed.total),
    ]
    for name, value in rows:
        print(f"{name:<20} {value / memory.GIB:>8.1f} GiB")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        print(f"GPU {index} free          {free / memory.GIB:>8.1f} of {total / memory.GIB:.1f} GiB")
