"""Show parameters whole, wherever ranks keep them and in however many parts.

[Note: levels of whole] A parameter is kept in parts on two levels. Model states may keep shards of
what this rank's module has, and show the whole of that through a handle. That in turn may be a part
of the client's tensor, as its placement says. So states gather first and boxes are put together
then; on the way back boxes are taken out first. Each level brings one rank's changes to all ranks
that have copies on that level.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from drivetrain.checkpoint.agreement import texts_along
from drivetrain.contracts import is_plain
from drivetrain.contracts.state.fragment import Box
from drivetrain.contracts.world.collective import Purpose, Tag, axis_name
from drivetrain.errors import TrainingError
from drivetrain.job.job import open_jobs
from drivetrain.job.ownership import owner_of
from drivetrain.states.changed_parameters import digests
from drivetrain.tensor_parts import tensor_parts

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from drivetrain.contracts.state.parameters import ParameterInfo, Placement
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job


_SAME, _CHANGED, _OTHER_SHAPE = range(3)

_ALL = "state dict of all ranks"
_LOADING = "loading a state dict on all ranks"

_local: MutableMapping[nn.Parameter, torch.Tensor] = WeakTensorKeyDictionary()
"""This rank's parts of the parameters that show the client's whole tensor now."""


def shows_client_tensor(parameter: nn.Parameter) -> bool:
    """Whether :func:`whole` lets a parameter, of which this rank has a part, show all of it now."""
    return parameter in _local


@dataclass(frozen=True)
class _Copies:
    """Which ranks have copies of a parameter, and so get what one of them changes.

    Args:
        job: knows the parameter.
        axes: along which ranks have copies; the writing rank is one along the first.
    """

    job: Job
    axes: tuple[Axis, ...]


class CopyWrites:
    """Finds what a script changes in parameters, and gives the changes to all copies.

    Args:
        copies: the parameters, with who has copies of each.
        write_rank: the rank along the first axis whose changes count. Of its copies along other
            axes, the first that has changed a parameter counts.
    """

    def __init__(self, copies: Mapping[nn.Parameter, _Copies], write_rank: int) -> None:
        self._write_rank = write_rank
        self._groups: dict[_Copies, dict[nn.Parameter, _State]] = defaultdict(dict)
        for parameter, who in copies.items():
            self._groups[who][parameter] = _state(parameter)

    def changed(self) -> list[nn.Parameter]:
        """Return the parameters that this rank has changed."""
        pairs = (pair for before in self._groups.values() for pair in before.items())
        return [parameter for parameter, old in pairs if _change(old, _state(parameter))]

    def spread(self) -> Iterator[tuple[Job, list[nn.Parameter], set[nn.Parameter]]]:
        """Give all ranks what the writing rank has changed. Collective.

        Yields:
            Of each job, parameters that have other values now, and those that have not.

        Raises:
            TrainingError: another rank has changed a parameter, or one has another shape.
        """
        for who, before in self._groups.items():
            written = self._agree(who, before)
            for parameter, source in written.items():
                tag = Tag(Purpose.STATE, who.job.parameters.info(parameter).name, "changed whole")
                for part in _parts(parameter):
                    dense = part.contiguous()
                    for axis, rank in reversed([*zip(who.axes, source, strict=True)]):
                        who.job.communicator.broadcast(dense, axis, tag, source=rank)
                    if dense is not part:
                        part.copy_(dense)
            yield who.job, [*written], set(before).difference(written)

    def _agree(
        self, who: _Copies, before: Mapping[nn.Parameter, _State]
    ) -> dict[nn.Parameter, list[int]]:
        """Return what the writing rank has changed: parameter -> its place along each axis."""
        communicator, axes = who.job.communicator, who.axes
        found = torch.zeros(len(before), *map(communicator.size, axes), dtype=torch.int32)
        place = tuple(map(communicator.rank, axes))
        for row, (parameter, old) in zip(found, before.items(), strict=True):
            row[place] = _change(old, _state(parameter))
        for axis in axes:
            communicator.all_reduce(found, axis, Tag(Purpose.STATE, site="changed whole"))
        written = {}
        for parameter, copies in zip(before, found, strict=True):
            name = who.job.parameters.info(parameter).name
            changes = copies.flatten(1).amax(dim=1).tolist()
            if _OTHER_SHAPE in changes:
                raise TrainingError(
                    f"parameter {name} has another shape after it was changed: resize parameters "
                    "before the engine is built"
                )
            if any(changes) and not changes[self._write_rank]:
                rank = next(rank for rank, change in enumerate(changes) if change)
                raise TrainingError(
                    f"parameter {name} was changed on rank {rank}, but modifier_rank (write_rank) "
                    f"is {self._write_rank}, whose copy is as it was: the change would be lost"
                )
            if any(changes):
                first: list[int] = copies[self._write_rank].nonzero()[0].tolist()
                written[parameter] = [self._write_rank, *first]
        return written


_State = tuple[torch.Size, torch.Tensor]


def _parts(parameter: nn.Parameter) -> list[torch.Tensor]:
    return list(tensor_parts(parameter.detach(), "parameter").values())


def _state(parameter: nn.Parameter) -> _State:
    return parameter.shape, digests(_parts(parameter))


def _change(before: _State, after: _State) -> int:
    if before[0] != after[0]:
        return _OTHER_SHAPE
    return _SAME if torch.equal(before[1], after[1]) else _CHANGED


def _copies(parameters: Iterable[nn.Parameter], *, placed: bool) -> dict[nn.Parameter, _Copies]:
    """Who has copies of parameters; of parts or, if ``placed``, of the client's tensors.

    Those that no open job knows are left out, and those of which this rank has no part.
    """
    found, jobs = {}, open_jobs()[::-1]
    for parameter in parameters:
        owner = owner_of(parameter)
        first = [job for job in jobs if owner is not None and owner.job is job]
        job = next((job for job in [*first, *jobs] if parameter in job.parameters), None)
        if job is None:
            continue
        info = job.parameters.info(parameter)
        axes: tuple[Axis, ...] = info.reduction, job.parameters.replicated(info)
        if placed:
            placement = info.placement
            if placement is None or job.communicator.size(placement.axis) == 1:
                continue
            axes += (placement.axis,)
        found[parameter] = _Copies(job, axes)
    return found


@contextmanager
def whole(
    target: nn.Module | nn.Parameter | Iterable[nn.Parameter], write_rank: int | None = None
) -> Iterator[None]:
    """Use the client's tensors whole inside the block, wherever and in what parts they are kept.

    Collective over the ranks that share the parameters or have parts of them. With ``write_rank``,
    changes inside the block reach all ranks and the masters, at every stage; without it, ordinary
    parameters are left alone. An exception inside the block keeps changes of ordinary parameters
    where they are.

    Args:
        target: a module (all its parameters), a parameter, or several.
        write_rank: the data-parallel rank whose changes are kept. ``None``: parameters that are
            kept in parts must not be changed.

    Raises:
        TrainingError: a parameter was changed where the change would be lost.
    """
    several = target.parameters() if isinstance(target, nn.Module) else target
    parameters = [several] if isinstance(several, nn.Parameter) else list(several)
    inside = [parameter for parameter in parameters if parameter in _local]
    if inside and write_rank is not None:
        raise TrainingError(
            f"a parameter of shape {tuple(inside[0].shape)} is gathered for writing inside a block "
            "that gathers it already: leave the outer block first, its changes might be lost"
        )
    outside = [parameter for parameter in parameters if parameter not in _local]
    with whole_parts(outside, write_rank):
        placed = _copies(outside, placed=True)
        _show_client_tensors(placed)
        before = CopyWrites(placed, write_rank or 0)
        try:
            yield
        finally:
            try:
                _keep_written(before, placed, write_rank)
            finally:
                for parameter in placed:
                    parameter.data = _local.pop(parameter)


@contextmanager
def whole_parts(
    parameters: Sequence[nn.Parameter], write_rank: int | None = None
) -> Iterator[None]:
    """Use all that this rank's module has of each parameter; see :func:`whole` for the rest."""
    every = [getattr(parameter, "drivetrain_handle", None) for parameter in parameters]
    handles = [handle for handle in every if handle is not None]
    writes = None
    if write_rank is not None and len(handles) < len(parameters):
        ordinary = (p for p, handle in zip(parameters, every, strict=True) if handle is None)
        writes = CopyWrites(_copies(ordinary, placed=False), write_rank)
    gathered = []
    try:
        for handle in handles:
            handle.gather(write_rank)
            gathered.append(handle)
        yield
    finally:
        for handle in reversed(gathered):
            handle.release(write_rank)
    for job, written, same in writes.spread() if writes is not None else ():
        for engine in job.engines:
            engine.states.take_over(written, same)


@contextmanager
def handed_over(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Take what this rank has of ``parameters`` inside the block; what sharded it forgets it.

    For model states that are about to keep the parameters in their own way. Collective, as
    :func:`whole` is.
    """
    with whole_parts(parameters):
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
            # In place: torch's dict carries the versions of modules as an attribute.
            tensors = {key: x for key, x in state.items() if isinstance(x, torch.Tensor)}
            state.update({key: x.clone() for key, x in tensors.items()})
    return state


def of_all_ranks(
    job: Job, module: nn.Module, state: dict[str, Any], *, keep: bool = True
) -> dict[str, Any]:
    """Put the state dicts of ranks that have other parameters together, in stages or experts.

    Collective. Names are the model's own on every rank. What this rank has is its own; else that of
    the first that has it, tensors in host memory, since one device may have no room for the whole
    model. So are versions of modules, which torch keeps beside a state dict for their loaders.

    Args:
        job: knows the ranks.
        module: of this rank.
        state: of this rank.
        keep: whether this rank wants what others have, or only takes part.

    Raises:
        TrainingError: on every rank: an entry is neither a tensor nor plain data, so it cannot be
            given to others.
    """
    axes = axes_apart(job, module)
    for axis in axes:  # who takes part in the last has to have what the others gave
        state = _of_all_along(job, axis, state, keep=keep or axis != axes[-1])
    return state


def axes_apart(job: Job, module: nn.Module) -> list[str]:
    """Axes along which ranks have other parameters; last stages, whose other axes may differ."""
    known = (job.parameters.info(p) for p in module.parameters() if p in job.parameters)
    found = {axis for info in known for axis in info.distinct}.difference(["pp"])
    return [axis for axis in (*sorted(found), "pp") if job.mesh.size(axis) > 1]


def _of_all_along(job: Job, axis: str, state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    versions: dict[str, Any] = {}
    for text in texts_along(job, axis, json.dumps(_versions(state)), _ALL):
        versions = {**json.loads(text), **versions}
    found = _with_versions(state, {**versions, **getattr(state, "_metadata", {})})
    facts = json.dumps([_fact(*entry) for entry in state.items()])
    every = [json.loads(text) for text in texts_along(job, axis, facts, _ALL)]
    ranks = Counter(name for theirs in every for name, *_ in theirs)
    known = {name for name, count in ranks.items() if count == len(every)}
    for rank, theirs in enumerate(every):
        for name, dtype, about in theirs:
            if name in known:
                continue
            known.add(name)
            if about is None:
                raise TrainingError(
                    f"{_ALL}: {name} of rank {rank} along {axis} ({dtype}) is neither a tensor nor "
                    "plain data (numbers, texts, lists, dicts), so other ranks cannot have it: "
                    "return such data from get_extra_state, or use engine.save_checkpoint"
                )
            if not isinstance(about, list):
                found.setdefault(name, json.loads(about))
                continue
            like = torch.empty(about, dtype=getattr(torch, dtype), device="meta")
            own = state[name].detach() if rank == job.mesh.coordinate(axis) else like
            value = broadcast_along(job, axis, rank, own, Tag(Purpose.STATE, name, _ALL))
            if keep and name not in found:
                found[name] = value.cpu()
    return found


def broadcast_along(job: Job, axis: str, source: int, x: torch.Tensor, tag: Tag) -> torch.Tensor:
    """What the rank ``source`` along ``axis`` has, on all of them and their devices. Collective.

    On the others ``x`` is a tensor of that shape and dtype without memory.
    """
    value = torch.empty_like(x, device=job.device) if x.is_meta else x.to(job.device).contiguous()
    job.communicator.broadcast(value, axis, tag, source=source)
    return value


def _fact(name: str, value: object) -> tuple[str, str, list[int] | str | None]:
    """Name, dtype and shape of a tensor; of anything else name, type and JSON, if it has that."""
    if isinstance(value, torch.Tensor):
        return name, str(value.dtype).split(".")[1], list(value.shape)
    return name, type(value).__name__, json.dumps(value) if is_plain(value) else None


def load_own(job: Job, module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load what this rank has of a model's state dict. Collective.

    Raises:
        RuntimeError: as torch's and as there after all that fits was loaded, on every rank: a
            shape differs or, with ``strict``, names are missing on a rank, or are no rank's.
    """
    axes = axes_apart(job, module)
    if not axes:
        module.load_state_dict(state, strict=strict)
        return
    own = list(module.state_dict())
    known = set(own)
    for axis in axes:
        every = texts_along(job, axis, json.dumps(sorted(known)), _LOADING)
        known = {name for text in every for name in json.loads(text)}
    others = known.difference(own)
    problem = ""
    try:
        kept = {name: value for name, value in state.items() if name not in others}
        own_state = _with_versions(kept, getattr(state, "_metadata", None))
        module.load_state_dict(own_state, strict=strict)
    except RuntimeError as error:
        problem = str(error)
    for axis in axes:
        problem = "\n".join(dict.fromkeys(filter(None, texts_along(job, axis, problem, _LOADING))))
    if problem:
        raise RuntimeError(problem)


def _versions(state: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Versions of the modules of a state dict; what else they keep there may be no text."""
    known = {name: facts.get("version") for name, facts in getattr(state, "_metadata", {}).items()}
    return {name: {"version": found} for name, found in known.items() if isinstance(found, int)}


def _with_versions(state: Mapping[str, Any], metadata: object) -> dict[str, Any]:
    """A copy of a state dict, with what torch keeps beside it."""
    found = OrderedDict(state)
    if metadata is not None:
        vars(found)["_metadata"] = metadata
    return found


# -- boxes of the client's tensors -----------------------------------------------------------------


def _show_client_tensors(placed: Mapping[nn.Parameter, _Copies]) -> None:
    """Let parameters show all of the tensors of which this rank has boxes. Collective."""
    every = _boxes_of_all(placed)
    for parameter, boxes in every.items():
        _refuse_gaps(placed[parameter].job.parameters.info(parameter), boxes)
    for parameter, boxes in every.items():
        job = placed[parameter].job
        info, mine = job.parameters.info(parameter), parameter.data
        assert info.placement is not None
        tensor = mine.new_zeros(info.placement.global_shape)
        longest = max(box.local_offset + box.numel for theirs in boxes for box in theirs)
        held = mine.reshape(-1)[:longest].view(torch.uint8)
        row = torch.zeros(longest * mine.itemsize, dtype=torch.uint8, device=mine.device)
        row[: held.numel()] = held
        rows = row.new_empty(len(boxes) * row.numel())
        tag = Tag(Purpose.STATE, info.name, "parts")
        job.communicator.all_gather(rows, row, info.placement.axis, tag)
        for flat, theirs in zip(rows.view(len(boxes), -1).view(mine.dtype), boxes, strict=True):
            for box in theirs:
                box.of(tensor).copy_(box.of_storage(flat))
        _local[parameter] = mine
        parameter.data = tensor


def _refuse_gaps(info: ParameterInfo, boxes: Iterable[Iterable[Box]]) -> None:
    assert info.placement is not None
    found = sum(box.numel for theirs in boxes for box in theirs)
    if found < (wanted := prod(info.placement.global_shape)):
        raise TrainingError(
            f"parameter {info.name} cannot be used whole: only {found} of its {wanted} elements "
            f"are in boxes of ranks along {axis_name(info.placement.axis)}"
        )


def _boxes_of_all(placed: Mapping[nn.Parameter, _Copies]) -> dict[nn.Parameter, list[list[Box]]]:
    """The boxes of each parameter that each rank along its placement's axis has. Collective."""
    found: dict[nn.Parameter, list[list[Box]]] = {}
    together: dict[tuple[Job, Axis], dict[nn.Parameter, Placement]] = defaultdict(dict)
    for parameter, who in placed.items():
        placement = who.job.parameters.info(parameter).placement
        assert placement is not None
        together[who.job, placement.axis][parameter] = placement
    for (job, axis), placements in together.items():
        numbers: list[int] = []
        for placement in placements.values():
            numbers.append(len(placement.boxes))
            for box in placement.boxes:
                numbers += (*box.global_offset, *box.size, box.local_offset)
        for theirs in map(iter, _gathered_numbers(job, axis, numbers)):
            for parameter, placement in placements.items():
                boxes, dims = [], len(placement.global_shape)
                for _ in range(next(theirs)):
                    offset, size = (tuple(islice(theirs, dims)) for _ in range(2))
                    boxes.append(Box(offset, size, next(theirs)))
                found.setdefault(parameter, []).append(boxes)
    return found


def _gathered_numbers(job: Job, axis: Axis, numbers: Sequence[int]) -> list[list[int]]:
    """As many integers as each rank along ``axis`` has. Collective."""
    communicator, tag = job.communicator, Tag(Purpose.CONTROL, site="boxes of parts")
    ranks = communicator.size(axis)
    length = torch.tensor([len(numbers)], device=job.device)
    lengths = length.new_empty(ranks)
    communicator.all_gather(lengths, length, axis, tag)
    own = length.new_zeros(max(lengths.tolist()))
    own[: len(numbers)] = torch.tensor(numbers, device=job.device)
    rows = own.new_empty(ranks * own.numel())
    communicator.all_gather(rows, own, axis, tag)
    every: list[list[int]] = rows.view(ranks, -1).tolist()
    return every


def _keep_written(
    before: CopyWrites, placed: Mapping[nn.Parameter, _Copies], write_rank: int | None
) -> None:
    """Take this rank's boxes out of tensors that were changed. Collective with ``write_rank``.

    Raises:
        TrainingError: a tensor was changed where the change would be lost.
    """
    for changed in before.changed() if write_rank is None else ():
        name = placed[changed].job.parameters.info(changed).name
        raise TrainingError(
            f"parameter {name} was changed inside a block that gathers it for reading, so the "
            "change would be lost: give modifier_rank (write_rank)"
        )
    for job, written, _ in before.spread() if write_rank is not None else ():
        for parameter in written:
            placement, mine = job.parameters.info(parameter).placement, _local[parameter]
            assert placement is not None
            flat = mine.reshape(-1).clone()
            for box in placement.boxes:
                box.of_storage(flat).copy_(box.of(parameter.detach()))
            mine.copy_(flat.view_as(mine))
