"""How much memory of the C++ device is in use."""

from __future__ import annotations

import gc
import time

import torch

QUIET = 8
"""Looks at the memory, one after another, that have to agree."""


def allocated() -> int:
    """Bytes in use, once threads that have just finished a task have let go of it.

    Threads of gloo and of autograd wake whoever waits for them before they drop their tensors.
    """
    gc.collect()
    torch.warp.synchronize()  # type: ignore[attr-defined]
    seen: list[int] = []
    while len(seen) < QUIET or len(set(seen[-QUIET:])) > 1:
        seen.append(torch.warp.memory_allocated())  # type: ignore[attr-defined]
        time.sleep(0.01)
    return seen[-1]
