"""Where a bucket's master weights and optimizer states live, and who runs its update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.state.bucket import Hyper
from drivetrain.contracts.state.fragment import Fragment

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import BucketSpec, Segment


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

    def settle(self, hyper: Hyper) -> None:  # noqa: B027 - rules that need it have core's home
        """Run :meth:`UpdateRule.settle`. Collective."""

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


def write_master(home: StateHome, segment: Segment, parameter: torch.Tensor) -> None:
    """Overwrite the master of ``segment``, if there is one, with values of the whole parameter."""
    values = parameter.detach().reshape(-1).narrow(0, segment.start, segment.numel)
    for fragment in home.fragments() if home.spec.has_masters else ():
        if (fragment.name, fragment.kind) == (segment.name, "master"):
            fragment.write(values.to(fragment.dtype))
