"""The section ``compression_training``, with the keys that DeepSpeed has."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from drivetrain.contracts import (
    Bool,
    Float,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
)
from drivetrain_compression.students.terms import DistillationSection

PATH = "compression_training"
EIGENVALUE = "eigenvalue"

Kind = Literal["symmetric", "asymmetric"]
Ratio = Annotated[Float, Field(gt=0, le=1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_listed)]

ParamsT = TypeVar("ParamsT", bound=BaseModel)


class Shared(Section):
    """What all groups of a method share."""

    enabled: Bool = Field(default=False, description="Use the method.")


SharedT = TypeVar("SharedT", bound=Shared)


class Group(Section, Generic[ParamsT]):
    """Modules that a method treats alike."""

    params: ParamsT = Field(description="What holds for this group.")
    modules: Patterns = Field(
        default=("*",), description='Patterns, searched in names of modules; "*" is every one.'
    )
    related_modules: tuple[Patterns, ...] | None = Field(
        default=None,
        description="For each pattern of modules, patterns of those that lose the same dimensions "
        "when the model is cleaned.",
    )


class Method(Section, Generic[SharedT, ParamsT]):
    """A method: what all groups share, and the groups."""

    shared_parameters: SharedT = Field(description="What holds for all groups.")
    different_groups: dict[str, Group[ParamsT]] = Field(default={}, description="Groups by name.")
    needs_groups: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the method is used."""
        return bool(self.shared_parameters.enabled)

    @model_validator(mode="after")
    def _has_groups(self) -> Any:
        if self.enabled and self.needs_groups and not self.different_groups:
            raise ValueError("it is enabled, so different_groups needs at least one group")
        return self


class MixedSection(Section):
    """Mix quantised weights with exact ones."""

    enabled: Bool = Field(default=False, description="Mix them.")
    quantize_change_ratio: NonNegativeFloat = Field(
        default=0.001, description="By how much the share of the exact weight falls per step."
    )


class WeightShared(Shared):
    """Weights in few bits: what all groups share."""

    quantizer_kernel: Bool = Field(
        default=False,
        description="Accepted, has no effect: formulas run in kernels wherever there are some.",
    )
    schedule_offset: NonNegativeInt = Field(default=0, description="Steps before it begins.")
    quantize_groups: PositiveInt = Field(
        default=1, description="Scales of a weight, for equal parts in memory order."
    )
    quantize_verbose: Bool = Field(default=False, description="Log when bits fall.")
    quantization_type: Kind = Field(default="symmetric", description="Grid around 0, or not.")
    rounding: Literal["nearest", "stochastic"] = Field(default="nearest", description="How.")
    quantize_weight_in_forward: Bool = Field(
        default=False,
        description="Accepted, has no effect: weights are quantised where they are used, which "
        "gives the numbers of both ways.",
    )
    fp16_mixed_quantize: MixedSection = Field(
        default=MixedSection(), description="Mix with exact weights."
    )


class WeightParams(Section):
    """Weights in few bits: bits of a group."""

    start_bits: PositiveInt = Field(description="Bits at the offset.")
    target_bits: PositiveInt = Field(description="Bits in the end.")
    quantization_period: PositiveInt = Field(
        default=1, description="Steps until bits fall by one; it doubles each time."
    )


class ActivationShared(Shared):
    """Inputs of layers in few bits: what all groups share."""

    quantization_type: Kind = Field(default="symmetric", description="Grid around 0, or not.")
    range_calibration: Literal["dynamic", "static"] = Field(
        default="dynamic", description="A range for each token, or a running one for all."
    )
    schedule_offset: NonNegativeInt = Field(default=1000, description="Steps before it begins.")


class ActivationParams(Section):
    """Inputs of layers in few bits: bits of a group."""

    bits: Literal[4, 8] = Field(description="4 or 8.")


class SparseShared(Shared):
    """Zeros in weights: what all groups share."""

    method: Literal["l1", "topk", "snip_momentum"] = Field(
        default="l1", description="By magnitude, by learned scores, or by blocks and gradients."
    )
    schedule_offset: NonNegativeInt = Field(default=1000, description="Steps before it begins.")
    schedule_offset_end: NonNegativeInt | None = Field(
        default=None, description="Step at which all zeros are there; the offset by default."
    )
    schedule_offset_stride: PositiveInt = Field(
        default=1, description="Steps from one choice of blocks to the next."
    )
    block_pattern: Annotated[str, Field(pattern=r"^[1-9]\d*[x:][1-9]\d*$")] = Field(
        default="4x1",
        description="NxM: blocks of N outputs and M inputs; N:M: N zeros in M inputs.",
    )
    dense_ratio: Annotated[Float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share that is kept of all weights (snip_momentum)."
    )
    excluded_modules: tuple[str, ...] = Field(
        default=(), description="Patterns of modules that stay dense (snip_momentum)."
    )


class RatioParams(Section):
    """How much of a group is kept."""

    dense_ratio: Ratio = Field(description="Share that is kept, above 0.")


class PartShared(Shared):
    """Removed rows or channels: what all groups share."""

    method: Literal["l1", "topk"] = Field(
        default="l1", description="By magnitude, or by learned scores."
    )
    schedule_offset: NonNegativeInt = Field(default=1000, description="Steps before it begins.")


class HeadShared(Shared):
    """Removed heads: what all groups share."""

    method: Literal["l1", "topk"] = Field(
        default="topk", description="By magnitude, or by learned scores."
    )
    schedule_offset: NonNegativeInt = Field(default=1000, description="Steps before it begins.")
    num_heads: PositiveInt | None = Field(default=None, description="Heads of each attention.")

    @model_validator(mode="after")
    def _has_heads(self) -> HeadShared:
        if self.enabled and self.num_heads is None:
            raise ValueError("it is enabled, so num_heads is required")
        return self


class WeightMethod(Method[WeightShared, WeightParams]):
    """Weights in few bits."""

    shared_parameters: WeightShared = Field(
        default=WeightShared(), description="What holds for all groups."
    )


class ActivationMethod(Method[ActivationShared, ActivationParams]):
    """Inputs of layers in few bits."""

    shared_parameters: ActivationShared = Field(
        default=ActivationShared(), description="What holds for all groups."
    )


class SparseMethod(Method[SparseShared, RatioParams]):
    """Zeros in weights."""

    shared_parameters: SparseShared = Field(
        default=SparseShared(), description="What holds for all groups."
    )

    @property
    def needs_groups(self) -> bool:  # type: ignore[override]
        """snip_momentum has one ratio for all weights."""
        return self.shared_parameters.method != "snip_momentum"


class PartMethod(Method[PartShared, RatioParams]):
    """Rows or channels that are removed."""

    shared_parameters: PartShared = Field(
        default=PartShared(), description="What holds for all groups."
    )


class HeadMethod(Method[HeadShared, RatioParams]):
    """Heads that are removed."""

    shared_parameters: HeadShared = Field(
        default=HeadShared(), description="What holds for all groups."
    )


class LayerReductionSection(Section):
    """A student with fewer layers, which begins with some of the teacher's."""

    enabled: Bool = Field(default=False, description="Copy layers of a teacher.")
    keep_number_layer: PositiveInt | None = Field(
        default=None, description="Layers of the student; the model has to have as many."
    )
    module_name_prefix: str | None = Field(
        default=None, description="Path of the list of layers, such as bert.encoder.layer."
    )
    teacher_layer: tuple[NonNegativeInt, ...] = Field(
        default=(), description="Layers of the teacher for the student's 0, 1, 2, ..."
    )
    other_module_name: tuple[str, ...] = Field(
        default=(), description="Paths of other modules that are copied."
    )

    @model_validator(mode="after")
    def _is_complete(self) -> LayerReductionSection:
        if not self.enabled:
            return self
        if self.module_name_prefix is None or not self.teacher_layer:
            raise ValueError("it is enabled, so module_name_prefix and teacher_layer are required")
        if self.keep_number_layer not in (None, len(self.teacher_layer)):
            raise ValueError(
                f"keep_number_layer is {self.keep_number_layer}, but teacher_layer names "
                f"{len(self.teacher_layer)}"
            )
        return self


class EigenvalueSection(Section):
    """Periods of bits that depend on the curvature of the loss."""

    enabled: Bool = Field(default=False, description="Let bits fall more slowly in curved blocks.")
    verbose: Bool = Field(default=False, description="Log eigenvalues.")
    max_iter: PositiveInt = Field(default=100, description="Most products with the Hessian.")
    tol: NonNegativeFloat = Field(default=1e-2, description="Relative change at which it stops.")
    stability: NonNegativeFloat = Field(default=1e-6, description="Added to norms.")
    gas_boundary_resolution: PositiveInt = Field(
        default=1, description="Look at every so many falls of bits."
    )
    layer_name: str | None = Field(
        default=None,
        description="Path of the list of blocks; the model's repeated ones by default.",
    )
    layer_num: NonNegativeInt = Field(default=0, description="How many of them; 0 is all.")


class CompressionSection(Section):
    """Compression while a model trains."""

    distillation: DistillationSection = Field(
        default=DistillationSection(), description="Terms of the loss from a teacher's outputs."
    )
    layer_reduction: LayerReductionSection = Field(
        default=LayerReductionSection(), description="Fewer layers, begun from a teacher's."
    )
    weight_quantization: WeightMethod = Field(
        default=WeightMethod(), description="Weights in few bits."
    )
    activation_quantization: ActivationMethod = Field(
        default=ActivationMethod(), description="Inputs of layers in few bits."
    )
    sparse_pruning: SparseMethod = Field(default=SparseMethod(), description="Zeros in weights.")
    row_pruning: PartMethod = Field(default=PartMethod(), description="Outputs of linear layers.")
    head_pruning: HeadMethod = Field(default=HeadMethod(), description="Heads of attention.")
    channel_pruning: PartMethod = Field(
        default=PartMethod(), description="Output channels of convolutions."
    )
