"""The optimizer that training loops hold: live hyper-parameters, and the engine's step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from drivetrain.errors import ConfigError, TrainingError


class EngineOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` over the client's parameters whose ``step`` is the engine's.

    ``param_groups`` are the very dicts that update rules read, so schedules and loops change
    learning rates here. States live with the engine's model states and are saved by checkpoints;
    :meth:`state_dict` holds hyper-parameters only.

    Args:
        groups: live groups; each dict is kept, not copied.
        names: the model's parameters and their names.
        step: what :meth:`step` does.
        zero_grad: what :meth:`zero_grad` does.
        type_name: the optimizer's name, for reports.
        defaults: hyper-parameters that groups added without them get.

    Raises:
        ConfigError: a parameter occurs twice or is not the model's, or nothing can be trained.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        *,
        step: Callable[[], None],
        zero_grad: Callable[[bool], None],
        type_name: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        check_groups(groups, names)
        self.type_name = type_name
        self._engine_zero_grad = zero_grad
        super().__init__(list(groups), dict(defaults or {}))
        self._engine_step = step
        self._live_groups = list(self.param_groups)

    def refuse_other_groups(self) -> None:
        """Check that ``param_groups`` are still the dicts that update rules read.

        Raises:
            TrainingError: a group was replaced, added or removed.
        """
        groups = self.param_groups
        if len(groups) != len(self._live_groups) or any(map(is_not, groups, self._live_groups)):
            raise TrainingError(
                "optimizer.param_groups was replaced after initialize, which updates would not "
                "see: change values inside the groups that are there"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the states of the groups are placed."""
        if hasattr(self, "_engine_step"):
            raise TrainingError(
                "parameter groups cannot be added after initialize; build the engine anew"
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run ``closure`` if there is one, then the engine's step; returns the closure's value."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._engine_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients accumulated so far."""
        self._engine_zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over hyper-parameters, into the same group dicts, and say that this is all.

        Raises:
            ConfigError: there are states, which checkpoints alone bring back, or the groups are
                not as many, or not as large, as this optimizer's.
        """
        given, own = state_dict["param_groups"], self.param_groups
        sizes, wanted = ([len(group["params"]) for group in groups] for groups in (given, own))
        if sizes != wanted:
            raise ConfigError(
                f"the optimizer state has {len(sizes)} groups of {sizes} parameters, but this "
                f"optimizer has {len(wanted)} of {wanted}"
            )
        if state_dict.get("state"):
            raise ConfigError("an optimizer's states are loaded by engine.load_checkpoint() alone")
        logging.getLogger("drivetrain.engine").warning(
            "only hyper-parameters were loaded; states come back with engine.load_checkpoint()"
        )
        for group, values in zip(own, given, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})


def check_groups(groups: Sequence[dict[str, Any]], names: Mapping[nn.Parameter, str]) -> None:
    """Make sure that groups hold parameters of the model, each once, and some that are trained.

    Args:
        groups: dicts with ``"params"``.
        names: the model's parameters and their names.

    Raises:
        ConfigError: names the parameters at fault.
    """
    if not any(parameter.requires_grad for parameter in names):
        raise ConfigError(
            "the model has no trainable parameters"
            + (f": all {len(names)} have requires_grad=False" if names else "")
        )
    seen: dict[nn.Parameter, int] = {}
    problems: list[str] = []
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in names:
                problems.append(
                    f"parameter {position} of optimizer group {index}, shape "
                    f"{tuple(parameter.shape)}, is not the model's; pass model.parameters() of the "
                    "model given to initialize"
                )
            elif parameter in seen:
                problems.append(
                    f"parameter {names[parameter]} is in optimizer group {seen[parameter]} and "
                    f"again in group {index}"
                )
            seen[parameter] = index
    if not problems and not any(parameter.requires_grad for parameter in seen):
        problems.append("no parameter of the optimizer is trainable")
    if problems:
        raise ConfigError(problems)
