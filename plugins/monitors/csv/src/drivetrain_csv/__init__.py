"""Shows the progress of training as CSV files, one per kind of event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from drivetrain.contracts import Bool, PathText, Section, Sections
from drivetrain.monitor import Event, Monitor, writable_folder

if TYPE_CHECKING:
    from typing import TextIO

    from drivetrain import Engine

__all__ = ["CsvMonitor", "CsvSection", "CsvWriter"]


class CsvSection(Section):
    """CSV files of the progress of training."""

    enabled: Bool = Field(default=False, description="Write the files.")
    output_path: PathText = Field(
        default="", description="Folder of all jobs; the working directory by default."
    )
    job_name: str = Field(
        default="DeepSpeedJobName", min_length=1, description="Folder of this job inside it."
    )


class CsvMonitor(Monitor):
    """Owns ``csv_monitor``."""

    name = "csv_monitor"
    sections: ClassVar[Sections] = {"csv_monitor": CsvSection}

    def open_writer(self, engine: Engine, number: int) -> CsvWriter:
        section = self.section(CsvSection)
        job = section.job_name if number == 0 else f"{section.job_name}.{number}"
        folder = Path(section.output_path) / job
        return CsvWriter(writable_folder(folder, "csv_monitor.output_path"))

    def features(self) -> Mapping[str, object]:
        return {"csv_monitor.enabled": self.section(CsvSection).enabled}


class CsvWriter:
    """Appends ``samples,value`` lines to one file per event name.

    Args:
        folder: exists. ``Train/Samples/lr`` goes to ``Train_Samples_lr.csv`` in it, whose first
            line is ``step,lr``; a file that is there already is continued.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, TextIO] = {}

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.name not in self._files:
                self._files[event.name] = self._open(event.name)
            self._files[event.name].write(f"{event.samples},{event.value!r}\n")
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, name: str) -> TextIO:
        path = self._folder / f"{name.replace('/', '_')}.csv"
        file = path.open("a", encoding="utf-8", newline="")
        if file.tell() == 0:
            file.write(f"step,{name.rpartition('/')[2]}\n")
        return file
