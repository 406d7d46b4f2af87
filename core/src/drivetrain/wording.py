"""Phrases that several messages share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_LONGEST_WORD = 100
"""Longer words get no suggestion: comparing takes time that grows with the square of the length."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or nothing."""
    if len(word) > _LONGEST_WORD:
        return ""
    by_fold = {name.lower().replace("-", "_"): name for name in known}
    close = get_close_matches(word.lower().replace("-", "_"), by_fold, n=1, cutoff=0.6)
    return f"; did you mean {by_fold[close[0]]!r}?" if close else ""


def as_json(value: Any) -> str:
    """A value as the user wrote it in a config, shortened, in printable characters."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def printable(text: str, keep: str = "") -> str:
    """``text`` with an escape in place of each character that a terminal would act upon.

    Args:
        text: any text, perhaps from a file of somebody else.
        keep: control characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
