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

from drivetrain.states.device_home import FlatStates, bucket_fragment
from drivetrain_offload.homes.delayed import Delayed
from drivetrain_offload.homes.importance import important
from drivetrain_offload.homes.timing import Timing
from drivetrain_offload.host.copies import Mark
from drivetrain_offload.specs import bytes_per_element

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, Fragment, Hyper
    from drivetrain_offload.homes.bucket import HostBucket, Update
    from drivetrain_offload.zenflow_section import ZenFlow

_SLOW, _SELECTED = range(2)


class ByImportance(Timing):
    """The device updates important elements in every step, the worker all others every few steps.

    The host's copies of what the device updates are out of date, until columns are selected again
    or fragments are read: then the device's values are written back.

    Args:
        bucket: one with masters, and a rule that works element by element.
        section: how much is important, and the intervals.
    """

    def __init__(self, bucket: HostBucket, section: ZenFlow) -> None:
        super().__init__(bucket)
        self._section = section
        self._host = Delayed(bucket)
        self._device: ImportantPart | None = None
        self._waits = False

    @staticmethod
    def extra_bytes(spec: BucketSpec) -> int:
        """Bytes beside masters and states: those of delayed updates, a sum, and who is where."""
        return Delayed.extra_bytes(spec) + spec.numel * (4 + 1)

    @staticmethod
    def device_bytes(spec: BucketSpec, section: ZenFlow) -> int:
        """Bytes on the device of index, masters, states and parameters of important columns.

        Without tensors of one dimension, which are small.
        """
        each = torch.int64.itemsize + bytes_per_element(spec) + spec.parameter_dtype.itemsize
        return round(section.topk_ratio * spec.numel) * each

    def adopt(self) -> None:
        numel, device = self.bucket.spec.numel, self.bucket.side.memory.device
        self._host.adopt()
        self._sum = torch.zeros(numel, dtype=torch.float32, device=device)
        self._columns = torch.zeros(numel, dtype=torch.uint8, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._device = None

    # -- the way of a step ----------------------------------------------------------------------

    def gradient_ready(self, gradient: torch.Tensor, step: int) -> None:
        self._host.gradient_ready(gradient, step)

    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        bucket, host, section = self.bucket, self._host, self._section
        copied = host.gradient.complete(gradient)
        work = bucket.asked(host.gradient.values, hyper, scale, step)
        if step <= section.full_warm_up_rounds:
            self._waits = True
            bucket.submit(partial(host.run, work, copied, bucket.uploaded))
            return
        place = (step - section.full_warm_up_rounds - 1) % section.update_interval
        self._select(gradient, step, begins=place == 0).update(gradient, hyper, scale, step)
        ends = place == section.update_interval - 1
        self._waits = ends and not section.overlap_step
        if ends and section.overlap_step:
            host.due = host.rounded.latest()
        bucket.submit(partial(self._add_up, work, copied, bucket.uploaded if ends else None))

    def publish(self) -> None:
        if self._waits:
            self._waits = False
            self.bucket.finish()
            self._host.due = self._host.rounded.known
        shows = self._host.due is not None
        self._host.publish()
        if shows and self._device is not None:
            self._device.show()

    def flush(self) -> None:
        super().flush()
        self._write_back()

    def masters_written(self) -> None:
        self._host.masters_written()
        self._device = None

    def fragments(self) -> Sequence[Fragment]:
        self._device = None  # what is written into fragments has to come back to the device
        kept = {"sum": self._sum, "columns": self._columns, "counts": self._counts}
        return [
            bucket_fragment(self.bucket.spec.key, f"zenflow_{kind}", flat, "host")
            for kind, flat in kept.items()
        ]

    # -- what the device updates ----------------------------------------------------------------

    def _select(self, gradient: torch.Tensor, step: int, *, begins: bool) -> ImportantPart:
        """Have the important elements on the device; select them again where that is due."""
        selected = int(self._counts[_SELECTED])
        if not selected or (begins and step - selected >= self._section.steps_selected):
            self._write_back()
            self._device = None
            share = self._section.topk_ratio
            self._columns.copy_(important(gradient, self.bucket.spec.segments, share))
            self._counts[_SELECTED] = step
        if self._device is None:
            self._device = ImportantPart(self.bucket, self._columns.nonzero().flatten())
        return self._device

    def _write_back(self) -> None:
        """Bring the host's copies of what the device updates up to date."""
        if self._device is None:
            return
        self._device.write_to(self.bucket.states)
        if self._host.rounded.known is not None:
            self.bucket.uploaded.synchronize()
            self._device.write_parameters(self._host.rounded.known)

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
            step=self._section.full_warm_up_rounds + int(self._counts[_SLOW]),
            scale=self.bucket.side.scale(1 / self._section.update_interval),
        )
        # Also what the device updates, which is cheaper than to leave it out, and never used.
        self._host.run(slow, copied, uploaded)
        self._sum.zero_()


class ImportantPart:
    """Masters, states and parameters of a bucket's important elements, on the device.

    Args:
        bucket: whose; its host tensors are copied.
        index: which elements, int64 [count] in host memory.
    """

    def __init__(self, bucket: HostBucket, index: torch.Tensor) -> None:
        spec, device = bucket.spec, bucket.parameters.device
        part = replace(spec, key=f"{spec.key}.important", numel=index.numel(), segments=())
        self._all = bucket.parameters
        self._index = index.to(device)
        self._parameters = self._all.index_select(0, self._index)
        self._states = FlatStates(part, device)
        for kind, flat in bucket.states.tensors.items():
            self._states.tensors[kind] = flat.index_select(0, index).to(device)

    def update(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor, step: int
    ) -> None:
        """Run the rule on these elements of the bucket's ``gradient`` [numel], and show them."""
        mine = gradient.index_select(0, self._index)
        self._states.update(self._parameters, mine, hyper, scale, step)
        self.show()

    def show(self) -> None:
        """Put their values into the bucket's parameters."""
        self._all.index_copy_(0, self._index, self._parameters)

    def write_to(self, states: FlatStates) -> None:
        """Overwrite masters and states of these elements in ``states``, the bucket's."""
        index = self._index.cpu()
        for kind, flat in states.tensors.items():
            flat.index_copy_(0, index, self._states.tensors[kind].cpu())

    def write_parameters(self, flat: torch.Tensor) -> None:
        """Overwrite the parameters of these elements in ``flat`` [numel], host memory."""
        flat.index_copy_(0, self._index.cpu(), self._parameters.cpu())
