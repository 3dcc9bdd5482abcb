"""Raise the vertical-slash budgets of heads that recall too little."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_longctx.cli.options import add_lengths, add_model, at_least_one, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx calibrate``."""
    add_model(parser)
    add_lengths(parser, "tokens of the texts")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, in Qwen's format; the same call resumes"
    )
    parser.add_argument("--start", help='budgets to raise: a file, or "minference"; MInference\'s default if left out')
    parser.add_argument("--threshold", type=share, help="recall wanted of every head, 0.9 by default")
    parser.add_argument("--step", type=at_least_one, help="columns and diagonals that a head gains in a round")
    parser.add_argument("--rounds", type=at_least_one, help="rounds for each length at most")
    parser.add_argument("--package", help="installed package whose source is the text")


def run(args: argparse.Namespace) -> None:
    """Write the budgets after every round, and print each round."""
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.evaluation import calibrate, corpus, passkey
    from qwen_longctx.files import check_writable

    check_writable(args.output)
    how = {name: getattr(args, name) for name in ("threshold", "step", "rounds") if getattr(args, name) is not None}
    calibrate.Steps(**how)
    config = checkpoint.load_config(args.model)
    lengths = sorted(set(args.lengths))
    checkpoint.check_room(config, lengths, args.dtype)
    start = _start(args, config)
    calibrate.check(config, lengths, start)
    tokenizer = checkpoint.load_tokenizer(args.model)
    longest = corpus.source_code(tokenizer, lengths[-1], args.package or corpus.PACKAGE)
    passkey.check_tokens(longest, config.vocab_size)
    model = checkpoint.load_model(args)
    for one in calibrate.calibrate(model, [longest[:, :length] for length in lengths], start, args.output, **how):
        print(
            f"{one.tokens:>10,} tokens, round {one.number + 1}: recall {one.recall:.4f}, worst head "
            f"{one.lowest_recall:.4f}, {one.raised} heads raised"
        )
    print(f"written to {args.output}")


def _start(args: argparse.Namespace, config: Any) -> Any:
    """The budgets to raise; where they come from the file that the command writes, as they were at its first call."""
    from qwen_longctx.evaluation.calibrate import noted_start
    from qwen_longctx.sparsity import budgets

    source = args.start if args.start is not None else budgets.own_file(config)[0]
    if isinstance(source, (str, Path)) and Path(source).resolve() == Path(args.output).resolve():
        source = noted_start(args.output) or source
    return budgets.of_checkpoint(config, source)
