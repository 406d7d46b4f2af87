"""Optimizer, learning-rate schedule, clipping, and how gradients are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from drivetrain.known import OWNERS, TORCH_OPTIMIZERS, TORCH_SCHEDULERS
from drivetrain.plugin import Plugin, Problem, Scalar, Section, Sections, hookimpl
from drivetrain.section import NO_EFFECT, Bool, NonNegativeFloat, PositiveFloat
from drivetrain.wording import did_you_mean

if TYPE_CHECKING:
    from drivetrain.plan import Plan
    from drivetrain.registry import Group


class _Typed(Section):
    type: str | None = None
    params: dict[str, Any] = Field(
        default_factory=dict, description="Arguments, by the names that it gives them."
    )

    @model_validator(mode="after")
    def _has_type(self) -> _Typed:
        if self.model_fields_set and self.type is None:
            raise ValueError("the key 'type' is required, but not given")
        return self


class OptimizerSection(_Typed):
    """The optimizer, when the client passes none."""

    type: str | None = Field(
        default=None, description="An installed optimizer or a class of torch.optim, any case."
    )
    legacy_fusion: Bool = Field(
        default=False, description=f"{NO_EFFECT}updates always run over flat buckets."
    )

    @model_validator(mode="after")
    def _clipping_is_elsewhere(self) -> OptimizerSection:
        if "max_grad_norm" in self.params:
            raise ValueError("params.max_grad_norm is not supported; use gradient_clipping")
        return self


class SchedulerSection(_Typed):
    """The learning-rate schedule, when the client passes none."""

    type: str | None = Field(
        default=None, description="An installed schedule or a class of torch.optim.lr_scheduler."
    )


class GradientClipping(Scalar[NonNegativeFloat]):
    """Largest global 2-norm of the gradient (default 1.0); 0 switches clipping off."""

    root: NonNegativeFloat = 1.0


class PrescaleGradients(Scalar[Bool]):
    """Divide gradients by the number of data shards before they are summed (default false)."""

    root: Bool = False


class GradientPredivideFactor(Scalar[PositiveFloat]):
    """Divide gradients by this before they are summed and multiply after (default 1.0)."""

    root: PositiveFloat = 1.0


class GradientAllreduceOp(Scalar[Literal["mean", "sum"]]):
    """Whether gradients of data shards are averaged (``mean``, the default) or added (``sum``)."""

    root: Literal["mean", "sum"] = "mean"


class SparseGradients(Scalar[Bool]):
    """Send gradients of embeddings as row indices and rows (default false)."""

    root: Bool = False


class Optimization(Plugin):
    """Checks that the optimizer and the schedule exist."""

    name = "optimization"
    sections: ClassVar[Sections] = {
        "optimizer": OptimizerSection,
        "scheduler": SchedulerSection,
        "gradient_clipping": GradientClipping,
        "prescale_gradients": PrescaleGradients,
        "gradient_predivide_factor": GradientPredivideFactor,
        "gradient_allreduce_op": GradientAllreduceOp,
        "sparse_gradients": SparseGradients,
    }

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        optimizer = self.section(OptimizerSection).type
        scheduler = self.section(SchedulerSection).type
        problems = [
            *_check_type(plan, "optimizers", "optimizer.type", optimizer, TORCH_OPTIMIZERS),
            *_check_type(plan, "schedulers", "scheduler.type", scheduler, TORCH_SCHEDULERS),
        ]
        factor = self.section(GradientPredivideFactor).root
        if self.section(PrescaleGradients).root and factor != 1.0:
            problems.append(
                Problem(
                    "gradient_predivide_factor",
                    f"is {factor}, which prescale_gradients: true would ignore; give one of them",
                )
            )
        return problems

    def features(self) -> Mapping[str, object]:
        return {
            "optimizer.type": self.section(OptimizerSection).type,
            "gradient_clipping": self.section(GradientClipping).root,
            "prescale_gradients": self.section(PrescaleGradients).root,
            "gradient_predivide_factor": self.section(GradientPredivideFactor).root,
            "gradient_allreduce_op": self.section(GradientAllreduceOp).root,
            "sparse_gradients": self.section(SparseGradients).root,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {
            "gradient_clipping": (0.0, 0.1),
            "prescale_gradients": (False, True),
            "gradient_predivide_factor": (1.0, 2.0),
            "gradient_allreduce_op": ("mean", "sum"),
            "sparse_gradients": (False, True),
        }


def _check_type(
    plan: Plan, group: Group, path: str, name: str | None, torch_names: Sequence[str]
) -> list[Problem]:
    if name is None or plan.registry.find(group, name) is not None:
        return []
    # Before torch's classes, since of torch.optim.Muon no rule over flat buckets can be made.
    reason = plan.registry.missing(group, name)
    if reason is not None:
        return [Problem(path, f"{name!r} is {reason}")]
    if name.lower() in (known.lower() for known in torch_names):
        return []
    names = [*plan.registry.names(group), *torch_names, *OWNERS.get(group, ())]
    kind = group[:-1]
    return [Problem(path, f"no {kind} is named {name!r}{did_you_mean(name, names)}")]
