"""Beam search as Transformers' ``generate`` does it: one search, apart from who computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drivetrain_inference.requests import SamplingParams

_HOPELESS = -1.0e9
"""Score of what must not be chosen; that of Transformers, as it is added, not compared."""


@dataclass(frozen=True)
class Beam:
    """One result.

    Args:
        score: sum of log-probabilities over ``length ** length_penalty``.
        output: its tokens.
        ended: whether it came to an end, rather than never having been reached.
    """

    score: float
    output: list[int]
    ended: bool


class BeamSearch:
    """The search of one request.

    Args:
        width: number of beams.
        stops: tokens that end a beam.
        most: most tokens of a result.
        length_penalty: exponent of the length that sums of log-probabilities are divided by.
        early_stopping: ``True`` ends the search with the first ``width`` results; ``False`` when
            none of the running beams is likely to become better; ``None`` ("never" in Transformers)
            when none can.
    """

    def __init__(
        self,
        width: int,
        stops: frozenset[int],
        most: int,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | None = False,
    ) -> None:
        self.width, self._stops, self._most = width, stops, most
        self._penalty, self._early = length_penalty, early_stopping
        self.outputs: list[list[int]] = [[] for _ in range(width)]
        # At first all beams are alike, and only one may continue.
        self._scores = torch.tensor([0.0] + [_HOPELESS] * (width - 1))
        self._best = [Beam(_HOPELESS, [], False)] * width
        self._improves = True

    @classmethod
    def of(cls, params: SamplingParams, stops: frozenset[int]) -> BeamSearch:
        """The search that a request asks for."""
        return cls(
            params.num_beams,
            stops,
            params.max_new_tokens,
            length_penalty=params.length_penalty,
            early_stopping=None if params.early_stopping == "never" else params.early_stopping,
        )

    @property
    def results(self) -> list[Beam]:
        """The best, in order."""
        return [each for each in self._best if each.ended]

    def advance(self, logprobs: torch.Tensor) -> list[int] | None:
        """Choose the next token of all beams.

        Args:
            logprobs: [width, vocabulary], float32, of each beam's next token.

        Returns:
            For each beam, the beam that it continues, whose tokens are in ``outputs`` with the new
            one; ``None`` if the search is over.
        """
        vocabulary = logprobs.shape[1]
        keep = min(max(2, 1 + len(self._stops)) * self.width, self.width * vocabulary)
        total = (logprobs + self._scores[:, None]).reshape(-1)
        scores, places = torch.topk(total, keep)
        parents, tokens = (places // vocabulary).tolist(), (places % vocabulary).tolist()
        outputs = [
            [*self.outputs[parent], token] for parent, token in zip(parents, tokens, strict=True)
        ]
        length = len(outputs[0])
        ends = torch.tensor([token in self._stops or length >= self._most for token in tokens])
        self._collect(scores, outputs, ends, length)
        running, chosen = torch.topk(scores + ends.float() * _HOPELESS, self.width)
        self._scores = running
        order: list[int] = chosen.tolist()
        self.outputs = [outputs[place] for place in order]
        self._improves = self._improves and self._may_improve(length)
        over = self._early is True and all(each.ended for each in self._best)
        if over or not self._improves or bool(ends.all()):
            return None
        return [parents[place] for place in order]

    def _collect(
        self, scores: torch.Tensor, outputs: list[list[int]], ends: torch.Tensor, length: int
    ) -> None:
        """Take ended beams that are better than the results so far."""
        final = scores / length**self._penalty
        full = self._early is True and all(each.ended for each in self._best)
        final = final + (full + (not self._improves)) * _HOPELESS
        ended = ends.clone()
        ended[self.width :] = False  # only the best candidates may become results
        final = final + (~ended).float() * _HOPELESS
        merged = torch.cat([torch.tensor([each.score for each in self._best]), final])
        candidates = [
            *self._best,
            *(Beam(float(s), o, bool(e)) for s, o, e in zip(final, outputs, ended, strict=True)),
        ]
        self._best = [candidates[place] for place in torch.topk(merged, self.width)[1].tolist()]

    def _may_improve(self, length: int) -> bool:
        longest = self._most if self._early is None and self._penalty > 0 else length
        possible = float(self._scores[0]) / longest**self._penalty
        worst = min(each.score for each in self._best)
        return any(possible > (worst if each.ended else _HOPELESS) for each in self._best)
