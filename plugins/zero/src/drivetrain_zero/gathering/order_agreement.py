"""Ranks learn the order of units together, at the end of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Communicator, Op, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain_zero.gathering.order import learned

if TYPE_CHECKING:
    from drivetrain_zero.gathering.gathering import Gathering


def agree_on_order(communicator: Communicator, gathering: Gathering) -> None:
    """Learn the order of units together, where any rank has left the known one.

    This is also where ranks wait for each other's updates before they gather.

    Raises:
        TrainingError: ranks gathered units in different orders.
    """
    tag = Tag(Purpose.CONTROL, site="order of units")
    digest, gathering.gathers = 0 if gathering.alone else gathering.gathers, 0
    votes = torch.tensor([digest, -digest, gathering.left_order], dtype=torch.float32)
    communicator.all_reduce(votes, "data", tag, op=Op.MAX)
    if votes[0] != -votes[1]:
        raise TrainingError(
            "ranks gathered the units of the model in different orders in this step, so their "
            "weights may have been mixed up: see 'ranks that walk differently' in the README "
            "of drivetrain-zero"
        )
    if votes[2]:
        gathering.left_order = False
        _learn_orders(communicator, gathering)


def _learn_orders(communicator: Communicator, gathering: Gathering) -> None:
    forward, backward = gathering.last_forward, gathering.last_backward
    count, ahead, back = len(gathering.units), gathering.forward_order, gathering.backward_order
    # A rank may have walked nowhere, since all was whole; the first one's order counts.
    ahead = ahead if forward is None else learned(forward.visited, count)
    back = back if backward is None else learned(backward.visited, count)
    gathering.forward_order = _from_first(communicator, ahead)
    gathering.backward_order = _from_first(communicator, back)


def _from_first(communicator: Communicator, order: list[int]) -> list[int]:
    """The first rank's list of numbers."""
    tag = Tag(Purpose.CONTROL, site="order of units")
    length = torch.tensor([len(order)])
    communicator.broadcast(length, "data", tag)
    numbers = torch.zeros(int(length), dtype=torch.int64)
    known = torch.tensor(order[: int(length)], dtype=torch.int64)
    numbers[: known.numel()] = known
    communicator.broadcast(numbers, "data", tag)
    return [int(number) for number in numbers]
