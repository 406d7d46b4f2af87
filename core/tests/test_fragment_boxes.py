"""Boxes say which element of the whole lies where in a rank's flat storage."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch

from drivetrain.contracts import Box, interval_boxes, placed_boxes


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 2), (4, 1, 3)])
def test_every_interval_is_covered_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start, stop in combinations_with_replacement(range(whole.numel() + 1), 2):
        flat = whole.flatten()[start:stop]
        boxes = list(interval_boxes(shape, start, stop))
        assert sum(box.numel for box in boxes) == stop - start
        for box in boxes:
            assert torch.equal(box.of_storage(flat), box.of(whole))


def test_an_interval_of_a_placed_tensor_is_covered_over_box_borders_and_gaps() -> None:
    """A local tensor of two rectangles, between which two elements are padding."""
    whole = torch.arange(24).reshape(4, 6)
    rectangles = (Box((0, 1), (2, 3), 0), Box((2, 4), (2, 2), 8))
    local = torch.full((12,), -1)
    for box in rectangles:
        box.of_storage(local).copy_(box.of(whole))
    assert local.tolist() == [1, 2, 3, 7, 8, 9, -1, -1, 16, 17, 22, 23]
    for start, stop in combinations_with_replacement(range(13), 2):
        flat = local[start:stop]
        seen = torch.zeros(stop - start, dtype=torch.int64)
        for box in placed_boxes(rectangles, start, stop):
            assert torch.equal(box.of_storage(flat), box.of(whole)), (start, stop)
            box.of_storage(seen).add_(1)
        assert torch.equal(seen == 1, flat >= 0)
