"""What waits for which copy, on streams that only note it: a device could do it in any order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam
from drivetrain_offload.host.copies import Lanes, Reached
from drivetrain_offload.host.side import HostSide
from offload_harness import adopt, opened, place, spec_of, step, values


class Noted:
    def __init__(self, after: Iterable[Any]) -> None:
        self.after = list(after)
        self.awaited: list[str] = []

    def wait(self) -> None:
        self.awaited.append("wait")

    def synchronize(self) -> None:
        self.awaited.append("synchronize")


class NotingStream:
    """Copies at once."""

    def __init__(self) -> None:
        self.copies: list[Noted] = []
        self.marks: list[Noted] = []

    def mark(self) -> Noted:
        self.marks.append(Noted([]))
        return self.marks[-1]

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = ()) -> Noted:
        for target, source in pairs:
            target.copy_(source)
        self.copies.append(Noted(after))
        return self.copies[-1]


def steps(precision: str, count: int, **section: Any) -> tuple[NotingStream, NotingStream]:
    """Streams down and up of some steps."""
    rule = FusedAdam(lr=1e-2)
    with opened() as job:
        (home,) = place(job, [spec_of(rule, precision)], **section)
        down, up = home.side.down, home.side.up = NotingStream(), NotingStream()
        home.side.lanes.grow(4 * home.spec.numel, 4 * home.spec.numel)
        adopt(home)
        for number in range(count):
            step(home, values(home.spec, number, home.spec.gradient_dtype), rule.defaults)
        home.flush()
    return down, up


def test_a_late_update_waits_for_its_gradient_and_so_do_those_who_overwrite_that() -> None:
    down, _ = steps("bf16", 2, delayed_update=True)
    assert [sorted(copy.awaited) for copy in down.copies] == [["synchronize", "wait"]] * 2


@pytest.mark.parametrize("mode", ["delayed_update", "super_offload"])
def test_an_update_waits_until_what_it_overwrites_has_gone_up(mode: str) -> None:
    _, up = steps("bf16", 3, **{mode: True})
    assert "synchronize" in up.copies[0].awaited
    assert "synchronize" in up.copies[1].awaited


@pytest.mark.parametrize("section", [{}, {"super_offload": True}], ids=str)
def test_parameters_come_down_when_asked_for_and_after_those_before_have_gone_up(
    monkeypatch: pytest.MonkeyPatch, section: dict[str, Any]
) -> None:
    monkeypatch.setattr(HostSide, "is_near", lambda self, device: False)
    down, up = steps("fp32", 2, **section)
    gradient, parameters = down.copies[2:]
    assert parameters.after == [down.marks[-1]]  # which the update has made
    assert down.marks[-1] not in gradient.after
    assert "wait" in up.copies[0].awaited  # before that mark, on the stream that it is on


def test_what_goes_up_waits_for_all_that_the_rank_did_before_it_asked() -> None:
    for section in ({"super_offload": True}, {"delayed_update": True}):
        down, up = steps("bf16", 2, **section)
        marks = {*down.marks, *up.marks}
        assert all(marks & set(copy.after) for copy in up.copies)


# -- lanes -----------------------------------------------------------------------------------------


class Owner:
    pass


def filled(lane: Any) -> Reached:
    return Reached()


def test_lanes_are_stolen_only_by_those_who_may() -> None:
    lanes = Lanes(torch.empty)
    lanes.grow(8, 8)
    owners = [Owner() for _ in range(4)]
    held = [lanes.claim(owner, filled, steal=False) for owner in owners]
    assert held[3] is None
    assert len({id(lane) for lane in held[:3]}) == 3
    stolen = lanes.claim(owners[3], filled, steal=True)
    assert stolen is held[2]  # the one that is needed last
    assert [lanes.holds(held[i], owners[i]) for i in range(3)] == [True, True, False]
    lanes.release(held[2], owners[2])  # it is not that owner's any more
    assert lanes.holds(stolen, owners[3])


def test_lanes_of_buckets_that_are_gone_are_free() -> None:
    lanes = Lanes(torch.empty)
    lanes.grow(8, 8)
    for _ in range(9):
        assert lanes.claim(Owner(), filled, steal=False) is not None


def test_lanes_grow_to_the_largest_bucket_of_all_engines() -> None:
    sizes: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    lanes = Lanes(allocate)
    lanes.grow(8, 4)
    lanes.grow(6, 2)
    lanes.grow(6, 16)
    assert sizes == [8, 4] * 3 + [8, 16] * 3
