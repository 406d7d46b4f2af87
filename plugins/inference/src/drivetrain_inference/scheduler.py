"""Which tokens of which sequences the next forward computes.

Decodes first, and prompts fill the rest of a budget of tokens, in pieces (Dynamic SplitFuse,
arXiv 2401.08671). A sequence for which the cache has no room left makes the newest one give its
blocks back; what was in them is kept in host memory, or computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from drivetrain_inference.cache.blocks import BlockManager
from drivetrain_inference.cache.host import Away, HostBlocks
from drivetrain_inference.requests import Sequence


@dataclass
class Work:
    """One forward.

    Args:
        pieces: sequences with the number of their next tokens to compute.
        copies: (from, to): blocks to copy first.
        returns: what to copy back from host memory into which blocks, after that.
        tokens: of the forward.
    """

    pieces: list[tuple[Sequence, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    returns: list[tuple[Away, list[int]]] = field(default_factory=list)
    tokens: int = 0

    def take(self, sequence: Sequence, count: int) -> None:
        """Add the next ``count`` tokens of a sequence."""
        self.pieces.append((sequence, count))
        self.tokens += count


class Scheduler:
    """Keeps the queue of sequences that wait, and those that run.

    Args:
        blocks: the cache's blocks.
        budget: most tokens of a forward.
        most_running: most sequences of a forward.
        host: where blocks of sequences that give way are kept; ``None``: nowhere.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        budget: int,
        most_running: int,
        host: HostBlocks | None = None,
    ) -> None:
        self.host, self.swaps = host, 0
        self.blocks, self.budget, self.most_running = blocks, budget, most_running
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in the order in which they began
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
        self.running[child] = None
        return True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give its blocks back."""
        if sequence in self.running:
            del self.running[sequence]
        else:
            self.waiting.remove(sequence)
            if self.host is not None and sequence.away is not None:
                self.host.drop(sequence.away)
                sequence.away = None
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
        if not work.pieces and self.waiting and self.running and self.preemptions == before:
            self._break_stall()
        return work

    def _decode(self, sequence: Sequence, work: Work) -> None:
        if sequence not in self.running or work.tokens >= self.budget:
            return  # it had to give way, or waits for a turn
        while self.blocks.needed(sequence.table, 1) > self.blocks.free:
            scheduled = {id(piece) for piece, _ in work.pieces}
            others = (each for each in reversed(self.running) if id(each) not in scheduled)
            newest = next(others)  # at least the sequence itself
            self._preempt(newest)
            if newest is sequence:
                return
        work.copies += self.blocks.extend(sequence.table, 1)
        work.take(sequence, 1)

    def _prefill(self, sequence: Sequence, work: Work) -> None:
        count = min(sequence.pending, self.budget - work.tokens)
        table = sequence.table
        while count > 0 and self.blocks.needed(table, count) > self.blocks.free:
            count -= 1 + (table.length + count - 1) % self.blocks.size  # a block less
        if count > 0:
            work.copies += self.blocks.extend(table, count)
            work.take(sequence, count)
        elif not work.pieces and sequence.table.blocks:
            self._preempt(next(reversed(self.running)))  # two halves of prompts fill the cache

    def _admit(self, work: Work) -> None:
        while self.waiting and len(self.running) < self.most_running and work.tokens < self.budget:
            sequence = self.waiting[0]
            if not self._has_slots(sequence):
                return
            away = sequence.away
            if away is None:
                sequence.table = self.blocks.begin(
                    sequence.tokens, sequence.adapter, sequence.source
                )
            # Promised blocks of prompts that are in the middle count as taken.
            promised = sum(self.blocks.needed(each.table, each.pending) for each in self._partial())
            # All of it, wherever it is now.
            whole = self.blocks.needed(sequence.table, sequence.pending)
            if promised + whole > self.blocks.free:
                self.blocks.release(sequence.table)
                return
            self.waiting.popleft()
            if away is not None:
                self._bring_back(sequence, away, work)
            sequence.cached_tokens = max(sequence.cached_tokens, sequence.table.length)
            self.running[sequence] = None
            self._prefill(sequence, work)

    def _partial(self) -> Iterator[Sequence]:
        return (each for each in self.running if each.pending > 1)

    def _has_slots(self, sequence: Sequence) -> bool:
        """Whether all beams of a search that begins can run, beside those of searches that run."""
        started = {beam for each in self.running for beam in each.beams}
        if sequence in started:
            return True
        reserved = sum(beam not in self.running for beam in started)
        width = max(1, len(sequence.beams))
        return len(self.running) + reserved + width <= self.most_running

    def _break_stall(self) -> None:
        """Let the newest beam search give way, as all wait for beams that get no blocks."""
        newest = next(reversed(self.running))
        for beam in reversed([each for each in self.running if each in newest.beams]):
            self._preempt(beam)

    def _bring_back(self, sequence: Sequence, away: Away, work: Work) -> None:
        """Give a sequence blocks for what is in host memory of it."""
        sequence.away = None
        self.blocks.extend(sequence.table, away.length)
        work.returns.append((away, list(sequence.table.blocks)))
        self.blocks.commit(sequence.table, sequence.tokens[: away.length])

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        table = sequence.table
        # A beam may go on from another one's tokens, so what is kept of it may be of no use.
        if self.host is not None and table.length and not sequence.beams:
            used = -(-table.length // self.blocks.size)
            sequence.away = self.host.save(table.blocks[:used], table.length)
            self.swaps += sequence.away is not None
        self.blocks.release(sequence.table)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
