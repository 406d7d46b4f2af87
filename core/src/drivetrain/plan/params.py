"""Parameters of optimizers and schedules, declared as data, so that a config is checked early.

What makes an optimizer or a schedule imports torch; its parameters need not. An entry point of
``drivetrain.optimizer_params`` or ``drivetrain.scheduler_params`` bears the name of an optimizer or
a schedule and is a :class:`Params` in a light module of the same distribution. A plan checks
``optimizer.params`` and ``scheduler.params`` with it, and what it makes of the values is what the
optimizer gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import ValidationError

from drivetrain.contracts.plugin.params import Params
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.config.problems import describe
from drivetrain.plan.registry import CORE

if TYPE_CHECKING:
    from drivetrain.plan.registry import Group, Registry

Kind = Literal["optimizer", "scheduler"]


def declared_params(registry: Registry, kind: Kind, name: str) -> type[Params] | None:
    """The declared parameters of an optimizer or a schedule; ``None`` where there are none.

    Only the distribution that serves the name speaks for it.

    Raises:
        PluginError: they do not load, or are no :class:`Params`.
    """
    served = registry.find(cast("Group", f"{kind}s"), name)
    owner = CORE if served is None else served.distribution  # core speaks for torch's classes
    group = cast("Group", f"{kind}_params")
    for entry in registry.entries(group):
        ours = entry.distribution == owner
        added = served is not None and entry.version == served.version == "in-process"
        if entry.name.lower() == name.lower() and (ours or added):
            found = entry.load()
            if not (isinstance(found, type) and issubclass(found, Params)):
                raise PluginError(f"{entry.label} is {found!r}, not a subclass of Params")
            return found
    return None


def check_params(model: type[Params], kind: Kind, params: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters as ``model`` understands them.

    Args:
        model: what the optimizer or schedule takes.
        kind: which of the two it is.
        params: what the config gives, without those that say ``"auto"``.

    Raises:
        ConfigError: every parameter that is unknown, missing, or of a wrong type or value.
    """
    try:
        checked = model.model_validate(dict(params))
    except ValidationError as error:
        path = f"{kind}.params"
        raise ConfigError(describe(error, model, path, params)) from None
    return {name: getattr(checked, name) for name in model.model_fields if name in params}
