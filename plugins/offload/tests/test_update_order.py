"""Which parameters are near their states: what comes next is, and never more than there is room."""

from __future__ import annotations

from dataclasses import dataclass, field

from drivetrain_offload.parameters.update_order import UpdateOrder
from hypothesis import given
from hypothesis import strategies as st


@dataclass(eq=False)
class Bucket:
    """Notes what the order has it do."""

    name: str
    order: UpdateOrder
    nbytes: int = 1
    begins_with_reading: bool = True
    is_near: bool = False
    written: bool = True
    reads: int = 0
    log: list[str] = field(default_factory=list)

    def begin_to_bring_near(self) -> None:
        assert not self.is_near
        self.is_near = True
        self.reads += 1

    def leave(self) -> None:
        assert self.is_near
        self.is_near = False
        self.order.left(self)

    def is_written(self) -> bool:
        return self.written

    def update(self) -> None:
        self.order.begin(self)
        if self.begins_with_reading and not self.is_near:
            self.begin_to_bring_near()
        self.is_near = True
        self.order.end(self)


def buckets(count: int, room: int, **facts: bool) -> list[Bucket]:
    order = UpdateOrder(room)
    return [Bucket(str(number), order, **facts) for number in range(count)]


def near(all_of_them: list[Bucket]) -> list[str]:
    return [bucket.name for bucket in all_of_them if bucket.is_near]


def test_the_first_ones_come_as_soon_as_gradients_arrive() -> None:
    found = buckets(6, room=3)
    found[0].order.expect()
    assert near(found) == []  # nobody knows yet which comes first
    for bucket in found:
        bucket.update()
    found[0].order.expect()
    assert near(found) == ["0", "1", "2"]
    assert [bucket.reads for bucket in found] == [2, 2, 2, 1, 1, 1]


def test_the_next_ones_come_as_soon_as_those_before_are_written() -> None:
    found = buckets(6, room=3)
    for bucket in found:
        bucket.update()
    found[0].order.expect()
    found[0].written = False
    found[0].update()
    assert near(found) == ["0", "1", "2"]  # no room yet
    found[0].written, found[1].written = True, False
    found[1].update()
    assert near(found) == ["1", "2", "3"]


def test_what_fits_is_read_once() -> None:
    """What was updated is what the next step begins with."""
    found = buckets(4, room=4)
    for _ in range(3):
        found[0].order.expect()
        for bucket in found:
            bucket.update()
    assert [bucket.reads for bucket in found] == [1, 1, 1, 1]


def test_what_needs_no_reading_is_not_read_and_takes_its_turn() -> None:
    found = buckets(5, room=2, begins_with_reading=False)
    for _ in range(2):
        found[0].order.expect()
        for bucket in found:
            bucket.update()
            assert len(near(found)) <= 2
    assert sum(bucket.reads for bucket in found) == 0


def test_one_that_is_larger_than_all_room_comes_alone() -> None:
    found = buckets(3, room=2)
    found[1].nbytes = 5
    found[1].written = False
    for _ in range(2):
        found[0].order.expect()
        found[0].update()
        found[1].update()
        assert near(found) == ["1"]
        found[2].update()
        assert near(found) == ["2"]


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=7),
    st.integers(5, 15),
    st.data(),
)
def test_room_is_never_exceeded_whatever_the_order(
    sizes: list[int], room: int, data: st.DataObject
) -> None:
    order = UpdateOrder(room)
    found = [Bucket(str(number), order, nbytes) for number, nbytes in enumerate(sizes)]
    for _ in range(4):
        if data.draw(st.booleans()):
            order.expect()
        for bucket in data.draw(st.permutations(found)):
            bucket.written = data.draw(st.booleans())
            bucket.update()
            assert sum(each.nbytes for each in found if each.is_near) <= room
            if data.draw(st.booleans()):
                outside = data.draw(st.sampled_from(found))  # a checkpoint, a client
                if outside.is_near:
                    outside.leave()
