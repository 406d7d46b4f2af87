"""One rank's changes of parameters that every rank keeps whole reach all the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.job.job import open_jobs
from drivetrain.states.changed_parameters import digests
from drivetrain.tensor_parts import tensor_parts

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job


_SAME, _CHANGED, _OTHER_SHAPE = range(3)


class ReplicaWrites:
    """What some parameters were before a script changed them.

    Args:
        parameters: any; those that no open job knows are left alone.
        write_rank: the data-parallel rank whose changes count. Of its replicas along other axes,
            the first that has changed a parameter counts.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], write_rank: int) -> None:
        self._write_rank = write_rank
        self._groups: dict[tuple[Job, Axis, Axis], list[nn.Parameter]] = defaultdict(list)
        jobs = open_jobs()[::-1]
        for parameter in parameters:
            job = next((job for job in jobs if parameter in job.parameters), None)
            if job is not None:
                info = job.parameters.info(parameter)
                copies = info.reduction, job.parameters.replicated(info)
                self._groups[job, *copies].append(parameter)
        self._before = {
            key: [_state(parameter) for parameter in members]
            for key, members in self._groups.items()
        }

    def keep(self) -> None:
        """Give all ranks what the writing rank has changed; masters follow. Collective.

        Raises:
            TrainingError: another rank has changed a parameter, or one has another shape.
        """
        for (job, axis, replicated), members in self._groups.items():
            before = self._before[job, axis, replicated]
            written = self._agree(job, axis, replicated, members, before)
            for parameter, replica in written.items():
                tag = Tag(Purpose.STATE, job.parameters.info(parameter).name, "changed whole")
                for part in _parts(parameter):
                    dense = part.contiguous()
                    job.communicator.broadcast(dense, replicated, tag, source=replica)
                    job.communicator.broadcast(dense, axis, tag, source=self._write_rank)
                    if dense is not part:
                        part.copy_(dense)
            same = set(members).difference(written)
            for engine in job.engines:
                engine.states.take_over(written, same)

    def _agree(
        self,
        job: Job,
        axis: Axis,
        replicated: Axis,
        members: list[nn.Parameter],
        before: list[tuple[torch.Size, torch.Tensor]],
    ) -> dict[nn.Parameter, int]:
        """Those that the writing rank has changed, and the first of its replicas that has."""
        communicator, axes = job.communicator, (axis, replicated)
        found = torch.zeros(len(members), *map(communicator.size, axes), dtype=torch.int32)
        place = tuple(map(communicator.rank, axes))
        for row, parameter, old in zip(found, members, before, strict=True):
            row[place] = _change(old, _state(parameter))
        for each in axes:
            communicator.all_reduce(found, each, Tag(Purpose.STATE, site="changed whole"))
        written = {}
        for parameter, copies in zip(members, found, strict=True):
            name = job.parameters.info(parameter).name
            changes = copies.amax(dim=1).tolist()
            if _OTHER_SHAPE in changes:
                raise TrainingError(
                    f"parameter {name} has another shape after it was changed: resize parameters "
                    "before the engine is built"
                )
            if any(changes) and not changes[self._write_rank]:
                who = next(rank for rank, change in enumerate(changes) if change)
                raise TrainingError(
                    f"parameter {name} was changed on rank {who}, but modifier_rank (write_rank) "
                    f"is {self._write_rank}, whose copy is as it was: the change would be lost"
                )
            if any(changes):
                written[parameter] = int(copies[self._write_rank].argmax())
        return written


def _parts(parameter: nn.Parameter) -> list[torch.Tensor]:
    return list(tensor_parts(parameter.detach(), "parameter").values())


def _state(parameter: nn.Parameter) -> tuple[torch.Size, torch.Tensor]:
    return parameter.shape, digests(_parts(parameter))


def _change(before: tuple[torch.Size, torch.Tensor], after: tuple[torch.Size, torch.Tensor]) -> int:
    if before[0] != after[0]:
        return _OTHER_SHAPE
    return _SAME if torch.equal(before[1], after[1]) else _CHANGED


@contextmanager
def whole(
    target: nn.Module | nn.Parameter | Iterable[nn.Parameter], write_rank: int | None = None
) -> Iterator[None]:
    """Use parameters whole inside the block, wherever they are kept.

    Collective over the ranks that share the parameters. With ``write_rank``, changes inside the
    block reach all ranks and the masters, at every stage; without it, ordinary parameters are left
    alone. An exception inside the block keeps changes of ordinary parameters where they are.

    Args:
        target: a module (all its parameters), a parameter, or several.
        write_rank: the data-parallel rank whose changes are kept; ``None`` discards changes of
            sharded parameters.

    Raises:
        TrainingError: a parameter was changed on another rank only, so the change would be lost.
    """
    several = target.parameters() if isinstance(target, nn.Module) else target
    parameters = [several] if isinstance(several, nn.Parameter) else list(several)
    every = [getattr(parameter, "drivetrain_handle", None) for parameter in parameters]
    handles = [handle for handle in every if handle is not None]
    writes = None
    if write_rank is not None and len(handles) < len(parameters):
        pairs = zip(parameters, every, strict=True)
        writes = ReplicaWrites((p for p, handle in pairs if handle is None), write_rank)
    gathered = []
    try:
        for handle in handles:
            handle.gather(write_rank)
            gathered.append(handle)
        yield
    finally:
        for handle in reversed(gathered):
            handle.release(write_rank)
    if writes is not None:
        writes.keep()


@contextmanager
def handed_over(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Take the values of ``parameters`` inside the block, whole; whoever sharded them forgets them.

    For model states that are about to keep the parameters in their own way. Collective, as
    :func:`whole` is.
    """
    with whole(parameters):
        yield
    for parameter in parameters:
        vars(parameter).pop("drivetrain_handle", None)


def whole_state_dict(module: nn.Module, **options: Any) -> dict[str, Any]:
    """``module.state_dict(**options)`` with whole parameters, also where they are sharded.

    Collective. What is sharded is copied, everything else is the module's own, as usual.
    """
    with whole(module):
        state: dict[str, Any] = module.state_dict(**options)
        if any(hasattr(parameter, "drivetrain_handle") for parameter in module.parameters()):
            state = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }
    return state
