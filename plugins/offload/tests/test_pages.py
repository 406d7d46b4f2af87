"""Host memory under one tensor: whole pages that the system gets back at once."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io.memory import ALIGNMENT, HUGE_PAGE, Pages

NEEDS_MADVISE = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its figures")
LARGE = 64 << 20


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


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


@NEEDS_MADVISE
def test_what_was_given_back_is_the_systems_and_may_be_used_again() -> None:
    pages = Pages(LARGE, torch.uint8)
    place = pages.tensor.data_ptr()
    before = resident()
    for value in (3, 5):
        pages.tensor.fill_(value)
        assert resident() - before > LARGE - (4 << 20)
        pages.give_back()
        assert resident() - before < 4 << 20
        assert pages.tensor.data_ptr() == place
        assert not pages.tensor[::4096].any()
        pages.give_back()


def test_a_tensor_keeps_the_memory_of_pages_that_nobody_holds() -> None:
    tensor = Pages(1 << 20, torch.float32).tensor.fill_(7.0)
    assert torch.equal(tensor, torch.full((1 << 20,), 7.0))
