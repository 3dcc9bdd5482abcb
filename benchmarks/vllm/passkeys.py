"""Ask a server of the OpenAI API for passkeys hidden in long prompts.

    pip install openai
    python benchmarks/vllm/passkeys.py --url http://localhost:8000/v1 --tokenizer Qwen/Qwen2.5-7B-Instruct-1M \\
        --lengths 262144 1000000 --output passkeys.json

Any server will do: vLLM with the plugin, or another. The tokenizer makes prompts of the length that is asked for, which
a chat template makes a few tokens longer. Answers are streamed, so that the time to the first token is known. The
hardware in the results file is that of this client.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen_longctx.cli.options import add_lengths, add_output, at_least_one, depth
from qwen_longctx.errors import Refused

NEW_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """What came back to one prompt. `first_token_seconds` is None where nothing came."""

    length: int
    depth: float
    key: str
    answer: str
    correct: bool
    first_token_seconds: float | None
    seconds: float


def ask(client: Any, model: str, text: str, *, chat: bool) -> tuple[str, float | None, float]:
    """The answer to one prompt, and the seconds to its first piece and to its end.

    Parameters
    ----------
    client : openai.OpenAI
    model : str
        As the server calls it.
    text : str
    chat : bool
        As a message of a chat; else as the beginning of a text.
    """
    options = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    begin = time.perf_counter()
    first, pieces = None, []
    if chat:
        stream = client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
    else:
        stream = client.completions.create(prompt=text, **options)
    for event in stream:
        if not event.choices:
            continue
        choice = event.choices[0]
        piece = choice.delta.content if chat else choice.text
        if piece:
            first = first or time.perf_counter() - begin
            pieces.append(piece)
    return "".join(pieces), first, time.perf_counter() - begin


def answers(
    client: Any,
    model: str,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    chat: bool,
    seed: int = 0,
) -> Iterator[Answer]:
    """Ask for a key at every length and depth, one after another, the shortest first."""
    from qwen_longctx.evaluation import passkey

    source = random.Random(seed)
    for length in sorted(lengths):
        for place in depths:
            key = passkey.random_key(source)
            ids = passkey.prompt(tokenizer, length, place, key)[0]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            answer, first, seconds = ask(client, model, text, chat=chat)
            first = None if first is None else round(first, 3)
            yield Answer(length, place, key, answer, passkey.is_correct(answer, key), first, round(seconds, 3))


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, print a line for each prompt, and write the results after each."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the API, the version included")
    parser.add_argument("--model", help="as the server calls it; its first if left out")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of the checkpoint")
    parser.add_argument("--api-key", default="none", help="if the server wants one")
    parser.add_argument("--api", choices=["chat", "completions"], default="chat", help="chat by default")
    add_lengths(parser, "tokens of the prompts")
    parser.add_argument("--depths", type=depth, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the keys")
    parser.add_argument("--timeout", type=at_least_one, default=3600, metavar="SECONDS", help="for one answer")
    add_output(parser)
    options = parser.parse_args(arguments)

    from openai import OpenAIError

    try:
        run(options)
    except Refused as error:
        parser.exit(1, f"{error}\n")
    except OpenAIError as error:
        parser.exit(1, f"{options.url} does not answer: {error}\n")


def run(options: argparse.Namespace) -> None:
    """Ask as the command line says."""
    from openai import OpenAI

    from qwen_longctx.cli.checkpoint import load_tokenizer
    from qwen_longctx.evaluation.environment import write_results
    from qwen_longctx.files import check_writable

    if options.output is not None:
        check_writable(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    client = OpenAI(base_url=options.url, api_key=options.api_key, timeout=options.timeout, max_retries=0)
    model = options.model or client.models.list().data[0].id
    done: list[Answer] = []
    chat = options.api == "chat"
    for one in answers(client, model, tokenizer, options.lengths, options.depths, chat=chat, seed=options.seed):
        done.append(one)
        outcome = "found" if one.correct else f"not found in {one.answer!r}"
        print(f"{one.length:>10,} tokens, depth {one.depth:.2f}: {outcome}, {one.seconds:.2f} s", flush=True)
        if options.output is not None:
            rows = [asdict(row) for row in done]
            write_results(options.output, {"model": model, "api": options.api, "records": rows})
    print(f"{sum(one.correct for one in done)} of {len(done)} keys found")


if __name__ == "__main__":
    main()
