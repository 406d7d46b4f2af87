"""Parameters in one flat buffer, of which every rank keeps a shard."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketSpec, Fragment, StateHome, is_first_copy, write_master
from drivetrain.states.device_home import segment_fragment
from drivetrain.states.loose import broadcast_first
from drivetrain.states.whole import handed_over
from drivetrain_zero.shards.layout import Layout
from drivetrain_zero.shards.packing import Packing, pack
from drivetrain_zero.shards.shown import ShownParameters
from drivetrain_zero.shards.whole import WholeParameters, whole_of

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job
    from drivetrain.states.buckets import PlannedBucket


class ShardedBucket:
    """The parameters of one bucket, of which this rank updates its shard.

    Args:
        job: memory, collectives, facts about parameters.
        plan: the parameters and what they have in common.
        axis: ranks that shard the bucket between them; its reduction, or the inner part of it.
        replica_axis: the rest of its reduction, over which shards are copies; ``None`` for none.
        sharded: parameters are released between uses.
        kept: they stay gathered all the same, from their first use to the next update.
        rounds: the communicator rounds what it gathers of them (qwZ).

    Attributes:
        layout: where parameters lie in a flat tensor, and which slice of it is the shard.
        shown: what the parameters show, and whether a script has changed it.
        whole: how they become whole, and what this rank keeps; from :meth:`adopt` on.
        home: keeps their states; from :meth:`adopt` on.
        counts: this rank is the first of those that hold the same shard, and so the one that
            counts in norms and checkpoints.
    """

    home: StateHome
    whole: WholeParameters

    def __init__(
        self,
        job: Job,
        plan: PlannedBucket,
        axis: Axis,
        replica_axis: Axis | None,
        *,
        sharded: bool,
        kept: bool = False,
        rounds: bool = False,
    ) -> None:
        self._job = job
        communicator, spec = job.communicator, plan.spec
        ranks, rank = communicator.size(axis), communicator.rank(axis)
        self.key = spec.key
        self.plan = plan
        self.parameters = plan.parameters
        self.axis = axis
        self.replica_axis = replica_axis
        self.rounds = rounds and ranks > 1
        self._is_released = sharded and ranks > 1
        self.packing = pack(
            [parameter.numel() for parameter in plan.parameters],
            ranks,
            "element" if spec.rule is None else spec.rule.grain,
            communicator.joined_page(axis) // spec.parameter_dtype.itemsize
            if self._is_released and not self.rounds
            else 0,
        )
        shapes = [parameter.shape for parameter in plan.parameters]
        self.layout = Layout(
            spec.key, self.packing, shapes, spec.parameter_dtype, spec.device, communicator, axis
        )
        self.shown = ShownParameters([s.name for s in spec.segments], plan.parameters)
        first_copy = communicator.rank(spec.reduction) == rank
        self.counts = first_copy and is_first_copy(communicator, spec.replicated)
        self.spec = replace(
            _shard_spec(spec, self.packing, rank, owner=self.counts),
            released=sharded and not kept,
        )

    @property
    def shard(self) -> torch.Tensor:
        """This rank's parameters, flat."""
        return self.whole.shard

    @property
    def sharded(self) -> bool:
        """Whether parameters are released between uses."""
        return self.whole.is_temporary

    def adopt(self, home: StateHome) -> None:
        """Take the parameters' values, the first rank's on all, and hand the shard to ``home``.

        Collective. Parameters that are sharded already (``zero.Init``) are gathered meanwhile.
        """
        self.home = home
        self.whole = whole_of(
            self.layout, self.shown, home, released=self._is_released, rounds=self.rounds
        )
        wide = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        with handed_over(self.parameters):
            originals = torch.zeros(self.packing.numel, dtype=wide, device=self.spec.device)
            views = self.layout.views_of(originals)
            for view, parameter in zip(views, self.parameters, strict=True):
                view.copy_(parameter.detach())
        axes = self.spec.reduction, self.spec.replicated
        broadcast_first(self._job, originals, self.key, *axes)
        self.whole.fill(originals)
        for parameter in self.parameters:
            parameter.grad = None
        home.step = self.plan.step
        home.adopt(self.shard, self.layout.shard_of(originals))
        self.whole.adopted()

    def take_over(self, index: int) -> None:
        """Keep what the client wrote into gathered parameter ``index``: shard and master."""
        parameter, view = self.parameters[index], self.whole.views[index]
        if parameter.data_ptr() != view.data_ptr() or not parameter.is_contiguous():
            view.copy_(parameter.detach().clone())  # it may be a view of the same memory
            parameter.data = view
        self.shown.note_values()
        self.whole.shard_changes()
        name = self._job.parameters.info(parameter).name
        for segment in self.spec.segments:
            if segment.name == name:
                values = view.reshape(-1).narrow(0, segment.start, segment.numel)
                segment.of(self.shard).copy_(values.view_as(segment.of(self.shard)))
                write_master(self.home, segment, view)
        self.whole.keep_shard()
        if not self.spec.has_masters:
            self.home.refresh()

    def fragments(self, gradient: torch.Tensor | None) -> list[Fragment]:
        """Parameters, and gradients if there are any, of this rank's shard."""
        flats = {} if self.whole.fetches else {"parameter": self.shard}
        if gradient is not None:
            flats["gradient"] = gradient
        return [
            segment_fragment(segment, kind, flat, "device")
            for segment in self.spec.segments
            for kind, flat in flats.items()
        ]


def _shard_spec(spec: BucketSpec, packing: Packing, rank: int, *, owner: bool) -> BucketSpec:
    """Return what a home is told of one shard of a bucket."""
    segments = [
        replace(
            spec.segments[part.index],
            start=part.start,
            numel=part.numel,
            offset=part.offset,
            owner=owner,
        )
        for part in packing.parts(rank)
    ]
    return replace(spec, numel=packing.shard, segments=tuple(segments))
