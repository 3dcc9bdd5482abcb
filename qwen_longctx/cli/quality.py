"""Sparse against dense prefill of a checkpoint, on real text."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from qwen_longctx.cli.options import add_lengths, add_model, add_output, at_least_one, depth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx quality``."""
    add_model(parser)
    add_lengths(parser, "tokens of the text")
    parser.add_argument("--variants", nargs="+", metavar="RULE[:SETTING=VALUE,…]", help="what to compare")
    parser.add_argument(
        "--judged",
        type=at_least_one,
        help="tokens at the end that are judged; by default 8192, or half of a short text",
    )
    parser.add_argument(
        "--depths", type=depth, nargs="*", default=[], help="passkeys at the same length, one for each depth of 0 to 1"
    )
    parser.add_argument("--packages", nargs="+", help="installed packages whose source is the text, one text from each")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Measure every variant on every text, a row each."""
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.evaluation import corpus, modes, passkey, quality
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable

    if args.output is not None:
        check_writable(args.output)
    lengths = sorted(set(args.lengths))
    variants = [modes.variant(text) for text in args.variants or quality.DEFAULT_VARIANTS]
    packages = args.packages or [corpus.PACKAGE]
    config = checkpoint.load_config(args.model)
    quality.check(config, lengths[0], variants, args.judged, args.depths)
    checkpoint.check_room(config, lengths, args.dtype)
    tokenizer = checkpoint.load_tokenizer(args.model)
    if args.depths:
        passkey.check(tokenizer, lengths, args.depths, 1, config.vocab_size)
    longest = {package: corpus.source_code(tokenizer, lengths[-1], package) for package in packages}
    for ids in longest.values():
        passkey.check_tokens(ids, config.vocab_size)
    texts = [(package, longest[package][:, :length]) for length, package in product(lengths, packages)]
    model = checkpoint.load_model(args)
    about: dict[str, Any] = {"model": Path(args.model).name, "trained_length": config.max_position_embeddings}
    about["texts"] = [
        {"tokens": ids.shape[1], "package": package, "fingerprint": corpus.fingerprint(ids)} for package, ids in texts
    ]
    done: list[dict[str, Any]] = []
    for package, ids in texts:
        for figures in quality.evaluate(model, tokenizer, ids, variants, args.judged, args.depths):
            row = {"package": package, **figures}
            shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
            print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
            done.append(row)
            if args.output is not None:
                write_results(args.output, {**about, "rows": done})
