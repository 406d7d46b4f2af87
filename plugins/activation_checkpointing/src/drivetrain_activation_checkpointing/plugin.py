"""The plugin that has repeated blocks of the model computed again in backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Conflict, Phase, Plugin, Sections, Transform, hookimpl
from drivetrain_activation_checkpointing.section import PATH, ActivationCheckpointingSection

if TYPE_CHECKING:
    import torch

    from drivetrain.job.job import Job


class ActivationCheckpointing(Plugin):
    """Owns ``activation_checkpointing``."""

    name = PATH
    after = ("sequence_parallel",)  # recomputed blocks contain tiles and chunks
    sections: ClassVar[Sections] = {PATH: ActivationCheckpointingSection}

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        from drivetrain_activation_checkpointing.units import recompute_units

        section = self.section(ActivationCheckpointingSection)
        if not training or section.recompute == "none":
            return []
        return [Transform(Phase.RECOMPUTE, lambda found: recompute_units(job, found, section))]

    def features(self) -> Mapping[str, object]:
        section = self.section(ActivationCheckpointingSection)
        return {
            f"{PATH}.recompute": section.recompute,
            f"{PATH}.partition_activations": section.partition_activations,
            f"{PATH}.cpu_checkpointing": section.cpu_checkpointing,
            f"{PATH}.contiguous_memory_optimization": section.contiguous_memory_optimization,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{PATH}.recompute": ("none", "all")}

    def conflicts(self) -> Sequence[Conflict]:
        reason = (
            "both decide where the inputs of recomputed blocks wait; activation_offload moves them "
            "to host memory or files as it moves all activations, so leave out this key"
        )
        keys = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
        return [
            Conflict(f"{PATH}.{key}", True, "activation_offload.enabled", True, reason)
            for key in keys
        ]

    def notes(self) -> Sequence[str]:
        section = self.section(ActivationCheckpointingSection)
        found = list(super().notes())
        if section.recompute == "none":
            found.append(f"{PATH}: recompute is none, so only what the script checkpoints is")
        if section.cpu_checkpointing:
            found.append(
                f"{PATH}.cpu_checkpointing: does nothing on ranks that compute on the CPU, whose "
                "memory is the host's"
            )
        return found
