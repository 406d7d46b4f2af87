"""How checkpoints are written and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from drivetrain.plugin import Plugin, Section, Sections
from drivetrain.section import Bool, PositiveInt

_NO_EFFECT = {
    "load_universal": "every checkpoint loads into any layout",
    "use_node_local_storage": "a checkpoint is one directory that all ranks can see",
    "parallel_write": "every rank always writes what it owns",
    "checkpoint_serialization": "tensors are written as they are, without pickle",
    "writer": "there is one writer",
}


def _no_effect(key: str) -> str:
    return f"Accepted, has no effect: {_NO_EFFECT[key]}."


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
    load_universal: Bool = Field(default=False, description=_no_effect("load_universal"))
    use_node_local_storage: Bool = Field(
        default=False, description=_no_effect("use_node_local_storage")
    )
    parallel_write: dict[str, Any] = Field(default={}, description=_no_effect("parallel_write"))
    checkpoint_serialization: Bool = Field(
        default=True, description=_no_effect("checkpoint_serialization")
    )
    writer: dict[str, Any] = Field(default={}, description=_no_effect("writer"))


class Checkpoints(Plugin):
    """Owns the ``checkpoint`` section."""

    name = "checkpoint"
    sections: ClassVar[Sections] = {"checkpoint": CheckpointSection}

    def notes(self) -> Sequence[str]:
        given = self.section(CheckpointSection).model_fields_set
        return [f"checkpoint.{k}: no effect, {why}" for k, why in _NO_EFFECT.items() if k in given]
