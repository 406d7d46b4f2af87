"""Every engine says which bytes of which file went wrong, why, and what to do about it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io import AsyncFile, FileIOError, aligned_empty
from drivetrain_offload.file_io.faults import SHORT
from file_io_engines import content, plan, random_bytes

SHM = Path("/dev/shm")


def test_a_read_beyond_the_end_fails_and_says_where_the_file_ends(
    engine: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    with AsyncFile(tmp_path / "file", engine=engine) as file:
        request = file.read(torch.empty(12_000, dtype=torch.uint8))
        with pytest.raises(FileIOError, match=r"file, bytes .*: the file ends at byte 10000"):
            request.wait()
        file.read_sync(torch.empty(10_000, dtype=torch.uint8))


@pytest.mark.parametrize("direction", ["read", "write"])
def test_an_error_of_the_device_names_file_and_bytes(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    plan(monkeypatch, direction, 2, errno.EIO)
    with AsyncFile(tmp_path / "file", mode="r+", engine=engine, block_size=4096) as file:
        move = getattr(file, direction)
        tensor = aligned_empty(8192, torch.uint8).zero_()
        move(tensor, 0).wait()
        failing = move(tensor, 8192)
        with pytest.raises(
            FileIOError, match=r"bytes \d+ to \d+: Input/output error \(EIO\); the"
        ) as info:
            failing.wait()
        assert info.value.path == str(tmp_path / "file")
        assert info.value.errno == errno.EIO
        with pytest.raises(FileIOError):
            failing.wait()
        move(tensor, 16384).wait()


@pytest.mark.parametrize("size", [8192, 1 << 16, 5000])
@pytest.mark.parametrize("direction", ["read", "write"])
def test_short_transfers_are_continued(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str, size: int
) -> None:
    stored = random_bytes(size)
    (tmp_path / "file").write_bytes(content(stored) if direction == "read" else bytes(size))
    plan(monkeypatch, direction, 1, SHORT)
    tensor = aligned_empty(size, torch.uint8)
    tensor.copy_(torch.zeros_like(stored) if direction == "read" else stored)
    with AsyncFile(tmp_path / "file", mode="r+", engine=engine) as file:
        getattr(file, direction)(tensor).wait()
    assert torch.equal(tensor, stored)
    assert (tmp_path / "file").read_bytes() == content(stored)


def test_an_error_that_nobody_waited_for_is_raised_by_close(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(monkeypatch, "write", 1, errno.EIO)
    file = AsyncFile(tmp_path / "file", mode="w", engine=engine)
    for at in range(5):
        file.write(torch.zeros(100), at * 400)
    with pytest.raises(FileIOError, match="EIO"):
        file.close()
    file.close()


def test_a_file_size_limit_is_an_error_with_advice(engine: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
            request = file.write(aligned_empty(1 << 17, torch.uint8).zero_())
            with pytest.raises(FileIOError, match=r"File too large \(EFBIG\); .*ulimit -f"):
                request.wait()
            with pytest.raises(FileIOError, match=r"cannot reserve space for .*, 131072 bytes"):
                file.preallocate(1 << 17)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_with_advice(engine: str, tiny_disk: Path) -> None:
    with AsyncFile(tiny_disk / "file", mode="w", engine=engine) as file:
        with pytest.raises(FileIOError, match=r"No space left on device \(ENOSPC\); free space"):
            file.preallocate(2 << 20)
        request = file.write(torch.zeros(2 << 20, dtype=torch.uint8))
        with pytest.raises(FileIOError, match=r"cannot write to .*/file, bytes .*ENOSPC"):
            request.wait()


@pytest.mark.skipif(not SHM.is_dir(), reason="there is no /dev/shm")
def test_a_file_system_without_direct_transfers_serves_all_the_same(engine: str) -> None:
    path = SHM / f"drivetrain-test-{os.getpid()}"
    stored = random_bytes(70_001)
    try:
        with AsyncFile(path, mode="x", engine=engine) as file:
            file.write_sync(stored, 11)
            back = torch.zeros_like(stored)
            file.read_sync(back, 11)
    finally:
        path.unlink()
    assert torch.equal(back, stored)


def test_refused_direct_transfers_fall_back_to_the_page_cache(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = aligned_empty(1 << 16, torch.uint8).copy_(random_bytes(1 << 16))
    plan(monkeypatch, "write", 1, errno.EINVAL)
    with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
        direct_before = file.direct
        file.write_sync(stored)
        assert direct_before
        assert not file.direct
    assert (tmp_path / "file").read_bytes() == content(stored)


def test_a_path_that_is_not_there_is_named(engine: str, tmp_path: Path) -> None:
    with pytest.raises(FileIOError, match=r"cannot open .*/gone/file: No such file .*\(ENOENT\)"):
        AsyncFile(tmp_path / "gone" / "file", mode="w", engine=engine)


def test_a_file_of_somebody_else_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileIOError, match=r"File exists \(EEXIST\)"):
        AsyncFile(tmp_path / "file", mode="x")


def test_a_file_opened_for_reading_is_not_written(engine: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept" * 2048)
    with AsyncFile(tmp_path / "file", engine=engine) as file:
        request = file.write(aligned_empty(8192, torch.uint8))
        with pytest.raises(FileIOError, match=r"\(EBADF\); open it for what it is to do"):
            request.wait()
    assert (tmp_path / "file").read_bytes() == b"kept" * 2048


def test_a_file_whose_path_vanishes_goes_on(engine: str, tmp_path: Path) -> None:
    stored = random_bytes(9000)
    with AsyncFile(tmp_path / "file", mode="w", engine=engine) as file:
        (tmp_path / "file").unlink()
        file.write_sync(stored)
        back = torch.zeros_like(stored)
        file.read_sync(back)
    assert torch.equal(back, stored)


@pytest.mark.parametrize(
    ("tensor", "offset", "message"),
    [
        (torch.zeros(4, 4).t()[1:], 0, "not contiguous; copy it first"),
        (torch.zeros(4, device="meta"), 0, "got one on meta"),
        (torch.zeros(4), -1, "offset must be at least 0, got -1"),
    ],
)
def test_tensors_that_no_file_takes_are_refused(
    tmp_path: Path, tensor: torch.Tensor, offset: int, message: str
) -> None:
    with AsyncFile(tmp_path / "file", mode="w") as file, pytest.raises(ValueError, match=message):
        file.write(tensor, offset)


def test_a_closed_file_is_not_used(tmp_path: Path) -> None:
    file = AsyncFile(tmp_path / "file", mode="w")
    file.close()
    with pytest.raises(ValueError, match="file is closed"):
        file.read(torch.zeros(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "a"}, "mode must be one of r, r\\+, w, x"),
        ({"queue_depth": 0}, "queue_depth must be at least 1, got 0"),
        ({"engine": "tape"}, "engine must be one of auto, io_uring"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncFile(tmp_path / "file", **settings)  # type: ignore[arg-type]
