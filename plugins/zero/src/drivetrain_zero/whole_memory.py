"""Memory of gathered parameters, which comes and goes while the tensor over it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain.home import ParameterHome


class WholeMemory:
    """Memory for all parameters of a bucket; taken at first.

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
        self.tensor, self._give_back = self._allocate(numel)

    def _allocate(self, numel: int) -> tuple[torch.Tensor, Callable[[], None] | None]:
        found = None if self._keeper is None else self._keeper.place(numel)
        return found or (self._empty.new_empty(numel), None)

    def take(self) -> None:
        """Have memory behind the tensor."""
        storage = self.tensor.untyped_storage()
        if self._give_back is None and storage.nbytes() == 0:
            storage.resize_(self.tensor.nbytes)

    def give_back(self) -> None:
        """Have no memory behind the tensor."""
        if self._give_back is None:
            self.tensor.untyped_storage().resize_(0)
        else:
            self._give_back()

    def leave_to_clients(self) -> bool:
        """Take other memory if a client may hold an array of this; answers whether that is so."""
        # Torch forbids to resize a storage that ``numpy()`` was called on; others do not tell.
        resizable = self.tensor.untyped_storage().resizable()
        is_held = not resizable if self._give_back is None else self.is_lent
        if is_held:
            self.tensor, self._give_back = self._allocate(self.tensor.numel())
        self.is_lent = False
        return is_held
