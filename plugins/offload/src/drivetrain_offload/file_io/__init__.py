"""Asynchronous reads and writes between tensors in host memory and files."""

from drivetrain_offload.file_io.async_file import AsyncFile, Request
from drivetrain_offload.file_io.errors import FileIOError
from drivetrain_offload.file_io.memory import aligned_empty
from drivetrain_offload.file_io.pages import ALIGNMENT
from drivetrain_offload.file_io.settings import IOSettings

__all__ = [
    "ALIGNMENT",
    "AsyncFile",
    "FileIOError",
    "IOSettings",
    "Request",
    "aligned_empty",
]
