"""Copies between device and host that run beside the device's other work."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator


class Mark(Protocol):
    """A point in a stream's work; torch's events are such."""

    def wait(self) -> None:
        """Let work that is queued on the current stream from now on wait for the mark."""

    def synchronize(self) -> None:
        """Return once the mark is reached."""

    def query(self) -> bool:
        """Whether the mark is reached."""


class Reached:
    """A mark on a device that has done its work when an operator returns."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It is."""
        return True


class CopyStream:
    """A side stream for copies in one direction.

    Args:
        accelerator: makes the stream; without streams, copies end before they return.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._stream = accelerator.stream()
        self._module: Any = None
        if self._stream is not None:
            self._module = torch.get_device_module(accelerator.device_type)

    def mark(self) -> Mark:
        """Where the caller's current stream is now."""
        if self._module is None:
            return Reached()
        found: Mark = self._module.current_stream().record_event()
        return found

    def copy(
        self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Iterable[Mark] = ()
    ) -> Mark:
        """Begin to copy; the tensors must stay until the mark.

        Args:
            pairs: (to, from), as long as each other.
            after: what the copies wait for.
        """
        stream = self._stream
        with self._accelerator.on_stream(stream):
            for mark in after:
                mark.wait()
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            if stream is None:
                return Reached()
            end: Mark = stream.record_event()
            return end


@dataclass(eq=False)
class Lane:
    """Pinned memory for one bucket on its way through the host.

    Args:
        gradient: bytes for a gradient, from the device.
        parameters: bytes for parameters, to the device (and from it, where they have no masters).
        owner: has filled it and wants what is in it.
        filled: when what is in it has arrived.
        drained: when the last upload from it has ended.
    """

    gradient: torch.Tensor
    parameters: torch.Tensor
    owner: weakref.ref[object] | None = None
    filled: Mark = field(default_factory=Reached)
    drained: Mark = field(default_factory=Reached)

    @property
    def free(self) -> bool:
        """True if no owner wants what is in it."""
        return self.owner is None or self.owner() is None


class Lanes:
    """A few lanes for all buckets of a rank: one is filled, one updated, one drained.

    Args:
        allocate: returns that many bytes of pinned memory.
    """

    COUNT = 3

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        self._sizes = (0, 0)
        self._lanes: list[Lane] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        return len(self._lanes) * sum(self._sizes)

    def grow(self, gradient: int, parameters: int) -> None:
        """Make room for buckets of that many bytes; nothing may be under way."""
        sizes = (max(gradient, self._sizes[0]), max(parameters, self._sizes[1]))
        if sizes != self._sizes:
            self._sizes = sizes
            self._lanes.clear()
            self._lanes = [
                Lane(self._allocate(sizes[0]), self._allocate(sizes[1])) for _ in range(self.COUNT)
            ]

    def free(self) -> None:
        """Give all memory back."""
        self._sizes = (0, 0)
        self._lanes.clear()

    def claim(self, owner: object, fill: Callable[[Lane], Mark], *, steal: bool) -> Lane | None:
        """Fill a lane for ``owner``; with ``steal`` another's that waits, if none is free.

        Only the thread that updates steals, so that what it takes is never in use. An owner that
        has lost a lane finds out with :meth:`holds`, and fills another.
        """
        with self._lock:
            free = [lane for lane in self._lanes if lane.free]
            if not free and not steal:
                return None
            lane = free[0] if free else self._lanes[-1]
            self._lanes.remove(lane)
            self._lanes.append(lane)  # the first is the one that has been free for longest
            lane.owner = weakref.ref(owner)
            lane.filled = fill(lane)  # inside the lock: fills of one lane must not overtake
            return lane

    def add(self, lane: Lane | None, owner: object, fill: Callable[[Lane], Mark]) -> None:
        """Fill more of a lane, unless another has taken it.

        ``fill`` returns a mark behind all that the lane was filled with before.
        """
        with self._lock:
            if lane is not None and lane.owner is not None and lane.owner() is owner:
                lane.filled = fill(lane)

    def holds(self, lane: Lane | None, owner: object) -> bool:
        """True if ``lane`` still holds what ``owner`` has filled it with."""
        with self._lock:
            return lane is not None and lane.owner is not None and lane.owner() is owner

    def release(self, lane: Lane | None, owner: object) -> None:
        """Give a lane back, unless another has taken it."""
        with self._lock:
            if lane is not None and lane.owner is not None and lane.owner() is owner:
                lane.owner = None
