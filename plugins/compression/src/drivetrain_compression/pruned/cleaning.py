"""Remove rows, heads and channels that are zero, so that ordinary smaller modules are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.recipe.modifier import Target


def keep_outputs(target: Target, kept: torch.Tensor) -> None:
    """Keep some outputs of a linear layer or convolution, or features of a batch norm.

    Args:
        target: the module, changed in place.
        kept: booleans, one for each output.

    Raises:
        ConfigError: it has another number of outputs, or its groups would be cut.
    """
    module: Any = target.module
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise ConfigError(
            f"{target.name} has {module.groups} groups, whose channels belong together"
        )
    _check(target, "outputs", module.weight.shape[0], kept)
    _cut(module, "weight", lambda t: t[kept])
    _cut(module, "bias", lambda t: t[kept])
    if isinstance(module, nn.BatchNorm2d):
        for name in ("running_mean", "running_var"):
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = buffer[kept].clone()
        module.num_features = int(kept.sum())
    elif isinstance(module, nn.Conv2d):
        module.out_channels = int(kept.sum())
    else:
        module.out_features = int(kept.sum())


def keep_inputs(target: Target, kept: torch.Tensor) -> None:
    """Keep some inputs of a linear layer or convolution.

    Args:
        target: the module, changed in place.
        kept: booleans, one for each input; a linear layer behind a flattened image has several
            inputs for each.

    Raises:
        ConfigError: it has another number of inputs, or groups.
    """
    module: Any = target.module
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            raise ConfigError(f"{target.name} has {module.groups} groups, so inputs are not shared")
        _check(target, "inputs", module.weight.shape[1], kept)
        _cut(module, "weight", lambda t: t[:, kept])
        module.in_channels = int(kept.sum())
        return
    inputs = module.weight.shape[1]
    each, rest = divmod(inputs, kept.numel())
    if rest or not each:
        _check(target, "inputs", inputs, kept)
    kept = kept.repeat_interleave(each)
    _cut(module, "weight", lambda t: t[:, kept])
    module.in_features = int(kept.sum())


def keep_rows_of_heads(target: Target, kept: torch.Tensor) -> None:
    """Keep the outputs of some heads of a projection to queries, keys or values.

    Raises:
        ConfigError: heads do not divide its outputs.
    """
    weight: Any = target.module.weight
    each, rest = divmod(weight.shape[0], kept.numel())
    if rest:
        _check(target, "outputs", weight.shape[0], kept)
    keep_outputs(target, kept.repeat_interleave(each))


def _check(target: Target, what: str, has: int, kept: torch.Tensor) -> None:
    if has != kept.numel():
        raise ConfigError(
            f"{target.name} has {has} {what}, but what it is related to has {kept.numel()} parts; "
            "correct related_modules"
        )


def _cut(module: nn.Module, name: str, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    old = module._parameters.get(name)
    if old is not None:
        new = cut(old.detach()).clone()
        module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
