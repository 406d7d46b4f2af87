"""Which blocks of keys each block of queries sees, as lists by rows and by columns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BlockLists(NamedTuple):
    """Lists of blocks, int32; those of all samples and heads lie one after the other.

    Args:
        starts: [b or 1, h or 1, rows + 1], places in ``columns``.
        columns: [entries], blocks of keys, ascending within a row.
        back_starts: [b or 1, h or 1, columns + 1], places in ``back_rows``.
        back_rows: [entries], block rows of queries, ascending within a column.
        back_entries: [entries], place in ``columns`` of the same block.
    """

    starts: torch.Tensor
    columns: torch.Tensor
    back_starts: torch.Tensor
    back_rows: torch.Tensor
    back_entries: torch.Tensor

    def rows(self) -> torch.Tensor:
        """Place of each entry among the rows of all samples and heads, [entries], int64."""
        counts = self.starts.diff(dim=2).flatten().long()
        places = torch.arange(len(counts), device=counts.device)
        return places.repeat_interleave(counts, output_size=len(self.columns))


def block_lists(seen: torch.Tensor) -> BlockLists:
    """Make the lists of a layout.

    Args:
        seen: [b or 1, h or 1, rows, columns], bool: whether a block of scores is computed.
    """
    _, _, row, column = seen.nonzero(as_tuple=True)
    numbers = torch.zeros(seen.shape, dtype=torch.int64, device=seen.device)
    numbers[seen] = torch.arange(len(column), device=seen.device)
    turned = seen.transpose(2, 3)
    entry = numbers.transpose(2, 3)[turned]
    found = (_starts(seen), column, _starts(turned), row[entry], entry)
    return BlockLists(*(x.to(torch.int32).contiguous() for x in found))


def _starts(seen: torch.Tensor) -> torch.Tensor:
    counts = seen.sum(3)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    return torch.cat([(ends - counts)[..., :1], ends], dim=2)
