"""Whole parameters outside of forward and backward: for generation, initialisation, export."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts import Communicator, Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.job.ownership import owner_of
from drivetrain.states.whole import handed_over
from drivetrain_zero.gathering.unit import Reason
from drivetrain_zero.shards.shown import fingerprint

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job
    from drivetrain.states.gradients import Slot
    from drivetrain_zero.gathering.unit import GatheredUnit
    from drivetrain_zero.shards.bucket import ShardedBucket


class WholeOnDemand(ABC):
    """The rules for using a sharded parameter whole, wherever its shards are kept.

    A parameter may be gathered inside a block that gathers it already, but for reading only, and
    what was changed must have been gathered for writing; see
    :class:`drivetrain.contracts.ParameterHandle`.
    """

    may_be_resized = False
    """Whether a change may give the parameter another shape."""

    def __init__(self) -> None:
        self._depth = 0
        self._before: tuple[object, ...] = ()

    # -- where it is kept ---------------------------------------------------------------------

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """Whose handle this is."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @property
    @abstractmethod
    def gathered(self) -> bool:
        """Whether the parameter is whole now."""

    @property
    def persistent(self) -> bool:
        """Whether it stays gathered between its uses."""
        return False

    @property
    @abstractmethod
    def shard(self) -> torch.Tensor:
        """This rank's part of the flattened parameter; empty where it has none, or it is away."""

    @abstractmethod
    def _ranks(self) -> tuple[Communicator, Axis]:
        """Who has to agree on its values."""

    def _replicated(self) -> tuple[str, ...]:
        """Axes along which further ranks have copies, which are kept apart from these."""
        return ()

    @abstractmethod
    def _fetch(self, *, writable: bool) -> None:
        """Make it whole and keep it so; ``writable``: in memory of this rank alone. Collective."""

    @abstractmethod
    def _let_go(self) -> None:
        """Undo one :meth:`_fetch`."""

    @abstractmethod
    def _take_over(self) -> None:
        """Keep what the parameter, which is whole, now holds; equal on all ranks."""

    # -- the rules ----------------------------------------------------------------------------

    def gather(self, write_rank: int | None) -> None:
        """Make the parameter whole. Collective.

        Raises:
            TrainingError: it is gathered for writing already.
        """
        if self._depth and write_rank is not None:
            raise TrainingError(
                f"parameter {self.name} is gathered for writing inside a block that gathers it "
                "already: leave the outer block first, its changes might be lost"
            )
        self._fetch(writable=write_rank is not None)
        self._depth += 1
        if self._depth == 1:
            self._before = fingerprint(self.parameter)

    def release(self, write_rank: int | None) -> None:
        """Keep the shard; with ``write_rank``, of that rank's values. Collective.

        Raises:
            TrainingError: it was changed where the change would be lost.
        """
        changed = self._depth == 1 and fingerprint(self.parameter) != self._before
        try:
            if write_rank is not None:
                self._write(write_rank, changed)
            elif changed:
                raise TrainingError(
                    f"parameter {self.name} was changed inside a block that gathers it for "
                    "reading, so the change would be lost: give modifier_rank (write_rank)"
                )
        finally:
            self._depth -= 1
            self._let_go()

    def _write(self, write_rank: int, changed: bool) -> None:
        communicator, axis = self._ranks()
        tag = Tag(Purpose.STATE, self.name, "changed whole")
        axes = axis, self._replicated()
        changes = torch.zeros(*map(communicator.size, axes), dtype=torch.int32)
        changes[tuple(map(communicator.rank, axes))] = int(changed)
        for each in axes:
            communicator.all_reduce(changes, each, tag)
        who = changes.amax(dim=1).nonzero().flatten().tolist()
        if who and write_rank not in who:
            raise TrainingError(
                f"parameter {self.name} was changed on rank {who[0]}, but modifier_rank "
                f"(write_rank) is {write_rank}, whose copy is as it was: the change would be lost"
            )
        if who:
            self._broadcast(write_rank, int(changes[write_rank].argmax()))
            self._take_over()
            # Ranks that share memory read each other's shards where they lie: none may go on
            # before all have taken over theirs.
            communicator.barrier(axis, tag)

    def _broadcast(self, source: int, replica: int) -> None:
        """Give the parameter, which is whole, the values of a replica of rank ``source``."""
        communicator, axis = self._ranks()
        tag = Tag(Purpose.STATE, self.name, "changed whole")
        sources = ((self._replicated(), replica), (axis, source))
        values = self.parameter.detach()
        shape = torch.zeros(9, dtype=torch.int64)
        shape[0], shape[1 : values.dim() + 1] = values.dim(), torch.tensor(values.shape)
        for each, first in sources:
            communicator.broadcast(shape, each, tag, source=first)
        wanted = torch.Size(shape[1 : int(shape[0]) + 1].tolist())
        if wanted != self._shape_before and not self.may_be_resized:
            raise TrainingError(
                f"parameter {self.name} has shape {tuple(wanted)} after it was changed, "
                f"expected {tuple(self._shape_before)}: resize parameters before the engine is "
                "built"
            )
        if values.shape != wanted:
            values = values.new_empty(wanted)
        values = values.contiguous()
        for each, first in sources:
            communicator.broadcast(values, each, tag, source=first)
        if values.data_ptr() != self.parameter.data_ptr() or values.shape != self.parameter.shape:
            self.parameter.data = values

    @property
    def _shape_before(self) -> torch.Size:
        shape = self._before[1]
        assert isinstance(shape, torch.Size)
        return shape


class ShardedParameter(WholeOnDemand):
    """The handle of one parameter in a bucket of a gathered unit.

    Args:
        job: communicator and names.
        unit: gathered when the parameter is.
        bucket: where the parameter lies.
        index: which of the bucket's parameters it is.
        slot: where its gradients go, if it is trained; told that changes are known.
    """

    def __init__(
        self,
        job: Job,
        unit: GatheredUnit,
        bucket: ShardedBucket,
        index: int,
        slot: Slot | None,
    ) -> None:
        super().__init__()
        # A slot and its bucket refer to each other, so a handle would keep those of an old layout.
        self._slot = None if slot is None else weakref.ref(slot)
        self._job = job
        self.unit = unit
        self._bucket = bucket
        self._index = index

    @property
    def parameter(self) -> nn.Parameter:
        return self._bucket.parameters[self._index]

    @property
    def name(self) -> str:
        return self._job.parameters.info(self.parameter).name

    @property
    def gathered(self) -> bool:
        return self.unit.is_whole

    @property
    def persistent(self) -> bool:
        return Reason.PERSISTENT in self.unit.reasons

    @property
    def shard(self) -> torch.Tensor:
        bucket, name = self._bucket, self.name
        if bucket.whole.fetches:
            return torch.empty(0, dtype=self.parameter.dtype)
        parts = [part for part in bucket.spec.segments if part.name == name]
        return parts[0].of(bucket.shard).view(-1) if parts else bucket.shard.new_empty(0)

    def _ranks(self) -> tuple[Communicator, Axis]:
        return self._job.communicator, self._job.parameters.info(self.parameter).reduction

    def _replicated(self) -> tuple[str, ...]:
        return self._job.parameters.replicated(self._job.parameters.info(self.parameter))

    def _fetch(self, *, writable: bool) -> None:
        self._bucket.shown.refuse_changes()
        self.unit.pin()

    def _let_go(self) -> None:
        self._bucket.shown.trust()  # changes were looked for above, with better advice
        if self._slot is not None and (slot := self._slot()) is not None:
            slot.note()
        self.unit.unpin()

    def _take_over(self) -> None:
        self._bucket.take_over(self._index)


def leave_whole(module: nn.Module, kept: Set[nn.Parameter]) -> None:
    """Give parameters that are sharded no longer, since they are frozen now, their values.

    Args:
        module: whose parameters; those that another engine lends are left alone.
        kept: those that are sharded still.
    """
    left = [
        parameter
        for parameter in module.parameters()
        if parameter not in kept
        and owner_of(parameter) is None
        and isinstance(getattr(parameter, "drivetrain_handle", None), ShardedParameter)
    ]
    with handed_over(left):
        values = [parameter.detach().clone() for parameter in left]
    for parameter, value in zip(left, values, strict=True):
        parameter.data = value
