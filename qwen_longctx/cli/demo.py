"""Passkeys far beyond the trained length, with and without the patch, offline, in about a minute."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from qwen_longctx.cli.options import add_output

CELLS = ((1, 5), (4, 5), (16, 5), (64, 2))  # multiple of the trained length, prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx demo``."""
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Ask the bundled checkpoint for passkeys, and print a table."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwen_longctx import patched_qwen
    from qwen_longctx.cli import BUNDLED
    from qwen_longctx.evaluation import passkey
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable

    if args.output is not None:
        check_writable(args.output)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    trained = model.config.max_position_embeddings
    rows: list[dict[str, Any]] = []
    for multiple, prompts in CELLS:
        tokens = multiple * trained
        depths = [(i + 0.5) / prompts for i in range(prompts)]
        row: dict[str, Any] = {"tokens": tokens, "prompts": prompts}
        for name in ("unpatched", "patched"):
            with patched_qwen(model) if name == "patched" else nullcontext():
                row[name] = passkey.accuracy(passkey.evaluate(model, tokenizer, [tokens], depths))[tokens]
        rows.append(row)
        if args.output is not None:
            write_results(args.output, {"model": BUNDLED.name, "trained_length": trained, "rows": rows})
    _print(rows, trained)


def _print(rows: list[dict[str, Any]], trained: int) -> None:
    print(f"Passkeys found by the bundled checkpoint, trained to {trained} tokens:\n")
    print(f"{'tokens':>10} {'':>6} {'prompts':>8} {'unpatched':>10} {'patched':>9}")
    for row in rows:
        times = f"{row['tokens'] // trained}x"
        print(f"{row['tokens']:>10,} {times:>6} {row['prompts']:>8} {row['unpatched']:>10.0%} {row['patched']:>9.0%}")
