"""How checkpoints are written and checked."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from drivetrain.contracts.plugin.plugin import Plugin, Sections
from drivetrain.contracts.plugin.section import NO_EFFECT, Bool, PositiveInt, Section


def _capital(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


class CheckpointSection(Section):
    """Saving and loading."""

    tag_validation: Annotated[Literal["Ignore", "Warn", "Fail"], BeforeValidator(_capital)] = Field(
        default="Warn",
        description="What happens when ranks save under different tags: rank 0's is used "
        "(after a warning, or silently), or saving fails.",
    )
    keep_last: PositiveInt | None = Field(
        default=None,
        description="Checkpoints with default tags (global_step<N>) that stay when a new one is "
        "saved, the newest ones; null keeps all.",
    )
    keep_every: PositiveInt | None = Field(
        default=None,
        description="Beside those of keep_last, keep checkpoints whose step is a multiple of this.",
    )
    load_universal: Bool = Field(
        default=False, description=f"{NO_EFFECT}every checkpoint loads into any layout."
    )
    use_node_local_storage: Bool = Field(
        default=False,
        description=f"{NO_EFFECT}a checkpoint is one directory that all ranks can see.",
    )
    parallel_write: dict[str, Any] = Field(
        default={}, description=f"{NO_EFFECT}every rank always writes what it owns."
    )
    checkpoint_serialization: Bool = Field(
        default=True, description=f"{NO_EFFECT}tensors are written as they are, without pickle."
    )
    writer: dict[str, Any] = Field(default={}, description=f"{NO_EFFECT}there is one writer.")


class Checkpoints(Plugin):
    """Owns the ``checkpoint`` section."""

    name = "checkpoint"
    sections: ClassVar[Sections] = {"checkpoint": CheckpointSection}
