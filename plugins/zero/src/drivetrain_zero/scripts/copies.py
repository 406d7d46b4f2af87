"""What a copy or a pickle of a sharded module gets: its whole parameters, and none of our hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from drivetrain.errors import TrainingError

_OURS = ("drivetrain_handle", "__deepcopy__", "__reduce_ex__")
"""Attributes of a sharded parameter that its copies do not have."""


class Hook:
    """A hook of a module that does nothing in copies of the module.

    Args:
        call: the hook.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call(*args, **kwargs)

    def __deepcopy__(self, _memo: object) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _get_no_hook, ()


def no_hook(*_args: object, **_kwargs: object) -> None:
    """Take the place of a :class:`Hook` in a copy."""


def _get_no_hook() -> Callable[..., None]:
    return no_hook


def guard_copies(parameter: nn.Parameter) -> None:
    """Copy and pickle ``parameter`` as an ordinary one while it is whole, and refuse it otherwise.

    Raises:
        TrainingError: by ``copy.deepcopy`` and ``pickle``, while the parameter is released.
    """
    own: Any = parameter
    known = weakref.ref(parameter)
    own.__deepcopy__ = partial(_copy, known)
    own.__reduce_ex__ = partial(_reduce, known)


def _copy(known: weakref.ref[nn.Parameter], memo: dict[int, Any]) -> nn.Parameter:
    parameter = known()
    assert parameter is not None, "it is being copied"
    handle = getattr(parameter, "drivetrain_handle", None)
    parameter.data  # noqa: B018 - a model under construction by zero.Init makes it whole
    if not getattr(handle, "gathered", True):
        raise TrainingError(
            f"parameter {getattr(handle, 'name', '')} is copied or pickled while it is sharded, so "
            "the copy would not have its values: do it on every rank inside "
            "`with drivetrain.whole(module):`"
        )
    copied: nn.Parameter = type(parameter).__deepcopy__(parameter, memo)  # type: ignore[no-untyped-call]
    for name in _OURS:
        vars(copied).pop(name, None)
    return copied


def _reduce(known: weakref.ref[nn.Parameter], protocol: int) -> Any:
    copied: Any = _copy(known, {})  # torch does not type the method
    return copied.__reduce_ex__(protocol)
