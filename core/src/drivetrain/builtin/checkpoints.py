"""How checkpoints are written and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from drivetrain.builtin.base import Builtin
from drivetrain.plugin import Section
from drivetrain.section import Bool


def _capital(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


_NO_EFFECT = {
    "load_universal": "every checkpoint loads into any layout",
    "parallel_write": "every rank always writes what it owns",
    "checkpoint_serialization": "tensors are written as they are, without pickle",
    "writer": "there is one writer, and it tunes itself",
    "use_node_local_storage": "a checkpoint is one directory that all ranks can see",
}


class CheckpointSection(Section):
    """Saving and loading."""

    tag_validation: Annotated[Literal["Ignore", "Warn", "Fail"], BeforeValidator(_capital)] = Field(
        default="Warn", description="What happens when ranks save under different tags."
    )
    load_universal: Bool = Field(
        default=False, description=f"Accepted, has no effect: {_NO_EFFECT['load_universal']}."
    )
    use_node_local_storage: Bool = Field(
        default=False,
        description=f"Accepted, has no effect: {_NO_EFFECT['use_node_local_storage']}.",
    )
    parallel_write: dict[str, Any] = Field(
        default_factory=dict,
        description=f"Accepted, has no effect: {_NO_EFFECT['parallel_write']}.",
    )
    checkpoint_serialization: Bool = Field(
        default=True,
        description=f"Accepted, has no effect: {_NO_EFFECT['checkpoint_serialization']}.",
    )
    writer: dict[str, Any] | None = Field(
        default=None, description=f"Accepted, has no effect: {_NO_EFFECT['writer']}."
    )


class Checkpoints(Builtin):
    """Owns the ``checkpoint`` section."""

    name = "checkpoint"
    sections = {"checkpoint": CheckpointSection}

    def notes(self) -> Sequence[str]:
        given = self.section(CheckpointSection).model_fields_set
        reasons: Mapping[str, str] = _NO_EFFECT
        return [
            f"checkpoint.{key}: no effect, {why}" for key, why in reasons.items() if key in given
        ]
