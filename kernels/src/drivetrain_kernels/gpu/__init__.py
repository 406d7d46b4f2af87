"""What packages for GPUs share: one set of sources for CUDA and HIP, and the calls into them.

The sources in ``native/`` compile with nvcc and with hipcc; the few differences are in
``portability.h``. A package brings the compiler and the architectures, and offers the ops::

    library = gpu_library("acme_gpu", toolchain=NVCC, flags=("-gencode=...",))
    offer(provider, library)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from drivetrain_kernels.gpu import codes, copies, quantization, signs, updates
from drivetrain_kernels.gpu.call import Kernels, Streams, all_native, current_stream
from drivetrain_kernels.native import NativeLibrary, Toolchain
from drivetrain_kernels.op import Op
from drivetrain_kernels.provider import Make, Provider
from drivetrain_kernels.registry import ops

__all__ = ["BINDINGS", "Kernels", "current_stream", "gpu_library", "offer"]

NATIVE = Path(__file__).parent / "native"
SOURCES = ("optimizers", "lamb", "norms", "copies", "quantization", "signs", "codes")
HEADERS = ("portability", "values", "update", "tensors")

BINDINGS = {
    **codes.BINDINGS,
    **copies.BINDINGS,
    **quantization.BINDINGS,
    **signs.BINDINGS,
    **updates.BINDINGS,
}
"""Op name -> what makes the function, given the loaded kernels."""


def gpu_library(
    name: str,
    *,
    toolchain: Toolchain,
    flags: Sequence[str],
    link_flags: Sequence[str] = (),
    prebuilt: Path | None = None,
) -> NativeLibrary:
    """The GPU sources as one library.

    Args:
        name: unique name, with the architectures.
        toolchain: a compiler of CUDA C++ or HIP.
        flags: its flags, with architectures; arithmetic must not be contracted or relaxed.
        link_flags: its flags for linking.
        prebuilt: folder of binaries shipped in the package's wheel.
    """
    return NativeLibrary(
        name,
        [NATIVE / f"{source}.cu" for source in SOURCES],
        headers=[NATIVE / f"{header}.h" for header in HEADERS],
        flags=flags,
        link_flags=link_flags,
        toolchain=toolchain,
        prebuilt=prebuilt,
    )


def offer(
    provider: Provider,
    library: NativeLibrary,
    *,
    streams: Streams = current_stream,
    otherwise: Callable[[str], Make | None] = lambda op: None,
) -> None:
    """Let ``provider`` implement every op with the kernels of ``library``.

    Args:
        provider: to fill.
        library: from :func:`gpu_library`.
        streams: the stream to queue kernels on.
        otherwise: op -> what makes another implementation, for where the library cannot be built or
            has no kernel for the op.
    """
    for op in ops():
        if op.name in BINDINGS:
            bind = _with_reference(op, BINDINGS[op.name], streams)
            provider.implement_native(op.name, library, bind, otherwise=otherwise(op.name))
        elif (make := otherwise(op.name)) is not None:
            provider.implement_later(op.name, make)


def _with_reference(
    op: Op, bind: Callable[[Kernels], Callable[..., Any]], streams: Streams
) -> Callable[[ctypes.CDLL], Callable[..., Any]]:
    """Leave float64, which no kernel stores, to the reference."""
    reference = torch.no_grad()(op.reference)

    def bind_both(library: ctypes.CDLL) -> Callable[..., Any]:
        native = bind(Kernels(library, streams))

        def run(*arguments: Any) -> Any:
            return (native if all_native(arguments) else reference)(*arguments)

        return run

    return bind_both
