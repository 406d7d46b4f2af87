"""One process's part of a run before there is any model: device, axes, communication, counters."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import Store

from drivetrain.communication import process_group
from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.failure import FailureBoard, broken
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.process_group import Ranks, start
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts.state.parameters import ParameterTable
from drivetrain.contracts.world.communicator import Communicator, CommunicatorPhase
from drivetrain.errors import CommunicationError, ConfigError
from drivetrain.job.accelerator_choice import active, choose_accelerator
from drivetrain.job.extra_losses import ExtraLosses, ReportValues
from drivetrain.job.progress import Progress
from drivetrain.job.random_streams import RandomStreams
from drivetrain.job.spans import Ledger, Span
from drivetrain.job.spmd_guard import check_same_plan
from drivetrain.sections.data import Seed

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from drivetrain.contracts.world.accelerator import Accelerator
    from drivetrain.engine.engine import Engine
    from drivetrain.plan.hub import Hub
    from drivetrain.plan.plan import Plan


logger = logging.getLogger("drivetrain.job")


class Job:
    """A plan that runs in this process; opened by :meth:`open`, a context manager.

    Leaving the context with an exception makes the other ranks fail with that exception too.

    Attributes:
        plan: what runs.
        hub: its hooks.
        ranks: this process's place.
        accelerator: the kind of device.
        device: this process's device.
        mesh: axes and process groups.
        communicator: collectives over them, with all decorators.
        byte_log: counts what the communicator sends.
        random: named random streams.
        progress: counters of the job.
        ledger: seconds by span.
        parameters: facts about parameters.
        losses: where layers add terms to the loss.
        values: where layers add numbers to the report of a step.
        engines: built so far, in order; the first one's counters are the job's progress.
        failures: where ranks tell each other of the first error; ``None`` where they cannot talk.
    """

    mesh: Mesh
    random: RandomStreams
    communicator: Communicator
    byte_log: ByteLog

    def __init__(self, plan: Plan, ranks: Ranks, accelerator: Accelerator) -> None:
        self.plan = plan
        self.ranks = ranks
        self.accelerator = accelerator
        self.device = accelerator.device(ranks.local_rank)
        self.progress = Progress()
        self.ledger = Ledger()
        self.parameters = ParameterTable(plan.layout.rest)
        self.losses = ExtraLosses()
        self.values = ReportValues()
        self.engines: list[Engine] = []
        self.failures: FailureBoard | None = None
        self._resources = ExitStack()
        self._open = True

    @classmethod
    def open(
        cls,
        plan: Plan,
        ranks: Ranks | None = None,
        *,
        mpu: Any | None = None,
        timeout: timedelta | None = None,
    ) -> Job:
        """Start a job: choose the accelerator, meet the other ranks, build communication.

        Collective over all ranks. A process group that exists is adopted and left open; a single
        process needs none.

        Args:
            plan: what to run.
            ranks: this process's place; by default from ``torch.distributed`` or the environment.
            mpu: model-parallel-unit object whose process groups are used.
            timeout: of collectives in the groups that are created.

        Raises:
            ConfigError: the plan is for another number of ranks, the accelerator asked for cannot
                be used, ``mpu`` does not fit the plan, or ranks run different plans.
            CommunicationError: the ranks did not come together.
        """
        ranks = ranks or Ranks.current()
        if plan.world_size != ranks.world_size:
            raise ConfigError(
                f"the plan is for {plan.world_size} ranks ({plan.world_source}), but this process "
                f"is rank {ranks.rank} of {ranks.world_size}"
            )
        accelerator = choose_accelerator(plan)
        _register(plan.hub, accelerator)
        accelerator.start(ranks.local_rank, ranks.ranks_on_host)
        store = process_group.enter(accelerator.communication_backend(), ranks, timeout)
        job = cls(plan, ranks, accelerator)
        job._resources.enter_context(active(accelerator))
        watch(job)
        try:
            job._connect(store, mpu, timeout)
        except BaseException as error:
            job.fail(error)
            raise
        logger.info("rank %d of %d runs on %s", ranks.rank, ranks.world_size, job.device)
        return job

    @property
    def hub(self) -> Hub:
        """The plan's hooks."""
        return self.plan.hub

    @property
    def rank(self) -> int:
        """This process, of all ranks."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.ranks.world_size

    def span(self, name: str) -> Span:
        """A context manager that counts its block's seconds under ``name``."""
        return self.ledger.span(name)

    def engine(self, module: nn.Module, *arguments: Any, **options: Any) -> Engine:
        """Build an engine, one of any number; see
        :func:`drivetrain.engine.compose.build_engine`.
        """
        from drivetrain.engine.compose import build_engine

        engine = build_engine(self, module, *arguments, **options)
        self.engines.append(engine)
        return engine

    def on_close(self, release: Callable[[], object]) -> None:
        """Call ``release`` when the job closes or fails, in reverse order of registration."""
        self._resources.callback(release)

    def explain(self, what: str, error: BaseException) -> CommunicationError:
        """The exception for a collective that broke, for communicators that plugins provide.

        Args:
            what: the collective, with tag and axis.
            error: how it broke.

        Returns:
            An exception that names the rank that failed and its error, if there is one; else
            ``error``.
        """
        return (broken if self.failures is None else self.failures.explain)(what, error)

    def fail(self, error: BaseException) -> None:
        """Make the other ranks fail with ``error``, and close.

        Uncaught exceptions and those that leave the job's context get here by themselves. The
        first error of all ranks is the one that counts. Ends the process group even if the job
        has adopted it: ranks which wait for this one must not wait on.
        """
        if self.failures is None:
            self.close()
            return
        failures, self.failures = self.failures, None
        failures.record(error)
        try:
            self._release()
        finally:  # others wait for this rank, whatever becomes of its own resources
            process_group.abandon()
            failures.farewell()

    def close(self) -> None:
        """Release what the job has created. May be called repeatedly.

        Waits some seconds for the other ranks to close it, too, unless an exception is handled.
        """
        if not self._open:
            return
        try:
            if self.failures is not None:
                self.failures.part(wait=not _ends_badly(sys.exc_info()[1]))
            self._release()
        finally:
            if self.failures is not None:
                self.failures.leave()
            process_group.leave()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and _ends_badly(error):
            self.fail(error)
        self.close()

    def _connect(self, store: Store | None, mpu: Any | None, timeout: timedelta | None) -> None:
        """Build axes and communication, and make sure that all ranks run one plan."""
        meet = None
        if store is not None:
            self.failures = FailureBoard(store, self.rank, self.world_size)
            meet = self.failures.meet
        options: dict[str, Any] = {
            "device_type": self.accelerator.device_type,
            "timeout": timeout,
            "meet": meet,
        }
        self.mesh = (
            Mesh(self.plan.layout, self.rank, **options)
            if mpu is None
            else Mesh.from_mpu(mpu, self.plan.layout, **options)
        )
        self.on_close(self.mesh.close)
        self.random = RandomStreams(self.plan.section(Seed).root, self.mesh, self.device)
        inner = TorchCommunicator(self.mesh, self.device, self.failures)
        self.on_close(inner.close)
        self.communicator = self.byte_log = ByteLog(inner)
        if store is not None:
            check_same_plan(self.plan.fingerprint(), self.communicator, store, self.device)
        if self.failures is not None:
            self.failures.learn_host()  # every rank has written its place by now
        for layer in sorted(self.hub.wrap_communicator(self), key=lambda layer: layer.phase):
            if layer.phase < CommunicatorPhase.BYTE_LOG:
                self.byte_log.inner = layer.wrap(self.byte_log.inner)
            else:
                self.communicator = layer.wrap(self.communicator)

    def _release(self) -> None:
        """Let go of everything but the default process group."""
        if self._open:
            self._open = False
            unwatch(self)
            self._resources.close()


def _ends_badly(error: BaseException | None) -> bool:
    return error is not None and not (isinstance(error, SystemExit) and not error.code)


def _register(hub: Hub, accelerator: Accelerator) -> None:
    """Let the accelerator take part in hooks; a plan that runs again has it already."""
    name = f"accelerator {accelerator.name}"
    if name not in hub.plugins:
        hub.register(accelerator, name)
        hub.freeze()


_open_jobs: list[Job] = []


def open_jobs() -> list[Job]:
    """The jobs of this process that are open, in the order in which they were opened."""
    return list(_open_jobs)


def watch(job: Job) -> None:
    """Close ``job`` when the interpreter exits, until :func:`unwatch`.

    An uncaught exception of this process becomes the job's failure before.
    """
    if not _open_jobs:
        _Excepthook.install()
        # Now rather than at import: what plugins registered at theirs has to come after.
        atexit.register(_close_open_jobs)
    _open_jobs.append(job)


def unwatch(job: Job) -> None:
    """End :func:`watch`."""
    if job in _open_jobs:
        _open_jobs.remove(job)
        if not _open_jobs:
            _Excepthook.uninstall()
            atexit.unregister(_close_open_jobs)


class _Excepthook:
    """Goes before whatever ``sys.excepthook`` was."""

    installed: _Excepthook | None = None

    def __init__(self) -> None:
        self.previous = sys.excepthook

    @classmethod
    def install(cls) -> None:
        cls.installed = cls()
        sys.excepthook = cls.installed

    @classmethod
    def uninstall(cls) -> None:
        # Somebody who chained another hook since keeps ours, which then does nothing but call on.
        if cls.installed is not None and sys.excepthook is cls.installed:
            sys.excepthook = cls.installed.previous
            cls.installed = None

    def __call__(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        self.previous(kind, error, traceback)
        for job in tuple(_open_jobs):  # failing closes a job
            job.fail(error)


def init_distributed(
    dist_backend: str | None = None,
    *,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start ``torch.distributed`` for a script that needs it before its first job.

    Jobs adopt the process group and leave it open. Does nothing when it is started already.

    Args:
        dist_backend: torch's backend string; by default that of the accelerator found here.
        timeout: of collectives.
        init_method: rendezvous URL; by default torchrun's environment, and without one a process
            group of one rank.
        rank: this process, where ``init_method`` does not say.
        world_size: number of ranks, where ``init_method`` does not say.

    Raises:
        ConfigError: the environment is incomplete.
        CommunicationError: the ranks did not come together.
    """
    if dist.is_initialized():
        return
    if dist_backend is None:
        from drivetrain.job.accelerator_choice import choose_accelerator

        dist_backend = choose_accelerator().communication_backend()
    here = Ranks(rank, world_size) if init_method is not None else Ranks.current()
    start(dist_backend, here, timeout=timeout, init_method=init_method)


def _close_open_jobs() -> None:
    process_group.exit_begins()
    for job in reversed(open_jobs()):
        try:
            job.close()
        except Exception:
            logger.exception("a job that the script left open could not be closed")
