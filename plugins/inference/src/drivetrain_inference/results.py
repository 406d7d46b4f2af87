"""Results of a request on their way to the client."""

from __future__ import annotations

from dataclasses import dataclass

from drivetrain_inference.requests import Completion, Progress, SamplingParams, Sequence
from drivetrain_inference.text import GrowingText


@dataclass
class Result:
    """What belongs to a sequence.

    Args:
        sequence: its tokens.
        text: the same as text.
    """

    sequence: Sequence
    text: GrowingText

    def completion(self) -> Completion:
        """What the client gets, once it has ended."""
        sequence = self.sequence
        assert sequence.finish_reason is not None
        source = sequence.source or sequence.prompt  # which is filled up where there is a source
        return Completion(
            tuple(sequence.output),
            self.text.text,
            sequence.finish_reason,
            tuple(sequence.logprobs) if sequence.params.logprobs is not None else (),
            min(sequence.cached_tokens, len(source)),
        )


def best_of(results: list[Result], params: SamplingParams) -> list[Progress]:
    """The ``n`` results with the highest log-probability a token, from index 0."""

    def rank(result: Result) -> float:
        return -result.sequence.score / max(1, len(result.sequence.output))

    done = []
    for index, result in enumerate(sorted(results, key=rank)[: params.n]):
        completion, request = result.completion(), result.sequence.request
        done.append(Progress(request, index, None, completion.text, completion))
    return done
