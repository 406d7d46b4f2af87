"""What comes to the blocks of a model, found by running it without them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.units import Unit
from drivetrain_compression.calibrated.pairs import Call

Batch = Mapping[str, Any]
"""Arguments of a model by name."""


@dataclass
class Entered:
    """One batch as it comes to the blocks.

    Args:
        hidden: what comes to the first block.
        calls: how each block is called, without the hidden states; in the order of blocks.
    """

    hidden: torch.Tensor | None = None
    calls: list[Call] = field(default_factory=list)


class _DoneError(Exception):
    """All blocks have been called; what comes after them is not needed."""


def entering(
    model: nn.Module, units: Sequence[Unit], batch: Batch, tuples: bool, before: Entered | None
) -> Entered:
    """Run ``model`` on a batch with blocks that only note how they were called.

    Args:
        model: all but its blocks and what follows them has values.
        units: its blocks.
        batch: arguments.
        tuples: whether blocks return tuples.
        before: the last batch; equal values are kept once.

    Raises:
        ConfigError: blocks are not one chain, in which each takes what the one before it returns.
    """
    found, last = Entered(), None

    def noting(unit: Unit) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            if not args or not isinstance(args[0], torch.Tensor):
                raise ConfigError(
                    f"{unit.name} is not called with hidden states as its first argument"
                )
            at = len(found.calls)
            if unit.name != units[at].name or (at and args[0] is not last):
                raise ConfigError(
                    f"{unit.name} does not take what {units[at - 1].name} returns: only models "
                    "whose blocks are one chain can be compressed block by block"
                )
            if not at:
                found.hidden = args[0]
            found.calls.append(_call(args[1:], kwargs, before, at))
            if at + 1 == len(units):
                raise _DoneError
            # Another tensor with the same memory, so that a model that changes it is found out.
            last = args[0].view_as(args[0])
            return (last,) if tuples else last

        return forward

    for unit in units:
        unit.module.forward = noting(unit)
    try:
        with torch.no_grad():
            model(**batch, **_without_cache(model))
    except _DoneError:
        return found
    finally:
        for unit in units:
            del unit.module.forward
    raise ConfigError(
        f"only {len(found.calls)} of {len(units)} blocks of {type(model).__name__} were called"
    )


def _without_cache(model: nn.Module) -> dict[str, Any]:
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )


def _call(args: Any, kwargs: dict[str, Any], before: Entered | None, at: int) -> Call:
    if before is None:
        return Call(tuple(args), dict(kwargs))
    old = before.calls[at]
    return Call(
        tuple(_same(a, old.args[i] if i < len(old.args) else None) for i, a in enumerate(args)),
        {name: _same(value, old.kwargs.get(name)) for name, value in kwargs.items()},
    )


def _same(new: Any, old: Any) -> Any:
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_same(a, b) for a, b in zip(new, old, strict=True))
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        alike = new is old or (new.shape == old.shape and new.dtype == old.dtype)
        return old if alike and torch.equal(new, old) else new
    return new
