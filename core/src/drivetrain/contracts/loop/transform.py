"""Rewrites of the client's module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class Phase(IntEnum):
    """When a transform runs; model states are built between ``RECOMPUTE`` and ``COMPILE``."""

    ADAPT = 0
    """Replace layers by others that compute the same."""

    PARTITION = 1
    """Keep this rank's part."""

    RECOMPUTE = 2
    """Choose what forward does again in backward."""

    COMPILE = 3
    """Compile blocks; states have their hooks, which stay outside of compiled graphs."""

    SURROUND = 4
    """Put hooks around the finished module; they see what everything inside of it does."""


@dataclass(frozen=True)
class Transform:
    """One rewrite offered by the ``transform_module`` hook.

    Args:
        phase: when it runs.
        apply: takes the module and returns it or its replacement.
    """

    phase: Phase
    apply: Callable[[nn.Module], nn.Module]
