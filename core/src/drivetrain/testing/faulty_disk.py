"""A disk that fails at one operation, or from one operation on: for tests of whatever saves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from drivetrain.checkpoint.format import index, plain_file, storage
from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.checkpoint.load import check_file
from drivetrain.engine.engine import Engine

READING = ("listdir", "stat", "fstat", "preadv")
WRITING = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir")

Contents = dict[tuple[str, str], torch.Tensor]
"""Tensors by kind and name."""


@dataclass(frozen=True)
class Fault:
    """What an operation does instead of succeeding.

    Args:
        code: number of the error.
        done: the operation is carried out, and only then fails, as on a network.
        lasting: all operations that follow fail, too.
    """

    code: int
    done: bool = False
    lasting: bool = False


FULL = Fault(errno.ENOSPC)
DONE = Fault(errno.EIO, done=True)
GONE = Fault(errno.EIO, lasting=True)


class FaultyOs:
    """``os`` as a storage sees it; operations are counted, and one fails."""

    def __init__(self, number: int | None, fault: Fault = FULL) -> None:
        self.count = 0
        self._number = number
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        original = getattr(os, name)
        if name not in READING + WRITING:
            return original

        def operation(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            number, fault = self._number, self._fault
            fails = number is not None and (
                self.count >= number if fault.lasting else self.count == number
            )
            if name == "close" or not fails or fault.done:  # a failing close closes all the same
                result: Any = None if name == "fsync" else original(*arguments, **options)
                if not fails:
                    return result
                if name == "open":
                    os.close(result)  # who gets an error has no descriptor
            raise OSError(fault.code, os.strerror(fault.code), name)

        return operation

    @property
    def has_failed(self) -> bool:
        """Whether the save came as far as the fault."""
        return self._number is not None and self.count >= self._number


@contextmanager
def failing(number: int | None, fault: Fault = FULL) -> Iterator[FaultyOs]:
    """Make operation ``number`` of all that storages do fail; count them."""
    faulty = FaultyOs(number, fault)
    with patch.object(storage, "os", faulty), patch.object(plain_file, "os", faulty):
        yield faulty


def contents(engine: Engine) -> Contents:
    """Copies of all numbers of an engine that holds its states whole."""
    found = {(f.kind, f.name): f for f in engine.states.fragments() if f.kind != "gradient"}
    return {key: found[key].read().clone().view(found[key].global_shape) for key in sorted(found)}


def check_all(folder: Path, saved: dict[int, Contents]) -> dict[str, int]:
    """Read everything that any manifest names, and compare it with what was saved in its step.

    Returns:
        The step of every checkpoint by its tag.
    """
    disk, steps = LocalStorage(str(folder)), {}
    for tag in disk.names():
        if index.MANIFEST not in disk.names(tag):
            continue
        stored = Stored(disk, tag)
        steps[tag] = stored.manifest["step"]
        expected = saved[steps[tag]]
        _claim(set(stored.keys) == set(expected), f"{tag} holds other tensors than were saved")
        for rank in range(stored.world_size):
            check_file(stored, rank)
            read_whole(disk, stored.own(rank)["state"])
        for kind, name in stored.keys:
            source = stored.find(kind, name)
            same = source and torch.equal(read_whole(disk, source), expected[kind, name])
            _claim(bool(same), f"{name} ({kind}) in {tag} is not what was saved")
    disk.close()
    return steps


def _claim(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def stored_contents(folder: Path, tag: str) -> Contents:
    """All tensors of a checkpoint."""
    stored = Stored(LocalStorage(str(folder)), tag)
    found = {key: stored.find(*key) for key in sorted(stored.keys)}
    return {key: read_whole(stored.storage, source) for key, source in found.items() if source}


def open_files(folder: Path) -> list[str]:
    """Files below ``folder``, also removed ones, that this process holds open."""
    held = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # the listing's own
            continue
        if str(folder) in target:
            held.append(target)
    return held
