"""From autograd's gradients to reduced buckets, overlapped with the rest of backward.

[Note: gradient readiness] A parameter may receive several accumulations in one backward
(re-entrant checkpointing, tiled compute, several backward calls) or none that autograd's hooks see
(split backward, unused parameters). So:

- each accumulation is moved from ``.grad`` into the bucket at once, and ``.grad`` is cleared;
- a bucket is reduced when all of its parameters have been seen, in one fixed order on all ranks;
- an accumulation that arrives after its bucket was sent is kept aside, summed over ranks in a
  second round at the end of the window, and added. It is never lost. From then on that bucket
  waits for the end of the window, so the second round is paid once;
- whatever was not seen by the end of the window counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.communicator import Communicator, Handle, Purpose, Tag
from drivetrain.replicated.sparse import sum_sparse_rows

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from drivetrain.mesh import Axis
    from drivetrain.replicated.layout import PlannedBucket


@dataclass(slots=True, eq=False)
class Slot:
    """One parameter's place in a bucket during a window."""

    name: str
    parameter: nn.Parameter
    view: torch.Tensor
    bucket: GradientBucket
    filled: bool = False  # the view holds a gradient of this window
    seen: bool = False  # a gradient arrived since reduction became possible
    deferred: bool = False
    late: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class GradientBucket:
    """The gradient buffer of one bucket and how far its reduction is."""

    key: str
    gradient: torch.Tensor
    reduction: Axis
    wire_dtype: torch.dtype
    sparse: bool
    slots: list[Slot] = field(default_factory=list)
    reduced: bool = True  # false while the rule communicates by itself
    wait_for_end: bool = False
    missing: int = 0
    sent: bool = False
    wire: torch.Tensor | None = None
    handle: Handle | None = None

    def restart(self) -> None:
        """Forget the window's gradients."""
        self.missing = len(self.slots)
        self.sent = False
        self.wire = self.handle = None
        for slot in self.slots:
            slot.filled = slot.seen = False
            slot.late = None


class GradientReducer:
    """Fills buckets from autograd hooks and sums them over their reduction axes.

    Args:
        planned: the buckets, in the order in which they are reduced on every rank.
        communicator: carries the sums and provides the gradient memory.
        overlap: start reducing while backward goes on.
        predivide: gradients are divided by this before they are summed (fp16 range); the caller
            folds the inverse into the update's scale.
    """

    def __init__(
        self,
        planned: Sequence[PlannedBucket],
        communicator: Communicator,
        *,
        overlap: bool,
        predivide: float,
    ) -> None:
        self.reduce_now = True
        self.buckets = [self._bucket(plan, communicator, overlap) for plan in planned]
        self.slots = {slot.parameter: slot for bucket in self.buckets for slot in bucket.slots}
        self._communicator = communicator
        self._predivide = predivide
        self._next = 0
        self._hooks: list[RemovableHandle] = []
        for slot in self.slots.values():
            parameter: Any = slot.parameter  # torch does not type the method
            hook = parameter.register_post_accumulate_grad_hook(
                lambda _parameter, slot=slot: None if slot.deferred else self._take(slot)
            )
            self._hooks.append(hook)

    @staticmethod
    def _bucket(plan: PlannedBucket, communicator: Communicator, overlap: bool) -> GradientBucket:
        spec = plan.spec
        bucket = GradientBucket(
            key=spec.key,
            gradient=communicator.buffer(spec.numel, spec.gradient_dtype, spec.reduction),
            reduction=spec.reduction,
            sparse=plan.sparse,
            wire_dtype=plan.wire_dtype,
            wait_for_end=plan.sparse or not overlap,
        )
        bucket.slots = [
            Slot(segment.name, parameter, segment.of(bucket.gradient), bucket)
            for segment, parameter in zip(spec.segments, plan.parameters, strict=True)
        ]
        bucket.restart()
        return bucket

    # -- during backward ----------------------------------------------------------------------

    def gradients_ready(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take ``.grad`` of parameters that hooks did not report, and end their deferral."""
        for parameter in parameters:
            slot = self.slots[parameter]
            slot.deferred = False
            self._take(slot)

    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave the gradients of ``parameters`` in ``.grad`` until :meth:`gradients_ready`."""
        for parameter in parameters:
            self.slots[parameter].deferred = True

    def _take(self, slot: Slot) -> None:
        gradient, slot.parameter.grad = slot.parameter.grad, None
        bucket = slot.bucket
        if gradient is not None:
            if bucket.sent:
                slot.late = gradient if slot.late is None else slot.late + gradient
                bucket.wait_for_end = True
                return
            _accumulate(slot, gradient)
        if self.reduce_now and not slot.seen:
            slot.seen = True
            bucket.missing -= 1
            if not bucket.missing:
                self._send_in_order()

    def _send_in_order(self) -> None:
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if bucket.missing or bucket.wait_for_end:
                return
            self._send(bucket)
            self._next += 1

    def _send(self, bucket: GradientBucket) -> None:
        for slot in bucket.slots:
            if not slot.filled:
                slot.view.zero_()
        bucket.sent = True
        self._divide(bucket.gradient)
        if bucket.reduced and self._communicator.size(bucket.reduction) > 1:
            self._sum(bucket, bucket.gradient)

    def _divide(self, gradient: torch.Tensor) -> None:
        """Whether it is summed or not, since the update's scale undoes it for every bucket."""
        if self._predivide != 1.0:
            gradient.mul_(1.0 / self._predivide)

    def _sum(self, bucket: GradientBucket, gradient: torch.Tensor) -> None:
        """Start summing ``gradient`` over the bucket's axes; :meth:`_collect` ends it."""
        tag = Tag(Purpose.GRADIENT, bucket.key, "replicated")
        if bucket.sparse:
            sum_sparse_rows(self._communicator, bucket.slots[0].view, bucket.reduction, tag)
            return
        bucket.wire = gradient.to(bucket.wire_dtype)  # the tensor itself where that is its dtype
        bucket.handle = self._communicator.all_reduce(
            bucket.wire, bucket.reduction, tag, asynchronous=True
        )

    def end_backward(self) -> None:
        """Start reducing buckets whose remaining parameters got no gradient in this window."""
        if not self.reduce_now:
            return
        for bucket in self.buckets:
            if not any(slot.deferred for slot in bucket.slots):
                bucket.missing = 0
                for slot in bucket.slots:
                    slot.seen = True
        self._send_in_order()

    # -- at the boundary ----------------------------------------------------------------------

    def finish(self) -> None:
        """Reduce what is left, wait for all, then sum late accumulations in a second round."""
        waiting = [
            s.name for s in self.slots.values() if s.deferred and s.parameter.grad is not None
        ]
        assert not waiting, f"deferred gradients were never reported ready: {waiting}"
        for bucket in self.buckets[self._next :]:
            self._send(bucket)
        self._next = len(self.buckets)
        late = self._agree_on_late()
        for bucket in self.buckets:
            self._collect(bucket, bucket.gradient)
        for bucket in late:
            self._add_late(bucket)

    def _collect(self, bucket: GradientBucket, into: torch.Tensor) -> None:
        if bucket.handle is None:
            return
        assert bucket.wire is not None
        bucket.handle.wait()
        if bucket.wire is not into:
            into.copy_(bucket.wire)
        bucket.handle = bucket.wire = None

    def _agree_on_late(self) -> list[GradientBucket]:
        """Buckets in which any rank has late accumulations; one small host collective per axis.

        Hooks run on the host, so the flags are known there and no device has to be waited for.
        """
        flags = {bucket.key: _has_late(bucket) for bucket in self.buckets}
        by_axis: dict[Axis, list[GradientBucket]] = {}
        for bucket in self.buckets:
            if bucket.reduced and self._communicator.size(bucket.reduction) > 1:
                by_axis.setdefault(bucket.reduction, []).append(bucket)
        for axis, members in by_axis.items():
            counts = torch.tensor([int(flags[b.key]) for b in members], dtype=torch.int32)
            self._communicator.all_reduce(counts, axis, Tag(Purpose.CONTROL, site="late gradients"))
            flags.update({b.key: bool(n) for b, n in zip(members, counts.tolist(), strict=True)})
        return [bucket for bucket in self.buckets if flags[bucket.key]]

    def _add_late(self, bucket: GradientBucket) -> None:
        bucket.wait_for_end = True
        extra = torch.zeros_like(bucket.gradient)
        offset = 0
        for slot in bucket.slots:
            if slot.late is not None:
                extra.narrow(0, offset, slot.view.numel()).view_as(slot.view).add_(slot.late)
            offset += slot.view.numel()
        self._divide(extra)
        if bucket.reduced and self._communicator.size(bucket.reduction) > 1:
            sparse, bucket.sparse = bucket.sparse, False  # the second round is dense
            self._sum(bucket, extra)
            bucket.sparse = sparse
            self._collect(bucket, extra)
        bucket.gradient.add_(extra)

    def drop(self) -> None:
        """Wait until nothing writes into the buckets any more.

        What one rank has sent, all ranks must send; a window without any backward sends nothing.
        """
        if any(bucket.sent for bucket in self.buckets):
            self.finish()

    def restart(self) -> None:
        """Begin a new window."""
        self._next = 0
        for bucket in self.buckets:
            bucket.restart()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def _accumulate(slot: Slot, gradient: torch.Tensor) -> None:
    if gradient.is_sparse:
        if not slot.filled:
            slot.view.zero_()
        slot.view.add_(gradient)
    elif slot.filled:
        slot.view.add_(gradient)
    else:
        slot.view.copy_(gradient)
    slot.filled = True


def _has_late(bucket: GradientBucket) -> bool:
    return any(slot.late is not None for slot in bucket.slots)
