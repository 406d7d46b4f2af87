"""Native kernels for tensors in AMD GPUs; registered through ``drivetrain.kernels``.

Torch calls these devices ``cuda``, so the module serves that device type where torch is built for
ROCm, and nothing elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from drivetrain_kernels import Provider
from drivetrain_kernels.gpu import gpu_library, offer
from drivetrain_kernels.native import NativeLibrary, Toolchain
from drivetrain_kernels.triton_kernels import triton_kernel

AHEAD_OF_TIME = ("gfx90a", "gfx942")
"""Architectures that ``drivetrain build --all`` compiles for: MI200 and MI300."""

FLAGS = (
    "-x",
    "hip",
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Products and sums round one by one, as on every other device.
    "-ffp-contract=off",
)


def register(provider: Provider) -> None:
    """Offer every op for the devices present; Triton serves where hipcc is missing."""
    if torch.version.hip is not None and torch.cuda.is_available():
        offer(provider, kernel_library(present()), otherwise=triton_kernel)
    if hipcc().found():
        provider.also_builds([kernel_library((each,)) for each in AHEAD_OF_TIME])


@cache
def kernel_library(architectures: tuple[str, ...]) -> NativeLibrary:
    """The kernels compiled for some architectures, e.g. ``("gfx942",)``."""
    return gpu_library(
        f"drivetrain_rocm_{'_'.join(architectures)}",
        toolchain=hipcc(),
        flags=flags_for(architectures),
        prebuilt=Path(__file__).parent / "prebuilt",
    )


def flags_for(architectures: Sequence[str]) -> tuple[str, ...]:
    """Flags of hipcc for machine code of these architectures."""
    return (*FLAGS, *(f"--offload-arch={each}" for each in architectures))


def present() -> tuple[str, ...]:
    """Architectures of the devices that this process sees, each once."""
    devices = range(torch.cuda.device_count())
    return names_of(torch.cuda.get_device_properties(index).gcnArchName for index in devices)


def names_of(targets: Iterable[str]) -> tuple[str, ...]:
    """``"gfx90a"`` for ``gfx90a:sramecc+:xnack-``; sorted, each once."""
    return tuple(sorted({target.partition(":")[0] for target in targets}))


@cache
def hipcc() -> Toolchain:
    """HIP's compiler: ``HIPCXX``, else on ``PATH``, else in ``ROCM_PATH`` or its usual place."""
    home = os.environ.get("ROCM_PATH") or "/opt/rocm"
    # Where there is nvcc too, hipcc would compile for NVIDIA.
    environment = (("HIP_PLATFORM", "amd"),)
    return Toolchain("HIP", "HIPCXX", ("hipcc", f"{home}/bin/hipcc"), environment)
