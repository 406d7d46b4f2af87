"""How much memory the host has left, and memory that devices copy from and to."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drivetrain.errors import ConfigError
from drivetrain_offload.host.locked import lock

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.offload")

HOST = torch.device("cpu")

_MIB = 1 << 20

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def is_planned(job: Job) -> bool:
    """Whether a job is only put together to find out what it would hold, and takes no memory."""
    return job.device.type == "meta"


def is_host(job: Job) -> bool:
    """Whether the memory of a job's device, planned or not, is that of the host."""
    return job.accelerator.device_type == "cpu"


class PinnedMemory:
    """Host memory, page-locked as far as the device needs that and the budget allows.

    Args:
        accelerator: locks pages.
        wanted: whether to lock any.
        budget: largest number of bytes locked at once; ``None`` for all that the system allows.
        device: whose tensors it makes: ``meta`` to count memory without taking any.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        wanted: bool,
        budget: int | None,
        device: torch.device = HOST,
    ) -> None:
        self.device = device
        self._accelerator = accelerator
        self._wanted = wanted and accelerator.device_type != "cpu"
        self._budget = budget
        self._said = False
        self.locked = 0
        """Bytes locked now."""

    @classmethod
    def of(cls, job: Job, *, wanted: bool, budget: int | None = None) -> PinnedMemory:
        """Host memory of ``job``; none is taken if that is only planned."""
        device = job.device if is_planned(job) else HOST
        return cls(job.accelerator, wanted=wanted, budget=budget, device=device)

    def empty(self, numel: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """An uninitialised flat tensor; its memory is counted until the tensor itself is gone.

        Logs once when it is not locked although that was wanted.
        """
        plain = torch.empty(numel, dtype=dtype, device=self.device)
        nbytes = plain.nbytes
        if not self._wanted or not numel:
            return plain
        if self._budget is not None and self.locked + nbytes > self._budget:
            self._say(
                f"{nbytes:,} bytes more than the {self.locked:,} locked so far would exceed "
                f"pinned_memory_budget ({self._budget:,})"
            )
            return plain
        try:
            pinned = lock(self._accelerator, plain)
        except RuntimeError as error:
            limit = f"; the system lets a process lock {lockable()}"
            self._wanted = False
            self._say(f"{nbytes:,} bytes: {str(error).splitlines()[0]}{limit}")
            return plain
        self.locked += nbytes
        weakref.finalize(pinned, self._unlock, nbytes)
        return pinned

    def _unlock(self, nbytes: int) -> None:
        self.locked -= nbytes

    def _say(self, why: str) -> None:
        if not self._said and self.device == HOST:
            self._said = True
            logger.warning(
                "some host memory is not page-locked, so that copies between it and the device do "
                "not overlap with other work: %s",
                why,
            )


def refuse_too_little(needed: int, ranks: int, *, what: str) -> None:
    """Make sure that the host has room before any of it is taken.

    Args:
        needed: bytes that this rank will allocate.
        ranks: ranks on this host, taken to need as much each.
        what: what they are for, with config path and arithmetic.

    Raises:
        ConfigError: there is too little, for this rank alone or for all together.
    """
    left, everything = available_bytes(), total_bytes()
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
    return _smallest([_meminfo("MemAvailable"), *map(_left_in, _own_cgroups())])


def total_bytes() -> int | None:
    """Bytes of memory of the host, or of this process's control group."""
    limits = [_number(folder / "memory.max") for folder in _own_cgroups()]
    return _smallest([_meminfo("MemTotal"), *limits])


def _smallest(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


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


def _own_cgroups() -> list[Path]:
    """Folders of this process's control group (version 2) and of those around it."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    path = _CGROUPS / own
    return [folder for folder in (path, *path.parents) if folder.is_relative_to(_CGROUPS)]


def _left_in(cgroup: Path) -> int | None:
    """What a control group still allows; pages of files that can be dropped count as free."""
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return None
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
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
