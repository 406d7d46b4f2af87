"""Optimizer, learning-rate schedule, clipping, and how gradients are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from drivetrain.contracts.plugin.params import Params
from drivetrain.contracts.plugin.plugin import Plugin, Problem, Sections, hookimpl
from drivetrain.contracts.plugin.section import (
    NO_EFFECT,
    Bool,
    NonNegativeFloat,
    PositiveFloat,
    Scalar,
    Section,
)
from drivetrain.errors import ConfigError
from drivetrain.plan.known import OWNERS, TORCH_OPTIMIZERS, TORCH_SCHEDULERS
from drivetrain.plan.params import Kind, check_params, declared_params
from drivetrain.wording import did_you_mean

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan
    from drivetrain.plan.registry import Group


class _Typed(Section):
    type: str | None = None
    params: dict[str, Any] = Field(
        default_factory=dict, description="Arguments, by the names that it gives them."
    )
    _autos: tuple[str, ...] = ()

    @property
    def autos(self) -> tuple[str, ...]:
        """Names of ``params`` that said ``"auto"``, which are no longer in it."""
        return self._autos

    @model_validator(mode="after")
    def _has_type(self) -> _Typed:
        if self.model_fields_set and self.type is None:
            raise ValueError("the key 'type' is required, but not given")
        self._autos = tuple(name for name, value in self.params.items() if value == "auto")
        for name in self._autos:
            del self.params[name]
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
        problems = [
            *_check(plan, "optimizer", self.section(OptimizerSection)),
            *_check(plan, "scheduler", self.section(SchedulerSection)),
        ]
        problems = problems or _check_momentum(
            plan, self.section(OptimizerSection).type, self.section(SchedulerSection)
        )
        factor = self.section(GradientPredivideFactor).root
        if self.section(PrescaleGradients).root and factor != 1.0:
            problems.append(
                Problem(
                    "gradient_predivide_factor",
                    f"is {factor}, which prescale_gradients: true would ignore; give one of them",
                )
            )
        return problems

    def notes(self) -> Sequence[str]:
        sections = {
            "optimizer": self.section(OptimizerSection),
            "scheduler": self.section(SchedulerSection),
        }
        autos = [
            f'{kind}.params.{name}: "auto", so its default applies'
            for kind, section in sections.items()
            for name in section.autos
        ]
        return [*super().notes(), *autos]

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


_TORCH_NAMES = {"optimizer": TORCH_OPTIMIZERS, "scheduler": TORCH_SCHEDULERS}

_IMPOSSIBLE = {
    **dict.fromkeys(("adafactor", "lbfgs", "sparseadam"), "updates no flat buckets of parameters"),
    **dict.fromkeys(("lambdalr", "multiplicativelr"), "needs a function, which no config can hold"),
    **dict.fromkeys(("chainedscheduler", "sequentiallr"), "needs schedules, which are no numbers"),
}
"""Classes of torch that exist, but that no config can ask for."""


def _check(plan: Plan, kind: Kind, section: _Typed) -> list[Problem]:
    return _check_type(plan, kind, section) or _check_params(plan, kind, section)


def _check_type(plan: Plan, kind: Kind, section: _Typed) -> list[Problem]:
    group: Group = f"{kind}s"  # type: ignore[assignment]
    name, path = section.type, f"{kind}.type"
    if name is None or plan.registry.find(group, name) is not None:
        return []
    # Before torch's classes, since of torch.optim.Muon no rule over flat buckets can be made.
    reason = plan.registry.missing(group, name)
    if reason is not None:
        return [Problem(path, f"{name!r} is {reason}")]
    torch_names = _TORCH_NAMES[kind]
    if reason := _IMPOSSIBLE.get(name.lower()):
        other = "pass it to initialize" if kind == "scheduler" else "use AdamW, or Lamb or Muon"
        return [Problem(path, f"{name} {reason}; {other}")]
    if name.lower() in (known.lower() for known in torch_names):
        return []
    names = [*plan.registry.names(group), *torch_names, *OWNERS.get(group, ())]
    return [Problem(path, f"no {kind} is named {name!r}{did_you_mean(name, names)}")]


def _check_params(plan: Plan, kind: Kind, section: _Typed) -> list[Problem]:
    if section.type is None:
        return []
    model = declared_params(plan.registry, kind, section.type)
    if model is None:
        return _check_signature(plan, kind, section)
    found = _check_autos(plan, kind, section, model)
    try:
        check_params(model, kind, section.params)
    except ConfigError as error:
        told = {f"{kind}.params.{name}" for name in section.autos}
        others = (Problem(*problem.split(": ", 1)) for problem in error.problems)
        found += [problem for problem in others if problem.path not in told]
    return [Problem(p.path, f"{p.message} [{section.type}]") for p in found]


def _check_momentum(
    plan: Plan, optimizer: str | None, scheduler: SchedulerSection
) -> list[Problem]:
    """Torch's cycles move a momentum unless told not to, and refuse where there is none."""
    if optimizer is None or (scheduler.type or "").lower() not in ("cycliclr", "onecyclelr"):
        return []
    model = declared_params(plan.registry, "optimizer", optimizer)
    has_one = model is None or {"momentum", "betas"} & model.model_fields.keys()
    if has_one or not scheduler.params.get("cycle_momentum", True):
        return []
    path, flaw = "scheduler.params.cycle_momentum", f"{optimizer} has no momentum; set it to false"
    return [Problem(path, flaw)]


def _check_autos(plan: Plan, kind: Kind, section: _Typed, model: type[Params]) -> list[Problem]:
    found = []
    for name in section.autos:
        field = model.model_fields.get(name)
        path = f"{kind}.params.{name}"
        if field is None:
            found.append(Problem(path, f"unknown key{did_you_mean(name, model.model_fields)}"))
        # What only reads a config, such as zero.Init, may do so before a framework fills it in.
        elif plan.batch_required and (field.is_required() or name in model.to_be_filled):
            found.append(
                Problem(path, 'is "auto", which nobody has filled in; give a value of your own')
            )
    return found


def _check_signature(plan: Plan, kind: Kind, section: _Typed) -> list[Problem]:
    """Check params of what declares none by the signature of a class, which has to be imported."""
    from drivetrain.checked_call import parameter_problems

    assert section.type is not None
    entry = plan.registry.find("optimizers" if kind == "optimizer" else "schedulers", section.type)
    made = entry.load() if entry is not None else None
    if not isinstance(made, type):
        return []  # a factory: what it takes, only it can tell
    leading = 0 if kind == "optimizer" else 1
    problems = parameter_problems(f"{kind}.params", made, section.params, leading)
    autos = parameter_problems(f"{kind}.params", made, dict.fromkeys(section.autos), leading)
    unknown = [problem for problem in autos if "has no such parameter" in problem]
    return [Problem(*problem.split(": ", 1)) for problem in [*problems, *unknown]]
