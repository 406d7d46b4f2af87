"""Native kernels for tensors in NVIDIA GPUs; registered through ``drivetrain.kernels``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from drivetrain_kernels import Provider
from drivetrain_kernels.gpu import gpu_library, offer
from drivetrain_kernels.native import NativeLibrary, Toolchain
from drivetrain_kernels.triton_kernels import triton_kernel

AHEAD_OF_TIME = ("80", "90", "100")
"""Compute capabilities that ``drivetrain build --all`` compiles for: A100, H100, B200."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    # Products and sums round one by one, as on every other device.
    "-fmad=false",
)


def register(provider: Provider) -> None:
    """Offer every op for the devices present; Triton serves where nvcc is missing."""
    # ROCm's torch calls its devices cuda too.
    if torch.version.cuda is not None and torch.cuda.is_available():
        offer(provider, kernel_library(present()), otherwise=triton_kernel)
    if nvcc().found():
        provider.also_builds([kernel_library((each,)) for each in AHEAD_OF_TIME])


@cache
def kernel_library(architectures: tuple[str, ...]) -> NativeLibrary:
    """The kernels compiled for some compute capabilities, e.g. ``("90",)``."""
    return gpu_library(
        f"drivetrain_cuda_sm_{'_'.join(architectures)}",
        toolchain=nvcc(),
        flags=flags_for(architectures),
        prebuilt=Path(__file__).parent / "prebuilt",
    )


def flags_for(architectures: Sequence[str]) -> tuple[str, ...]:
    """Flags of nvcc for machine code of these compute capabilities."""
    return (*FLAGS, *(f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures))


def present() -> tuple[str, ...]:
    """Compute capabilities of the devices that this process sees, each once."""
    found = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return names_of(sorted(set(found)))


def names_of(capabilities: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """``"90"`` for (9, 0)."""
    return tuple(f"{major}{minor}" for major, minor in capabilities)


@cache
def nvcc() -> Toolchain:
    """CUDA's compiler: ``CUDACXX``, else on ``PATH``, else in ``CUDA_HOME`` or its usual place."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return Toolchain("CUDA C++", "CUDACXX", ("nvcc", f"{home}/bin/nvcc"))
