"""Compiles every Triton kernel, for the device that the arguments name; needs no device.

    python compile_triton_kernels.py cuda 90 32

The kernels are those that the examples of the ops reach. Prints how many were compiled.
"""

from __future__ import annotations

import copy
import sys

import torch
import triton
from drivetrain_kernels import ops
from drivetrain_kernels.triton_kernels import OPS, block_sparse_launch, launch, triton_kernel
from triton.backends.compiler import GPUTarget

backend, architecture, warp = sys.argv[1:]
TARGET = GPUTarget(
    backend, int(architecture) if architecture.isdecimal() else architecture, int(warp)
)
compiled = set()


class NoDevice:
    """What the compiler asks of a driver."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(kernel, programs, *arguments):
    made = kernel.warmup(*arguments, grid=(programs,), enable_fp_fusion=False)
    compiled.add(made.hash)


def compile_grid(kernel, grid, *arguments):
    compiled.add(kernel.warmup(*arguments, grid=grid).hash)


def sample(op):
    """A few examples that differ in dtypes, formats and rounding."""
    examples = [
        each for each in op.examples(torch.device("cpu")) if "0" not in each.label.split("-")
    ]
    return examples[:: max(1, len(examples) // 6)]


triton.runtime.driver.set_active(NoDevice())
launch._run = compile_only
block_sparse_launch.launch = compile_grid
for op in ops():
    if op.name in OPS:
        for example in sample(op):
            triton_kernel(op.name)()(*copy.deepcopy(example.arguments))
sys.stdout.write(f"compiled {len(compiled)}\n")
