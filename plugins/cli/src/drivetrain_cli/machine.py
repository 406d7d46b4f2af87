"""How much memory of each kind this machine has."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Machine:
    """Bytes; ``None`` where nobody says, or there is no limit.

    Args:
        devices: number of devices.
        device: memory of each; where the device is a CPU, the host's.
        host: memory that can still be taken, of this control group.
        pinned: what a process may lock.
        nvme: free space of the file system under the folders asked for.
        folder: which of them has least.
    """

    devices: int
    device: int | None
    host: int | None
    pinned: int | None
    nvme: int | None
    folder: str


def look(accelerator: Accelerator | None, folders: tuple[str, ...]) -> Machine:
    """This machine, its devices of one kind, and the file systems of some folders.

    Folders need not exist.
    """
    free = {folder: shutil.disk_usage(_existing(Path(folder))).free for folder in folders}
    least = min(free, key=free.__getitem__, default="")
    return Machine(
        devices=0 if accelerator is None else accelerator.device_count(),
        device=None if accelerator is None else accelerator.total_memory(),
        host=_available(),
        pinned=_lockable(),
        nvme=free.get(least),
        folder=least,
    )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _available() -> int | None:
    """What the host, and the control groups of this process, have left."""
    found = [*_of_meminfo(), *(left for folder in _own_cgroups() for left in _left_in(folder))]
    return min(found, default=None)


def _of_meminfo() -> Iterator[int]:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) << 10


def _own_cgroups() -> Iterator[Path]:
    """Folders of this process's control group (version 2) and of those around it."""
    if _OWN_CGROUP.exists():
        for line in _OWN_CGROUP.read_text().splitlines():
            if line.startswith("0::/"):
                path = _CGROUPS / line.removeprefix("0::/")
                yield from (each for each in (path, *path.parents) if _CGROUPS in each.parents)


def _left_in(cgroup: Path) -> Iterator[int]:
    """What a control group still allows; pages of files that can be dropped count as free."""
    numbers = {}
    for name in ("memory.max", "memory.current"):
        text = (cgroup / name).read_text().strip() if (cgroup / name).exists() else ""
        if not text.isdecimal():  # "max" is no limit
            return
        numbers[name] = int(text)
    statistics = (cgroup / "memory.stat").read_text().splitlines()
    droppable = dict(line.split() for line in statistics).get("inactive_file", "0")
    yield max(0, numbers["memory.max"] - numbers["memory.current"] + int(droppable))


def _lockable() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
