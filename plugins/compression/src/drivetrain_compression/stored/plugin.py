"""The plugin: weights are packed one by one, as they get values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import Phase, Plugin, Problem, Sections, Transform, hookimpl
from drivetrain.errors import ConfigError
from drivetrain_compression.stored.section import PATH, ServedWeightsSection

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import WeightFormat
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

_SERVES = "packed weights cannot be trained: leave the optimizer out, or train low-rank changes "
_INSTEAD = "beside them (drivetrain_compression.lora_over_quantised) and leave this section out"


class ServedWeights(Plugin):
    """Owns ``weight_quantization``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: ServedWeightsSection}

    def __init__(self, sections: Any) -> None:
        super().__init__(sections)
        self._waiting: WeakKeyDictionary[Job, dict[torch.nn.Module, tuple[str, WeightFormat]]]
        self._waiting = WeakKeyDictionary()

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        from drivetrain.sections.optimization import OptimizerSection

        problems = []
        if plan.section(OptimizerSection).type is not None:
            problems.append(Problem(PATH, _SERVES + _INSTEAD))
        problems += [
            Problem(
                PATH, f"{axis} has {plan.layout.size(axis)} ranks, and weights are packed whole"
            )
            for axis in ("tp", "pp")
            if plan.layout.size(axis) > 1
        ]
        return problems

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        def apply(module: torch.nn.Module) -> torch.nn.Module:
            from drivetrain_compression.stored.serving import formats_of

            if training:
                raise ConfigError(f"{PATH}: {_SERVES}{_INSTEAD}")
            found = formats_of(module, self.section(ServedWeightsSection))
            self._waiting[job] = found
            for layer in list(found):
                self._store(job, layer)
            return module

        return [Transform(Phase.ADAPT, apply)]

    @hookimpl(tryfirst=True)  # before others keep a part of what is then no parameter
    def keep_parameters(self, job: Job, module: torch.nn.Module) -> None:
        self._store(job, module)

    def _store(self, job: Job, layer: torch.nn.Module) -> None:
        """Pack the weight of a layer that waits, if it has values."""
        from drivetrain.precision.precision import Precision
        from drivetrain_compression.stored.serving import store

        waiting = self._waiting.get(job, {})
        if layer in waiting and not layer.weight.is_meta:
            name, form = waiting.pop(layer)
            store(name, layer, form, Precision.of(job.plan).parameter)

    def features(self) -> dict[str, object]:
        return {PATH: True}
