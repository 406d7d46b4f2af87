"""Check before training that all ranks run the same plan on the same model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.world.axis import SubAxis
from drivetrain.contracts.world.collective import Purpose, Tag, axis_name
from drivetrain.contracts.world.communicator import Communicator
from drivetrain.errors import ConfigError
from drivetrain.job.ownership import owner_of
from drivetrain.tensor_parts import tensor_parts

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.distributed_c10d import Store

    from drivetrain.contracts.state.parameters import ParameterInfo, Placement
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job

_SHOWN = 5
_FIRST = ("data", "tp", "pp")
_HINT = (
    "\n  along {} ranks have copies or parts of the same parameters: a plugin whose ranks have "
    "others there adds that axis to ParameterInfo.distinct, and to a placement where they are parts"
)


def check_same_plan(
    fingerprint: Mapping[str, Any], communicator: Communicator, store: Store, device: torch.device
) -> None:
    """Compare ``fingerprint`` between all ranks. Collective over the world.

    Raises:
        ConfigError: on every rank, naming one that differs from most, and the first differences.
    """
    ranks = range(communicator.size("world"))
    plan = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))
    found = _difference("plan", plan, communicator, "world", ranks, store, device)
    if found is not None:
        raise ConfigError(f"ranks disagree about what to run, {found}")


def check_same_model(job: Job, module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Compare the parameters and buffers of ``module`` between ranks that have copies or parts.

    Collective: 8 bytes of every rank for each axis over which parameters are summed, replicated or
    cut. Without it, ranks with other models add up numbers that do not belong together, or wait for
    each other.

    Args:
        job: facts about parameters, axes and communication.
        module: as it is before states are built, or built again.
        groups: of the optimizer, if there is one.

    Raises:
        ConfigError: on every rank of an axis; names a rank, the first parameters or buffers that
            it has otherwise, and what both have.
    """
    by_axis = _described(job, module, groups)
    if job.failures is None:
        return
    for axis in sorted(by_axis, key=lambda axis: (axis not in _FIRST, axis_name(axis))):
        if axis != "data" and job.mesh.size(axis) == 1:
            continue
        found = _difference(
            "model",
            by_axis[axis],
            job.communicator,
            axis,
            job.mesh.ranks(axis),
            job.failures.store,
            job.device,
        )
        if found is not None:
            hint = "" if axis == "data" else _HINT.format(axis_name(axis))
            raise ConfigError(f"ranks have built different models, {found}{hint}")


def _described(
    job: Job, module: nn.Module, groups: Iterable[Mapping[str, Any]]
) -> dict[Axis, dict[str, Any]]:
    """Axis -> name -> facts that all ranks of the axis must agree on."""
    group_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
    by_axis: dict[Axis, dict[str, Any]] = {axis: {} for axis in _FIRST}
    for parameter in module.parameters():
        facts = {
            "requires_grad": parameter.requires_grad,
            "optimizer group": group_of.get(parameter),
            "kept by an engine": owner_of(parameter) is not None,
        }
        _note(by_axis, job, "", parameter, job.parameters.info(parameter), facts)
    for _, buffer, info in job.parameters.buffers(module):
        _note(by_axis, job, "buffer ", buffer, info, {})
    # Ranks that agree on these agree on what they compare next, and do not wait for each other.
    axes = [axis for axis in by_axis if not isinstance(axis, SubAxis)]
    for first in _FIRST:
        mine = sorted(axis_name(axis) for axis in axes if job.mesh.layout.overlap(first, axis))
        by_axis[first]["axes of parameters"] = mine
    return by_axis


def _note(
    by_axis: dict[Axis, dict[str, Any]],
    job: Job,
    kind: str,
    tensor: torch.Tensor,
    info: ParameterInfo,
    facts: dict[str, Any],
) -> None:
    """Add facts about a parameter or buffer to those of the axes whose ranks must agree on them."""
    label, placed = f"{kind}{info.name}", info.placement
    try:
        replicated = job.parameters.replicated(info)
    except ConfigError as error:
        raise ConfigError(f"{kind or 'parameter '}{info.name}: {error}") from None
    if label in by_axis.setdefault(_short(info.reduction), {}):
        raise ConfigError(
            f"two of this rank's {kind or 'parameter '}tensors are called {info.name}: give names "
            "to what is built in place of the client's modules (job.parameters.name)"
        )
    if placed is not None:  # whose ranks have other boxes of one tensor
        _refuse_boxes(label, placed, tensor.numel())
        facts["whole shape"] = list(placed.global_shape)
        facts["joined of"] = [list(part) for part in placed.joined]
        rows = sum(length for _, length in placed.joined)
        if placed.joined and rows != placed.global_shape[0]:
            raise ConfigError(
                f"parameter {info.name} of shape {facts['whole shape']} is said to be joined of "
                f"{facts['joined of']}, which have {rows} rows together"
            )
        by_axis.setdefault(_short(placed.axis), {})[label] = dict(facts)
        facts["boxes"] = [[list(box.global_offset), list(box.size)] for box in placed.boxes]
    facts |= _facts(tensor, info.name)
    for axis in (info.reduction, replicated):
        by_axis.setdefault(_short(axis), {})[label] = facts


def _refuse_boxes(label: str, placed: Placement, numel: int) -> None:
    """Check that each box lies in the whole tensor, and by itself in the ``numel`` elements here.

    Raises:
        ConfigError: a checkpoint would have other values than the parameter.
    """
    end = 0
    for box in placed.boxes:
        corners = zip(box.global_offset, box.size, placed.global_shape, strict=True)
        inside = all(0 <= at <= at + extent <= whole for at, extent, whole in corners)
        if not (inside and end <= box.local_offset <= box.local_offset + box.numel <= numel):
            raise ConfigError(
                f"{label} has {numel} elements here and cannot be what its placement says: {box} "
                f"of {list(placed.global_shape)} lies outside, or not behind the box before it"
            )
        end = box.local_offset + box.numel


def _short(axis: Axis) -> Axis:
    return axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis


def _facts(tensor: torch.Tensor, name: str) -> dict[str, Any]:
    facts = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": tensor.device.type,
    }
    parts = tensor_parts(tensor, name)
    inside = {label: _facts(part, label) for label, part in parts.items() if part is not tensor}
    return facts | ({"inside": inside} if inside else {})


def _difference(
    what: str,
    mine: dict[str, Any],
    communicator: Communicator,
    axis: Axis,
    ranks: Sequence[int],
    store: Store,
    device: torch.device,
) -> str | None:
    """How ``mine`` differs between the ``ranks`` along ``axis``; the same on all. Collective.

    Every rank sends a hash; only if they differ, two ranks put the whole into ``store``, where all
    read it.
    """
    text = json.dumps(mine)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    own = torch.tensor([digest], device=device)
    everyone = torch.empty(communicator.size(axis), dtype=own.dtype, device=device)
    tag = Tag(Purpose.CONTROL, site=f"{what} comparison")
    communicator.all_gather(everyone, own, axis, tag)
    digests = everyone.tolist()
    usual = Counter(digests).most_common(1)[0][0]
    strangers = [place for place, other in enumerate(digests) if other != usual]
    if not strangers:
        return None
    places = (digests.index(usual), strangers[0])
    keys = [f"{what}/{ranks[place]}/{digests[place]}" for place in places]
    if communicator.rank(axis) in places:
        store.set(keys[places.index(communicator.rank(axis))], text)
    expected, found = (json.loads(store.get(key)) for key in keys)
    pair = (ranks[places[0]], ranks[places[1]])
    return (
        f"rank {pair[1]} with rank {pair[0]} and most others "
        f"({len(strangers)} of {len(digests)} ranks differ):\n"
        + "\n".join(_differences(pair, expected, found))
    )


def _differences(pair: tuple[int, int], expected: Any, found: Any) -> list[str]:
    lines = [
        f"  {path} is {_shown(one)} on rank {pair[0]}, {_shown(other)} on rank {pair[1]}"
        for path, one, other in _unequal(expected, found, "")
    ]
    if not lines:  # what is the same comes in another order
        first, second = next((a, b) for a, b in zip(expected, found, strict=True) if a != b)
        return [f"  {first} comes on rank {pair[0]} where {second} comes on rank {pair[1]}"]
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"  and {more} more"]


_ABSENT = object()


def _unequal(one: Any, other: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            inner = one.get(key, _ABSENT), other.get(key, _ABSENT)
            yield from _unequal(*inner, f"{path}.{key}" if path else key)
    elif one is _ABSENT or other is _ABSENT or one != other:
        yield path, one, other


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
