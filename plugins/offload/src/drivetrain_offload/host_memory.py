"""How much memory the host has left, and memory that devices copy from and to."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.accelerator import Accelerator

logger = logging.getLogger("drivetrain.offload")

_MIB = 1 << 20

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class PinnedMemory:
    """Host memory, page-locked as far as the device needs that and the budget allows.

    Args:
        accelerator: locks pages.
        wanted: whether to lock any.
        budget: largest number of bytes locked at once; ``None`` for all that the system allows.
    """

    def __init__(self, accelerator: Accelerator, *, wanted: bool, budget: int | None) -> None:
        self._accelerator = accelerator
        self._wanted = wanted and accelerator.device_type != "cpu"
        self._budget = budget
        self.locked = 0
        """Bytes locked now."""

    def empty(self, numel: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """An uninitialised flat tensor; its memory is counted until the tensor itself is gone.

        Logs once when it is not locked although that was wanted.
        """
        plain = torch.empty(numel, dtype=dtype, device="cpu")
        nbytes = plain.nbytes
        if not self._wanted or not numel:
            return plain
        if self._budget is not None and self.locked + nbytes > self._budget:
            self._give_up(
                f"{nbytes:,} bytes more than the {self.locked:,} locked so far would exceed "
                f"pinned_memory_budget ({self._budget:,})"
            )
            return plain
        try:
            pinned = self._accelerator.pin_memory(plain)
        except RuntimeError as error:
            limit = f"; the system lets a process lock {lockable()}"
            self._give_up(f"{nbytes:,} bytes: {str(error).splitlines()[0]}{limit}")
            return plain
        self.locked += nbytes
        weakref.finalize(pinned, self._unlock, nbytes)
        return pinned

    def _unlock(self, nbytes: int) -> None:
        self.locked -= nbytes

    def _give_up(self, why: str) -> None:
        self._wanted = False
        logger.warning(
            "offload_optimizer: some host memory is not page-locked, so copies from and to the "
            "device do not overlap with its work: %s",
            why,
        )


def refuse_too_little(
    needed: int,
    ranks: int,
    *,
    what: str,
    available: Callable[[], int | None] | None = None,
    total: Callable[[], int | None] | None = None,
) -> None:
    """Make sure that the host has room before any of it is taken.

    Args:
        needed: bytes that this rank will allocate.
        ranks: ranks on this host, taken to need as much each.
        what: what they are for, with config path and arithmetic.
        available: bytes that can be had now; the system's answer by default.
        total: bytes that there are altogether; likewise.

    Raises:
        ConfigError: there is too little, for this rank alone or for all together.
    """
    left = (available or available_bytes)()
    everything = (total or total_bytes)()
    if left is not None and needed > left:
        raise ConfigError(
            f"{what} = {_mib(needed)} of host memory for this rank, but only {_mib(left)} are "
            "available (of memory and of the control group's limit); offload less with "
            "offload_optimizer.ratio, use device nvme, or shard over more ranks"
        )
    if everything is not None and needed * ranks > everything:
        raise ConfigError(
            f"{what} = {_mib(needed)} of host memory per rank; {ranks} ranks on this host need "
            f"{_mib(needed * ranks)}, but it has {_mib(everything)}; offload less with "
            "offload_optimizer.ratio, use device nvme, or run fewer ranks per host"
        )


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping; ``None`` where the system does not say."""
    return _smaller(_meminfo("MemAvailable"), _cgroup_left())


def total_bytes() -> int | None:
    """Bytes of memory of the host, or of this process's control group."""
    return _smaller(_meminfo("MemTotal"), _number(_CGROUP / "memory.max"))


def _smaller(one: int | None, other: int | None) -> int | None:
    known = [number for number in (one, other) if number is not None]
    return min(known) if known else None


def _meminfo(key: str) -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    return None


def _cgroup_left() -> int | None:
    """What the control group (version 2) still allows; file pages that can be dropped count."""
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return None
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        lines = []
    statistics = dict(line.split() for line in lines)
    return max(0, limit - used + int(statistics.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def lockable() -> str:
    """How much memory the system lets this process lock, in words."""
    if sys.platform == "win32":
        return "an unknown number of bytes"
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return "any number of bytes (RLIMIT_MEMLOCK is unlimited)"
    return f"{soft:,} bytes (RLIMIT_MEMLOCK, ulimit -l)"


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:,.0f} MiB"
