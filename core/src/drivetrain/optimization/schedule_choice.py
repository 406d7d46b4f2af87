"""Which schedule a job uses: a name in the config, or what the client brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import Optimizer

from drivetrain.checked_call import call_checked
from drivetrain.errors import ConfigError
from drivetrain.plan.known import TORCH_SCHEDULERS
from drivetrain.plan.params import check_params, declared_params
from drivetrain.wording import did_you_mean

if TYPE_CHECKING:
    from drivetrain.plan.registry import Registry


def make_schedule(
    name: str, params: Mapping[str, Any], optimizer: Optimizer, registry: Registry
) -> Any:
    """The schedule of a name: a registered class, or else one of ``torch.optim.lr_scheduler``.

    Registered ones are called as torch's are: ``factory(optimizer, **params)``.

    Raises:
        ConfigError: nobody serves the name, or a parameter is unknown, missing or out of range.
    """
    entry = registry.find("schedulers", name)
    known = next((own for own in TORCH_SCHEDULERS if own.lower() == name.lower()), "")
    factory = entry.load() if entry else getattr(torch.optim.lr_scheduler, known, None)
    if factory is None:
        names = [*registry.names("schedulers"), *TORCH_SCHEDULERS]
        raise ConfigError(
            f"scheduler.type: no scheduler is named {name!r}{did_you_mean(name, names)}"
        )
    if (model := declared_params(registry, "scheduler", name)) is not None:
        params = check_params(model, "scheduler", params)
    return _announced(call_checked("scheduler.params", factory, params, optimizer))


def adopt_schedule(client: Any, optimizer: Optimizer) -> Any:
    """A client's schedule: an object with ``step``, or a callable that makes one.

    Args:
        client: the object, or a callable of the optimizer.
        optimizer: the optimizer whose groups are trained.

    Raises:
        ConfigError: it is neither, or it changes the groups of another optimizer.
    """
    schedule = client if hasattr(client, "step") else None
    if schedule is None and callable(client):
        schedule = client(optimizer)
    if not hasattr(schedule, "step"):
        raise ConfigError(
            f"lr_scheduler must have a method step, or be a callable that makes such an object "
            f"from an optimizer; got {type(client).__name__}"
        )
    theirs = getattr(getattr(schedule, "optimizer", None), "param_groups", None)
    ours = {id(group) for group in optimizer.param_groups}
    if theirs is not None and not any(id(group) in ours for group in theirs):
        raise ConfigError(
            f"lr_scheduler {type(schedule).__name__} was made for an optimizer that is not "
            "trained; make it from the optimizer given to initialize, or pass a callable"
        )
    return _announced(schedule)


def _announced(schedule: Any) -> Any:
    """Keep torch from warning that its optimizer never steps: the engine does, before schedules."""
    optimizer = getattr(schedule, "optimizer", None)
    if isinstance(optimizer, Optimizer):
        cast("Any", optimizer)._opt_called = True
    return schedule
