"""The plugin behind ``ledger``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import CommunicatorLayer, CommunicatorPhase, Plugin, Sections, hookimpl
from drivetrain_profiler.ledger.section import PATH, LedgerSection

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_profiler.ledger.recorder import Recorder
    from drivetrain_profiler.ledger.watching import CompileWatch

_recorders: WeakKeyDictionary[Job, tuple[Recorder, CompileWatch]] = WeakKeyDictionary()


class LedgerOfRun(Plugin):
    """Owns ``ledger``: keeps one for every job."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: LedgerSection}

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        section = self.section(LedgerSection)
        if not section.enabled or job.device.type == "meta":  # a rehearsal takes no time
            return []
        from drivetrain_profiler.ledger.recorder import LedgerCommunicator, Recorder
        from drivetrain_profiler.ledger.watching import CompileWatch, LoaderWatch

        recorder = Recorder(job, section)
        loaders, compiler = LoaderWatch(recorder.timeline), CompileWatch(recorder.timeline)
        for release in (recorder.close, loaders.close, compiler.close):
            job.on_close(release)
        _recorders[job] = recorder, compiler

        def wrap(communicator: Communicator) -> Communicator:
            recorder.meet(communicator)
            return LedgerCommunicator(communicator, recorder.timeline)

        return [CommunicatorLayer(CommunicatorPhase.USER_LOG, wrap)]

    @hookimpl(tryfirst=True)
    def prepare_inputs(self, engine: Engine) -> None:
        found = _recorders.get(engine.job)
        if found is not None:
            found[1].look()

    @hookimpl(wrapper=True, tryfirst=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, Any, Any]:
        # Not step_end: where a plugin looks at steps, the engine reduces their losses.
        applied = yield
        found = _recorders.get(engine.job)
        if found is not None:
            found[0].step(engine)
        return applied
