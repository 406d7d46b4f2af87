"""The arguments of a block, cut into chunks, and its results put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from drivetrain.errors import TrainingError


class Arguments:
    """Arguments of a call whose tensors are cut along tokens.

    The first tensor of three dimensions or more is the sequence, [b, s, ...]; what has s tokens in
    its second dimension, in the one before its last, or in its only or first of two, is cut there.

    Args:
        args: by position.
        kwargs: by name.
        name: of the block, for errors.

    Attributes:
        length: s.
        dims: where each tensor is cut; ``None`` for whole ones.
        needed: whether each tensor has a gradient.

    Raises:
        TrainingError: there is no sequence, or a mask [.., s, s] among them.
    """

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> None:
        leaves, self._spec = tree_flatten((tuple(args), kwargs))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self._tensors: list[torch.Tensor] = [leaves[i] for i in self._places]
        self._others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        first = next((x for x in self._tensors if x.dim() > 2), None)
        if first is None:
            raise TrainingError(
                f"{name} takes no tensor [rows, tokens, width], so it cannot be computed in chunks "
                "of tokens (sequence_parallel.chunk)"
            )
        self.length = first.shape[1]
        self.dims = [_tokens(x, self.length) for x in self._tensors]
        self.needed = [x.requires_grad for x in self._tensors]
        for x in self._tensors:
            if x.dim() > 3 and x.shape[-2:] == (self.length, self.length):
                raise TrainingError(
                    f"{name} is given a tensor of shape {tuple(x.shape)}, all tokens by all "
                    "tokens, which chunks of them (sequence_parallel.chunk) do not have: say the "
                    "mask by causal, window or segments of drivetrain.attention"
                )

    def take(self) -> list[torch.Tensor]:
        """The tensors, which are no longer held here: autograd decides where they wait."""
        found, self._tensors = self._tensors, []
        return found

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments with ``tensors`` in their places."""
        leaves = list(self._others)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        found: tuple[Sequence[Any], dict[str, Any]] = tree_unflatten(leaves, self._spec)
        return found

    def cut(self, tensors: Sequence[torch.Tensor], part: range) -> list[torch.Tensor]:
        """A chunk's part of each."""
        return [
            x if dim is None else x.narrow(dim, part.start, len(part))
            for x, dim in zip(tensors, self.dims, strict=True)
        ]


class Results:
    """Results of chunks, put together as they come.

    Args:
        length: tokens of all chunks.
        name: of the block, for errors.
    """

    def __init__(self, length: int, name: str) -> None:
        self._length = length
        self._name = name
        self._spec: TreeSpec | None = None
        self._whole: list[torch.Tensor | None] = []
        self._given: list[bool] = []

    def put(self, output: Any, part: range) -> None:
        """Take a chunk's result.

        Raises:
            TrainingError: it is not one for each token.
        """
        leaves, self._spec = tree_flatten(output)
        if not self._whole:
            self._whole = [None if x is None else self._empty(x, part) for x in leaves]
        for whole, leaf in zip(self._whole, leaves, strict=True):
            if whole is not None:
                whole.narrow(1, part.start, len(part)).copy_(leaf)

    def take(self) -> list[torch.Tensor]:
        """The whole tensors, which are no longer held here."""
        found = [x for x in self._whole if x is not None]
        self._given = [x is not None for x in self._whole]
        self._whole = []
        return found

    def of(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The block's result with ``tensors`` in the places of those that were taken."""
        assert self._spec is not None, "a chunk's result was put"
        following = iter(tensors)
        leaves = [next(following) if given else None for given in self._given]
        return tree_unflatten(leaves, self._spec)

    def _empty(self, x: Any, part: range) -> torch.Tensor:
        fits = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1
        if not fits or x.shape[1] != len(part):
            what = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise TrainingError(
                f"{self._name} returns something that is not one for each of its tokens ({what}), "
                "so it cannot be computed in chunks of them: leave out sequence_parallel.chunk"
            )
        shape = (x.shape[0], self._length, *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, device=x.device)


def _tokens(x: torch.Tensor, length: int) -> int | None:
    order = (1, x.dim() - 2) if x.dim() > 2 else (x.dim() - 1, 0)
    return next((dim for dim in order if dim >= 0 and x.shape[dim] == length), None)
