"""Gradient buckets of plain data parallelism: every rank gets the whole sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.contracts.world.communicator import Communicator, Handle
from drivetrain.states.gradients import GradientBucket, Slot
from drivetrain.states.sparse import sum_sparse_rows

if TYPE_CHECKING:
    from drivetrain.states.buckets import PlannedBucket


@dataclass(eq=False)
class AllReduceBucket(GradientBucket):
    """A flat buffer that gradients are added up in and summed over ranks in place.

    Args:
        communicator: carries the sums and provides the memory.
        gradient: flat [numel]; the sum over ranks once collected.
        wire_dtype: dtype in which it travels.
        sparse: whether it travels as (row indices, rows); such a bucket has one parameter.
        predivide: gradients are divided by this before they are summed (fp16 range); the caller
            folds the inverse into the update's scale.
    """

    communicator: Communicator = field(kw_only=True)
    gradient: torch.Tensor = field(kw_only=True)
    wire_dtype: torch.dtype = field(kw_only=True)
    sparse: bool = field(kw_only=True)
    predivide: float = field(kw_only=True)
    views: list[torch.Tensor] = field(default_factory=list)
    _wire: torch.Tensor | None = None
    _handle: Handle | None = None

    @classmethod
    def of(
        cls, plan: PlannedBucket, communicator: Communicator, *, overlap: bool, predivide: float
    ) -> AllReduceBucket:
        """The bucket of a plan.

        Args:
            plan: parameters and where they lie.
            communicator: carries the sums and provides the memory.
            overlap: start reducing while backward goes on.
            predivide: see the class.
        """
        spec = plan.spec
        bucket = cls(
            key=spec.key,
            reduction=spec.reduction,
            replicated=spec.replicated,
            wait_for_end=plan.sparse or not overlap,
            communicator=communicator,
            gradient=communicator.buffer(spec.numel, spec.gradient_dtype, spec.reduction),
            wire_dtype=plan.wire_dtype,
            sparse=plan.sparse,
            predivide=predivide,
        )
        bucket.views = [segment.of(bucket.gradient) for segment in spec.segments]
        bucket.slots = [
            Slot(segment.name, parameter, index, bucket)
            for index, (segment, parameter) in enumerate(
                zip(spec.segments, plan.parameters, strict=True)
            )
        ]
        bucket.restart()
        return bucket

    def add(self, slot: Slot, gradient: torch.Tensor) -> None:
        view = self.views[slot.index]
        if slot.filled:
            view.add_(gradient)
        elif gradient.is_sparse:
            view.zero_().add_(gradient)
        else:
            view.copy_(gradient)

    def unsent(self, slot: Slot) -> torch.Tensor:
        return self.views[slot.index]

    def send(self) -> None:
        for slot in self.slots:
            if not slot.filled:
                self.views[slot.index].zero_()
        self._divide(self.gradient)
        if self.sparse and self._travels:
            tag = Tag(Purpose.GRADIENT, self.key, "replicated")
            sum_sparse_rows(self.communicator, self.views[0], self.reduction, tag)
        elif self._travels:
            self._sum(self.gradient)

    def collect(self) -> None:
        self._collect(self.gradient)

    def add_late(self) -> None:
        extra = torch.zeros_like(self.gradient)
        offset = 0
        for slot in self.slots:
            view = self.views[slot.index]
            if slot.late is not None:
                extra.narrow(0, offset, view.numel()).view_as(view).add_(slot.late)
            offset += view.numel()
        self._divide(extra)
        if self._travels:
            self._sum(extra)  # dense, even for a sparse bucket
            self._collect(extra)
        self.gradient.add_(extra)

    def restart(self) -> None:
        super().restart()
        self._wire = self._handle = None

    @property
    def _travels(self) -> bool:
        return self.reduced and self.communicator.size(self.reduction) > 1

    def _divide(self, gradient: torch.Tensor) -> None:
        """Whether it is summed or not, since the update's scale undoes it for every bucket."""
        if self.predivide != 1.0:
            gradient.mul_(1.0 / self.predivide)

    def _sum(self, gradient: torch.Tensor) -> None:
        """Start summing ``gradient`` over the bucket's axes; :meth:`_collect` ends it."""
        tag = Tag(Purpose.GRADIENT, self.key, "replicated")
        self._wire = gradient.to(self.wire_dtype)  # the tensor itself where that is its dtype
        self._handle = self.communicator.all_reduce(
            self._wire, self.reduction, tag, asynchronous=True
        )

    def _collect(self, into: torch.Tensor) -> None:
        if self._handle is None:
            return
        assert self._wire is not None
        self._handle.wait()
        if self._wire is not into:
            into.copy_(self._wire)
        self._handle = self._wire = None
