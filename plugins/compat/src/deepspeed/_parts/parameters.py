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
    """Whether the parameter is whole on this rank now."""
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


_ATTRIBUTES: Mapping[str, Callable[[nn.Parameter], Any]] = {
    "ds_id": _id,
    "ds_numel": _numel,
    "ds_shape": _shape,
    "ds_status": _status,
}


def _handle(parameter: nn.Parameter, name: str) -> Any:
    handle = getattr(parameter, "drivetrain_handle", None)
    if handle is None:  # whole on the only rank that there is, but meant for shards
        handle = getattr(parameter, "drivetrain_whole_by", None)
    if handle is None:
        raise AttributeError(f"the parameter is in no shards, so it has no {name}", name=name)
    return handle


def show_attributes() -> None:
    """Let sharded parameters of this process have these attributes."""
    for name, read in _ATTRIBUTES.items():
        setattr(nn.Parameter, name, property(read))
