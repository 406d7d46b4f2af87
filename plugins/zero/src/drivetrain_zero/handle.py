"""Whole parameters outside of forward and backward: for generation, initialisation, export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain.communicator import Purpose, Tag
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.job import Job
    from drivetrain_zero.bucket import ShardedBucket
    from drivetrain_zero.gathering import GatheredUnit


class ShardedParameter:
    """The handle of one sharded parameter; see :class:`drivetrain.parameters.ParameterHandle`.

    Args:
        job: communicator and names.
        unit: gathered when the parameter is.
        bucket: where the parameter lies.
        index: which of the bucket's parameters it is.
    """

    def __init__(self, job: Job, unit: GatheredUnit, bucket: ShardedBucket, index: int) -> None:
        self._job = job
        self._unit = unit
        self._bucket = bucket
        self._index = index
        self._depth = 0
        self._before: tuple[object, ...] = ()

    def gather(self, write_rank: int | None) -> None:
        """Make the parameter whole. Collective.

        Raises:
            TrainingError: it is gathered for writing already.
        """
        if self._depth and write_rank is not None:
            raise TrainingError(
                f"parameter {self._name} is gathered for writing inside a block that gathers it "
                "already: leave the outer block first, its changes might be lost"
            )
        self._unit.gather()
        self._unit.pins += 1
        self._depth += 1
        if self._depth == 1:
            self._before = self._state()

    def release(self, write_rank: int | None) -> None:
        """Keep the shard; with ``write_rank``, of that rank's values. Collective.

        Raises:
            TrainingError: it was changed where the change would be lost.
        """
        changed = self._depth == 1 and self._state() != self._before
        try:
            if write_rank is not None:
                self._write(write_rank, changed)
            elif changed:
                raise TrainingError(
                    f"parameter {self._name} was changed inside a block that gathers it for "
                    "reading, so the change would be lost: give modifier_rank (write_rank)"
                )
        finally:
            self._depth -= 1
            self._unit.pins -= 1
            self._unit.release()

    def _write(self, write_rank: int, changed: bool) -> None:
        parameter = self._bucket.parameters[self._index]
        info = self._job.parameters.info(parameter)
        communicator, tag = self._job.communicator, Tag(Purpose.STATE, info.name, "changed whole")
        rank = communicator.rank(info.reduction)
        changes = torch.zeros(communicator.size(info.reduction), dtype=torch.int32)
        changes[rank] = int(changed)
        communicator.all_reduce(changes, info.reduction, tag)
        who = changes.nonzero().flatten().tolist()
        if who and write_rank not in who:
            raise TrainingError(
                f"parameter {self._name} was changed on rank {who[0]}, but modifier_rank "
                f"(write_rank) is {write_rank}, whose copy is as it was: the change would be lost"
            )
        if not who:
            return
        if tuple(parameter.shape) != info.shape:
            raise TrainingError(
                f"parameter {self._name} has shape {tuple(parameter.shape)} after it was changed, "
                f"expected {info.shape}: resize parameters before the engine is built"
            )
        values = parameter.detach().contiguous()
        communicator.broadcast(values, info.reduction, tag, source=write_rank)
        if values.data_ptr() != parameter.data_ptr():
            parameter.data = values
        self._bucket.take_over(self._index)
        communicator.barrier(info.reduction, tag)  # others may read the shard from now on

    @property
    def _name(self) -> str:
        return self._job.parameters.info(self._bucket.parameters[self._index]).name

    def _state(self) -> tuple[object, ...]:
        """Changes when the parameter does: where it is, and what is in it."""
        parameter = self._bucket.parameters[self._index]
        return parameter.data_ptr(), parameter.shape, *digest(parameter.detach())


def digest(tensor: torch.Tensor) -> tuple[int, str]:
    """Tells changes of a tensor's numbers, but for their order.

    Of an even number of equal elements the hash alone would not see another value; the sum does.
    """
    if tensor.is_meta or not tensor.numel():
        return 0, ""
    return int(torch.hash_tensor(tensor)), str(tensor.sum().item())
