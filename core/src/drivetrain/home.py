"""Where a bucket's master weights and optimizer states live, and who runs its update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from drivetrain.fragment import Fragment, interval_boxes, placed_boxes
from drivetrain.tensor_parts import copy_into
from drivetrain.update_rule import BucketView, Hyper, StateSpec, UpdateRule

if TYPE_CHECKING:
    from drivetrain.mesh import Axis
    from drivetrain.parameters import Placement


@dataclass(frozen=True)
class Segment:
    """The part of one parameter that lies in a bucket.

    Args:
        name: the client's stable parameter name.
        shape: shape of the whole parameter (as this rank's module has it).
        start: index of the first element held, in the row-major flattened parameter.
        numel: number of elements held.
        offset: where they begin in the bucket.
        owner: whether this rank's copy counts in norms and checkpoints.
        placement: which part of the client's tensor the parameter is; ``None`` for all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int
    owner: bool = True
    placement: Placement | None = None

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This segment's slice of a flat bucket tensor; shaped when the parameter is whole."""
        part = flat.narrow(0, self.offset, self.numel)
        whole = self.start == 0 and self.numel == torch.Size(self.shape).numel()
        return part.view(self.shape) if whole else part


@dataclass(frozen=True)
class BucketSpec:
    """Everything that decides where a bucket's states go; one dtype, reduction, rule and group.

    Args:
        key: stable across runs of one configuration; names error feedback, files and logs.
        numel: flat length, including padding after the last segment.
        segments: what lies where.
        parameter_dtype: dtype of the parameters in forward and backward.
        gradient_dtype: dtype of the gradients handed to :meth:`StateHome.update`.
        master_dtype: dtype of the master weights; equal to ``parameter_dtype`` when the
            parameters are their own masters.
        state_dtype: dtype of optimizer states that ask for none of their own.
        reduction: axes that gradients are summed over.
        rule: the update rule, or ``None`` for parameters that are not trained.
        group: index of the hyper-parameter group.
        device: the device that parameters and gradients are on.
        released: whether the parameters are needed now and then only, so that a home may keep them
            meanwhile (:class:`ParameterHome`).
    """

    key: str
    numel: int
    segments: tuple[Segment, ...]
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    master_dtype: torch.dtype
    state_dtype: torch.dtype
    reduction: Axis
    rule: UpdateRule | None
    group: int
    device: torch.device
    released: bool = False

    @property
    def has_masters(self) -> bool:
        """Whether master weights are kept beside the parameters."""
        return self.master_dtype != self.parameter_dtype


def version_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what changes whenever a client writes to ``tensor`` or a view of it.

    Nothing is read from the device. Kernels and collectives that write to raw memory do not count.
    """
    return tensor.data_ptr(), tensor._version


class StateHome(ABC):
    """Keeps the states of one bucket and updates it. Model states only say *when*.

    The way of a step, on every rank: ``gradient_ready`` (the reduced gradient is final; the home
    may start moving it) -> ``update`` (may return before the work is done) -> ``publish`` (returns
    once the parameters hold their new values). A home of delayed updates publishes an earlier one.

    Clients may change gradients and parameters until ``update``: it uses them as they are then. A
    home that copies the gradient earlier compares :func:`version_of` it, and copies it again where
    that has changed. Parameters may change without a trace (through ``.data``), so no home reads
    them before ``update``.
    """

    spec: BucketSpec
    step: int
    """Number of updates applied so far."""

    @abstractmethod
    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        """Take over a bucket.

        Args:
            parameters: flat parameters [numel] in ``parameter_dtype``, the memory that the module
                computes with; the home writes new values there.
            originals: the values [numel] that the client gave, before any cast; masters are made
                from these.
        """

    def gradient_ready(self, gradient: torch.Tensor) -> None:  # noqa: B027 - may be ignored
        """The reduced gradient [numel] of this step is there, and stays until :meth:`publish`.

        Called again when something is added to it late, but not when a client changes it.
        """

    @abstractmethod
    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        """Run the rule on ``gradient * scale``; ``gradient`` may be overwritten.

        Rules are run with :meth:`UpdateRule.apply`, so that a scale of 0 makes zeros of anything.
        """

    def publish(self) -> None:  # noqa: B027 - for homes that update in line
        """Return once the adopted parameters hold their updated values."""

    @abstractmethod
    def refresh(self) -> None:
        """Make masters anew from the parameters, which someone changed (a load, a client)."""

    def flush(self) -> None:  # noqa: B027 - for homes that update in line
        """Finish whatever is under way, so that fragments show a consistent state."""

    @abstractmethod
    def fragments(self) -> Sequence[Fragment]:
        """Master (when kept) and optimizer states of every segment, read and written lazily."""


Place = tuple[torch.Tensor, Callable[[], None], Callable[[], None]]
"""A flat tensor, which stays; what gives its memory back; what takes some again, to be written."""


class ParameterHome(StateHome):
    """A home that keeps a bucket's parameters too; they are on the device while they are used.

    Only buckets whose spec says ``released`` may get one. What is adopted is copied, and its
    memory may be used for something else afterwards.
    """

    def place(self, numel: int) -> Place | None:
        """Memory [numel] on the device that parameters are best fetched to, if that matters."""
        return None

    @abstractmethod
    def fetch(self, into: torch.Tensor) -> None:
        """Begin to copy the parameters [numel], as last published, to memory on the device."""

    @abstractmethod
    def fetched(self) -> None:
        """Return once work queued from now on finds the parameters where they were fetched to."""

    @abstractmethod
    def keep(self, parameters: torch.Tensor) -> None:
        """Take new values [numel] of the parameters, not of masters."""


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


def write_master(home: StateHome, segment: Segment, parameter: torch.Tensor) -> None:
    """Overwrite the master of ``segment``, if there is one, with values of the whole parameter."""
    values = parameter.detach().reshape(-1).narrow(0, segment.start, segment.numel)
    for fragment in home.fragments() if home.spec.has_masters else ():
        if (fragment.name, fragment.kind) == (segment.name, "master"):
            fragment.write(values.to(fragment.dtype))


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
            owner=segment.owner and segment.start == 0,
            home="host",
            read=lambda: torch.tensor([home.step]),
            write=write,
        )
        for segment in home.spec.segments
    ]
