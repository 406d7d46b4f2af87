"""Parameters that stay in host memory or in files between their uses.

A :class:`KeptParameters` home decorates whatever home a bucket's states have. Parameters are near
the states only while these are updated: in files, one bucket is read ahead of its update and one
is written behind it, so that three shards at most are in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from drivetrain.errors import ConfigError
from drivetrain.fragment import Fragment, interval_boxes, placed_boxes
from drivetrain.home import BucketSpec, DeviceHome, ParameterHome, Segment, StateHome
from drivetrain_offload.host_home import HOST, HostHome
from drivetrain_offload.host_memory import PinnedMemory, refuse_too_little
from drivetrain_offload.parameter_stores import FileStore, HostStore, ParameterStore
from drivetrain_offload.split_home import SplitHome

if TYPE_CHECKING:
    from drivetrain.job import Job
    from drivetrain.update_rule import Hyper
    from drivetrain_offload.section import Aio, OffloadParam

_PATH = "zero_optimization.offload_param"

_WRITTEN_BEHIND = 1
"""Updated buckets that are still being written while the next one is updated."""


class UpdateOrder:
    """The order in which homes are updated, as it was in the last step; brings the next one near.

    Homes of one job share it.
    """

    def __init__(self) -> None:
        self._follows: dict[KeptParameters, KeptParameters] = {}
        self._latest: KeptParameters | None = None
        self._updated: set[KeptParameters] = set()
        self._writing: list[KeptParameters] = []

    def begin(self, home: KeptParameters) -> None:
        """``home`` is updated now."""
        home.bring_near()
        if home in self._updated:  # the next step; before it, parameters may have changed
            self._updated.clear()
            self._latest = None
        if self._latest is not None:
            self._follows[self._latest] = home
        self._latest = home
        self._updated.add(home)
        following = self._follows.get(home)
        if following is not None and following.begins_with_reading:
            following.begin_to_bring_near()

    def end(self, home: KeptParameters) -> None:
        """``home`` has been updated and is being written."""
        self._writing.append(home)
        while len(self._writing) > _WRITTEN_BEHIND:
            self._writing.pop(0).finish_writing()


class KeptParameters(ParameterHome):
    """Keeps a bucket's parameters in a store, and leaves its states to another home.

    Args:
        states: updates masters and optimizer states.
        store: keeps the parameters.
        order: shared by the homes of a job.
        near: where the states' home wants parameters while it updates them.
    """

    def __init__(
        self, states: StateHome, store: ParameterStore, order: UpdateOrder, near: torch.device
    ) -> None:
        self.spec = states.spec
        self._states = states
        self._store = store
        self._order = order
        self._near = near
        self._work = torch.empty(0)
        self._is_near = self._is_coming = self._is_written = False

    @property
    def step(self) -> int:
        return self._states.step

    @step.setter
    def step(self, value: int) -> None:
        self._states.step = value

    @property
    def stays_near(self) -> bool:
        """Whether the store's memory is the one that is updated."""
        return isinstance(self._store, HostStore) and self._near.type == "cpu"

    @property
    def begins_with_reading(self) -> bool:
        """Whether an update needs the parameters: without masters they are what is updated."""
        return not self.spec.has_masters and not self.stays_near

    # -- what model states call ---------------------------------------------------------------

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        if isinstance(self._store, HostStore) and self.stays_near:
            self._work = self._store.values
        else:
            self._work = torch.empty_like(parameters, device=self._near)
        self._work.copy_(parameters)
        self._states.adopt(self._work, originals)
        self._store.begin_write(self._work)
        self._store.finish_write()
        self._leave()

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        self._states.gradient_ready(gradient)

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        if self.stays_near:
            self._states.update(gradient, hyper, scale)
            return
        self._order.begin(self)
        self._states.update(gradient, hyper, scale)
        self._states.publish()  # at once: the memory is for the next bucket
        self._store.begin_write(self._work)
        self._is_written = True
        self._order.end(self)

    def publish(self) -> None:
        if self.stays_near:
            self._states.publish()

    def refresh(self) -> None:
        if self.spec.has_masters:
            with self._brought_near():
                self._states.refresh()

    def flush(self) -> None:
        self._states.flush()
        self.finish_writing()

    def fetch(self, into: torch.Tensor) -> None:
        self.finish_writing()
        self._store.begin_read(into)

    def fetched(self) -> None:
        self._store.finish_read()

    def keep(self, parameters: torch.Tensor) -> None:
        self.finish_writing()
        self._store.begin_write(parameters)
        self._store.finish_write()

    def fragments(self) -> Sequence[Fragment]:
        own = [self._fragment(segment) for segment in self.spec.segments]
        return [*own, *self._states.fragments()]

    def _fragment(self, segment: Segment) -> Fragment:
        stop = segment.start + segment.numel

        def write(values: torch.Tensor) -> None:
            self.finish_writing()
            self._store.write_part(segment.offset, values.reshape(-1))

        def read() -> torch.Tensor:
            self.finish_writing()
            return self._store.read_part(segment.offset, segment.numel)

        placement = segment.placement
        return Fragment(
            name=segment.name,
            kind="parameter",
            global_shape=segment.shape if placement is None else placement.global_shape,
            dtype=self.spec.parameter_dtype,
            boxes=tuple(
                interval_boxes(segment.shape, segment.start, stop)
                if placement is None
                else placed_boxes(placement.boxes, segment.start, stop)
            ),
            owner=segment.owner,
            home=self._store.place,
            read=read,
            write=write,
            on_reshape="redistribute",
        )

    # -- near the states, for an update -------------------------------------------------------

    def begin_to_bring_near(self) -> None:
        """Take memory for the parameters and begin to read them."""
        if not self._is_near and not self._is_coming:
            self.finish_writing()
            self._take()
            self._store.begin_read(self._work)
            self._is_coming = True

    def bring_near(self) -> None:
        """Return once an update may run."""
        self.finish_writing()
        if self.begins_with_reading:
            self.begin_to_bring_near()
        if self._is_coming:
            self._store.finish_read()
            self._is_coming = False
        self._take()

    def finish_writing(self) -> None:
        """Return once the store has what was updated, and give the memory back."""
        if self._is_written:
            self._is_written = False
            self._store.finish_write()
            self._leave()

    @contextmanager
    def _brought_near(self) -> Iterator[None]:
        self.finish_writing()
        if not self.stays_near:
            self.begin_to_bring_near()
        self.bring_near()
        yield
        self._leave()

    def _take(self) -> None:
        storage = self._work.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self.spec.numel * self._work.element_size())
        self._is_near = True

    def _leave(self) -> None:
        if not self.stays_near:
            self._work.untyped_storage().resize_(0)
        self._is_near = False


def keep(
    job: Job,
    specs: Sequence[BucketSpec],
    homes: Sequence[StateHome],
    section: OffloadParam,
    aio: Aio,
) -> list[StateHome]:
    """Homes that keep the parameters too, as ``zero_optimization.offload_param`` says.

    With files, the first ``max_in_cpu`` parameters of a rank stay in host memory all the same. On
    a CPU host memory is the device's, so what stays there is left alone.

    Args:
        job: device, and end of everything.
        specs: all buckets.
        homes: of their states, parallel to ``specs``.
        section: where parameters go.
        aio: how files are read and written.

    Raises:
        ConfigError: nothing releases its parameters, or the host has too little memory.
        FileIOError: files cannot be made.
    """
    if specs and not any(spec.released for spec in specs):
        raise ConfigError(
            f"{_PATH}: parameters stay whole on the device here, so none can be kept elsewhere; "
            "it needs zero_optimization.stage 3 (drivetrain-zero)"
        )
    on_host = _stay_on_host(specs, section)
    away = [spec.device.type != "cpu" for spec in specs]
    taken = sum(
        spec.numel * spec.parameter_dtype.itemsize
        for spec, host, other in zip(specs, on_host, away, strict=True)
        if host and other
    )
    if taken:
        refuse_too_little(
            taken, job.ranks.ranks_on_host, what=f"{_PATH} needs {taken:,} bytes of parameters"
        )
    memory = PinnedMemory(job.accelerator, wanted=section.pin_memory, budget=None)
    files = None if all(on_host) else _Files(job, section, aio)
    order = UpdateOrder()
    kept: list[StateHome] = []
    for spec, home, host, other in zip(specs, homes, on_host, away, strict=True):
        store: ParameterStore
        if not spec.released or (host and not other):
            kept.append(home)
            continue
        if host:
            values = memory.empty(spec.numel, spec.parameter_dtype)
            store = HostStore(values, job.accelerator)
        else:
            assert files is not None
            store = files.store(spec)
        kept.append(KeptParameters(home, store, order, _near(home)))
    return kept


def _stay_on_host(specs: Sequence[BucketSpec], section: OffloadParam) -> list[bool]:
    """Of each bucket, whether its parameters stay in host memory, and not in a file."""
    room = section.max_in_cpu
    found = []
    for spec in specs:
        fits = section.device == "cpu" or spec.numel <= room
        room -= spec.numel if fits else 0
        found.append(fits)
    return found


def _near(home: StateHome) -> torch.device:
    """Where the states' home updates parameters."""
    if home.spec.rule is None or not isinstance(home, SplitHome | DeviceHome):
        return HOST
    return HOST if isinstance(home, HostHome) else home.spec.device


class _Files:
    """Makes the files of a rank's parameters."""

    def __init__(self, job: Job, section: OffloadParam, aio: Aio) -> None:
        from drivetrain_offload.swap_folder import SwapFolder

        assert section.nvme_path is not None, "the section has been validated"
        self._folder = SwapFolder.of(job, section.nvme_path)
        self._aio = aio

    def store(self, spec: BucketSpec) -> FileStore:
        """A store in a file of its own, whose space is reserved."""
        file = self._folder.create(f"{spec.key}.parameters", self._aio)
        file.preallocate(spec.numel * spec.parameter_dtype.itemsize)
        return FileStore(file, spec.numel, spec.parameter_dtype)
