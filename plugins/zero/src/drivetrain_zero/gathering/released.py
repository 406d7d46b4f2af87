"""Refuse what cannot work on sharded parameters, and name one that was read as NaN."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts import ParameterTable, UpdateRule
    from drivetrain_zero.gathering.unit_hooks import UnitHooks


_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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


def refuse_released_state_dict(module: nn.Module) -> None:
    """Make ``state_dict()`` of ``module`` an error while its own parameters are released."""
    if module._parameters and module not in _guarded:
        _guarded.add(module)
        module.register_state_dict_pre_hook(_check_gathered)  # type: ignore[no-untyped-call]


def _check_gathered(module: nn.Module, prefix: str, _keep_vars: bool) -> None:
    for name, parameter in module._parameters.items():
        handle = getattr(parameter, "drivetrain_handle", None)
        if handle is not None and not getattr(handle, "gathered", True):
            raise TrainingError(
                f"state_dict() of a module whose parameter {prefix}{name} is sharded: the values "
                "are not here. Call engine.module_state_dict(), or do it inside "
                "drivetrain.whole(module)"
            )


def refuse_communicating(rule: UpdateRule | None) -> None:
    """Rules that reduce gradients by themselves need whole ones."""
    if rule is not None and rule.communicates:
        raise ConfigError(
            f"zero_optimization: the optimizer {type(rule).__name__} communicates gradients by "
            "itself and needs them whole, so they cannot be sharded; use stage 0, or another "
            "optimizer.type"
        )
