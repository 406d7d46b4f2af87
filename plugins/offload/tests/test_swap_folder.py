"""Files of a job disappear with it, however it ends, and nobody touches those of another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io import FileIOError
from drivetrain_offload.files.swap_folder import SwapFolder
from drivetrain_offload.section import Aio
from nvme_harness import files_in

OURS = f"drivetrain-{os.geteuid()}"
OWNER = """
import os, sys, time, torch
from drivetrain_offload.section import Aio
from drivetrain_offload.files.swap_folder import SwapFolder
folder = SwapFolder(sys.argv[1], rank=3)
file = folder.create("states", Aio())
file.write_sync(torch.arange(10_000))
if "fork" in sys.argv:
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by the child, which has let go of the lock by now
        os.close(1)
        time.sleep(600)
else:
    print(folder.path, flush=True)
if "end" not in sys.argv:
    time.sleep(600)
"""


@contextmanager
def owner(root: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a folder under ``root``, and what it prints."""
    command = [sys.executable, "-c", OWNER, str(root), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_a_killed_job_left_is_removed_by_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with owner(tmp_path) as (process, left):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(files_in(tmp_path)) == 1
    folder = SwapFolder(tmp_path)
    assert not Path(left).exists()
    (message,) = [r.message for r in caplog.records if "removing" in r.message]
    assert left in message
    assert message.endswith("bytes of a job that was killed")
    folder.close()
    assert files_in(tmp_path) == []


def test_a_job_leaves_the_files_of_a_running_one_alone(tmp_path: Path) -> None:
    with owner(tmp_path) as (_, other):
        (theirs,) = files_in(tmp_path)
        before = theirs.read_bytes()
        folder = SwapFolder(tmp_path, rank=3)
        mine = folder.create("states", Aio())
        mine.write_sync(torch.zeros(10_000))
        assert str(folder.path) != other
        assert len(files_in(tmp_path)) == 2
        folder.close()
        assert files_in(tmp_path) == [theirs]
        assert theirs.read_bytes() == before


def test_a_process_that_ends_without_closing_leaves_nothing(tmp_path: Path) -> None:
    with owner(tmp_path, "end") as (process, _):
        assert process.wait() == 0
    assert [path.name for path in (tmp_path / OURS).iterdir()] == ["lock"]


def test_a_forked_process_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    with owner(tmp_path, "fork") as (process, child):
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            SwapFolder(tmp_path).close()
            assert files_in(tmp_path) == []
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_forked_process_that_ends_takes_nothing_away(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    file = folder.create("states", Aio())
    child = os.fork()
    if child == 0:
        folder.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(files_in(tmp_path)) == 1
    file.write_sync(torch.zeros(10))
    folder.close()


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    shared = tmp_path / OURS
    looks_like_ours = shared / "host-pid1-rank0-abc"
    looks_like_ours.mkdir(parents=True)
    (looks_like_ours / "thesis.tex").write_text("kept")
    (shared / "notes").mkdir()
    (shared / "notes" / "a.swap").write_text("kept")
    SwapFolder(tmp_path).close()
    assert (looks_like_ours / "thesis.tex").read_text() == "kept"
    assert (shared / "notes" / "a.swap").read_text() == "kept"


def test_a_file_goes_with_its_last_user(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    kept, dropped = folder.create("a/b c", Aio()), folder.create("a/b c", Aio())
    assert len({kept.path, dropped.path}) == 2
    assert Path(kept.path).name == "0-a_b_c.swap"
    del dropped
    assert files_in(tmp_path) == [Path(kept.path)]
    folder.close()


def test_closing_forgives_a_folder_that_somebody_removed(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    folder.create("states", Aio())
    for path in sorted((tmp_path / OURS).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(
        FileIOError, match=r"cannot open .*states.* \(ENOENT\); check that the folder"
    ):
        folder.create("states", Aio())
    folder.close()
    folder.close()


def test_folders_can_be_made_at_the_same_moment(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    deadline = time.monotonic() + 300
    try:
        while len(files_in(tmp_path)) < 4:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    SwapFolder(tmp_path).close()
    assert files_in(tmp_path) == []


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileIOError, match=r"cannot make a folder in .*/file: Not a directory"):
        SwapFolder(tmp_path / "file")


def test_a_read_only_disk_is_named(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(
        FileIOError, match=r"cannot make a folder in .*disk: Read-only .*\(EROFS\); "
    ):
        SwapFolder(tiny_disk)
