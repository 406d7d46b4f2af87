"""The one order of gathers: what a rank joins, wherever its data takes it."""

from __future__ import annotations

from drivetrain_zero.order import Pass, learned
from hypothesis import given
from hypothesis import strategies as st


def gathers(order: list[int], used: list[int]) -> list[int]:
    """What one rank gathers in a pass in which it uses some units, in the order's order."""
    walk, done = Pass(order), []
    for unit in used:
        done += [*walk.visit(unit), unit]
    return [*done, *walk.end()]


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_a_rank_that_skips_units_gathers_what_all_gather(order, skipped) -> None:
    used = [unit for unit in order if unit not in skipped]
    assert gathers(list(order), used) == list(order)


def test_units_may_come_repeatedly() -> None:
    order = [0, 1, 2, 1, 2, 3]
    assert gathers(order, [0, 2, 3]) == order
    assert gathers(order, [1, 1, 2]) == order


def test_a_unit_that_does_not_come_any_more_joins_nothing() -> None:
    walk = Pass([0, 1, 2])
    assert walk.visit(1) == [0]
    assert walk.visit(0) == ()
    assert walk.is_lost
    assert walk.left_order
    assert walk.visit(2) == []
    assert not walk.is_lost
    assert walk.left_order


def test_what_is_learned_keeps_units_that_were_not_used() -> None:
    assert learned([2, 0, 2], 4) == [2, 0, 2, 1, 3]
