"""How a weight lies in memory when it is not a plain tensor: quantised, in groups, packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

Packed = Mapping[str, torch.Tensor]
"""The tensors that a weight is packed into, by name."""


class WeightFormat(ABC):
    """A format for weights [out, in], found by entry point (group ``drivetrain.weight_formats``).

    A class that is made without arguments. It knows neither layers nor models, nor who chose it.
    """

    @abstractmethod
    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what a weight of ``shape`` is packed into.

        Raises:
            ConfigError: such a weight cannot be packed; says why.
        """

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that :meth:`tensors` promises."""

    @abstractmethod
    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The weight of ``shape`` in ``dtype``, as near as the format can be."""

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        """``x @ weight.T`` for x [rows, in]; [rows, outputs] in the dtype of ``x``."""
        shape = (outputs, x.shape[1])
        return torch.nn.functional.linear(x, self.unpack(packed, shape, x.dtype))

    def bytes(self, shape: Sequence[int]) -> int:
        """Memory of a packed weight of ``shape``."""
        parts = self.tensors(shape).values()
        return sum(torch.Size(part).numel() * dtype.itemsize for part, dtype in parts)
