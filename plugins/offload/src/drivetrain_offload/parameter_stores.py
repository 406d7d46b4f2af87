"""Memory outside of the device that a bucket's parameters are kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from drivetrain_offload.copies import CopyStream, Mark, Reached

if TYPE_CHECKING:
    from drivetrain.accelerator import Accelerator
    from drivetrain_offload.file_io import AsyncFile, Request


class ParameterStore(ABC):
    """Flat parameters [numel] of one bucket. One read and one write at a time."""

    place: str
    """Where it is, for reports."""

    @abstractmethod
    def begin_read(self, into: torch.Tensor) -> None:
        """Begin to copy all of them to ``into``."""

    @abstractmethod
    def finish_read(self) -> None:
        """Return once work queued from now on finds what was read."""

    @abstractmethod
    def begin_write(self, values: torch.Tensor) -> None:
        """Begin to take all of them from ``values``, which must stay as it is meanwhile."""

    @abstractmethod
    def finish_write(self) -> None:
        """Return once what was written is here, and may be read."""

    @abstractmethod
    def read_part(self, start: int, numel: int) -> torch.Tensor:
        """A copy of some of them on the host, or a view where they lie there."""

    @abstractmethod
    def write_part(self, start: int, values: torch.Tensor) -> None:
        """Replace some of them."""


class HostStore(ParameterStore):
    """Host memory beside a device with memory of its own.

    Args:
        values: host memory [numel], page-locked if it can be.
        accelerator: copies run on a side stream of it.
    """

    place = "host"

    def __init__(self, values: torch.Tensor, accelerator: Accelerator) -> None:
        self.values = values
        self._copies = CopyStream(accelerator)
        self._read: Mark = Reached()
        self._written: Mark = Reached()

    def begin_read(self, into: torch.Tensor) -> None:
        self.finish_write()
        self._read = self._copies.copy([(into, self.values)], [self._copies.mark()])

    def finish_read(self) -> None:
        self._read.wait()

    def begin_write(self, values: torch.Tensor) -> None:
        if values.data_ptr() != self.values.data_ptr():  # updated where they lie
            self._written = self._copies.copy([(self.values, values)], [self._copies.mark()])

    def finish_write(self) -> None:
        self._written.synchronize()

    def read_part(self, start: int, numel: int) -> torch.Tensor:
        self.finish_write()
        return self.values.narrow(0, start, numel)

    def write_part(self, start: int, values: torch.Tensor) -> None:
        self.finish_write()
        self.values.narrow(0, start, values.numel()).copy_(values)


class FileStore(ParameterStore):
    """A file.

    Args:
        file: of ``numel`` elements; this store owns it.
        numel: number of parameters.
        dtype: theirs.
    """

    place = "nvme"

    def __init__(self, file: AsyncFile, numel: int, dtype: torch.dtype) -> None:
        self._file = file
        self._numel = numel
        self._dtype = dtype
        self._read: tuple[Request, torch.Tensor, torch.Tensor] | None = None
        self._write: Request | None = None

    def begin_read(self, into: torch.Tensor) -> None:
        self.finish_write()
        near = into if into.device.type == "cpu" else self._host_memory()
        self._read = (self._file.read(near), near, into)

    def finish_read(self) -> None:
        if self._read is not None:
            (request, near, into), self._read = self._read, None
            request.wait()
            if near is not into:
                into.copy_(near)

    def begin_write(self, values: torch.Tensor) -> None:
        self.finish_write()
        near = values if values.device.type == "cpu" else values.cpu()
        self._write = self._file.write(near)

    def finish_write(self) -> None:
        if self._write is not None:
            request, self._write = self._write, None
            request.wait()

    def read_part(self, start: int, numel: int) -> torch.Tensor:
        self.finish_write()
        part = torch.empty(numel, dtype=self._dtype)
        self._file.read(part, start * self._dtype.itemsize).wait()
        return part

    def write_part(self, start: int, values: torch.Tensor) -> None:
        self.finish_write()
        part = values.to(device="cpu", dtype=self._dtype).contiguous()
        self._file.write(part, start * self._dtype.itemsize).wait()

    def _host_memory(self) -> torch.Tensor:
        return torch.empty(self._numel, dtype=self._dtype)
