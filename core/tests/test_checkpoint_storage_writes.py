"""Files that go past the page cache hold what was written, whatever the system does meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivetrain.checkpoint.format import storage as storage_module
from drivetrain.checkpoint.format.storage import LocalStorage

MIB = 1 << 20


class Disk:
    """The module ``os`` with another ``write``."""

    def __init__(self, write: Callable[[int, Any], int]) -> None:
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def write(folder: Path, parts: Iterator[bytes] | list[bytes]) -> bytes:
    sink = LocalStorage(str(folder)).create("a/file")
    for part in parts:
        sink.write(part)
    sink.close()
    return (folder / "a" / "file").read_bytes()


@pytest.mark.parametrize("sizes", [[], [0], [1], [4096], [8 * MIB], [3, 20 * MIB, 5], [MIB] * 17])
def test_a_file_holds_what_was_written(tmp_path: Path, sizes: list[int]) -> None:
    parts = [os.urandom(size) for size in sizes]
    assert write(tmp_path, parts) == b"".join(parts)


def test_most_of_it_is_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def watched(file: int, data: memoryview) -> int:
        counts.append(len(data))
        return os.write(file, data)

    monkeypatch.setattr(storage_module, "os", Disk(watched))
    data = os.urandom(20 * MIB + 5)
    assert write(tmp_path, [data[:7], data[7:]]) == data
    assert [count % 4096 for count in counts] == [0, 0, 0, 5]


@pytest.mark.parametrize("count", [4096, 5000, 1])
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    calls = 0

    def short(file: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        # A direct write of odd length is refused by the system; it would be cut to whole blocks.
        if calls != 2:
            return os.write(file, data)
        storage_module.fcntl.fcntl(file, storage_module.fcntl.F_SETFL, 0)
        return os.write(file, data[:count])

    monkeypatch.setattr(storage_module, "os", Disk(short))
    data = os.urandom(20 * MIB + 5)
    assert write(tmp_path, [data]) == data
    assert calls > 3


def test_a_file_system_that_refuses_late_gets_ordinary_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def refuses(file: int, data: memoryview) -> int:
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "no such thing here")
        return os.write(file, data)

    monkeypatch.setattr(storage_module, "os", Disk(refuses))
    data = os.urandom(9 * MIB)
    assert write(tmp_path, [data]) == data


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC])
def test_what_stays_wrong_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fails(file: int, data: memoryview) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(storage_module, "os", Disk(fails))
    with pytest.raises(OSError, match="no"):
        write(tmp_path, [os.urandom(9 * MIB)])
