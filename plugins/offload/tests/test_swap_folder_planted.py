"""On a disk that others write to, a job touches nothing but what is its user's."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from drivetrain_offload.file_io import FileIOError
from drivetrain_offload.files.swap_folder import SwapFolder
from drivetrain_offload.section import Aio

OURS = f"drivetrain-{os.geteuid()}"
JOB = "host-pid1-rank0-abc"
STRANGER = 54321


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What an attacker would have the job change."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    (folder / "key").write_text("secret")
    (folder / "key").chmod(0o600)
    (folder / "thesis.swap").write_text("kept")
    (folder / "lock").write_text("kept")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def loose() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def facts(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, owner and content of all that is in a folder, and of itself."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_uid,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }


def as_stranger(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, STRANGER, STRANGER)


def our_folder_is_a_link(disk: Path, home: Path) -> None:
    (disk / OURS).symlink_to(home)


def our_folder_is_a_strangers(disk: Path, home: Path) -> None:
    (disk / OURS).mkdir()
    (disk / OURS / JOB).mkdir()
    (disk / OURS / JOB / "a.swap").symlink_to(home / "key")
    as_stranger(disk / OURS)


def our_folder_is_a_pipe(disk: Path, home: Path) -> None:
    os.mkfifo(disk / OURS)


def the_lock_is_a_link(disk: Path, home: Path) -> None:
    (disk / OURS).mkdir()
    (disk / OURS / "lock").symlink_to(home / "key")


def the_lock_is_a_link_to_nothing(disk: Path, home: Path) -> None:
    (disk / OURS).mkdir()
    (disk / OURS / "lock").symlink_to(home / "new")


def the_lock_is_a_pipe(disk: Path, home: Path) -> None:
    (disk / OURS).mkdir()
    os.mkfifo(disk / OURS / "lock")


def the_lock_is_a_strangers(disk: Path, home: Path) -> None:
    (disk / OURS).mkdir()
    (disk / OURS / "lock").touch()
    as_stranger(disk / OURS / "lock")


@pytest.mark.parametrize(
    "plant",
    [
        our_folder_is_a_link,
        our_folder_is_a_strangers,
        our_folder_is_a_pipe,
        the_lock_is_a_link,
        the_lock_is_a_link_to_nothing,
        the_lock_is_a_pipe,
        the_lock_is_a_strangers,
    ],
)
def test_what_was_planted_in_its_place_is_refused_by_name(
    disk: Path, home: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(disk, home)
    before = facts(home)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileIOError, match=r"drivetrain-|cannot make a folder in"):
        SwapFolder(disk)
    assert facts(home) == before
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def a_job_is_a_link(disk: Path, home: Path) -> None:
    (disk / OURS / JOB).symlink_to(home)


def a_job_is_a_strangers(disk: Path, home: Path) -> None:
    (disk / OURS / JOB).mkdir()
    (disk / OURS / JOB / "x.swap").write_text("kept")
    as_stranger(disk / OURS / JOB)


def its_lock_is_a_link(disk: Path, home: Path) -> None:
    (disk / OURS / JOB).mkdir()
    (disk / OURS / JOB / "lock").symlink_to(home / "lock")


def its_lock_is_a_pipe(disk: Path, home: Path) -> None:
    (disk / OURS / JOB).mkdir()
    os.mkfifo(disk / OURS / JOB / "lock")


def its_files_are_links(disk: Path, home: Path) -> None:
    (disk / OURS / JOB).mkdir()
    (disk / OURS / JOB / "a.swap").symlink_to(home / "thesis.swap")
    (disk / OURS / JOB / "b.swap").symlink_to(home)


def the_shared_folder_of_old_is_planted(disk: Path, home: Path) -> None:
    (disk / "drivetrain").symlink_to(home)


@pytest.mark.parametrize(
    "plant",
    [
        a_job_is_a_link,
        a_job_is_a_strangers,
        its_lock_is_a_link,
        its_lock_is_a_pipe,
        its_files_are_links,
        the_shared_folder_of_old_is_planted,
    ],
)
def test_removing_what_killed_jobs_left_follows_no_link(
    disk: Path, home: Path, plant: Callable[[Path, Path], None]
) -> None:
    (disk / OURS).mkdir(mode=0o700)
    plant(disk, home)
    before = facts(home)
    kept = list((disk / OURS).glob("*/x.swap"))
    SwapFolder(disk).close()
    assert facts(home) == before
    assert all(path.read_text() == "kept" for path in kept)


def test_a_folder_that_is_exchanged_under_a_running_job_gets_none_of_its_files(
    disk: Path, home: Path
) -> None:
    folder = SwapFolder(disk)
    (disk / OURS).rename(disk / "moved")
    (disk / OURS / folder.path.name).parent.mkdir()
    (disk / OURS / folder.path.name).symlink_to(home)
    before = facts(home)
    file = folder.create("states", Aio())
    file.write_sync(torch.arange(1000))
    (real,) = (disk / "moved").rglob("*.swap")
    assert real.read_bytes() == b"".join(n.to_bytes(8, "little") for n in range(1000))
    folder.close()
    assert facts(home) == before
    assert [path.name for path in (disk / "moved").iterdir()] == ["lock"]


@pytest.mark.usefixtures("loose")
def test_all_is_private_whatever_the_umask_and_what_was_there_before(disk: Path) -> None:
    (disk / OURS).mkdir(mode=0o777)
    folders = SwapFolder(disk / "new" / "path"), SwapFolder(disk)
    files = [folder.create("states", Aio()) for folder in folders]
    modes = {path.relative_to(disk): stat.S_IMODE(path.stat().st_mode) for path in disk.rglob("*")}
    assert modes.pop(Path("new")) == modes.pop(Path("new/path")) == 0o755
    assert {mode for path, mode in modes.items() if (disk / path).is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if (disk / path).is_file()} == {0o600}
    assert len(modes) == 2 * len(["folder", "its lock", "rank's folder", "its lock", "file"])
    for folder in folders:
        folder.close()
    del files
