"""Scores and likelihood of a checkpoint on tasks, by length, with and without the patch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_longctx.cli.options import add_lengths, add_model, add_output, at_least_one

if TYPE_CHECKING:
    from qwen_longctx.evaluation.samples import Samples
    from qwen_longctx.evaluation.task import Sample, Task

_CHAT = {"auto": None, "on": True, "off": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx eval``."""
    add_model(parser)
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="tasks, families of tasks, or files that define some"
    )
    add_lengths(parser, "tokens of prompt and answer")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["stock", "dense", "sparse"],
        metavar="MODE",
        help="stock, yarn, dense, sparse, or RULE:SETTING=VALUE,…; by default stock dense sparse",
    )
    parser.add_argument("--samples", type=at_least_one, default=10, help="for each task and length, 10 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--chat", choices=tuple(_CHAT), default="auto", help="chat template; auto takes it where the tokenizer has one"
    )
    parser.add_argument(
        "--batch-tokens", type=at_least_one, default=131072, metavar="TOKENS", help="of a batch at most, 131072"
    )
    parser.add_argument("--samples-in", metavar="FOLDER", help="sample files, by default in a folder beside --output")
    parser.add_argument("--prepare", action="store_true", help="build the sample files only, and load no weights")
    parser.add_argument("--judge", metavar="MODEL", help="checkpoint that judges answers, for longbench_chat")
    parser.add_argument("--base", default="dense", metavar="MODE", help="mode that the others are compared with, dense")
    add_output(parser, "results file (JSON), written after every batch; the same command continues it")


def run(args: argparse.Namespace) -> None:
    """Build the samples, run what is not in the results file yet, and print the table."""
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.errors import InvalidValue
    from qwen_longctx.evaluation import judge, modes, results, runner, samples, summary, tasks
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable

    if args.prepare and args.samples_in is None and args.output is None:
        raise InvalidValue("--prepare builds sample files: say where with --samples-in, or name the --output")
    if args.output is not None:
        check_writable(args.output)
    wanted, lengths = [modes.mode_of(text) for text in args.modes], sorted(set(args.lengths))
    if args.base != summary.BASE and args.base not in args.modes:
        raise InvalidValue(f"--base {args.base} is none of the modes {', '.join(args.modes)}: name one of them")
    if args.judge is not None:
        checkpoint.load_config(args.judge, any_model=True)
    found = tasks.find(args.tasks, None if args.judge is None else judge.checkpoint(args.judge))
    config = None
    if not args.prepare:
        config = checkpoint.load_config(args.model, any_model=not any(mode.patched for mode in wanted))
        modes.check_modes(config, wanted)
        checkpoint.check_room(config, lengths, args.dtype)
    tokenizer = checkpoint.load_tokenizer(args.model)
    store = samples.Samples(samples.reader_of(tokenizer, _CHAT[args.chat]), args.samples, args.seed, _folder(args))
    if config is None:
        for _ in _each(store, found, lengths):
            pass
        print(f"samples are in {store.folder}")
        return
    about = results.about(args.model, config, args.dtype, store)
    earlier = results.read(args.output) if args.output is not None else {"rows": []}
    results.check_same(args.output, earlier, about)
    summary.summarize(earlier["rows"], args.base)  # what could not be summed up in the end
    for task, length, built in _each(store, found, lengths):
        samples.check_vocabulary(built, store.reader, config.vocab_size, task.name)
        results.check_samples(args.output, earlier["rows"], store.reader, built, task.name, length)
    model = checkpoint.load_model(args)
    about["weights"] = results.weights_of(model)
    results.check_same(args.output, earlier, about)
    rows = list(earlier["rows"])
    for fresh in runner.batches(model, found, lengths, wanted, store, args.batch_tokens, results.keys(rows)):
        rows += fresh
        if args.output is not None:
            write_results(args.output, {**about, "rows": rows})
    print(summary.table(summary.summarize(rows, args.base), args.base))
    if args.output is not None:
        print(f"written to {args.output}")


def _folder(args: argparse.Namespace) -> Path | None:
    """Where the sample files are: as told, else beside the results."""
    if args.samples_in is not None:
        return Path(args.samples_in)
    return None if args.output is None else Path(args.output).with_suffix(".samples")


def _each(store: Samples, tasks: list[Task], lengths: list[int]) -> Iterator[tuple[Task, int, list[Sample]]]:
    """All samples by task and length; those that are not there yet are built."""
    from transformers.utils import logging as transformers_logging

    with transformers_logging.tqdm(total=len(tasks) * len(lengths), desc="Samples", unit="file") as bar:
        for task, length in product(tasks, lengths):
            yield task, length, store.of(task, length)
            bar.update()
