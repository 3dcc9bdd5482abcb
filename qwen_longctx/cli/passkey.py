"""Passkey retrieval of a checkpoint by length and depth."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from qwen_longctx.cli.options import (
    add_lengths,
    add_model,
    add_output,
    add_settings,
    at_least_one,
    depth,
    settings_given,
)
from qwen_longctx.config import SPARSE
from qwen_longctx.errors import InvalidValue

# of the patch; what a passkey asks is whether they lose it
_SETTINGS = ("linear", "kv_cache", "sparse_decode", "sparse_decode_threshold")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx passkey``."""
    add_model(parser)
    add_lengths(parser, "tokens of the prompts")
    parser.add_argument("--depths", type=depth, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1")
    parser.add_argument("--repeats", type=at_least_one, default=1, help="prompts for each length and depth")
    parser.add_argument("--seed", type=int, default=0, help="of the keys")
    parser.add_argument("--no-patch", action="store_true", help="run stock transformers")
    parser.add_argument("--sparse", default="auto", choices=SPARSE, help="rule of sparse prefill; off is exact")
    add_settings(parser, _SETTINGS)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Ask for the keys, and print the share of right answers by length."""
    from qwen_longctx import LongContextConfig, patched_qwen
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.evaluation import passkey
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable
    from qwen_longctx.sparsity import check_budgets

    settings = settings_given(args, _SETTINGS)
    if args.no_patch and settings:
        raise InvalidValue(
            f"--no-patch runs stock transformers, which has no {', '.join(settings)}: leave out one of the two"
        )
    settings["sparse"] = args.sparse
    if args.output is not None:
        check_writable(args.output)
    config = checkpoint.load_config(args.model, any_model=args.no_patch)
    if not args.no_patch:
        check_budgets(LongContextConfig.from_model_config(config, **settings), config)
    checkpoint.check_room(config, args.lengths, args.dtype)
    tokenizer = checkpoint.load_tokenizer(args.model)
    passkey.check(tokenizer, args.lengths, args.depths, args.repeats, config.vocab_size)
    model = checkpoint.load_model(args)
    about = {
        "model": Path(args.model).name,
        "patched": not args.no_patch,
        "sparse": None,
        **({} if args.no_patch else settings),
        "trained_length": getattr(config, "max_position_embeddings", None),
    }
    done: list[passkey.Record] = []
    with nullcontext() if args.no_patch else patched_qwen(model, **settings):
        for record in passkey.records(model, tokenizer, args.lengths, args.depths, args.repeats, args.seed):
            done.append(record)
            if args.output is not None:
                write_results(args.output, {**about, "records": passkey.as_rows(done)})
    for tokens, right in passkey.accuracy(done).items():
        print(f"{tokens:>10,} tokens: {right:.0%} of {sum(r.length == tokens for r in done)} keys found")
    if args.output is not None:
        print(f"written to {args.output}")
