"""Guesses of the next tokens, which one forward of the model then checks (arXiv 2211.17192).

A guess is kept if the model, with the request's own random number of that place, chooses the same
token. So every token is the one that the model would have chosen alone: guesses change how many
come out of a forward, never which.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from copy import copy
from typing import Protocol

from drivetrain_inference.cache.blocks import BlockTable
from drivetrain_inference.ragged import RaggedEngine
from drivetrain_inference.requests import Sequence
from drivetrain_inference.sampling.sampler import Sampler

_Kept = tuple[BlockTable, list[int]]
"""Blocks of a sequence in the smaller model's cache, and the tokens in them."""


class Drafter(Protocol):
    """Guesses what comes next."""

    def draft(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        """At most ``count`` tokens for each sequence that decodes."""

    def forget(self, sequence: Sequence) -> None:
        """Free what is kept for a sequence; one that is not known is no error."""


class PromptLookup:
    """Copies what followed the last tokens when they came before (prompt look-up decoding).

    Args:
        longest: tokens that must agree at most; fewer are tried, down to two.
    """

    def __init__(self, longest: int = 3) -> None:
        self._longest = longest

    def draft(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        """See :class:`Drafter`."""
        return [self._one(sequence.tokens, count) for sequence in sequences]

    def forget(self, sequence: Sequence) -> None:
        """Keep nothing."""

    def _one(self, tokens: list[int], count: int) -> list[int]:
        for length in range(self._longest, 1, -1):
            end = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start] == end[0] and tokens[start : start + length] == end:
                    return tokens[start + length : start + length + count]
        return []


class DraftModel:
    """A smaller model with a cache of its own, which draws with the requests' random numbers.

    Args:
        ragged: the model; its vocabulary is that of the model it guesses for.
        sampler: chooses its tokens.
    """

    def __init__(self, ragged: RaggedEngine, sampler: Sampler) -> None:
        self._ragged, self._sampler = ragged, sampler
        self._known: dict[Sequence, _Kept] = {}

    def draft(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        """See :class:`Drafter`."""
        ahead = [copy(each) for each in sequences]
        for sequence in ahead:  # a request's own function may count its calls, so it is left out
            sequence.output, sequence.edit = list(sequence.output), None
        kept = [self._caught_up(sequence) for sequence in sequences]
        for _ in range(count):
            taking = [
                (*own, guess)
                for own, guess in zip(kept, ahead, strict=True)
                if own is not None and len(guess.tokens) < self._ragged.context
            ]
            if not taking or not self._step(taking):
                break
        return [
            guess.output[len(sequence.output) :]
            for guess, sequence in zip(ahead, sequences, strict=True)
        ]

    def forget(self, sequence: Sequence) -> None:
        """Give the blocks back."""
        kept = self._known.pop(sequence, None)
        if kept is not None:
            self._ragged.blocks.release(kept[0])

    def _caught_up(self, sequence: Sequence) -> _Kept | None:
        """Table and tokens with all but the last computed; ``None`` where there is no room."""
        table, known = self._known.setdefault(sequence, (BlockTable(), []))
        tokens = sequence.tokens
        same = min(table.length, len(tokens) - 1)
        while same and known[same - 1] != tokens[same - 1]:
            same -= 1  # guesses that were wrong are the last ones
        table.length = same
        while table.length < len(tokens) - 1:
            piece = tokens[table.length : -1][: self._ragged.budget]
            if self._ragged.blocks.needed(table, len(piece)) > self._ragged.blocks.free:
                return None
            self._ragged.cache.copy(self._ragged.blocks.extend(table, len(piece)))
            self._ragged.run([(table, piece)])
            table.length += len(piece)
        known[:] = tokens[:-1]
        return table, known

    def _step(self, taking: list[tuple[BlockTable, list[int], Sequence]]) -> bool:
        """One more token of each; False if the cache is full."""
        blocks, pieces = self._ragged.blocks, list[tuple[BlockTable, list[int]]]()
        if sum(blocks.needed(table, 1) for table, _, _ in taking) > blocks.free:
            return False
        for table, _, guess in taking:
            self._ragged.cache.copy(blocks.extend(table, 1))
            pieces.append((table, guess.tokens[-1:]))
        chosen = self._sampler(self._ragged.run(pieces), [guess for _, _, guess in taking])
        for (table, known, guess), (token, _) in zip(taking, chosen, strict=True):
            known.append(guess.tokens[-1])
            table.length += 1
            guess.output.append(token)
        return True
