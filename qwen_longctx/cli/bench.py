"""Time and memory on the shape of Qwen2.5-7B or another, with random weights."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen_longctx.cli.options import add_lengths, add_output, at_least_one, at_least_zero, share, size_of_memory
from qwen_longctx.config import KV_CACHES, LINEAR
from qwen_longctx.errors import InvalidValue, Unsupported

_TITLES = {"qwen2.5-7b": "Qwen2.5-7B", "qwen2.5-14b": "Qwen2.5-14B", "qwen2.5-0.5b": "Qwen2.5-0.5B"}
SHAPES = ("qwen2.5-7b", "qwen2.5-14b")  # see bench.shapes.NAMES, which imports torch
TRAINED = ("qwen2.5-0.5b", "qwen2.5-7b")  # see bench.shapes.TRAINED
_OPTIONS = {
    "density": ("speed", "vllm", "pipeline", "ranks", "tensor-parallel"),
    "dense_layers": ("speed",),
    "whole_up_to": ("speed", "decode", "vllm", "tensor-parallel"),
    "sparse_decode": ("decode",),
    "linear": ("speed", "headline", "memory"),
    "kv_cache": ("speed", "decode", "memory", "pipeline"),
    "shape": ("speed", "memory", "vllm", "pipeline", "ranks", "tensor-parallel", "train"),
    "model": ("tensor-parallel",),
    "memory_limit": ("speed", "memory"),
    "prefill_chunk_size": ("speed", "vllm", "pipeline", "ranks"),
    "sparse_only": ("speed", "pipeline"),
    "cards": ("pipeline",),
    "ways": ("pipeline",),
    "timeline": ("pipeline",),
    "from_results": ("simulation",),
    "method": ("train",),
    "train_kernel": ("train",),
    "stock_lengths": ("train",),
}
_WITHOUT_A_GPU = ("simulation",)
_WAYS = ("one", "off", "equal", "auto", "measured")  # see bench.pipeline.WAYS, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx bench``."""
    parser.add_argument(
        "what",
        choices=[
            *("attention", "stock", "mlp", "linear", "headline", "speed", "decode", "start", "memory", "vllm"),
            *("pipeline", "ranks", "tensor-parallel", "simulation", "train"),
        ],
        help="what to measure",
    )
    add_lengths(parser, "tokens of the prompts", required=False)
    parser.add_argument(
        "--density", type=share, help="speed, vllm, pipeline, ranks, tensor-parallel: share of the blocks kept"
    )
    parser.add_argument(
        "--dense-layers",
        type=at_least_one,
        help="speed: project longer dense runs from so many layers",
    )
    parser.add_argument(
        "--whole-up-to",
        type=at_least_zero,
        help="speed: longest stock run, and dense run as it is; decode: longest stock run; 131072 by default. vllm: "
        "longest dense run, 524288 by default; tensor-parallel: the same, 262144",
    )
    parser.add_argument("--sparse-decode", type=share, help="decode: also with this share of the keys")
    parser.add_argument("--linear", choices=LINEAR, help="speed, headline, memory: what the linear layers compute in")
    parser.add_argument("--kv-cache", choices=KV_CACHES, help="speed, decode, memory, pipeline: how our cache is held")
    parser.add_argument(
        "--shape",
        choices=tuple(_TITLES),
        help=f"speed, memory, vllm, pipeline, ranks, tensor-parallel: shape of the model, {SHAPES[0]} by default; "
        f"train: {TRAINED[0]} by default",
    )
    parser.add_argument("--model", type=Path, help="tensor-parallel: folder of a checkpoint, in place of a shape")
    parser.add_argument("--method", choices=("full", "lora"), help="train: what learns, full by default")
    parser.add_argument("--train-kernel", metavar="KERNEL", help="train: kernel of attention, the fastest by default")
    parser.add_argument(
        "--stock-lengths",
        type=at_least_zero,
        nargs="+",
        metavar="TOKENS",
        help="train: lengths of the Trainer; 0 is none",
    )
    parser.add_argument(
        "--memory-limit",
        type=size_of_memory,
        metavar="SIZE",
        help="speed, memory: memory of the card that may be taken, such as 48GB",
    )
    parser.add_argument(
        "--prefill-chunk-size",
        type=at_least_one,
        metavar="TOKENS",
        help="speed, vllm, pipeline, ranks: tokens of a chunk",
    )
    parser.add_argument(
        "--sparse-only",
        action="store_const",
        const=True,
        help="speed, pipeline: neither dense prefill nor stock transformers",
    )
    parser.add_argument("--cards", type=at_least_one, help="pipeline: cards that share the layers, 2 by default")
    parser.add_argument("--ways", nargs="+", choices=_WAYS, help="pipeline: one card, and values of that setting")
    parser.add_argument(
        "--timeline", action="store_const", const=True, help="pipeline: also when each card is busy, from a profiler"
    )
    parser.add_argument(
        "--from-results", nargs="+", metavar="FILE", help="simulation: results of bench speed, whose times it takes"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the command")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, and print a row for each length."""
    import torch

    from qwen_longctx.bench.limit import limit_memory
    from qwen_longctx.bench.shapes import model_config
    from qwen_longctx.cli.checkpoint import check_room
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable

    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    for name in options:
        if args.what not in _OPTIONS[name]:
            owners = " and ".join(_OPTIONS[name])
            option = name.replace("_", "-")
            raise InvalidValue(f"--{option} is an option of bench {owners}, got bench {args.what}: leave it out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny and args.what not in _WITHOUT_A_GPU:
        raise Unsupported("bench needs a CUDA device for the shape of Qwen2.5-7B: add --tiny to try the command here")
    if device.type == "cpu" and args.what == "mlp":
        raise Unsupported("bench mlp reads CUDA's memory statistics: run it on a machine with a CUDA device")
    if args.output is not None:
        check_writable(args.output)
    shape, limit = _shape(args), options.pop("memory_limit", None)
    if limit is not None:
        limit_memory(limit, device)
    module = import_module(f"qwen_longctx.bench.{args.what.replace('-', '_')}")
    lengths = args.lengths or list(module.LENGTHS)
    layers = 1 if args.what in ("attention", "mlp", "linear") else None
    if args.what == "train":
        options = _of_train(options)
    elif args.what not in _WITHOUT_A_GPU:
        check_room(model_config(args.tiny, layers, shape), lengths, "bfloat16")
    done: list[dict[str, Any]] = []
    for row in module.measure(lengths, device, args.tiny, **options):
        print("  ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, dict)), flush=True)
        done.append(row)
        if args.output is not None:
            limited = {} if limit is None else {"memory_limit_bytes": limit}
            about = {} if args.what in _WITHOUT_A_GPU else {"shape": "tiny" if args.tiny else _TITLES[shape]}
            if args.model is not None:
                about = {"model": args.model.name}
            write_results(args.output, {**about, **limited, "rows": done})


def _shape(args: argparse.Namespace) -> str:
    """The shape that is asked for, of those that a measurement knows."""
    known = TRAINED if args.what == "train" else SHAPES
    if args.shape is not None and args.shape not in known:
        raise InvalidValue(f"--shape of bench {args.what} is one of {', '.join(known)}, got {args.shape}")
    return args.shape or known[0]


def _of_train(options: dict[str, Any]) -> dict[str, Any]:
    """Options as `bench.train.measure` names them."""
    if "train_kernel" in options:
        options["kernel"] = options.pop("train_kernel")
    if "stock_lengths" in options:
        options["stock_lengths"] = [length for length in options["stock_lengths"] if length]
    return options
