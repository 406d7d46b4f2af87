"""Attributes by which scripts know a parameter of stage 3: ``ds_id``, ``ds_status`` and their like.

They belong to the class, since a parameter is sharded and made whole many times. A parameter that
is in no shards has none of them, so ``hasattr(parameter, "ds_id")`` tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deepspeed._parts.zero_words import ZeroParamStatus


def _status(parameter: nn.Parameter) -> ZeroParamStatus:
    """Whether the parameter is whole on this rank; on the only one, whether it is asked for."""
    whole = getattr(_handle(parameter, "ds_status"), "gathered", True)
    return ZeroParamStatus.AVAILABLE if whole else ZeroParamStatus.NOT_AVAILABLE


def _id(parameter: nn.Parameter) -> int:
    """A number of its own among the parameters of this process."""
    _handle(parameter, "ds_id")
    return id(parameter)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Its shape when it is whole, which it shows at all times."""
    _handle(parameter, "ds_shape")
    return parameter.shape


def _numel(parameter: nn.Parameter) -> int:
    """How many elements it has when it is whole."""
    _handle(parameter, "ds_numel")
    return parameter.numel()


def _persist(parameter: nn.Parameter) -> bool:
    """Whether it stays whole between its uses."""
    return bool(getattr(_handle(parameter, "ds_persist"), "persistent", False))


def _tensor(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of it, flat; to be read, since masters do not follow a change."""
    shard = getattr(_handle(parameter, "ds_tensor"), "shard", None)
    return (parameter if shard is None else shard).detach().view(-1)


_ATTRIBUTES: Mapping[str, Callable[[nn.Parameter], Any]] = {
    "ds_id": _id,
    "ds_numel": _numel,
    "ds_persist": _persist,
    "ds_shape": _shape,
    "ds_status": _status,
    "ds_tensor": _tensor,
}


def _handle(parameter: nn.Parameter, name: str) -> Any:
    handle = getattr(parameter, "drivetrain_handle", None)
    if handle is None:  # whole on the only rank that there is, but meant for shards
        handle = getattr(parameter, "drivetrain_alone", None)
    if handle is None:
        raise AttributeError(f"the parameter is in no shards, so it has no {name}", name=name)
    return handle


def show_attributes() -> None:
    """Let sharded parameters of this process have these attributes."""
    for name, read in _ATTRIBUTES.items():
        setattr(nn.Parameter, name, property(read))
