"""How a tensor of which each rank has a part travels to another stage of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.world.communicator import Communicator


class SentInParts:
    """Mixed into a class of tensors that show a whole of which this rank has a part.

    A stage sends the part alone. The ranks of another stage have parts in the same places, so the
    receiver makes the same of it.
    """

    def sent(self) -> tuple[torch.Tensor, Mapping[str, int]]:
        """Return a plain tensor in autograd's graph, and what :meth:`received` needs beside it."""
        raise NotImplementedError

    @classmethod
    def received(
        cls, part: torch.Tensor, facts: Mapping[str, int], communicator: Communicator
    ) -> torch.Tensor:
        """Return what was sent, in the graph of ``part``.

        Args:
            part: the plain tensor.
            facts: that came with it.
            communicator: of the receiving rank.
        """
        raise NotImplementedError
