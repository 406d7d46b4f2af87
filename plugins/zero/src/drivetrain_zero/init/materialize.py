"""Giving modules on the meta device memory and first values, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain_zero.init.shards import InitShards


def materialize(
    module: nn.Module, shards: InitShards, initialize: Callable[[nn.Module], object] | None
) -> None:
    """Make what ``module`` has on the meta device, and cut each part's parameters at once.

    Parts are initialised in the module's order. A tied parameter stays one, and gets its values
    with the part that has it first.

    Args:
        module: changed in place.
        shards: cuts what was made.
        initialize: gives one part's own parameters and buffers their values; by default its
            ``reset_parameters``.

    Raises:
        TrainingError: a part has something on the meta device and no ``reset_parameters``.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, part in module.named_modules():
        own = dict(part._parameters)
        buffers = [b for b in part._buffers.values() if b is not None and b.is_meta]
        meta = {key: p for key, p in own.items() if p is not None and p.is_meta}
        new = [p for p in meta.values() if p not in made]
        if new or buffers:
            _make(part, name or type(module).__name__, shards.device, initialize)
        for key, old in meta.items():
            fresh = part._parameters[key]
            assert fresh is not None
            part._parameters[key] = made.setdefault(old, fresh)
        shards.cut(part)


def _make(
    part: nn.Module,
    name: str,
    device: torch.device,
    initialize: Callable[[nn.Module], object] | None,
) -> None:
    reset: Any = getattr(part, "reset_parameters", None)
    if initialize is None and reset is None:
        raise TrainingError(
            f"{name} ({type(part).__name__}) has parameters or buffers on the meta device and no "
            "reset_parameters() that gives them values: pass zero.Init(initialize=function), or "
            "construct it on a real device inside the context"
        )
    part.to_empty(device=device, recurse=False)
    if initialize is not None:
        initialize(part)
    else:
        reset()
