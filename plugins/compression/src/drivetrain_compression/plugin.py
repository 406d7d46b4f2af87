"""The plugin: modifiers on the model, told of steps, saved with checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import Phase, Plugin, Problem, Sections, Transform, hookimpl
from drivetrain.errors import ConfigError
from drivetrain_compression.section import EIGENVALUE, PATH, CompressionSection, EigenvalueSection

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import StateReader, StateWriter
    from drivetrain.contracts.loop.step_report import StepReport
    from drivetrain.contracts.state.model_states import GradientWatch
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_compression.training.curvature import Curvature
    from drivetrain_compression.training.session import Session
    from drivetrain_compression.training.weights import WeightQuantisation

_KEY = f"{PATH}/modifiers"


class Compression(Plugin):
    """Owns ``compression_training`` and ``eigenvalue``."""

    name = PATH
    sections: ClassVar[Sections] = {
        PATH: CompressionSection,
        EIGENVALUE: EigenvalueSection,
    }

    def __init__(self, sections: Any) -> None:
        super().__init__(sections)
        self._session_of_job: WeakKeyDictionary[Job, Session] = WeakKeyDictionary()
        self._curvature_of_job: WeakKeyDictionary[Job, Curvature] = WeakKeyDictionary()

    @property
    def _section(self) -> CompressionSection:
        return self.section(CompressionSection)

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        from drivetrain_compression.training.build import modifiers_of

        try:
            modifiers = modifiers_of(self._section)
        except ConfigError as error:
            label, _, message = str(error).partition(": ")
            return [Problem(label, message)]
        if (
            self.section(EigenvalueSection).enabled
            and not self._section.weight_quantization.enabled
        ):
            return [
                Problem(
                    EIGENVALUE,
                    f"it lets bits of {PATH}.weight_quantization fall more slowly, which is off",
                )
            ]
        stages = plan.layout.size("pp")
        if self._section.distillation.enabled and stages > 1:
            text = f"a stage has part of the student (pp has {stages} ranks); switch one of the two"
            return [Problem(f"{PATH}.distillation", f"{text} off")]
        reasons = {"pp": "a stage has part of the layers", "tp": "a rank has part of each weight"}
        return [
            Problem(
                PATH,
                f"{reason} ({axis} has {plan.layout.size(axis)} ranks), and modifiers work "
                "on whole models; switch one of the two off",
            )
            for axis, reason in reasons.items()
            if modifiers and plan.layout.size(axis) > 1
        ]

    @hookimpl
    def transform_module(
        self, job: Job, module: torch.nn.Module, training: bool
    ) -> Sequence[Transform]:
        def apply(module: torch.nn.Module) -> torch.nn.Module:
            from drivetrain_compression.training.build import modifiers_of
            from drivetrain_compression.training.session import Session, session_of

            session = session_of(module)
            if session is None:
                for key in ("layer_reduction", "distillation"):
                    if getattr(self._section, key).enabled:
                        raise ConfigError(
                            f"{PATH}.{key} needs a teacher: call drivetrain_compression."
                            "init_compression(model, config, teacher_model=...) before initialize"
                        )
                session = Session(module, modifiers_of(self._section))
            session.use(job)
            self._session_of_job[job] = session
            self._watch_curvature(job, session, module)
            return module

        return [Transform(Phase.ADAPT, apply)]

    def _watch_curvature(self, job: Job, session: Session, module: torch.nn.Module) -> None:
        section = self.section(EigenvalueSection)
        if section.enabled:
            from drivetrain_compression.training.curvature import Curvature

            self._curvature_of_job[job] = curvature = Curvature(section, module)
            for modifier in _quantising(session):
                modifier.curvature = curvature.of

    @hookimpl(tryfirst=True)
    def backward(self, engine: Engine, tensors: Sequence[torch.Tensor]) -> bool | None:
        curvature = self._curvature_of_job.get(engine.job)
        if curvature is not None and engine.is_gradient_accumulation_boundary():
            session = self._session_of_job[engine.job]
            if any(modifier.due() for modifier in _quantising(session)):
                curvature.look(engine, tensors)
        return None  # the backward itself is core's

    @hookimpl
    def watch_gradients(self, job: Job) -> Sequence[GradientWatch]:
        from drivetrain_compression.pruned.blocks import BlockPruning

        session = self._session_of_job.get(job)
        found = () if session is None else session.modifiers
        return [modifier.watch for modifier in found if isinstance(modifier, BlockPruning)]

    @hookimpl
    def prepare_inputs(self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = self._session_of_job[engine.job]
        session.check_trained(engine)
        session.catch_up(_applied(engine))

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        self._session_of_job[engine.job].catch_up(_applied(engine))

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        writer.put(_KEY, self._session_of_job[engine.job].state())

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        self._session_of_job[engine.job].load_state(reader.get(_KEY))

    def features(self) -> dict[str, object]:
        return {f"{PATH}.{key}.enabled": True for key in _active(self._section)}


def _quantising(session: Session) -> list[WeightQuantisation]:
    from drivetrain_compression.training.weights import WeightQuantisation

    return [m for m in session.modifiers if isinstance(m, WeightQuantisation)]


def _applied(engine: Engine) -> int:
    progress = engine.progress
    return progress.steps - progress.skipped_steps


def _active(section: CompressionSection) -> Iterable[str]:
    for key in CompressionSection.model_fields:
        if getattr(section, key).enabled:
            yield key


def rows(plan: Plan) -> list[tuple[str, str]]:
    """What ``drivetrain explain`` says: which modifiers run, and when each does what."""
    from drivetrain_compression.training.build import modifiers_of

    found = modifiers_of(plan.section(CompressionSection))
    return [
        (m.label.removeprefix(f"{PATH}."), "; ".join([_names(m.config), *m.describe()]))
        for m in found
    ]


def _names(config: Any) -> str:
    return ", ".join(config.modules)
