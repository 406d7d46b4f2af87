"""From logits to tokens, for every request by its own rules and with its own random numbers.

The order is that of Transformers' ``generate``: repetition penalty, repeated n-grams, stop tokens
that may not come yet, what the request's own function changes, temperature, top-k, top-p, min-p,
typical, epsilon and eta truncation, one draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Items

import torch

from drivetrain_inference.alone import highest
from drivetrain_inference.requests import SamplingParams, Sequence, TokenLogprobs


class Sampler:
    """Chooses the next token of each sequence.

    Args:
        stop_tokens: the model's, which ``min_new_tokens`` forbids for a while.
        ends: the first token of every result, and the one that ends those of full length; ``None``
            for one that is chosen as any other.
        barred: tokens that are never chosen.
    """

    def __init__(
        self,
        stop_tokens: frozenset[int] = frozenset(),
        ends: tuple[int | None, int | None] = (None, None),
        barred: frozenset[int] = frozenset(),
    ) -> None:
        self._stop_tokens, self._ends, self._barred = stop_tokens, ends, sorted(barred)

    @torch.no_grad()
    def __call__(
        self, logits: torch.Tensor, sequences: Items[Sequence]
    ) -> list[tuple[int, TokenLogprobs | None]]:
        """Choose one token a row.

        Args:
            logits: [sequences, vocabulary].
            sequences: the sequences that rows belong to.

        Returns:
            Tokens, with log-probabilities for those that asked for them.
        """
        chosen = highest(logits).tolist()
        result: list[tuple[int, TokenLogprobs | None]] = []
        for row, sequence in enumerate(sequences):
            token, params = chosen[row], sequence.params
            if not params.greedy or self._edits(sequence):
                token = self._choose(logits[row].float(), sequence)
            result.append((token, _logprobs(logits[row], token, params)))
        return result

    def edited(self, scores: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """Scores [vocabulary] after penalties and what may not come yet."""
        return self._edited(scores, sequence) if self._edits(sequence) else scores

    def _edits(self, sequence: Sequence) -> bool:
        params = sequence.params
        early = len(sequence.output) < params.min_new_tokens
        changes = params.repetition_penalty != 1 or params.no_repeat_ngram_size > 0
        forced = self._forced(sequence) is not None
        return bool(self._barred) or changes or early or forced or sequence.edit is not None

    def _forced(self, sequence: Sequence) -> int | None:
        """The token that the model's config wants at this place."""
        first, last = self._ends
        if not sequence.output and first is not None:
            return first
        return last if len(sequence.output) == sequence.params.max_new_tokens - 1 else None

    def _choose(self, scores: torch.Tensor, sequence: Sequence) -> int:
        params = sequence.params
        if self._edits(sequence):
            scores = self._edited(scores, sequence)
        if params.greedy:
            return int(torch.argmax(scores))
        scores = warped(scores, params)
        # One uniform number picks a place in the distribution, so a request draws as often as it
        # has tokens, whatever else is in the batch.
        place = _uniform(sequence)
        reached = torch.softmax(scores.double(), dim=0).cumsum(0)
        token = int(torch.searchsorted(reached, place * reached[-1], right=True))
        return min(token, int(torch.isfinite(scores).nonzero()[-1]))

    def _edited(self, scores: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        params, scores = sequence.params, scores.clone()
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(sequence.seen)), device=scores.device)
            old = scores[seen]
            factor = params.repetition_penalty
            scores[seen] = torch.where(old < 0, old * factor, old / factor)
        if params.no_repeat_ngram_size:
            scores[repeating(sequence.seen, params.no_repeat_ngram_size)] = float("-inf")
        if len(sequence.output) < params.min_new_tokens:
            stops = {*params.stop_tokens, *(() if params.ignore_eos else self._stop_tokens)}
            scores[sorted(stops)] = float("-inf")
        if self._barred:
            scores[self._barred] = float("-inf")
        if sequence.edit is not None:
            scores = sequence.edit(sequence.output, scores)
        forced = self._forced(sequence)
        # What a request allows (a grammar) is its promise; the config's token only a habit.
        if forced is not None and (sequence.edit is None or bool(torch.isfinite(scores[forced]))):
            scores = torch.full_like(scores, float("-inf"))
            scores[forced] = 0
        return scores


def warped(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores [vocabulary] after temperature, top-k, top-p and min-p; what is left out is -inf."""
    scores = scores / params.temperature
    hidden = float("-inf")
    if 0 < params.top_k < len(scores):
        lowest = torch.topk(scores, params.top_k).values[-1]
        scores = scores.masked_fill(scores < lowest, hidden)
    if params.top_p < 1:
        ordered, order = torch.sort(scores)
        below = torch.softmax(ordered, dim=0).cumsum(0) <= 1 - params.top_p
        below[-1] = False
        scores = scores.index_fill(0, order[below], hidden)
    if params.min_p > 0:
        shares = torch.softmax(scores, dim=0)
        scores = scores.masked_fill(shares < params.min_p * shares.max(), hidden)
    return truncated(scores, params)


def truncated(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores [vocabulary] after typical, epsilon and eta truncation."""
    hidden = float("-inf")
    if params.typical_p < 1:
        logprobs = torch.log_softmax(scores, dim=0)
        entropy = -(logprobs * logprobs.exp()).nansum()
        far = (-logprobs - entropy).abs()
        ordered, order = torch.sort(far)
        reached = torch.softmax(scores[order], dim=0).cumsum(0)
        last = min(int((reached < params.typical_p).sum()), len(far) - 1)
        gone = ordered > ordered[last]
        gone[0] = False
        scores = scores.index_fill(0, order[gone], hidden)
    if params.epsilon_cutoff > 0:
        gone = torch.softmax(scores, dim=0) < params.epsilon_cutoff
        scores = scores.masked_fill(gone & (scores < scores.max()), hidden)
    if params.eta_cutoff > 0:
        shares = torch.softmax(scores, dim=0)
        entropy = -(shares * torch.log_softmax(scores, dim=0)).nansum()
        least = min(params.eta_cutoff, params.eta_cutoff**0.5 * float(torch.exp(-entropy)))
        scores = scores.masked_fill((shares < least) & (scores < scores.max()), hidden)
    return scores


def repeating(tokens: Items[int], size: int) -> list[int]:
    """Tokens that would make the last ``size`` ones come a second time."""
    begin = list(tokens[len(tokens) - size + 1 :]) if size > 1 else []
    return [
        tokens[end]
        for end in range(size - 1, len(tokens))
        if list(tokens[end - size + 1 : end]) == begin
    ]


def _uniform(sequence: Sequence) -> float:
    """The request's number for this place: a hash of its seed, its result and the place."""
    seed = sequence.request if sequence.params.seed is None else sequence.params.seed
    text = f"{seed}/{sequence.index}/{len(sequence.output)}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _logprobs(logits: torch.Tensor, token: int, params: SamplingParams) -> TokenLogprobs | None:
    if params.logprobs is None and params.best_of is None:
        return None
    logprobs = torch.log_softmax(logits.float(), dim=0)
    values, tokens = torch.topk(logprobs, min(params.logprobs or 0, len(logprobs)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token]), top)
