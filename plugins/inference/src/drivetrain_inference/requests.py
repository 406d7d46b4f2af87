"""What a client asks for, what it gets, and a sequence on its way between the two."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from drivetrain.contracts import Completion, Progress, TokenLogprobs
from drivetrain.contracts.loop.inference import FinishReason
from drivetrain.errors import ConfigError
from drivetrain_inference.cache.blocks import BlockTable
from drivetrain_inference.cache.host import Away

if TYPE_CHECKING:
    import torch

    from drivetrain_inference.adapters.adapter import Adapter

Edit = Callable[[Items[int], "torch.Tensor"], "torch.Tensor"]
"""Changes the scores [vocabulary] of the token that follows those of a result."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; names and defaults are those of Transformers' ``generate``.

    Args:
        max_new_tokens: most tokens of a result.
        min_new_tokens: before so many, no stop token is chosen.
        temperature: 0 chooses the most likely token.
        top_k: choose among the k most likely; 0 for all.
        top_p: choose among the most likely tokens whose probabilities add up to this.
        min_p: leave out tokens less likely than this share of the most likely one.
        repetition_penalty: divides (or multiplies) logits of tokens that are there already
            (arXiv 1909.05858).
        typical_p: choose among tokens whose information is nearest to the expected one, of this
            probability together (locally typical sampling, arXiv 2202.00666).
        epsilon_cutoff: leave out tokens less likely than this (truncation sampling, arXiv
            2210.15191).
        eta_cutoff: the same, lower where the distribution is flat.
        no_repeat_ngram_size: no so many tokens come a second time; 0 for no limit.
        stop: text, or texts, that end a result, which does not contain them; need a tokenizer.
        stop_tokens: tokens that end it, beside the model's.
        ignore_eos: do not stop at the model's own tokens.
        seed: of this request's random numbers; ``None``: taken from its number.
        n: results for one prompt.
        best_of: so many results are made, of which the ``n`` with the highest log-probability a
            token are returned, at the end.
        num_beams: beam search with so many beams, of which the best ``n`` are returned, at the end.
        length_penalty: exponent of the length that a beam's log-probability is divided by.
        early_stopping: end beam search with the first ``num_beams`` results (``True``), when better
            ones are unlikely (``False``), or impossible (``"never"``).
        logprobs: log-probabilities of so many most likely tokens, beside the chosen one's; ``None``
            for none at all. Those of the model, before temperature and the rest.
        edit: called for each result, it returns what is called before each of its tokens with the
            tokens so far and the scores [vocabulary], and returns the scores to use instead. It
            comes after penalties; what it sets to -inf is never chosen.
        adapter: name of an adapter that the engine has loaded; empty: the model as it is.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    no_repeat_ngram_size: int = 0
    stop: str | tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None
    edit: Callable[[], Edit] | None = None
    adapter: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "positive"),
            ("typical_p", 0 < self.typical_p <= 1, "in (0, 1]"),
            ("epsilon_cutoff", 0 <= self.epsilon_cutoff < 1, "in [0, 1)"),
            ("eta_cutoff", 0 <= self.eta_cutoff < 1, "in [0, 1)"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 or more"),
            ("best_of", self.n <= (self.best_of or self.n) <= 1024, "None or in [n, 1024]"),
            ("num_beams", 1 <= self.num_beams <= 64, "in [1, 64]"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("early_stopping", self.early_stopping in (False, True, "never"), "a bool or 'never'"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "None or in [0, 2**63)"),
            ("n", 1 <= self.n <= 1024, "in [1, 1024]"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 1024, "in [0, 1024]"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {expected}")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        for name, good in (
            ("temperature above 0", self.temperature == 0),
            ("n above num_beams", self.n <= self.num_beams),
            ("best_of", self.best_of is None),
            ("logprobs", self.logprobs is None),
            ("stop", not self.stop),
            ("edit", self.edit is None),
        ):
            if not good:
                raise ConfigError(f"num_beams is {self.num_beams}, and beam search has no {name}")

    @property
    def results(self) -> int:
        """Sequences that are computed."""
        return max(self.num_beams, self.best_of or self.n)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1


@dataclass(eq=False)
class Sequence:
    """One result that is being made.

    Args:
        request: number of the request.
        index: which of its results.
        prompt: tokens.
        params: how to sample.
        deadline: on the clock of ``time.monotonic``, or ``None``.
        adapter: with which it is computed; ``None``: the model as it is.
        source: what an encoder reads; the prompt is then as :func:`laid` makes it.
        siblings: sequences that begin when the prompt has been computed.
        beams: the sequences of its beam search, itself among them.
        away: where its blocks lie in host memory, if they do.
        draft: tokens that may follow; the next forward checks them.
        score: sum of log-probabilities, where results are ranked.
    """

    request: int
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    deadline: float | None = None
    adapter: Adapter | None = None
    source: tuple[int, ...] = ()
    table: BlockTable = field(default_factory=BlockTable)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    siblings: list[Sequence] = field(default_factory=list)
    beams: Items[Sequence] = ()
    away: Away | None = None
    draft: list[int] = field(default_factory=list)
    score: float = 0.0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    edit: Edit | None = field(init=False)

    def __post_init__(self) -> None:
        self.edit = None if self.params.edit is None else self.params.edit()

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return [*self.prompt, *self.output]

    @property
    def seen(self) -> list[int]:
        """Prompt and output, as far as the decoder sees them."""
        return self.tokens[len(self.prompt) - 1 :] if self.source else self.tokens

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet; 1 while it decodes."""
        return len(self.prompt) + len(self.output) - self.table.length

    def overdue(self) -> bool:
        """Whether its deadline is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def slice(self, count: int) -> Items[int]:
        """The next ``count`` pending tokens."""
        start = self.table.length
        if start >= len(self.prompt):
            return self.output[start - len(self.prompt) : start - len(self.prompt) + count]
        return self.tokens[start : start + count]


def laid(
    tokens: tuple[int, ...], start: int | None, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt of a sequence in blocks of ``size``, and what an encoder reads of it.

    Where decoders begin with ``start``, that is all of ``tokens``, filled up to whole blocks.
    """
    if start is None:
        return tokens, ()
    return (*tokens, *[0] * (-len(tokens) % size), start), tokens


def longest(context: int, start: int | None, size: int) -> int:
    """Most tokens of a sequence: a source and what is written for it have a ``context`` each."""
    return context if start is None else 2 * context + size


__all__ = [
    "Completion",
    "FinishReason",
    "Progress",
    "SamplingParams",
    "Sequence",
    "TokenLogprobs",
    "laid",
    "longest",
]
