"""Memory for keys and values, and the numbers that say where a forward's tokens go in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from drivetrain_inference.cache.blocks import BlockTable


@dataclass(frozen=True)
class LayerSpec:
    """What one attention module keeps and computes; seen when the model ran once.

    Args:
        kv_heads: heads of keys and values.
        dim: elements of a key.
        value_dim: elements of a value.
        scale: factor of the scores.
        window: keys that a query sees at most; 0 for all.
        softcap: of the scores; 0 for none.
        sinks: whether heads have a score of their own without a value.
    """

    kv_heads: int
    dim: int
    value_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


class PagedCache:
    """Keys and values of all layers, in blocks.

    Args:
        layers: what layers keep.
        blocks: number of blocks.
        size: tokens of a block.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        blocks: int,
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.size, self.layers = size, tuple(layers)

        def memory(layer: LayerSpec, dim: int) -> torch.Tensor:
            return torch.zeros(blocks, layer.kv_heads, size, dim, dtype=dtype, device=device)

        self.keys = [memory(layer, layer.dim) for layer in layers]
        self.values = [memory(layer, layer.value_dim) for layer in layers]

    @staticmethod
    def bytes_per_block(layers: Iterable[LayerSpec], size: int, dtype: torch.dtype) -> int:
        """Memory that one block takes in all layers."""
        elements = sum(each.kv_heads * (each.dim + each.value_dim) for each in layers)
        return elements * size * dtype.itemsize

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in all layers."""
        if copies:
            sources, targets = map(list, zip(*copies, strict=True))
            for tensor in (*self.keys, *self.values):
                tensor[targets] = tensor[sources]


@dataclass(frozen=True)
class RaggedBatch:
    """Tokens of several sequences, one after another, and where each belongs.

    Args:
        tokens: [tokens], int64.
        positions: [tokens], int64: places in their sequences.
        slots: [tokens], int32: places in the cache, ``block * size + place``.
        tables: [sequences, most blocks], int32.
        starts: [sequences + 1], int32: where sequences begin.
        lengths: [sequences], int32: tokens in the cache after this forward.
        last: [rows], int64: tokens whose logits are wanted; of each sequence the last, or more.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(
        cls,
        pieces: Sequence[tuple[BlockTable, Sequence[int]]],
        size: int,
        device: torch.device,
        wanted: Sequence[int] | None = None,
    ) -> RaggedBatch:
        """Lay out the next tokens of sequences whose tables have room for them.

        Args:
            pieces: tables and tokens.
            size: tokens of a block.
            device: where the numbers go.
            wanted: how many last tokens of each sequence logits are wanted of; 1 by default.
        """
        tokens, positions, slots = list[int](), list[int](), list[int]()
        starts, lengths = [0], list[int]()
        for table, new in pieces:
            end = table.length + len(new)
            for position in range(table.length, end):
                slots.append(table.blocks[position // size] * size + position % size)
            tokens.extend(new)
            positions.extend(range(table.length, end))
            starts.append(len(tokens))
            lengths.append(end)
        width = max(len(table.blocks) for table, _ in pieces)
        rows = [table.blocks + [0] * (width - len(table.blocks)) for table, _ in pieces]

        def whole(values: object, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        begin = whole(starts, torch.int32)
        return cls(
            tokens=whole(tokens, torch.int64),
            positions=whole(positions, torch.int64),
            slots=whole(slots, torch.int32),
            tables=whole(rows, torch.int32),
            starts=begin,
            lengths=whole(lengths, torch.int32),
            last=begin[1:].long() - 1
            if wanted is None
            else whole(_last(starts, wanted), torch.int64),
        )


def _last(starts: Sequence[int], wanted: Sequence[int]) -> list[int]:
    ends = zip(starts[1:], wanted, strict=True)
    return [row for end, count in ends for row in range(end - count, end)]
