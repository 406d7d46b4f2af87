"""Which host memory is page-locked, for tables; torch tells of its own devices' only."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Accelerator

_blocks: dict[int, int] = {}
"""First address -> end, of each block that :func:`lock` has answered and that is still held."""


def lock(accelerator: Accelerator, plain: torch.Tensor) -> torch.Tensor:
    """A page-locked copy of a host tensor; it counts as locked until the tensor itself is gone.

    Raises:
        RuntimeError: the system does not lock so much.
    """
    pinned = accelerator.pin_memory(plain)
    if accelerator.device_type != "cpu" and not pinned.is_meta:
        start = pinned.data_ptr()
        _blocks[start] = start + pinned.nbytes
        weakref.finalize(pinned, _blocks.pop, start, None)
    return pinned


def is_locked(tensor: torch.Tensor) -> bool:
    """Whether a host tensor lies in memory of :func:`lock`."""
    address = tensor.data_ptr()
    return any(start <= address < end for start, end in _blocks.items())
