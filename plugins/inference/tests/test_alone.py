"""Steps that are cut into parts give what torch gives as a whole."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference.alone import as_float32, highest
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("shape", [(1, 49152), (3, 20000), (5, 7), (8, 40000), (0, 9), (1, 1)])
def test_the_highest_of_each_row_is_the_first_of_equals(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(highest(rows), rows.argmax(dim=1))
    equal = torch.zeros(shape)
    assert torch.equal(highest(equal), equal.argmax(dim=1))


def test_what_is_no_number_is_the_highest_as_it_is_for_torch():
    rows = torch.ones(2, 30000)
    rows[0, 25000] = rows[1, 3] = float("nan")
    rows[0, 29000] = float("inf")
    assert highest(rows).tolist() == rows.argmax(dim=1).tolist() == [25000, 3]


def test_other_devices_search_by_one_kernel():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **(kwargs or {}))

    made = []
    with Calls():
        highest(torch.empty(1, 49152, device="meta"))
    assert made[1:] == [torch.ops.aten.argmax.default]


@pytest.mark.parametrize("shape", [(1, 49152), (3, 20001), (20, 20000), (0, 9)])
def test_a_copy_is_the_caller_s(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for given in (values, values.float(), values.t()):
        copied = as_float32(given)
        assert torch.equal(copied, given.float())
        assert copied.is_contiguous()
        assert copied.data_ptr() != given.data_ptr() or not given.numel()
