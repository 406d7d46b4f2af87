"""Formats whose products skip what a call of an operator costs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch

from drivetrain.contracts import Packed, WeightFormat

Product = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] -> [rows, out]."""


class BoundFormat(WeightFormat):
    """A format that can hand out the product with one weight as a function.

    A decoder calls some hundred products a token, and dispatch and checks of an operator cost as
    much as a small product.
    """

    @abstractmethod
    def bind(self, packed: Packed, outputs: int, *, invariant: bool) -> Product:
        """The function that :meth:`multiply` is for ``packed``; arguments are not checked.

        Args:
            packed: one weight.
            outputs: rows of that weight.
            invariant: a row's bits must not depend on how many other rows there are.
        """
