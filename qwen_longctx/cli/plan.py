"""Memory that a run will need, whether it fits, and what to change where it does not."""

from __future__ import annotations

import argparse

from qwen_longctx.cli.options import DTYPES, add_settings, at_least_one, settings_given, size_of_memory, tokens

_SETTINGS = (
    "prefill_chunk_size",
    "mlp_chunk_size",
    "linear",
    "kv_cache",
    "sparse",
    "sparse_attention_threshold",
    "block_size",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx plan``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder or hub name of a checkpoint, of which only the config is read, or a shape such as qwen2.5-7b-1m",
    )
    parser.add_argument("--tokens", type=tokens, required=True, help="prompt and new tokens: 1000000, 1M or 512K")
    parser.add_argument(
        "--gpu",
        type=size_of_memory,
        metavar="SIZE",
        help="memory of one card: 24GB or 80GiB; by default that of this machine's smallest",
    )
    parser.add_argument("--gpus", type=at_least_one, default=1, metavar="N", help="cards, 1 by default")
    parser.add_argument("--batch", type=at_least_one, default=1, help="rows, beams included; 1 by default")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="dtype of weights and cache")
    add_settings(parser, _SETTINGS)
    parser.add_argument("--json", metavar="FILE", help="file to write the same to as data")


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from pathlib import Path

    import torch

    from qwen_longctx import memory
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable
    from qwen_longctx.shapes import SHAPES, known_config

    if args.json is not None:
        check_writable(args.json)
    known = args.model.lower() in SHAPES and not Path(args.model).is_dir()
    config = known_config(args.model) if known else checkpoint.load_config(args.model)
    settings = settings_given(args, _SETTINGS)
    dtype, cards = getattr(torch, args.dtype), range(torch.cuda.device_count())
    gpu = args.gpu or min((torch.cuda.get_device_properties(card).total_memory for card in cards), default=None)
    found = memory.plan(config, args.tokens, gpu, gpus=args.gpus, batch=args.batch, dtype=dtype, **settings)
    print(found)
    if args.json is not None:
        write_results(args.json, {"model": args.model, **found.as_dict()})
