"""Whether there are Intel GPUs, found out without torch and without a device context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from pathlib import Path

INTEL = "0x8086"
"""PCI vendor."""


def why_absent(
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    load: Callable[[str], object] = ctypes.CDLL,
) -> str | None:
    """Why there is no Intel GPU for this process; ``None`` when there is one.

    Args:
        environment: environment variables.
        root: of the file system with the driver's files.
        load: opens a shared library.
    """
    try:
        load("libze_loader.so.1")
    except OSError:
        return "there is no Level Zero loader (libze_loader.so.1)"
    nodes = [node for node in (root / "sys/class/drm").glob("renderD*") if _vendor(node) == INTEL]
    if not nodes:
        return "there is no Intel GPU with a driver"
    if not any(os.access(root / "dev/dri" / node.name, os.R_OK | os.W_OK) for node in nodes):
        return f"this user may not use /dev/dri/{nodes[0].name}; add it to the group render"
    if environment.get("ZE_AFFINITY_MASK", "0").strip() == "":
        return "ZE_AFFINITY_MASK='' hides all devices"
    return None


def _vendor(node: Path) -> str:
    try:
        return (node / "device/vendor").read_text("utf-8").strip()
    except OSError:
        return ""
