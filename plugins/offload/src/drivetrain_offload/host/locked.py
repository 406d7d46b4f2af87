"""Know which host memory is page-locked; torch tells it of its own devices only."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Accelerator

_locked: set[int] = set()
"""The storages of tensors that :func:`lock` has returned, as long as these are held."""


def lock(accelerator: Accelerator, plain: torch.Tensor) -> torch.Tensor:
    """A page-locked copy of a host tensor; it counts as locked until the tensor itself is gone.

    Raises:
        RuntimeError: the system does not lock so much.
    """
    pinned = accelerator.pin_memory(plain)
    if accelerator.device_type != "cpu":
        storage = pinned.untyped_storage()._cdata
        _locked.add(storage)
        weakref.finalize(pinned, _locked.discard, storage)
    return pinned


def is_locked(tensor: torch.Tensor) -> bool:
    """Whether a host tensor lies in memory of :func:`lock`."""
    return tensor.untyped_storage()._cdata in _locked
