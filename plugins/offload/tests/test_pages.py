"""Host memory that comes and goes: as much as is taken at once, each byte its owner's meanwhile."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io import pages as module
from drivetrain_offload.file_io.pages import ALIGNMENT, HUGE_PAGE, Pages
from hypothesis import given, settings
from hypothesis import strategies as st

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its figures")
LARGE = 64 << 20
LITTLE = 4 << 20


@pytest.fixture(params=["passed on", "given to the system"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an ``mremap`` that leaves the old place mapped, and without."""
    if request.param == "given to the system":
        monkeypatch.setattr(module, "_MOST_FRAMES", 0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    count = int(Path("/proc/self/statm").read_text().split()[1])
    return count * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("numel", [1, 1000, 4096, 3_000_001])
def test_memory_is_zero_and_begins_at_a_page(numel: int, dtype: torch.dtype) -> None:
    tensor = Pages(numel, dtype).tensor
    assert tensor.shape == (numel,)
    assert tensor.dtype is dtype
    assert tensor.data_ptr() % (HUGE_PAGE if tensor.nbytes >= HUGE_PAGE else ALIGNMENT) == 0
    assert not tensor.any()


def test_an_empty_tensor_needs_none() -> None:
    assert Pages(0, torch.float32).tensor.numel() == 0


@ON_LINUX
@pytest.mark.usefixtures("way")
def test_tensors_that_take_turns_hold_as_much_as_one() -> None:
    before = resident()
    held = [Pages(LARGE, torch.uint8) for _ in range(4)]
    places = [pages.tensor.data_ptr() for pages in held]
    for turn in range(8):
        pages = held[turn % 4]
        pages.take()
        pages.tensor.fill_(turn)
        assert bool((pages.tensor == turn).all())
        assert LARGE - LITTLE < resident() - before < LARGE + LITTLE
        pages.give_back()
    assert [pages.tensor.data_ptr() for pages in held] == places
    del held, pages
    assert resident() - before < LITTLE


@ON_LINUX
def test_memory_is_passed_on_without_being_cleared() -> None:
    """That is what it is for; a kernel without the call is served, but slower."""
    if module._mremap() is None:
        pytest.skip("this kernel leaves no old place mapped")
    first, second = Pages(LARGE, torch.uint8), Pages(LARGE // 2, torch.uint8)
    first.take()
    first.tensor.fill_(7)
    first.give_back()
    second.take()
    assert bool((second.tensor == 7).all())


def test_memory_of_several_donors_is_passed_on_as_a_whole() -> None:
    small = [Pages(HUGE_PAGE, torch.uint8) for _ in range(4)]
    for value, pages in enumerate(small):
        pages.take()
        pages.tensor.fill_(value)
    for pages in small:
        pages.give_back()
    gathered, last = (Pages(4 * HUGE_PAGE, torch.uint8) for _ in range(2))
    gathered.take()
    gathered.tensor.fill_(9)
    gathered.give_back()
    last.take()
    assert bool((last.tensor == 9).all()) or module._mremap() is None
    last.tensor.fill_(1)
    assert bool((last.tensor == 1).all())


@ON_LINUX
def test_where_a_move_fails_there_is_memory_all_the_same() -> None:
    move = module._mremap()
    if move is None:
        pytest.skip("this kernel leaves no old place mapped")
    tensor = Pages(2 * HUGE_PAGE, torch.uint8).tensor.fill_(3)
    assert not move(tensor.data_ptr() + 1, HUGE_PAGE, tensor.data_ptr() + HUGE_PAGE)
    tensor.fill_(4)
    assert bool((tensor == 4).all())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5 * HUGE_PAGE), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=25),
)
def test_nobody_else_writes_what_is_taken(sizes: list[int], moves: list[tuple[int, bool]]) -> None:
    held = [Pages(size, torch.uint8) for size in sizes]
    values: dict[int, int] = {}
    for number, (which, takes) in enumerate(moves):
        at = which % len(held)
        if takes and at not in values:
            held[at].take()
            values[at] = number + 1
            held[at].tensor.fill_(number + 1)
        elif not takes and at in values:
            del values[at]
            held[at].give_back()
        for other, value in values.items():
            assert bool((held[other].tensor == value).all())


def test_a_tensor_keeps_the_memory_of_pages_that_nobody_holds() -> None:
    tensor = Pages(1 << 20, torch.float32).tensor.fill_(7.0)
    assert torch.equal(tensor, torch.full((1 << 20,), 7.0))
