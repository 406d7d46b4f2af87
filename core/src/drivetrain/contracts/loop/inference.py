"""What an engine that generates is asked for, and what it offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class InferenceRequest:
    """What whoever wants to generate knows beside the module and the config.

    Args:
        tokenizer: turns text into tokens and back, as those of Transformers do; ``None``: prompts
            and results are tokens.
        stop_tokens: tokens that end a text, beside those that the module's config names.
        context: most tokens of a sequence; ``None``: what the module's config says.
    """

    tokenizer: Any | None = None
    stop_tokens: tuple[int, ...] = ()
    context: int | None = None


class Generates(Protocol):
    """An engine that generates; what else it offers is the business of its package."""

    def generate(self, prompts: Sequence[Any], *arguments: Any, **options: Any) -> Sequence[Any]:
        """Continue every prompt (text, or tokens); one result for each, in their order."""

    def close(self) -> None:
        """Give the memory back that it took for itself; the module stays as it is."""
