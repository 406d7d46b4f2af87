"""The plugins behind ``flops_profiler`` and ``comms_logger``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import (
    CommunicatorLayer,
    CommunicatorPhase,
    Plugin,
    Problem,
    Sections,
    hookimpl,
)
from drivetrain_profiler.sections import COMMS, FLOPS, CommsLoggerSection, FlopsProfilerSection

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_profiler.steps import StepProfile


_profiles: WeakKeyDictionary[Engine, StepProfile] = WeakKeyDictionary()


class FlopsProfilerOfSteps(Plugin):
    """Profiles one step of each engine that trains."""

    name = FLOPS
    sections: ClassVar[Sections] = {FLOPS: FlopsProfilerSection}

    @hookimpl
    def prepare_inputs(self, engine: Engine) -> None:
        profile = self._of(engine)
        if profile is not None and engine.module.training:
            profile.prepare()

    @hookimpl(wrapper=True)
    def backward(self, engine: Engine) -> Generator[None, Any, Any]:
        profile = self._of(engine)
        if profile is None:
            return (yield)
        with profile.backward():
            return (yield)

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, Any, Any]:
        profile = self._of(engine)
        if profile is None:
            return (yield)
        with profile.boundary():
            return (yield)

    def _of(self, engine: Engine) -> StepProfile | None:
        """The profile of an engine that is not done."""
        if engine.optimizer is None:
            return None
        profile = _profiles.get(engine)
        if profile is None:
            from drivetrain_profiler.steps import StepProfile

            section = self.section(FlopsProfilerSection)
            profile = _profiles[engine] = StepProfile(engine, section)
        return None if profile.done else profile


class CommsLogger(Plugin):
    """Puts a log around the job's communicator."""

    name = COMMS
    sections: ClassVar[Sections] = {COMMS: CommsLoggerSection}

    @hookimpl
    def configure(self) -> Sequence[Problem]:
        from drivetrain.contracts import Kind

        known = [str(kind) for kind in Kind]
        section = self.section(CommsLoggerSection)
        wrong = [name for name in section.prof_ops if _own_name(name) not in known]
        return [
            Problem(f"{COMMS}.prof_ops", f"no collective is called {name!r}; there are {known}")
            for name in wrong
        ]

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        from drivetrain_profiler.log import LoggedCommunicator

        section = self.section(CommsLoggerSection)
        kinds = None if section.prof_all else {_own_name(name) for name in section.prof_ops}

        def wrap(communicator: Communicator) -> Communicator:
            return LoggedCommunicator(
                communicator,
                job.accelerator.synchronize,
                kinds,
                verbose=section.verbose,
                sites=section.debug,
                synchronized=section.synchronized,
            )

        return [CommunicatorLayer(CommunicatorPhase.USER_LOG, wrap)]


_DEEPSPEED = {
    "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all",
    "reduce_scatter_tensor": "reduce_scatter",
}
"""DeepSpeed's names of operations that are called otherwise here."""


def _own_name(name: str) -> str:
    return _DEEPSPEED.get(name, name)
