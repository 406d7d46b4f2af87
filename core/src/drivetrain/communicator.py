"""Collectives by mesh axis: the interface that every part of a job communicates through.

Decorators (byte log, shared memory, compression, watchdog) implement the same interface around
another communicator, so nothing else needs to know that they are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from drivetrain.mesh import Axis


class Purpose(Enum):
    """What a collective carries; decorators act on it."""

    WEIGHT = "weight"
    GRADIENT = "gradient"
    ACTIVATION = "activation"
    STATE = "state"
    CONTROL = "control"


@dataclass(frozen=True)
class Tag:
    """Names one collective.

    Args:
        purpose: what travels.
        key: stable identity across steps, e.g. a bucket key; error feedback is kept per key.
        site: where in the program, for logs and error messages.
    """

    purpose: Purpose
    key: str = ""
    site: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.purpose.value, self.key, self.site) if part)


class Op(Enum):
    """Reduction operators."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the result is usable on the current stream.

        Raises:
            CommunicationError: the collective failed; names the tag and, if known, the rank.
        """


class Communicator(ABC):
    """Collectives over named axes of the job's mesh.

    ``axis`` is an axis name, a tuple of names (their product), or an ``Axis`` that
    ``mesh.subgroup`` returned. Over an axis of size 1 a collective is a copy (or nothing).
    With ``asynchronous=True`` a method returns at once, and the tensors must not be touched before
    ``handle.wait()``; otherwise the handle is already finished. All ranks of the axis must issue
    the same collectives in the same order.
    """

    @abstractmethod
    def size(self, axis: Axis) -> int:
        """Number of ranks along ``axis``."""

    @abstractmethod
    def rank(self, axis: Axis) -> int:
        """This rank's position along ``axis``."""

    @abstractmethod
    def all_reduce(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        """Reduce ``tensor`` over ``axis``, in place, on every rank."""

    @abstractmethod
    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        """Reduce flat ``input`` [n * size] and keep slice ``rank`` of it in ``output`` [n].

        ``output`` may be that slice of ``input``.
        """

    @abstractmethod
    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
    ) -> Handle:
        """Concatenate every rank's flat ``input`` [n] into ``output`` [n * size].

        ``input`` may be slice ``rank`` of ``output``.
        """

    @abstractmethod
    def broadcast(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        source: int = 0,
        asynchronous: bool = False,
    ) -> Handle:
        """Copy ``tensor`` of the rank at position ``source`` of ``axis`` to all others."""

    @abstractmethod
    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        asynchronous: bool = False,
    ) -> Handle:
        """Send slice i of dimension 0 of ``input`` to position i; receive likewise into ``output``.

        Without splits both are cut evenly; with them, ``splits[i]`` rows go to / come from i.
        """

    @abstractmethod
    def send(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, to: int, asynchronous: bool = False
    ) -> Handle:
        """Send ``tensor`` to position ``to`` of ``axis``."""

    @abstractmethod
    def receive(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, source: int, asynchronous: bool = False
    ) -> Handle:
        """Receive into ``tensor`` from position ``source`` of ``axis``."""

    @abstractmethod
    def barrier(self, axis: Axis, tag: Tag) -> None:
        """Wait until every rank of ``axis`` is here."""

    @abstractmethod
    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        """Flat zeroed memory on the job's device in which ``axis`` communicates fastest."""


class CommunicatorPhase(IntEnum):
    """Where a decorator sits, from the inside out."""

    BYTE_LOG = 0
    ROUTE = 1
    COMPRESS = 2
    WATCHDOG = 3
    USER_LOG = 4


@dataclass(frozen=True)
class CommunicatorLayer:
    """A decorator offered by the ``wrap_communicator`` hook.

    Args:
        phase: its place in the fold.
        wrap: takes the communicator so far and returns the decorated one.
    """

    phase: CommunicatorPhase
    wrap: Callable[[Communicator], Communicator]
