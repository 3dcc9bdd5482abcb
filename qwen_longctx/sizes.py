"""Numbers of tokens and of bytes as people write them: 1M, 512K, 24GB, 80GiB. Imports nothing heavy."""

from __future__ import annotations

import numbers
import re
from fractions import Fraction

from qwen_longctx.errors import InvalidType, InvalidValue

MOST_TOKENS = 10**15  # no machine holds more
_MOST_BYTES = 10**18
_TOKENS = {"": 1, "k": 10**3, "m": 10**6, "ki": 1 << 10, "mi": 1 << 20}
_BYTES = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_FORM = re.compile(r"(\d{1,30}(?:\.\d{1,30})?) ?([a-z]*)", re.ASCII)


def parse_tokens(value: str | int) -> int:
    """A number of tokens: 1000000, "1000000", "1M", "512K", "1.5M", "512Ki".

    K and M count thousands and millions, Ki and Mi 1,024 and 1,048,576.

    Raises
    ------
    TypeError, ValueError
        It is no number, no whole number of tokens, below 1, or more than any machine holds.
    """
    return _parse(value, _TOKENS, MOST_TOKENS, "tokens", "a whole number from 1 on, such as 131072, 512K or 1M")


def parse_bytes(value: str | int) -> int:
    """A size of memory: 24000000000, "24GB", "80 GiB", "0.5TB".

    MB, GB and TB count powers of 1,000, MiB, GiB and TiB powers of 1,024. Text needs a unit.

    Raises
    ------
    TypeError, ValueError
        It is no size, below 1 byte, or larger than any memory.
    """
    return _parse(value, _BYTES, _MOST_BYTES, "memory", "a number above 0 with its unit, such as 24GB or 80GiB")


def _parse(value: str | int, units: dict[str, int], most: int, what: str, form: str) -> int:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Integral):
        raise InvalidType(f"{what} must be {form}, got {value!r:.40}")
    if not isinstance(value, str):
        number = Fraction(int(value))
    else:
        found = _FORM.fullmatch(value.strip().lower())
        if found is None or found[2] not in units:
            raise InvalidValue(f"{what} must be {form}, got {value!r:.40}")
        number = Fraction(found[1]) * units[found[2]]
    if what == "memory":
        number = Fraction(int(number))
    if number < 1 or number.denominator != 1:
        raise InvalidValue(f"{what} must be {form}, got {value!r:.40}")
    if number > most:
        raise InvalidValue(f"{what} must be at most {most:,}, got {value!r:.40}")
    return int(number)
