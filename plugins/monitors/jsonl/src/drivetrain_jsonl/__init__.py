"""Shows the progress of training as lines of JSON, one for each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from drivetrain.contracts import Bool, PathText, Section, Sections
from drivetrain.monitor import Event, Monitor, writable_folder

if TYPE_CHECKING:
    from drivetrain import Engine

__all__ = ["JsonLines", "JsonLinesSection", "JsonLinesWriter"]


class JsonLinesSection(Section):
    """Files of the progress of training, a line of JSON for each step."""

    enabled: Bool = Field(default=False, description="Write the files.")
    output_path: PathText = Field(
        default="", description="Folder of all jobs; the working directory by default."
    )
    job_name: str = Field(
        default="drivetrain", min_length=1, description="Folder of this job inside it."
    )
    ranks: Literal["first", "all"] = Field(
        default="first", description="Who writes; times and memory differ between ranks."
    )


class JsonLines(Monitor):
    """Owns ``json_lines``."""

    name = "json_lines"
    sections: ClassVar[Sections] = {"json_lines": JsonLinesSection}
    most_seconds: ClassVar[float] = 5.0
    detailed: ClassVar[bool] = True

    def writes_on(self, rank: int) -> bool:
        return rank == 0 or self.section(JsonLinesSection).ranks == "all"

    def open_writer(self, engine: Engine, number: int) -> JsonLinesWriter:
        section = self.section(JsonLinesSection)
        job = section.job_name if number == 0 else f"{section.job_name}.{number}"
        path, rank = Path(section.output_path) / job, engine.job.rank
        folder = writable_folder(path, "json_lines.output_path", rank)
        return JsonLinesWriter(folder / f"rank{rank}.jsonl")

    def features(self) -> Mapping[str, object]:
        return {"json_lines.enabled": self.section(JsonLinesSection).enabled}


class JsonLinesWriter:
    """Appends a line for each place on the x axis: ``{"samples": 64, "lr": 0.1, ...}``.

    Names lose the ``Train/Samples/`` in front. A number that is not finite is written as ``null``,
    since JSON has no other word for it.

    Args:
        path: the file; continued if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, events: Sequence[Event]) -> None:
        lines: dict[int, dict[str, float | None]] = {}
        for event in events:
            finite = event.value if abs(event.value) < float("inf") else None
            name = event.name.removeprefix("Train/Samples/")
            lines.setdefault(event.samples, {})[name] = finite
        for samples, values in lines.items():
            self._file.write(json.dumps({"samples": samples, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
