"""All ranks must run the same plan on the same model: found out before they train."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.contracts.world.collective import Purpose, Tag, axis_name
from drivetrain.contracts.world.communicator import Communicator
from drivetrain.errors import ConfigError
from drivetrain.job.ownership import owner_of
from drivetrain.tensor_parts import tensor_parts

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.distributed_c10d import Store

    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job

_SHOWN = 5


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
    """Compare the parameters and buffers of ``module`` between ranks that train copies of it.

    Collective: 8 bytes of every rank for each axis over which gradients are summed. Without it,
    ranks with other models add up numbers that do not belong together, or wait for each other.

    Args:
        job: facts about parameters, axes and communication.
        module: as it is before states are built, or built again.
        groups: of the optimizer, if there is one.

    Raises:
        ConfigError: on every rank of an axis; names a rank, the first parameters or buffers that
            it has otherwise, and what both have.
    """
    if job.failures is None:
        return
    by_axis = _described(job, module, groups)
    for axis in sorted(by_axis, key=lambda axis: (axis != "data", axis_name(axis))):
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
            raise ConfigError(f"ranks have built different models, {found}")


def _described(
    job: Job, module: nn.Module, groups: Iterable[Mapping[str, Any]]
) -> dict[Axis, dict[str, Any]]:
    """Axis -> name -> facts that all ranks of the axis must agree on."""
    group_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
    by_axis: dict[Axis, dict[str, Any]] = {"data": {}}
    for parameter in module.parameters():
        info = job.parameters.info(parameter)
        facts = _facts(parameter, info.name)
        facts["requires_grad"] = parameter.requires_grad
        facts["optimizer group"] = group_of.get(parameter)
        facts["kept by an engine"] = owner_of(parameter) is not None
        by_axis.setdefault(info.reduction, {})[info.name] = facts
    for name, buffer in module.named_buffers():
        by_axis["data"][f"buffer {name}"] = _facts(buffer, name)
    if len(by_axis) > 1:
        by_axis["data"]["axes of other parameters"] = sorted(map(axis_name, by_axis))
    return by_axis


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
