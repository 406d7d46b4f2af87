"""``safe_get_*`` and ``safe_set_*``: single states by parameter, at every stage.

Where a function's name says *full*, values have the shape of the client's tensor and the call is
collective over the ranks that share the parameter or have parts of it. Where it says *local*, they
are what this rank keeps, flat; getting is not collective for them, except for gradients, and
setting is.

Gradients are what plain torch has in ``.grad`` after the window's last backward: the mean over the
global batch, without loss scale, before clipping. They can be read and written between that
backward and ``step()``; everything else at any time. Parameters that no engine trains have no
states: getters return ``None``, setters raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_zero.scripts.state_access import GRADIENT, MASTER, StateAccess, is_trained


def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """The master weight, or the parameter where it is its own master, in float32 (or float64)."""
    return _get(param, MASTER)


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite the master weight and the parameter; the first rank's value counts."""
    _set(param, value, MASTER)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """An optimizer state, such as ``"exp_avg"``.

    Raises:
        TrainingError: there is no state of that name; lists those that are.
    """
    return _get(param, optim_state_key)


def safe_set_full_optimizer_state(
    param: nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Overwrite an optimizer state; the first rank's value counts."""
    _set(param, value, optim_state_key)


def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """The gradient; ``None`` when the window has none yet.

    Raises:
        TrainingError: the window's last micro-batch is still to come.
    """
    return _get(param, GRADIENT)


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite the gradient that the next update uses; the first rank's value counts.

    Raises:
        TrainingError: there is no gradient, or the window's last micro-batch is still to come.
    """
    _set(param, value, GRADIENT)


def safe_update_full_grad_vectorized(
    param_list: Sequence[nn.Parameter],
    update_func: Callable[[torch.Tensor, nn.Parameter], torch.Tensor | None],
) -> None:
    """Change the gradients of several parameters, which travel together.

    Args:
        param_list: trained parameters of one engine.
        update_func: gets a gradient and its parameter; returns the new gradient, or ``None`` when
            it has changed the given one in place.

    Raises:
        TrainingError: there are no gradients, or the window's last micro-batch is still to come.
    """
    parameters = [parameter for parameter in param_list if is_trained(parameter)]
    if not parameters:
        return
    access = StateAccess(parameters, GRADIENT)
    new = []
    for parameter, gradient in zip(parameters, access.read(), strict=True):
        if gradient is None:
            raise TrainingError("there is no gradient yet in this window that could be updated")
        answer = update_func(gradient, parameter)
        new.append(gradient if answer is None else answer)
    access.write(new)


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the master weight, flat; empty when it keeps none."""
    return _get_local(param, MASTER)


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite this rank's part of the master weight and the parameter."""
    _set_local(param, value, MASTER)


def safe_get_local_optimizer_state(
    param: nn.Parameter, optim_state_key: str
) -> torch.Tensor | None:
    """This rank's part of an optimizer state, flat; empty when it keeps none."""
    return _get_local(param, optim_state_key)


def safe_set_local_optimizer_state(
    param: nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Overwrite this rank's part of an optimizer state."""
    _set_local(param, value, optim_state_key)


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the gradient, flat; ``None`` when the window has none yet."""
    return _get_local(param, GRADIENT)


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite this rank's part of the gradient."""
    _set_local(param, value, GRADIENT)


def _get(parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
    return StateAccess([parameter], kind).read()[0] if is_trained(parameter) else None


def _set(parameter: nn.Parameter, value: torch.Tensor, kind: str) -> None:
    _refuse_untrained(parameter, kind)
    StateAccess([parameter], kind).write([value])


def _get_local(parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
    return StateAccess([parameter], kind).read_local()[0] if is_trained(parameter) else None


def _set_local(parameter: nn.Parameter, value: torch.Tensor, kind: str) -> None:
    _refuse_untrained(parameter, kind)
    StateAccess([parameter], kind).write_local([value])


def _refuse_untrained(parameter: nn.Parameter, kind: str) -> None:
    if not is_trained(parameter):
        raise TrainingError(
            f"the {kind} of a parameter of shape {tuple(parameter.shape)} was to be set, but no "
            "open engine trains it"
        )
