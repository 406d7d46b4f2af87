"""Whether there are NVIDIA GPUs, found out without torch and without a device context.

The driver's management library counts devices; unlike CUDA itself it leaves a process that forks
later unharmed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

Open = Callable[[str], Any]


def why_absent(environment: Mapping[str, str] = os.environ, load: Open = ctypes.CDLL) -> str | None:
    """Why there is no NVIDIA GPU for this process; ``None`` when there is one.

    Args:
        environment: environment variables.
        load: opens a shared library.
    """
    try:
        load("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all devices"
    return None if count_devices(load) else "the NVIDIA driver finds no device"


def count_devices(load: Open = ctypes.CDLL) -> int:
    """Devices of the driver, visible or not; 1 where its management library is not installed."""
    try:
        library = load("libnvidia-ml.so.1")
    except OSError:
        return 1
    if library.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    found = library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    library.nvmlShutdown()
    return count.value if found else 0
