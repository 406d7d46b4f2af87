"""What holds the numbers of tensors that are more, or less, than a block of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from drivetrain.contracts.world.collective import is_float8
from drivetrain.errors import ConfigError

_SPARSE: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has no memory of its own: a subclass around others, or a sparse tensor."""
    return _shows_inside(tensor) or tensor.layout in _SPARSE or not _has_memory(tensor)


def is_stored(tensor: torch.Tensor) -> bool:
    """Whether the dtype of ``tensor`` is one to keep numbers in, and not to compute in."""
    return is_float8(tensor.dtype) or (tensor.layout not in _SPARSE and is_wrapper(tensor))


def tensor_parts(tensor: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """The plain tensors that hold the numbers of ``tensor``, by name; they share its memory.

    Args:
        tensor: any; a plain one is its only part.
        name: what it is called; a part of it is called ``name.part``.

    Raises:
        ConfigError: it cannot be seen what is inside, or it is distributed over ranks.
    """
    inner = _inner_names(tensor, name)
    if inner is None:
        return {name: tensor}
    found: dict[str, torch.Tensor] = {}
    for attribute in inner:
        part = getattr(tensor, attribute)
        label = f"{name}.{attribute.lstrip('_')}"
        found |= tensor_parts(part() if callable(part) else part, label)
    return found


def copy_into(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy ``values`` [shape of ``target``] to where ``target`` is, also if that is expanded."""
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    target.copy_(values)


def _inner_names(tensor: torch.Tensor, name: str) -> tuple[str, ...] | None:
    if tensor.layout in _SPARSE:
        return _SPARSE[tensor.layout]
    if type(tensor).__module__.startswith("torch.distributed."):
        raise ConfigError(
            f"{name} is a {type(tensor).__name__}, which torch has distributed over ranks already; "
            "give its plain tensor (full_tensor()) to the module instead"
        )
    if _shows_inside(tensor):
        flatten: Any = tensor
        return tuple(flatten.__tensor_flatten__()[0])
    if _has_memory(tensor):
        return None
    raise ConfigError(
        f"{name} is a {type(tensor).__name__} around other tensors, which it does not show; give "
        "the class __tensor_flatten__ and __tensor_unflatten__"
    )


def _shows_inside(tensor: Any) -> bool:
    return is_traceable_wrapper_subclass(tensor)


def _has_memory(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or not tensor.numel() or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return True
    try:
        return bool(tensor.untyped_storage().data_ptr())
    except RuntimeError:  # torch's way to say that a wrapper has none
        return False
