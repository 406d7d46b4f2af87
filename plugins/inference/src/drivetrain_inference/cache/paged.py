"""Memory for keys and values, and the numbers that say where a forward's tokens go in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from drivetrain_kernels.ops.cache_codes import to_cache_codes

from drivetrain.errors import ConfigError
from drivetrain_inference.adapters.adapter import Group, groups_of
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
        whole: why codes of 8 bits cannot keep its keys; empty where they can.
    """

    kv_heads: int
    dim: int
    value_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    whole: str = ""


FORMATS = {"int8": torch.int8, "fp8": torch.uint8}
"""Formats of a cache of codes, and the dtypes of codes that kernels know them by."""


class PagedCache:
    """Keys and values of all layers, in blocks.

    Attributes:
        keys: of each layer [blocks, kv_heads, size, dim].
        values: of each layer [blocks, kv_heads, size, value_dim].
        scales: of each layer, those of keys and of values [blocks, kv_heads, size], float32; twice
            ``None`` where keys and values are no codes.

    Args:
        layers: what layers keep.
        blocks: number of blocks.
        size: tokens of a block.
        dtype: of keys and values.
        device: where they lie.
        form: a key of :data:`FORMATS`, to keep codes with a scale for each head of a token; empty
            for keys and values as they are.

    Raises:
        ConfigError: codes are wanted of keys that they cannot keep.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        blocks: int,
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        form: str = "",
    ) -> None:
        self.size, self.layers = size, tuple(layers)
        whole = next((layer.whole for layer in layers if layer.whole), "")
        if form and whole:
            raise ConfigError(
                f"inference.cache_format: {form} is not served with {whole}; leave cache_format out"
            )
        kept = FORMATS.get(form, dtype)

        def memory(layer: LayerSpec, dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros(blocks, layer.kv_heads, size, *width, dtype=dtype, device=device)

        self.keys = [memory(layer, kept, layer.dim) for layer in layers]
        self.values = [memory(layer, kept, layer.value_dim) for layer in layers]
        self.scales: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [
            (memory(layer, torch.float32), memory(layer, torch.float32)) if form else (None, None)
            for layer in layers
        ]

    @staticmethod
    def bytes_per_block(
        layers: Iterable[LayerSpec], size: int, dtype: torch.dtype, form: str = ""
    ) -> int:
        """Memory that one block takes in all layers."""
        item, scales = (1, 2 * 4) if form else (dtype.itemsize, 0)
        return size * sum(
            each.kv_heads * ((each.dim + each.value_dim) * item + scales) for each in layers
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of its memory, each with blocks first."""
        scales = [each for pair in self.scales for each in pair if each is not None]
        return [*self.keys, *self.values, *scales]

    def put(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write keys and values of tokens, by torch alone.

        Args:
            layer: number of the layer.
            slots: [tokens], places in the cache.
            key: [tokens, kv_heads, dim].
            value: [tokens, kv_heads, value_dim].
        """
        block, place = (slots // self.size).long(), (slots % self.size).long()
        caches = (self.keys[layer], self.values[layer])
        for cache, scales, own in zip(caches, self.scales[layer], (key, value), strict=True):
            if scales is None:
                cache[block, :, place] = own.to(cache.dtype)
            else:
                cache[block, :, place], scales[block, :, place] = to_cache_codes(own, cache.dtype)

    def close(self) -> None:
        """Give the memory back."""
        self.keys, self.values, self.scales = [], [], []

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in all layers."""
        if copies:
            sources, targets = map(list, zip(*copies, strict=True))
            for tensor in self.tensors:
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
        adapters: which tokens are computed with which adapter.
        sources: of each sequence what an encoder reads, if one does.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    last: torch.Tensor
    adapters: tuple[Group, ...] = ()
    sources: tuple[tuple[int, ...], ...] = ()

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
        adapters: tuple[Group, ...] = ()
        if any(table.adapter is not None for table, _ in pieces):
            adapters = groups_of([table.adapter for table, new in pieces for _ in new], device)
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
            adapters=adapters,
            sources=tuple(table.source for table, _ in pieces if table.source),
        )


def _last(starts: Sequence[int], wanted: Sequence[int]) -> list[int]:
    ends = zip(starts[1:], wanted, strict=True)
    return [row for end, count in ends for row in range(end - count, end)]
