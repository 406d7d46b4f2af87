"""States in files: read, updated in host memory and written back, tile by tile."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import BucketSpec, Fragment, Segment, StateHome
from drivetrain.errors import ConfigError
from drivetrain.states.device_home import (
    MASTER,
    DeviceHome,
    FlatStates,
    bucket_fragment,
    segment_fragment,
)
from drivetrain_offload.files.swap_folder import SwapFolder, new_file
from drivetrain_offload.files.tile_layout import Tile, TileLayout, buffers_for
from drivetrain_offload.files.tile_pipeline import Place, StateFile, TilePipeline
from drivetrain_offload.host.memory import HOST, PinnedMemory, is_host, is_planned
from drivetrain_offload.host.side import as_they_are
from drivetrain_offload.memory import MemoryRow, note_memory
from drivetrain_offload.specs import (
    PATH,
    keeps_of_bucket,
    kinds_of,
    refuse_communicating,
    states_of,
)

if TYPE_CHECKING:
    from drivetrain.contracts import Hyper
    from drivetrain.job.job import Job
    from drivetrain_offload.section import Aio, OffloadOptimizer

logger = logging.getLogger("drivetrain.offload")


class Staging:
    """Page-locked memory for one tile of gradients and one of parameters on their way.

    Args:
        memory: locks pages as far as the config allows.
    """

    def __init__(self, memory: PinnedMemory) -> None:
        self._memory = memory
        self._gradient = memory.empty(0)
        self._parameters = memory.empty(0)

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self._gradient.nbytes + self._parameters.nbytes

    def reserve(self, gradient: int, parameters: int) -> None:
        """Make room for tiles of that many bytes."""
        if gradient > self._gradient.nbytes:
            self._gradient = self._memory.empty(gradient)
        if parameters > self._parameters.nbytes:
            self._parameters = self._memory.empty(parameters)

    def gradient(self, source: torch.Tensor) -> torch.Tensor:
        """``source`` where a rule can run on the host: itself, or a copy."""
        return source if _is_near(source) else _like(self._gradient, source).copy_(source)

    def parameters(self, target: torch.Tensor, *, filled: bool) -> torch.Tensor:
        """Host memory for ``target``: itself, or a place beside it, with its values if wanted."""
        if _is_near(target):
            return target
        place = _like(self._parameters, target)
        return place.copy_(target) if filled else place


class NvmeHome(StateHome):
    """Masters and optimizer states of one bucket in a file.

    An update goes through the bucket tile by tile: while the rule runs on one, the next are read
    and the last are written. What rules keep per bucket, and not per element, stays in memory.

    Args:
        spec: the bucket.
        store: its file.
        pipeline: shared by the homes of a job.
        staging: shared by the homes of a job, too.
    """

    name = "nvme"

    def __init__(
        self, spec: BucketSpec, store: StateFile, pipeline: TilePipeline, staging: Staging
    ) -> None:
        self.spec = spec
        self.step = 0
        self._store = store
        self.pipeline = pipeline
        self.staging = staging
        self._parameters = torch.empty(0)
        self._own: dict[str, torch.Tensor] = {}

    # -- the way of a step ----------------------------------------------------------------------

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self._parameters = parameters
        initial = {}
        for state, dtype in states_of(self.spec):
            initial[state.name] = state.initial
            if state.numel is not None:
                device = parameters.device if parameters.is_meta else HOST
                own = torch.full((state.numel,), state.initial, dtype=dtype, device=device)
                self._own[state.name] = own
        for tile, kinds in self._tiles(self.pipeline.blank):
            for kind, values in kinds.items():
                if kind == MASTER:
                    values.copy_(tile.of(originals))
                else:
                    values.fill_(initial[kind])

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        pass  # the first tiles have been read since the last update

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self.step += 1
        hyper = as_they_are(hyper)
        if isinstance(scale, torch.Tensor):
            scale = scale.cpu()
        for tile, kinds in self._tiles(self.pipeline.take):
            self._update_tile(tile, kinds, gradient, hyper, scale)

    def publish(self) -> None:
        pass  # parameters are written as their tiles are updated

    def refresh(self) -> None:
        if self.spec.has_masters:
            for tile, kinds in self._tiles(self.pipeline.take):
                kinds[MASTER].copy_(tile.of(self._parameters))

    def flush(self) -> None:
        self.pipeline.drain()

    # -- internals ------------------------------------------------------------------------------

    def _tiles(
        self, take: Callable[[Place], torch.Tensor]
    ) -> Iterator[tuple[Tile, dict[str, torch.Tensor]]]:
        """Every tile and what is kept of it, by kind; written back when the next is asked for."""
        if self._parameters.is_meta:  # of a job that is only planned
            return
        layout = self._store.layout
        for index, tile in enumerate(layout.tiles):
            place = Place(self._store, index)
            yield tile, layout.views(tile, take(place))
            self.pipeline.give_back(place)

    def _update_tile(
        self,
        tile: Tile,
        kinds: dict[str, torch.Tensor],
        gradient: torch.Tensor,
        hyper: Mapping[str, Any],
        scale: float | torch.Tensor,
    ) -> None:
        there = tile.of(self._parameters)
        here = self.staging.parameters(there, filled=not self.spec.has_masters)
        part = replace(self.spec, key=tile.key, numel=tile.numel, segments=tile.segments)
        states = FlatStates(part, HOST)
        states.tensors = {**kinds, **self._own}
        states.update(here, self.staging.gradient(tile.of(gradient)), hyper, scale, self.step)
        if here is not there:
            there.copy_(here)

    # -- fragments ------------------------------------------------------------------------------

    def fragments(self) -> Sequence[Fragment]:
        fresh = {state.name: state.initial for state, _ in states_of(self.spec)}
        found = [
            self._fragment(segment, kind, dtype, fresh.get(kind, 0.0))
            for segment in self.spec.segments
            for kind, dtype in self._store.layout.kinds.items()
        ]
        key = self.spec.key
        return found + [
            bucket_fragment(key, kind, flat, "host", initial=fresh[kind])
            for kind, flat in self._own.items()
        ]

    def _fragment(
        self, segment: Segment, kind: str, dtype: torch.dtype, initial: float
    ) -> Fragment:
        start, stop = segment.offset, segment.offset + segment.numel

        def read() -> torch.Tensor:
            self.flush()
            return self._store.read_part(kind, start, stop)

        def write(values: torch.Tensor) -> None:
            self.pipeline.settle()
            self._store.write_part(kind, start, values.reshape(-1))

        # Its boxes come from a tensor that takes no memory.
        shape = torch.empty(1, dtype=dtype).expand(self.spec.numel)
        fragment = segment_fragment(segment, kind, shape, self.name, initial=initial)
        return replace(fragment, read=read, write=write)


# -- set-up ---------------------------------------------------------------------------------------


@dataclass
class _Shared:
    """What the homes of one job have in common."""

    pipeline: TilePipeline
    staging: Staging


def nvme_homes(
    job: Job, specs: Sequence[BucketSpec], section: OffloadOptimizer, aio: Aio
) -> list[StateHome]:
    """Homes in files under ``nvme_path``.

    Args:
        job: rank, accelerator, and end of everything.
        specs: buckets with rules, in the order in which they are likely to be updated.
        section: where files go, how large tiles are and how many are in memory.
        aio: how files are read and written.

    Raises:
        ConfigError: the disk has too little space, or a rule communicates gradients by itself.
        FileIOError: files cannot be made.
    """
    assert section.nvme_path is not None, "the section has been validated"
    stateful = [spec for spec in specs if kinds_of(spec)]
    if not is_host(job):
        refuse_communicating(stateful)
    layouts = [TileLayout.of(spec, kinds_of(spec), tile_limit(spec, section)) for spec in stateful]
    folder = None if is_planned(job) else SwapFolder.of(job, section.nvme_path)
    if folder is not None:
        _refuse_full_disk(folder, section.nvme_path, stateful, layouts)
    buffers = buffers_for(layouts, section.buffer_count, section.buffer_size)
    shared = _shared(job, folder, section, *buffers)
    stores = []
    for spec, layout in zip(stateful, layouts, strict=True):
        file = new_file(folder, f"{spec.key}.states", layout.file_bytes, aio)
        stores.append(StateFile(file, layout))
        if not is_host(job):
            longest = max(tile.numel for tile in layout.tiles)
            shared.staging.reserve(
                longest * spec.gradient_dtype.itemsize, longest * spec.parameter_dtype.itemsize
            )
    for store, following in zip(stores, stores[1:] + stores[:1], strict=True):
        store.following = following
    left = iter(stores)
    return [
        NvmeHome(spec, next(left), shared.pipeline, shared.staging)
        if kinds_of(spec)
        else DeviceHome(spec)  # keeps nothing of its elements, so nothing can be kept elsewhere
        for spec in specs
    ]


_of_jobs: weakref.WeakKeyDictionary[Job, _Shared] = weakref.WeakKeyDictionary()


def _shared(
    job: Job, folder: SwapFolder | None, section: OffloadOptimizer, count: int, nbytes: int
) -> _Shared:
    """So many buffers of that size; those of earlier homes of the job, if there were any."""
    if job in _of_jobs:
        pipeline = _of_jobs[job].pipeline
        pipeline.settle()  # may hold tiles of homes that are no more
        pipeline.grow(count, nbytes)
        return _of_jobs[job]
    pipeline = TilePipeline(
        count,
        nbytes,
        read_ahead=section.pipeline_read,
        write_behind=section.pipeline_write,
    )
    if folder is not None:
        folder.before_close(pipeline.close)
    memory = PinnedMemory.of(job, wanted=section.pin_memory, budget=section.pinned_memory_budget)
    staging = Staging(memory)
    _of_jobs[job] = _Shared(pipeline, staging)
    note_memory(
        job,
        lambda: [
            MemoryRow("buffers of tiles", "host", pipeline.nbytes),
            MemoryRow("staging of tiles", "host", staging.nbytes, memory.locked),
        ],
    )
    logger.info("states in files: %d buffers of %s bytes", count, f"{nbytes:,}")
    return _of_jobs[job]


def tile_limit(spec: BucketSpec, section: OffloadOptimizer) -> int | None:
    """Elements of a tile; a rule that keeps something per bucket has to see all of it."""
    return None if keeps_of_bucket(spec) else section.buffer_size


def _refuse_full_disk(
    folder: SwapFolder, root: str, specs: Sequence[BucketSpec], layouts: Sequence[TileLayout]
) -> None:
    needed, free = sum(layout.file_bytes for layout in layouts), folder.free_bytes()
    if needed > free:
        elements = sum(spec.numel for spec in specs)
        kinds = ", ".join(dict.fromkeys(kind for layout in layouts for kind in layout.kinds))
        raise ConfigError(
            f"{PATH}.nvme_path: {kinds} of {elements:,} parameters need {needed:,} bytes for "
            f"this rank, but {root} has {free:,} left; free space, choose another folder, shard "
            "over more ranks, or offload less with offload_optimizer.ratio"
        )


def _is_near(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _like(memory: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return memory[: other.nbytes].view(other.dtype)
