"""Follows, in the first forward of a kind, which values come from the model's parameters.

A stage sends what the next one cannot compute by itself: what was *made* by parts of the model.
Masks, positions and all else that comes from the inputs alone is computed again on every stage.
What comes from a part that this rank does not have (*unknown*) must reach nothing that counts. Both
are followed through every operator, so no model is split wrongly: one where values take another way
than through the arguments of units is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_BY_SHAPE = frozenset(
    {
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    }
)
"""Operators whose results depend on the shape of their argument only."""

_READS = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
"""Operators that tell Python a value."""


class Tracking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks storages; an operator's results have the marks of its arguments.

    Attributes:
        read: whether Python has looked at an unknown value.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, torch.UntypedStorage] = {}
        self._unknown: dict[int, torch.UntypedStorage] = {}
        self.read = False

    def note_made(self, values: object) -> None:
        """Mark the tensors in ``values`` as made by the model."""
        self._mark(self._made, values)

    def note_unknown(self, values: object) -> None:
        """Mark the tensors in ``values`` as made by what this rank does not have."""
        self._mark(self._made, values)
        self._mark(self._unknown, values)

    def is_made(self, tensor: torch.Tensor) -> bool:
        """Return whether the model has made ``tensor``."""
        return _key(tensor) in self._made

    def is_unknown(self, tensor: torch.Tensor) -> bool:
        """Return whether ``tensor`` depends on values that this rank does not have."""
        return _key(tensor) in self._unknown

    def _mark(self, marks: dict[int, torch.UntypedStorage], values: object) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                marks[_key(leaf)] = leaf.untyped_storage()  # which stays, so no other has its key

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _BY_SHAPE:
            return result
        inputs = list(_tensors((args, kwargs)))
        if any(_key(tensor) in self._unknown for tensor in inputs):
            self.read = self.read or name in _READS
            self.note_unknown((result, _written(func, args)))
        elif any(_key(tensor) in self._made for tensor in inputs):
            self.note_made((result, _written(func, args)))
        return result


def _written(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """Arguments that an operator writes to."""
    return [
        value
        for value, argument in zip(args, func._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _tensors(values: object) -> Iterable[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
