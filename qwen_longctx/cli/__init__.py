"""The command ``qwen-longctx``: a file a command, each with `add_arguments` and `run`.

What is heavy (torch, transformers, most of this package) is imported inside `run`, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_longctx.cli import bench, calibrate, demo, doctor, passkey, plan, plot, quality, serve, train
from qwen_longctx.cli import eval as evaluation
from qwen_longctx.errors import Refused

__all__ = ["BUNDLED", "main"]

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "tiny-qwen2"
_COMMANDS = (demo, passkey, quality, evaluation, plot, calibrate, train, bench, plan, doctor, serve)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        The exit status: 0, 2 for a request that was refused in one line, 130 if interrupted. Any other error is a
        defect and keeps its traceback.
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a file's name
    try:
        args.run(args)
        sys.stdout.flush()
    except Refused as error:
        print(f"qwen-longctx {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qwen-longctx {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen-longctx", description="Long context for Qwen checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
