"""The plugin ``diloco``: a replica's steps, data and checkpoints among those of others."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import Conflict, Fragment, Plugin, Problem, Sections, hookimpl
from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_communication.diloco.section import PATH, DilocoSection

if TYPE_CHECKING:
    import torch

    from drivetrain.checkpoint.format.commit import PendingSave
    from drivetrain.contracts import LoaderRequest, StateReader, StateWriter
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_communication.diloco.training import Diloco

_STATE = f"{PATH}/state"

_MARK = "diloco-replica-"
"""Name of the file that says whose checkpoints a folder holds."""


class DilocoPlugin(Plugin):
    """Owns ``diloco``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: DilocoSection}

    @property
    def _section(self) -> DilocoSection:
        return self.section(DilocoSection)

    def enabled(self) -> bool:
        return self._section.replicas > 1

    def conflicts(self) -> Sequence[Conflict]:
        why = "replicas differ on purpose between averages, so their weights never have equal bits"
        return [Conflict(PATH, None, "exact", None, why)]

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        return [Problem(f"{PATH}.{key}", why) for key, why in self._section.flaws().items()]

    @hookimpl
    def describe_parameters(self, job: Job, module: torch.nn.Module) -> None:
        """Find out before any work if nobody says which replica this is, or where all meet."""
        self._section.which()
        self._section.where()

    @hookimpl(tryfirst=True)
    def build_loader(self, job: Job, request: LoaderRequest) -> Any | None:
        """Deal samples out over the shards of all replicas; whoever loads them."""
        if request.route != "train" or job in _loading:
            return None
        section = self._section
        _loading[job] = True
        try:
            shards = request.num_shards
            request = replace(
                request,
                shard=section.which() * shards + request.shard,
                num_shards=section.replicas * shards,
            )
            return job.hub.build_loader(job, request)
        finally:
            del _loading[job]

    @hookimpl
    def prepare_inputs(self, engine: Engine) -> None:
        # Stages pass here one after another, and come together at their step alone.
        alike = engine.job.mesh.size("pp") == 1
        if alike and engine.optimizer is not None and engine.module.training:
            self._of(engine).come()

    @hookimpl(wrapper=True)
    def optimizer_step(self, engine: Engine) -> Generator[None, bool, bool]:
        diloco = self._of(engine)
        diloco.come()  # a runner, as that of stages, may not pass through the engine's forward
        applied = yield
        diloco.stepped()
        return applied

    @hookimpl
    def state_fragments(self, engine: Engine) -> Sequence[Fragment]:
        return [] if engine.optimizer is None else self._of(engine).fragments()

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        if engine.optimizer is not None:
            writer.put(_STATE, self._of(engine).state())

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        state = reader.get(_STATE)
        if state is not None and engine.optimizer is not None:
            self._of(engine).load(state)

    @hookimpl(tryfirst=True)
    def carry_out_save(self, engine: Engine, pending: PendingSave) -> bool | None:
        """Refuse a folder that another replica saves into; then leave the save to others."""
        from drivetrain.checkpoint.agreement import worst

        own, problem = f"{_MARK}{self._section.which()}", None
        if pending.rank == 0:  # alone: others might see the mark while it is being written
            names = pending.storage.names()
            others = sorted(name for name in names if name.startswith(_MARK) and name != own)
            if others:
                problem = (
                    f"{pending.place} holds checkpoints of replica "
                    f"{others[0].removeprefix(_MARK)}; give each replica a folder of its own, for "
                    "example with the variable DRIVETRAIN_REPLICA in its name"
                )
        if (found := worst(engine.job, problem)) is not None:
            raise CheckpointError(found)
        if pending.rank == 0:
            pending.storage.put(own, b"")
        return None

    def _of(self, engine: Engine) -> Diloco:
        """The outer training of ``engine``, which begins when it is first asked for."""
        from drivetrain_communication.diloco.training import Diloco

        if engine not in trainings:
            if any(other.job is engine.job for other in trainings):
                raise ConfigError(
                    f"{PATH}: one engine of a job can train with other replicas, and there is one; "
                    "give the other model a job of its own"
                )
            trainings[engine] = diloco = Diloco(engine, self._section)
            engine.job.on_close(diloco.close)
        return trainings[engine]


trainings: WeakKeyDictionary[Engine, Diloco] = WeakKeyDictionary()
"""The outer training of each engine."""

_loading: WeakKeyDictionary[Job, bool] = WeakKeyDictionary()
"""Jobs in which a loader is being built."""
