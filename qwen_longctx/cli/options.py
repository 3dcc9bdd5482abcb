"""Options that several commands share, and the kinds of number they take."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qwen_longctx import sizes
from qwen_longctx.errors import InvalidValue

DTYPES = ("bfloat16", "float16", "float32")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint to load, and how."""
    parser.add_argument("--model", required=True, help="folder or hub name of the checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="dtype of the weights, bfloat16 by default")
    parser.add_argument("--device-map", default="auto", help="device of the weights, or auto to spread them")


def add_lengths(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    """One or more numbers of tokens."""
    parser.add_argument("--lengths", type=at_least_one, nargs="+", required=required, metavar="TOKENS", help=what)


def add_output(parser: argparse.ArgumentParser, what: str = "results file (JSON), written after every row") -> None:
    """The file that a command may write."""
    parser.add_argument("--output", metavar="FILE", help=what)


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def at_least_zero(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    if value > sizes.MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be at most {sizes.MOST_TOKENS:,}, got {text:.40}")
    return value


def tokens(text: str) -> int:
    """A number of tokens, such as 1M."""
    return _size(sizes.parse_tokens, text)


def size_of_memory(text: str) -> int:
    """Bytes, such as 24GB."""
    return _size(sizes.parse_bytes, text)


def _size(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except InvalidValue as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """A number above 0, and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def depth(text: str) -> float:
    """A place in a prompt: 0 is its start, 1 its end."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
