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


MASTER = "master"


class FlatStates:
    """Masters and optimizer states of one bucket: flat tensors, all in one memory.

    Args:
        spec: the bucket.
        device: whose memory.

    Attributes:
        tensors: kind, as fragments name it, -> flat tensor; ``"master"`` where there are masters.
    """

    def __init__(self, spec: BucketSpec, device: torch.device) -> None:
        self.spec = spec
        self.tensors: dict[str, torch.Tensor] = {}
        self._device = device

    def fill(self, originals: torch.Tensor) -> None:
        """Make masters of ``originals`` [numel], and fresh states."""
        spec = self.spec
        for state in self._declared():
            self.tensors[state.name] = torch.full(
                (spec.numel if state.numel is None else state.numel,),
                state.initial,
                dtype=state.dtype or spec.state_dtype,
                device=self._device,
            )
        if spec.has_masters:
            self.tensors[MASTER] = originals.to(
                device=self._device, dtype=spec.master_dtype, copy=True
            )

    def update(
        self,
        parameters: torch.Tensor,
        gradient: torch.Tensor,
        hyper: Hyper,
        scale: float | torch.Tensor,
        step: int,
    ) -> None:
        """Run the rule on ``gradient * scale``; ``gradient`` may be overwritten.

        Args:
            parameters: takes the new values [numel]; where they are their own masters it has the
                ones of before.
            gradient: reduced, [numel].
            hyper: see :class:`BucketView`.
            scale: a number, or a 0-d tensor in the same memory.
            step: number of this update, from 1.
        """
        assert self.spec.rule is not None, f"bucket {self.spec.key} is not trained"
        self.spec.rule.apply(self._view(parameters, gradient, step), hyper, scale)

    def settle(self, parameters: torch.Tensor, hyper: Hyper, step: int) -> None:
        """See :meth:`StateHome.settle`; arguments as for :meth:`update`."""
        assert self.spec.rule is not None, f"bucket {self.spec.key} is not trained"
        self.spec.rule.settle(self._view(parameters, parameters[:0], step), hyper)

    def _view(self, parameters: torch.Tensor, gradient: torch.Tensor, step: int) -> BucketView:
        spec, states = self.spec, dict(self.tensors)
        return BucketView(
            key=spec.key,
            weights=states.pop(MASTER, parameters),
            gradient=gradient,
            states=states,
            segments=spec.segments,
            step=step,
            out=parameters if spec.has_masters else None,
            reduction=spec.reduction,
        )

    def refresh(self, parameters: torch.Tensor) -> None:
        """Make the masters from the parameters again."""
        if self.spec.has_masters:
            self.tensors[MASTER].copy_(parameters)

    def fragments(self, home: str) -> list[Fragment]:
        """See :meth:`StateHome.fragments`; ``home`` is what they call the memory."""
        declared = {state.name: state for state in self._declared()}
        initial = {name: state.initial for name, state in declared.items()}
        of_bucket = [name for name, state in declared.items() if state.numel is not None]
        found = [
            segment_fragment(segment, kind, flat, home, initial=initial.get(kind, 0.0))
            for segment in self.spec.segments
            for kind, flat in self.tensors.items()
            if kind not in of_bucket
        ]
        key, tensors = self.spec.key, self.tensors
        return found + [
            bucket_fragment(key, name, tensors[name], home, initial=initial[name])
            for name in of_bucket
        ]

    def _declared(self) -> Sequence[StateSpec]:
        return self.spec.rule.states(self.spec) if self.spec.rule is not None else ()


class DeviceHome(StateHome):
    """The default home: states beside the parameters, updated in line on the device."""

    name = "device"

    def __init__(self, spec: BucketSpec) -> None:
        self.spec = spec
        self.step = 0
        self.states = FlatStates(spec, spec.device)
        self._parameters = torch.empty(0)

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        self._parameters = parameters
        self.states.fill(originals)

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self.step += 1
        self.states.update(self._parameters, gradient, hyper, scale, self.step)

    def settle(self, hyper: Hyper) -> None:
        self.states.settle(self._parameters, hyper, self.step)

    def refresh(self) -> None:
        self.states.refresh(self._parameters)

    def fragments(self) -> Sequence[Fragment]:
        return self.states.fragments(self.name)


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
