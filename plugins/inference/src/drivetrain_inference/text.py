"""From tokens to text while it grows, and texts that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_TAIL = 8
"""Tokens that are decoded again with each new one, as a token's text may depend on those before."""


class GrowingText:
    """Text of one result.

    Args:
        tokenizer: with ``decode``; ``None`` makes no text.
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._settled, self._shown = 0, 0
        self._longest = max(map(len, self._stop), default=0)
        self.text = ""

    def add(self, token: int) -> bool:
        """Add a token; True if a stop text is complete, which is cut off."""
        if self._tokenizer is None:
            return False
        self._tokens.append(token)
        start = max(0, self._settled - _TAIL)
        before = self._decode(self._tokens[start : self._settled])
        after = self._decode(self._tokens[start:])
        if after.endswith(_UNFINISHED):
            return False  # the rest of a character may come yet
        old = len(self.text)
        self.text += after[len(before) :]
        self._settled = len(self._tokens)
        places = [self.text.find(each, max(0, old - self._longest)) for each in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def finish(self) -> None:
        """Take in what looked unfinished."""
        if self._tokenizer is not None and self._settled < len(self._tokens):
            start = max(0, self._settled - _TAIL)
            before = self._decode(self._tokens[start : self._settled])
            self.text += self._decode(self._tokens[start:])[len(before) :]
            self._settled = len(self._tokens)

    def take(self, *, last: bool = False) -> str:
        """What is new and can no longer become the beginning of a stop text."""
        end = len(self.text)
        if not last:
            held = range(min(self._longest - 1, end - self._shown), 0, -1)
            starts = (
                n for n in held if any(s.startswith(self.text[end - n :]) for s in self._stop)
            )
            end -= next(starts, 0)
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new

    def _decode(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
