"""The plugin: an order of samples, token dropping, and factors on the learning rate."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain.contracts import Phase, Plugin, Problem, Sections, Transform, hookimpl
from drivetrain_data_efficiency.section import PATH, DataEfficiencySection

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import LoaderRequest, StateReader, StateWriter
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

_LTD = f"{PATH}.data_routing.random_ltd"
_BATCHING = f"{PATH}.data_sampling.dynamic_batching"


class DataEfficiency(Plugin):
    """Owns ``data_efficiency``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: DataEfficiencySection}

    @property
    def _section(self) -> DataEfficiencySection:
        return self.section(DataEfficiencySection)

    @hookimpl
    def build_loader(self, job: Job, request: LoaderRequest) -> Any | None:
        from drivetrain_data_efficiency.sampling.loading import build_loader

        return build_loader(job, request, self._section)

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        if self._section.dropping is None:
            return []
        reasons = {"pp": "a stage has part of the layers", "sp": "ranks share a sequence"}
        why = "so no rank can decide which tokens are kept; switch one of the two off"
        return [
            Problem(_LTD, f"{reason} ({axis} has {plan.layout.size(axis)} ranks), {why}")
            for axis, reason in reasons.items()
            if plan.layout.size(axis) > 1
        ]

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        section, found = self._section, []
        if training and section.batching is not None and section.batching.pack:
            from drivetrain_data_efficiency.sampling.packing import checked_for_packing

            found.append(Transform(Phase.ADAPT, checked_for_packing))
        if training and section.dropping is not None:
            from drivetrain_data_efficiency.routing.random_ltd import RandomLtd, of_job

            dropping = RandomLtd(job, section.dropping, section.seed, section.batching is not None)
            of_job[job] = dropping
            # Around recomputation and compiled blocks: these see the kept tokens alone.
            found.append(Transform(Phase.SURROUND, dropping.apply))
        return found

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool | None, bool | None]:
        from drivetrain_data_efficiency.rates import scaled_rates

        with scaled_rates(engine, self._section):
            return (yield)

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        dropping = self._dropping(engine)
        consumed = 0 if dropping is None else dropping.consumed
        writer.put(f"{PATH}/consumed_layer_tokens", consumed)
        if self._section.batching is not None:
            from drivetrain_data_efficiency.rates import packed_until

            writer.put(f"{PATH}/packed", packed_until.get(engine.job, {}))

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        if (dropping := self._dropping(engine)) is not None:
            dropping.consumed = int(reader.get(f"{PATH}/consumed_layer_tokens", 0))
        if counts := reader.get(f"{PATH}/packed"):
            from drivetrain_data_efficiency.rates import packed_until

            packed_until[engine.job] = {name: int(count) for name, count in counts.items()}

    def _dropping(self, engine: Engine) -> Any | None:
        if self._section.dropping is None:
            return None
        from drivetrain_data_efficiency.routing.random_ltd import of_job

        return of_job.get(engine.job)

    def features(self) -> Mapping[str, object]:
        section = self._section
        return {
            f"{PATH}.data_sampling.curriculum_learning.enabled": section.curriculum is not None,
            f"{_BATCHING}.enabled": section.batching is not None,
            f"{_LTD}.enabled": section.dropping is not None,
        }
