"""The config section ``memory_snapshot``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import Bool, NonNegativeInt, PathText, PositiveInt, Section

PATH = "memory_snapshot"


class MemorySnapshotSection(Section):
    """Which tensors one step has at the peak of its memory, by module, phase and kind."""

    enabled: Bool = Field(default=True, description="Watch one step, and go on without cost.")
    step: NonNegativeInt = Field(
        default=1,
        description="Optimizer steps before the one that is watched. The first one (0) also "
        "allocates what stays, so it is not like the others.",
    )
    path: PathText = Field(
        default="memory_snapshot",
        description="Folder for a table (.txt), the tensors (.json) and, where the device's "
        "allocator keeps a history, that (.pickle, for pytorch.org/memory_viz) of each rank.",
    )
    top: PositiveInt = Field(
        default=20, description="Modules and tensors that the table lists, the largest first."
    )
    history: Bool = Field(
        default=True,
        description="Write the allocator's history, too, where the device's allocator keeps one.",
    )
