"""What an engine that generates is asked for, and what it offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


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


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place.

    Args:
        chosen: of the token that was chosen.
        top: (token, log-probability) of the most likely ones, the first is the most likely.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One result.

    Args:
        tokens: what was generated, with the token that ended it.
        text: the same as text without what ended it; empty without a tokenizer.
        finish_reason: ``stop``, ``length``, ``cancelled`` or ``deadline``.
        logprobs: one entry for each token, if asked for.
        cached_tokens: tokens of the prompt that were in the cache already.
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True)
class Progress:
    """What one step has added to one result.

    Args:
        request: number of the request.
        index: which of its ``n`` results.
        token: the new token, or ``None`` if the result ended without one.
        text: new text; what might begin a stop text is held back.
        completion: the whole result, once it has ended.
        logprobs: of the token, if asked for.
    """

    request: int
    index: int
    token: int | None
    text: str
    completion: Completion | None = None
    logprobs: TokenLogprobs | None = None


class Serves(Generates, Protocol):
    """An engine that generates for many requests at once, step by step; for servers.

    A server gets one from an entry of the group ``drivetrain.engines``, a function of the path of a
    model, a config with the engine's section or ``None``, and the keywords ``dtype`` and
    ``weights``. One thread at a time may use it. It may have ``adapters`` (:class:`Adapts`).
    """

    tokenizer: Any
    context: int

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""

    def sampling(self, **options: Any) -> Any:
        """How to sample, under the names of Transformers' ``generate``, for :meth:`add`.

        Beside those: ``stop`` (texts), ``stop_tokens``, ``ignore_eos``, ``seed``, ``n``,
        ``logprobs``, and ``edit``: called for each result, it returns what is called before each of
        its tokens with the tokens so far and scores [vocabulary], and returns the scores to use.

        Raises:
            ConfigError: a name is not known, or a value is wrong.
        """

    def add(self, prompt: Any, params: Any = None, *, timeout: float | None = None) -> int:
        """Queue a request (text, or tokens) that ends after ``timeout`` seconds; return its number.

        Raises:
            ConfigError: it cannot be served.
        """

    def cancel(self, request: int) -> Sequence[Progress]:
        """End a request; one that is over already is no error."""

    def step(self) -> Sequence[Progress]:
        """Compute one forward and return what it has added."""

    def status(self) -> Mapping[str, float]:
        """What it is doing.

        Sequences (``running``, ``waiting``), tokens that the cache has room for (``cache_tokens``),
        the share of it in use (``cache_used``), and how often one made room (``preemptions``).
        """


class Adapts(Protocol):
    """Adapters of an engine that serves; ``sampling`` has a name ``adapter`` to choose one."""

    def load(self, name: str, path: Any) -> None:
        """Load one from a folder, or load it again; requests that run keep what they began with.

        Raises:
            ConfigError: it cannot be served.
        """

    def unload(self, name: str) -> None:
        """Forget one.

        Raises:
            ConfigError: there is none of that name.
        """


class Embeds(Protocol):
    """An engine that makes vectors of texts; the group ``drivetrain.engines`` may answer with one.

    One thread at a time may use it.
    """

    tokenizer: Any
    context: int

    def tokens(self, prompt: Any) -> list[int]:
        """The tokens of a text, or of a list of tokens.

        Raises:
            ConfigError: it cannot be taken.
        """

    def embed(self, prompts: Sequence[Any]) -> torch.Tensor:
        """One vector for each text or list of tokens: fp32 [texts, dimensions] on the host.

        Raises:
            ConfigError: one of them cannot be taken, or the model has no vectors.
        """

    def close(self) -> None:
        """Give its memory back."""
