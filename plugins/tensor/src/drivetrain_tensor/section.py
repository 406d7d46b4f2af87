"""The config section ``tensor_parallel``; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from drivetrain.contracts.plugin.section import (
    NO_EFFECT,
    Bool,
    Int,
    NonNegativeInt,
    PositiveInt,
    Section,
)

PATH = "tensor_parallel"


class LayerSpec(Section):
    """How layers whose weight's path a pattern matches are cut."""

    patterns: list[str] = Field(
        min_length=1,
        description="Regular expressions, matched from the start of `<path of the layer>.weight`.",
    )
    partition_type: Literal["column", "row", "skip"] = Field(
        default="column",
        description="`column` cuts outputs, `row` inputs; `skip` keeps the layer whole.",
    )
    shape: list[Int | list[PositiveInt]] | None = Field(
        default=None,
        description="Accepted, has no effect: which outputs of a fused layer belong together is "
        "found by running the model.",
    )
    partition_dim: NonNegativeInt | None = Field(
        default=None,
        description="Accepted, has no effect: which outputs of a fused layer belong together is "
        "found by running the model.",
    )
    model_types: list[str] | None = Field(
        default=None, description="Only for models whose `config.model_type` is one of these."
    )

    @field_validator("patterns")
    @classmethod
    def _compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value


class PartitionConfig(Section):
    """Which layers to cut, where that is not to be found by running the model alone."""

    use_default_specs: Bool = Field(
        default=True,
        description="Also cut what no pattern matches. `false` cuts what patterns name alone.",
    )
    strict_mode: Bool = Field(
        default=False, description="Refuse the model where a matrix is left whole unnamed."
    )
    layer_specs: list[LayerSpec] = Field(default_factory=list, description="First match counts.")


class TensorSizes(Section):
    """Ranks along the axis `tp`, as DeepSpeed nests them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tp_size: PositiveInt = Field(default=1, description="Ranks that share each layer.")
    tp_grain_size: PositiveInt = Field(
        default=1,
        description=NO_EFFECT + "ranks get whole heads, and neurons in multiples of up to 16.",
    )


class TensorParallelSection(Section):
    """Layers are cut, and each of some ranks computes with a part of them."""

    renamed: ClassVar[Mapping[str, str]] = {"tp_size": "autotp_size"}

    autotp_size: NonNegativeInt = Field(
        default=0, description="Ranks that share each layer; 0 and 1 cut nothing."
    )
    tp: TensorSizes = Field(default_factory=TensorSizes, description="The same, nested.")
    tp_overlap_comm: Bool = Field(
        default=False,
        description="Sum gradients of inputs over ranks while those of weights are computed.",
    )
    partition_config: PartitionConfig | None = Field(
        default=None, description="Layers by pattern; by default all that can be cut are."
    )
    vocabulary: Bool = Field(
        default=True, description="Also cut embeddings of tokens and the heads that belong to them."
    )
    sequence_parallel: Bool = Field(
        default=False,
        description="Share out tokens over the same ranks between layers: norms, dropout and "
        "residuals have 1 / `autotp_size` of them, and of memory.",
    )
    domino: Bool = Field(
        default=False,
        description="Compute repeated blocks in two halves of the batch, one of which computes "
        "while sums of the other are under way (Domino).",
    )
    vocabulary_loss: Bool = Field(
        default=True,
        description="Compute cross-entropies from parts of the vocabulary. Logits are gathered "
        "when something else reads them, on every rank along `tp`; `false` gathers them at once.",
    )
    check: Bool = Field(
        default=True,
        description="Compare the cut model with the whole one on a small sample, before training.",
    )
    dtype: str | None = Field(
        default=None, description=NO_EFFECT + "the precision of the config counts."
    )
    preset_model: str | None = Field(
        default=None, description=NO_EFFECT + "layers are found by running the model."
    )
    keep_module_on_host: Bool = Field(
        default=False, description=NO_EFFECT + "a module is cut where it was made."
    )

    @property
    def ranks(self) -> int:
        """Ranks along ``tp``."""
        return max(1, self.autotp_size, self.tp.tp_size)

    @model_validator(mode="after")
    def _agree(self) -> TensorParallelSection:
        sizes = {self.autotp_size, self.tp.tp_size} - {0, 1}
        if len(sizes) > 1:
            raise ValueError(
                f"autotp_size is {self.autotp_size} and tp.tp_size {self.tp.tp_size}: give one"
            )
        return self


def as_section(settings: Mapping[str, Any]) -> TensorParallelSection:
    """The section of a mapping, checked."""
    return TensorParallelSection.model_validate(dict(settings))
