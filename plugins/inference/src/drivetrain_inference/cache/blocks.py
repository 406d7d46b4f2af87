"""Who has which block of the cache: reference counts, shared prefixes, copies before writes."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drivetrain.errors import DrivetrainError

if TYPE_CHECKING:
    from drivetrain_inference.adapters.adapter import Adapter


class OutOfBlocksError(DrivetrainError, RuntimeError):
    """The cache has no free block left."""


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence.

    Args:
        blocks: numbers of blocks, in the order of the sequence.
        length: tokens whose keys and values are in the cache.
        keys: content keys of the first full blocks; they are chained, so a key stands for all that
            comes before its block, too, and for the adapter.
        adapter: with which keys and values are computed; ``None``: the model as it is.
        source: what an encoder reads; it takes the first blocks. Empty where there is no encoder.
    """

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    keys: list[bytes] = field(default_factory=list)
    adapter: Adapter | None = None
    source: tuple[int, ...] = ()

    @property
    def root(self) -> bytes:
        """What the chain of keys begins with; any part of a source depends on all of it."""
        first = b"" if self.adapter is None else self.adapter.salt
        return _key(first, self.source) if self.source else first


class BlockManager:
    """Hands out blocks of ``size`` tokens; keeps those of finished sequences as long as it can.

    A full block has a key, a hash of its tokens and of all before them. Blocks that nothing refers
    to stay findable by their key, and are reused in the order in which they were released.

    Args:
        blocks: number of blocks.
        size: tokens of a block.
        prefix_caching: whether a sequence that begins like another one shares its blocks.
    """

    def __init__(self, blocks: int, size: int, *, prefix_caching: bool = True) -> None:
        self.blocks, self.size = blocks, size
        self._prefix_caching = prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._references = [0] * blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free)

    def needed(self, table: BlockTable, tokens: int) -> int:
        """Blocks that ``tokens`` more tokens take: new ones, and one to copy a shared one into."""
        if tokens == 0:
            return 0
        more = -(-(table.length + tokens) // self.size) - len(table.blocks)
        return max(0, more) + self._writes_into_shared(table)

    def begin(
        self,
        tokens: Sequence[int],
        adapter: Adapter | None = None,
        source: tuple[int, ...] = (),
    ) -> BlockTable:
        """A table for a sequence of ``tokens``, with the blocks that the cache has of it already.

        At least one token is left to compute, as its logits are wanted.
        """
        table = BlockTable(adapter=adapter, source=source)
        if not self._prefix_caching:
            return table
        key = table.root
        for start in range(0, (len(tokens) - 1) // self.size * self.size, self.size):
            key = _key(key, tokens[start : start + self.size])
            block = self._block_of.get(key)
            if block is None:
                break
            self._take(block)
            table.blocks.append(block)
            table.keys.append(key)
            table.length += self.size
        return table

    def extend(self, table: BlockTable, tokens: int) -> list[tuple[int, int]]:
        """Make room for ``tokens`` more tokens.

        Returns:
            (from, to): blocks whose contents have to be copied before anything is written.

        Raises:
            OutOfBlocksError: there are not enough; nothing has changed.
        """
        if self.needed(table, tokens) > self.free:
            raise OutOfBlocksError(
                f"{tokens} tokens need {self.needed(table, tokens)} blocks, {self.free} are free"
            )
        copies = []
        if tokens and self._writes_into_shared(table):
            shared, own = table.blocks[-1], self._new()
            table.blocks[-1] = own
            self.release_blocks([shared])
            copies.append((shared, own))
        while len(table.blocks) * self.size < table.length + tokens:
            table.blocks.append(self._new())
        return copies

    def commit(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Note that the cache now has all of ``tokens``; key the sequence's full blocks."""
        table.length = len(tokens)
        if table.length < -(-len(table.source) // self.size) * self.size:
            return  # blocks of a source have nothing in them before it is encoded
        while self._prefix_caching and (len(table.keys) + 1) * self.size <= table.length:
            start = len(table.keys) * self.size
            parent = table.keys[-1] if table.keys else table.root
            key = _key(parent, tokens[start : start + self.size])
            block = table.blocks[len(table.keys)]
            table.keys.append(key)
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key

    def fork(self, table: BlockTable) -> BlockTable:
        """A second sequence with the same tokens; blocks are shared until one of them writes."""
        for block in table.blocks:
            self._take(block)
        return BlockTable(
            list(table.blocks), table.length, list(table.keys), table.adapter, table.source
        )

    def release(self, table: BlockTable) -> None:
        """Give back all blocks of a table, which is empty afterwards."""
        # Ends of sequences are less likely to be shared than their beginnings.
        self.release_blocks(reversed(table.blocks))
        table.blocks, table.length, table.keys = [], 0, []

    def release_blocks(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each of ``blocks``."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free already"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def forget(self) -> None:
        """Forget what free blocks contain: the weights that made it are gone."""
        self._key_of.clear()
        self._block_of.clear()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that ``tables`` hold exactly the references that are counted."""
        counted = [0] * self.blocks
        for table in tables:
            assert len(table.blocks) * self.size >= table.length
            for block in table.blocks:
                counted[block] += 1
        assert counted == self._references, "references and tables disagree"
        assert {block for block, n in enumerate(counted) if n == 0} == set(self._free)
        assert self._block_of == {key: block for block, key in self._key_of.items()}

    def _writes_into_shared(self, table: BlockTable) -> bool:
        partial = table.length % self.size != 0
        return partial and self._references[table.blocks[-1]] > 1

    def _take(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _new(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
        self._references[block] = 1
        return block


def _key(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
