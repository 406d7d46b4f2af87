"""Reads go before writes that were asked for earlier, and writes end all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io import AsyncFile, aligned_empty

from drivetrain.errors import ConfigError

BLOCK = 4096
TRIES = 20
"""A thread may be kept from looking until all is over; the claim is about the order of blocks."""


@pytest.fixture(params=["io_uring", "libaio", "threads"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncFile:
    settings = {"block_size": BLOCK, "queue_depth": 1, "engine": request.param}
    try:
        made = AsyncFile(tmp_path / "file", mode="w", **settings)
    except ConfigError as error:
        pytest.skip(str(error))
    made.preallocate(64 << 20)
    return made


def test_a_read_does_not_wait_for_all_writes_before_it(file: AsyncFile) -> None:
    much, little = aligned_empty(32 << 20, torch.uint8), aligned_empty(BLOCK, torch.uint8)
    with file:
        for _ in range(TRIES):
            write = file.write(much.fill_(1))
            file.read(little, 48 << 20).wait()
            was_first = not write.done()
            write.wait()
            if was_first:
                return
    pytest.fail("writes went first every time")


def test_a_write_does_not_wait_for_all_reads_before_it(file: AsyncFile) -> None:
    much, little = aligned_empty(32 << 20, torch.uint8), aligned_empty(8 * BLOCK, torch.uint8)
    with file:
        file.write(much.fill_(1)).wait()
        for _ in range(TRIES):
            read = file.read(much)
            file.write(little.fill_(2), 48 << 20).wait()
            was_first = not read.done()
            read.wait()
            if was_first:
                return
    pytest.fail("reads went first every time")
