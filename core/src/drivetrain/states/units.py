"""The repeated blocks of a model, found once and used for gathering, splitting and compiling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """One repeated block.

    Args:
        name: its path in the module, e.g. ``"transformer.h.3"``; empty for the module itself.
        module: the block.
    """

    name: str
    module: nn.Module


def units(module: nn.Module) -> list[Unit]:
    """The outermost repeated blocks of ``module`` in order, or the module itself.

    A block is repeated when it is a child of a container (``ModuleList``, ``Sequential``,
    ``ModuleDict``) that holds at least two children of its class and it owns parameters. Blocks
    inside blocks are not looked for, so a parameter is in at most one unit; parameters outside all
    units (embeddings, final norm) belong to the model itself.
    """
    found = list(_repeated(module, ""))
    return found or [Unit("", module)]


def _repeated(module: nn.Module, prefix: str) -> Iterator[Unit]:
    classes = [type(child) for child in module.children()]
    container = isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        leaf = not any(True for _ in child.children())
        if container and not leaf and classes.count(type(child)) > 1 and _trains(child):
            yield Unit(path, child)
        else:
            yield from _repeated(child, f"{path}.")


def _trains(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
