"""Layouts: which blocks of keys each block of queries sees, and the classes that make them.

Sources: fixed and variable, Child et al. 2019 (arXiv 1904.10509); BigBird, Zaheer et al. 2020
(arXiv 2007.14062); BSLongformer, Beltagy et al. 2020 (arXiv 2004.05150), by blocks. Parameters and
layouts are DeepSpeed's, but for random blocks: these follow from ``seed``, so that all ranks, and a
run that is resumed, have the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from drivetrain_sparse_attention.section import SparseAttentionSection


class SparsityConfig:
    """What all layouts share.

    Args:
        num_heads: heads of the layer.
        block: tokens of a block.
        different_layout_per_head: heads have layouts of their own; else all have the first one's.

    Raises:
        ValueError: a number that cannot be.
    """

    def __init__(
        self, num_heads: int, block: int = 16, different_layout_per_head: bool = False
    ) -> None:
        if num_heads < 1 or block < 1:
            raise ValueError(f"num_heads {num_heads} and block {block} have to be at least 1")
        self.num_heads = num_heads
        self.block = block
        self.different_layout_per_head = different_layout_per_head
        self.num_layout_heads = num_heads if different_layout_per_head else 1

    @property
    def fewest_blocks(self) -> int:
        """Blocks that a sequence needs for the layout to have all its parts."""
        return 1

    def setup_layout(self, seq_len: int) -> torch.Tensor:
        """An empty layout for ``seq_len`` tokens, [num_heads, blocks, blocks], int64.

        Raises:
            ValueError: ``block`` does not divide ``seq_len``.
        """
        if seq_len % self.block:
            raise ValueError(
                f"block {self.block} does not divide sequences of {seq_len} tokens: pad them "
                "(SparseAttentionUtils.pad_to_block_size)"
            )
        import torch

        blocks = seq_len // self.block
        return torch.zeros(self.num_heads, blocks, blocks, dtype=torch.int64)

    def make_layout(self, seq_len: int) -> torch.Tensor:
        """The layout for ``seq_len`` tokens: [num_heads, blocks, blocks], 1 for what is seen.

        Raises:
            ValueError: ``block`` does not divide ``seq_len``, or there are too few blocks.
        """
        layout = self.setup_layout(seq_len)
        self._check_length(layout.shape[1])
        for head in range(self.num_layout_heads):
            self.fill(layout[head], head)
        return self.check_and_propagate_first_head_layout(layout)

    def check_and_propagate_first_head_layout(self, layout: torch.Tensor) -> torch.Tensor:
        """Give all heads the layout of the first, unless they have their own."""
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout

    def fill(self, layout: torch.Tensor, head: int) -> None:
        """Set what one head sees in an empty layout [blocks, blocks]."""
        raise NotImplementedError(f"{type(self).__name__} says no layout: use a class that does")

    def _check_length(self, blocks: int) -> None:
        if blocks < self.fewest_blocks:
            raise ValueError(
                f"{type(self).__name__} needs sequences of at least {self.fewest_blocks} blocks "
                f"({self.fewest_blocks * self.block} tokens), got {blocks}"
            )


class DenseSparsityConfig(SparsityConfig):
    """All blocks, to compare with.

    Args:
        num_heads: see :class:`SparsityConfig`.
        block: likewise.
        different_layout_per_head: means nothing here.
    """

    def fill(self, layout: torch.Tensor, head: int) -> None:
        layout.fill_(1)


class _Directed(SparsityConfig):
    """A layout that may leave out the blocks ahead of the queries'."""

    def __init__(
        self, num_heads: int, block: int, different_layout_per_head: bool, attention: str
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        if attention not in ("unidirectional", "bidirectional"):
            raise NotImplementedError(
                f"attention {attention!r} is neither 'unidirectional' nor 'bidirectional'"
            )
        self.attention = attention

    @property
    def _looks_ahead(self) -> bool:
        return self.attention == "bidirectional"

    def _fill_band(self, layout: torch.Tensor, width: int) -> None:
        """Blocks at most ``width // 2`` from the queries' own."""
        half = width // 2
        for row in range(len(layout)):
            layout[row, max(0, row - half) : row + half + 1] = 1

    def _fill_windows(self, layout: torch.Tensor, widths: Sequence[int]) -> None:
        """Windows one after the other in which all blocks see each other; the last repeats."""
        blocks, start, number = len(layout), 0, 0
        while start < blocks:
            end = min(start + widths[min(number, len(widths) - 1)], blocks)
            for row in range(start, end):
                layout[row, start : end if self._looks_ahead else row + 1] = 1
            start, number = end, number + 1

    def _fill_random(self, layout: torch.Tensor, head: int, count: int, *, back: bool) -> None:
        """``count`` random blocks a row, of all, or with ``back`` of those up to the row's own."""
        generator = random.Random(f"{self.seed} {head}")  # noqa: S311 - has to repeat itself
        for row in range(len(layout)):
            choices = row + 1 if back else len(layout)
            layout[row, generator.sample(range(choices), min(count, choices))] = 1

    seed: int = 0


class FixedSparsityConfig(_Directed):
    """Windows of blocks, and of each window some blocks that all see.

    Args:
        num_heads: see :class:`SparsityConfig`.
        block: likewise.
        different_layout_per_head: likewise.
        num_local_blocks: blocks of a window, a multiple of ``num_global_blocks``.
        num_global_blocks: consecutive blocks of each window that all others see.
        attention: ``"bidirectional"``, or ``"unidirectional"``: windows have no blocks ahead, and a
            global block is seen from its own row on.
        horizontal_global_attention: global blocks see all others, too.
        num_different_global_patterns: heads take turns at this many places of global blocks in a
            window, from the window's end.

    Raises:
        ValueError: numbers that do not go together.
        NotImplementedError: an ``attention`` that is neither.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, attention)
        if num_global_blocks < 1 or num_local_blocks % num_global_blocks:
            raise ValueError(
                f"num_global_blocks {num_global_blocks} does not divide num_local_blocks "
                f"{num_local_blocks}"
            )
        if horizontal_global_attention and attention != "bidirectional":
            raise ValueError("horizontal_global_attention needs attention 'bidirectional'")
        patterns, most = num_different_global_patterns, num_local_blocks // num_global_blocks
        if patterns > 1 and not different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns {patterns} needs different_layout_per_head"
            )
        if patterns > most:
            raise ValueError(
                f"num_different_global_patterns {patterns} is more than the {most} places of "
                f"{num_global_blocks} blocks in a window of {num_local_blocks}"
            )
        self.num_local_blocks = num_local_blocks
        self.num_global_blocks = num_global_blocks
        self.horizontal_global_attention = horizontal_global_attention
        self.num_different_global_patterns = patterns

    @property
    def fewest_blocks(self) -> int:
        return self.num_global_blocks

    def fill(self, layout: torch.Tensor, head: int) -> None:
        self._fill_windows(layout, [self.num_local_blocks])
        local, size, blocks = self.num_local_blocks, self.num_global_blocks, len(layout)
        first = local - (1 + head % self.num_different_global_patterns) * size
        whole = blocks - blocks % local
        places = list(range(first, whole, local))
        if whole < blocks:  # the last window is short
            places.append(min(whole + first, blocks - size))
        for start in places:
            layout[0 if self._looks_ahead else start :, start : start + size] = 1
            if self.horizontal_global_attention:
                layout[start : start + size] = 1


class _WithGlobals(_Directed):
    """A layout with global blocks at places of the user's."""

    def __init__(
        self,
        num_heads: int,
        block: int,
        different_layout_per_head: bool,
        attention: str,
        indices: Sequence[int] | None,
        ends: Sequence[int] | None,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, attention)
        self.global_block_indices = [0] if indices is None else list(indices)
        self.global_block_end_indices = None if ends is None else list(ends)
        if ends is not None:
            if len(self.global_block_indices) != len(ends):
                raise ValueError(
                    f"{len(self.global_block_indices)} global_block_indices have {len(ends)} "
                    "global_block_end_indices"
                )
            for start, end in zip(self.global_block_indices, ends, strict=True):
                if start >= end:
                    raise ValueError(
                        f"global_block_indices {start} is not below its global_block_end_indices "
                        f"{end}"
                    )

    def _globals(self, blocks: int) -> list[slice]:
        """Ranges of the global blocks that a sequence has."""
        ends = self.global_block_end_indices or [at + 1 for at in self.global_block_indices]
        ranges = zip(self.global_block_indices, ends, strict=True)
        return [slice(start, min(end, blocks)) for start, end in ranges if start < blocks]


class VariableSparsityConfig(_WithGlobals):
    """Windows of different sizes, global blocks at any place, and random blocks.

    Args:
        num_heads: see :class:`SparsityConfig`.
        block: likewise.
        different_layout_per_head: likewise.
        num_random_blocks: random blocks of each row.
        local_window_blocks: sizes of the windows in order; the last repeats. [4] by default.
        global_block_indices: global blocks, or where ranges of them begin. [0] by default.
        global_block_end_indices: where these ranges end.
        attention: ``"unidirectional"``: windows have no blocks ahead, and a global block is seen
            from its own row on.
        horizontal_global_attention: global blocks see all others, too.
        seed: of random blocks.

    Raises:
        ValueError: numbers that do not go together.
        NotImplementedError: an ``attention`` that is neither.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] | None = None,
        global_block_indices: Sequence[int] | None = None,
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        seed: int = 0,
    ) -> None:
        globals_ = (global_block_indices, global_block_end_indices)
        super().__init__(num_heads, block, different_layout_per_head, attention, *globals_)
        if horizontal_global_attention and attention != "bidirectional":
            raise ValueError("horizontal_global_attention needs attention 'bidirectional'")
        self.local_window_blocks = list(local_window_blocks or [4])
        if min(self.local_window_blocks) < 1:
            raise ValueError(f"local_window_blocks {self.local_window_blocks} are not all positive")
        self.num_random_blocks = num_random_blocks
        self.horizontal_global_attention = horizontal_global_attention
        self.seed = seed

    @property
    def fewest_blocks(self) -> int:
        return max(1, self.num_random_blocks)

    def fill(self, layout: torch.Tensor, head: int) -> None:
        self._fill_random(layout, head, self.num_random_blocks, back=False)
        self._fill_windows(layout, self.local_window_blocks)
        for part in self._globals(len(layout)):
            layout[0 if self._looks_ahead else part.start :, part] = 1
            if self.horizontal_global_attention:
                layout[part] = 1


class BigBirdSparsityConfig(_Directed):
    """A band around the diagonal, first blocks that see and are seen by all, and random blocks.

    Args:
        num_heads: see :class:`SparsityConfig`.
        block: likewise.
        different_layout_per_head: likewise.
        num_random_blocks: random blocks of each row.
        num_sliding_window_blocks: blocks of the band.
        num_global_blocks: first blocks that are global.
        attention: ``"unidirectional"``: no blocks ahead.
        seed: of random blocks.

    Raises:
        NotImplementedError: an ``attention`` that is neither.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, attention)
        self.num_random_blocks = num_random_blocks
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.num_global_blocks = num_global_blocks
        self.seed = seed

    @property
    def fewest_blocks(self) -> int:
        return max(self.num_random_blocks, self.num_sliding_window_blocks, self.num_global_blocks)

    def fill(self, layout: torch.Tensor, head: int) -> None:
        self._fill_random(layout, head, self.num_random_blocks, back=not self._looks_ahead)
        self._fill_band(layout, self.num_sliding_window_blocks)
        layout[: self.num_global_blocks] = 1
        layout[:, : self.num_global_blocks] = 1
        if not self._looks_ahead:
            layout.tril_()


class BSLongformerSparsityConfig(_WithGlobals):
    """A band around the diagonal, and blocks that see and are seen by all.

    Args:
        num_heads: see :class:`SparsityConfig`.
        block: likewise.
        different_layout_per_head: likewise.
        num_sliding_window_blocks: blocks of the band.
        global_block_indices: global blocks, or where ranges of them begin. [0] by default.
        global_block_end_indices: where these ranges end.
        attention: ``"unidirectional"``: no blocks ahead.

    Raises:
        ValueError: ranges that cannot be.
        NotImplementedError: an ``attention`` that is neither.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] | None = None,
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
    ) -> None:
        globals_ = (global_block_indices, global_block_end_indices)
        super().__init__(num_heads, block, different_layout_per_head, attention, *globals_)
        self.num_sliding_window_blocks = num_sliding_window_blocks

    @property
    def fewest_blocks(self) -> int:
        return self.num_sliding_window_blocks

    def fill(self, layout: torch.Tensor, head: int) -> None:
        self._fill_band(layout, self.num_sliding_window_blocks)
        for part in self._globals(len(layout)):
            layout[part] = 1
            layout[:, part] = 1
        if not self._looks_ahead:
            layout.tril_()


class LocalSlidingWindowSparsityConfig(_Directed):
    """A band around the diagonal.

    Args:
        num_heads: see :class:`SparsityConfig`.
        block: likewise.
        num_sliding_window_blocks: blocks of the band.
        attention: ``"unidirectional"``: no blocks ahead.
        different_layout_per_head: means nothing here.

    Raises:
        NotImplementedError: an ``attention`` that is neither.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = "unidirectional",
        different_layout_per_head: bool = False,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, attention)
        self.num_sliding_window_blocks = num_sliding_window_blocks

    @property
    def fewest_blocks(self) -> int:
        return self.num_sliding_window_blocks

    def fill(self, layout: torch.Tensor, head: int) -> None:
        self._fill_band(layout, self.num_sliding_window_blocks)
        if not self._looks_ahead:
            layout.tril_()


_CLASSES: dict[str, type[SparsityConfig]] = {
    "fixed": FixedSparsityConfig,
    "variable": VariableSparsityConfig,
    "bigbird": BigBirdSparsityConfig,
    "bslongformer": BSLongformerSparsityConfig,
    "local": LocalSlidingWindowSparsityConfig,
}


def sparsity_of(section: SparseAttentionSection, num_heads: int) -> SparsityConfig:
    """The sparsity config of a config's section, whose mode has a layout.

    Raises:
        ValueError: numbers that do not go together.
        NotImplementedError: an ``attention`` that there is not.
    """
    return _CLASSES[section.mode](num_heads, **section.arguments())
