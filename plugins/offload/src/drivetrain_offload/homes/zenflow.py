"""Updates split by importance: a few columns at once on the device, the rest later on the host.

Lan et al., "ZenFlow: enabling stall-free offloading training via asynchronous updates", 2025,
arXiv:2505.12242: the columns that carry most of the gradient are updated by the device in every
step. What the others get is added up in host memory and applied every few steps, while the device
goes on. Here columns that change sides take masters and optimizer states along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketView, version_of
from drivetrain.states.device_home import bucket_fragment
from drivetrain_offload.homes.delayed import DelayedHome
from drivetrain_offload.homes.host import Update
from drivetrain_offload.homes.importance import important
from drivetrain_offload.host.copies import Mark
from drivetrain_offload.host.side import as_they_are

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, Fragment, Hyper
    from drivetrain_offload.host.side import HostSide
    from drivetrain_offload.zenflow_section import ZenFlow

_SLOW, _SELECTED = range(2)


class ZenFlowHome(DelayedHome):
    """All masters and states in host memory; those of important elements also on the device.

    The host's copies of what the device updates are out of date, until columns are selected anew
    or someone looks: then the device's values are written back.

    Args:
        spec: a bucket with masters, and a rule that works element by element.
        side: what all host homes of the job share.
        section: how much is important, and the intervals.
    """

    def __init__(self, spec: BucketSpec, side: HostSide, section: ZenFlow) -> None:
        super().__init__(spec, side)
        self._section = section
        self._warm_up = section.full_warm_up_rounds
        self._device_states: dict[str, torch.Tensor] = {}
        self._index = torch.empty(0, dtype=torch.int64)
        self._is_split = False
        self._waits = False

    @staticmethod
    def extra_bytes(spec: BucketSpec) -> int:
        """Bytes beside masters and states: those of delayed updates, a sum, and who is where."""
        return DelayedHome.extra_bytes(spec) + spec.numel * (4 + 1)

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        super().adopt(parameters, originals)
        numel = self.spec.numel
        self._sum = torch.zeros(numel, dtype=torch.float32, device="cpu")
        self._columns = torch.zeros(numel, dtype=torch.uint8, device="cpu")
        self._counts = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._is_split = False

    # -- the way of a step ----------------------------------------------------------------------

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self._finish()
        if self._coming != version_of(gradient):
            self._start_copy(gradient)
        self._coming = None
        self.step += 1
        asked = self.side.down.mark()
        work = Update(self._gradient, as_they_are(hyper), self.side.scale(scale), self.step, asked)
        if self.step <= self._warm_up:
            self._waits = True
            run = partial(self._compute, work, self._copied, self._uploaded)
            self._ticket = self.side.worker.submit(run)
            return
        interval = self._section.update_interval
        place = (self.step - self._warm_up - 1) % interval
        self._split(gradient, begins=place == 0)
        self._update_important(gradient, hyper, scale)
        ends = place == interval - 1
        self._waits = ends and not self._section.overlap_step
        if ends and self._section.overlap_step:
            self._due = self._rounded()
        run = partial(self._add_up, work, self._copied, self._uploaded if ends else None)
        self._ticket = self.side.worker.submit(run)

    def publish(self) -> None:
        if self._waits:
            self._waits = False
            self._finish()
            self._due = self._newest
        shows = self._due is not None
        super().publish()
        if shows and self._is_split:
            self._parameters.index_copy_(0, self._index, self._important_out)

    def flush(self) -> None:
        super().flush()
        self._write_back()

    def refresh(self) -> None:
        super().refresh()
        self._is_split = False

    def fragments(self) -> Sequence[Fragment]:
        found = [*super().fragments()]
        self._is_split = False  # what is written into fragments has to come back to the device
        kept = {"sum": self._sum, "columns": self._columns, "counts": self._counts}
        return found + [
            bucket_fragment(self.spec.key, f"zenflow_{kind}", flat, self.name)
            for kind, flat in kept.items()
        ]

    # -- what the device updates ----------------------------------------------------------------

    def _split(self, gradient: torch.Tensor, *, begins: bool) -> None:
        """Have the important elements on the device; select them anew where that is due."""
        selected = int(self._counts[_SELECTED])
        due = not selected or (begins and self.step - selected >= self._section.steps_selected)
        if due:
            self._write_back()
            share = self._section.topk_ratio
            self._columns.copy_(important(gradient, self.spec.segments, share))
            self._counts[_SELECTED] = self.step
        if due or not self._is_split:
            device = self._parameters.device
            index = self._columns.nonzero().flatten()
            self._index = index.to(device)
            self._device_states = {
                name: flat.index_select(0, index).to(device) for name, flat in self._kept().items()
            }
            self._important_out = self._parameters.index_select(0, self._index)
            self._is_split = True

    def _update_important(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor
    ) -> None:
        spec = self.spec
        assert spec.rule is not None, f"bucket {spec.key} is not trained"
        states = dict(self._device_states)
        view = BucketView(
            key=f"{spec.key}.important",
            weights=states.pop("master"),
            gradient=gradient.index_select(0, self._index),
            states=states,
            segments=(),
            step=self.step,
            out=self._important_out,
            reduction=spec.reduction,
        )
        spec.rule.apply(view, hyper, scale)
        self._parameters.index_copy_(0, self._index, self._important_out)

    def _write_back(self) -> None:
        """Bring the host's copies of what the device updates up to date."""
        if not self._is_split:
            return
        index = self._index.cpu()
        for name, flat in self._kept().items():
            flat.index_copy_(0, index, self._device_states[name].cpu())
        if self._newest is not None:
            self._uploaded.synchronize()
            self._newest.index_copy_(0, index, self._important_out.cpu())

    def _kept(self) -> dict[str, torch.Tensor]:
        return {"master": self._masters, **self._states}

    # -- on the worker's thread -----------------------------------------------------------------

    def _add_up(self, work: Update, copied: Mark, uploaded: Mark | None) -> None:
        """Add a step's gradient to those before; at the end of an interval, update."""
        copied.synchronize()
        scale = float(work.scale.value())
        if scale:  # gradients that are not finite get 0, which does not make zeros of them
            self._sum.add_(work.gradient, alpha=scale)
        if uploaded is None:
            return
        self._counts[_SLOW] += 1
        slow = replace(
            work,
            gradient=self._sum,
            step=self._warm_up + int(self._counts[_SLOW]),
            scale=self.side.scale(1 / self._section.update_interval),
        )
        # Also what the device updates, which is cheaper than to leave it out, and never used.
        self._compute(slow, copied, uploaded)
        self._sum.zero_()
