"""Where the tokens of a batch are: which rank has which, what is padding, what is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from drivetrain.contracts import MaskRule
from drivetrain.errors import TrainingError


@dataclass(frozen=True, eq=False)
class Cut:
    """How S tokens are shared out over ring x heads ranks; rank = ring position * heads + other.

    A ring position has chunk i and chunk 2 * ring - 1 - i of 2 * ring equal ones, so that causal
    attention is as much work on each ("zig-zag"); the ranks that exchange heads have equal parts of
    these, in order.

    With ``chunk`` each rank has its part of every chunk, so that ranks which exchange heads of one
    chunk of theirs have a chunk of the sequence.

    Args:
        heads: ranks that exchange heads.
        ring: ranks that pass keys on.
        chunk: tokens of the sequence that are computed at a time, a multiple of ``heads``; only
            without a ring.
    """

    heads: int
    ring: int = 1
    chunk: int | None = None

    @property
    def cuts(self) -> bool:
        """Whether batches have to be cut, or brought into chunks."""
        return self.ranks > 1 or self.chunk is not None

    @property
    def ranks(self) -> int:
        """Ranks that share a sequence."""
        return self.heads * self.ring

    @property
    def multiple(self) -> int:
        """What the number of tokens has to be a multiple of."""
        return self.ranks * (2 if self.ring > 1 else 1)

    def runs(self, length: int, position: int) -> list[range]:
        """Places of the tokens at a ring position, in order."""
        if self.ring == 1:
            return [range(length)]
        size = length // (2 * self.ring)
        chunks = (position, 2 * self.ring - 1 - position)
        return [range(i * size, (i + 1) * size) for i in chunks]

    def chunks(self, length: int) -> list[range]:
        """Places of the tokens that are computed at a time; all of them at once without a size."""
        size = self.chunk or length
        return [range(i, min(i + size, length)) for i in range(0, length, size)]

    def of_ring(self, length: int, position: int) -> torch.Tensor:
        """Indices of the tokens at a ring position, in order."""
        return torch.cat([torch.arange(r.start, r.stop) for r in self.runs(length, position)])

    def of_rank(self, length: int, rank: int) -> torch.Tensor:
        """Indices of the tokens of a rank, in order."""
        position, part = divmod(rank, self.heads)
        if self.chunk is None:
            return self.of_ring(length, position).chunk(self.heads)[part]
        chunks = (torch.arange(r.start, r.stop) for r in self.chunks(length))
        return torch.cat([chunk.chunk(self.heads)[part] for chunk in chunks])


@dataclass(frozen=True, eq=False)
class Layout:
    """A batch of S tokens a row, S a multiple of what the cut needs.

    Args:
        real: [b, S], false for padding, which is a key for nobody; ``None`` if all are real.
        positions: [b, S], place of each token in its own sequence; ``None`` if rows are not packed.
        segments: [b, S], which of the sequences in its row a token belongs to; ``None`` likewise.
        added: whether all padding is at the end of rows, and there to make S what it has to be.
    """

    real: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    added: bool = False

    def attached(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """A padding mask [b, S] for the model, which brings this layout to its attention."""
        real = self.real
        mask = torch.ones(batch, length, dtype=torch.bool, device=device) if real is None else real
        found: TokenMask = mask.as_subclass(TokenMask)
        found.token_layout = self
        return found


class TokenMask(torch.Tensor):
    """A padding mask [b, S] that keeps its layout while a model views or converts it."""

    token_layout: Layout | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand the layout on to results that are the same mask."""
        inherited: Any = super().__torch_function__
        result = inherited(func, types, args, kwargs or {})
        if isinstance(result, TokenMask) and func in _SAME_MASK and isinstance(args[0], TokenMask):
            result.token_layout = args[0].token_layout if result.shape == args[0].shape else None
        return result


_SAME_MASK = (torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.to, torch.Tensor.bool)


def layout_of(rule: MaskRule) -> Layout:
    """The layout that comes with a mask.

    Raises:
        TrainingError: the model has made a padding mask of its own.
    """
    layout: Layout | None = getattr(rule.padding, "token_layout", None)
    if layout is None:
        raise TrainingError(
            "the model makes its attention mask of something else than the attention_mask that it "
            "was given, so it knows nothing of the tokens of other ranks: this model cannot be "
            "trained with sequence_parallel_size"
        )
    return layout


def whole_rule(
    rule: MaskRule, layout: Layout, lengths: tuple[int, int], device: torch.device
) -> MaskRule:
    """The mask of a model as a function of indices of the whole sequence, with padding and packing.

    Args:
        rule: the model's, of this rank's tokens.
        layout: of the keys.
        lengths: tokens of all queries, and of all keys.
        device: where the mask is made.

    Raises:
        TrainingError: it is a function that takes single numbers.
    """
    if not rule.broadcasts:
        raise TrainingError(
            "the model's attention mask is a function of single indices, which cannot be asked "
            "about tokens of other ranks: this model cannot be trained with sequence_parallel_size"
        )

    def allowed(
        sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        found = torch.ones((), dtype=torch.bool, device=device)
        if layout.real is not None:
            found = found & layout.real[sample, key]
        if layout.segments is not None:
            assert layout.positions is not None
            found = found & (layout.segments[sample, query] == layout.segments[sample, key])
            query, key = layout.positions[sample, query], layout.positions[sample, key]
        return found & rule.allowed(sample, head, query, key)

    def build() -> torch.Tensor:
        queries, keys = (torch.arange(length, device=device) for length in lengths)
        rows = 1 if layout.real is None and layout.segments is None else _rows(layout)
        samples = torch.arange(rows, device=device).view(-1, 1, 1, 1)
        found = allowed(samples, samples[:1] * 0, queries[:, None], keys)
        return found.expand(rows, 1, *lengths)

    return replace(rule, allowed=allowed, build=build, padding=None)


def _rows(layout: Layout) -> int:
    return next(x.shape[0] for x in (layout.real, layout.segments) if x is not None)


def segments_of(positions: torch.Tensor) -> torch.Tensor | None:
    """Which sequence each token of rows [b, S] belongs to, where positions begin again at each.

    Returns:
        [b, S]; ``None`` if every row is one sequence, or there are no values that say.
    """
    if positions.is_meta:
        return None
    begins = torch.ones_like(positions)
    begins[:, 1:] = (positions.diff(dim=1) != 1).to(positions.dtype)
    segments = begins.cumsum(1) - 1
    return segments if bool(segments.any()) else None
