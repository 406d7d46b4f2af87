"""Homes of a job that is only planned: states without memory, where the config would put them.

Buckets on the device ``meta`` have no memory, so neither host memory nor files are taken for them.
The arithmetic is that of the homes that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from drivetrain.contracts import BucketSpec, Fragment, ParameterHome, StateHome
from drivetrain.states.device_home import DeviceHome, segment_fragment
from drivetrain_offload.files.home import kinds_of, refuse_communicating, tile_limit
from drivetrain_offload.files.tiles import TileLayout, buffers_for
from drivetrain_offload.homes.split import SplitHome
from drivetrain_offload.memory import MemoryRow, note_memory
from drivetrain_offload.parameters.kept import stay_on_host
from drivetrain_offload.parameters.update_order import TRAVELLING, room_for
from drivetrain_offload.placement import divided_homes, way_of

if TYPE_CHECKING:
    from drivetrain.contracts import Hyper
    from drivetrain.job.job import Job
    from drivetrain_offload.section import OffloadOptimizer, OffloadParam
    from drivetrain_offload.zenflow_section import ZenFlow

Place = Literal["host", "nvme"]


def rehearsed_homes(
    job: Job,
    specs: Sequence[BucketSpec],
    optimizer: OffloadOptimizer,
    param: OffloadParam,
    zenflow: ZenFlow | None,
) -> list[StateHome]:
    """A home for every bucket, in the order of ``specs``; buffers are noted for the job's tables.

    Raises:
        ConfigError: an update rule cannot work where the config wants it to.
    """
    homes: list[StateHome] = [DeviceHome(spec) for spec in specs]
    if optimizer.device == "cpu":
        make = partial(_on_host, job, optimizer, zenflow)
        homes = divided_homes(specs, optimizer.ratio, make, RehearsedSplit)
    elif optimizer.device == "nvme":
        make = partial(_in_files, job, optimizer)
        homes = divided_homes(specs, optimizer.ratio, make, RehearsedSplit)
    return homes if param.device == "none" else _with_parameters(job, param, specs, homes)


class RehearsedHome(DeviceHome):
    """Masters and states that would be elsewhere.

    Args:
        spec: a bucket without memory.
        place: where they would be.
    """

    def __init__(self, spec: BucketSpec, place: Place) -> None:
        super().__init__(spec)
        self.name = place

    def fragments(self) -> Sequence[Fragment]:
        # What a rule keeps of a bucket as a whole is never in files.
        return [
            replace(fragment, home="host") if fragment.on_reshape == "reset" else fragment
            for fragment in self.states.fragments(self.name)
        ]


class RehearsedSplit(SplitHome):
    """Both parts of a bucket, each where it would be, also of a tensor that is cut."""

    def fragments(self) -> Sequence[Fragment]:
        return [*self.first.fragments(), *self.rest.fragments()]


class RehearsedParameters(ParameterHome):
    """Parameters that would be elsewhere between their uses.

    Args:
        states: the home of masters and states.
        place: where the parameters would be.
    """

    def __init__(self, states: StateHome, place: Place) -> None:
        self.spec = states.spec
        self._states = states
        self._place = place

    @property
    def step(self) -> int:
        return self._states.step

    @step.setter
    def step(self, value: int) -> None:
        self._states.step = value

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self._states.adopt(parameters, originals)

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self._states.update(gradient, hyper, scale)

    def refresh(self) -> None:
        self._states.refresh()

    def fetch(self, into: torch.Tensor) -> None:
        pass

    def fetched(self) -> None:
        pass

    def keep(self, parameters: torch.Tensor) -> None:
        pass

    def fragments(self) -> Sequence[Fragment]:
        spec = self.spec
        flat = torch.empty(spec.numel, dtype=spec.parameter_dtype, device=spec.device)
        own = [segment_fragment(s, "parameter", flat, self._place) for s in spec.segments]
        return [*own, *self._states.fragments()]


def _on_host(
    job: Job, section: OffloadOptimizer, zenflow: ZenFlow | None, specs: Sequence[BucketSpec]
) -> list[StateHome]:
    seen = specs
    if _computes_on_host(job):
        seen = [replace(spec, device=torch.device("cpu")) for spec in specs]
    way = way_of(section, seen, zenflow)
    locked = way.buffer_bytes - way.extra_bytes + way.locked_bytes
    locked = _lockable(job, locked, wanted=section.pin_memory, budget=section.pinned_memory_budget)
    _note(job, MemoryRow("buffers of updates", "host", way.buffer_bytes, locked))
    if zenflow is not None:
        _note(job, MemoryRow("important columns", "device", _important_bytes(specs, zenflow)))
    return [RehearsedHome(spec, "host") for spec in specs]


def _important_bytes(specs: Sequence[BucketSpec], zenflow: ZenFlow) -> int:
    """Bytes of the index, masters, states and parameters of those columns that the device updates.

    Without tensors of one dimension, which are small.
    """
    total = 0
    for spec in specs:
        kept = sum(dtype.itemsize for dtype in kinds_of(spec).values())
        each = torch.int64.itemsize + kept + spec.parameter_dtype.itemsize
        total += round(zenflow.topk_ratio * spec.numel) * each
    return total


def _in_files(job: Job, section: OffloadOptimizer, specs: Sequence[BucketSpec]) -> list[StateHome]:
    stateful = [spec for spec in specs if kinds_of(spec)]
    if not _computes_on_host(job):
        for spec in stateful:
            refuse_communicating(spec)
    layouts = [TileLayout.of(spec, kinds_of(spec), tile_limit(spec, section)) for spec in stateful]
    count, nbytes = buffers_for(layouts, section.buffer_count, section.buffer_size)
    _note(job, MemoryRow("buffers of tiles", "host", count * nbytes))
    if not _computes_on_host(job):
        longest = [max(tile.numel for tile in layout.tiles) for layout in layouts]
        both = list(zip(longest, stateful, strict=True))
        staging = max((n * s.gradient_dtype.itemsize for n, s in both), default=0)
        staging += max((n * s.parameter_dtype.itemsize for n, s in both), default=0)
        budget = section.pinned_memory_budget
        locked = _lockable(job, staging, wanted=section.pin_memory, budget=budget)
        _note(job, MemoryRow("staging of tiles", "host", staging, locked))
    return [RehearsedHome(s, "nvme") if kinds_of(s) else DeviceHome(s) for s in specs]


def _with_parameters(
    job: Job, section: OffloadParam, specs: Sequence[BucketSpec], homes: Sequence[StateHome]
) -> list[StateHome]:
    found: list[StateHome] = []
    away: list[StateHome] = []
    locked = 0
    for spec, home, on_host in zip(specs, homes, stay_on_host(specs, section), strict=True):
        if not spec.released or (on_host and _computes_on_host(job)):
            found.append(home)
            continue
        found.append(RehearsedParameters(home, "host" if on_host else "nvme"))
        nbytes = spec.numel * spec.parameter_dtype.itemsize
        if on_host:
            locked += _lockable(job, nbytes, wanted=section.pin_memory, budget=None)
        if spec.rule is not None and not (on_host and isinstance(home, RehearsedHome)):
            away.append(home)
    _note(job, MemoryRow("parameter", "host", 0, locked))
    for place, among in _by_place(away).items():
        sizes = [home.spec.numel * home.spec.parameter_dtype.itemsize for home in among]
        _note(job, MemoryRow(TRAVELLING, place, room_for(sizes, section.buffer_count)))
    return found


def _by_place(homes: Sequence[StateHome]) -> dict[str, list[StateHome]]:
    """Homes by where their parameters are while they are updated."""
    found: dict[str, list[StateHome]] = {}
    for home in homes:
        on_host = isinstance(home, RehearsedHome)
        found.setdefault("host" if on_host else "device", []).append(home)
    return found


def _computes_on_host(job: Job) -> bool:
    return job.accelerator.device_type == "cpu"


def _lockable(job: Job, nbytes: int, *, wanted: bool, budget: int | None) -> int:
    """How many of so many bytes a rank would lock."""
    if not wanted or _computes_on_host(job):
        return 0
    return nbytes if budget is None else min(nbytes, budget)


def _note(job: Job, row: MemoryRow) -> None:
    note_memory(job, lambda: [row])
