"""States in host memory, updated there while the device goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import BucketSpec, BucketView, version_of
from drivetrain.states.device_home import DeviceHome
from drivetrain_offload.host.copies import Lane, Mark, Reached
from drivetrain_offload.host.side import HostScale, HostSide, as_they_are

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment, Hyper
    from drivetrain_offload.host.worker import Ticket

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Update:
    """What an update was asked to do.

    Args:
        gradient: where the model states keep it; stays until it is published.
        hyper: as they were when it was asked.
        scale: likewise.
        step: its number, from 1.
        asked: where the rank's stream was then.
    """

    gradient: torch.Tensor
    hyper: Mapping[str, Any]
    scale: HostScale
    step: int
    asked: Mark


class HostHome(DeviceHome):
    """Masters and optimizer states in host memory.

    Where gradient and parameters are in host memory too, the update is the device home's, in line.
    Elsewhere it runs on the rank's :class:`~drivetrain_offload.host.worker.Worker`: the gradient
    comes down into a lane, the rule writes low-precision parameters beside it, and these go up
    while the next bucket is updated. Parameters that are their own masters stay where they are and
    come down when the update is asked for, so that no change of them is lost.

    Args:
        spec: the bucket.
        side: what all host homes of the job share.
    """

    name = "host"

    def __init__(self, spec: BucketSpec, side: HostSide) -> None:
        super().__init__(spec, HOST)
        self.side = side
        self._lane: Lane | None = None
        self._ticket: Ticket | None = None
        self._uploaded: Mark = Reached()
        self._brought: tuple[int, int] | None = None  # the version of the gradient in the lane

    # -- the way of a step ----------------------------------------------------------------------

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        if self._is_in_line(gradient):
            return
        self._finish()
        # What has come down before is out of date, or of a step that was dropped.
        self.side.lanes.release(self._lane, self)
        self._brought = version_of(gradient)
        self._lane = self._claim(partial(self._fill_gradient, gradient, self.side.down.mark()))

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        if self._is_in_line(gradient):
            super().update(gradient, hyper, scale)
            return
        self._finish()
        self.step += 1
        side = self.side
        asked = side.down.mark()
        if self._brought != version_of(gradient):
            side.lanes.release(self._lane, self)
        elif not self.spec.has_masters:
            side.lanes.add(self._lane, self, partial(self._fill_parameters, asked))
        work = Update(gradient, as_they_are(hyper), side.scale(scale), self.step, asked)
        self._ticket = self._submit(work)

    def publish(self) -> None:
        self._finish()
        self._uploaded.wait()

    def flush(self) -> None:
        self._finish()
        self._uploaded.synchronize()

    # -- changes from outside -------------------------------------------------------------------

    def refresh(self) -> None:
        self.flush()
        super().refresh()

    def fragments(self) -> Sequence[Fragment]:
        self.flush()
        return super().fragments()

    # -- on the worker's thread -----------------------------------------------------------------

    def _prepare(self, work: Update) -> None:
        """Bring down what the update needs while the bucket before is updated."""
        if not self.side.lanes.holds(self._lane, self):
            self._lane = self._claim(partial(self._fill, work))

    def _carry_out(self, work: Update) -> None:
        lane = self._filled(work)
        try:
            self._run(work, lane)
            source = self._parameters_in(lane)
            if source is not self._parameters:
                pairs = [(self._parameters, source)]
                lane.drained = self._uploaded = self.side.up.copy(pairs, [work.asked])
        finally:
            self.side.lanes.release(lane, self)

    def _filled(self, work: Update) -> Lane:
        """A lane with all that the update needs."""
        if not self.side.lanes.holds(self._lane, self):
            self._lane = self._claim(partial(self._fill, work), steal=True)
        assert self._lane is not None, "a lane can be stolen"
        self._lane.filled.synchronize()
        return self._lane

    def _run(self, work: Update, lane: Lane) -> None:
        """Leave the new parameters where :meth:`_parameters_in` says."""
        stays = self._is_in_place(work.gradient)
        gradient = work.gradient if stays else self._gradient_in(lane)
        parameters = self._parameters_in(lane)
        if self.spec.has_masters:
            self.run_rule(work, gradient, self._masters, parameters)
        else:
            self.run_rule(work, gradient, parameters, None)

    def run_rule(
        self,
        work: Update,
        gradient: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        """Update host tensors.

        Args:
            work: hyper-parameters, scale and step.
            gradient: flat [numel], overwritten or not.
            weights: masters, or parameters that are their own [numel].
            out: takes the new parameters [numel] where they have masters.
        """
        spec = self.spec
        assert spec.rule is not None, f"bucket {spec.key} is not trained"
        view = BucketView(
            key=spec.key,
            weights=weights,
            gradient=gradient,
            states=self._states,
            segments=spec.segments,
            step=work.step,
            out=out,
            reduction=spec.reduction,
        )
        spec.rule.apply(view, work.hyper, work.scale.value())

    # -- internals ------------------------------------------------------------------------------

    def _is_in_place(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is worked on where it is."""
        return tensor.device.type == "cpu"

    def _is_in_line(self, gradient: torch.Tensor) -> bool:
        return self._is_in_place(gradient) and self._is_in_place(self._parameters)

    def _submit(self, work: Update) -> Ticket:
        return self.side.worker.submit(
            partial(self._carry_out, work), prepare=partial(self._prepare, work)
        )

    def _claim(self, fill: Callable[[Lane], Mark], *, steal: bool = False) -> Lane | None:
        return self.side.lanes.claim(self, fill, steal=steal)

    def _fill(self, work: Update, lane: Lane) -> Mark:
        """Begin to bring down what the update needs."""
        self._fill_gradient(work.gradient, work.asked, lane)
        return self._fill_parameters(work.asked, lane)

    def _fill_gradient(self, gradient: torch.Tensor, ready: Mark, lane: Lane) -> Mark:
        pairs = [] if self._is_in_place(gradient) else [(self._gradient_in(lane), gradient)]
        return self.side.down.copy(pairs, [ready, *self._waits_for(lane)])

    def _fill_parameters(self, ready: Mark, lane: Lane) -> Mark:
        needs = not self.spec.has_masters and not self._is_in_place(self._parameters)
        pairs = [(self._parameters_in(lane), self._parameters)] if needs else []
        return self.side.down.copy(pairs, [ready])

    def _waits_for(self, lane: Lane) -> Sequence[Mark]:
        """When what is in the lane may be overwritten."""
        return [lane.drained]

    def _gradient_in(self, lane: Lane) -> torch.Tensor:
        return _part(lane.gradient, self.spec.numel, self.spec.gradient_dtype)

    def _parameters_in(self, lane: Lane) -> torch.Tensor:
        """Where the rule leaves new parameters: the lane, or their own place if that is here."""
        if self._is_in_place(self._parameters):
            return self._parameters
        return _part(lane.parameters, self.spec.numel, self.spec.parameter_dtype)

    def _finish(self) -> None:
        """Wait for the update under way; its error is raised once."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.wait()


def _part(flat: torch.Tensor, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return flat.narrow(0, 0, numel * dtype.itemsize).view(dtype)
