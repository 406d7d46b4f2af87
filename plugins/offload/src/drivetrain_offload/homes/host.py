"""The home of a bucket whose masters and optimizer states are in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketSpec, StateHome
from drivetrain.states.device_home import MASTER
from drivetrain_offload.homes.bucket import HostBucket
from drivetrain_offload.host.side import HostSide

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment, Hyper
    from drivetrain_offload.homes.timing import Timing


class HostHome(StateHome):
    """Masters and optimizer states in host memory.

    Args:
        spec: the bucket.
        side: what all host homes of the job share.
        timing: makes the :class:`Timing` of the bucket.
    """

    name = "host"

    def __init__(
        self, spec: BucketSpec, side: HostSide, timing: Callable[[HostBucket], Timing]
    ) -> None:
        self.spec = spec
        self.step = 0
        self.side = side
        self.bucket = HostBucket(spec, side)
        self.timing = timing(self.bucket)

    # -- the way of a step ----------------------------------------------------------------------

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self.bucket.parameters = parameters
        self.bucket.states.fill(originals)
        self.timing.adopt()

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        self.timing.gradient_ready(gradient, self.step + 1)

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self.bucket.finish()
        self.step += 1
        self.timing.update(gradient, hyper, scale, self.step)

    def publish(self) -> None:
        self.timing.publish()

    def flush(self) -> None:
        self.timing.flush()

    # -- changes from outside -------------------------------------------------------------------

    def refresh(self) -> None:
        self.flush()
        self.bucket.states.refresh(self.bucket.parameters)
        self.timing.masters_written()

    def fragments(self) -> Sequence[Fragment]:
        self.flush()
        own = [
            replace(f, write=partial(self._write_master, f.write)) if f.kind == MASTER else f
            for f in self.bucket.states.fragments(self.name)
        ]
        return [*own, *self.timing.fragments()]

    def _write_master(self, write: Callable[[torch.Tensor], None], values: torch.Tensor) -> None:
        self.flush()
        write(values)
        self.timing.masters_written()
