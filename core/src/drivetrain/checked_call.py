"""Calling what a config names with the parameters that it gives, and naming the wrong ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.wording import as_json, did_you_mean


def call_checked(
    section: str, function: Callable[..., Any], params: Mapping[str, Any], *leading: Any
) -> Any:
    """``function(*leading, **params)``, with every wrong parameter named by its config path.

    Lists become tuples, as JSON has no tuples.

    Args:
        section: config path of the parameters, e.g. ``"optimizer.params"``.
        function: a class or factory whose keyword arguments are the parameters.
        params: what the config gives.
        leading: positional arguments that are not the config's.

    Raises:
        ConfigError: parameters that are unknown, missing, of a wrong type, or refused by
            ``function``.
    """
    label = _label(function)
    if problems := parameter_problems(section, function, params, len(leading)):
        raise ConfigError(problems)
    required = _required(_accepted(function, len(leading)))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in params.items()}
    try:
        return function(*leading, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        for name in given:
            alone = {key: given[key] for key in given if key == name or key in required}
            if not _accepts(function, leading, alone):
                problem = f"{section}.{name}: {label} refuses {as_json(params[name])}: {error}"
                raise ConfigError(problem) from error
        raise ConfigError(f"{section}: {label} refuses {as_json(dict(params))}: {error}") from error


def parameter_problems(
    section: str, function: Callable[..., Any], params: Mapping[str, Any], leading: int = 0
) -> list[str]:
    """What the signature of ``function`` says against ``params``: names, and types of defaults.

    Args:
        section: config path of the parameters.
        function: a class or factory whose keyword arguments are the parameters.
        params: what the config gives.
        leading: how many of its first parameters are not the config's.
    """
    accepted = _accepted(function, leading)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    named = {k: p for k, p in accepted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    label = _label(function)
    problems = [
        f"{section}.{name}: {label} has no such parameter{did_you_mean(name, named)} "
        f"(it has {', '.join(named)})"
        for name in params
        if name not in named and not open_ended
    ]
    problems += [
        f"{section}.{name}: {label} needs it" for name in _required(named) if name not in params
    ]
    problems += [
        f"{section}.{name}: {problem}"
        for name, value in params.items()
        if name in named and (problem := _wrong_type(value, named[name].default))
    ]
    return problems


def _accepted(function: Callable[..., Any], leading: int) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(function).parameters.items())[leading:])


def _required(accepted: Mapping[str, inspect.Parameter]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [k for k, p in accepted.items() if p.default is p.empty and p.kind not in kinds]


def _label(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def require_keywords(section: str, module: nn.Module, names: Sequence[str]) -> None:
    """Make sure that ``module(...)`` takes keywords which a config section adds to it.

    Args:
        section: config path that adds them.
        module: the client's.
        names: the keywords.

    Raises:
        ConfigError: ``module.forward`` takes neither them nor any keyword.
    """
    accepted = inspect.signature(module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    missing = [name for name in names if name not in accepted]
    if missing and not open_ended:
        raise ConfigError(
            f"{section}: calls the model with {' and '.join(names)}, but the forward of "
            f"{type(module).__name__} does not take {' and '.join(missing)}; add "
            f"{'it' if len(missing) == 1 else 'them'}, or remove the section"
        )


def _accepts(function: Callable[..., Any], leading: tuple[Any, ...], params: Any) -> bool:
    try:
        function(*leading, **params)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _wrong_type(value: Any, default: Any) -> str | None:
    """Why ``value`` cannot stand where ``default`` does, or ``None``."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else f"expected true or false, got {as_json(value)}"
    # Some numbers may be given for each group; the function itself counts them.
    if isinstance(default, Number) and not isinstance(value, (list, tuple)):
        fits = isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
        if not fits or not math.isfinite(value):
            return f"expected a finite number, got {type(value).__name__} {as_json(value)}"
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            return f"expected a list of {len(default)} numbers, got {as_json(value)}"
        for item, example in zip(value, default, strict=True):
            if example is not None and (problem := _wrong_type(item, example)):
                return problem
    return None
