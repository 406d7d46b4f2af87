"""Drivetrain's errors under the classes by which scripts catch those of DeepSpeed.

DeepSpeed says with assertions, ``ValueError`` and others what Drivetrain says with classes of its
own. What is raised through this package is both, so that a script's ``except AssertionError`` goes
on to work. The text stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ContextDecorator
from functools import lru_cache
from types import TracebackType
from typing import Any

from drivetrain.errors import CheckpointError, ConfigError, DrivetrainError, TrainingError

_ALSO: Mapping[type[DrivetrainError], tuple[type[Exception], ...]] = {
    ConfigError: (AssertionError, NotImplementedError, ValueError),
    TrainingError: (AssertionError, RuntimeError),
    CheckpointError: (AssertionError, RuntimeError, ValueError),
    DrivetrainError: (RuntimeError, ValueError),
}
"""Class of ours -> what DeepSpeed raises where we raise it; the first that fits counts."""


class AsDeepSpeed(ContextDecorator):
    """Lets errors of Drivetrain leave as classes that DeepSpeed's scripts catch, too.

    A context, and a decorator.
    """

    def __enter__(self) -> None:
        """Nothing to do before."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, DrivetrainError):
            raise of_deepspeed(error).with_traceback(traceback) from error.__cause__


@lru_cache(maxsize=64)
def raising(value: Any, name: str) -> Any:
    """A function, or a class by its constructor, whose errors are of DeepSpeed's classes, too.

    Args:
        value: of another package.
        name: dotted, under which it is shown; pickles of its objects find it there.
    """
    if not isinstance(value, type):
        return AsDeepSpeed()(value)
    kind: Any = value
    module, _, own = name.rpartition(".")
    names = {
        "__module__": module,
        "__doc__": kind.__doc__,
        "__init__": AsDeepSpeed()(kind.__init__),
    }
    return type(own, (kind,), names)


def of_deepspeed(error: DrivetrainError) -> DrivetrainError:
    """The same error, which is also of the classes that DeepSpeed raises."""
    kind = _of_both(type(error))
    return error if isinstance(error, kind) else _again(kind, error.args, vars(error))


_made: dict[type[DrivetrainError], type[DrivetrainError]] = {}
"""Class of ours -> the one that is of DeepSpeed's classes, too."""


def _of_both(kind: type[DrivetrainError]) -> type[DrivetrainError]:
    if kind not in _made:
        _made[kind] = _make(kind)
    return _made[kind]


def _make(kind: type[DrivetrainError]) -> type[DrivetrainError]:
    also = next(others for ours, others in _ALSO.items() if issubclass(kind, ours))
    missing = tuple(other for other in also if not issubclass(kind, other))
    if not missing:
        return kind

    def reduce(error: DrivetrainError) -> tuple[Any, ...]:
        return _unpickled, (kind, error.args, vars(error))

    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": reduce}
    return type(kind.__name__, (kind, *missing), names)


def _again(
    kind: type[DrivetrainError], args: tuple[Any, ...], attributes: Mapping[str, Any]
) -> DrivetrainError:
    made = kind.__new__(kind, *args)
    made.args = args
    vars(made).update(attributes)
    return made


def _unpickled(
    kind: type[DrivetrainError], args: tuple[Any, ...], attributes: Mapping[str, Any]
) -> DrivetrainError:
    """What a process gets of another one's error, whose class is made where it is needed."""
    return _again(_of_both(kind), args, attributes)
