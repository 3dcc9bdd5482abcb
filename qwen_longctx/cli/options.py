"""Options that several commands share, and the kinds of number they take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from qwen_longctx import sizes
from qwen_longctx.config import KERNELS, KV_CACHES, LINEAR
from qwen_longctx.errors import InvalidValue

DTYPES = ("bfloat16", "float16", "float32")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint to load, and how."""
    parser.add_argument("--model", required=True, help="folder or hub name of the checkpoint")
    add_placement(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """How to load a checkpoint."""
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="dtype of the weights, bfloat16 by default")
    parser.add_argument("--device-map", default="auto", help="device of the weights, or auto to spread them")


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Settings of the patch, an option each; what is left out comes from the checkpoint, then from the defaults."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **_SETTINGS[name])


def settings_given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that were given, as keywords of `patch_qwen`."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


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


def switch(text: str) -> bool:
    """On or off."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text!r}")
    return text == "on"


def temperature(text: str) -> bool | str:
    """What length the attention temperature counts: position, prompt (True in Python) or off (False)."""
    known: dict[str, bool | str] = {"position": "position", "prompt": True, "off": False}
    if text not in known:
        raise argparse.ArgumentTypeError(f"must be position, prompt or off, got {text!r}")
    return known[text]


_SETTINGS: dict[str, dict[str, Any]] = {
    "chunk_size": {"type": at_least_one, "metavar": "TOKENS", "help": "the largest relative position"},
    "local_size": {"type": at_least_one, "metavar": "TOKENS", "help": "distances up to it are exact across chunks"},
    "original_max_position_embeddings": {"type": at_least_one, "metavar": "TOKENS", "help": "the trained length"},
    "attention_temperature": {
        "type": temperature,
        "metavar": "{position,prompt,off}",
        "help": "what length the attention temperature counts",
    },
    "prefill_chunk_size": {"type": at_least_one, "metavar": "TOKENS", "help": "tokens of a prefill chunk"},
    "mlp_chunk_size": {"type": at_least_one, "metavar": "TOKENS", "help": "tokens of a slice of an MLP"},
    "linear": {"choices": LINEAR, "help": "fp8: linear layers in 8 bits"},
    "kv_cache": {
        "choices": ("auto", *KV_CACHES),
        "help": "int8 or fp8: keys and values in 8 bits; host: in its memory; auto: the first that fits",
    },
    "sparse": {"metavar": "RULE", "help": "rule of sparse prefill, or off"},
    "sparse_attention_threshold": {"type": at_least_one, "metavar": "TOKENS", "help": "longer prompts are sparse"},
    "fidelity": {"metavar": "{fast,balanced,careful}", "help": "how much of the attention sparse prefill keeps"},
    "block_size": {"type": at_least_one, "metavar": "TOKENS", "help": "tokens of a block of keys"},
    "sparse_decode": {"type": share, "metavar": "SHARE", "help": "share of the keys that a new token attends to"},
    "sparse_decode_threshold": {"type": at_least_one, "metavar": "TOKENS", "help": "longer sequences decode sparsely"},
    "kernel": {"choices": KERNELS, "help": "attention kernel"},
    "cuda_graphs": {"type": switch, "metavar": "{on,off}", "help": "repeat the forward of a token as a CUDA graph"},
}
