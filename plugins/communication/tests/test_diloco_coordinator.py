"""Who takes part in an exchange between replicas, and what travels when."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from drivetrain_communication.diloco.calendar import Calendar
from drivetrain_communication.diloco.coordinator import FOUNDING, Coordinator


class Heard:
    """A replica of the coordinator's, and what it was told."""

    def __init__(
        self, coordinator: Coordinator, number: int, step: int = 0, count: int = 2
    ) -> None:
        self.coordinator, self.number = coordinator, number
        self.told: list[Mapping[str, Any]] = []
        coordinator.come(number, step, {"replicas": count}, self.told.append)

    def last(self) -> str:
        return str(self.told[-1]["do"]) if self.told else ""


def test_an_exchange_that_fails_is_tried_again_without_those_that_have_ended() -> None:
    coordinator = Coordinator([].append)
    first, second = Heard(coordinator, 0), Heard(coordinator, 1)
    assert first.last() == second.last() == "exchange"
    coordinator.answer(0, succeeded=True)
    coordinator.answer(1, succeeded=True)
    assert first.told[-1] == {"do": "decision", "commit": True}
    coordinator.ask(0, 4, 0)
    coordinator.ask(1, 4, 0)
    coordinator.answer(0, succeeded=False)
    assert first.last() == "exchange"  # replica 1 has not said how it went
    coordinator.gone(1, "ended")
    assert first.told[-1] == {"do": "decision", "commit": False}
    coordinator.ask(0, 4, 0)
    assert first.told[-1]["members"] == first.told[-1]["givers"] == [0]


def test_replicas_that_cannot_reach_each_other_are_told_so() -> None:
    coordinator = Coordinator([].append)
    members = [Heard(coordinator, number) for number in range(2)]
    for attempt in range(3):
        for member in members:
            coordinator.answer(member.number, succeeded=False)
        assert members[0].last() == ("decision" if attempt < 2 else "refuse")
        for member in members if attempt < 2 else ():
            coordinator.ask(member.number, 0, FOUNDING)


def test_the_founder_that_has_come_furthest_hands_over() -> None:
    coordinator = Coordinator([].append)
    Heard(coordinator, 0, step=0)
    second = Heard(coordinator, 1, step=8)
    assert second.told[-1]["source"] == 1
    assert second.told[-1]["step"] == 8


def test_replicas_out_of_step_or_of_another_recipe_are_refused() -> None:
    coordinator = Coordinator([].append)
    members = [Heard(coordinator, number) for number in range(2)]
    for member in members:
        coordinator.answer(member.number, succeeded=True)
    other = Heard(coordinator, 2, count=3)
    assert "replicas = 3, replica 0 has 2" in str(other.told[-1]["why"])
    coordinator.ask(0, 4, 0)
    coordinator.ask(1, 8, 0)
    assert all("not in step" in str(member.told[-1]["why"]) for member in members)


@pytest.mark.parametrize(("inner", "fragments"), [(4, 1), (10, 3), (7, 7)])
def test_every_fragment_travels_once_in_every_so_many_steps(inner: int, fragments: int) -> None:
    calendar = Calendar(inner, fragments, 0)
    due = [calendar.due(step) for step in range(1, 5 * inner + 1)]
    for fragment in range(fragments):
        steps = [step for step, found in enumerate(due, 1) if found == fragment]
        assert {b - a for a, b in pairwise(steps)} == {inner}
        assert len(steps) == 5
