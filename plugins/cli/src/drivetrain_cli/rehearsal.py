"""A job that is put together as it would run, but of tensors without memory and of one rank alone.

Every part of it is the real one: the plugins of the config lay out parameters, gradients and
states as they would on each of many ranks. The device is torch's ``meta``, and collectives are
those of torch's fake process group, so that nothing is allocated, sent or written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from drivetrain.communication.byte_log import Traffic
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Accelerator, CommunicatorLayer, CommunicatorPhase, hookimpl
from drivetrain.errors import DrivetrainError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.sections.optimization import OptimizerSection
from drivetrain_cli.rehearsed_host import Counter, rehearsed_layers
from drivetrain_cli.rehearsed_messages import Post, RehearsedMessages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from os import PathLike

    from torch import nn

    from drivetrain.engine.engine import Engine

_NAME = "rehearsal"


class RehearsedDevice(Accelerator):
    """A device with memory of its own, none of which is ever used.

    Args:
        counter: is told of memory that is not simply this rank's own; without one there is none.
        post: carries messages of other ranks that are rehearsed; without one they go nowhere.
    """

    name = _NAME
    device_type = "meta"

    def probe(self) -> str | None:
        return None

    def communication_backend(self) -> str:
        return "fake"

    def __init__(self, counter: Counter | None, post: Post | None) -> None:
        self._counter, self._post = counter, post
        self._job: Job | None = None

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")

    def control_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def start(self, local_rank: int, ranks_on_host: int) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 0

    def reset_peak_memory(self) -> None:
        pass

    def total_memory(self) -> int:
        return 0

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def stream(self) -> None:
        return None

    def on_stream(self, stream: Any | None) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def alike(self, times: int) -> Iterator[None]:
        log = None if self._job is None else self._job.byte_log
        before = {} if log is None else {call: copy(traffic) for call, traffic in log.items()}
        with nullcontext() if self._counter is None else self._counter.alike(times):
            yield
        for call, now in () if log is None or times == 1 else log.items():
            _count_again(now, before.get(call, Traffic()), times - 1)

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        """Carry messages between ranks that are rehearsed one after the other."""
        self._job = job
        if self._post is None:
            return []
        counter = self._counter
        moment = (lambda: 0) if counter is None else counter.moment
        messages = partial(RehearsedMessages, job=job, post=self._post, moment=moment)
        return [CommunicatorLayer(CommunicatorPhase.ROUTE, messages)]


def _count_again(now: Traffic, before: Traffic, times: int) -> None:
    """Count what was sent since ``before`` so many times more."""
    now.calls += times * (now.calls - before.calls)
    now.payload_bytes += times * (now.payload_bytes - before.payload_bytes)
    now.sent_bytes += times * (now.sent_bytes - before.sent_bytes)


class RehearsedHost(RehearsedDevice):
    """A device whose memory is the host's."""

    device_type = "cpu"

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        """Share memory between ranks of one host, and take what gloo would between others."""
        memory = [] if self._counter is None else rehearsed_layers(job, self._counter)
        return [*memory, *super().wrap_communicator(job)]


@contextmanager
def rehearsal(
    config: Mapping[str, Any] | str | PathLike[str],
    module: nn.Module,
    *,
    ranks: int,
    ranks_on_host: int,
    on_cpu: bool,
    overlays: Sequence[str] = (),
    rank: int = 0,
    batch_required: bool = False,
    counter: Counter | None = None,
    post: Post | None = None,
) -> Iterator[Engine]:
    """The engine of one rank, ended with the context.

    It runs where numbers without memory can be read, as in
    :func:`~drivetrain_cli.planning.walk.walking`.

    Args:
        config: as a job gets it; one that leaves the optimizer to the script gets AdamW.
        module: made of tensors on the device ``meta``; changed in place.
        ranks: number of ranks.
        ranks_on_host: how many of them share a host.
        on_cpu: whether ranks compute on a CPU, and not on a device with memory of its own.
        overlays: ``path=value`` assignments on top of the config.
        rank: which rank's.
        batch_required: whether a config without batch size is refused.
        counter: see :class:`RehearsedDevice`.
        post: likewise.

    Raises:
        ConfigError: the config is not one that a job would run.
        DrivetrainError: this process is a rank of a job already.
    """
    if dist.is_initialized():
        raise DrivetrainError("a process that is a rank of a job cannot rehearse another one")
    registry = Registry.installed().choosing({})
    registry.add(
        "accelerators",
        _NAME,
        partial(RehearsedHost if on_cpu else RehearsedDevice, counter, post),
    )
    options: dict[str, Any] = {
        "world_size": ranks,
        "registry": registry,
        "batch_required": batch_required,
    }
    overlays = [*overlays, f"accelerator={_NAME}"]
    plan = Plan.build(config, overlays=overlays, **options)
    optimizer = None
    if plan.section(OptimizerSection).type is None:
        optimizer = torch.optim.AdamW(module.parameters())
    place = Ranks(rank, ranks, rank % ranks_on_host, ranks_on_host)
    with _fake_ranks(rank, ranks), _silence(), Job.open(plan, place) as job:
        yield job.engine(module, optimizer)


@contextmanager
def _fake_ranks(rank: int, count: int) -> Iterator[None]:
    """A process group of so many ranks that do not exist."""
    if count > 1:
        # Registers the backend "fake", which torch has for dry runs such as this one.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store: Any = FakeStore()
        dist.init_process_group("fake", store=store, rank=rank, world_size=count)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    """Say nothing of a job that does not run, but what may be wrong."""
    logger = logging.getLogger("drivetrain")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
