"""What a request may ask for: everything else is refused before work starts, and nothing that matters is ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwen_longctx.errors import InvalidValue, Unsupported
from qwen_longctx.sizes import MOST_TOKENS

# fields that change no answer, and those of transformers' server that it reads itself
_TAKEN = {
    "chat_template_kwargs",
    "frequency_penalty",
    "generation_config",
    "logit_bias",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "parallel_tool_calls",
    "prompt",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tools",
    "top_p",
    "user",
}
_NEUTRAL: dict[str, Any] = {  # values of others that ask for nothing
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "auto",
    "top_logprobs": 0,
}
_ONE_ROW = ("num_beams", "num_return_sequences")


def check(body: Any, chat: bool) -> None:
    """Refuse what cannot be answered, or not as asked.

    Parameters
    ----------
    body : object
        What the client has sent, read from JSON.
    chat : bool
        It holds `messages`; else a `prompt`.

    Raises
    ------
    InvalidValue, Unsupported
    """
    if not isinstance(body, dict):
        raise InvalidValue(f"the body must be a JSON object, got {_kind(body)}")
    for name, value in list(body.items()):
        if value is None:
            del body[name]  # as if it had been left out
        elif name not in _TAKEN and (name not in _NEUTRAL or value != _NEUTRAL[name]):
            raise Unsupported(f"{name}={value!r:.80} is not supported by this server: leave it out")
    for name in ("max_tokens", "max_completion_tokens"):
        _number(body, name, int, lambda n: 1 <= n <= MOST_TOKENS, f"a whole number from 1 to {MOST_TOKENS:,}")
    _number(body, "seed", int, lambda n: -(1 << 63) <= n < 1 << 63, "a whole number of 64 bits")
    _number(body, "temperature", float, lambda x: 0 <= x <= 100, "a number from 0 to 100")
    _number(body, "top_p", float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    _number(body, "frequency_penalty", float, lambda x: -1 < x <= 2, "a number above -1 and at most 2")
    if not isinstance(body.get("stream", False), bool):
        raise InvalidValue(f"stream must be true or false, got {body['stream']!r:.80}")
    stops = stops_of(body)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidValue(f"stop must be a string or a list of strings, none of them empty, got {body['stop']!r:.80}")
    if not isinstance(body.get("generation_config", ""), str):
        raise InvalidValue("generation_config must be a string that holds JSON")
    _check_messages(body.get("messages")) if chat else _check_prompt(body.get("prompt"))


def stops_of(body: dict[str, Any]) -> list[Any]:
    """The stop strings of a request."""
    stop = body.get("stop", [])
    return stop if isinstance(stop, list) else [stop]


def check_generation(config: Any) -> None:
    """Refuse a generation config that makes more rows than one.

    Raises
    ------
    Unsupported
    """
    for name in _ONE_ROW:
        if (getattr(config, name, None) or 1) != 1:
            raise Unsupported(f"{name}={getattr(config, name)} is not supported by this server: leave it out")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidValue(f"messages must be a list of one message or more, got {_kind(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidValue(f"messages[{number}] must be an object with a role and a content, got {message!r:.80}")
        content = message.get("content")
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            continue
        if not isinstance(content, list):
            raise InvalidValue(f"the content of messages[{number}] must be a text or a list, got {content!r:.80}")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise Unsupported(f"messages[{number}] holds {part!r:.80}: this model reads parts of type text only")


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise InvalidValue(f"prompt must be a text, one a request, got {_kind(prompt)}")
    if not prompt:
        raise InvalidValue("prompt must not be empty")


def _number(body: dict[str, Any], name: str, kind: type, fits: Callable[[Any], bool], what: str) -> None:
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or value != value or not fits(value):
        raise InvalidValue(f"{name} must be {what}, got {value!r:.80}")


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else f"{type(value).__name__} {value!r:.60}"
