"""Parameters that stay in host memory or in files between their uses.

A :class:`KeptParameters` home decorates whatever home a bucket's states have. Parameters are near
the states only while these are updated; how many shards have memory there at once, to be read
ahead of their update or written behind it, is ``buffer_count`` of the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import torch

from drivetrain.contracts import (
    BucketSpec,
    Fragment,
    ParameterHome,
    Place,
    Segment,
    StateHome,
    interval_boxes,
    placed_boxes,
)
from drivetrain.errors import ConfigError
from drivetrain.states.device_home import DeviceHome
from drivetrain_offload.file_io.pages import Pages
from drivetrain_offload.homes.split import SplitHome
from drivetrain_offload.host.memory import (
    HOST,
    PinnedMemory,
    is_host,
    is_planned,
    refuse_too_little,
)
from drivetrain_offload.memory import MemoryRow, note_memory
from drivetrain_offload.parameters.stores import FileStore, Finish, HostStore, ParameterStore
from drivetrain_offload.parameters.update_order import TRAVELLING, UpdateOrder, room_for

if TYPE_CHECKING:
    from drivetrain.contracts import Hyper
    from drivetrain.job.job import Job
    from drivetrain_offload.files.swap_folder import SwapFolder
    from drivetrain_offload.section import Aio, OffloadParam

_PATH = "zero_optimization.offload_param"


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
        self._pages: Pages | None = None
        self._is_near = False
        self._coming: Finish | None = None
        self._fetching: Finish | None = None

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
    def nbytes(self) -> int:
        """Of the parameters."""
        return self.spec.numel * self.spec.parameter_dtype.itemsize

    @property
    def begins_with_reading(self) -> bool:
        """Whether an update needs the parameters: without masters they are what is updated."""
        return not self.spec.has_masters and not self.stays_near

    # -- what model states call ---------------------------------------------------------------

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        if parameters.is_meta:  # of a job that is only planned
            self._states.adopt(parameters, originals)
            if not self.stays_near:
                self._work = torch.empty_like(parameters)
                self._release()
            return
        if isinstance(self._store, HostStore) and self.stays_near:
            self._work = self._store.values
        elif self._near.type == "cpu":
            self._pages = Pages(parameters.numel(), parameters.dtype)
            self._work = self._pages.tensor
        else:
            self._work = torch.empty_like(parameters, device=self._near)
        self._take()
        self._work.copy_(parameters)
        self._states.adopt(self._work, originals)
        self._store.begin_write(self._work)
        self._store.finish_write()
        self._release()

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        if not self.stays_near:
            self._order.expect()
        self._states.gradient_ready(gradient)

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        if self.stays_near:
            self._states.update(gradient, hyper, scale)
            return
        self._order.begin(self)
        self._bring_near()
        self._states.update(gradient, hyper, scale)
        self._states.publish()  # at once: the memory is for the next bucket
        self._store.begin_write(self._work)
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
        self.leave()

    def place(self, numel: int) -> Place | None:
        if self.spec.device.type != "cpu" or isinstance(self._store, HostStore):
            return None
        pages = Pages(numel, self.spec.parameter_dtype)
        return pages.tensor, pages.give_back, pages.take

    def fetch(self, into: torch.Tensor) -> None:
        is_here = self._is_near and self._coming is None
        if is_here and not (into.device.type == "cpu" and self.is_written()):
            into.copy_(self._work)  # sooner than the end of a write, or nearer than a file
        else:
            self._fetching = self._store.begin_read(into)

    def fetched(self) -> None:
        if self._fetching is not None:
            self._fetching()
            self._fetching = None

    def keep(self, parameters: torch.Tensor) -> None:
        self.leave()
        self._store.begin_write(parameters)
        self._store.finish_write()

    def fragments(self) -> Sequence[Fragment]:
        own = [self._fragment(segment) for segment in self.spec.segments]
        return [*own, *self._states.fragments()]

    def _fragment(self, segment: Segment) -> Fragment:
        stop = segment.start + segment.numel

        def write(values: torch.Tensor) -> None:
            self.leave()
            self._store.write_part(segment.offset, values.reshape(-1))

        def read() -> torch.Tensor:
            self.leave()
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
        if not self._is_near:
            self._take()
            self._coming = self._store.begin_read(self._work)

    def is_written(self) -> bool:
        """Whether the store has what was updated."""
        return self._store.is_written()

    def leave(self) -> None:
        """Give the memory back, once the store has what was updated."""
        self._arrive()
        self._store.finish_write()
        if self._is_near and not self.stays_near:
            self._release()

    def _bring_near(self) -> None:
        """Return once an update may run."""
        if self.begins_with_reading:
            self.begin_to_bring_near()
        self._arrive()
        self._store.finish_write()
        self._take()

    def _arrive(self) -> None:
        """Return once what is being read is here."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming()

    @contextmanager
    def _brought_near(self) -> Iterator[None]:
        self.leave()
        if not self.stays_near:
            self.begin_to_bring_near()
        self._bring_near()
        yield
        self.leave()

    def _take(self) -> None:
        if self._is_near or self.stays_near:
            return
        if self._pages is not None:
            self._pages.take()
        else:
            self._work.untyped_storage().resize_(self.nbytes)
        self._is_near = True

    def _release(self) -> None:
        if self._pages is not None:
            self._pages.give_back()
        elif not self.stays_near:
            self._work.untyped_storage().resize_(0)
        self._is_near = False
        self._order.left(self)


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
    on_host = stay_on_host(specs, section)
    taken = sum(
        spec.numel * spec.parameter_dtype.itemsize
        for spec, host in zip(specs, on_host, strict=True)
        if host and not is_host(job)
    )
    if taken and not is_planned(job):
        refuse_too_little(
            taken, job.ranks.ranks_on_host, what=f"{_PATH} needs {taken:,} bytes of parameters"
        )
    memory = PinnedMemory.of(job, wanted=section.pin_memory)
    note_memory(job, lambda: [MemoryRow("parameter", "host", 0, memory.locked)])
    folder = None if all(on_host) else _folder(job, section)
    orders = _orders(job, _that_travel(job, homes, on_host), section.buffer_count)
    kept: list[StateHome] = []
    for spec, home, host in zip(specs, homes, on_host, strict=True):
        store: ParameterStore
        if not spec.released or (host and is_host(job)):
            kept.append(home)
            continue
        if host:
            values = memory.empty(spec.numel, spec.parameter_dtype)
            store = HostStore(values, job.accelerator)
        else:
            store = _file_store(folder, spec, aio)
        kept.append(KeptParameters(home, store, orders[_place(home)], _near(home)))
    return kept


def _that_travel(
    job: Job, homes: Sequence[StateHome], on_host: Sequence[bool]
) -> Iterator[StateHome]:
    """Yield the homes whose parameters are not kept where they are updated."""
    for home, stays in zip(homes, on_host, strict=True):
        is_trained = home.spec.released and home.spec.rule is not None
        if is_trained and not (stays and (is_host(job) or _near(home) == HOST)):
            yield home


def _orders(job: Job, homes: Iterable[StateHome], count: int) -> dict[str, UpdateOrder]:
    """For each place where parameters are updated, with room for ``count`` of the largest."""
    sizes: dict[str, list[int]] = {"device": [], "host": []}
    for home in homes:
        sizes[_place(home)].append(home.spec.numel * home.spec.parameter_dtype.itemsize)
    orders = {place: UpdateOrder(room_for(nbytes, count)) for place, nbytes in sizes.items()}
    alive = WeakValueDictionary(orders)  # they go with their homes
    note_memory(
        job,
        lambda: [MemoryRow(TRAVELLING, place, order.nbytes) for place, order in alive.items()],
    )
    return orders


def stay_on_host(specs: Sequence[BucketSpec], section: OffloadParam) -> list[bool]:
    """Of each bucket, whether its parameters stay in host memory, and not in a file."""
    room = section.max_in_cpu
    found = []
    for spec in specs:
        fits = section.device == "cpu" or spec.numel <= room
        room -= spec.numel if fits else 0
        found.append(fits)
    return found


def _place(home: StateHome) -> Literal["device", "host"]:
    """Where the states' home updates parameters."""
    on_device = isinstance(home, SplitHome | DeviceHome)
    return "device" if on_device and home.spec.rule is not None else "host"


def _near(home: StateHome) -> torch.device:
    return home.spec.device if _place(home) == "device" else HOST


def _folder(job: Job, section: OffloadParam) -> SwapFolder | None:
    """Where files of parameters go; None in a job that is only planned."""
    from drivetrain_offload.files.swap_folder import SwapFolder

    assert section.nvme_path is not None, "the section has been validated"
    return None if is_planned(job) else SwapFolder.of(job, section.nvme_path)


def _file_store(folder: SwapFolder | None, spec: BucketSpec, aio: Aio) -> FileStore:
    from drivetrain_offload.files.swap_folder import new_file

    nbytes = spec.numel * spec.parameter_dtype.itemsize
    file = new_file(folder, f"{spec.key}.parameters", nbytes, aio)
    return FileStore(file, spec.numel, spec.parameter_dtype)
