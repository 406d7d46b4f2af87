"""Runs readers on hostile files, in a process of its own, and notes what became of each.

``python hostile_cases.py FOLDER`` prints a JSON list: per case its name, what was raised, seconds
of processor time, how far the peak of memory has moved, and files outside that were touched.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import CheckpointError

Change = Callable[[Path], object]
"""Turns a sound folder into a hostile one."""


@dataclass(frozen=True)
class Case:
    """One hostile folder and who reads it.

    Args:
        name: what it is.
        base: the sound folder that it is made of.
        change: makes it hostile.
        read: called with the folder, and with an empty one to write in.
        must_fail: whether it has to be refused; others may happen to be sound.
    """

    name: str
    base: Path
    change: Change
    read: Callable[[Path, Path], object]
    must_fail: bool = False


class Watch:
    """Notes files outside of a folder that are opened, listed or changed."""

    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")

    def __init__(self, outside: Path) -> None:
        self.outside = os.path.realpath(outside)
        self.inside = ""
        self.found: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.inside or event not in ("open", "os.listdir", "os.scandir", *self.CHANGES):
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        inside, self.inside = self.inside, ""  # realpath is watched as well
        real = os.path.realpath(os.fsdecode(path))
        self.inside = inside
        writes = event in self.CHANGES or (event == "open" and _writes(arguments))
        if real.startswith(self.outside) or (writes and not real.startswith(inside)):
            self.found.append(f"{event} {real}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


class TooLongError(BaseException):
    """Not caught by what is tested."""


def _too_long(*_: object) -> None:
    raise TooLongError


def run(cases: Iterator[Case], folder: Path, outside: Path) -> Iterator[dict[str, Any]]:
    """Run all cases; each starts from a fresh copy of its base."""
    watch = Watch(outside)
    signal.signal(signal.SIGALRM, _too_long)
    for case in cases:
        place = folder / "case"
        shutil.copytree(case.base, place / "in", symlinks=True)
        case.change(place / "in")
        (place / "out").mkdir()
        (place / "out" / "sentinel").touch()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        watch.found, watch.inside = [], os.path.realpath(place)
        began = time.process_time()
        signal.alarm(20)
        raised, kind = "", ""
        try:
            case.read(place / "in", place / "out" / "new")
        except (Exception, TooLongError) as error:  # noqa: BLE001 - that is what is looked for
            raised, kind = str(error), "CheckpointError"
            if not isinstance(error, CheckpointError):
                raised, kind = traceback.format_exc(), type(error).__name__
        signal.alarm(0)
        watch.inside = ""
        seconds = time.process_time() - began
        written = sum(f.stat().st_blocks * 512 for f in (place / "out").rglob("*") if f.is_file())
        shutil.rmtree(place)
        yield {
            "name": case.name,
            "kind": kind,
            "raised": raised,
            "must_fail": case.must_fail,
            "seconds": seconds,
            "grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
            "written": written,
            "outside": watch.found,
        }


def mutants(value: Any) -> Iterator[tuple[str, Any]]:
    """Copies of plain data, each with one part exchanged for something that it should not be."""
    for path in list(_paths(value)):
        for number, strange in enumerate(STRANGE):
            copy = _copied(value)
            target = copy
            for step in path[:-1]:
                target = target[step]
            with suppress(TypeError):  # tuples
                target[path[-1]] = strange() if callable(strange) else strange
                yield f"{'/'.join(map(str, path))[:60]}={number}", copy


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        steps: list[Any] = list(value)
    else:
        steps = list(range(min(len(value), 3))) if isinstance(value, list) else []
    for step in steps:
        yield (*at, step)
        yield from _paths(value[step], (*at, step))


def doubled(depth: int = 60) -> list[Any]:
    """A list that has 2^depth elements if one counts them."""
    made: list[Any] = [1]
    for _ in range(depth):
        made = [made, made]
    return made


STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 1 << 31, (1 << 63) - 1, 1 << 63, 10**400, 0.5, float("nan"), 1e308),
    *("", "x", "../../etc/passwd", "\x1b[31m\nred", "9" * 5000),
    *([], {}, [[]], [-1], [1 << 62, 1 << 62], [1] * 1000, ["x"], {"x": None}, [None] * 3),
]


def main() -> None:
    os.fsync = lambda _: None  # many small files are written, and none has to last
    folder = Path(sys.argv[1])
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")

    import hostile_archives
    import hostile_checkpoints
    import hostile_weights

    found = []
    for module in (hostile_checkpoints, hostile_weights, hostile_archives):
        base = folder / module.__name__
        base.mkdir()
        found += list(run(module.cases(base, outside), folder, outside))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
