"""Updates that the host computes while the device takes the next step (one step stale).

Ren et al., "ZeRO-Offload: democratizing billion-scale model training", 2021, section 5.2: the
parameters after step t are those that the masters had before it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import version_of
from drivetrain.states.device_home import MASTER
from drivetrain_offload.homes.timing import Timing
from drivetrain_offload.host.copies import Mark, Reached

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, Hyper
    from drivetrain_offload.homes.bucket import HostBucket, Update
    from drivetrain_offload.host.side import HostSide


class Delayed(Timing):
    """The worker keeps the masters a step ahead of the parameters.

    :class:`HostHome` waits for an update (:meth:`HostBucket.finish`) before it asks for the next.

    The masters hold all updates once :meth:`flush` returns; what the parameters lack is therefore
    in every checkpoint, and the first step after a resume shows it.

    Args:
        bucket: one with masters.

    Attributes:
        gradient: a copy of the step's gradient.
        rounded: the masters in the parameters' dtype.
        due: what the next :meth:`publish` shows.
    """

    def __init__(self, bucket: HostBucket) -> None:
        spec = bucket.spec
        assert spec.has_masters, f"the parameters of bucket {spec.key} are their own masters"
        super().__init__(bucket)
        self.due: torch.Tensor | None = None

    @staticmethod
    def extra_bytes(spec: BucketSpec) -> int:
        """Bytes beside masters and states: a gradient, parameters of this step and of the last."""
        return spec.numel * (spec.gradient_dtype.itemsize + 2 * spec.parameter_dtype.itemsize)

    def adopt(self) -> None:
        self.gradient = GradientCopy(self.bucket.spec, self.bucket.side)
        self.rounded = RoundedMasters(self.bucket)
        self.due = None

    def gradient_ready(self, gradient: torch.Tensor, step: int) -> None:
        self.gradient.forget()
        if not self.bucket.is_busy:  # else the copy is still being read
            self.gradient.begin(gradient)

    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        copied = self.gradient.complete(gradient)
        self.due = self.rounded.latest()
        work = self.bucket.asked(self.gradient.values, hyper, scale, step)
        self.bucket.submit(partial(self.run, work, copied, self.bucket.uploaded))

    def publish(self) -> None:
        due, self.due = self.due, None
        if due is not None:
            self.bucket.upload(due, [self.bucket.side.up.mark()])
        self.gradient.copied.wait()  # the gradient's memory is free now
        self.bucket.uploaded.wait()

    def masters_written(self) -> None:
        self.rounded.known = None

    def run(self, work: Update, copied: Mark, uploaded: Mark) -> None:
        """On the worker's thread: the masters' next values, and their rounded copy."""
        copied.synchronize()
        uploaded.synchronize()
        target = self.rounded.spare()
        self.bucket.run(work, work.gradient, target)
        self.rounded.known = target


class GradientCopy:
    """A bucket's gradient in host memory of its own, which outlives the step.

    Args:
        spec: the bucket.
        side: copies, and has the memory.
    """

    def __init__(self, spec: BucketSpec, side: HostSide) -> None:
        self.values = side.memory.empty(spec.numel, spec.gradient_dtype)
        self.copied: Mark = Reached()
        self._side = side
        self._version: tuple[int, int] | None = None  # of the gradient that is being copied

    def begin(self, gradient: torch.Tensor) -> None:
        """Begin to copy."""
        down = self._side.down
        self.copied = down.copy([(self.values, gradient)], [down.mark()])
        self._version = version_of(gradient)

    def complete(self, gradient: torch.Tensor) -> Mark:
        """When all of ``gradient`` is copied, as it is now; begin again if it has changed."""
        if self._version != version_of(gradient):
            self.begin(gradient)
        self.forget()
        return self.copied

    def forget(self) -> None:
        """Copy the next gradient, even if it is like this one."""
        self._version = None


class RoundedMasters:
    """The masters in the parameters' dtype, after the last update and after the one before it.

    Args:
        bucket: whose.
    """

    def __init__(self, bucket: HostBucket) -> None:
        spec, empty = bucket.spec, bucket.side.memory.empty
        self._bucket = bucket
        self._buffers = [empty(spec.numel, spec.parameter_dtype) for _ in range(2)]
        self.known: torch.Tensor | None = None
        """One of the buffers; None when the masters were written since."""

    def latest(self) -> torch.Tensor:
        """Return the masters of now, rounded; nothing may be under way."""
        if self.known is None:
            self._bucket.uploaded.synchronize()
            self.known = self._buffers[0].copy_(self._bucket.states.tensors[MASTER])
        return self.known

    def spare(self) -> torch.Tensor:
        """The buffer that may be overwritten once it is uploaded."""
        return self._buffers[1] if self.known is self._buffers[0] else self._buffers[0]
