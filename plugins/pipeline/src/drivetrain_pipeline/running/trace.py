"""The file that shows how the latest step ran, beside how it was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import DrivetrainError
from drivetrain_pipeline.running.mail import AXIS
from drivetrain_pipeline.schedules import (
    Recorder,
    Schedule,
    Timeline,
    as_chrome_trace,
    beside_prediction,
)
from drivetrain_pipeline.section import PATH

if TYPE_CHECKING:
    from drivetrain.job.job import Job


class Trace(Recorder):
    """Records each step of a stage, and has rank 0 write those of its pipeline into a file.

    Args:
        job: of this rank.
        path: the file; it is replaced as a whole.
    """

    def __init__(self, job: Job, path: Path) -> None:
        super().__init__(job.accelerator.synchronize)
        self._job = job
        self._path = path

    def finish(self, schedule: Schedule) -> None:
        """Write the step that was recorded. All ranks of a pipeline call it.

        Raises:
            DrivetrainError: the file cannot be written.
        """
        job = self._job
        if 0 not in job.mesh.ranks(AXIS):
            return  # only the pipeline of rank 0 is shown
        own = [(begin, end) for _, begin, end in self.spans()]
        # Every stage has as many passes, and all know which; so their times alone travel.
        times = torch.tensor(own, dtype=torch.float64, device=job.device).flatten()
        everyone = times.new_empty(times.numel() * schedule.stages)
        tag = Tag(Purpose.CONTROL, site="pipeline timeline")
        job.communicator.all_gather(everyone, times, AXIS, tag).wait()
        if job.rank == 0:
            self._write(schedule, everyone.reshape(schedule.stages, -1, 2).tolist())

    def _write(self, schedule: Schedule, times: list[list[list[float]]]) -> None:
        measured = Timeline.measured(
            [
                [(str(one), begin, end) for one, (begin, end) in zip(stream, stage, strict=True)]
                for stream, stage in zip(schedule.streams, times, strict=True)
            ]
        )
        part = self._path.with_name(f"{self._path.name}.part")
        try:
            part.write_text(as_chrome_trace(beside_prediction(schedule, measured)), "utf-8")
            part.replace(self._path)
        except OSError as error:
            raise DrivetrainError(
                f"{PATH}.timeline: {self._path} cannot be written: {error.strerror}"
            ) from error
