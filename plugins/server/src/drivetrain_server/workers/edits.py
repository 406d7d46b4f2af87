"""What changes scores before a token is chosen: penalties, biases, and grammars.

Penalties are those of the protocol: a token that is there ``c`` times loses ``presence`` once and
``frequency`` ``c`` times; its bias is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Edit = Callable[[Sequence[int], torch.Tensor], torch.Tensor]


class Penalties:
    """Presence and frequency penalties of one result, and biases of tokens."""

    def __init__(self, presence: float, frequency: float, bias: Mapping[int, float]) -> None:
        self._presence, self._frequency = presence, frequency
        self._bias = dict(bias)

    def __call__(self, output: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        counts = Counter(output) if self._presence or self._frequency else {}
        for tokens, values in (
            (list(counts), [-self._presence - self._frequency * n for n in counts.values()]),
            (list(self._bias), list(self._bias.values())),
        ):
            if tokens:
                places = torch.tensor(tokens, device=scores.device)
                scores[places] += torch.tensor(values, device=scores.device, dtype=scores.dtype)
        return scores


class Guide:
    """Lets through only tokens with which a text can still become what a grammar describes.

    Args:
        matcher: at the beginning of a text.
        size: tokens that the grammar's tokenizer knows.

    Attributes:
        failed: why the grammar cannot go on, or the empty string; the result is worthless then.
    """

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher, self._seen = matcher, list[int]()
        self._mask = np.zeros(-(-size // 32) * 4, dtype=np.uint8)
        self.failed = ""

    def __call__(self, output: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        tokens = list(output)
        if tokens[: len(self._seen)] != self._seen:  # some were taken back
            self._matcher.reset()
            self._seen = []
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(tokens[len(self._seen) :])
        self._seen = tokens
        if self._matcher.is_error():
            self.failed = self.failed or self._matcher.get_error().split("\n")[0]
            return scores
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            self.failed = self._matcher.get_error().split("\n")[0]
            return scores
        allowed = np.unpackbits(self._mask, bitorder="little")[: len(scores)]
        hidden = torch.full_like(scores, float("-inf"))
        places = torch.from_numpy(allowed.nonzero()[0]).to(scores.device)
        hidden[places] = scores[places]
        return hidden


class Both:
    """One edit after another."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    def __call__(self, output: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        for edit in self._edits:
            scores = edit(output, scores)
        return scores


class Grammars:
    """Makes guides for one tokenizer.

    Args:
        tokenizer: of Transformers, a fast one.

    Raises:
        ConfigError: the tokenizer cannot be used so.
    """

    def __init__(self, tokenizer: Any) -> None:
        from llguidance.hf import from_tokenizer

        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ConfigError("structured output needs a tokenizer with an end token")
        try:
            self._tokenizer = from_tokenizer(tokenizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"structured output cannot use the tokenizer of this model: {error}"
            ) from error

    def maker(self, kind: str, value: Any) -> Callable[[], Guide]:
        """Guides for a ``schema`` (JSON schema) or a ``regex``.

        Raises:
            ConfigError: it is none, uses what is not supported, or cannot be met by any text.
        """
        from llguidance import LLMatcher

        try:
            if kind == "regex":
                grammar = LLMatcher.grammar_from_regex(value)
            else:
                grammar = LLMatcher.grammar_from_json_schema(value)
        except ValueError as error:
            raise ConfigError(f"the {kind} is not one: {error}") from error
        first = LLMatcher(self._tokenizer, grammar, log_level=0)
        if first.is_error():
            reason = first.get_error().split("\n")[0]
            raise ConfigError(f"no text can be held to the {kind}: {reason}")
        return lambda: Guide(first.deep_copy(), self._tokenizer.vocab_size)
