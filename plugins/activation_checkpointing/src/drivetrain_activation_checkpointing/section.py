"""The config section ``activation_checkpointing``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, PositiveInt, Section

PATH = "activation_checkpointing"


class ActivationCheckpointingSection(Section):
    """What is computed again in backward, and how its inputs wait for that."""

    recompute: Literal["none", "all", "as_needed"] | PositiveInt = Field(
        default="none",
        description="Repeated blocks of the model whose forward runs again in backward: none, all, "
        "every n-th, or as_needed for memory_limit. What the script checkpoints is apart from it.",
    )
    memory_limit: PositiveInt | None = Field(
        default=None,
        description="Bytes on a rank that repeated blocks may keep for backward in one forward; "
        "for as_needed.",
    )
    partition_activations: Bool = Field(
        default=False, description="Each tensor-parallel rank keeps a part of the saved inputs."
    )
    cpu_checkpointing: Bool = Field(default=False, description="Saved inputs wait in host memory.")
    contiguous_memory_optimization: Bool = Field(
        default=False, description="Saved inputs of one size lie in one piece of memory."
    )
    number_checkpoints: PositiveInt | None = Field(
        default=None, description="Saved inputs that such a piece has room for."
    )
    synchronize_checkpoint_boundary: Bool = Field(
        default=False, description="Wait for the device before and after each forward."
    )
    profile: Bool = Field(
        default=False, description="Count recomputation under its own name in the times of a step."
    )

    @model_validator(mode="after")
    def _possible(self) -> ActivationCheckpointingSection:
        if self.recompute == "as_needed" and self.memory_limit is None:
            raise ValueError(
                "recompute is as_needed, which needs memory_limit: the bytes that repeated blocks "
                "may keep for backward"
            )
        if self.recompute != "as_needed" and self.memory_limit is not None:
            raise ValueError('memory_limit is only looked at where recompute is "as_needed"')
        if self.contiguous_memory_optimization and self.number_checkpoints is None:
            raise ValueError(
                "contiguous_memory_optimization needs number_checkpoints: how many inputs are "
                "saved before backward"
            )
        return self
