"""What a prompt has brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class Response:
    """One result, under MII's names.

    Args:
        generated_text: the text, after the prompt if that was asked for.
        prompt_length: tokens of the prompt.
        generated_length: new tokens.
        finish_reason: ``stop`` or ``length``; ``none`` for a part of a stream.
    """

    generated_text: str
    prompt_length: int
    generated_length: int
    finish_reason: str

    def __repr__(self) -> str:
        return self.generated_text

    @property
    def response(self) -> str:
        """The text, under its older name."""
        return self.generated_text


Streaming = Callable[[list[Response]], object]
"""Called with each part of a result, in a list of one."""


def listed(prompts: str | Sequence[str]) -> list[str]:
    """One or several prompts.

    Raises:
        TypeError: there is something else among them.
    """
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    wrong = next((each for each in given if not isinstance(each, str)), None)
    if wrong is not None:
        raise TypeError(f"a prompt must be text, got {type(wrong).__name__}")
    return given
