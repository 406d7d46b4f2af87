"""The plugin that keeps activations in host memory or in files between forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from drivetrain.contracts import (
    Bool,
    NonNegativeInt,
    PathText,
    Phase,
    PositiveInt,
    Section,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain_offload.memory import LogsMemory

if TYPE_CHECKING:
    import torch

    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

PATH = "activation_offload"

_BLOCKS_ON_THEIR_WAY = 2
"""Blocks whose activations are on the device while they leave it or come back."""


class ActivationOffloadSection(Section):
    """Where activations wait for backward."""

    enabled: Bool = Field(default=False, description="Move activations off the device.")
    device: Literal["cpu", "nvme"] = Field(
        default="cpu", description="Where they wait: in host memory or in files."
    )
    nvme_path: PathText | None = Field(
        default=None, description="Folder for files; needed for nvme."
    )
    min_bytes: PositiveInt = Field(
        default=1 << 20, description="Smaller tensors stay where they are."
    )
    pin_memory: Bool = Field(
        default=True, description="Lock the host memory, so that copies run beside the device."
    )
    prefetch: NonNegativeInt = Field(
        default=1, description="Repeated blocks whose activations are fetched ahead in backward."
    )
    keep_last: NonNegativeInt = Field(
        default=1,
        description="Repeated blocks at the end of forward whose activations stay on the device, "
        "because backward begins with them.",
    )

    @model_validator(mode="after")
    def _possible(self) -> ActivationOffloadSection:
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError("device is nvme, which needs nvme_path: the folder for the files")
        return self


class ActivationOffload(LogsMemory):
    """Owns ``activation_offload``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: ActivationOffloadSection}

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        from drivetrain_offload.activations.saved import offload_activations

        if not training:  # nothing is saved for a backward that will not come
            return []
        section = self.section(ActivationOffloadSection)
        # Behind the hooks that gather parameters, so that those which are gathered are known.
        return [Transform(Phase.SURROUND, lambda final: offload_activations(job, final, section))]

    def features(self) -> Mapping[str, object]:
        section = self.section(ActivationOffloadSection)
        return {f"{PATH}.enabled": section.enabled, f"{PATH}.device": section.device}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{PATH}.enabled": (False, True)}

    def notes(self) -> Sequence[str]:
        found = list(super().notes())
        if self.section(ActivationOffloadSection).device == "cpu":
            found.append(
                f"{PATH}: does nothing on ranks that compute on the CPU, whose memory is the host's"
            )
        return found

    @hookimpl
    def memory_rows(
        self, engine: Engine, block_activations: int, blocks: int
    ) -> Sequence[tuple[str, str, int, int]]:
        section, on_cpu = self.section(ActivationOffloadSection), _computes_on_host(engine)
        sent = block_activations * max(0, blocks - section.keep_last)
        freed = block_activations * max(0, blocks - section.keep_last - _BLOCKS_ON_THEIR_WAY)
        if not section.enabled or (section.device == "cpu" and on_cpu):
            return ()
        rows = [("activations", "device", -freed, 0)]
        if section.device == "cpu":
            return [*rows, ("activations", "host", sent, sent if section.pin_memory else 0)]
        passing = 0 if on_cpu else min(sent, block_activations * _BLOCKS_ON_THEIR_WAY)
        locked = passing if section.pin_memory else 0
        buffers = ("activations on their way, at most", "host", passing, locked)
        return [*rows, ("activations", "nvme", sent, 0), buffers]


def _computes_on_host(engine: Engine) -> bool:
    return engine.job.accelerator.device_type == "cpu"
