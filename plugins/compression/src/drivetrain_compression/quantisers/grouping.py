"""Cut a weight into groups of numbers that share a scale, and put it together again."""

from __future__ import annotations

import torch

from drivetrain.errors import ConfigError


def in_groups(weight: torch.Tensor, groups: int, label: str = "weight") -> torch.Tensor:
    """Return the numbers of ``weight`` as [groups, numel / groups], in memory order.

    Args:
        weight: any shape.
        groups: how many, at least 1; 0 for one per row of the first dimension.
        label: what messages call the weight.

    Raises:
        ConfigError: the groups would not be equal; nothing is padded.
    """
    groups = groups or weight.shape[0]
    if weight.numel() % groups:
        raise ConfigError(
            f"{label}: {weight.numel():,} numbers {list(weight.shape)} are not divided into "
            f"{groups} equal groups; choose a number that divides them (none is padded)"
        )
    return weight.reshape(groups, -1)


def in_blocks(weight: torch.Tensor, size: int, label: str = "weight") -> torch.Tensor:
    """Return rows cut into blocks of ``size`` along the last dimension: [..., blocks, size].

    Args:
        weight: [..., inputs].
        size: numbers in a block; 0 for whole rows.
        label: what messages call the weight.

    Raises:
        ConfigError: blocks do not divide the rows; nothing is padded.
    """
    inputs = weight.shape[-1]
    size = size or inputs
    if inputs % size:
        raise ConfigError(
            f"{label}: rows of {inputs} {list(weight.shape)} are not divided into groups of {size};"
            " choose a size that divides them (none is padded), or 0 for whole rows"
        )
    return weight.reshape(*weight.shape[:-1], inputs // size, size)
