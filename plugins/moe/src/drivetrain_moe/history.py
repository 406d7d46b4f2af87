"""The section ``moe.load``: a file of the load of experts, a line for each step."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from pydantic import Field

from drivetrain.contracts import PathText, Plugin, Purpose, Section, Sections, Tag, hookimpl
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import StepReport, Transform
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

LOAD = "moe.load"

logger = logging.getLogger("drivetrain.moe")

_MOST_STEPS, _MOST_SECONDS = 100, 5.0
"""Reports that are kept, and for how long, before they are read: steps do not wait for a device."""


class LoadSection(Section):
    """The load of experts over time, for ``drivetrain moe load``."""

    file: PathText | None = Field(
        default=None,
        description="File to which rank 0 writes, for each step, the share of choices of each "
        "expert by layer, as a line of JSON; by default none. One that exists is continued.",
    )


class LoadHistory(Plugin):
    """Owns ``moe.load``."""

    name = LOAD
    sections: ClassVar[Sections] = {LOAD: LoadSection}

    def enabled(self) -> bool:
        return self.section(LoadSection).file is not None

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        """Refuse a file that cannot be written, on every rank, before anything is built."""
        if training and job.device.type != "meta":  # which is no job, but its rehearsal
            _refuse_unwritable(job, self._path(len(job.engines)))
        return []

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        if engine.job.rank:
            return
        if engine not in _writers:
            _writers[engine] = _Writer(self._path(engine.job.engines.index(engine)))
            engine.job.on_close(_writers[engine].close)
        _writers[engine].add(report)

    def _path(self, number: int) -> Path:
        """The file of the engine with this number in its job."""
        path = Path(self.section(LoadSection).file or "")
        return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path

    def features(self) -> Mapping[str, object]:
        return {f"{LOAD}.file": self.section(LoadSection).file is not None}


def _opened(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


def _refuse_unwritable(job: Job, path: Path) -> None:
    """Have rank 0 try to open ``path``, and raise on every rank if it cannot. Collective."""
    import torch

    code = 0
    if job.rank == 0:
        try:
            _opened(path).close()
        except OSError as error:
            code = error.errno or errno.EIO
    flaw = torch.tensor([code], dtype=torch.int64, device=job.device)
    job.communicator.broadcast(flaw, "world", Tag(Purpose.CONTROL, site=LOAD))
    if int(flaw):
        raise ConfigError(
            f"{LOAD}.file: {path.absolute()} cannot be written by rank 0: {os.strerror(int(flaw))}"
        )


class _Writer:
    """Appends lines ``{"step": 1, "samples": 64, "load": {LAYER: [share, ...]}}`` to a file."""

    def __init__(self, path: Path) -> None:
        self._waiting: list[StepReport] = []
        self._written_at = time.monotonic()
        self._file: IO[str] | None = None
        try:
            self._file = _opened(path)
        except OSError as error:  # it could be written when the job began
            logger.warning("%s writes nothing, training goes on: %s", LOAD, error)
        atexit.register(self.close)

    def add(self, report: StepReport) -> None:
        self._waiting.append(report)
        waited = time.monotonic() - self._written_at
        if len(self._waiting) >= _MOST_STEPS or waited >= _MOST_SECONDS:
            self._write()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._write()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        reports, self._waiting = self._waiting, []
        self._written_at = time.monotonic()
        if self._file is None:
            return
        try:
            for report in reports:
                load = load_of(report.values)
                if load:
                    line = {"step": report.step, "samples": report.samples, "load": load}
                    self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            logger.warning("%s writes nothing more, training goes on: %s", LOAD, error)
            self._file = None


def load_of(values: Mapping[str, float | list[float]]) -> dict[str, list[float]]:
    """Layer -> share of choices of each expert, of the values of a report."""
    return {
        name.removeprefix("moe/").removesuffix("/load"): [round(share, 6) for share in value]
        for name, value in values.items()
        if name.startswith("moe/") and name.endswith("/load") and isinstance(value, list)
    }


_writers: WeakKeyDictionary[Engine, _Writer] = WeakKeyDictionary()
