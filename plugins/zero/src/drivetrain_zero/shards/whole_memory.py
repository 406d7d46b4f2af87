"""Memory of gathered parameters, which comes and goes while the tensor over it stays."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain.contracts import ParameterHome, Place


class WholeMemory:
    """Memory for all parameters of a bucket; take it before it is written.

    Tensors that autograd has saved are views of it, so its storage object has to stay.

    Args:
        numel: elements of :attr:`tensor`.
        dtype: theirs.
        device: where it is.
        keeper: where parameters are fetched from, which may know a better place for them.

    Attributes:
        tensor: flat.
        is_lent: whether clients may have taken arrays of it that they hold for good.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, device: torch.device, keeper: ParameterHome | None
    ) -> None:
        self._keeper = keeper
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self.is_lent = False
        self._allocate(numel)

    def _allocate(self, numel: int) -> None:
        place = None if self._keeper is None else self._keeper.place(numel)
        self._is_placed = place is not None
        self._is_there = not self._is_placed
        self.tensor, self._give_back, self._take = place or self._resizable(numel)

    def _resizable(self, numel: int) -> Place:
        tensor = self._empty.new_empty(numel)
        storage, nbytes = tensor.untyped_storage(), tensor.nbytes
        return tensor, partial(storage.resize_, 0), partial(storage.resize_, nbytes)

    def take(self) -> None:
        """Have memory behind the tensor, if there is none."""
        if not self._is_there:
            self._take()
            self._is_there = True

    def give_back(self) -> None:
        """Have no memory behind the tensor."""
        if self._is_there:
            self._give_back()
            self._is_there = False

    def leave_to_clients(self) -> bool:
        """Take other memory if a client may hold an array of this; return whether that is so."""
        # Torch forbids to resize a storage that ``numpy()`` was called on; others do not tell.
        is_fixed = not self.tensor.untyped_storage().resizable()
        is_held = self.is_lent if self._is_placed else is_fixed
        if is_held:
            self._allocate(self.tensor.numel())
        self.is_lent = False
        return is_held
