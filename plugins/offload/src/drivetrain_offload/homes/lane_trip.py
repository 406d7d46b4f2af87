"""The way of one bucket's tensors through the lanes that all buckets of a rank share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import version_of
from drivetrain_offload.host.copies import Lane, Mark

if TYPE_CHECKING:
    from drivetrain_offload.homes.bucket import HostBucket, Update


class LaneTrip:
    """Brings a bucket's gradient, and parameters that are their own masters, down into a lane.

    What is in host memory already is used where it is.

    Args:
        bucket: whose.
        gradient_stays: copy the gradient in any case, since it may be needed again.
    """

    def __init__(self, bucket: HostBucket, *, gradient_stays: bool = False) -> None:
        self._bucket = bucket
        self._gradient_stays = gradient_stays
        self._lane: Lane | None = None
        self._brought: tuple[int, int] | None = None  # the version of the gradient in the lane

    # -- on the rank's thread -------------------------------------------------------------------

    def begin(self, gradient: torch.Tensor) -> None:
        """Begin to bring down a gradient, which may change until :meth:`complete`."""
        side = self._bucket.side
        # What has come down before is out of date, or of a step that was dropped.
        side.lanes.release(self._lane, self)
        self._brought = version_of(gradient)
        fill = partial(self._fill_gradient, gradient, side.down.mark())
        self._lane = side.lanes.claim(self, fill, steal=False)

    def has(self, gradient: torch.Tensor) -> bool:
        """True if the gradient brought down last is this one, and it has not changed since."""
        return self._brought == version_of(gradient)

    def complete(self, work: Update) -> None:
        """Begin to bring down the rest of what the update needs, now that it is asked for."""
        lanes = self._bucket.side.lanes
        if not self.has(work.gradient):
            lanes.release(self._lane, self)
        elif not self._bucket.spec.has_masters:
            lanes.add(self._lane, self, partial(self._fill_parameters, work.asked))

    # -- on the worker's thread -----------------------------------------------------------------

    def prepare(self, work: Update) -> None:
        """Begin to bring down what is not on its way, while the bucket before is updated."""
        lanes = self._bucket.side.lanes
        if not lanes.holds(self._lane, self):
            self._lane = lanes.claim(self, partial(self._fill, work), steal=False)

    @contextmanager
    def arrived(self, work: Update) -> Iterator[Lane]:
        """A lane with all that the update needs, until the block ends."""
        lanes = self._bucket.side.lanes
        if not lanes.holds(self._lane, self):
            self._lane = lanes.claim(self, partial(self._fill, work), steal=True)
        assert self._lane is not None, "a lane can be stolen"
        lane = self._lane
        lane.filled.synchronize()
        try:
            yield lane
        finally:
            lanes.release(lane, self)

    def gradient(self, work: Update, lane: Lane) -> torch.Tensor:
        """The gradient in host memory [numel]."""
        spec = self._bucket.spec
        if self._is_used_in_place(work.gradient):
            return work.gradient
        return _part(lane.gradient, spec.numel, spec.gradient_dtype)

    def parameters(self, lane: Lane) -> torch.Tensor:
        """Where the rule leaves new parameters [numel]: in the lane, or in their own place."""
        bucket = self._bucket
        if bucket.side.is_near(bucket.parameters.device):
            return bucket.parameters
        return _part(lane.parameters, bucket.spec.numel, bucket.spec.parameter_dtype)

    # -- copies down ----------------------------------------------------------------------------

    def _is_used_in_place(self, gradient: torch.Tensor) -> bool:
        return not self._gradient_stays and self._bucket.side.is_near(gradient.device)

    def _fill(self, work: Update, lane: Lane) -> Mark:
        self._fill_gradient(work.gradient, work.asked, lane)
        return self._fill_parameters(work.asked, lane)

    def _fill_gradient(self, gradient: torch.Tensor, ready: Mark, lane: Lane) -> Mark:
        spec, pairs = self._bucket.spec, []
        if not self._is_used_in_place(gradient):
            pairs = [(_part(lane.gradient, spec.numel, spec.gradient_dtype), gradient)]
        return self._bucket.side.down.copy(pairs, [ready, lane.drained])

    def _fill_parameters(self, ready: Mark, lane: Lane) -> Mark:
        bucket, here = self._bucket, self.parameters(lane)
        needs = not bucket.spec.has_masters and here is not bucket.parameters
        return bucket.side.down.copy([(here, bucket.parameters)] if needs else [], [ready])


def _part(flat: torch.Tensor, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return flat.narrow(0, 0, numel * dtype.itemsize).view(dtype)
