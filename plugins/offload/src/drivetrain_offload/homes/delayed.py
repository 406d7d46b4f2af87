"""Updates that the host computes while the device takes the next step (one step stale).

Ren et al., "ZeRO-Offload: democratizing billion-scale model training", 2021, section 5.2: the
parameters after step t are those that the masters had before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import version_of
from drivetrain_offload.homes.host import HostHome, Update
from drivetrain_offload.host.copies import Mark, Reached
from drivetrain_offload.host.side import as_they_are

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, Fragment, Hyper
    from drivetrain_offload.host.side import HostSide


class DelayedHome(HostHome):
    """Masters and states in host memory, a step ahead of the parameters.

    The masters hold all updates once :meth:`flush` returns; what the parameters lack is therefore
    in every checkpoint, and the first step after a resume shows it.

    Args:
        spec: a bucket with masters.
        side: what all host homes of the job share.
    """

    def __init__(self, spec: BucketSpec, side: HostSide) -> None:
        assert spec.has_masters, f"the parameters of bucket {spec.key} are their own masters"
        super().__init__(spec, side)
        self._copied: Mark = Reached()
        self._coming: tuple[int, int] | None = None  # version of the gradient being copied, if any
        self._newest: torch.Tensor | None = None  # the masters, rounded; None when not known
        self._due: torch.Tensor | None = None  # what the next publish shows

    @staticmethod
    def extra_bytes(spec: BucketSpec) -> int:
        """Bytes beside masters and states: a gradient, parameters of this step and of the last."""
        return spec.numel * (spec.gradient_dtype.itemsize + 2 * spec.parameter_dtype.itemsize)

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        super().adopt(parameters, originals)
        spec, empty = self.spec, self.side.memory.empty
        self._gradient = empty(spec.numel, spec.gradient_dtype)
        self._buffers = [empty(spec.numel, spec.parameter_dtype) for _ in range(2)]
        self._newest = self._due = None

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        self._coming = None
        if self._ticket is None or self._ticket.done:  # else its copy is still being read
            self._start_copy(gradient)

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self._finish()
        if self._coming != version_of(gradient):
            self._start_copy(gradient)
        self._coming = None
        self.step += 1
        self._due = self._rounded()
        asked = self.side.down.mark()
        work = Update(self._gradient, as_they_are(hyper), self.side.scale(scale), self.step, asked)
        run = partial(self._compute, work, self._copied, self._uploaded)
        self._ticket = self.side.worker.submit(run)

    def publish(self) -> None:
        due, self._due = self._due, None
        if due is not None:
            asked = self.side.up.mark()
            self._uploaded = self.side.up.copy([(self._parameters, due)], [asked])
        self._copied.wait()  # the gradient's memory is free now
        self._uploaded.wait()

    def refresh(self) -> None:
        super().refresh()
        self._newest = None

    def fragments(self) -> Sequence[Fragment]:
        return [
            replace(f, write=partial(self._write, f.write)) if f.kind == "master" else f
            for f in super().fragments()
        ]

    def _write(self, write: Callable[[torch.Tensor], None], values: torch.Tensor) -> None:
        """Overwrite masters; what was made from them is out of date."""
        self.flush()
        write(values)
        self._newest = None

    def _rounded(self) -> torch.Tensor:
        """The masters in the parameters' dtype; nothing may be under way."""
        if self._newest is None:
            self._uploaded.synchronize()
            self._newest = self._buffers[0].copy_(self._masters)
        return self._newest

    def _start_copy(self, gradient: torch.Tensor) -> None:
        down = self.side.down
        self._copied = down.copy([(self._gradient, gradient)], [down.mark()])
        self._coming = version_of(gradient)

    def _compute(self, work: Update, copied: Mark, uploaded: Mark) -> None:
        """On the worker's thread: the masters' next values, and their rounded copy."""
        copied.synchronize()
        uploaded.synchronize()
        target = self._buffers[1] if self._newest is self._buffers[0] else self._buffers[0]
        self.run_rule(work, work.gradient, self._masters, target)
        self._newest = target
