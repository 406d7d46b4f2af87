"""Updates that begin before it is known how, and are taken back where that turns out otherwise.

Lian et al., "SuperOffload: unleashing the power of large-scale LLM training on superchips", 2025,
section 4: the host updates a bucket as soon as its gradient is there, while the global norm, and so
whether to clip or to skip the step, is not known yet. There a wrong guess is undone by the inverse
formula of Adam, with rounding errors; here the values before it are kept, so that the result is
that of no guess at all, bit for bit, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import version_of
from drivetrain_offload.homes.host import HostHome, Update
from drivetrain_offload.host.copies import Lane, Mark
from drivetrain_offload.host.side import HostScale, as_they_are

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, Hyper
    from drivetrain_offload.host.side import HostSide
    from drivetrain_offload.host.worker import Ticket


class SpeculativeHome(HostHome):
    """Masters and states in host memory, updated on a guess of hyper-parameters and scale.

    The guess: the hyper-parameters and the gradient as they are when that is ready, and of the last
    two scales the larger one, since clipping only makes it smaller.

    Args:
        spec: a bucket with masters. Parameters that are their own may be changed until the update.
        side: what all host homes of the job share.
    """

    def __init__(self, spec: BucketSpec, side: HostSide) -> None:
        assert spec.has_masters, f"the parameters of bucket {spec.key} are their own masters"
        super().__init__(spec, side)
        self._live: Hyper | None = None
        self._scales: list[HostScale] = []
        self._guess: Ticket | None = None
        self._guessed: Update | None = None  # run, and neither confirmed nor taken back
        self._before: dict[str, torch.Tensor] = {}

    @staticmethod
    def extra_bytes(spec: BucketSpec, states: int) -> int:
        """Bytes beside masters and states: these once more, and parameters.

        Args:
            spec: the bucket.
            states: bytes of masters and states.
        """
        return states + spec.numel * spec.parameter_dtype.itemsize

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        super().adopt(parameters, originals)
        self._out = self.side.memory.empty(self.spec.numel, self.spec.parameter_dtype)
        self._before = {name: torch.empty_like(value) for name, value in self._kept().items()}

    # -- the way of a step ----------------------------------------------------------------------

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        self._end_guess()
        super().gradient_ready(gradient)
        if self._live is None:
            return
        work = Update(
            gradient,
            as_they_are(self._live),
            max(self._scales, key=lambda scale: float(scale.value())),
            self.step + 1,
            self.side.down.mark(),
        )
        self._guess = self.side.worker.submit(
            partial(self._run_ahead, work), prepare=partial(self._prepare, work)
        )

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self._live = hyper
        if self._brought != version_of(gradient):
            self._end_guess()
            self._take_back()  # here, since the worker has nothing of this bucket any more
        super().update(gradient, hyper, scale)
        self._scales = [*self._scales[-1:], self.side.scale(scale)]

    def flush(self) -> None:
        super().flush()
        self._end_guess()
        self._take_back()  # here, since the worker has nothing of this bucket any more

    # -- on the worker's thread -----------------------------------------------------------------

    def _run_ahead(self, work: Update) -> None:
        self._take_back()
        lane = self._filled(work)
        for name, value in self._kept().items():
            self._before[name].copy_(value)
        self._guessed = work
        try:
            self._run(work, lane)
        except Exception:  # noqa: BLE001 - the update will raise it, if it comes to the same
            self._take_back()
        finally:
            self.side.lanes.release(lane, self)

    def _carry_out(self, work: Update) -> None:
        if self._guessed is None or not _are_alike(self._guessed, work):
            self._take_back()
            lane = self._filled(work)
            try:
                self._run(work, lane)
            finally:
                self.side.lanes.release(lane, self)
        self._guessed = None
        self._uploaded = self.side.up.copy([(self._parameters, self._out)], [work.asked])

    def _take_back(self) -> None:
        if self._guessed is not None:
            for name, value in self._kept().items():
                value.copy_(self._before[name])
        self._guessed = None

    # -- internals ------------------------------------------------------------------------------

    def _kept(self) -> Mapping[str, torch.Tensor]:
        """All that a rule changes, but for parameters, which change when they are uploaded."""
        return {"": self._masters, **self._states}

    def _end_guess(self) -> None:
        guess, self._guess = self._guess, None
        if guess is not None:
            guess.settle()

    def _submit(self, work: Update) -> Ticket:
        return self.side.worker.submit(partial(self._carry_out, work))

    def _is_in_place(self, tensor: torch.Tensor) -> bool:
        return False  # it may be needed again

    def _parameters_in(self, lane: Lane) -> torch.Tensor:
        return self._out  # until the update is confirmed, longer than a lane can wait

    def _waits_for(self, lane: Lane) -> Sequence[Mark]:
        return [lane.drained, self._uploaded]


def _are_alike(guess: Update, work: Update) -> bool:
    return _equal(guess.scale.value(), work.scale.value()) and (
        guess.hyper.keys() == work.hyper.keys()
        and all(_equal(value, work.hyper[key]) for key, value in guess.hyper.items())
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
