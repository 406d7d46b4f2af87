"""Activations on their way to host memory and back: one object for each storage."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain_offload.host.copies import CopyStream, Mark, Reached
from drivetrain_offload.memory import MemoryRow

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

logger = logging.getLogger("drivetrain.offload")

_SMALLEST = 4096


class HostPool:
    """Host memory that is used again: a step needs the same sizes as the last one.

    It never holds more than was in use at once at any time.

    Args:
        accelerator: locks pages.
        pin: whether to lock any.
    """

    def __init__(self, accelerator: Accelerator, *, pin: bool) -> None:
        self._accelerator = accelerator
        self._pin = pin and accelerator.device_type != "cpu"
        self._free: dict[int, deque[tuple[torch.Tensor, Mark]]] = defaultdict(deque)
        # Memory comes back whenever a graph is freed, in the middle of anything.
        self._lock = threading.RLock()
        self.in_use = 0
        self.total = 0
        self.peak = 0
        """Most bytes that were ever in use at once."""

    def rows(self) -> list[MemoryRow]:
        """What there is, for tables of memory."""
        sizes = {"activations": self.in_use, "activations, free buffers": self.total - self.in_use}
        return [MemoryRow(kind, "host", n, n if self._pin else 0) for kind, n in sizes.items()]

    def take(self, nbytes: int, *, idle: bool = False) -> torch.Tensor:
        """At least ``nbytes`` of uint8, any values.

        Args:
            nbytes: how many.
            idle: wait until no copy reads it any more; a copy on the same stream need not.
        """
        size = size_class(nbytes)
        with self._lock:
            free = self._free[size]
            buffer, mark = free.popleft() if free else (self._allocate(size), Reached())
            self.in_use += size
            self.peak = max(self.peak, self.in_use)
        if idle:
            mark.synchronize()
        return buffer

    def give(self, buffer: torch.Tensor, mark: Mark) -> None:
        """Take back what :meth:`take` has returned; its last copy ends at ``mark``."""
        with self._lock:
            self.in_use -= buffer.numel()
            self._free[buffer.numel()].append((buffer, mark))

    def _allocate(self, size: int) -> torch.Tensor:
        limit = max(self.peak, self.in_use + size)
        for other in sorted(self._free, reverse=True):
            while self._free[other] and self.total + size > limit:
                self._free[other].popleft()[1].synchronize()
                self.total -= other
        self.total += size
        plain = torch.empty(size, dtype=torch.uint8)
        if not self._pin:
            return plain
        try:
            return self._accelerator.pin_memory(plain)
        except RuntimeError as error:
            self._pin = False
            logger.warning(
                "activation_offload: %d bytes of host memory cannot be page-locked (%s), so that "
                "copies of activations do not overlap with the device's work",
                size,
                str(error).splitlines()[0],
            )
            return plain


class ActivationMemory(ABC):
    """Where the activations of one engine wait.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def send(self, storage: torch.UntypedStorage, watched: torch.Tensor) -> Activation:
        """Begin to copy a storage away.

        Args:
            storage: on the device.
            watched: a tensor in it, which tells when it is changed in place.
        """

    @abstractmethod
    def rows(self) -> Sequence[MemoryRow]:
        """What there is, for tables of memory."""


class Activation(ABC):
    """One storage with activations: on the device until it is copied, then only outside of it.

    Autograd's graph owns it: its place outside is free again when the graph is.

    Args:
        storage: on the device.
        watched: a tensor in it, which tells when it is changed in place.
    """

    def __init__(self, storage: torch.UntypedStorage, watched: torch.Tensor) -> None:
        self.nbytes = storage.nbytes()
        self.version = watched._version
        self.changed = False
        """Whether the values were changed in place before the copy had ended."""
        self._source: torch.Tensor | None = _bytes(storage, self.nbytes)
        self._watched: torch.Tensor | None = watched

    def let_go(self) -> None:
        """Give up the memory on the device; work that is queued from now on may use it."""
        if self._source is not None:
            self._leave(self._source)
            self._look()
            self._source = self._watched = None

    @abstractmethod
    def _leave(self, source: torch.Tensor) -> None:
        """Return once ``source`` may be freed."""

    @abstractmethod
    def fetch(self) -> None:
        """Begin to bring the values back, if they are not on the device."""

    def on_device(self) -> torch.Tensor:
        """The values on the device, uint8 [nbytes], for work that is queued from now on."""
        if self._source is not None:
            self._look()
            return self._source
        return self._fetched()

    @abstractmethod
    def _fetched(self) -> torch.Tensor:
        """The same for values that have left it."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was fetched, as long as it is not used; it can be fetched again."""

    def _look(self) -> None:
        assert self._watched is not None
        self.changed = self._watched._version != self.version


class HostMemory(ActivationMemory):
    """Keeps activations in host memory, for a device with memory of its own.

    Args:
        accelerator: makes streams and locks pages.
        device: that computes.
        pin: whether host memory is locked.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device, *, pin: bool) -> None:
        super().__init__(device)
        self.pool = HostPool(accelerator, pin=pin)
        # One stream for both ways: a buffer that is used again is first read to its end.
        self.copies = CopyStream(accelerator)

    def send(self, storage: torch.UntypedStorage, watched: torch.Tensor) -> Activation:
        return HostActivation(self, storage, watched)

    def rows(self) -> Sequence[MemoryRow]:
        return self.pool.rows()


class HostActivation(Activation):
    """An activation in host memory."""

    def __init__(
        self, memory: HostMemory, storage: torch.UntypedStorage, watched: torch.Tensor
    ) -> None:
        super().__init__(storage, watched)
        assert self._source is not None
        self._memory = memory
        self._back: torch.Tensor | None = None
        self._buffer = memory.pool.take(self.nbytes)
        copies = memory.copies
        self._mark = copies.copy([(self._host, self._source)], after=[copies.mark()])

    @property
    def _host(self) -> torch.Tensor:
        return self._buffer.narrow(0, 0, self.nbytes)

    def _leave(self, source: torch.Tensor) -> None:
        self._mark.wait()

    def fetch(self) -> None:
        if self._source is None and self._back is None:
            copies = self._memory.copies
            self._back = torch.empty(self.nbytes, dtype=torch.uint8, device=self._memory.device)
            self._mark = copies.copy([(self._back, self._host)], after=[copies.mark()])

    def _fetched(self) -> torch.Tensor:
        self.fetch()
        assert self._back is not None
        self._mark.wait()
        return self._back

    def forget(self) -> None:
        if self._back is not None:
            self._mark.wait()
            self._back = None

    def __del__(self) -> None:
        if hasattr(self, "_mark"):
            self._mark.wait()  # memory of the device must not be used again while it is copied
            self._memory.pool.give(self._buffer, self._mark)


def _bytes(storage: torch.UntypedStorage, nbytes: int) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (nbytes,), (1,))


def size_class(nbytes: int) -> int:
    """A size that is at most a quarter larger, so that sizes which differ a little share memory."""
    step = max(_SMALLEST, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step
