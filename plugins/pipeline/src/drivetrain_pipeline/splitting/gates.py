"""Gates: what is asked before a part of the model is called.

A gate lies in front of ``Module.__call__``, and so in front of all hooks of the part: a part that
does not run gathers no parameters and moves no activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Run = Callable[..., Any]
Gate = Callable[[tuple[Any, ...], Mapping[str, Any], Run], Any]
"""Called with the arguments of the part, and with what runs it; returns what the part returns."""

_GATE = "_pipeline_gate"
_gated: dict[type[nn.Module], type[nn.Module]] = {}


def install(module: nn.Module, gate: Gate) -> None:
    """Have every call of ``module`` go through ``gate``."""
    kind = type(module)
    if kind not in _gated:
        _gated[kind] = _with_gate(kind)
    module.__class__ = _gated[kind]
    vars(module)[_GATE] = gate


def remove(module: nn.Module) -> None:
    """Take a gate away."""
    if vars(module).pop(_GATE, None) is not None:
        module.__class__ = type(module).__bases__[0]


def _with_gate(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that is the same class to everybody who asks for names or instances."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gate = vars(self).get(_GATE)
        if gate is None:
            return kind.__call__(self, *args, **kwargs)
        return gate(args, kwargs, lambda *a, **k: kind.__call__(self, *a, **k))

    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**names, "__doc__": kind.__doc__})
