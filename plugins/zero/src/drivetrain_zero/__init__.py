"""ZeRO for Drivetrain: model states sharded over data-parallel ranks (arXiv:1910.02054).

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain_zero.init import Init as Init

_HOME = {
    "Init": "init",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'drivetrain_zero' has no attribute {name!r}")
    value = getattr(import_module(f"drivetrain_zero.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
