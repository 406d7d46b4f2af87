"""Triton kernels for tensors in Intel GPUs; registered through ``drivetrain.kernels``."""

from __future__ import annotations

from drivetrain_kernels import Provider, ops
from drivetrain_kernels.triton_kernels import triton_kernel


def register(provider: Provider) -> None:
    """Offer what is written in Triton; lists of tensors are flattened by the references."""
    for op in ops():
        make = triton_kernel(op.name)
        if make is not None:
            provider.implement_later(op.name, make)
