"""Moving and copying tensors inside of containers, and joining several into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def move_to_device(item: Any, device: torch.device | str, criterion_func: Any = None) -> Any:
    """Copy the tensors of nested lists, tuples and dicts to a device.

    Args:
        item: a tensor or a container; anything else is returned as it is.
        device: where to.
        criterion_func: moves only what this says of a tensor, if given.
    """

    def move(tensor: torch.Tensor) -> torch.Tensor:
        wanted = criterion_func is None or criterion_func(tensor)
        return tensor.to(device) if wanted else tensor

    return _map(item, move)


def clone_tensors_for_torch_save(item: Any, device: torch.device | str | None = "cpu") -> Any:
    """Copy tensors out of larger memory, so that ``torch.save`` writes no more than they hold.

    Args:
        item: a tensor or a container; anything else is returned as it is.
        device: of the copies; ``None`` for where each tensor is.
    """

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().to(tensor.device if device is None else device)

    return _map(item, copy)


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy the elements of tensors of one dtype into one flat tensor, one after another."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Cut a flat tensor into views of the shapes of ``tensors``; see :func:`flatten`."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple(part.view_as(like) for part, like in zip(parts, tensors, strict=True))


def _map(item: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(item, torch.Tensor):
        return change(item)
    if isinstance(item, Mapping):
        return type(item)({key: _map(value, change) for key, value in item.items()})  # type: ignore[call-arg]
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_map(value, change) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(_map(value, change) for value in item)
    return item
