"""Hooks that commands of this package ask; plugins that answer them need not know the package.

A plugin marks its implementation with ``@hookimpl(optionalhook=True)``, since core does not know
these hooks, and may take any subset of a hook's arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

hookspec = pluggy.HookspecMarker("drivetrain")


@hookspec
def memory_rows(
    engine: Engine, block_activations: int, blocks: int
) -> Sequence[tuple[str, str, int, int]]:
    """Memory of one rank that is neither parameter nor state: (kind, place, bytes, locked bytes).

    Collect. Asked by ``drivetrain report --memory`` of an engine that was put together of tensors
    without memory (device ``meta``) and will not run. Places are ``"device"``, ``"host"`` and
    ``"nvme"``; locked bytes are a part of the host's. Rows of one kind are added up, so whoever
    moves something answers a negative row where it was, too. ``block_activations`` is what
    autograd saves, in bytes, in the forward of one of the model's ``blocks`` blocks; 0 if unknown.
    Must not communicate, allocate or touch files.
    """
    raise NotImplementedError
