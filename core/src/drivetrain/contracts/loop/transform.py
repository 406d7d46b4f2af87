"""Rewrites of the client's module, and what lets one rewrite understand another's result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn


class Phase(IntEnum):
    """When a transform runs; model states are built between ``RECOMPUTE`` and ``COMPILE``."""

    ADAPT = 0
    PARTITION = 1
    RECOMPUTE = 2
    COMPILE = 3


@dataclass(frozen=True)
class Transform:
    """One rewrite offered by the ``transform_module`` hook.

    Args:
        phase: when it runs.
        apply: takes the module and returns it or its replacement.
    """

    phase: Phase
    apply: Callable[[nn.Module], nn.Module]


@runtime_checkable
class Partitionable(Protocol):
    """A module made by an ``ADAPT`` transform that ``PARTITION`` may slice without knowing it."""

    @abstractmethod
    def partition_dims(self) -> dict[str, tuple[int, ...]]:
        """Own parameter name -> dimensions along which it may be cut."""

    @abstractmethod
    def partition(self, name: str, dim: int, pieces: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The given [start, stop) ranges of parameter ``name`` along ``dim``, concatenated."""
