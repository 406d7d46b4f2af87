"""When a bucket in host memory is updated, by whom, and when its parameters show that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain_offload.homes.lane_trip import LaneTrip
from drivetrain_offload.host.stall import stalled

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment, Hyper
    from drivetrain_offload.homes.bucket import HostBucket, Update


class Timing(ABC):
    """What :class:`~drivetrain_offload.homes.host.HostHome` asks at each point of a step.

    The defaults are those of updates that end before their step does.

    Args:
        bucket: what is updated.
    """

    def __init__(self, bucket: HostBucket) -> None:
        self.bucket = bucket

    def adopt(self) -> None:  # noqa: B027 - most need no memory of their own
        """Make buffers; the bucket has parameters and states now."""

    def gradient_ready(self, gradient: torch.Tensor, step: int) -> None:  # noqa: B027
        """Begin what can begin before :meth:`update`.

        Args:
            gradient: see :meth:`StateHome.gradient_ready`.
            step: number of the update that it is for.
        """

    @abstractmethod
    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        """Begin, or run, update number ``step``; none of this bucket is under way."""

    def publish(self) -> None:
        """Return once the parameters hold what this step has to show."""
        self.bucket.finish()
        with stalled():
            self.bucket.uploaded.wait()

    def flush(self) -> None:
        """Return once states are those after all updates that were asked for."""
        self.bucket.finish()
        with stalled():
            self.bucket.uploaded.synchronize()

    def masters_written(self) -> None:  # noqa: B027 - most make nothing of them in advance
        """Forget what was made of the masters, which have other values now."""

    def fragments(self) -> Sequence[Fragment]:
        """What is kept beside masters and optimizer states."""
        return ()


class InLine(Timing):
    """The rank's own thread updates, at once: gradient and parameters are in host memory too."""

    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        self.bucket.states.update(self.bucket.parameters, gradient, hyper, scale, step)


class OnWorker(Timing):
    """The rank's worker updates one bucket while the next comes down and the last goes up.

    Parameters that are their own masters stay where they are and come down when the update is
    asked for, so that no change of them is lost.
    """

    def __init__(self, bucket: HostBucket) -> None:
        super().__init__(bucket)
        self._trip = LaneTrip(bucket)

    def gradient_ready(self, gradient: torch.Tensor, step: int) -> None:
        self.bucket.finish()
        self._trip.begin(gradient)

    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        work = self.bucket.asked(gradient, hyper, scale, step)
        self._trip.complete(work)
        self.bucket.submit(partial(self._run, work), partial(self._trip.prepare, work))

    def _run(self, work: Update) -> None:
        bucket = self.bucket
        with self._trip.arrived(work) as lane:
            parameters = self._trip.parameters(lane)
            bucket.run(work, self._trip.gradient(work, lane), parameters)
            if parameters is not bucket.parameters:
                lane.drained = bucket.upload(parameters, [work.asked])
