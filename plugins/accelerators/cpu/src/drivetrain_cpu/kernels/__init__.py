"""Native kernels for tensors in host memory; registered through ``drivetrain.kernels``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from drivetrain_kernels import Op, Provider, ops
from drivetrain_kernels.native import NativeLibrary

from drivetrain_cpu.instruction_sets import InstructionSet, compilable, selected
from drivetrain_cpu.kernels import (
    block_sparse,
    codes,
    copies,
    pairs,
    quantization,
    serving,
    signs,
    updates,
)
from drivetrain_cpu.kernels.call import Bind, all_native
from drivetrain_cpu.openmp import share_openmp

NATIVE = Path(__file__).parent.parent / "native"
SOURCES = (
    "optimizers",
    "reductions",
    "copies",
    "quantization",
    "attention",
    "block_sparse",
    "codes",
    "decoder",
    "fake_quantization",
    "integers",
    "linear",
    "signs",
    "minifloats",
    "program",
    "pairs",
    "shared_group",
    "collectives",
)
HEADERS = (
    "amx",
    "attention",
    "attention_tiles",
    "bytes",
    "dtypes",
    "panels",
    "products",
    "rounding",
    "shared_group",
    "team",
    "tiles",
    "vectors",
    "waiting",
)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    # All paths round alike: no fused multiply-add, no reassociation.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)

_BINDINGS: dict[str, Bind] = {
    **block_sparse.BINDINGS,
    **codes.BINDINGS,
    **copies.BINDINGS,
    **pairs.BINDINGS,
    **quantization.BINDINGS,
    **serving.BINDINGS,
    **signs.BINDINGS,
    **updates.BINDINGS,
}


def register(provider: Provider) -> None:
    """Offer every op, from the library of the path that this machine runs best."""
    library = kernel_library(selected())
    for op in ops():
        if op.name in _BINDINGS:
            provider.implement_native(op.name, library, _with_reference(op, _BINDINGS[op.name]))
    provider.also_builds([kernel_library(path) for path in compilable()])


@cache
def kernel_library(path: InstructionSet) -> NativeLibrary:
    """The kernels compiled for one instruction set."""
    return NativeLibrary(
        f"drivetrain_cpu_{path.name}",
        [NATIVE / f"{name}.cpp" for name in SOURCES],
        headers=[NATIVE / f"{name}.h" for name in HEADERS],
        flags=(*FLAGS, *path.flags),
        prebuilt=NATIVE / "prebuilt",
        before_load=share_openmp,
    )


def _with_reference(op: Op, bind: Bind) -> Bind:
    """Leave float64, which no kernel stores, to the reference."""
    reference = torch.no_grad()(op.reference)

    def bind_both(library: ctypes.CDLL) -> Callable[..., Any]:
        native = bind(library)

        def run(*arguments: Any) -> Any:
            return (native if all_native(arguments) else reference)(*arguments)

        return run

    return bind_both
