"""The plugin: a layer of the communicator, and hooks that tell in which module a rank is."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import (
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    Phase,
    Plugin,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain_watchdog.section import PATH, WatchdogSection

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_watchdog.whereabouts import Whereabouts


class Watchdog(Plugin):
    """Owns ``communication.watchdog``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: WatchdogSection}

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        from drivetrain_watchdog.communicator import WatchedCommunicator
        from drivetrain_watchdog.watch import Watch
        from drivetrain_watchdog.whereabouts import Whereabouts

        if job.failures is None:  # one rank, or ranks that only stand for others
            return ()

        def wrap(inner: Communicator) -> Communicator:
            where = places[job] = Whereabouts(job)
            watch = Watch(job, where, self.section(WatchdogSection).patience_seconds)
            job.on_close(watch.close)
            return WatchedCommunicator(inner, watch, job.mesh.ranks)

        return (CommunicatorLayer(CommunicatorPhase.WATCHDOG, wrap),)

    @hookimpl
    def transform_module(self, job: Job) -> Sequence[Transform]:
        where = places.get(job)
        return [] if where is None else [Transform(Phase.SURROUND, where.follow)]

    @hookimpl(wrapper=True)
    def backward(self, engine: Engine) -> Generator[None, bool, bool]:
        return (yield from _inside(engine, "backward"))

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool, bool]:
        return (yield from _inside(engine, "step"))

    def features(self) -> Mapping[str, object]:
        return {f"{PATH}.enabled": self.section(WatchdogSection).enabled}


places: WeakKeyDictionary[Job, Whereabouts] = WeakKeyDictionary()
"""Where this rank is in each of its jobs."""


def _inside(engine: Engine, what: str) -> Generator[None, bool, bool]:
    where = places.get(engine.job)
    if where is None:
        return (yield)
    with where.inside(what):
        return (yield)
