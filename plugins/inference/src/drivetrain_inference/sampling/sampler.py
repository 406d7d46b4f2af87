"""From logits to tokens, for every request by its own rules and with its own random numbers.

The order is that of Transformers' ``generate``: repetition penalty, stop tokens that may not come
yet, what the request's own function changes, temperature, top-k, top-p, min-p, one draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Items

import torch

from drivetrain_inference.requests import SamplingParams, Sequence, TokenLogprobs


class Sampler:
    """Chooses the next token of each sequence.

    Args:
        stop_tokens: the model's, which ``min_new_tokens`` forbids for a while.
    """

    def __init__(self, stop_tokens: frozenset[int] = frozenset()) -> None:
        self._stop_tokens = stop_tokens

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
        chosen = torch.argmax(logits, dim=1).tolist()
        result: list[tuple[int, TokenLogprobs | None]] = []
        for row, sequence in enumerate(sequences):
            token, params = chosen[row], sequence.params
            if not params.greedy or self._edits(sequence):
                token = self._choose(logits[row].float(), sequence)
            result.append((token, _logprobs(logits[row], token, params)))
        return result

    def _edits(self, sequence: Sequence) -> bool:
        params = sequence.params
        early = len(sequence.output) < params.min_new_tokens
        return params.repetition_penalty != 1 or early or sequence.edit is not None

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
            seen = torch.tensor(sorted(set(sequence.tokens)), device=scores.device)
            old = scores[seen]
            factor = params.repetition_penalty
            scores[seen] = torch.where(old < 0, old * factor, old / factor)
        if len(sequence.output) < params.min_new_tokens:
            stops = {*params.stop_tokens, *(() if params.ignore_eos else self._stop_tokens)}
            scores[sorted(stops)] = float("-inf")
        if sequence.edit is not None:
            scores = sequence.edit(sequence.output, scores)
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
    return scores


def _uniform(sequence: Sequence) -> float:
    """The request's number for this place: a hash of its seed, its result and the place."""
    seed = sequence.request if sequence.params.seed is None else sequence.params.seed
    text = f"{seed}/{sequence.index}/{len(sequence.output)}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _logprobs(logits: torch.Tensor, token: int, params: SamplingParams) -> TokenLogprobs | None:
    if params.logprobs is None:
        return None
    logprobs = torch.log_softmax(logits.float(), dim=0)
    values, tokens = torch.topk(logprobs, min(params.logprobs, len(logprobs)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token]), top)
