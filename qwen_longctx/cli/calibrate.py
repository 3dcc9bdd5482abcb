"""Raise the vertical-slash budgets of heads that recall too little."""

from __future__ import annotations

import argparse

from qwen_longctx.cli.options import add_lengths, add_model, at_least_one, share
from qwen_longctx.errors import InvalidValue

_SPARSE_FROM = 3  # tiles: one that is sparse, and the two at the end of a prompt that never are


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
    from qwen_longctx import LongContextConfig
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.evaluation import calibrate, corpus, passkey
    from qwen_longctx.evaluation.files import check_writable
    from qwen_longctx.sparsity import budgets

    check_writable(args.output)
    config = checkpoint.load_config(args.model)
    settings = LongContextConfig.from_model_config(config, sparse="vertical_slash")
    if min(args.lengths) < _SPARSE_FROM * settings.tile:
        raise InvalidValue(
            f"--lengths must be at least {_SPARSE_FROM * settings.tile} tokens for this checkpoint, got "
            f"{min(args.lengths)}: shorter texts have no part that is prefilled sparsely"
        )
    checkpoint.check_room(config, args.lengths, args.dtype)
    shape = config.num_hidden_layers, config.num_attention_heads
    source = args.start or budgets.beside_checkpoint(args.model)
    start = budgets.uniform(*shape) if source is None else budgets.load(source, *shape, args.model)
    tokenizer = checkpoint.load_tokenizer(args.model)
    longest = corpus.source_code(tokenizer, max(args.lengths), args.package or corpus.PACKAGE)
    passkey.check_tokens(longest, config.vocab_size)
    texts = [longest[:, :length] for length in sorted(args.lengths)]
    model = checkpoint.load_model(args)
    how = {name: getattr(args, name) for name in ("threshold", "step", "rounds") if getattr(args, name) is not None}
    for one in calibrate.calibrate(model, texts, start, args.output, **how):
        print(
            f"{one.tokens:>10,} tokens, round {one.number + 1}: recall {one.recall:.4f}, worst head "
            f"{one.lowest_recall:.4f}, {one.raised} heads raised"
        )
    print(f"written to {args.output}")
