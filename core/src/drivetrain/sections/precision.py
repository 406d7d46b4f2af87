"""In which dtypes a job computes, accumulates, communicates and keeps its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from drivetrain.contracts.plugin.plugin import Plugin, Problem, Sections, hookimpl
from drivetrain.contracts.plugin.section import (
    NO_EFFECT,
    Bool,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Scalar,
    Section,
)

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan

_SPELLINGS = {
    **dict.fromkeys(("fp32", "float32", "float"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
}


def _spelling(value: Any) -> Any:
    """Torch's names and their prefix are as good as ours."""
    if not isinstance(value, str):
        return value
    return _SPELLINGS.get(value.lower().removeprefix("torch."), value)


DType = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_spelling)]
"""A floating dtype by its short name; ``float16``, ``torch.float16`` and ``half`` are accepted."""


class FP16(Section):
    """Parameters, gradients and computation in float16, with loss scaling."""

    enabled: Bool = Field(default=False, description="Train in float16.")
    auto_cast: Bool = Field(
        default=False, description="Cast floating inputs of forward to float16."
    )
    loss_scale: NonNegativeFloat = Field(
        default=0.0, allow_inf_nan=False, description="Fixed loss scale; 0 adapts it to overflows."
    )
    initial_scale_power: NonNegativeInt = Field(
        default=16, description="The adaptive scale starts at 2 to this power."
    )
    loss_scale_window: PositiveInt = Field(
        default=1000, description="Steps without overflow after which the scale doubles."
    )
    hysteresis: PositiveInt = Field(
        default=2, description="Overflows that are tolerated before the scale is halved."
    )
    consecutive_hysteresis: Bool = Field(
        default=False, description="Refill the hysteresis at every step without overflow."
    )
    min_loss_scale: Annotated[NonNegativeFloat, Field(gt=0)] = Field(
        default=1.0, description="The scale never falls below this; an overflow there is an error."
    )
    fp16_master_weights_and_grads: Bool = Field(
        default=False, description="Keep master weights and gradients in float16, too."
    )


class BF16(Section):
    """Parameters, gradients and computation in bfloat16."""

    enabled: Bool = Field(default=False, description="Train in bfloat16.")
    immediate_grad_update: Bool = Field(
        default=False, description=f"{NO_EFFECT}gradients are always accumulated as they appear."
    )
    check_grad_overflow: Bool = Field(
        default=True, description="Skip a step whose gradients are infinite or no number."
    )
    bf16_master_weights_and_grads: Bool = Field(
        default=False, description="Keep no float32 master weights; gradients stay in bfloat16."
    )
    bf16_optimizer_states: Bool = Field(
        default=False,
        description="Keep the optimizer's states in bfloat16; needs bf16_master_weights_and_grads.",
    )

    @model_validator(mode="after")
    def _states_follow_masters(self) -> BF16:
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            raise ValueError("bf16_optimizer_states needs bf16_master_weights_and_grads: true")
        return self


class TorchAutocast(Section):
    """float32 parameters, with safe operations run in a lower precision by torch."""

    enabled: Bool = Field(default=False, description="Run forward under torch.autocast.")
    dtype: Annotated[Literal["fp16", "bf16"], BeforeValidator(_spelling)] = Field(
        default="bf16", description="The lower precision."
    )
    lower_precision_safe_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Class paths of modules whose gradients may travel in the lower precision; "
        "by default linear and convolution layers.",
    )


class DataTypes(Section):
    """dtypes of gradients, parameters and buffers, where they differ from the mode's."""

    grad_accum_dtype: DType | None = Field(
        default=None, description="dtype in which gradients are accumulated; the model's if unset."
    )
    param_dtype: DType | None = Field(
        default=None, description="dtype of parameters; must agree with the active mode."
    )
    buffer_dtype: DType | None = Field(
        default=None,
        description="dtype of floating buffers; that of the parameters if unset, but float32 "
        "for running statistics.",
    )


class CommunicationDataType(Scalar[DType | None]):
    """dtype in which gradients travel; that of the model if unset."""

    root: DType | None = None


class Precision(Plugin):
    """Checks that at most one mode of reduced precision is on and that dtypes agree with it."""

    name = "precision"
    sections: ClassVar[Sections] = {
        "fp16": FP16,
        "bf16": BF16,
        "bfloat16": BF16,
        "torch_autocast": TorchAutocast,
        "data_types": DataTypes,
        "communication_data_type": CommunicationDataType,
    }

    def mode(self) -> str:
        """The dtype of the module's parameters: ``"fp32"``, ``"fp16"`` or ``"bf16"``."""
        if self.section(FP16).enabled:
            return "fp16"
        return "bf16" if self.section(BF16).enabled else "fp32"

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        problems = []
        if {"bf16", "bfloat16"} <= self._sections.keys():
            problems.append(Problem("bfloat16", "is another name of bf16, which is given too"))
        modes = ("fp16", "bf16", "torch_autocast")
        active = [mode for mode in modes if self.features()[f"{mode}.enabled"]]
        for first, second in pairwise(active):
            problems.append(
                Problem(
                    f"{second}.enabled",
                    f"cannot be combined with {first}.enabled: a job has one mode of reduced "
                    "precision; switch one of them off",
                )
            )
        wanted = self.section(DataTypes).param_dtype
        if wanted is not None and wanted != self.mode():
            problems.append(
                Problem("data_types.param_dtype", f"is {wanted}, but the mode is {self.mode()}")
            )
        return problems

    def features(self) -> Mapping[str, object]:
        return {
            "fp16.enabled": self.section(FP16).enabled,
            "bf16.enabled": self.section(BF16).enabled,
            "torch_autocast.enabled": self.section(TorchAutocast).enabled,
            "data_types.grad_accum_dtype": self.section(DataTypes).grad_accum_dtype,
            "communication_data_type": self.section(CommunicationDataType).root,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {
            "fp16.enabled": (False, True),
            "bf16.enabled": (False, True),
            "torch_autocast.enabled": (False, True),
            "data_types.grad_accum_dtype": (None, "fp32"),
            "communication_data_type": (None, "fp32"),
        }
