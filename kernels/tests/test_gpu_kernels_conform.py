"""The GPU kernels satisfy the operators' conformance kit when their threads run on the host.

The sources are the very files that nvcc and hipcc compile; ``emulated_gpu.h`` stands in for the
runtime. A misaligned access, which a GPU would refuse, ends the process here too.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from drivetrain_kernels import Provider, ops
from drivetrain_kernels.gpu import gpu_library, offer
from drivetrain_kernels.native import CXX
from in_place import in_place

from drivetrain.testing.kernels import KernelConformance

EMULATED = Path(__file__).with_name("emulated_gpu.h")
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"),
    *("-fsanitize=alignment,shift,bounds", "-fsanitize-undefined-trap-on-error"),
    f'-DDRIVETRAIN_GPU_RUNTIME="{EMULATED}"',
)


@contextmanager
def no_stream(device):
    yield 0


@pytest.fixture(scope="module", autouse=True)
def emulated():
    provider = Provider("emulated", "0", "cpu")
    library = gpu_library("drivetrain_gpu_emulated", toolchain=CXX, flags=FLAGS)
    offer(provider, library, streams=no_stream)
    with in_place(provider):
        yield


class TestGpuKernels(KernelConformance):
    ops = ops("training")
    provider = "emulated"


# torch's float32 square root is off in the last place, and sums may be added in any order.
NOT_BIT_EQUAL_TO_TORCH = {"adam", "adagrad", "lamb", "norm_squared"}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in value for t in tensors(each)] if isinstance(value, (list, tuple)) else []


EXACT = [op for op in ops("training") if op.name not in NOT_BIT_EQUAL_TO_TORCH]


@pytest.mark.parametrize("op", EXACT, ids=lambda op: op.name)
def test_they_return_the_bits_of_the_reference(op):
    for example in op.examples(torch.device("cpu")):
        outcomes = []
        for function in (op.call, torch.no_grad()(op.reference)):
            arguments = copy.deepcopy(example.arguments)
            returned = function(*arguments)
            outcomes.append(tensors([returned, *(arguments[at] for at in op.mutated)]))
        for one, other in zip(*outcomes, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
