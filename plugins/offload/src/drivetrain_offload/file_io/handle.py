"""DeepSpeed's ``aio_handle``: transfers between tensors and files that are named at each call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from drivetrain_offload.file_io.async_file import AsyncFile
from drivetrain_offload.file_io.errors import FileIOError
from drivetrain_offload.file_io.memory import aligned_empty
from drivetrain_offload.file_io.pages import ALIGNMENT


class AioHandle:
    """Transfers between files and tensors, several at once.

    A tensor of a device is read and written through host memory. Failed transfers raise
    :class:`FileIOError`, where DeepSpeed's return a negative number.

    Args:
        block_size: bytes of one request to the system.
        queue_depth: blocks under way at once, per thread.
        single_submit: hand blocks to the system one at a time.
        overlap_events: hand over new blocks while others are under way.
        intra_op_parallelism: threads that share the blocks.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        self._options: dict[str, Any] = {
            "block_size": block_size,
            "queue_depth": queue_depth,
            "single_submit": single_submit,
            "overlap_events": overlap_events,
            "intra_op_parallelism": intra_op_parallelism,
        }
        self._under_way: list[_Transfer] = []
        self._locked: set[int] = set()

    def get_block_size(self) -> int:
        """Bytes of one request to the system."""
        return int(self._options["block_size"])

    def get_queue_depth(self) -> int:
        """Blocks under way at once, per thread."""
        return int(self._options["queue_depth"])

    def get_single_submit(self) -> bool:
        """Whether blocks are handed over one at a time."""
        return bool(self._options["single_submit"])

    def get_overlap_events(self) -> bool:
        """Whether new blocks are handed over while others are under way."""
        return bool(self._options["overlap_events"])

    def get_intra_op_parallelism(self) -> int:
        """Threads that share the blocks."""
        return int(self._options["intra_op_parallelism"])

    get_thread_count = get_intra_op_parallelism

    def get_alignment(self) -> int:
        """Bytes to whose multiples offsets and sizes need no copy."""
        return ALIGNMENT

    def async_pread(
        self, buffer: torch.Tensor, filename: str | os.PathLike[str], file_offset: int = 0
    ) -> int:
        """Begin to fill a contiguous tensor from a file; :meth:`wait` ends it. Returns 0."""
        self._begin(buffer, filename, file_offset, writes=False)
        return 0

    def async_pwrite(
        self, buffer: torch.Tensor, filename: str | os.PathLike[str], file_offset: int = 0
    ) -> int:
        """Begin to write a contiguous tensor into a file; :meth:`wait` ends it. Returns 0."""
        self._begin(buffer, filename, file_offset, writes=True)
        return 0

    def wait(self) -> int:
        """Wait for all transfers that have begun.

        Returns:
            Their number.

        Raises:
            FileIOError: one of them failed; the others have ended, too.
        """
        transfers, self._under_way = self._under_way, []
        problems = [problem for each in transfers if (problem := each.finish()) is not None]
        if problems:
            raise problems[0]
        return len(transfers)

    def sync_pread(
        self, buffer: torch.Tensor, filename: str | os.PathLike[str], file_offset: int = 0
    ) -> int:
        """Fill a contiguous tensor from a file. Returns 1, the number of transfers."""
        self._begin(buffer, filename, file_offset, writes=False)
        return self._last()

    def sync_pwrite(
        self, buffer: torch.Tensor, filename: str | os.PathLike[str], file_offset: int = 0
    ) -> int:
        """Write a contiguous tensor into a file. Returns 1, the number of transfers."""
        self._begin(buffer, filename, file_offset, writes=True)
        return self._last()

    def pread(
        self,
        buffer: torch.Tensor,
        filename: str | os.PathLike[str],
        validate: bool = False,
        async_op: bool = False,
        file_offset: int = 0,
    ) -> int:
        """:meth:`async_pread` or :meth:`sync_pread`; every transfer is checked in any case."""
        return (self.async_pread if async_op else self.sync_pread)(buffer, filename, file_offset)

    def pwrite(
        self,
        buffer: torch.Tensor,
        filename: str | os.PathLike[str],
        validate: bool = False,
        async_op: bool = False,
        file_offset: int = 0,
    ) -> int:
        """:meth:`async_pwrite` or :meth:`sync_pwrite`; every transfer is checked in any case."""
        return (self.async_pwrite if async_op else self.sync_pwrite)(buffer, filename, file_offset)

    read = sync_pread
    write = sync_pwrite

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """Host memory that needs no copy on its way to a file.

        Args:
            num_elem: its elements.
            example_tensor: has the dtype.
        """
        tensor = aligned_empty(num_elem, dtype=example_tensor.dtype)
        self._locked.add(tensor.data_ptr())
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Whether this handle made a tensor; its memory goes with its last reference."""
        known = tensor.data_ptr() in self._locked
        self._locked.discard(tensor.data_ptr())
        return known

    def _begin(
        self,
        buffer: torch.Tensor,
        filename: str | os.PathLike[str],
        offset: int,
        *,
        writes: bool,
    ) -> None:
        if writes:
            Path(filename).touch()
        file = AsyncFile(filename, mode="r+" if writes else "r", **self._options)
        try:
            transfer = _Transfer(file, buffer, offset, writes=writes)
        except BaseException:
            file.close()
            raise
        self._under_way.append(transfer)

    def _last(self) -> int:
        problem = self._under_way.pop().finish()
        if problem is not None:
            raise problem
        return 1


class _Transfer:
    """One tensor on its way."""

    def __init__(self, file: AsyncFile, buffer: torch.Tensor, offset: int, *, writes: bool) -> None:
        self._file = file
        self._buffer = buffer
        self._copied = buffer.device.type != "cpu"
        self._host = buffer.cpu() if self._copied else buffer
        self._writes = writes
        begin = file.write if writes else file.read
        self._request = begin(self._host, offset)

    def finish(self) -> Exception | None:
        """Wait for the end and close the file; return what went wrong."""
        try:
            self._request.wait()
            if self._copied and not self._writes:
                self._buffer.copy_(self._host)
        except FileIOError as error:
            return error
        finally:
            self._file.close()
        return None
