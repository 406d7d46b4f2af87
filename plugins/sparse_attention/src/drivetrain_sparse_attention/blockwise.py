"""Products and softmax of matrices of which only the blocks of a layout exist.

A sparse matrix [b, h, m, n] is a tensor [b, entries, block, block]: the blocks of a layout
[h, m / block, n / block] that are not 0, by head, row and column. All is plain operations of torch,
so gradients of any order exist. For attention, :mod:`~drivetrain_sparse_attention.function` is one
kernel and keeps no scores.
"""

from __future__ import annotations

from typing import Literal

import torch

Mode = Literal["sdd", "dsd", "dds"]


class MatMul:
    """A product of which one of the three matrices is sparse.

    Args:
        layout: [h, rows, columns], 0 or 1, of the sparse matrix before it is transposed.
        block: rows and columns of a block.
        mode: which is sparse: ``"sdd"`` the result, ``"dsd"`` the left one, ``"dds"`` the right.
        trans_a: transpose the left one first.
        trans_b: transpose the right one first.

    Raises:
        NotImplementedError: an unknown mode.
        ValueError: a layout of other dimensions.
    """

    def __init__(
        self,
        layout: torch.Tensor,
        block: int,
        mode: Mode,
        trans_a: bool = False,
        trans_b: bool = False,
    ) -> None:
        if mode not in ("sdd", "dsd", "dds"):
            raise NotImplementedError(f"mode {mode!r} is none of 'sdd', 'dsd', 'dds'")
        self.blocks = _Entries(layout, block)
        self.mode, self.trans_a, self.trans_b = mode, trans_a, trans_b

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Args:
            a: [b, h, m, k], or [b, entries, block, block] if sparse.
            b: [b, h, k, n], or likewise.

        Returns:
            [b, h, m, n], or [b, entries, block, block] if sparse.

        Raises:
            ValueError: sizes that are not the layout's.
        """
        blocks = self.blocks
        if self.mode == "sdd":
            a = a.transpose(2, 3) if self.trans_a else a
            b = b.transpose(2, 3) if self.trans_b else b
            left = blocks.cut(a, 2, blocks.rows, "a")[:, blocks.head, blocks.row]
            right = blocks.cut(b.transpose(2, 3), 2, blocks.columns, "b")
            return left @ right[:, blocks.head, blocks.column].transpose(2, 3)
        if self.mode == "dsd":
            b = b.transpose(2, 3) if self.trans_b else b
            return blocks.product(blocks.check(a, "a"), b, self.trans_a, "b")
        a = a.transpose(2, 3) if self.trans_a else a
        turned = blocks.check(b, "b").transpose(2, 3)
        # (A B)^T = B^T A^T, and B^T has the layout turned round.
        product = blocks.turned().product(turned, a.transpose(2, 3), self.trans_b, "a")
        return product.transpose(2, 3)


class Softmax:
    """Softmax over the existing elements of each row of a sparse matrix.

    Args:
        layout: [h, rows, columns], 0 or 1.
        block: rows and columns of a block.
    """

    def __init__(self, layout: torch.Tensor, block: int) -> None:
        self.blocks = _Entries(layout, block)

    def __call__(
        self,
        x: torch.Tensor,
        scale: float = 1.0,
        rpe: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask_mode: Literal["add", "mul"] = "add",
        attn_mask_mode: Literal["add", "mul"] = "add",
    ) -> torch.Tensor:
        """Scale, mask and normalise.

        Args:
            x: [b, entries, block, block].
            scale: of ``x``.
            rpe: added to scaled ``x``; broadcasts to [b, h, m, n].
            key_padding_mask: [b, n]; added, or with mode ``"mul"`` zeros hide.
            attn_mask: [m, n]; likewise.
            key_padding_mask_mode: ``"add"`` or ``"mul"``.
            attn_mask_mode: ``"add"`` or ``"mul"``.

        Returns:
            [b, entries, block, block], the dtype of ``x``; zeros in rows of nothing.

        Raises:
            ValueError: sizes that are not the layout's.
        """
        blocks = self.blocks
        scores = blocks.check(x, "x").to(torch.promote_types(x.dtype, torch.float32)) * scale
        if rpe is not None:
            scores = scores + blocks.gathered(rpe)
        for mask, mode in (
            (
                None if key_padding_mask is None else key_padding_mask[:, None, None],
                key_padding_mask_mode,
            ),
            (attn_mask, attn_mask_mode),
        ):
            if mask is None:
                continue
            own = blocks.gathered(mask)
            hides = mode == "mul"
            scores = scores.masked_fill(own == 0, -torch.inf) if hides else scores + own
        return blocks.normalised(scores).to(x.dtype)


class _Entries:
    """The blocks of a layout, as indices."""

    def __init__(self, layout: torch.Tensor, block: int) -> None:
        if layout.dim() != 3:
            raise ValueError(f"a layout [h, rows, columns] is expected, got {list(layout.shape)}")
        self.layout, self.block = layout, block
        self.heads, self.rows, self.columns = layout.shape
        self.head, self.row, self.column = layout.nonzero(as_tuple=True)

    def turned(self) -> _Entries:
        """The same entries in the same order, with rows and columns exchanged."""
        other = _Entries(self.layout.transpose(1, 2), self.block)
        other.head, other.row, other.column = self.head, self.column, self.row
        return other

    def check(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Check that ``x`` is a sparse matrix of this layout.

        Raises:
            ValueError: it is not.
        """
        wanted = (len(self.head), self.block, self.block)
        if x.dim() != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(f"{name} is {list(x.shape)}; the layout has [b, {wanted[0]} blocks]")
        return x

    def cut(self, x: torch.Tensor, dim: int, count: int, name: str) -> torch.Tensor:
        """Cut [b, h, n, m] into blocks of rows: [b, h, count, block, m].

        Raises:
            ValueError: it has another size.
        """
        if x.dim() != 4 or x.shape[1] != self.heads or x.shape[dim] != count * self.block:
            size = f"[b, {self.heads}, {count * self.block}, ...]"
            raise ValueError(f"{name} is {list(x.shape)}; the layout needs {size}")
        return x.reshape(*x.shape[:2], count, self.block, x.shape[3])

    def product(
        self, sparse: torch.Tensor, dense: torch.Tensor, turn: bool, name: str
    ) -> torch.Tensor:
        """The sparse matrix, transposed if ``turn``, times [b, h, n, m]."""
        of_result, of_dense = (self.column, self.row) if turn else (self.row, self.column)
        results, inputs = (self.columns, self.rows) if turn else (self.rows, self.columns)
        parts = self.cut(dense, 2, inputs, name)[:, self.head, of_dense]
        parts = (sparse.transpose(2, 3) if turn else sparse) @ parts
        total = parts.new_zeros(parts.shape[0], self.heads * results, *parts.shape[2:])
        total = total.index_add(1, self.head * results + of_result, parts)
        return total.reshape(parts.shape[0], self.heads, results * self.block, parts.shape[3])

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks of what broadcasts to [b, h, m, n]: [b or 1, entries, block, block]."""
        x = x.reshape(*(1,) * (4 - x.dim()), *x.shape)
        inside = torch.arange(self.block, device=x.device)
        rows = (self.row[:, None] * self.block + inside)[:, :, None]
        columns = (self.column[:, None] * self.block + inside)[:, None, :]
        x = x.expand(len(x), self.heads, self.rows * self.block, self.columns * self.block)
        return x[:, self.head[:, None, None], rows, columns]

    def normalised(self, scores: torch.Tensor) -> torch.Tensor:
        """Softmax over each row of the whole matrix."""
        line, count = self.head * self.rows + self.row, self.heads * self.rows
        shape = (scores.shape[0], count, self.block)
        index = line[None, :, None].expand(scores.shape[0], -1, self.block)
        highest = scores.new_full(shape, -torch.inf)
        highest = highest.scatter_reduce(1, index, scores.detach().amax(3), "amax")
        highest = highest.masked_fill(highest == -torch.inf, 0.0)
        powers = (scores - highest[:, line][..., None]).exp()
        total = scores.new_zeros(shape).index_add(1, line, powers.sum(3))
        total = torch.where(total == 0, torch.ones_like(total), total)
        return powers / total[:, line][..., None]
