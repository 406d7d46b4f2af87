"""Kernels in Triton for every kind of device that it compiles for.

They serve where a package has no kernels of its own (XPU), and where it has but cannot build them
(a GPU without nvcc or hipcc). Under ``TRITON_INTERPRET=1`` they run on the host, which is how their
arithmetic is tested. Triton is imported at the first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drivetrain.errors import BuildError
from drivetrain_kernels.gpu.call import all_native
from drivetrain_kernels.native.trust import trusted_folder
from drivetrain_kernels.provider import Make
from drivetrain_kernels.registry import registry

OPS = (
    *("adagrad", "adam", "lamb", "lion", "sgd"),
    *("cast_copy", "norm_squared"),
    *("dequantize", "dequantize_reduce_quantize", "quantize"),
    *("mean_signs", "pack_signs"),
    *("block_sparse_attention", "block_sparse_attention_backward"),
)
"""What is written in Triton. Lists of tensors of any dtype, as flattening has, do not suit it."""


def triton_kernel(op: str) -> Make | None:
    """What makes the Triton implementation of an op; ``None`` where there is none.

    The function made raises ``BuildError`` where Triton is not installed.
    """
    return (lambda: _make(op)) if op in OPS else None


def _make(op: str) -> Callable[..., Any]:
    try:
        from drivetrain_kernels.triton_kernels import launch
    except ImportError as error:
        raise BuildError(
            f"triton cannot be imported ({error}); install the one that this torch is made for"
        ) from error
    _check_cache()
    function: Callable[..., Any] = getattr(launch, op)
    (declared,) = (each for each in registry.ops() if each.name == op)
    reference = torch.no_grad()(declared.reference)

    def run(*arguments: Any) -> Any:
        return (function if all_native(arguments) else reference)(*arguments)

    return run


def _check_cache() -> None:
    """Make sure that others cannot put code where Triton keeps what it has compiled.

    Raises:
        BuildError: they can.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    chosen = os.environ.get("TRITON_CACHE_DIR")
    cache = Path(chosen) if chosen else home / ".triton" / "cache"
    try:
        trusted_folder(cache, "TRITON_CACHE_DIR")
    except OSError as error:
        raise BuildError(f"triton's cache {cache} cannot be used: {error}") from error
