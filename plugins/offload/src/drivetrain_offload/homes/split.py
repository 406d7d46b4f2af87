"""A bucket of which the device keeps a part and another home the rest (twin flow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketSpec, StateHome
from drivetrain.states.device_home import DeviceHome

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment, Hyper


_ALIGNMENT = 64


class SplitHome(StateHome):
    """The first elements of a bucket in one home, the rest in another; both update at once.

    Args:
        spec: the whole bucket.
        first: home of the first ``first.spec.numel`` elements.
        rest: home of all others; updates while ``first`` does, if it returns before it is done.
    """

    def __init__(self, spec: BucketSpec, first: DeviceHome, rest: StateHome) -> None:
        assert first.spec.numel + rest.spec.numel == spec.numel
        self.spec = spec
        self.first = first
        self.rest = rest
        self._cut = first.spec.numel
        self.step = 0

    @property
    def step(self) -> int:
        """Number of updates applied so far, to both parts."""
        return self.rest.step

    @step.setter
    def step(self, value: int) -> None:
        self.first.step = self.rest.step = value

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self.first.adopt(parameters[: self._cut], originals[: self._cut])
        self.rest.adopt(parameters[self._cut :], originals[self._cut :])

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        self.rest.gradient_ready(gradient[self._cut :])

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self.rest.update(gradient[self._cut :], hyper, scale)
        self.first.update(gradient[: self._cut], hyper, scale)

    def publish(self) -> None:
        self.first.publish()
        self.rest.publish()

    def refresh(self) -> None:
        self.first.refresh()
        self.rest.refresh()

    def flush(self) -> None:
        self.first.flush()
        self.rest.flush()

    def fragments(self) -> Sequence[Fragment]:
        """One for each state of each parameter, as of a bucket that is not split."""
        if self.spec.device.type == "meta":  # only counted, and each part where it would be
            return [*self.first.fragments(), *self.rest.fragments()]
        found = {(fragment.name, fragment.kind): fragment for fragment in self.first.fragments()}
        sizes = {segment.name: segment.numel for segment in self.first.spec.segments}
        for fragment in self.rest.fragments():
            key = (fragment.name, fragment.kind)
            found[key] = (
                _joined(found[key], fragment, sizes[fragment.name]) if key in found else fragment
            )
        return list(found.values())


def _joined(first: Fragment, rest: Fragment, size: int) -> Fragment:
    """The fragment of a tensor whose first ``size`` elements are elsewhere than the rest."""

    def read() -> torch.Tensor:
        return torch.cat([first.read().cpu(), rest.read().cpu()])

    def write(values: torch.Tensor) -> None:
        flat = values.reshape(-1)
        first.write(flat[:size])
        rest.write(flat[size:])

    behind = (replace(box, local_offset=box.local_offset + size) for box in rest.boxes)
    return replace(rest, boxes=(*first.boxes, *behind), read=read, write=write)


def cuts(specs: Sequence[BucketSpec], ratio: float) -> list[int]:
    """How many elements of each bucket stay on the device, the first ``1 - ratio`` of all.

    At most one bucket is cut: at a multiple of 64 elements if its rule works element by element,
    so that vectors of the kernels fall as in the whole, else at the border of a tensor.

    Args:
        specs: all buckets; those without rule count for nothing.
        ratio: share that is offloaded.
    """
    trained = sum(spec.numel for spec in specs if spec.rule is not None)
    room = trained - round(ratio * trained)
    found = []
    for spec in specs:
        kept = min(room, spec.numel) if spec.rule is not None else 0
        room -= kept
        found.append(_at_border(spec, kept))
    return found


def part_of(spec: BucketSpec, start: int, stop: int) -> BucketSpec:
    """Elements [start, stop) of a bucket as a bucket of their own."""
    if (start, stop) == (0, spec.numel):
        return spec
    segments = []
    for segment in spec.segments:
        low, high = max(segment.offset, start), min(segment.offset + segment.numel, stop)
        if low < high:
            first = segment.start + low - segment.offset
            segments.append(replace(segment, start=first, numel=high - low, offset=low - start))
    return replace(spec, key=f"{spec.key}.{start}", numel=stop - start, segments=tuple(segments))


def _at_border(spec: BucketSpec, kept: int) -> int:
    if spec.rule is None or kept == spec.numel:
        return kept
    if spec.rule.grain == "element":
        return kept // _ALIGNMENT * _ALIGNMENT
    ends = (segment.offset + segment.numel for segment in spec.segments)
    return max((end for end in ends if end <= kept), default=0)
