"""A bucket whose states are in host memory: that memory, and the update under way in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts import BucketSpec
from drivetrain.states.device_home import FlatStates
from drivetrain_offload.host.copies import Mark, Reached
from drivetrain_offload.host.side import HostScale, HostSide, as_they_are

if TYPE_CHECKING:
    from drivetrain.contracts import Hyper
    from drivetrain_offload.host.worker import Ticket


@dataclass(frozen=True)
class Update:
    """What an update was asked to do.

    Args:
        gradient: where the model states keep it; stays until it is published.
        hyper: hyper-parameters as they were when it was asked.
        scale: the scale of the gradient at that time.
        step: its number, from 1.
        asked: how far the rank's stream was at that time.
    """

    gradient: torch.Tensor
    hyper: Mapping[str, Any]
    scale: HostScale
    step: int
    asked: Mark


class HostBucket:
    """The states of one bucket in host memory, and its parameters wherever they are.

    Args:
        spec: the bucket.
        side: what all buckets in host memory of the job share.

    Attributes:
        states: masters and optimizer states.
        parameters: flat [numel], the memory that the module computes with.
        uploaded: when the latest new parameters are there.
    """

    def __init__(self, spec: BucketSpec, side: HostSide) -> None:
        self.spec = spec
        self.side = side
        self.states = FlatStates(spec, side.memory.device)
        self.parameters = torch.empty(0)
        self.uploaded: Mark = Reached()
        self._ticket: Ticket | None = None

    def asked(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> Update:
        """An update as it is asked for now, whatever becomes of hyper-parameters and scale."""
        side = self.side
        return Update(gradient, as_they_are(hyper), side.scale(scale), step, side.down.mark())

    def submit(self, run: Callable[[], None], prepare: Callable[[], None] | None = None) -> None:
        """Have the rank's worker run the next update of this bucket."""
        self._ticket = self.side.worker.submit(run, prepare)

    @property
    def is_busy(self) -> bool:
        """Whether the worker has not ended the update yet."""
        return self._ticket is not None and not self._ticket.done

    def finish(self) -> None:
        """Return once the update under way has ended; its error is raised once."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.wait()

    def run(self, work: Update, gradient: torch.Tensor, parameters: torch.Tensor) -> None:
        """Run the rule on host tensors [numel]; see :meth:`FlatStates.update`."""
        self.states.update(parameters, gradient, work.hyper, work.scale.value(), work.step)

    def upload(self, source: torch.Tensor, after: Sequence[Mark]) -> Mark:
        """Begin to copy ``source`` [numel] to the parameters."""
        self.uploaded = self.side.up.copy([(self.parameters, source)], after)
        return self.uploaded
