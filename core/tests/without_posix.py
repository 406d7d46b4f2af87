"""Trains and saves in one process as on a system without POSIX: a program for a test.

Torch and the standard library are imported first, since theirs for such a system are other builds.
Then the modules and functions are taken away that Windows has not, and the file system refuses what
it refuses there: to open a folder, and to replace or remove a file that is open.
"""

from __future__ import annotations

import importlib
import mmap
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

import pydantic  # noqa: F401 - while the system is whole
import torch
import torch.distributed
from torch import nn

MODULES = (
    "fcntl",
    "resource",
    "pwd",
    "grp",
    "termios",
    "tty",
    "pty",
    "syslog",
    "posix",
    "readline",
)
FUNCTIONS = (
    *("preadv", "pread", "pwrite", "pwritev", "readv", "writev", "sysconf", "sysconf_names"),
    *("getuid", "geteuid", "getgid", "getegid", "getgroups", "fork", "forkpty", "uname", "nice"),
    *("sched_getaffinity", "sched_setaffinity", "sched_yield", "posix_fadvise", "posix_fallocate"),
    *("mkfifo", "chown", "fchown", "lchown", "fchmod", "fchdir", "killpg", "setsid", "getpgid"),
    *("fdatasync", "statvfs", "fstatvfs", "sync", "getloadavg", "wait3", "wait4", "WNOHANG"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_SYNC", "O_DSYNC", "O_DIRECT"),
    *("register_at_fork", "ctermid", "openpty", "pipe2", "sendfile", "memfd_create"),
)
SIGNALS = ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGQUIT", "SIGCHLD", "setitimer")


def take_away() -> None:
    """Leave what Windows has."""
    sys.modules.update(dict.fromkeys(MODULES))  # None: importing it fails
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            vars(module).pop(name, None)
    for name in [name for name in vars(mmap) if name.startswith(("MAP_", "PROT_", "MADV_"))]:
        delattr(mmap, name)
    anonymous = mmap.mmap
    mmap.mmap = lambda fileno, length: anonymous(fileno, length)  # type: ignore[misc,assignment]
    real_open, real_close = os.open, os.close
    opened: dict[int, str] = {}

    def opens(path: Any, flags: int, *mode: int, **rest: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        file = real_open(path, flags, *mode, **rest)
        opened[file] = str(Path(path).absolute())
        return file

    def closes(file: int) -> None:
        opened.pop(file, None)
        real_close(file)

    os.open, os.close = opens, closes  # type: ignore[assignment]
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, _refusing_open_files(getattr(os, name), opened))


def _refusing_open_files(function: Any, opened: dict[int, str]) -> Any:
    def call(*paths: Any) -> None:
        for path in paths:
            if str(Path(path).absolute()) in opened.values():
                raise PermissionError(32, "the file is used by a process", str(path))
        function(*paths)

    return call


def main(folder: str) -> None:
    """Import everything, plan, check, train, save and go on from what was saved."""
    import drivetrain

    for module in pkgutil.walk_packages(drivetrain.__path__, "drivetrain."):
        importlib.import_module(module.name)
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "checkpoint": {"keep_last": 1},
    }
    explanation = drivetrain.Plan.build(config).explain()
    assert explanation.values["train_batch_size"] == (4, "config")

    def engine() -> Any:
        torch.manual_seed(0)
        return drivetrain.initialize(model=nn.Linear(3, 1), config=config)[0]

    def steps(trained: Any, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = trained(torch.ones(4, 3)).square().mean()
            trained.backward(loss)
            trained.step()
            losses.append(loss.item())
        return losses

    whole = steps(engine(), 4)
    first = engine()
    assert steps(first, 2) == whole[:2]
    for tag in ("one", "two", "two"):  # twice under one tag: files are replaced
        first.save_checkpoint(folder, tag=tag)
    first.save_checkpoint(folder)
    second = engine()
    second.load_checkpoint(folder)
    assert steps(second, 2) == whole[2:]
    second.save_checkpoint(folder)


if __name__ == "__main__":
    import torch._dynamo
    import torch.distributed.checkpoint

    main_folder = sys.argv[1]
    take_away()
    main(main_folder)
