"""Memory outside of the device that a bucket's parameters are kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from drivetrain_offload.file_io.memory import aligned_empty
from drivetrain_offload.host.copies import CopyStream, Mark, Reached

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator
    from drivetrain_offload.file_io import AsyncFile, Request


Finish = Callable[[], None]
"""Returns once work queued from now on finds what was read."""


class ParameterStore(ABC):
    """Flat parameters [numel] of one bucket. One write at a time, and no read meanwhile."""

    place: str
    """Where it is, for reports."""

    @abstractmethod
    def begin_read(self, into: torch.Tensor) -> Finish:
        """Begin to copy all of them to ``into``."""

    @abstractmethod
    def begin_write(self, values: torch.Tensor) -> None:
        """Begin to take all of them from ``values``, which must stay as it is meanwhile."""

    @abstractmethod
    def is_written(self) -> bool:
        """Whether :meth:`finish_write` would return at once."""

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
    """Keeps parameters in host memory, for a device with memory of its own.

    Args:
        values: host memory [numel], page-locked if it can be.
        accelerator: copies run on a side stream of it.
    """

    place = "host"

    def __init__(self, values: torch.Tensor, accelerator: Accelerator) -> None:
        self.values = values
        self._copies = CopyStream(accelerator)
        self._written: Mark = Reached()

    def begin_read(self, into: torch.Tensor) -> Finish:
        self.finish_write()
        return self._copies.copy([(into, self.values)], [self._copies.mark()]).wait

    def begin_write(self, values: torch.Tensor) -> None:
        if values.data_ptr() != self.values.data_ptr():  # updated where they lie
            self._written = self._copies.copy([(self.values, values)], [self._copies.mark()])

    def is_written(self) -> bool:
        return self._written.query()

    def finish_write(self) -> None:
        self._written.synchronize()

    def read_part(self, start: int, numel: int) -> torch.Tensor:
        self.finish_write()
        return self.values.narrow(0, start, numel)

    def write_part(self, start: int, values: torch.Tensor) -> None:
        self.finish_write()
        self.values.narrow(0, start, values.numel()).copy_(values)


class FileStore(ParameterStore):
    """Keeps parameters in a file.

    Args:
        file: of ``numel`` elements; this store owns it. None in a job that is only planned, whose
            reads and writes of all parameters do nothing.
        numel: number of parameters.
        dtype: theirs.
    """

    place = "nvme"

    def __init__(self, file: AsyncFile | None, numel: int, dtype: torch.dtype) -> None:
        self._maybe_file = file
        self._numel = numel
        self._dtype = dtype
        self._write: Request | None = None

    @property
    def _file(self) -> AsyncFile:
        assert self._maybe_file is not None, "a job that is only planned has no files"
        return self._maybe_file

    def begin_read(self, into: torch.Tensor) -> Finish:
        self.finish_write()
        if self._maybe_file is None:
            return lambda: None
        if into.device.type == "cpu":
            return self._file.read(into).wait
        near = aligned_empty(self._numel, self._dtype)
        request = self._file.read(near)

        def finish() -> None:
            request.wait()
            into.copy_(near)

        return finish

    def begin_write(self, values: torch.Tensor) -> None:
        self.finish_write()
        if self._maybe_file is None:
            return
        near = values if values.device.type == "cpu" else values.cpu()
        self._write = self._file.write(near)

    def is_written(self) -> bool:
        return self._write is None or self._write.done()

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
