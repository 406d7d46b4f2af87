"""Memory that activations wait in, and their way there and back."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from drivetrain_offload.copies import CopyStream
from drivetrain_offload.memory import MemoryRow

if TYPE_CHECKING:
    from drivetrain.accelerator import Accelerator

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
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
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

    def take(self, nbytes: int) -> torch.Tensor:
        """At least ``nbytes`` of uint8, any values."""
        size = _size_class(nbytes)
        with self._lock:
            free = self._free[size]
            buffer = free.pop() if free else self._allocate(size)
            self.in_use += size
            self.peak = max(self.peak, self.in_use)
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Take back what :meth:`take` has answered."""
        with self._lock:
            self.in_use -= buffer.numel()
            self._free[buffer.numel()].append(buffer)

    def _allocate(self, size: int) -> torch.Tensor:
        limit = max(self.peak, self.in_use + size)
        for other in sorted(self._free, reverse=True):
            while self._free[other] and self.total + size > limit:
                self._free[other].pop()
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


class ActivationMemory:
    """Where the activations of one engine wait.

    Args:
        accelerator: makes streams and locks pages.
        device: that computes.
        pin: whether host memory is locked.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device, *, pin: bool) -> None:
        self.device = device
        self.pool = HostPool(accelerator, pin=pin)
        # One stream for both ways: a buffer that is used again is first read to its end.
        self.copies = CopyStream(accelerator, device)

    def send(self, storage: torch.UntypedStorage, watched: torch.Tensor) -> Activation:
        """Begin to copy a storage away.

        Args:
            storage: on the device.
            watched: a tensor in it, which tells when it is changed in place.
        """
        return Activation(self, storage, watched)


class Activation:
    """One storage with activations: on the device until it is copied, then only outside of it.

    Autograd's graph owns it. When the graph is freed, its memory goes back to the pool.
    """

    def __init__(
        self, memory: ActivationMemory, storage: torch.UntypedStorage, watched: torch.Tensor
    ) -> None:
        self._memory = memory
        self.nbytes = storage.nbytes()
        self._source: torch.Tensor | None = _bytes(storage, self.nbytes)
        self._watched: torch.Tensor | None = watched
        self.version = watched._version
        self.changed = False
        """Whether the values were changed in place before the copy had ended."""
        self._fetched: torch.Tensor | None = None
        self._buffer = memory.pool.take(self.nbytes)
        copies = memory.copies
        self._mark = copies.copy([(self._host, self._source)], after=[copies.mark()])

    @property
    def _host(self) -> torch.Tensor:
        return self._buffer.narrow(0, 0, self.nbytes)

    def let_go(self) -> None:
        """Give up the memory on the device; work that is queued from now on may use it."""
        if self._source is None:
            return
        assert self._watched is not None
        self._mark.wait()
        self.changed = self._watched._version != self.version
        self._source = self._watched = None

    def fetch(self) -> None:
        """Begin to bring the values back, if they are not on the device."""
        if self._source is None and self._fetched is None:
            copies = self._memory.copies
            self._fetched = torch.empty(self.nbytes, dtype=torch.uint8, device=self._memory.device)
            self._mark = copies.copy([(self._fetched, self._host)], after=[copies.mark()])

    def on_device(self) -> torch.Tensor:
        """The values on the device, uint8 [nbytes], for work that is queued from now on."""
        if self._source is not None:
            assert self._watched is not None
            self.changed = self._watched._version != self.version
            return self._source
        self.fetch()
        assert self._fetched is not None
        self._mark.wait()
        return self._fetched

    def forget(self) -> None:
        """Drop what was fetched, as long as it is not used; it can be fetched again."""
        if self._fetched is not None:
            self._mark.wait()
            self._fetched = None

    def __del__(self) -> None:
        if hasattr(self, "_mark"):
            self._mark.wait()  # memory of the device must not be used again while it is copied
            self._memory.pool.give(self._buffer)


def _bytes(storage: torch.UntypedStorage, nbytes: int) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (nbytes,), (1,))


def _size_class(nbytes: int) -> int:
    """A size that is at most a quarter larger, so that sizes which differ a little share memory."""
    step = max(_SMALLEST, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step
