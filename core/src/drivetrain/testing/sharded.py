"""Optimizer states cut over the ranks, the plain way: for tests of whatever works on fragments.

Parameters and gradients stay replicated. Every rank keeps masters and optimizer states of one part
of each bucket, updates that part, and sends its new parameters to all others. Parts are unequal,
and their ends lie anywhere in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.plugin.plugin import Plugin, hookimpl
from drivetrain.contracts.state.bucket import BucketSpec
from drivetrain.contracts.state.home import StateHome
from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.contracts.world.communicator import Communicator, is_first_copy
from drivetrain.states.device_home import DeviceHome

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import Hyper
    from drivetrain.contracts.state.fragment import Fragment
    from drivetrain.job.job import Job


class ShardedStates(Plugin):
    """Activated by ``"plugins": {"sharded_states": true}``, once it is in the registry."""

    name = "sharded_states"

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        return [ShardedHome(spec, job.communicator) for spec in specs]


class ShardedHome(StateHome):
    """This rank's part of a bucket's states.

    Args:
        spec: of the whole bucket.
        communicator: sends updated parameters over the bucket's reduction.
    """

    def __init__(self, spec: BucketSpec, communicator: Communicator) -> None:
        self.spec = spec
        self._communicator = communicator
        size, self._rank = communicator.size(spec.reduction), communicator.rank(spec.reduction)
        cuts = [spec.numel * rank * (rank + 1) // (size * (size + 1)) for rank in range(size + 1)]
        self._parts = list(pairwise(cuts))
        self._begin, self._end = self._parts[self._rank]
        part = part_of(spec, self._begin, self._end)
        first = is_first_copy(communicator, spec.replicated)
        owned = tuple(replace(segment, owner=first) for segment in part.segments)
        self._part = DeviceHome(replace(part, segments=owned))
        self._parameters = torch.empty(0)

    @property
    def step(self) -> int:
        return self._part.step

    @step.setter
    def step(self, value: int) -> None:
        self._part.step = value

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self._parameters = parameters
        self._part.adopt(parameters[self._begin : self._end], originals[self._begin : self._end])

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self._part.update(gradient[self._begin : self._end], hyper, scale)

    def publish(self) -> None:
        for source, (begin, end) in enumerate(self._parts):
            part, tag = self._parameters[begin:end], Tag(Purpose.WEIGHT, self.spec.key, "publish")
            if part.numel():
                self._communicator.broadcast(part, self.spec.reduction, tag, source=source)

    def refresh(self) -> None:
        self._part.refresh()

    def fragments(self) -> Sequence[Fragment]:
        return self._part.fragments()


def part_of(spec: BucketSpec, start: int, stop: int) -> BucketSpec:
    """Elements [start, stop) of a bucket as a bucket of their own."""
    segments = []
    for segment in spec.segments:
        low, high = max(segment.offset, start), min(segment.offset + segment.numel, stop)
        if low < high:
            first = segment.start + low - segment.offset
            segments.append(replace(segment, start=first, numel=high - low, offset=low - start))
    key = f"{spec.key}.{start}"
    return replace(spec, key=key, numel=stop - start, segments=tuple(segments))
