"""One forward over tokens of many sequences that the caller keeps track of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch

from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain_inference.cache.blocks import BlockManager, BlockTable
from drivetrain_inference.cache.paged import PagedCache, RaggedBatch
from drivetrain_inference.models.choice import Model


class SchedulingResult(IntEnum):
    """Whether a batch can be computed, or which limit it exceeds."""

    Success = 0
    EngineSequenceLimitExceeded = 1
    BatchSequenceLimitExceeded = 2
    BatchTokenLimitExceeded = 3
    KVCacheLimitExceeded = 4
    SequenceTokenLimitExceeded = 5


class SchedulingError(DrivetrainError, RuntimeError):
    """A batch exceeds a limit; ``result`` says which."""

    def __init__(self, result: SchedulingResult) -> None:
        super().__init__(f"the batch cannot be computed: {result.name}")
        self.result = result


def all_logits(engine: RaggedEngine, texts: Sequence[Sequence[int]]) -> torch.Tensor | None:
    """Logits after every token of some texts, one text after another through the cache.

    Returns:
        [tokens of all texts, vocabulary] in the model's dtype; ``None`` if there is no room for one
        of them.
    """
    blocks, found = engine.blocks, list[torch.Tensor]()
    for text in texts:
        table = BlockTable()
        if not 0 < len(text) <= engine.context or blocks.needed(table, len(text)) > blocks.free:
            return None
        blocks.extend(table, len(text))
        try:
            for start in range(0, len(text), engine.budget):
                piece = text[start : start + engine.budget]
                found.append(engine.run([(table, piece)], [len(piece)]).to(engine.model.dtype))
                table.length += len(piece)
        finally:
            blocks.release(table)
    return torch.cat(found) if found else None


class RaggedEngine:
    """Sequences by number, their blocks, and forwards over them.

    Args:
        model: computes logits.
        cache: memory.
        blocks: who has which block of it.
        budget: most tokens of a forward.
        most_sequences: most sequences of a forward.
        most_tracked: most sequences that have blocks.
        context: most tokens of a sequence.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        blocks: BlockManager,
        *,
        budget: int,
        most_sequences: int,
        most_tracked: int,
        context: int,
    ) -> None:
        self.model, self.cache, self.blocks = model, cache, blocks
        self.budget, self.most_sequences = budget, most_sequences
        self.most_tracked, self.context = most_tracked, context
        self.tables: dict[int, BlockTable] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence has."""
        return self.blocks.free

    def put(
        self,
        uids: Iterable[int],
        tokens: Iterable[torch.Tensor | Sequence[int]],
        do_checks: bool = True,
    ) -> torch.Tensor:
        """Compute the next tokens of each sequence; unknown numbers begin new ones.

        Args:
            uids: numbers of the sequences, each once.
            tokens: for each, its next tokens, at least one.
            do_checks: whether limits are checked first.

        Returns:
            Logits [sequences, vocabulary] after the last token of each, float32.

        Raises:
            SchedulingError: a limit is exceeded; nothing has changed.
            ConfigError: a number comes twice, or a sequence gets no token.
        """
        numbers = list(uids)
        new = [each.tolist() if isinstance(each, torch.Tensor) else list(each) for each in tokens]
        if len(set(numbers)) != len(numbers) or len(new) != len(numbers) or not all(new):
            raise ConfigError("put takes each sequence once, with at least one token")
        if do_checks:
            result = self.can_schedule(numbers, [len(each) for each in new])
            if result is not SchedulingResult.Success:
                raise SchedulingError(result)
        begun = set(numbers) - self.tables.keys()
        tables = [self.tables.setdefault(number, BlockTable()) for number in numbers]
        try:
            for table, each in zip(tables, new, strict=True):
                self.cache.copy(self.blocks.extend(table, len(each)))
            logits = self.run(list(zip(tables, new, strict=True)))
        except BaseException:
            for number in begun:  # others keep what they had, and room for what they did not get
                self.blocks.release(self.tables.pop(number))
            raise
        for table, each in zip(tables, new, strict=True):
            table.length += len(each)
        return logits

    def run(
        self,
        pieces: Sequence[tuple[BlockTable, Sequence[int]]],
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Compute tokens for which their tables have room.

        Returns:
            Logits after the last token of each piece, or after its last ``wanted`` ones.
        """
        batch = RaggedBatch.of(pieces, self.cache.size, self.model.device, wanted)
        return self.model(self.cache, batch)

    def query(self, uid: int, max_request_tokens: int, max_request_blocks: int) -> tuple[int, int]:
        """How many of so many tokens fit, and the blocks that they need.

        (0, 0) for a new sequence if as many are tracked as can be.
        """
        table = self.tables.get(uid)
        if table is None and len(self.tables) >= self.most_tracked:
            return 0, 0
        table = table or BlockTable()
        size = self.blocks.size
        room = (len(table.blocks) + max_request_blocks) * size - table.length
        tokens = max(0, min(max_request_tokens, room, self.context - table.length))
        return tokens, max(0, -(-(table.length + tokens) // size) - len(table.blocks))

    def can_schedule(self, uids: Iterable[int], lengths: Iterable[int]) -> SchedulingResult:
        """Whether one forward can take so many tokens of each sequence."""
        numbers, counts = list(uids), list(lengths)
        known = [self.tables.get(number, BlockTable()) for number in numbers]
        if len(self.tables.keys() | set(numbers)) > self.most_tracked:
            return SchedulingResult.EngineSequenceLimitExceeded
        if len(numbers) > self.most_sequences:
            return SchedulingResult.BatchSequenceLimitExceeded
        if sum(counts) > self.budget:
            return SchedulingResult.BatchTokenLimitExceeded
        pairs = list(zip(known, counts, strict=True))
        if any(table.length + count > self.context for table, count in pairs):
            return SchedulingResult.SequenceTokenLimitExceeded
        if sum(self.blocks.needed(table, count) for table, count in pairs) > self.blocks.free:
            return SchedulingResult.KVCacheLimitExceeded
        return SchedulingResult.Success

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Tokens that the last block of a sequence has room for; 0 if there is none."""
        table = self.tables.get(uid, BlockTable())
        return len(table.blocks) * self.blocks.size - table.length

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its blocks; one that is not known is no error."""
        table = self.tables.pop(uid, None)
        if table is not None:
            self.blocks.release(table)
