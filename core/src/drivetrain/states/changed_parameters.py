"""What scripts do to parameters behind the engine's back: taken over, or refused by name.

[Note: changed parameters] Each parameter of a bucket is a view of the bucket's memory, its *place*.
A script may change its values there (in place, which counts up the tensor's version, or through
``.data``, which nothing notes), or let it show other memory (``parameter.data = ...``). Without
masters the update goes on from the changed values. With masters, it would undo the change.

Every rank has to make the same change. Which buckets were changed on any rank travels with the
agreement on late gradients, and the copies of these are compared before they are updated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts.world.collective import Op, Purpose, Tag
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import OptimizerPlan
    from drivetrain.contracts.state.parameters import ParameterTable
    from drivetrain.contracts.world.communicator import Communicator
    from drivetrain.states.gradients import GradientBucket, Slot


_ROW = 1024
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ParameterWatch:
    """Knows which parameters a module, its buckets and its optimizer had when states were built.

    Args:
        module: whose parameters they are.
        table: their names.
        optimizer: their groups; ``None`` for an engine that only serves.
        slots: the parameters in buckets.
    """

    def __init__(
        self,
        module: nn.Module,
        table: ParameterTable,
        optimizer: OptimizerPlan | None,
        slots: Mapping[nn.Parameter, Slot],
    ) -> None:
        self._module = module
        self._table = table
        self._groups = optimizer.groups if optimizer is not None else ()
        self._group_of = {p: i for i, group in enumerate(self._groups) for p in group["params"]}
        self._slots = slots
        self._known = {id(p): p for p in _parameters_in(module)}

    def refuse_other_module(self) -> None:
        """Check that the module has exactly the parameters that it had.

        Raises:
            TrainingError: one is new, or has gone.
        """
        found = {id(parameter) for parameter in _parameters_in(self._module)}
        if found == self._known.keys():
            return
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in self._known:
                raise TrainingError(
                    f"parameter {name} was put into the model after the engine was built, so it is "
                    "neither trained nor saved: change layers before drivetrain.initialize(), and "
                    "load values with engine.load_module_state_dict()"
                )
        gone = next(p for key, p in self._known.items() if key not in found)
        raise TrainingError(
            f"parameter {self._table.info(gone).name} was taken out of the model after the engine "
            "was built, which still trains and saves it: change layers before "
            "drivetrain.initialize()"
        )

    def refuse_other_groups(self) -> None:
        """Check that exactly the parameters that take gradients are in buckets, in their groups.

        Raises:
            TrainingError: some were frozen, unfrozen, or put into another group or none.
        """
        seen = 0
        for index, group in enumerate(self._groups):
            for parameter in group["params"]:
                seen += 1
                if parameter.requires_grad is not (parameter in self._slots):
                    change = "unfrozen" if parameter.requires_grad else "frozen"
                    raise TrainingError(
                        f"parameter {self._table.info(parameter).name} was {change} after the "
                        "engine was built; call engine.rebuild() after changing requires_grad"
                    )
                if self._group_of.get(parameter) != index:
                    self._refuse_group(parameter)
        if seen != len(self._group_of):
            now = {p for group in self._groups for p in group["params"]}
            self._refuse_group(next(p for p in self._group_of if p not in now))

    def _refuse_group(self, parameter: nn.Parameter) -> None:
        raise TrainingError(
            f"parameter {self._table.info(parameter).name} was moved between the optimizer's "
            "groups after the engine was built, which does not change how it is updated: change "
            "the groups' hyper-parameters, or build the engine anew"
        )

    def changed(self) -> Iterator[Slot]:
        """Slots whose parameter was changed or shows other memory, once these can be taken over.

        Raises:
            TrainingError: a change cannot be taken over, or an update would undo it.
        """
        for slot in self._slots.values():
            if not (slot.bucket.changed and slot.is_changed):
                continue
            self._refuse_other_kind(slot)
            if self._table.info(slot.parameter).master_dtype and not slot.shows_the_same:
                raise TrainingError(
                    f"parameter {slot.name} was changed in place after the engine was built, and "
                    "the step would undo that from its master weight; load weights with "
                    "engine.load_module_state_dict(), or change them inside "
                    "drivetrain.whole(parameters, write_rank=0), or on every rank and then call "
                    "engine.states.refresh()"
                )
            yield slot

    @staticmethod
    def _refuse_other_kind(slot: Slot) -> None:
        parameter, place = slot.parameter, slot.place
        if parameter.dtype is not slot.dtype:
            raise TrainingError(
                f"parameter {slot.name} was cast from {slot.dtype} to {parameter.dtype} after the "
                "engine was built, whose updates it does not see now; set the precision in the "
                "config instead"
            )
        if place is not None and parameter.shape != place.shape:
            raise TrainingError(
                f"parameter {slot.name} was resized from {tuple(place.shape)} to "
                f"{tuple(parameter.shape)} after the engine was built: resize before "
                "drivetrain.initialize()"
            )
        if place is not None and parameter.device != place.device:
            raise TrainingError(
                f"parameter {slot.name} was moved from {place.device} to {parameter.device} after "
                "the engine was built: move it back, or leave where it is to the engine"
            )


def digests(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return two integers [tensors, 2] on the host that tell the bits of each tensor, in order.

    One is a weighted sum of sums over rows of 1024 elements, one that of sums over columns, so
    elements that change places are seen. Reads every tensor twice, and waits for the device once.
    """
    if not tensors:
        return torch.zeros(0, 2, dtype=torch.int64)
    return torch.stack([_digest(tensor.detach()) for tensor in tensors]).cpu()


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or not tensor.numel():
        return torch.zeros(2, dtype=torch.int64, device="cpu" if tensor.is_meta else tensor.device)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().view(-1).view(_BITS[tensor.itemsize])
    whole = bits.numel() - bits.numel() % _ROW
    rows = bits[:whole].view(-1, _ROW)
    parts = [rows.sum(dim, dtype=torch.int64) for dim in (1, 0)]
    parts[1][: bits.numel() - whole] += bits[whole:]
    return torch.stack([_weighted(part) for part in parts])


def _weighted(sums: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, sums.numel() + 1, device=sums.device)
    return (sums * (weights * weights + weights + 1)).sum()


def refuse_unlike_copies(communicator: Communicator, bucket: GradientBucket) -> None:
    """Check that all ranks that have copies of a bucket have the same parameters. Collective.

    Raises:
        TrainingError: names the first that differs.
    """
    axes = [a for a in (bucket.reduction, bucket.replicated) if communicator.size(a) > 1]
    if not bucket.reduced or not axes:
        return
    own = digests([slot.parameter for slot in bucket.slots])
    most = torch.cat([own, -own])
    tag = Tag(Purpose.CONTROL, bucket.key, "changed parameters")
    for axis in axes:
        communicator.all_reduce(most, axis, tag, op=Op.MAX)
    highest, lowest = most.chunk(2)
    for slot, unlike in zip(bucket.slots, (highest != -lowest).any(dim=1), strict=True):
        if unlike:
            raise TrainingError(
                f"parameter {slot.name} was changed to different values on different ranks, in "
                "place, through .data, or by a forward (such as nn.Embedding(max_norm=...)): make "
                "the same change on every rank, or inside "
                "drivetrain.whole(parameters, write_rank=0)"
            )


def _parameters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """As ``module.parameters()``, ten times as fast; some may come more than once."""
    seen, left = {id(module)}, [module]
    while left:
        part = left.pop()
        yield from (p for p in part._parameters.values() if p is not None)
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                left.append(child)
