"""Updates that begin on a guess of clipping and overflow, and are taken back if it was wrong.

Lian et al., "SuperOffload: unleashing the power of large-scale LLM training on superchips", 2025,
section 4: the host updates a bucket as soon as its gradient is there, while the global norm, and so
whether to clip or to skip the step, is not known yet. There a wrong guess is undone by the inverse
formula of Adam, with rounding errors; here the values before it are kept, so that the result is
that of no guess at all, bit for bit, whatever the rule.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_offload.homes.bucket import Update
from drivetrain_offload.homes.lane_trip import LaneTrip
from drivetrain_offload.homes.timing import Timing
from drivetrain_offload.host.copies import Lane
from drivetrain_offload.host.side import HostScale, as_they_are

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, Hyper
    from drivetrain_offload.homes.bucket import HostBucket
    from drivetrain_offload.host.worker import Ticket


class Speculative(Timing):
    """The worker updates on a guess of hyper-parameters and scale, and again if that was wrong.

    The guess: the hyper-parameters and the gradient as they are when that is ready, and of the last
    two scales the larger one, since clipping only makes it smaller.

    Args:
        bucket: one with masters. Parameters that are their own may be changed until the update.
    """

    def __init__(self, bucket: HostBucket) -> None:
        spec = bucket.spec
        assert spec.has_masters, f"the parameters of bucket {spec.key} are their own masters"
        super().__init__(bucket)
        self._trip = LaneTrip(bucket, gradient_stays=True)
        self._live: Hyper | None = None
        self._scales: list[HostScale] = []
        self._guess: Ticket | None = None
        self._guessed: Update | None = None  # run, and neither confirmed nor taken back

    @staticmethod
    def extra_bytes(spec: BucketSpec, states: int) -> int:
        """Bytes beside masters and states: these once more, and parameters.

        Args:
            spec: the bucket.
            states: bytes of masters and states.
        """
        return states + spec.numel * spec.parameter_dtype.itemsize

    def adopt(self) -> None:
        spec, tensors = self.bucket.spec, self.bucket.states.tensors
        # New parameters wait here until they are confirmed, longer than a lane can wait.
        self._out = self.bucket.side.memory.empty(spec.numel, spec.parameter_dtype)
        self._before = {kind: torch.empty_like(values) for kind, values in tensors.items()}

    # -- the way of a step ----------------------------------------------------------------------

    def gradient_ready(self, gradient: torch.Tensor, step: int) -> None:
        self._end_guess()
        self.bucket.finish()
        self._trip.begin(gradient)
        if self._live is None:
            return
        side = self.bucket.side
        scale = max(self._scales, key=lambda scale: float(scale.value()))
        work = Update(gradient, as_they_are(self._live), scale, step, side.down.mark())
        self._guess = side.worker.submit(
            partial(self._run_ahead, work), partial(self._trip.prepare, work)
        )

    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        self._live = hyper
        if not self._trip.has(gradient):
            self._end_guess()
            self._take_back()  # here, since the worker has nothing of this bucket any more
        work = self.bucket.asked(gradient, hyper, scale, step)
        self._trip.complete(work)
        self.bucket.submit(partial(self._confirm, work))
        self._scales = [*self._scales[-1:], work.scale]

    def flush(self) -> None:
        super().flush()
        self._end_guess()
        self._take_back()  # here, since the worker has nothing of this bucket any more

    # -- on the worker's thread -----------------------------------------------------------------

    def _run_ahead(self, work: Update) -> None:
        self._take_back()
        with self._trip.arrived(work) as lane:
            for kind, values in self.bucket.states.tensors.items():
                self._before[kind].copy_(values)
            self._guessed = work
            try:
                self._run(work, lane)
            except Exception:  # noqa: BLE001 - the update will raise it, if it comes to the same
                self._take_back()

    def _confirm(self, work: Update) -> None:
        if self._guessed is None or not _are_alike(self._guessed, work):
            self._take_back()
            with self._trip.arrived(work) as lane:
                self._run(work, lane)
        self._guessed = None
        self.bucket.upload(self._out, [work.asked])

    def _run(self, work: Update, lane: Lane) -> None:
        self.bucket.uploaded.synchronize()  # of what is there
        self.bucket.run(work, self._trip.gradient(work, lane), self._out)

    def _take_back(self) -> None:
        """Undo a guess that was run. Parameters only change when they are uploaded."""
        if self._guessed is not None:
            for kind, values in self.bucket.states.tensors.items():
                values.copy_(self._before[kind])
        self._guessed = None

    def _end_guess(self) -> None:
        guess, self._guess = self._guess, None
        if guess is not None:
            guess.settle()


def _are_alike(guess: Update, work: Update) -> bool:
    return _equal(guess.scale.value(), work.scale.value()) and (
        guess.hyper.keys() == work.hyper.keys()
        and all(_equal(value, work.hyper[key]) for key, value in guess.hyper.items())
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
