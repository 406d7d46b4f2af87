"""Saying what was used where it is sharded, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.contracts import ParameterTable
    from drivetrain_zero.gathering.unit_hooks import UnitHooks


def explain(loss: torch.Tensor, hooks: UnitHooks | None, table: ParameterTable) -> str:
    """Return what to add to a message about a loss that is no number.

    Args:
        loss: with its graph.
        hooks: know the forwards of the model, and what was taken out of a module between them.
        table: knows names.
    """
    if hooks is None:
        return ""
    used = next(_used_outside(loss, hooks.forwards), hooks.taken)
    if used is None:
        return ""
    return (
        f"; parameter {table.info(used).name} was read where it is sharded, as NaN: use it in the "
        "forward of the model, or inside `with drivetrain.whole(parameters):` on every rank"
    )


def _used_outside(
    loss: torch.Tensor, forwards: Sequence[tuple[int, int]]
) -> Iterator[nn.Parameter]:
    """Yield sharded parameters that operations outside of the model's forward have used.

    Args:
        loss: whose graph is searched.
        forwards: autograd's numbers of operations at the beginning and the end of each forward.
    """
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    known = set(nodes)
    for node in nodes:
        inside = any(first <= node._sequence_nr() < last for first, last in forwards)
        for following, _ in node.next_functions:
            parameter = getattr(following, "variable", None)
            if parameter is not None and not inside and hasattr(parameter, "drivetrain_handle"):
                yield parameter
            if following is not None and following not in known:
                known.add(following)
                nodes.append(following)


def refuse_scripted(module: nn.Module) -> None:
    """Check that all modules can be given hooks.

    Raises:
        ConfigError: one was made by ``torch.jit``.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ConfigError(
                f"zero_optimization: module {name or 'itself'} was made by torch.jit, so its "
                "parameters cannot be gathered around its forward: use stage 2 or less, give the "
                "engine the module as it was before, or compile it (engine.compile())"
            )
