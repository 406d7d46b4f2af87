"""Update rules that torch does not have in a form for flat buckets, and rules around any rule.

They are imported when they are first used, since their parameters are checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain_optimizers.lamb import Lamb
    from drivetrain_optimizers.lion import Lion
    from drivetrain_optimizers.muon import Muon

__all__ = ["Lamb", "Lion", "Muon"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.lower()}"), name)
