"""What all ranks must read alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError
from drivetrain_pipeline.section import PATH

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_pipeline.section import PipelineSection


def check_same_file(job: Job, section: PipelineSection) -> None:
    """Check that all ranks have the same measured times, by which each cuts the model itself.

    All ranks call it.

    Raises:
        ConfigError: on every rank, where the files differ.
    """
    if section.measured is None:
        return
    own = torch.tensor([crc32(Path(section.measured).read_bytes())], device=job.device)
    everyone = own.new_empty(job.mesh.size("world"))
    job.communicator.all_gather(everyone, own, "world", Tag(Purpose.CONTROL, site="pipeline file"))
    sums = everyone.tolist()
    others = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if others:
        raise ConfigError(
            f"{PATH}.measured: {section.measured} is another file on rank {others[0]} than on rank "
            "0; copy one of them to all machines"
        )
