"""The one order of gathers: what a rank joins, wherever its data takes it."""

from __future__ import annotations

from drivetrain_zero.gathering.order import Walk, learned
from hypothesis import given
from hypothesis import strategies as st


def steps(order: list[int], used: list[int]) -> list[tuple[int, list[int]]]:
    """What one rank gathers in a pass in which it uses some units, and what is ahead each time."""
    walk, done = Walk(order), []

    def step(unit: int) -> None:
        walk.reach(unit)
        done.append((unit, list(walk.ahead())))

    for unit in used:
        for number in [*walk.visit(unit), unit]:
            step(number)
    for number in walk.end():
        step(number)
    return done


def steps_of_all(order: list[int]) -> list[tuple[int, list[int]]]:
    return [(unit, order[place + 1 :]) for place, unit in enumerate(order)]


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_a_rank_that_skips_units_gathers_and_sees_ahead_what_all_do(order, skipped) -> None:
    used = [unit for unit in order if unit not in skipped]
    assert steps(list(order), used) == steps_of_all(list(order))


def test_units_may_come_repeatedly() -> None:
    order = [0, 1, 2, 1, 2, 3]
    assert steps(order, [0, 2, 3]) == steps_of_all(order)
    assert steps(order, [1, 1, 2]) == steps_of_all(order)


def test_a_unit_that_does_not_come_any_more_joins_nothing() -> None:
    walk = Walk([0, 1, 2])
    assert walk.visit(1) == [0]
    walk.reach(0)
    walk.reach(1)
    assert walk.visit(0) == ()
    assert walk.is_lost
    assert walk.visit(2) == []
    assert not walk.is_lost


def test_a_rank_that_gathers_alone_joins_nothing() -> None:
    walk = Walk([0, 1, 2], alone=True)
    assert walk.visit(1) == ()
    walk.reach(1)
    assert walk.ahead() == [2]
    assert walk.end() == ()


def test_what_is_learned_keeps_units_that_were_not_used() -> None:
    assert learned([2, 0, 2], 4) == [2, 0, 2, 1, 3]
