"""The home that keeps states in the device's memory, and what fragments of buckets look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from drivetrain.contracts.state.bucket import BucketView, Hyper, StateSpec
from drivetrain.contracts.state.fragment import Fragment, interval_boxes, placed_boxes
from drivetrain.contracts.state.home import StateHome
from drivetrain.tensor_parts import copy_into

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import BucketSpec, Segment
    from drivetrain.contracts.state.parameters import Placement


class DeviceHome(StateHome):
    """The default home: states beside the parameters, updated in line on the device."""

    name = "device"

    def __init__(self, spec: BucketSpec, device: torch.device | None = None) -> None:
        self.spec = spec
        self.step = 0
        self._device = device or spec.device
        self._parameters = torch.empty(0)
        self._masters = torch.empty(0)
        self._states: dict[str, torch.Tensor] = {}

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        spec = self.spec
        self._parameters = parameters
        self._masters = (
            originals.to(device=self._device, dtype=spec.master_dtype, copy=True)
            if spec.has_masters
            else parameters
        )
        for state in self._declared():
            self._states[state.name] = torch.full(
                (spec.numel if state.numel is None else state.numel,),
                state.initial,
                dtype=state.dtype or spec.state_dtype,
                device=self._device,
            )

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        spec = self.spec
        assert spec.rule is not None, f"bucket {spec.key} is not trained"
        self.step += 1
        view = BucketView(
            key=spec.key,
            weights=self._masters,
            gradient=gradient,
            states=self._states,
            segments=spec.segments,
            step=self.step,
            out=self._parameters if spec.has_masters else None,
            reduction=spec.reduction,
        )
        spec.rule.apply(view, hyper, scale)

    def refresh(self) -> None:
        if self.spec.has_masters:
            self._masters.copy_(self._parameters)

    def fragments(self) -> Sequence[Fragment]:
        declared, key = self._declared(), self.spec.key
        parts = {s.name: (self._states[s.name], s.initial) for s in declared if s.numel is None}
        if self.spec.has_masters:
            parts["master"] = self._masters, 0.0
        found = [
            segment_fragment(segment, kind, flat, self.name, initial=initial)
            for segment in self.spec.segments
            for kind, (flat, initial) in parts.items()
        ]
        return found + [
            bucket_fragment(key, s.name, self._states[s.name], self.name, initial=s.initial)
            for s in declared
            if s.numel is not None
        ]

    def _declared(self) -> Sequence[StateSpec]:
        return self.spec.rule.states(self.spec) if self.spec.rule is not None else ()


def segment_fragment(
    segment: Segment, kind: str, flat: torch.Tensor, home: str, *, initial: float = 0.0
) -> Fragment:
    """The fragment of one parameter's part of a flat bucket tensor."""
    return tensor_fragment(
        segment.name,
        kind,
        flat.narrow(0, segment.offset, segment.numel),
        owner=segment.owner,
        placement=segment.placement,
        home=home,
        shape=segment.shape,
        start=segment.start,
        initial=initial,
    )


def bucket_fragment(
    key: str, kind: str, flat: torch.Tensor, home: str, *, initial: float = 0.0
) -> Fragment:
    """The fragment of a state that belongs to a bucket of this rank, not to a parameter."""
    return tensor_fragment(
        f"bucket/{key}",
        kind,
        flat,
        owner=True,
        home=home,
        on_reshape="reset",
        initial=initial,
    )


def tensor_fragment(
    name: str,
    kind: str,
    tensor: torch.Tensor,
    *,
    owner: bool,
    placement: Placement | None = None,
    home: str = "device",
    shape: tuple[int, ...] | None = None,
    start: int = 0,
    on_reshape: Literal["redistribute", "reset"] = "redistribute",
    initial: float = 0.0,
) -> Fragment:
    """The fragment of a tensor that is read and written where it lies.

    Args:
        name: the parameter's.
        kind: what the tensor is of it.
        tensor: a part of the parameter in row-major order, or all of it.
        owner: see :class:`Fragment`.
        placement: which part of the client's tensor the parameter is; ``None`` for all of it.
        home: where the tensor lies, for reports.
        shape: of the whole parameter; the tensor's own if ``None``.
        start: index of the tensor's first element in the flattened parameter.
        on_reshape: see :class:`Fragment`.
        initial: see :class:`Fragment`.
    """
    shape = tuple(tensor.shape) if shape is None else shape
    stop = start + tensor.numel()
    if placement is None:
        boxes = tuple(interval_boxes(shape, start, stop))
    else:
        shape, boxes = placement.global_shape, tuple(placed_boxes(placement.boxes, start, stop))

    def write(values: torch.Tensor) -> None:
        copy_into(tensor, values.view_as(tensor))

    return Fragment(
        name=name,
        kind=kind,
        global_shape=shape,
        dtype=tensor.dtype,
        boxes=boxes,
        owner=owner,
        home=home,
        read=lambda: tensor.detach().reshape(-1),
        write=write,
        on_reshape=on_reshape,
        initial=initial,
    )


def step_fragments(home: StateHome, changed: Callable[[], object]) -> list[Fragment]:
    """How many updates each parameter of ``home`` has seen; rules correct their bias by it.

    Args:
        home: keeps the count.
        changed: called when the count is written.
    """

    def write(values: torch.Tensor) -> None:
        home.step = int(values)
        changed()

    return [
        Fragment(
            name=segment.name,
            kind="step",
            global_shape=(),
            dtype=torch.int64,
            boxes=tuple(interval_boxes((), 0, 1)),
            owner=segment.owner and _has_first(segment),
            home="host",
            read=lambda: torch.tensor([home.step]),
            write=write,
        )
        for segment in home.spec.segments
    ]


def _has_first(segment: Segment) -> bool:
    """Whether the first element of the client's tensor is in the segment: on one rank of all."""
    if segment.placement is None:
        starts = [0]
    else:
        boxes = segment.placement.boxes
        starts = [box.local_offset for box in boxes if not any(box.global_offset)]
    return any(0 <= start - segment.start < max(segment.numel, 1) for start in starts)
