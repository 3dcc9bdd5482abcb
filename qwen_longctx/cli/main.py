"""The command ``qwen-longctx``: demo, passkey, quality, plot, calibrate, bench, plan, doctor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qwen_longctx import LongContextConfig, ops, patched_qwen, patches
from qwen_longctx.bench import bench
from qwen_longctx.config import SPARSE
from qwen_longctx.evaluation import calibrate, corpus, passkey, plots, quality
from qwen_longctx.evaluation.environment import environment, write_results
from qwen_longctx.ops import norm as fused
from qwen_longctx.ops.engines import engine
from qwen_longctx.prefill import memory
from qwen_longctx.sparsity import budgets

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "tiny-qwen2"
DEMO_CELLS = ((1, 5), (4, 5), (16, 5), (64, 2))  # multiple of the trained length, prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input is 2, told before work starts."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, MemoryError, NotImplementedError, ImportError) as error:
        print(f"qwen-longctx {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen-longctx", description="Long context for Qwen checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="passkeys far beyond the trained length, offline, in about a minute")
    demo.add_argument("--output", help="results file (JSON)")
    demo.set_defaults(run=_demo)

    keys = commands.add_parser("passkey", help="passkey retrieval of a checkpoint by length and depth")
    keys.add_argument("--model", required=True, help="folder or hub name of the checkpoint")
    keys.add_argument("--lengths", type=_whole, nargs="+", required=True, help="tokens of the prompts")
    keys.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    keys.add_argument("--repeats", type=_whole, default=1, help="prompts for each length and depth")
    keys.add_argument("--seed", type=int, default=0)
    keys.add_argument("--no-patch", action="store_true", help="run the stock model")
    keys.add_argument("--sparse", default="auto", choices=SPARSE, help="sparse prefill; off is exact")
    keys.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    keys.add_argument("--device-map", default="auto")
    keys.add_argument("--output", help="results file (JSON)")
    keys.set_defaults(run=_passkey)

    measure = commands.add_parser("bench", help="time and memory on the shape of Qwen2.5-7B, random weights")
    measure.add_argument("what", choices=["attention", "stock", "mlp", "headline", "speed"])
    measure.add_argument("--lengths", type=_whole, nargs="+", help="tokens")
    measure.add_argument("--density", type=float, help="speed: share of the blocks, instead of one by length")
    measure.add_argument(
        "--dense-layers", type=int, default=0, help="speed: project longer dense runs from so many layers"
    )
    measure.add_argument(
        "--whole-up-to", type=int, default=131072, help="speed: longest stock run, and dense run as it is"
    )
    measure.add_argument("--output", help="results file (JSON)")
    measure.add_argument("--tiny", action="store_true", help="a toy shape, to try the command")
    measure.set_defaults(run=_bench)

    judge = commands.add_parser("quality", help="sparse against dense prefill of a checkpoint, on real text")
    judge.add_argument("--model", required=True, help="folder or hub name of the checkpoint")
    judge.add_argument("--lengths", type=_whole, nargs="+", required=True, help="tokens of the text")
    judge.add_argument("--variants", nargs="+", default=list(quality.DEFAULT_VARIANTS), help="RULE[:SETTING=NUMBER,…]")
    judge.add_argument("--judged", type=_whole, default=quality.JUDGED, help="tokens at the end that are judged")
    judge.add_argument("--depths", type=float, nargs="*", default=[], help="passkeys at the same length, one a depth")
    judge.add_argument("--packages", nargs="+", default=[corpus.PACKAGE], help="installed packages, a text from each")
    judge.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    judge.add_argument("--device-map", default="auto")
    judge.add_argument("--output", help="results file (JSON), written after every row")
    judge.set_defaults(run=_quality)

    picture = commands.add_parser("plot", help="picture of results of quality, or of bench speed")
    picture.add_argument("results", nargs="+", help="results files of one kind")
    picture.add_argument("--output", required=True, help="picture to write")
    picture.set_defaults(run=_plot)

    refine = commands.add_parser("calibrate", help="raise vertical-slash budgets of heads that recall too little")
    refine.add_argument("--model", required=True, help="folder or hub name of the checkpoint")
    refine.add_argument("--lengths", type=_whole, nargs="+", required=True, help="tokens of the texts")
    refine.add_argument("--output", required=True, help="file to write, in Qwen's format; the same call resumes")
    refine.add_argument("--start", help='budgets to raise: a file, or "minference"; MInference\'s default if left out')
    refine.add_argument("--threshold", type=float, default=calibrate.THRESHOLD, help="recall wanted of every head")
    refine.add_argument("--step", type=_whole, default=calibrate.STEP, help="columns and diagonals gained in a round")
    refine.add_argument("--rounds", type=_whole, default=calibrate.ROUNDS, help="rounds a length at most")
    refine.add_argument("--package", default=corpus.PACKAGE, help="installed package whose source is the text")
    refine.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    refine.add_argument("--device-map", default="auto")
    refine.set_defaults(run=_calibrate)

    plan = commands.add_parser("plan", help="memory that a run will need")
    plan.add_argument("--model", required=True, help="folder or hub name of the checkpoint; only its config is read")
    plan.add_argument("--tokens", type=_whole, required=True, help="prompt and new tokens")
    plan.add_argument("--batch", type=_whole, default=1)
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="what runs here, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _demo(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    trained = model.config.max_position_embeddings
    found: dict[str, dict[int, float]] = {"unpatched": {}, "patched": {}}
    for name, shares in found.items():
        for multiple, prompts in DEMO_CELLS:
            depths = [(i + 0.5) / prompts for i in range(prompts)]
            with patched_qwen(model) if name == "patched" else nullcontext():
                shares.update(passkey.accuracy(passkey.evaluate(model, tokenizer, [multiple * trained], depths)))
    print(f"Passkeys found by the bundled checkpoint, trained to {trained} tokens:\n")
    print(f"{'tokens':>10} {'':>6} {'prompts':>8} {'unpatched':>10} {'patched':>9}")
    rows = []
    for multiple, prompts in DEMO_CELLS:
        tokens = multiple * trained
        stock, ours = found["unpatched"][tokens], found["patched"][tokens]
        print(f"{tokens:>10,} {f'{multiple}x':>6} {prompts:>8} {stock:>10.0%} {ours:>9.0%}")
        rows.append({"tokens": tokens, "prompts": prompts, "unpatched": stock, "patched": ours})
    if args.output:
        write_results(args.output, {"model": BUNDLED.name, "trained_length": trained, "rows": rows})


def _passkey(args: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(args.model)
    if not args.no_patch:
        LongContextConfig.from_model_config(config, sparse=args.sparse)
    for depth in args.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"--depths must lie between 0 and 1, got {depth}")
    model = _load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with nullcontext() if args.no_patch else patched_qwen(model, sparse=args.sparse):
        records = passkey.evaluate(model, tokenizer, args.lengths, args.depths, args.repeats, args.seed)
    for tokens, share in passkey.accuracy(records).items():
        print(f"{tokens:>10,} tokens: {share:.0%} of {sum(r.length == tokens for r in records)} keys found")
    if args.output:
        path = write_results(
            args.output,
            {
                "model": Path(args.model).name,
                "patched": not args.no_patch,
                "sparse": None if args.no_patch else args.sparse,
                "trained_length": config.max_position_embeddings,
                "records": passkey.as_rows(records),
            },
        )
        print(f"written to {path}")


def _load(args: argparse.Namespace) -> Any:
    """The model of ``--model``, as ``--dtype`` and ``--device-map`` say."""
    return AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), device_map=args.device_map
    ).eval()


def _quality(args: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(args.model)
    variants = [quality.variant(text) for text in args.variants]
    for one in variants:
        LongContextConfig.from_model_config(config, **one.overrides)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = {package: corpus.source_code(tokenizer, max(args.lengths), package) for package in args.packages}
    texts = [(package, longest[package][:, :length]) for length, package in product(args.lengths, args.packages)]
    model = _load(args)
    done: list[dict[str, Any]] = []
    about: dict[str, Any] = {"model": Path(args.model).name, "trained_length": config.max_position_embeddings}
    about["texts"] = [
        {"tokens": ids.shape[1], "package": package, "fingerprint": corpus.fingerprint(ids)} for package, ids in texts
    ]
    for package, ids in texts:
        for found in quality.evaluate(model, tokenizer, ids, variants, args.judged, args.depths):
            row = {"package": package, **found}
            shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
            print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
            done.append(row)
            if args.output:
                write_results(args.output, {**about, "rows": done})


def _plot(args: argparse.Namespace) -> None:
    if find_spec("matplotlib") is None:
        raise ImportError("plot needs matplotlib, which is not installed: pip install matplotlib")
    rows = [row for path in args.results for row in json.loads(Path(path).read_text()).get("rows", [])]
    for drawing, key in ((plots.quality_by_density, "variant"), (plots.time_by_length, "sparse_seconds")):
        if rows and all(key in row for row in rows):
            drawing(rows).savefig(args.output, dpi=100)
            print(f"written to {args.output}")
            return
    raise ValueError(f"{', '.join(args.results)}: give files of quality, or of bench speed, not of both or others")


def _calibrate(args: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(args.model)
    LongContextConfig.from_model_config(config, sparse="vertical_slash")
    shape = config.num_hidden_layers, config.num_attention_heads
    source = args.start or budgets.beside_checkpoint(args.model)
    start = budgets.uniform(*shape) if source is None else budgets.load(source, *shape, args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = corpus.source_code(tokenizer, max(args.lengths), args.package)
    texts = [longest[:, :length] for length in sorted(args.lengths)]
    model = _load(args)
    how = {"threshold": args.threshold, "step": args.step, "rounds": args.rounds}
    for one in calibrate.calibrate(model, texts, start, args.output, **how):
        print(
            f"{one.tokens:>10,} tokens, round {one.number + 1}: recall {one.recall:.4f}, worst head "
            f"{one.lowest_recall:.4f}, {one.raised} heads raised"
        )
    print(f"written to {args.output}")


def _bench(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise ValueError("bench needs a CUDA device for the shape of Qwen2.5-7B: add --tiny to try the command here")
    if args.what == "mlp" and device.type == "cpu":
        raise ValueError("bench mlp reads CUDA's memory statistics: run it on a machine with a CUDA device")
    rows: Iterator[dict[str, Any]]
    if args.what == "attention":
        rows = bench.attention(args.lengths or [131072, 524288], device, args.tiny)
    elif args.what == "stock":
        rows = bench.stock(args.lengths or [4096, 8192, 16384, 32768], device, args.tiny)
    elif args.what == "mlp":
        rows = bench.mlp((args.lengths or [131072])[0], device, args.tiny)
    elif args.what == "speed":
        lengths = args.lengths or list(bench.DENSITIES)
        rows = bench.speed(lengths, device, args.tiny, args.density, args.dense_layers, args.whole_up_to)
    else:
        rows = bench.headline((args.lengths or [1_000_000])[0], device, args.tiny)
    done = []
    for row in rows:
        print(
            "  ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, dict)),
            flush=True,
        )
        done.append(row)
        if args.output:  # after each row: a run that is cut short keeps what it has
            write_results(args.output, {"shape": "tiny" if args.tiny else "Qwen2.5-7B", "rows": done})


def _plan(args: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(args.model)
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


def _doctor(args: argparse.Namespace) -> None:
    found = environment()
    print(f"qwen_longctx {found['qwen_longctx']}, python {found['python']}, {found['platform']}")
    for name, version in found["packages"].items():
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
        long, short = (engine(torch.empty(1, tokens, 1, 128, device=device, dtype=dtype)) for tokens in (4096, 1))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{device} ({name}): prefill runs on {long}, decode on {short} ({_why(long)})")
        reasons = ops.why_not(device, dtype, 128, 128)
        chosen = ops.list_kernel("auto", device, dtype, 128, 128)
        passed_over = "; ".join(f"{kernel} {reason}" for kernel, reason in reasons.items() if reason)
        when = "on request only, " if chosen == "reference" else ""
        print(f"{device} ({name}): sparse prefill runs {when}on {chosen} ({passed_over or 'the fastest'})")
        norms = "Liger-Kernel" if fused.runs(torch.empty(1, device=device, dtype=dtype)) else "PyTorch"
        print(f"{device} ({name}): norms and SwiGLU of long prompts run on {norms}")


def _why(name: str) -> str:
    return {
        "cpu": "PyTorch's fused CPU attention",
        "cudnn": "cuDNN is the fastest dense kernel from compute capability 9.0 on, but plans anew for every length",
        "flash": "PyTorch's FlashAttention; cuDNN's kernel is faster from compute capability 9.0 on only",
        "efficient": "no other fused kernel takes this dtype",
    }.get(name, "no fused kernel knows this device")


if __name__ == "__main__":
    sys.exit(main())
