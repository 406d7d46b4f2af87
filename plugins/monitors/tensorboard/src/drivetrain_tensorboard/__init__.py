"""Shows the progress of training in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from drivetrain.contracts import Bool, PathText, Section, Sections
from drivetrain.monitor import Event, Monitor, writable_folder

if TYPE_CHECKING:
    from drivetrain import Engine

__all__ = ["TensorBoard", "TensorBoardSection", "TensorBoardWriter"]


class TensorBoardSection(Section):
    """Event files for TensorBoard."""

    enabled: Bool = Field(default=False, description="Write event files.")
    output_path: PathText = Field(
        default="", description="Folder of all jobs; the working directory by default."
    )
    job_name: str = Field(
        default="DeepSpeedJobName", min_length=1, description="Folder of this job inside it."
    )


class TensorBoard(Monitor):
    """Owns ``tensorboard``."""

    name = "tensorboard"
    sections: ClassVar[Sections] = {"tensorboard": TensorBoardSection}

    def open_writer(self, engine: Engine, number: int) -> TensorBoardWriter:
        section = self.section(TensorBoardSection)
        job = section.job_name if number == 0 else f"{section.job_name}.{number}"
        folder = Path(section.output_path) / job
        return TensorBoardWriter(writable_folder(folder, "tensorboard.output_path"))

    def features(self) -> Mapping[str, object]:
        return {"tensorboard.enabled": self.section(TensorBoardSection).enabled}


class TensorBoardWriter:
    """Writes scalars to one event file.

    Args:
        folder: exists; what is given to ``tensorboard --logdir``.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            self._writer.add_scalar(event.name, event.value, event.samples)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
