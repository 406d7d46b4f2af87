"""What every config must keep to, wherever it comes from, so that reading one always ends soon."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from drivetrain.errors import ConfigError

MAX_BYTES = 1 << 19
"""Largest config file."""

MAX_DEPTH = 64
"""Objects and lists inside each other."""

MAX_VALUES = 20_000
"""Values of a config, each counted where it stands, so aliases are counted as often as used."""

_MAX_KEY = 200
_MAX_NUMBER = 40
"""Characters of a number; a double needs at most 24."""

_MAX_BITS = 128
"""Bits of an integer; some stand for a limit beyond all memory."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def plain(value: Any, name: str) -> Any:
    """Copy ``value`` into plain dicts and lists that share nothing with it or with each other.

    Args:
        value: what was read, or what a client passes.
        name: what messages call the config.

    Raises:
        ConfigError: it is too large, nested too deeply or in itself, or has keys or values that no
            config can have.
    """
    left = MAX_VALUES

    def copy(item: Any, path: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConfigError(f"{name} has more than {MAX_VALUES} values")
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{name} is nested too deeply: more than {MAX_DEPTH} levels")
        if isinstance(item, Mapping):
            for key in item:
                if problem := _key_problem(key):
                    where = f" in {'.'.join(path)}" if path else ""
                    raise ConfigError(problem + where)
            return {key: copy(inner, (*path, key)) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [copy(inner, (*path, str(index))) for index, inner in enumerate(item)]
        if problem := _value_problem(item):
            raise ConfigError(f"{'.'.join(path) or name}: {problem}")
        return item

    return copy(value, ())


def number_problem(text: str) -> str | None:
    """Why the number that ``text`` writes cannot be used, or ``None``; other words are fine."""
    if text.lstrip("-+") in ("NaN", "Infinity"):
        return f"no JSON number: {text}"
    if not text.lstrip("-+.")[:1].isdecimal():
        return None
    if len(text) > _MAX_NUMBER:
        return f"a number of {len(text)} characters, but no setting needs more than {_MAX_NUMBER}"
    try:
        finite = math.isfinite(float(text))
    except ValueError:
        return None  # a word that begins with a digit
    return None if finite else f"{text} is too large for a number"


def _key_problem(key: Any) -> str | None:
    if not isinstance(key, str):
        return f"config keys are strings, got {key!r}"
    if len(key) > _MAX_KEY:
        return f"config keys have at most {_MAX_KEY} characters, got {key[:20]!r}... of {len(key)}"
    return None if key.isprintable() else f"config keys are printable text, got {key!r}"


def _value_problem(value: Any) -> str | None:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"an integer of {value.bit_length()} bits, but no setting has more than {_MAX_BITS}"
    if isinstance(value, str) and _NO_TEXT.search(value):
        return "the text has a NUL or half of a surrogate pair, which no setting can have"
    return None
