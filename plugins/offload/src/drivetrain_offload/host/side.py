"""What the host homes of one job share: a thread, two streams, pinned memory on the way."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_offload.host.copies import CopyStream, Lanes, Mark, Reached
from drivetrain_offload.host.memory import PinnedMemory, is_host
from drivetrain_offload.host.worker import Worker
from drivetrain_offload.memory import MemoryRow, note_memory

if TYPE_CHECKING:
    from drivetrain.contracts import Hyper
    from drivetrain.job.job import Job
    from drivetrain_offload.section import OffloadOptimizer


class HostSide:
    """Thread, streams and pinned memory of the host homes of one job; one object per job.

    Args:
        job: has the device; what is here ends when it closes.
        section: how much to pin, and how many cores to use.
    """

    def __init__(self, job: Job, section: OffloadOptimizer) -> None:
        accelerator = job.accelerator
        self._on_host = is_host(job)
        self.memory = PinnedMemory.of(
            job, wanted=section.pin_memory, budget=section.pinned_memory_budget
        )
        self.worker = Worker(max(1, int(section.cpuadam_cores_perc * torch.get_num_threads())))
        self.lanes = Lanes(self.memory.empty)
        self.down = CopyStream(accelerator)
        self.up = CopyStream(accelerator)
        self._extra = 0
        self._scale: HostScale | None = None
        job.on_close(self._close)
        note_memory(job, self._rows)

    @classmethod
    def of(cls, job: Job, section: OffloadOptimizer) -> HostSide:
        """The host side of ``job``, made on demand."""
        if job not in _sides:
            _sides[job] = cls(job, section)
        return _sides[job]

    def _rows(self) -> list[MemoryRow]:
        """Buffers, for tables of memory; whatever is locked here counts with them."""
        nbytes = self.lanes.nbytes + self._extra
        return [MemoryRow("buffers of updates", "host", nbytes, self.memory.locked)]

    def _close(self) -> None:
        self.worker.close()
        self.lanes.free()

    def reserve(self, gradient: int, parameters: int, extra: int) -> None:
        """Make lanes large enough for one more engine's buckets, and count its own buffers.

        Args:
            gradient: largest bytes of a gradient.
            parameters: largest bytes of a bucket's parameters.
            extra: bytes that its homes allocate beside states and lanes.
        """
        self.worker.drain()
        self.lanes.grow(gradient, parameters)
        self._extra += extra

    def is_near(self, device: torch.device) -> bool:
        """Whether a tensor of that device can be worked on here where it is.

        In a rehearsal that is so where the device stands for the host.
        """
        return device.type == "cpu" or (device.type == "meta" and self._on_host)

    def scale(self, scale: float | torch.Tensor) -> HostScale:
        """A scale on its way to the host; one that several buckets share goes once."""
        known = self._scale
        if known is None or not isinstance(scale, torch.Tensor) or known.source is not scale:
            known = self._scale = HostScale(self, scale)
        return known


class HostScale:
    """A scale that is fetched from the device without anyone waiting for the device.

    Args:
        side: copies it.
        scale: a number, or a 0-d tensor anywhere.
    """

    def __init__(self, side: HostSide, scale: float | torch.Tensor) -> None:
        self.source = scale
        self._there: Mark = Reached()
        self._value = scale
        if isinstance(scale, torch.Tensor):
            if scale.device.type == "cpu":
                self._value = scale.clone()
            else:
                self._value = side.memory.empty(1, scale.dtype).view(())
                self._there = side.down.copy([(self._value, scale)], [side.down.mark()])

    def value(self) -> float | torch.Tensor:
        """The number, or a 0-d tensor in host memory; returns once it is there."""
        self._there.synchronize()
        return self._value


def as_they_are(hyper: Hyper) -> Mapping[str, Any]:
    """The hyper-parameters of now, in host memory; schedules change the live ones."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
        for key, value in hyper.items()
        if key != "params"
    }


_sides: weakref.WeakKeyDictionary[Job, HostSide] = weakref.WeakKeyDictionary()
