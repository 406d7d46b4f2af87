"""Activations on their way to a file and back."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from drivetrain_offload.activations.memory import (
    Activation,
    ActivationMemory,
    HostPool,
    size_class,
)
from drivetrain_offload.file_io import AsyncFile, FileIOError, Request, aligned_empty
from drivetrain_offload.host.copies import CopyStream, Mark, Reached
from drivetrain_offload.memory import MemoryRow

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator

_WRITING = 4
"""Activations in host memory that are written at the same time; bounds that memory."""


class FileMemory(ActivationMemory):
    """Keeps activations in a file. Where the device is a CPU they are written from where they lie.

    Args:
        accelerator: makes streams and locks pages.
        device: that computes.
        file: of this engine alone.
        pin: whether the memory between device and file is locked.
    """

    def __init__(
        self, accelerator: Accelerator, device: torch.device, file: AsyncFile, *, pin: bool
    ) -> None:
        super().__init__(device)
        self.file = file
        self.direct = device.type == "cpu"
        self.pool = HostPool(accelerator, pin=pin)
        self.copies = CopyStream(accelerator)
        self.slots = Slots()
        self._writing: deque[weakref.ref[FileActivation]] = deque()

    def send(self, storage: torch.UntypedStorage, watched: torch.Tensor) -> Activation:
        return FileActivation(self, storage, watched)

    def writes(self, activation: FileActivation) -> None:
        """A buffer is being written; the oldest ones are waited for when there are many."""
        self._writing.append(weakref.ref(activation))
        while len(self._writing) > _WRITING:
            oldest = self._writing.popleft()()
            if oldest is not None:
                oldest.settle()

    def rows(self) -> Sequence[MemoryRow]:
        return [MemoryRow("activations", "nvme", self.slots.in_use), *self.pool.rows()]


class Slots:
    """Places in a file, which are used again."""

    def __init__(self) -> None:
        self._free: dict[int, list[int]] = defaultdict(list)
        self._lock = threading.RLock()
        self._end = 0
        self.in_use = 0

    def take(self, nbytes: int) -> int:
        """The offset of a place for ``nbytes``."""
        size = size_class(nbytes)
        with self._lock:
            self.in_use += size
            if self._free[size]:
                return self._free[size].pop()
            self._end += size
            return self._end - size

    def give(self, offset: int, nbytes: int) -> None:
        """Let another activation use the place."""
        size = size_class(nbytes)
        with self._lock:
            self.in_use -= size
            self._free[size].append(offset)


class FileActivation(Activation):
    """An activation in a file, on the way there, or on the way back."""

    def __init__(
        self, memory: FileMemory, storage: torch.UntypedStorage, watched: torch.Tensor
    ) -> None:
        super().__init__(storage, watched)
        assert self._source is not None
        self._memory = memory
        self._mark: Mark = Reached()
        self._buffer: torch.Tensor | None = None
        self._back: torch.Tensor | None = None
        self._write: Request | None = None
        self._read: Request | None = None
        self._slot = memory.slots.take(self.nbytes)
        if memory.direct:
            self._write = memory.file.write(self._source, self._slot)
        else:
            self._buffer = memory.pool.take(self.nbytes)
            copies = memory.copies
            self._mark = copies.copy([(self._host, self._source)], after=[copies.mark()])

    @property
    def _host(self) -> torch.Tensor:
        assert self._buffer is not None
        return self._buffer.narrow(0, 0, self.nbytes)

    def _leave(self, source: torch.Tensor) -> None:
        if self._memory.direct:
            self._end_write()
            return
        self._mark.synchronize()
        self._write = self._memory.file.write(self._host, self._slot)
        self._memory.writes(self)

    def settle(self) -> None:
        """Wait until the values are in the file, and do without the buffer from then on."""
        self._end_write()
        self._give_buffer()

    def _end_write(self) -> None:
        """Wait for it. One that failed is let go of first: its error holds all that led to it."""
        if self._write is not None:
            request, self._write = self._write, None
            request.wait()

    def _end_read(self) -> None:
        if self._read is not None:
            request, self._read = self._read, None
            request.wait()

    def fetch(self) -> None:
        away = self._source is None and self._buffer is None and self._back is None
        if not away:
            return
        if self._memory.direct:
            self._back = aligned_empty(self.nbytes, torch.uint8)
            self._read = self._memory.file.read(self._back, self._slot)
        else:
            self._buffer = self._memory.pool.take(self.nbytes, idle=True)
            self._read = self._memory.file.read(self._host, self._slot)

    def _fetched(self) -> torch.Tensor:
        self.fetch()
        self._end_read()
        if self._back is None:
            copies = self._memory.copies
            self._back = torch.empty(self.nbytes, dtype=torch.uint8, device=self._memory.device)
            self._mark = copies.copy([(self._back, self._host)], after=[copies.mark()])
        self._mark.wait()
        return self._back

    def forget(self) -> None:
        if self._source is None:
            self._end_read()
            self._mark.wait()
            self._back = None
            self.settle()

    def _give_buffer(self) -> None:
        if self._buffer is not None:
            self._memory.pool.give(self._buffer, self._mark)
            self._buffer = None

    def __del__(self) -> None:
        if hasattr(self, "_slot"):
            for end in (self._end_write, self._end_read):
                with suppress(FileIOError):  # nobody asks for the values any more
                    end()
            self._mark.wait()  # memory of the device must not be used again while it is copied
            self._give_buffer()
            self._memory.slots.give(self._slot, self.nbytes)
