"""One OpenMP runtime per process: the kernels use the one that torch brought.

The kernels are linked without an OpenMP library, and find its functions in the process. A second
runtime would bring a second pool of threads that fights the first for the cores.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_RUNTIMES = ("libgomp", "libomp", "libiomp5")


def share_openmp() -> None:
    """Make the functions of the loaded OpenMP runtime (or the system's) visible to the kernels.

    Raises:
        OSError: there is no OpenMP runtime.
    """
    ctypes.CDLL(_loaded_runtime() or "libgomp.so.1", mode=os.RTLD_GLOBAL | os.RTLD_NOW)


def _loaded_runtime() -> str | None:
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in mapped:
        path = line.partition("/")[2]
        if Path(path).name.startswith(_RUNTIMES):
            return f"/{path}"
    return None
