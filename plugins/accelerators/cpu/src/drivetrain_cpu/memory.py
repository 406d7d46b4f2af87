"""How much memory this process uses, as the system counts it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_PROCESS = Path("/proc/self")
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def resident() -> int:
    """Bytes of the process in memory now; where the system does not tell, the peak."""
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except OSError:
        return _lifetime_peak()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Highest :func:`resident` since :func:`reset_peak`, or of the process's life."""
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:
        return _lifetime_peak()
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _lifetime_peak()


def reset_peak() -> bool:
    """Start a new peak; answers whether the system allows it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def total(limits: tuple[Path, ...] = _LIMITS) -> int:
    """Bytes of memory that this process may use: the host's, or its container's."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in limits:
        try:
            text = limit.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" means none
            return min(host, int(text))
    return host


def _lifetime_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
