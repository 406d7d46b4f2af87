"""A save is whole or absent: killed at any file operation, on any rank, with any rank failing."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from stored_states import Tensors, content_hash, load_all, pending, save_all, some_tensors

from drivetrain.checkpoint.format import storage as storage_module
from drivetrain.checkpoint.format.commit import Retention
from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.checkpoint.load import tags_by_age
from drivetrain.errors import CheckpointError

OLD, NEW = some_tensors(1), some_tensors(2)
WORLD = 3

OPERATIONS = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir")
"""What changes a disk, or says that it has been changed."""


class WatchedOs:
    """``os`` as the storage sees it; every operation is announced."""

    def __init__(self, announce: Callable[[str, tuple[Any, ...]], object]) -> None:
        self._announce = announce

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in OPERATIONS:
            return function

        def announced(*arguments: Any, **options: Any) -> Any:
            self._announce(name, arguments)
            return function(*arguments, **options)

        return announced


@contextmanager
def watched(announce: Callable[[str, tuple[Any, ...]], object]) -> Iterator[None]:
    with patch.object(storage_module, "os", WatchedOs(announce)):
        yield


def save_new(folder: Path, tag: str) -> None:
    """All ranks in turn, which is one order of many: they share no file before the commit."""
    save_all(folder, tag, NEW, WORLD, save_id="89abcdef", step=2)


def operations(folder: Path, tag: str) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    with watched(lambda *operation: found.append(operation)):
        save_new(folder, tag)
    return found


def killed_at(number: int, folder: Path, tag: str) -> None:
    """Save in a process of its own that is killed before an operation, in the middle of a write."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    counter = Counter[str]()

    def announce(name: str, arguments: tuple[Any, ...]) -> None:
        counter["all"] += 1
        if counter["all"] == number:
            if name == "write":
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with watched(announce):
            save_new(folder, tag)
    finally:
        os._exit(0)


def latest(folder: Path) -> Tensors:
    return load_all(folder, (folder / "latest").read_text(), OLD)


@pytest.mark.parametrize("tag", ["old", "new"], ids=["same tag", "another tag"])
def test_killed_at_any_file_operation_the_old_or_the_new_state_is_whole(
    tmp_path: Path, tag: str
) -> None:
    save_all(tmp_path / "count", "old", OLD, WORLD)
    total = len(operations(tmp_path / "count", tag))
    assert total > 40
    found = Counter[str]()
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        save_all(folder, "old", OLD, WORLD)
        killed_at(number, folder, tag)
        state = content_hash(latest(folder))
        assert state in (content_hash(OLD), content_hash(NEW)), number
        found["new" if state == content_hash(NEW) else "old"] += 1
        for other in tags_by_age(LocalStorage(str(folder))):
            load_all(folder, other, OLD)  # whatever has a manifest is whole
        save_new(folder, tag)  # nothing is in the way of the next attempt
        assert content_hash(latest(folder)) == content_hash(NEW)
        assert not [path for path in folder.rglob("*") if "part" in path.name]
    assert found["old"] > 20
    assert found["new"] > 1


def test_everything_is_durable_before_the_manifest_appears(tmp_path: Path) -> None:
    names: dict[int, str] = {}
    dirty: set[str] = set()

    original = os.open

    def opened(path: str, *arguments: Any) -> int:
        file = original(path, *arguments)
        names[file] = path
        return file

    def announce(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":
            dirty.add(names[arguments[0]])
        elif name == "fsync":
            dirty.discard(names[arguments[0]])
        elif name == "replace":
            assert arguments[0] not in dirty
            assert not dirty

    with patch("os.open", opened), watched(announce):
        save_new(tmp_path, "t")
    assert not dirty


def test_a_rank_that_votes_against_a_save_is_named(tmp_path: Path) -> None:
    save_all(tmp_path, "old", OLD, WORLD)
    saves = [
        pending(tmp_path, "new", NEW, rank, WORLD, save_id="89abcdef") for rank in range(WORLD)
    ]
    saves[0].write()
    saves[2].write()
    assert saves[0].missing_votes() == {1}
    saves[1].refuse("no space left")
    assert saves[0].missing_votes() == set()
    with pytest.raises(CheckpointError, match="rank 1: no space left"):
        saves[0].commit()
    saves[0].discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "old"]


def test_parts_that_leave_a_hole_are_not_committed(tmp_path: Path) -> None:
    saves = [pending(tmp_path, "t", NEW, rank, 2) for rank in range(2)]
    saves[1].boxes = [box for box in saves[1].boxes if box.key != "exp_avg/weight"]
    for save in saves:
        save.write()
    with pytest.raises(CheckpointError, match=r"own 11 of the 35 elements of exp_avg/weight"):
        saves[0].commit()


def test_two_owners_of_one_box_have_to_agree(tmp_path: Path) -> None:
    saves = [pending(tmp_path, "t", {"step/x": torch.tensor(1 + r)}, 1, 2) for r in range(2)]
    saves[0].rank = 0
    for save in saves:
        save.write()
    with pytest.raises(CheckpointError, match="ranks 0 and 1 both own elements of step/x"):
        saves[0].commit()


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    save_all(tmp_path, "t", OLD, 1)
    (tmp_path / "t" / "notes.txt").write_text("mine")
    save_all(tmp_path, "t", NEW, 1, save_id="89abcdef")
    assert content_hash(load_all(tmp_path, "t", NEW)) == content_hash(NEW)
    names = {path.name for path in (tmp_path / "t").iterdir()}
    kept = {"manifest.json", "index-89abcdef.json", "rank00000-89abcdef.safetensors", "notes.txt"}
    assert names == kept


# -- retention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6, 7, 10, 12]),
        (Retention(keep_last=1), [12]),
        (Retention(keep_last=3), [7, 10, 12]),
        (Retention(keep_last=2, keep_every=5), [5, 10, 12]),
        (Retention(keep_last=100), [1, 2, 3, 4, 5, 6, 7, 10, 12]),
        (Retention(keep_every=5), [1, 2, 3, 4, 5, 6, 7, 10, 12]),
    ],
)
def test_old_checkpoints_go_by_what_is_to_be_kept(retention: Retention, kept: list[int]) -> None:
    steps = [1, 2, 3, 4, 5, 6, 7, 10, 12]
    tags = [f"global_step{step}" for step in steps] + ["best", "latest", "global_stepx"]
    expired = retention.expired(tags, "global_step12")
    assert sorted(set(tags) - set(expired)) == sorted(
        [f"global_step{step}" for step in kept] + ["best", "latest", "global_stepx"]
    )


def test_retention_removes_whole_folders_and_nothing_newer(tmp_path: Path) -> None:
    for step in (1, 2, 5):
        save_all(tmp_path, f"global_step{step}", OLD, 2, step=step)
    save_all(tmp_path, "best", OLD, 2)
    keep = Retention(keep_last=1)
    save_all(tmp_path, "global_step3", NEW, 2, step=3, retention=keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best", "global_step3", "global_step5", "latest"]


def tags(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_what_failed_saves_leave_does_not_count_and_goes_when_it_is_old(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_all(tmp_path, f"global_step{step}", OLD, 2, step=step)
    for torn in (2, 4):
        (tmp_path / f"global_step{torn}" / "manifest.json").unlink()
    save_all(
        tmp_path, "global_step6", NEW, 2, step=6, retention=Retention(keep_last=3, keep_every=2)
    )
    assert tags(tmp_path) == ["global_step3", "global_step4", "global_step5", "global_step6"]


def test_a_checkpoint_that_lacks_a_file_does_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_all(tmp_path, f"global_step{step}", OLD, 2, step=step)
    next((tmp_path / "global_step2").glob("rank00001-*")).unlink()
    save_all(tmp_path, "global_step4", NEW, 2, step=4, retention=Retention(keep_last=2))
    assert tags(tmp_path) == ["global_step2", "global_step3", "global_step4"]
    load_all(tmp_path, "global_step3", OLD)


def test_what_latest_names_stays_as_long_as_it_does(tmp_path: Path) -> None:
    keep = Retention(keep_last=1)
    save_all(tmp_path, "global_step1", OLD, 2, step=1)
    for step in (2, 3):
        name = f"global_step{step}"
        saves = [pending(tmp_path, name, NEW, r, 2, step=step, retention=keep) for r in range(2)]
        for save in saves:
            save.save_latest = False
            save.write()
        saves[0].commit()
        assert tags(tmp_path) == ["global_step1", name]
        assert content_hash(latest(tmp_path)) == content_hash(OLD)
    save_all(tmp_path, "global_step4", NEW, 2, step=4, retention=keep)
    assert tags(tmp_path) == ["global_step4"]


def test_retention_leaves_links_and_what_others_put_there(tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    save_all(archive, "global_step1", OLD, 1, step=1)
    run.mkdir()
    (run / "global_step1").symlink_to(archive / "global_step1")
    (run / "global_step2").mkdir()  # such as another program's checkpoint
    (run / "global_step2" / "mp_rank_00_model_states.pt").write_text("theirs")
    (run / "global_step3").write_text("a file")
    save_all(run, "global_step9", NEW, 1, step=9, retention=Retention(keep_last=1))
    assert sorted(path.name for path in run.iterdir()) == [
        *("global_step1", "global_step2", "global_step3", "global_step9", "latest")
    ]
    load_all(archive, "global_step1", OLD)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_the_room_of_a_failed_save_is_given_back(tmp_path: Path, code: int) -> None:
    big = {"parameter/weight": torch.zeros(5 << 20)}  # more than both buffers of a sink hold
    for failing in range(3):
        writes = Counter[str]()

        def announce(
            name: str, arguments: tuple[Any, ...], seen: Counter[str] = writes, good: int = failing
        ) -> None:
            seen[name] += 1
            if name == "write" and seen[name] > good:
                raise OSError(code, os.strerror(code))

        save = pending(tmp_path, "t", big, 0, 1)
        with watched(announce), pytest.raises(OSError, match=os.strerror(code)):
            save.write()
        save.discard()
        held = [str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
        assert not [target for target in held if str(tmp_path) in target]
        assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint-write")]


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    pending(tmp_path, "t", OLD, 0, 1).write()
    with pytest.raises(CheckpointError, match="its save was not finished"):
        Stored(LocalStorage(str(tmp_path)), "t")
    assert tags_by_age(LocalStorage(str(tmp_path))) == []
