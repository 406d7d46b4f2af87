"""The sequences of one beam search on their way through the engine."""

from __future__ import annotations

import torch

from drivetrain_inference.cache.blocks import BlockTable
from drivetrain_inference.requests import Sequence
from drivetrain_inference.sampling.beams import BeamSearch
from drivetrain_inference.sampling.sampler import Sampler
from drivetrain_inference.scheduler import Scheduler


class BeamGroup:
    """Waits until the logits of all beams are there, then moves the sequences on.

    A sequence whose logits are here has nothing pending, so the scheduler leaves it alone.

    Args:
        sequences: one a beam; the first has the prompt computed.
        search: chooses.
        sampler: for what edits scores: penalties, and the request's own function.
    """

    def __init__(self, sequences: list[Sequence], search: BeamSearch, sampler: Sampler) -> None:
        self.sequences, self.search, self._sampler = sequences, search, sampler
        self._rows: dict[int, torch.Tensor] = {}

    def take(self, sequence: Sequence, logits: torch.Tensor, scheduler: Scheduler) -> bool:
        """Take one beam's logits [vocabulary]; True if the search is over.

        Blocks of beams that go on are shared, those of others are given back.
        """
        first = not self.search.outputs[0]
        logprobs = torch.log_softmax(logits.float(), dim=0)
        self._rows[sequence.index] = self._sampler.edited(logprobs, sequence)
        if first:  # all beams are alike, and only one may continue
            self._rows = dict.fromkeys(range(len(self.sequences)), self._rows[0])
        if len(self._rows) < len(self.sequences):
            return False
        rows = torch.stack([self._rows[index] for index in range(len(self.sequences))])
        self._rows = {}
        parents = self.search.advance(rows)
        if parents is None:
            return True
        if first:
            for sibling in self.sequences[1:]:
                scheduler.fork(self.sequences[0], sibling)
        self._move(parents, scheduler)
        return False

    def remove(self, scheduler: Scheduler) -> None:
        """Give all blocks back."""
        for sequence in self.sequences:
            if sequence in scheduler:
                scheduler.remove(sequence)

    def _move(self, parents: list[int], scheduler: Scheduler) -> None:
        before = [sequence.table for sequence in self.sequences]
        # One that waits gets its blocks when it is admitted.
        after = [
            scheduler.blocks.fork(before[parent]) if sequence in scheduler.running else BlockTable()
            for sequence, parent in zip(self.sequences, parents, strict=True)
        ]
        for table in before:
            scheduler.blocks.release(table)
        for sequence, table, output in zip(self.sequences, after, self.search.outputs, strict=True):
            sequence.table, sequence.output = table, list(output)
