"""The plugin that shares out experts over ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import (
    AxisRequest,
    Phase,
    Plugin,
    Problem,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain.errors import ConfigError
from drivetrain_moe.axes import ExpertAxes, expert_axes, requests
from drivetrain_moe.section import (
    EXPERT_PARALLEL,
    MOE,
    DataBeforeExperts,
    ExpertParallelSection,
    MoESection,
)

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Generates, InferenceRequest
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_moe.cache import ExpertCache
    from drivetrain_moe.layer import MoE
    from drivetrain_moe.shared import SharedExperts

_DATA_FIRST = "use_data_before_expert_parallelism"


class MixtureOfExperts(Plugin):
    """Owns ``moe``, ``expert_parallel`` and ``use_data_before_expert_parallelism``."""

    name = MOE
    after = ("tensor_parallel",)
    """It finds layers by running the model, in which experts that are shared out would exchange."""
    sections: ClassVar[Sections] = {
        MOE: MoESection,
        EXPERT_PARALLEL: ExpertParallelSection,
        _DATA_FIRST: DataBeforeExperts,
    }

    def enabled(self) -> bool:
        given = any(isinstance(s, MoESection) for s in self._sections.values())
        return given or self.section(ExpertParallelSection).enabled

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        if self.section(DataBeforeExperts).root:
            reason = "ranks that share out experts are neighbours here, as all-to-alls need the "
            return [Problem(_DATA_FIRST, f"must be false: {reason}fastest links")]
        return []

    @hookimpl
    def mesh_axes(self, plan: Plan) -> Sequence[AxisRequest]:
        return requests(self.axes(plan).values(), self._sizes(plan))

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        def share_out(model: torch.nn.Module) -> torch.nn.Module:
            from drivetrain_moe import automatic

            axes, section = self.axes(job.plan), self.section(MoESection)
            layers = [(name or type(layer).__name__, layer) for name, layer in _layers(model)]
            _refuse_unplanned(axes, section, layers)
            for name, layer in layers:
                layer.join(job, name, axes[section.ep_size or layer.ep_size], section)
                job.on_close(layer.leave)
            experts = self.section(ExpertParallelSection)
            if experts.enabled:
                own = axes[experts.ranks]
                automatic.share_out(job, model, experts, own, halves=section.halves)
            for _, served in _served(model):
                served.serves = not training
            if section.cached_experts:
                self._keep_on_host(job, model, section.cached_experts, training)
            return model

        return [Transform(Phase.PARTITION, share_out)]

    def _keep_on_host(self, job: Job, model: torch.nn.Module, room: int, training: bool) -> None:
        """Keep weights of experts in host memory: now, or as soon as they have values."""
        if training:
            raise ConfigError(
                f"{MOE}.cached_experts is for engines that serve, and this one trains its experts: "
                "leave it out; the section zero_optimization.offload_param keeps weights that are "
                "trained in host memory"
            )
        from drivetrain_moe.cache import MARK

        served_here = _served(model)
        if not served_here:
            raise ConfigError(
                f"{MOE}.cached_experts is {room}, and {type(model).__name__} has no layer MoE: set "
                f"{EXPERT_PARALLEL}.enabled to true, which finds experts of other models, or leave "
                "it out"
            )
        for _, served in served_here:
            cache = served.cached(job, room)
            for part in cache.parts:
                vars(part)[MARK] = cache
                cache.store(part)

    @hookimpl(tryfirst=True)  # before others keep a part of what is then no parameter
    def keep_parameters(self, job: Job, module: torch.nn.Module) -> None:
        from drivetrain_moe.cache import MARK

        cache: ExpertCache | None = vars(module).get(MARK)
        if cache is not None:
            cache.store(module)

    @hookimpl(wrapper=True)
    def build_inference(
        self, job: Job, module: torch.nn.Module, request: InferenceRequest
    ) -> Generator[None, Generates | None, Generates | None]:
        """Have ranks that make the same calls compute their experts' part of the same tokens."""
        if job.mesh.size("sp") == 1:
            for _, served in _served(module):
                if served.serves and served.way.experts is not None:
                    # All of them compute all tokens, also those that would share these out.
                    served.way = replace(served.way, equal=True, alike=None)
        return (yield)

    @hookimpl
    def describe_parameters(self, job: Job, module: torch.nn.Module) -> None:
        axes, section = self.axes(job.plan), self.section(MoESection)
        for _, layer in _layers(module):
            own = axes[section.ep_size or layer.ep_size]
            if own.experts:
                layer.experts.describe(job, own)
        shared = axes[self.section(ExpertParallelSection).ranks]
        for experts in _shared(module) if shared.experts else ():
            experts.describe(job, shared)

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool | None, bool | None]:
        """Move the biases of routers after an update."""
        applied = yield
        from drivetrain_moe.load import move_biases

        found = [
            (layer.bias, layer.load, layer.bias_update_rate)
            for _, layer in _layers(engine.module)
            if layer.bias_update_rate and layer.load is not None and layer.bias is not None
        ]
        found += [
            (experts.bias, experts.load, experts.rate)
            for experts in _shared(engine.module)
            if experts.bias is not None and experts.load is not None
        ]
        if applied:
            move_biases(engine.job, found)
        return applied

    def features(self) -> Mapping[str, object]:
        return {
            f"{MOE}.ep_size": self.section(MoESection).ep_size,
            f"{EXPERT_PARALLEL}.autoep_size": self.section(ExpertParallelSection).ranks,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{MOE}.ep_size": (1, 2)}

    def _sizes(self, plan: Plan) -> dict[int, str]:
        """Numbers of ranks over which experts are shared out -> where each comes from."""
        found: dict[int, str] = {}
        section, experts = self.section(MoESection), self.section(ExpertParallelSection)
        objects = plan.objects.get(MOE)
        for size in objects.wishes if objects and section.ep_size is None else ():
            found[int(size)] = f"ep_size of a {objects.kind} in the model" if objects else ""
        if section.ep_size is not None:
            found[section.ep_size] = f"{MOE}.ep_size"
        if experts.enabled:
            found[experts.ranks] = f"{EXPERT_PARALLEL}.autoep_size"
        return found

    def axes(self, plan: Plan) -> dict[int, ExpertAxes]:
        """Number of ranks that share out experts -> axes."""
        return expert_axes(self._sizes(plan), over_tensor=self.section(MoESection).over_tensor)


def axes_of(plan: Plan) -> dict[int, ExpertAxes]:
    """Number of ranks that share out experts -> axes, of a plan."""
    found = [plugin for plugin in plan.plugins if isinstance(plugin, MixtureOfExperts)]
    return found[0].axes(plan) if found else expert_axes(())


def _refuse_unplanned(
    axes: Mapping[int, ExpertAxes], section: MoESection, layers: Sequence[tuple[str, MoE]]
) -> None:
    """Check that the mesh has the axes that layers ask for.

    Raises:
        ConfigError: a plan that was made before there was a model has not; says what to write.
    """
    for name, layer in layers if section.ep_size is None else ():
        if layer.ep_size not in axes:
            raise ConfigError(
                f"{name} has ep_size = {layer.ep_size}, and the mesh has no axis of so many ranks, "
                "since the plan was made without the model: write "
                f'"{MOE}": {{"ep_size": {layer.ep_size}}} into the config, or have '
                "drivetrain.initialize make the plan, which looks at the model"
            )


def _layers(module: torch.nn.Module) -> list[tuple[str, MoE]]:
    from drivetrain_moe.layer import MoE as Layer

    return [(name, part) for name, part in module.named_modules() if isinstance(part, Layer)]


def _served(module: torch.nn.Module) -> list[tuple[str, MoE | SharedExperts]]:
    """Everything that has experts."""
    return [*_layers(module), *(("", experts) for experts in _shared(module))]


def _shared(module: torch.nn.Module) -> list[SharedExperts]:
    from drivetrain_moe.shared import SharedExperts as Shared

    forwards = (part.__dict__.get("forward") for part in module.modules())
    return [forward for forward in forwards if isinstance(forward, Shared)]
