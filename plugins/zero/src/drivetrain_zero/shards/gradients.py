"""Gradient buckets whose sum is scattered: every rank gets its shard of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Communicator, Handle, Op, Purpose, Tag
from drivetrain.states.gradients import GradientBucket, Slot

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain_zero.shards.bucket import ShardedBucket

_KEPT = 2
"""Buffers of each kind: one is filled while another travels. Where nothing travels, one is kept."""


class GradientMemory:
    """Buffers for whole gradients, lent to one bucket after another.

    They are made at set-up, because memory that ranks communicate from is made by all of them
    together. When all are lent out, the one that has travelled longest is waited for; if none
    travels (buckets that fill slowly, one after another), a bucket gets ordinary memory.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._wanted: dict[tuple[torch.dtype, Axis, torch.device], int] = defaultdict(int)
        self._free: dict[tuple[torch.dtype, Axis, torch.device], list[torch.Tensor]] = {}
        self._travelling: dict[ReduceScatterBucket, None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that :meth:`make` allocates."""
        return sum(
            self._kept(axis) * numel * dtype.itemsize
            for (dtype, axis, _), numel in self._wanted.items()
        )

    def _kept(self, axis: Axis) -> int:
        return _KEPT if self._communicator.size(axis) > 1 else 1

    def announce(self, numel: int, dtype: torch.dtype, axis: Axis, device: torch.device) -> None:
        """A bucket will borrow ``numel`` elements."""
        kind = (dtype, axis, device)
        self._wanted[kind] = max(self._wanted[kind], numel)

    def make(self) -> None:
        """Allocate for what was announced. Collective."""
        for (dtype, axis, device), numel in self._wanted.items():
            self._free[dtype, axis, device] = [
                torch.empty(numel, dtype=dtype, device=device)
                if device.type == "meta" or self._communicator.size(axis) == 1
                else self._communicator.buffer(numel, dtype, axis)
                for _ in range(self._kept(axis))
            ]

    def borrow(
        self, numel: int, dtype: torch.dtype, axis: Axis, device: torch.device
    ) -> torch.Tensor:
        """``numel`` elements of any values; :meth:`give_back` ends the loan."""
        free = self._free.get((dtype, axis, device))
        while free == [] and self._travelling:
            next(iter(self._travelling)).collect()
        if free and free[-1].numel() >= numel:
            return free.pop()
        return torch.empty(numel, dtype=dtype, device=device)

    def travels(self, bucket: ReduceScatterBucket) -> None:
        """A loan of ``bucket`` ends as soon as it is collected."""
        self._travelling[bucket] = None

    def arrived(self, bucket: ReduceScatterBucket) -> None:
        """``bucket`` is being collected."""
        self._travelling.pop(bucket, None)

    def give_back(self, buffer: torch.Tensor, axis: Axis) -> None:
        """End a loan."""
        kind = (buffer.dtype, axis, buffer.device)
        if buffer.numel() == self._wanted.get(kind) and len(self._free[kind]) < self._kept(axis):
            self._free[kind].append(buffer)


@dataclass(eq=False)
class ReduceScatterBucket(GradientBucket):
    """Adds up gradients of whole parameters and keeps this rank's shard of their sum over ranks.

    Args:
        parameters: the layout that gradients follow.
        communicator: carries the sums.
        memory: lends the whole buffer; unused when ``keep`` is set.
        keep: the whole buffer stays and gradients are added up in it over micro-batches, so the
            shard of the sum is a slice of it.
        predivide: gradients are divided by this before they are summed.
        asynchronous: reduce while backward goes on.
    """

    parameters: ShardedBucket = field(kw_only=True)
    communicator: Communicator = field(kw_only=True)
    memory: GradientMemory = field(kw_only=True)
    keep: bool = field(kw_only=True)
    predivide: float = field(kw_only=True)
    asynchronous: bool = field(kw_only=True)
    local: bool = False
    """Several micro-batches are being added up before anything travels."""
    last: bool = False
    """This is the window's last micro-batch, so that the home may have each sum at once."""

    shard: torch.Tensor = field(init=False)
    _whole: torch.Tensor | None = None
    _views: list[torch.Tensor] = field(default_factory=list)
    _loan: torch.Tensor | None = None
    _travelling: tuple[Handle, torch.Tensor] | None = None
    _has_sum: bool = False
    _has_replicas: bool = False
    _told: bool = False

    def __post_init__(self) -> None:
        spec, packing = self.parameters.spec, self.parameters.packing
        names = [segment.name for segment in self.parameters.plan.spec.segments]
        self.slots = [
            Slot(name, parameter, index, self, place=self.parameters.whole.place_of(index))
            for index, (name, parameter) in enumerate(
                zip(names, self.parameters.parameters, strict=True)
            )
        ]
        axis, wire = self.parameters.axis, self.parameters.plan.wire_dtype
        if self.keep:
            kept = self.parameters.layout.buffer(packing.numel, spec.gradient_dtype)
            self._use(kept)
            self.shard = self.parameters.layout.shard_of(kept)
        else:
            self.memory.announce(packing.numel, wire, axis, spec.device)
            self.shard = torch.zeros(packing.shard, dtype=spec.gradient_dtype, device=spec.device)
        super().restart()

    # -- one round ----------------------------------------------------------------------------

    def add(self, slot: Slot, gradient: torch.Tensor) -> None:
        if self._travelling is not None:
            self.collect()
        if self._whole is None:
            self._open()
        view = self._views[slot.index]
        if slot.filled:
            view.add_(gradient)
        elif gradient.is_sparse:
            view.zero_().add_(gradient)
        else:
            view.copy_(gradient)

    def unsent(self, slot: Slot) -> torch.Tensor:
        return self._views[slot.index]

    def send(self) -> None:
        if self._travelling is not None:
            self.collect()
        if self._whole is None:
            self._open()
        assert self._whole is not None
        for slot in self.slots:
            if not slot.filled:
                self._views[slot.index].zero_()
        self._reduce(self._whole)

    def _reduce(self, gradient: torch.Tensor) -> None:
        """Start summing ``gradient`` over ranks, into this rank's slice of what travels."""
        for offset, numel in self.parameters.packing.gaps():
            gradient.narrow(0, offset, numel).zero_()
        if self.predivide != 1.0:
            gradient.mul_(1.0 / self.predivide)
        wire = gradient.to(self.parameters.plan.wire_dtype)  # itself where that is its dtype
        direct = not self.keep and not self._has_sum and wire.dtype == self.shard.dtype
        result = self.shard if direct else self.parameters.layout.shard_of(wire)
        tag = Tag(Purpose.GRADIENT, self.key, "zero")
        handle = self.communicator.reduce_scatter(
            result, wire, self.parameters.axis, tag, asynchronous=self.asynchronous
        )
        self._travelling = (handle, result)
        if self.asynchronous:
            self.memory.travels(self)
        else:
            self.collect()

    def collect(self) -> None:
        if self._travelling is None:
            return
        handle, result = self._travelling
        handle.wait()
        self._travelling = None
        self.memory.arrived(self)
        self._keep_sum(result)
        if not self.keep:
            self._close()

    def _keep_sum(self, result: torch.Tensor) -> None:
        if self._has_sum:
            self.shard.add_(result)
        elif result.data_ptr() != self.shard.data_ptr():
            self.shard.copy_(result)
        self._has_sum = True
        self._told = False
        if self.last and self.parameters.replica_axis is None:
            self.tell_home()

    def tell_home(self) -> None:
        """Show the home this rank's sum, unless it has seen it."""
        if not self._told:
            self.parameters.home.gradient_ready(self.shard)
            self._told = True

    # -- late gradients -----------------------------------------------------------------------

    def add_late(self) -> None:
        spec, packing = self.parameters.spec, self.parameters.packing
        extra = torch.zeros(packing.numel, dtype=spec.gradient_dtype, device=spec.device)
        for slot, view in zip(self.slots, self.parameters.layout.views_of(extra), strict=True):
            if slot.filled and not self.sent:
                view.copy_(self._views[slot.index])
            if slot.late is not None:
                view.add_(slot.late)
        if self.predivide != 1.0:
            extra.mul_(1.0 / self.predivide)
        wire = extra.to(self.parameters.plan.wire_dtype)
        result = self.parameters.layout.shard_of(wire)
        tag = Tag(Purpose.GRADIENT, self.key, "zero, late")
        self.communicator.reduce_scatter(result, wire, self.parameters.axis, tag)
        if self._has_replicas:
            self._sum_replicas(result)
        self._keep_sum(result)

    # -- a window -----------------------------------------------------------------------------

    def restart(self) -> None:
        super().restart()
        self._has_sum = self._has_replicas = self._told = False
        if self._loan is not None:
            self._close()

    def sum_replicas(self) -> None:
        """Add the sums of ranks that hold the same shard (MiCS); they travel once a window."""
        if not self._has_replicas:
            self._sum_replicas(self.shard)
            self._has_replicas = True

    def _sum_replicas(self, shard: torch.Tensor) -> None:
        axis = self.parameters.replica_axis
        if axis is not None:
            tag = Tag(Purpose.GRADIENT, self.key, "zero, replicas")
            wire = shard.to(self.parameters.plan.wire_dtype)
            self.communicator.all_reduce(wire, axis, tag, op=Op.SUM)
            if wire is not shard:
                shard.copy_(wire)

    # -- the whole buffer ---------------------------------------------------------------------

    def _open(self) -> None:
        spec, plan = self.parameters.spec, self.parameters.plan
        dtype = spec.gradient_dtype if self.local else plan.wire_dtype
        numel = self.parameters.packing.numel
        self._loan = self.memory.borrow(numel, dtype, self.parameters.axis, spec.device)
        self._use(self._loan.narrow(0, 0, numel))

    def _close(self) -> None:
        assert self._loan is not None
        self.memory.give_back(self._loan, self.parameters.axis)
        self._loan = self._whole = None
        self._views = []

    def _use(self, whole: torch.Tensor) -> None:
        self._whole, self._views = whole, self.parameters.layout.views_of(whole)
