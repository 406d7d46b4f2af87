"""The section ``moe.load``: a file of the load of experts, a line for each step."""

from __future__ import annotations

import atexit
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from pydantic import Field

from drivetrain.contracts import PathText, Plugin, Section, Sections, hookimpl
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.contracts import StepReport
    from drivetrain.engine.engine import Engine

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
    def step_end(self, engine: Engine, report: StepReport) -> None:
        file = self.section(LoadSection).file
        if engine.job.rank or file is None:
            return
        if engine not in _writers:
            number, path = engine.job.engines.index(engine), Path(file)
            if number:
                path = path.with_name(f"{path.stem}.{number}{path.suffix}")
            _writers[engine] = _Writer(path)
            engine.job.on_close(_writers[engine].close)
        _writers[engine].add(report)

    def features(self) -> Mapping[str, object]:
        return {f"{LOAD}.file": self.section(LoadSection).file is not None}


class _Writer:
    """Appends lines ``{"step": 1, "samples": 64, "load": {LAYER: [share, ...]}}`` to a file."""

    def __init__(self, path: Path) -> None:
        self._waiting: list[StepReport] = []
        self._written_at = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] | None = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{LOAD}.file: {path.absolute()} cannot be written: {error.strerror}"
            ) from error
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
