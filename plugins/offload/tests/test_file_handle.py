"""``aio_handle``: several transfers at once, between tensors and files named at each call."""

from __future__ import annotations

import pytest
import torch
from drivetrain_offload.file_io import FileIOError
from drivetrain_offload.file_io.handle import AioHandle


def test_tensors_go_to_files_and_back(tmp_path):
    handle = AioHandle(4096, 4, False, True, 2)
    settings = (handle.get_block_size(), handle.get_queue_depth(), handle.get_thread_count())
    assert settings == (4096, 4, 2)
    assert (handle.get_single_submit(), handle.get_overlap_events()) == (False, True)
    values = torch.arange(5000, dtype=torch.float32)
    assert handle.sync_pwrite(values, tmp_path / "one") == 1
    for part in range(2):  # into one file, side by side
        handle.async_pwrite(values[2500 * part :][:2500], tmp_path / "two", 10_000 * part)
    assert handle.wait() == 2
    read = [torch.empty_like(values), handle.new_cpu_locked_tensor(5000, values)]
    handle.async_pread(read[0], tmp_path / "one")
    handle.async_pread(read[1], tmp_path / "two")
    assert handle.wait() == 2
    assert torch.equal(read[0], values)
    assert torch.equal(read[1], values)
    assert [handle.free_cpu_locked_tensor(tensor) for tensor in read] == [False, True]
    half = torch.empty(2500)
    assert handle.pread(half, tmp_path / "one", file_offset=10_000) == 1
    assert torch.equal(half, values[2500:])


def test_a_failed_transfer_is_told_and_the_others_end(tmp_path):
    handle = AioHandle()
    values = torch.ones(10)
    handle.sync_pwrite(values, tmp_path / "short")
    read = torch.zeros(10)
    handle.async_pread(torch.empty(20), tmp_path / "short")
    handle.async_pread(read, tmp_path / "short")
    with pytest.raises(FileIOError, match="short"):
        handle.wait()
    assert torch.equal(read, values)
    assert handle.wait() == 0
    with pytest.raises(FileIOError, match="nothing"):
        handle.sync_pread(read, tmp_path / "nothing")
