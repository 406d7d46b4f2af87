"""Where reductions go between other collectives, ranks send them in the same turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from drivetrain.states.gradients import GradientBucket, GradientReducer, Slot


@dataclass(eq=False)
class Noted(GradientBucket):
    """Writes down when it is sent, and adds nothing up."""

    log: ClassVar[list[str]] = []
    parameter: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.ones(2)))

    def __post_init__(self) -> None:
        self.slots = [Slot(self.key, self.parameter, 0, self)]
        super().restart()

    def add(self, slot: Slot, gradient: torch.Tensor) -> None:
        pass

    def unsent(self, slot: Slot) -> torch.Tensor:
        return self.parameter.detach()

    def send(self) -> None:
        self.log.append(self.key)

    def collect(self) -> None:
        pass

    def add_late(self) -> None:
        pass


def turns(late: bool) -> list[str]:
    """What is sent when in the second of two backwards, after the first had a late gradient."""
    Noted.log = log = []
    last, first = Noted("last", "data"), Noted("first", "data")
    nobody: Any = None
    reducer = GradientReducer([last, first], nobody, every_backward=True)
    reducer.in_turn = True
    for number in range(2):
        log.clear()
        reducer.begin_backward(last=False, local=False)
        last.parameter.sum().backward()
        reducer.passed([last])
        log.append("gather")
        if late and number == 0:
            last.parameter.sum().backward()
        first.parameter.sum().backward()
        reducer.passed([first])
        reducer.end_backward()
    reducer.close()
    return log


def test_a_late_gradient_of_this_rank_does_not_move_what_it_sends_afterwards() -> None:
    assert turns(late=True) == turns(late=False) == ["last", "gather", "first"]
