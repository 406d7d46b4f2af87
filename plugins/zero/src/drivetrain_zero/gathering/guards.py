"""What keeps released parameters from being used by mistake, and shards from whole needs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts import UpdateRule

_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
