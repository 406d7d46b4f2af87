"""Whether there are AMD GPUs, found out without torch and without a device context."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""Variables that select devices; HIP honours the last one too."""


def why_absent(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str | None:
    """Why there is no AMD GPU for this process; ``None`` when there is one.

    Args:
        environment: environment variables.
        root: of the file system with the driver's files.
    """
    driver = root / "dev/kfd"
    if not driver.exists():
        return "there is no AMD GPU driver (/dev/kfd)"
    if not os.access(driver, os.R_OK | os.W_OK):
        return "this user may not use /dev/kfd; add it to the group render"
    for variable in VISIBLE:
        if environment.get(variable, "0").strip() in ("", "-1"):
            return f"{variable}={environment[variable]!r} hides all devices"
    return None if count_devices(root) else "the AMD GPU driver finds no device"


def count_devices(root: Path = Path("/")) -> int:
    """Nodes of the driver's topology that have compute units; CPUs are nodes without."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return sum(bool(re.search(r"^simd_count [1-9]", _read(node), re.MULTILINE)) for node in nodes)


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:  # nodes that a container hides are listed and cannot be read
        return ""
