"""Which tokens of which sequences the next forward computes.

Decodes first, and prompts fill the rest of a budget of tokens, in pieces (Dynamic SplitFuse,
arXiv 2401.08671). A sequence for which the cache has no room left makes the newest one give its
blocks back, which is computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from drivetrain_inference.cache.blocks import BlockManager
from drivetrain_inference.requests import Sequence


@dataclass
class Work:
    """One forward.

    Args:
        pieces: sequences with the number of their next tokens to compute.
        copies: (from, to): blocks to copy first.
    """

    pieces: list[tuple[Sequence, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the forward."""
        return sum(count for _, count in self.pieces)


class Scheduler:
    """Keeps the queue of sequences that wait, and those that run.

    Args:
        blocks: the cache's blocks.
        budget: most tokens of a forward.
        most_running: most sequences of a forward.
    """

    def __init__(self, blocks: BlockManager, *, budget: int, most_running: int) -> None:
        self.blocks, self.budget, self.most_running = blocks, budget, most_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let ``child`` run on from where ``parent`` is, or queue it if too many run."""
        if len(self.running) >= self.most_running:
            self.waiting.appendleft(child)
            return False
        child.table = self.blocks.fork(parent.table)
        child.cached_tokens = parent.cached_tokens
        self.running.append(child)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.table)

    def next(self) -> Work:
        """Choose the next forward and make room in the cache for it."""
        work, before = Work(), self.preemptions
        for sequence in list(self.running):
            if sequence.pending == 1:
                self._decode(sequence, work)
        for sequence in list(self.running):
            if sequence.pending > 1 and sequence in self.running:
                self._prefill(sequence, work)
        if self.preemptions == before:  # what just gave way would come back at once
            self._admit(work)
        return work

    def _decode(self, sequence: Sequence, work: Work) -> None:
        if sequence not in self.running or work.tokens >= self.budget:
            return  # it had to give way, or waits for a turn
        while self.blocks.needed(sequence.table, 1) > self.blocks.free:
            scheduled = {id(piece) for piece, _ in work.pieces}
            others = [each for each in self.running if id(each) not in scheduled]
            newest = others[-1]  # at least the sequence itself
            self._preempt(newest)
            if newest is sequence:
                return
        work.copies += self.blocks.extend(sequence.table, 1)
        work.pieces.append((sequence, 1))

    def _prefill(self, sequence: Sequence, work: Work) -> None:
        count = min(sequence.pending, self.budget - work.tokens)
        table = sequence.table
        while count > 0 and self.blocks.needed(table, count) > self.blocks.free:
            count -= 1 + (table.length + count - 1) % self.blocks.size  # a block less
        if count > 0:
            work.copies += self.blocks.extend(table, count)
            work.pieces.append((sequence, count))
        elif not work.pieces and sequence.table.blocks:
            self._preempt(self.running[-1])  # two halves of prompts fill the cache

    def _admit(self, work: Work) -> None:
        while self.waiting and len(self.running) < self.most_running and work.tokens < self.budget:
            sequence = self.waiting[0]
            sequence.table = self.blocks.begin(sequence.tokens)
            # Promised blocks of prompts that are in the middle count as taken.
            promised = sum(self.blocks.needed(each.table, each.pending) for each in self._partial())
            whole = self.blocks.needed(sequence.table, sequence.pending)
            if promised + whole > self.blocks.free:
                self.blocks.release(sequence.table)
                return
            self.waiting.popleft()
            sequence.cached_tokens = max(sequence.cached_tokens, sequence.table.length)
            self.running.append(sequence)
            self._prefill(sequence, work)

    def _partial(self) -> Iterator[Sequence]:
        return (each for each in self.running if each.pending > 1)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
